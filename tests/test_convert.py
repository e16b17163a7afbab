"""The converter: what it makes, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import collections
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import fsspec
import numpy as np
import psutil
import pytest
import tensorflow as tf
from PIL import Image

from trainer import config, convert
from trainer.core import lease, storage
from trainer.core.errors import DataError, StorageError, TrainerError, UsageError
from trainer.data import conversion, encoding, images, manifest, shards
from trainer.distribution import host

RNG = np.random.default_rng(1)


def png(size: int = 16, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    channels = len(mode)
    pixels = RNG.integers(0, 256, [size, size, channels], np.uint8).squeeze()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """40 images in two folders."""
    root = tmp_path / "source"
    for number in range(40):
        path = root / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return root


def settings(source, dest, **changes) -> conversion.Settings:
    options = {"resolution": (8, 8)} | {
        key: changes.pop(key)
        for key in ("resolution", "channels", "crop", "background")
        if key in changes
    }
    return conversion.Settings(str(source), str(dest), images.ImageOptions(**options), **changes)


def run(source, dest, **changes) -> manifest.Manifest:
    return conversion.convert(settings(source, dest, **changes), lambda *_: None)[0]


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def parsed(data: manifest.Manifest) -> list[tuple[str, int, bytes]]:
    """Source, label and encoded image of all records."""
    features = {
        "image/source": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
    }
    paths = [data.path(shard) for shard in range(len(data.shards))]
    rows = [tf.io.parse_single_example(r, features) for r in tf.data.TFRecordDataset(paths)]
    return [
        (
            row["image/source"].numpy().decode(),
            int(row["image/class/label"]),
            row["image/encoded"].numpy(),
        )
        for row in rows
    ]


def test_every_image_is_in_the_data_set_once_with_its_label_and_pixels(folder, tmp_path):
    data = run(folder, tmp_path / "dest", labels="folders")
    assert manifest.load(str(tmp_path / "dest")) == data
    assert data.num_images == 40 and data.channels == 3 and data.resolution == (8, 8)
    assert data.label_names == ["class0", "class1"] and data.label_counts == [20, 20]
    assert [shard.name for shard in data.shards][:1] == ["dest-00000-of-00008.tfrecord"]
    assert [shard.count for shard in data.shards] == [5] * 8
    rows = parsed(data)
    names = [name for name, _, _ in rows]
    assert sorted(names) == [
        f"class{n % 2}/{n:02d}.png" for n in sorted(range(40), key=lambda n: n % 2)
    ]
    assert names != sorted(names), "shuffled"
    for name, label, encoded in rows:
        assert label == int(name[5])
        expected = images.encode((folder / name).read_bytes(), images.ImageOptions((8, 8)))
        assert encoded == expected.data
    for shard in range(8):
        shards.check_shard(data, shard)


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    data, same = run(folder, tmp_path / "a"), run(tmp_path / "copy", tmp_path / "b")
    assert (data.name, same.name) == ("a", "b")
    assert data.fingerprint == same.fingerprint
    (tmp_path / "copy" / "class0" / "00.png").write_bytes(png())
    other = run(tmp_path / "copy", tmp_path / "c")
    assert other.fingerprint != data.fingerprint


def test_the_index_points_at_records(folder, tmp_path):
    data = run(folder, tmp_path / "dest", shards=1)
    rows = parsed(data)
    found, _ = shards.read_images(data, range(40))
    expected = [np.asarray(Image.open(io.BytesIO(encoded))) for _, _, encoded in rows]
    np.testing.assert_array_equal(found, expected)


def test_source_bytes_are_kept(folder, tmp_path):
    data, report = conversion.convert(
        settings(folder, tmp_path / "dest", resolution=(16, 16)), lambda *_: None
    )
    assert report.kept == 40
    for name, label, encoded in parsed(data):
        assert label == -1 and encoded == (folder / name).read_bytes()


def test_the_result_depends_on_the_seed_and_not_on_the_workers(folder, tmp_path):
    (tmp_path / "other").mkdir()
    run(folder, tmp_path / "dest", seed=5)
    run(folder, tmp_path / "other" / "dest", seed=5, workers=3)
    assert contents(tmp_path / "dest") == contents(tmp_path / "other" / "dest")
    run(folder, tmp_path / "other" / "dest", seed=6, overwrite=True)
    assert contents(tmp_path / "dest") != contents(tmp_path / "other" / "dest")


def test_an_archive_gives_what_its_folder_gives(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents(folder).items():
            archive.writestr(name, content)
    (tmp_path / "other").mkdir()
    run(folder, tmp_path / "dest", labels="folders")
    run(tmp_path / "source.zip", tmp_path / "other" / "dest", labels="folders", workers=2)
    assert contents(tmp_path / "dest") == contents(tmp_path / "other" / "dest")


def test_a_remote_destination_gets_the_same_files(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    try:
        run(folder, "memory://bucket/dest")
        run(folder, tmp_path / "dest")
        found = {path.rsplit("/", 1)[-1]: memory.cat(path) for path in memory.find("/bucket/dest")}
        assert found == contents(tmp_path / "dest")
        assert manifest.load("memory://bucket/dest").num_images == 40
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_random_part(folder, tmp_path):
    some = [name for name, _, _ in parsed(run(folder, tmp_path / "some", max_images=10))]
    more = [name for name, _, _ in parsed(run(folder, tmp_path / "more", max_images=20))]
    assert len(some) == 10 and len(more) == 20 and set(some) < set(more)


@pytest.mark.parametrize(
    ("num_images", "num_bytes", "shards"),
    [
        (100_000, 10**6, 8),
        (100_000, 16 * (100 << 20) - 1, 8),
        (100_000, 16 * (100 << 20), 16),
        (70_000, 89 * 10**9, 512),
        (5, 10**6, 4),
        (1, 10**6, 1),
        (100, 10**11, 64),
    ],
)
def test_shards_are_a_power_of_two_of_100_to_200_mb(num_images, num_bytes, shards):
    assert conversion._shard_count(num_images, num_bytes) == shards


# ---- interruptions -------------------------------------------------------------------------------


class Stop(Exception):
    pass


def run_until(count: int, *args, **changes) -> None:
    def progress(done: int, earlier: int, total: int) -> None:
        if done >= count:
            raise Stop

    with pytest.raises(Stop):
        conversion.convert(settings(*args, **changes), progress)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(folder, tmp_path, workers):
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest", labels="folders")
    dest = tmp_path / "dest"
    for count in (13, 13, 7):
        run_until(count, folder, dest, labels="folders", workers=workers)
        with pytest.raises(DataError, match="unfinished conversion"):
            manifest.load(str(dest))
    seen = []
    conversion.convert(
        settings(folder, dest, labels="folders"), lambda *numbers: seen.append(numbers)
    )
    # 13 images are two shards of 5 and a part of the third; then two more, then one.
    assert seen[0] == (0, 25, 40) and seen[-1] == (15, 25, 40)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")


def test_a_shard_lost_or_cut_since_is_made_again(folder, tmp_path):
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest")
    dest = tmp_path / "dest"
    run_until(32, folder, dest)
    (dest / "dest-00001-of-00008.tfrecord").unlink()
    cut = dest / "dest-00003-of-00008.tfrecord"
    cut.write_bytes(cut.read_bytes()[:-1])
    (dest / ".partial" / "dest-00004-of-00008.tfrecord.json").write_text("{")
    run(folder, dest)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")


def test_going_on_with_other_settings_or_another_source_is_refused(folder, tmp_path):
    dest = tmp_path / "dest"
    run_until(10, folder, dest)
    for changes, named in [
        ({"resolution": (4, 4)}, "--resolution"),
        ({"seed": 1}, "--seed"),
        ({"shards": 4}, "--shards"),
        ({"labels": "folders"}, "labels"),
        ({"crop": "none"}, "--crop"),
    ]:
        with pytest.raises(UsageError, match=rf"changed: {named}\); .*--overwrite"):
            run(folder, dest, **changes)
    (folder / "class0" / "new.png").write_bytes(png())
    with pytest.raises(UsageError, match="changed: images in the source"):
        run(folder, dest)
    assert run(folder, dest, overwrite=True).num_images == 41
    assert not (dest / ".partial").exists()


def test_other_settings_are_fine_before_anything_is_complete(folder, tmp_path):
    run_until(3, folder, tmp_path / "dest")
    assert run(folder, tmp_path / "dest", resolution=(4, 4)).resolution == (4, 4)


def test_a_data_set_is_replaced_only_when_asked(folder, tmp_path):
    dest = tmp_path / "dest"
    run(folder, dest, shards=16)
    (dest / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds a data set already.*--overwrite"):
        run(folder, dest)
    run(folder, dest, shards=4, overwrite=True)
    names = set(contents(dest))
    assert names == {f"dest-{n:05d}-of-00004.tfrecord" for n in range(4)} | {
        "dataset.json",
        "notes.txt",
    }


def test_overwrite_spares_what_is_no_manifest(folder, tmp_path):
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "dataset.json").write_text('{"labels": [["a.png", 1]]}')
    with pytest.raises(UsageError, match="is not a manifest to overwrite"):
        run(folder, dest, overwrite=True)
    assert (dest / "dataset.json").exists()


def test_source_and_destination_must_differ(folder):
    with pytest.raises(UsageError, match="are the same"):
        run(folder, f"{folder}/")


# ---- two conversions, one destination ------------------------------------------------------------


def with_another(folder, dest, act, *, at: int = 12, **changes) -> None:
    """Converts, and does something else when a part is done."""
    done = []

    def progress(count: int, *_: int) -> None:
        if count >= at and not done:
            done.append(count)
            act()

    conversion.convert(settings(folder, dest, **changes), progress)


@pytest.mark.parametrize("changes", [{}, {"seed": 1}, {"seed": 1, "overwrite": True}])
def test_a_second_conversion_is_refused_while_the_first_is_at_work(folder, tmp_path, changes):
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest")

    def second() -> None:
        with pytest.raises(
            lease.LeaseHeldError, match=rf"process {os.getpid()} on .*--dest"
        ) as held:
            run(folder, tmp_path / "dest", **changes)
        assert "\n" not in str(held.value)

    with_another(folder, tmp_path / "dest", second)
    assert contents(tmp_path / "dest") == contents(tmp_path / "whole" / "dest")


@pytest.mark.parametrize("at", [1, 12, 40])
def test_a_conversion_that_lost_its_lease_changes_nothing(folder, tmp_path, monkeypatch, at):
    """As one does that was paused, whatever it was about to write."""
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest", seed=1)
    dest = tmp_path / "dest"
    lost = []

    def check(self) -> None:
        if lost:
            raise lease.LeaseLostError("it is another's")

    monkeypatch.setattr(lease.Lease, "check", check)

    def take_over() -> None:
        """Another one finishes meanwhile; then this one goes on."""
        (dest / lease.NAME).unlink()
        run(folder, dest, seed=1, overwrite=True)
        lost.append(True)

    with pytest.raises((lease.LeaseLostError, storage.ConflictError)):
        with_another(folder, dest, take_over, at=at)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")


def test_an_unfinished_file_of_a_paused_conversion_cannot_get_its_name(
    folder, tmp_path, monkeypatch
):
    """Not even if the pause came after it had asked for its lease."""
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest", seed=1)
    dest, paused = tmp_path / "dest", []
    link = os.link

    def slow(source, target) -> None:
        if not paused:
            paused.append(source)
            (dest / lease.NAME).unlink()
            run(folder, dest, seed=1, overwrite=True)
        link(source, target)

    monkeypatch.setattr(os, "link", slow)
    with pytest.raises(StorageError, match="cannot write .*dest-00000-of-00008.tfrecord"):
        run(folder, dest)
    assert paused
    assert contents(dest) == contents(tmp_path / "whole" / "dest")


def test_a_shard_that_somebody_else_replaced_gets_no_manifest(folder, tmp_path):
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest")
    dest = tmp_path / "dest"
    shard = dest / "dest-00001-of-00008.tfrecord"

    def replace() -> None:
        content = bytearray(shard.read_bytes())
        content[20] ^= 1  # as many bytes as before
        shard.write_bytes(content)

    with pytest.raises(
        StorageError, match="dest-00001-of-00008.tfrecord .* is not what was written"
    ):
        with_another(folder, dest, replace, at=38)
    assert not (dest / "dataset.json").exists()
    run(folder, dest)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")


def test_entries_of_another_plan_do_not_count(folder, tmp_path):
    (tmp_path / "whole").mkdir()
    run(folder, tmp_path / "whole" / "dest")
    dest = tmp_path / "dest"
    run_until(12, folder, dest)
    entry = dest / ".partial" / "dest-00001-of-00008.tfrecord.json"
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"plan": "another"}))
    seen = []
    conversion.convert(settings(folder, dest), lambda *numbers: seen.append(numbers))
    assert seen[0] == (0, 5, 40)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_left_alone(folder, tmp_path, overwrite):
    dest = tmp_path / "dest"
    dest.mkdir()
    mine = {
        "dest-00003-of-00008.tfrecord": b"mine",
        "dest-00000-of-00002.tfrecord": b"2",
        "a.png": b"3",
    }
    for name, content in mine.items():
        (dest / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"holds dest-00003-of-00008\.tfrecord, of no data set"):
        run(folder, dest, overwrite=overwrite)
    assert contents(dest) == mine
    run(folder, dest, shards=4, overwrite=overwrite)
    assert mine.items() <= contents(dest).items()


def test_replacing_that_was_killed_leaves_no_shards_that_nobody_knows(
    folder, tmp_path, monkeypatch
):
    dest = tmp_path / "dest"
    run(folder, dest, shards=16)

    def die(paths) -> None:
        storage.remove(next(iter(paths)))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_files", die)
        with pytest.raises(Stop):
            run(folder, dest, overwrite=True)
    assert not (dest / "dataset.json").exists()
    assert run(folder, dest, shards=4).num_images == 40
    assert len(contents(dest)) == 5


# ---- bad images ----------------------------------------------------------------------------------


def test_a_bad_image_stops_the_conversion_by_name(folder, tmp_path):
    bad = folder / "class1" / "31.png"
    bad.write_bytes(bad.read_bytes()[:200])
    dest = tmp_path / "dest"
    with pytest.raises(DataError, match=r"class1/31\.png in .*: .*truncated.*--on_bad=skip"):
        run(folder, dest, workers=2)
    # Told to leave it out, the same conversion goes on.
    (tmp_path / "whole").mkdir()
    data = run(folder, dest, skip_bad=True)
    assert data == manifest.load(str(dest))
    run(folder, tmp_path / "whole" / "dest", skip_bad=True, workers=2)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")
    assert data.num_images == 39
    assert [entry["name"] for entry in data.skipped] == ["class1/31.png"]
    assert "truncated" in data.skipped[0]["reason"]


def test_too_many_bad_images_stop_the_conversion_counting_earlier_runs(folder, tmp_path):
    for number in (0, 1, 2):
        (folder / f"class{number % 2}" / f"{number:02d}.png").write_bytes(b"broken")
    dest = tmp_path / "dest"
    with pytest.raises(
        DataError, match="3 images cannot be used, more than --max_bad=2.*not a PNG"
    ):
        run(folder, dest, skip_bad=True, max_bad=2)
    with pytest.raises(DataError, match="3 images cannot be used, more than --max_bad=2"):
        run(folder, dest, skip_bad=True, max_bad=2)
    assert len(run(folder, dest, skip_bad=True, max_bad=3).skipped) == 3


def test_links_to_nothing_stop_the_conversion_or_are_skipped_by_name(folder, tmp_path):
    """Neither images nor folders of them vanish."""
    (folder / "class1" / "41.png").symlink_to(tmp_path / "gone.png")
    (folder / "class2").symlink_to(tmp_path / "disk" / "class2")
    dest = tmp_path / "dest"
    with pytest.raises(
        DataError, match=r"class2 in .*: it is a link to .*/disk/class2, which is not"
    ):
        run(folder, dest)
    (folder / "class2").unlink()
    with pytest.raises(DataError, match=r"class1/41\.png in .*: it is a link to .*gone.*--on_bad"):
        run(folder, dest, labels="folders")
    (folder / "class2").symlink_to(tmp_path / "disk" / "class2")
    data = run(folder, dest, skip_bad=True, max_bad=2, overwrite=True)
    assert data.num_images == 40
    assert [entry["name"] for entry in data.skipped] == ["class2", "class1/41.png"]
    with pytest.raises(DataError, match="2 images cannot be used, more than --max_bad=1"):
        run(folder, dest, skip_bad=True, max_bad=1, overwrite=True)


def test_nothing_but_bad_images(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(4):
        (tmp_path / "source" / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="none of the 4 images"):
        run(tmp_path / "source", tmp_path / "dest", skip_bad=True)


def test_a_shard_without_a_usable_image_is_an_error(folder, tmp_path):
    (folder / "class0" / "00.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="no image of shard .*; lower --shards"):
        run(folder, tmp_path / "dest", skip_bad=True, shards=40)


def test_mixed_channels_name_both_images(folder, tmp_path):
    (folder / "class1" / "33.png").write_bytes(png(mode="L"))
    with pytest.raises(
        DataError, match=r"class0/00\.png has 3 channels, class1/33\.png has 1; pass --channels=rgb"
    ):
        run(folder, tmp_path / "dest")
    data = run(folder, tmp_path / "dest", channels=3, overwrite=True)
    assert data.channels == 3 and data.num_images == 40


@pytest.mark.parametrize(
    ("mode", "flags", "options", "channels"),
    [
        ("L", "--channels=rgb --background=white", {"channels": 3, "background": "white"}, 3),
        ("RGB", "--channels=rgb --background=white", {"channels": 3, "background": "white"}, 3),
        ("LA", "--channels=rgb --background=white", {"channels": 3, "background": "white"}, 3),
        ("RGB", "--channels=rgba to keep", {"channels": 4}, 4),
    ],
)
def test_transparent_images_beside_others_name_the_background_at_once(
    tmp_path, mode, flags, options, channels
):
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    (source / "a.png").write_bytes(png(mode="RGBA"))
    (source / "b.png").write_bytes(png(mode=mode))
    with pytest.raises(DataError, match=rf"a\.png has 4 channels, b\.png has .*{flags}"):
        run(source, dest)
    assert run(source, dest, overwrite=True, **options).channels == channels


def test_gray_images_with_and_without_alpha_can_stay_gray(tmp_path):
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    (source / "a.png").write_bytes(png(mode="LA"))
    (source / "b.png").write_bytes(png(mode="L"))
    with pytest.raises(DataError, match="pass --channels=gray --background=white"):
        run(source, dest)
    assert run(source, dest, overwrite=True, channels=1, background="white").channels == 1


def test_an_image_too_small_for_the_crop_is_named(folder, tmp_path):
    (folder / "class0" / "02.png").write_bytes(png(7))
    with pytest.raises(DataError, match=r"class0/02\.png in .*: it is 7x7, too small for a crop"):
        run(folder, tmp_path / "dest")
    _, report = conversion.convert(
        settings(folder, tmp_path / "dest", crop="none", overwrite=True), lambda *_: None
    )
    assert report.enlarged == 1 and report.stretched == 0


def test_more_shards_than_images_is_an_error(folder, tmp_path):
    with pytest.raises(UsageError, match="--shards=41: 40 images make 1 to 40 shards"):
        run(folder, tmp_path / "dest", shards=41)


def test_a_worker_that_dies_is_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_start_worker", os._exit)
    chosen = settings(folder, tmp_path / "dest", workers=2)
    with pytest.raises(TrainerError, match="a worker process died.*fewer --workers"):
        conversion.convert(chosen, lambda *_: None)


def test_few_images_are_under_way_at_a_time(folder, tmp_path, monkeypatch):
    """Whatever the count, what is submitted and not yet written stays within a window."""
    under_way = collections.Counter()

    class Pool:
        def __init__(self, *_, **__):
            encoding._set_up_worker(str(folder), images.ImageOptions((8, 8)))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def shutdown(self, **_):
            return None

        def submit(self, function, chunk):
            under_way["now"] += len(chunk)
            under_way["most"] = max(under_way["most"], under_way["now"])
            future = encoding.futures.Future()
            future.set_result(function(chunk))
            return future

    monkeypatch.setattr(encoding.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(conversion, "_MAX_CHUNK", 1)
    seen = []

    def progress(done: int, *_: int) -> None:
        under_way["now"] -= done - (seen[-1] if seen else 0)
        seen.append(done)

    conversion.convert(settings(folder, tmp_path / "dest", workers=2), progress)
    assert seen[-1] == 40 and under_way["most"] <= 8


# ---- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer.convert", *arguments]


def test_the_command_converts_and_tells(folder, tmp_path):
    (folder / "notes.txt").touch()
    done = subprocess.run(
        command(
            f"--source={folder}", f"--dest={tmp_path / 'd'}", "--resolution=12x8", "--workers=2"
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "40 images 12x8x3, no classes, 8 shards" in done.stdout
    assert (
        "passed over: 1 files of the source are no images by their names: notes.txt" in done.stdout
    )
    assert "python -m trainer train" in done.stdout
    assert manifest.load(str(tmp_path / "d")).resolution == (8, 12)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dest=x", "--resolution=8"], 2, "--source is missing"),
        (["--source={}", "--dest=x", "--resolution=8y8"], 2, "--resolution=8y8 is neither"),
        (["--source={}", "--dest=x", "--resolution=8", "--crop=left"], 2, "crop"),
        (["--source={}", "--dest=x", "--resolution=40x30"], 2, "the nearest are 40x28, 40x32, "),
        (["--source={}", "--dest=x", "--resolution=3"], 2, "the nearest are 8x8, "),
        (
            ["--source={}", "--dest=x", "--resolution=300x200"],
            2,
            "--resolution=300x200: no network can be trained on it; the nearest are 288x192, ",
        ),
        (["--source={}/absent", "--dest=x", "--resolution=8"], 3, "no folder or zip archive"),
        (["--source={}", "--dest=x", "--resolution=8", "--labels=a.json"], 3, "no label file"),
    ],
)
def test_errors_are_one_line_with_the_documented_code(tmp_path, arguments, code, message):
    done = subprocess.run(
        command(*(argument.format(tmp_path) for argument in arguments)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        cwd=_with_an_image(tmp_path),
    )
    assert done.returncode == code
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def _with_an_image(folder: pathlib.Path) -> pathlib.Path:
    (folder / "a.png").write_bytes(png())
    return folder


def test_neither_the_command_nor_its_workers_import_tensorflow():
    code = "import sys, trainer.convert; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# A terminal sends its signals to the workers as well.
_ENDS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGHUP: 75, signal.SIGTERM: 75}
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_killed_command_goes_on_to_the_same_bytes_and_leaves_nobody_behind(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    large = [png(300) for _ in range(4)]
    # Enough that the command is still at work when it is killed, also on a busy machine.
    for number in range(900):
        (source / f"{number:03d}.png").write_bytes(large[number % 4])
    (tmp_path / "whole").mkdir()
    dest = tmp_path / "dest"
    arguments = command(
        f"--source={source}", f"--dest={dest}", "--resolution=128", "--workers=2", "--shards=16"
    )
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Shells have what runs in the background ignore it, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        first = dest / ".partial" / "dest-00000-of-00016.tfrecord.json"
        while not first.exists() and process.poll() is None:
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if kind in _OF_TERMINALS else os.kill)(process.pid, kind)
        _, stderr = process.communicate()
    assert process.returncode == _ENDS[kind]
    if kind != signal.SIGKILL:
        (line,) = stderr.decode().splitlines()
        assert line in (
            "interrupted; run the same command again to go on",
            f"stopped: {kind.name}: ended before it was done; run the same command again",
        )
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers end with their parent"
    assert not (dest / "dataset.json").exists()
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ of 900 images were done before; going on", done.stderr)
    run(source, tmp_path / "whole" / "dest", resolution=(128, 128), shards=16)
    assert contents(dest) == contents(tmp_path / "whole" / "dest")
    assert not list(dest.glob(".*")), "neither journal nor temporary files stay"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("children", [1, 4])
def test_a_signal_ends_a_command_in_one_line_while_its_workers_start(
    folder, tmp_path, kind, children
):
    with subprocess.Popen(
        command(
            f"--source={folder}", f"--dest={tmp_path / 'dest'}", "--resolution=8", "--workers=8"
        ),
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while len(psutil.Process(process.pid).children()) < children:
            time.sleep(0.001)
        (os.killpg if kind in _OF_TERMINALS else os.kill)(process.pid, kind)
        _, stderr = process.communicate()
    assert process.returncode == _ENDS[kind]
    assert stderr.count(b"\n") == 1, stderr.decode()


def test_progress_is_plain_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 40.0, 41.0])
    monkeypatch.setattr(convert.time, "monotonic", lambda: next(clock))
    progress = convert._Progress()
    progress(0, 0, 1000)
    progress(400, 0, 1000)
    progress(410, 0, 1000)
    progress.close()
    assert capsys.readouterr().err == "400 of 1000 images, 10 images/s, 60 s left\n"


def _flags(printed: str) -> tuple[dict[str, str], list[str]]:
    """The flags of a training command, and its settings."""
    words = shlex.split(printed)
    assert words[:4] == ["python", "-m", "trainer", "train"]
    settings = [word.removeprefix("--set=") for word in words[4:] if word.startswith("--set=")]
    given = dict(word.split("=", 1) for word in words[4:] if not word.startswith("--set="))
    return given, settings


def test_the_command_that_it_prints_trains(folder, tmp_path, monkeypatch):
    """From a folder with a space, to one, with quotes; the workdir is no other run's."""
    (tmp_path / "my runs" / "runs" / "it_s_small").mkdir(parents=True)
    dest = tmp_path / "it's small"
    monkeypatch.chdir(tmp_path / "my runs")
    given, overrides = _flags(convert.training_command(run(folder, dest), small=False))
    assert given == {
        "--config": "auto",
        "--data": str(dest),
        "--workdir": "runs/it_s_small-2",
    }
    assert overrides == []


