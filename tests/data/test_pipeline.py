"""The stream of groups: its order, its start anywhere, its workers, its errors."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core import seeds, storage
from trainer.core.errors import ConfigError, DataError, StorageError
from trainer.data import fetch, manifest, pipeline, shards
from trainer.data.lanes import blocks_per_window
from trainer.probing import data as speed

# ---- the order, written down again in plain Python -----------------------------------------------


def drawn_order(seed: int, index: int, count: int) -> list[int]:
    """0 to count - 1 sorted by random keys."""
    pair = seeds.fold_in_groups(seed, seeds.Purpose.LANE_ORDER, tf.constant([index], tf.int64))[0]
    keys = tf.random.stateless_uniform([count], pair, None, None, tf.int64).numpy().tolist()
    return sorted(range(count), key=lambda n: keys[n])


def lane_records(
    data: manifest.Manifest, seed: int, lane: int, per_window: int
) -> Iterator[tuple[int, int]]:
    """(epoch, record of the shard) for all the images of a lane, in order."""
    count, lanes = data.shards[lane].count, len(data.shards)
    blocks = [list(range(n, min(n + data.block, count))) for n in range(0, count, data.block)]
    windows = -(-len(blocks) // per_window)
    for epoch in itertools.count():
        order = drawn_order(seed, epoch * (windows + 1) * lanes + lane, len(blocks))
        for window in range(windows):
            chosen = order[window * per_window : (window + 1) * per_window]
            held = [record for block in chosen for record in blocks[block]]
            index = (epoch * (windows + 1) + window + 1) * lanes + lane
            yield from ((epoch, held[n]) for n in drawn_order(seed, index, len(held)))


def group_numbers(
    data: manifest.Manifest, seed: int, size: int, window: int, groups: int
) -> list[list[int]]:
    """The global record numbers of the first groups."""
    per_window = blocks_per_window(data, window)
    lanes = [lane_records(data, seed, lane, per_window) for lane in range(len(data.shards))]
    first = np.cumsum([0] + [shard.count for shard in data.shards])
    return [
        [int(first[g % len(lanes)]) + next(lanes[g % len(lanes)])[1] for _ in range(size)]
        for g in range(groups)
    ]


def numbers_of(images: tf.Tensor) -> list[list[int]]:
    """The record numbers that the images of [groups, size, H, W, 3] tell."""
    first = images[:, :, 0, 0].numpy().astype(int)
    return (first[..., 0] * 256 + first[..., 1]).tolist()


def take(stream: pipeline.ImageStream, batches: int) -> dict[int, list[int]]:
    """Record numbers by group number."""
    found = {}
    for images, _, groups in itertools.islice(stream, batches):
        found.update(zip(groups.numpy().tolist(), numbers_of(images), strict=True))
    return found


@settings(max_examples=8)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    block=st.sampled_from([1, 4, 8]),
    window=st.integers(1, 40),
    size=st.integers(1, 5),
    per_batch=st.integers(1, 3),
    workers=st.integers(1, 2),
    start=st.integers(0, 60),
    seed=st.integers(0, 2**63 - 1),
    held=st.booleans(),
)
def test_the_order_is_the_documented_one_from_anywhere_for_any_workers(
    build, counts, block, window, size, per_batch, workers, start, seed, held
):
    counts, per_batch = counts * workers, per_batch * workers  # so that all are shared evenly
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        if not held:  # as for records so large that lanes cannot hold their windows
            patch.setattr("trainer.data.lanes._HELD_BYTES", 0)
            block, window = next(b for b in (4, 1) if b <= size), 1
        data = build(Path(directory), counts, block=block)
        batches = 1 + 30 // per_batch
        expected = group_numbers(data, seed, size, window, start + batches * per_batch)
        found = {}
        for worker in range(workers):
            stream = pipeline.ImageStream(
                data,
                group_size=size,
                groups_per_batch=per_batch,
                seed=seed,
                start_group=start,
                worker=worker,
                num_workers=workers,
                window=window,
            )
            mine = take(stream, batches)
            assert all(group % workers == worker for group in mine)
            found.update(mine)
        assert found == dict(enumerate(expected[start:], start))


@settings(max_examples=50)
@given(
    count=st.integers(1, 300),
    block=st.sampled_from([1, 4, 16, 64]),
    per_window=st.integers(1, 4),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_epoch_is_a_permutation_and_differs(count, block, per_window, epoch, seed):
    blocks = -(-count // block)
    shard = manifest.Shard("a", count, count, 0, list(range(blocks)))
    data = manifest.Manifest(
        "a", count, (1, 1), 1, [], [], "none", "box", "", block, [shard, shard]
    )
    stream = lane_records(data, seed, 1, per_window)
    first = [next(stream) for _ in range(count)]
    second = [next(stream) for _ in range(count)]
    assert sorted(record for _, record in first) == list(range(count))
    assert sorted(record for _, record in second) == list(range(count))
    if count > 20:
        assert [record for _, record in first] != [record for _, record in second]


def test_windows_mix_blocks_anew_in_each_epoch(build, tmp_path):
    """Images that share a window in one epoch are strangers in another."""
    data = build(tmp_path, [256], block=8)
    stream = lane_records(data, 0, 0, 4)
    epochs = [[next(stream)[1] for _ in range(256)] for _ in range(2)]
    windows = [[frozenset(epoch[n : n + 32]) for n in range(0, 256, 32)] for epoch in epochs]
    assert not set(windows[0]) & set(windows[1])


# ---- the stream ----------------------------------------------------------------------------------


def stream_of(data: manifest.Manifest, **options) -> pipeline.ImageStream:
    return pipeline.ImageStream(
        data, **{"group_size": 4, "groups_per_batch": 2, "seed": 3, "window": 64, **options}
    )


def test_elements_have_the_documented_shapes_and_content(build, tmp_path, pixels_of):
    data = build(tmp_path, [50, 50], classes=3)
    stream = stream_of(data, use_labels=True)
    assert stream.element_spec == (
        tf.TensorSpec([2, 4, 2, 3, 3], tf.uint8),
        tf.TensorSpec([2, 4], tf.int64),
        tf.TensorSpec([2], tf.int64),
    )
    for step in range(30):
        images, labels, groups = next(stream)
        assert groups.numpy().tolist() == [2 * step, 2 * step + 1]
        numbers = np.array(numbers_of(images))
        np.testing.assert_array_equal(labels, numbers % 3)
        expected = [[pixels_of(number) for number in group] for group in numbers]
        np.testing.assert_array_equal(images, expected)


def test_labels_are_minus_one_unless_they_are_wanted(build, tmp_path):
    _, labels, _ = next(stream_of(build(tmp_path, [9], classes=2)))
    assert (labels.numpy() == -1).all()
    with pytest.raises(DataError, match=r"data\.use_labels is on, but .* has no labels"):
        stream_of(build(tmp_path, [9]), use_labels=True)


def test_a_large_batch_comes_in_one_piece(build, tmp_path):
    """More groups than one call decodes."""
    data = build(tmp_path, [30, 31])
    found = take(stream_of(data, group_size=8, groups_per_batch=18), 2)
    assert found == dict(enumerate(group_numbers(data, 3, 8, 64, 36)))


def test_mirrored_images_are_drawn_by_seed_and_place_alone(build, tmp_path, pixels_of):
    data = build(tmp_path, [64, 64])

    def flips(seed: int = 3, start: int = 0, per_batch: int = 2) -> np.ndarray:
        stream = stream_of(
            data, mirror=True, seed=seed, start_group=start, groups_per_batch=per_batch
        )
        found = []
        while len(found) < 120:
            images = next(stream)[0].numpy().reshape(-1, 2, 3, 3)
            for image in images:
                # Columns of a sound image differ by 3 in the second row; mirrored, by -3.
                mirrored = bool(image[1, 0, 0] > image[1, 2, 0])
                upright = image[:, ::-1] if mirrored else image
                number = int(upright[0, 0, 0]) * 256 + int(upright[0, 0, 1])
                np.testing.assert_array_equal(upright, pixels_of(number))
                found.append(mirrored)
        return np.array(found[:120])

    base = flips()
    assert 40 < base.sum() < 80
    np.testing.assert_array_equal(base[40:], flips(start=10)[:80])
    np.testing.assert_array_equal(base, flips(per_batch=4))
    assert (base != flips(seed=4)).any()


def test_the_seed_changes_the_order(build, tmp_path):
    data = build(tmp_path, [64])
    assert take(stream_of(data), 4) != take(stream_of(data, seed=4), 4)


def test_a_start_far_away_reads_only_what_it_needs(build, tmp_path):
    """Everything but the window wanted (and the next, read ahead) is damaged."""
    data = build(tmp_path, [800], block=8)
    start = 10**12 + 1
    place = pipeline.ImageStream(data, group_size=4, groups_per_batch=2, seed=3, window=16)
    step, _ = place._graph.place(0, start * 4)
    order = drawn_order(3, step // 50 * 51, 100)
    needed = order[step % 50 * 2 : step % 50 * 2 + 4]
    assert len(needed) == 4, "the seed should not put the start at an epoch's end"
    path = Path(data.path(0))
    content = path.read_bytes()
    ends = [*data.shards[0].index, len(content)]
    spoiled = bytearray(len(content))
    for block in needed:
        spoiled[ends[block] : ends[block + 1]] = content[ends[block] : ends[block + 1]]
    path.write_bytes(spoiled)
    images, _, groups = next(stream_of(data, start_group=start, window=16))
    assert groups.numpy().tolist() == [start, start + 1]
    assert set(np.ravel(numbers_of(images))) <= {8 * b + n for b in needed for n in range(8)}


def test_windows_shrink_until_all_lanes_fit_in_memory():
    def data(count: int, mean: int, block: int) -> manifest.Manifest:
        shard = manifest.Shard("a", 1000, 1000 * mean, 0, [])
        return manifest.Manifest(
            "a", 1000 * count, (1, 1), 1, [], [], "none", "box", "", block, [shard] * count
        )

    small = data(8, 1500, 64)
    assert blocks_per_window(small, 256) == 4
    assert blocks_per_window(small, 1) == 1
    large = data(512, 1_300_000, 1)
    assert blocks_per_window(large, 256) == 1
    medium = data(64, 50_000, 8)
    assert 64 * blocks_per_window(medium, 256) * 8 * 50_000 <= 1 << 27
    assert blocks_per_window(medium, 256) > 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_workers": 4}, ConfigError, "4 workers cannot share 6 shards"),
        ({"num_workers": 3}, ConfigError, "3 workers cannot share 2 groups.*training.batch_size"),
        ({"worker": 1}, ConfigError, "worker 1 is not one of 1"),
        ({"group_size": 0}, ConfigError, "must be positive"),
        ({"start_group": -1}, ConfigError, "must be positive"),
        ({"window": 0}, ConfigError, r"data\.window is 0"),
    ],
)
def test_numbers_that_do_not_fit(build, tmp_path, options, error, message):
    data = build(tmp_path, [3] * 6)
    with pytest.raises(error, match=message):
        stream_of(data, **options)


# ---- broken data ---------------------------------------------------------------------------------


def drain(data: manifest.Manifest, **options) -> None:
    """Reads more than an epoch."""
    for _ in itertools.islice(stream_of(data, **options), 40):
        pass


def test_a_missing_shard_is_named_before_training(build, tmp_path):
    data = build(tmp_path, [20, 20])
    Path(data.path(1)).unlink()
    with pytest.raises(DataError, match="shard set-00001-of-00002.tfrecord of .* is missing"):
        stream_of(data)


def test_a_cut_shard_is_named_before_training(build, tmp_path):
    data = build(tmp_path, [20, 20])
    path = Path(data.path(1))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="set-00001-of-00002.tfrecord .* bytes, the manifest says"):
        stream_of(data)


def test_a_worker_does_not_look_at_the_shards_of_others(build, tmp_path):
    data = build(tmp_path, [20, 20])
    Path(data.path(1)).unlink()
    drain(data, num_workers=2)


@pytest.mark.parametrize("place", [2, 14, -1])
def test_a_corrupt_record_is_named(build, tmp_path, place):
    data = build(tmp_path, [20, 20], block=4)
    path = Path(data.path(1))
    content = bytearray(path.read_bytes())
    start = data.shards[1].index[2]  # record 8
    end = data.shards[1].index[3]
    content[start + place if place > 0 else end + place] ^= 1
    path.write_bytes(content)
    number = 8 if place > 0 else 11
    with pytest.raises(DataError, match=rf"record {number} of shard set-00001-of-00002.tfrecord"):
        drain(data)


def _with(payload_of, **changes) -> bytes:
    example = tf.train.Example.FromString(payload_of(5, -1))
    for key, value in changes.items():
        feature = example.features.feature["image/" + key.replace("_", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value[0] = value
        else:
            feature.int64_list.value[0] = value
    return example.SerializeToString()


def broken_payloads(payload_of) -> dict[str, tuple[bytes, str]]:
    sound = tf.train.Example.FromString(payload_of(5, -1))
    encoded = sound.features.feature["image/encoded"].bytes_list.value[0]
    wide = tf.io.encode_png(tf.zeros([2, 4, 3], tf.uint8)).numpy()
    grey = tf.io.encode_png(tf.zeros([2, 3, 1], tf.uint8)).numpy()
    return {
        "no example": (b"\xff\xff", "it is not an example"),
        "empty": (b"", "it is not an example"),
        "height": (_with(payload_of, height=3), "it says 3x3 pixels, the manifest says 3x2"),
        "size": (_with(payload_of, encoded=wide), "its image has 4x2 pixels and 3 channels"),
        "channels": (_with(payload_of, encoded=grey), "its image has 3x2 pixels and 1 channels"),
        "truncated": (_with(payload_of, encoded=encoded[:-30]), "its image cannot be decoded"),
        "label": (_with(payload_of, class_label=0), "its label is 0, the manifest says -1 to -1"),
    }


@pytest.mark.parametrize(
    "kind", ["no example", "empty", "height", "size", "channels", "truncated", "label"]
)
def test_a_wrong_record_is_named(build, tmp_path, payload_of, kind):
    payload, message = broken_payloads(payload_of)[kind]
    data = build(tmp_path, [3, 20], payloads={5: payload})
    pattern = rf"record 2 of shard set-00001-of-00002\.tfrecord in .*: {message}"
    with pytest.raises(DataError, match=pattern):
        drain(data)
    with pytest.raises(DataError, match=pattern):
        shards.read_images(data, [5])


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_named(build, tmp_path, payload_of, label):
    data = build(tmp_path, [9], classes=2, payloads={4: payload_of(4, label)})
    with pytest.raises(DataError, match=f"record 4 .* label is {label}, the manifest says 0 to 1"):
        drain(data)


@pytest.mark.parametrize("surplus", [-3, -1, 1, 3])
def test_another_count_than_the_manifest_says_is_named(build, tmp_path, surplus):
    data = build(tmp_path, [21, 21], block=4)
    shard = data.shards[1]
    said = shard.count - surplus
    index = shard.index[: -(-said // 4)]
    wrong = dataclasses.replace(shard, count=said, index=index)
    data = dataclasses.replace(data, num_images=21 + said, shards=[data.shards[0], wrong])
    with pytest.raises(DataError, match=f"holds 21 records, the manifest says {said}"):
        drain(data)


@pytest.mark.parametrize("change", ["gone", "cut"])
def test_a_shard_that_changes_under_way_is_named(build, tmp_path, change):
    data = build(tmp_path, [200, 200], block=4)
    stream = stream_of(data, window=8)
    next(stream)
    path = Path(data.path(1))
    if change == "gone":
        path.rename(path.with_suffix(".old"))
        message = "set-00001-of-00002.tfrecord of .* is missing"
    else:
        path.write_bytes(path.read_bytes()[:-500])
        message = "set-00001-of-00002.tfrecord of .* bytes, the manifest says"
    with pytest.raises(DataError, match=message):
        for _ in itertools.islice(stream, 60):
            pass


# ---- records left out ----------------------------------------------------------------------------


def damage(data: manifest.Manifest) -> dict[int, int]:
    """Spoils the payload of record 5 in shard 1, and the length of its record 18; their places."""
    path = Path(data.path(1))
    content = bytearray(path.read_bytes())
    place = 0
    starts = {}
    for number in range(19):
        starts[number] = place
        if number == 18:
            content[place] ^= 1
        length = int.from_bytes(content[place : place + 8], "little")
        if number == 5:
            content[place + 12 + length // 2] ^= 1
        place += 16 + length
    path.write_bytes(content)
    return starts


# Record n of shard 1 is image 30 + n. Blocks have four records: 16 to 19 lie together, and behind
# the damaged length of 18 nobody finds 19.
SHOWN = {35: 36, 48: 46, 49: 46}


@pytest.mark.parametrize(("start", "held"), [(0, True), (7, True), (33, True), (0, False)])
def test_damaged_records_give_way_to_their_neighbours(build, tmp_path, monkeypatch, start, held):
    """All other images stay where they are, wherever the stream starts."""
    options = {"start_group": start, "window": 8 if held else 1}
    monkeypatch.setattr("trainer.data.lanes._HELD_BYTES", 256 << 20 if held else 0)
    data = build(tmp_path, [30, 30], block=4)
    sound = take(stream_of(data, **options), 30)
    starts = damage(data)
    told: list[str] = []
    bad_records = shards.BadRecords(data, 3, told.append)
    found = take(stream_of(data, bad_records=bad_records, **options), 30)
    assert found == {
        group: [SHOWN.get(number, number) for number in numbers] for group, numbers in sound.items()
    }
    lines = [re.sub(r" in \S+,", ",", line) for line in sorted(told)]
    name = "shard set-00001-of-00002.tfrecord"
    assert [line.partition(" (")[0] for line in lines] == [
        f"left out: record 18 of {name}, at byte {starts[18]}: its length is damaged, which hides "
        f"those behind it up to record 19, before byte {data.shards[1].index[5]}",
        f"left out: record 5 of {name}, at byte {starts[5]}: its checksum is wrong",
    ]
    assert any("(3 of data.max_bad_records=3)" in line for line in lines)


def test_a_block_without_a_sound_record_shows_the_first_of_the_next(build, tmp_path, payload_of):
    spoiled = dict.fromkeys((4, 5, 6, 7), b"no example")
    data = build(tmp_path, [12], block=4, payloads=spoiled)
    found = take(stream_of(data, bad_records=shards.BadRecords(data, 4)), 6)
    assert {number for numbers in found.values() for number in numbers} == {
        0,
        1,
        2,
        3,
        *range(8, 12),
    }
    shown = [number for group in range(3) for number in found[group]]
    assert sorted(shown) == [0, 1, 2, 3, 8, 8, 8, 8, 8, 9, 10, 11]


def test_grids_and_the_stream_count_a_damaged_record_once(build, tmp_path):
    """And show the same in its place, whoever meets it first."""
    data = build(tmp_path, [30, 30], block=4, classes=3)
    damage(data)
    shown: dict[tuple[str, str], object] = {}
    told: dict[str, list[str]] = {}
    for first in ("grid", "stream"):
        told[first] = []
        bad_records = shards.BadRecords(data, 3, told[first].append)
        stream = stream_of(data, bad_records=bad_records, use_labels=True)
        for what in ("grid", "stream") if first == "grid" else ("stream", "grid"):
            if what == "stream":
                shown[first, what] = take(stream, 30)
            else:
                images, labels = shards.read_images(data, range(60), bad_records)
                numbers = np.ravel(numbers_of(tf.constant(images[None])))
                np.testing.assert_array_equal(labels, numbers % 3)
                shown[first, what] = numbers.tolist()
    expected = [SHOWN.get(number, number) for number in range(60)]
    assert shown["grid", "grid"] == shown["stream", "grid"] == expected
    assert shown["grid", "stream"] == shown["stream", "stream"]
    assert len(told["grid"]) == len(told["stream"]) == 2


def test_a_grid_of_another_workers_damaged_shard_leaves_the_stream_alone(build, tmp_path):
    data = build(tmp_path, [30, 30], block=4)
    expected = take(stream_of(data, num_workers=2), 20)
    damage(data)
    bad_records = shards.BadRecords(data, 3)
    shards.read_images(data, range(60), bad_records)
    assert take(stream_of(data, num_workers=2, bad_records=bad_records), 20) == expected


def test_single_images_name_a_damaged_record_and_the_option(build, tmp_path):
    data = build(tmp_path, [30, 30], block=4)
    starts = damage(data)
    message = (
        rf"record 5 of shard set-00001-of-00002.tfrecord in .*, at byte {starts[5]}: its checksum "
        r"is wrong; .*more than 0 records be left out \(--set=data\.max_bad_records=10\)"
    )
    with pytest.raises(DataError, match=message):
        shards.read_images(data, range(60))


def test_the_only_record_of_a_shard_gives_way_to_the_next_shards_first(build, tmp_path):
    data = build(tmp_path, [1, 3], payloads={0: b"no example"})
    images, _ = shards.read_images(data, range(4), shards.BadRecords(data, 1))
    assert np.ravel(numbers_of(tf.constant(images[None]))).tolist() == [1, 1, 2, 3]


def test_speed_is_measured_of_a_data_set_with_damaged_records(build, tmp_path):
    data = build(tmp_path, [30, 30], block=4, payloads={2: b"no example"})
    damage(data)
    told: list[str] = []
    bad_records = shards.BadRecords(data, 4, told.append)
    stream = stream_of(data, bad_records=bad_records)
    assert speed.measure(stream, data, bad_records, seconds=0).pipeline > 0
    readings = speed.measure_reading(data, bad_records, seconds=0)
    assert all(each.images > 0 for each in readings)
    assert len(told) == 3
    with pytest.raises(DataError, match="record .* of shard .*data.max_bad_records"):
        speed.measure_reading(data, seconds=5)


def test_more_damaged_records_than_allowed_end_the_stream(build, tmp_path):
    data = build(tmp_path, [30, 30], block=4)
    damage(data)
    message = r"3 records are damaged so far; .*more than 2 records .*data\.max_bad_records="
    with pytest.raises(DataError, match=message):
        drain(data, bad_records=shards.BadRecords(data, 2))


def test_a_data_set_of_damaged_records_only_is_named(build, tmp_path):
    data = build(tmp_path, [3], payloads=dict.fromkeys(range(3), b"no example"))
    with pytest.raises(DataError, match="record 0 of shard"):
        drain(data, bad_records=shards.BadRecords(data, 3))


# ---- a storage that fails ------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch) -> list[Exception]:
    """What the next batches fail with, in turn."""
    errors: list[Exception] = []
    original = fetch.Fetcher.next

    def fail(self, waiting):
        if errors:
            raise errors.pop(0)
        return original(self, waiting)

    monkeypatch.setattr(fetch.Fetcher, "next", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return errors


def test_what_passes_away_is_tried_again(build, tmp_path, failing):
    data = build(tmp_path, [30, 30], block=4)
    told: list[str] = []
    stream = stream_of(data, log=told.append)
    expected = take(stream_of(data), 6)
    found = take(stream, 2)
    expired = "Error executing an HTTP request: HTTP response code 401 with body '{\n}'"
    failing += [tf.errors.UnavailableError(None, None, "the store is busy\nat some place")] * 2
    failing += [tf.errors.PermissionDeniedError(None, None, expired)]
    failing += [tf.errors.InvalidArgumentError(None, None, "a torn answer")]
    found |= take(stream, 4)
    assert found == expected
    assert len(told) == 4
    assert all("failed (the store is busy); trying again in " in line for line in told[:2])
    assert "(Error executing an HTTP request: HTTP response code 401); trying again" in told[2]


def test_what_does_not_pass_away_ends_the_stream(build, tmp_path, failing):
    data = build(tmp_path, [30], block=4)

    def stream(stall_timeout: float = 20) -> pipeline.ImageStream:
        return stream_of(data, log=lambda line: None, stall_timeout=stall_timeout)

    failing += [tf.errors.UnavailableError(None, None, "busy")] * 100
    with pytest.raises(StorageError, match=r"failed \(busy\) \d+ times"):
        next(stream(5))
    assert len(failing) > 80
    failing[:] = [tf.errors.PermissionDeniedError(None, None, "no access")]
    with pytest.raises(StorageError, match="cannot read .*: no access"):
        next(stream())
    failing[:] = [tf.errors.InvalidArgumentError(None, None, "odd")] * 9
    with pytest.raises(DataError, match=r"shards are sound now \(odd\); run the same command"):
        next(stream())


def test_a_start_far_away_takes_no_longer(build, tmp_path):
    """Position 10,000,000 against 0, building included."""
    data = build(tmp_path, [500] * 4, block=4)

    def seconds(group: int) -> float:
        start = time.process_time()
        next(stream_of(data, start_group=group))
        return time.process_time() - start

    seconds(0)
    times = [(seconds(0), seconds(2_500_000)) for _ in range(3)]
    assert min(far for _, far in times) < 1.5 * min(near for near, _ in times)


# ---- single images and speed ---------------------------------------------------------------------


def test_single_images_are_found_wherever_they_are(build, tmp_path, pixels_of):
    data = build(tmp_path, [10, 1, 25], block=4, classes=3)
    wanted = [35, 0, 10, 11, 9, 17, 0]
    images, labels = shards.read_images(data, wanted)
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    np.testing.assert_array_equal(images, [pixels_of(number) for number in wanted])
    np.testing.assert_array_equal(labels, np.array(wanted) % 3)
    for outside in (-1, 36):
        with pytest.raises(IndexError):
            shards.read_images(data, [outside])


def test_single_images_take_one_request_for_each_block(build, tmp_path, monkeypatch):
    """A grid of a thousand small images must not take a thousand."""
    data, read_range = build(tmp_path, [10, 9], block=4), storage.read_range
    reads: list[tuple[str, int]] = []

    def counted(path: str, offset: int, length: int) -> bytes:
        reads.append((path, offset))
        return read_range(path, offset, length)

    monkeypatch.setattr(storage, "open_read", None)
    monkeypatch.setattr(storage, "read_range", counted)
    shards.read_images(data, [*range(8), 18, 7])
    wanted = [(0, 0), (0, 1), (1, 2)]
    assert sorted(reads) == [(data.path(n), data.shards[n].index[block]) for n, block in wanted]


def test_the_embedded_data_set_is_sound_and_streams():
    data = manifest.load("package:data/fluent_emoji_32")
    counts = np.zeros(data.num_classes, int)
    seen = set()
    for number in range(len(data.shards)):
        shards.check_shard(data, number)
    images, labels = shards.read_images(data, range(0, data.num_images, 50))
    for image, label in zip(images, labels, strict=True):
        counts[label] += 1
        seen.add(image.tobytes())
    assert len(seen) == len(images) and images.std() > 30
    assert (images[:, 0, 0] > 240).mean() > 0.8, "corners are white"
    assert counts.argmax() == np.argmax(data.label_counts)
    batch, _, _ = next(pipeline.ImageStream(data, group_size=4, groups_per_batch=8, seed=0))
    assert batch.shape == (8, 4, 32, 32, 3)


def test_speed_is_measured(build, tmp_path):
    data = build(tmp_path, [20])
    result = speed.measure(stream_of(data), data, seconds=0)
    assert result.pipeline > 0 and result.decode > 0
    assert result.share == result.pipeline / result.decode