@pytest.mark.parametrize("labels", ["none", "folders"])
@pytest.mark.parametrize("accelerator", [False, True])
def test_the_printed_command_fits_the_machine_and_the_classes(
    folder, tmp_path, monkeypatch, capsys, accelerator, labels
):
    monkeypatch.setattr(host, "has_accelerator", lambda: accelerator)
    made, report = conversion.convert(
        settings(folder, tmp_path / "dest", labels=labels), lambda *_: None
    )
    convert._print_result(made, report)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("train on it: "))
    given, overrides = _flags(line.removeprefix("train on it: "))
    assert given["--config"] == ("auto" if accelerator else "smoke")
    assert any("no GPU or TPU here" in line for line in lines) != accelerator
    loaded = config.load(given["--config"], overrides)
    assert loaded.data.use_labels == (labels == "folders")
    assert loaded.training.total_kimg == (25000 if accelerator else 200)


@pytest.mark.parametrize("size", [(8, 8), (2048, 1024), (4096, 4096), (7168, 14336)])
def test_every_resolution_that_is_taken_can_be_trained_by_the_printed_config(size):
    convert.check_resolution("", size)
    resolved = config.resolve(config.load("auto"), resolution=size)
    assert config.batch_arithmetic(resolved, 1).global_batch >= 8


@pytest.mark.parametrize("size", [(8, 8), (1024, 1024), (1024, 128), (896, 896)])
def test_the_small_network_takes_what_it_is_printed_for(size):
    assert max(size) <= convert._MOST_FOR_SMALL
    resolved = config.resolve(config.load("smoke"), resolution=size)
    assert config.batch_arithmetic(resolved, 1).global_batch == 16


def test_json_labels_through_the_whole_conversion(folder, tmp_path):
    names = sorted(contents(folder))
    document = {"labels": [[name, number % 5] for number, name in enumerate(names)]}
    (folder / "dataset.json").write_text(json.dumps(document))
    data = run(folder, tmp_path / "dest", workers=2)
    assert data.label_names == list("01234") and data.label_counts == [8] * 5
    assert {name: label for name, label, _ in parsed(data)} == dict(document["labels"])
