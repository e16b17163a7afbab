"""The manifest: what is saved is loaded, and nothing else is."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core import storage
from trainer.core.errors import DataError
from trainer.data import manifest

DELETE = object()


@pytest.fixture
def saved(build, tmp_path):
    return build(tmp_path, [70, 69], classes=2), tmp_path / "dataset.json"


def test_what_is_saved_is_loaded(saved):
    made, path = saved
    assert manifest.load(str(path.parent)) == made
    assert made.num_classes == 2 and made.label_counts == [70, 69]
    assert [len(shard.index) for shard in made.shards] == [2, 2]


def test_names_survive_whatever_they_are(build, tmp_path):
    made = build(tmp_path, [3], classes=1)
    names = ["[1, 2]\n\udcff"]
    changed = manifest.save(
        manifest.Manifest(**{**vars(made), "label_names": names}), str(tmp_path)
    )
    assert manifest.load(str(tmp_path)).label_names == names
    assert changed.fingerprint != made.fingerprint


def test_names_of_files_do_not_count(build, tmp_path):
    made = build(tmp_path / "a", [5, 4])
    shards = [dataclasses.replace(shard, name=f"b-{shard.name}") for shard in made.shards]
    renamed = dataclasses.replace(made, name="b", shards=shards)
    assert manifest.save(renamed, str(tmp_path / "b")).fingerprint == made.fingerprint
    assert manifest.load(str(tmp_path / "b")).shards == shards


def test_what_is_in_the_shards_counts(build, tmp_path):
    made = build(tmp_path / "a", [5, 4])
    first, last = made.shards
    for shards in ([last, first], [dataclasses.replace(first, crc32c=first.crc32c ^ 1), last]):
        other = manifest.save(dataclasses.replace(made, shards=shards), str(tmp_path / "b"))
        assert other.fingerprint != made.fingerprint


def test_version_1_keeps_its_fingerprint_over_the_names(build, tmp_path):
    """Of data sets converted before, so that runs on them go on."""
    made = dataclasses.replace(build(tmp_path / "a", [5, 4]), version=1)
    old = manifest.save(made, str(tmp_path / "a"))
    assert manifest.load(str(tmp_path / "a")) == old
    renamed = dataclasses.replace(made, name="b")
    assert manifest.save(renamed, str(tmp_path / "b")).fingerprint != old.fingerprint
    embedded = manifest.load("package:data/fluent_emoji_32")
    assert (embedded.version, embedded.fingerprint[:8]) == (1, "7192de68")


def test_the_embedded_data_set_loads():
    embedded = manifest.load("package:data/fluent_emoji_32")
    assert embedded.resolution == (32, 32) and embedded.channels == 3
    assert embedded.num_classes == 9 and embedded.num_images > 3000
    assert sum(shard.bytes for shard in embedded.shards) < 5_000_000


def test_no_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"no data set at .*python -m trainer convert --source"):
        manifest.load(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "dest"),
    [
        ("photos", "photos-SIZE"),
        ("photos/", "photos-SIZE"),
        ("photos.zip", "photos-SIZE"),
        (".", "DATASET"),
        ("memory://images/photos", "memory://images/photos-SIZE"),
    ],
)
def test_a_folder_of_images_is_the_source_and_not_the_destination(
    tmp_path, monkeypatch, data, dest
):
    monkeypatch.chdir(tmp_path)
    if data.endswith(".zip"):
        (tmp_path / data).write_bytes(b"PK")
    else:
        storage.write_text_atomic(storage.join(data, "cats", "a.png"), "an image")
    with pytest.raises(DataError, match="if your images are there") as caught:
        manifest.load(data)
    assert f"--source={data} --dest={dest} --resolution=SIZE" in str(caught.value)


def test_one_image_stands_for_its_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"image")
    with pytest.raises(DataError) as caught:
        manifest.load(str(tmp_path / "photos" / "1.png"))
    photos = tmp_path / "photos"
    assert f"--source={photos} --dest={photos}-SIZE" in str(caught.value)


def test_the_name_of_a_folder_of_images_is_quoted(tmp_path):
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "a.png").write_bytes(b"an image")
    with pytest.raises(DataError, match=r"'--source=/.*/my photos' '--dest=/.*/my photos-SIZE'"):
        manifest.load(f"{tmp_path}/my photos")


def test_a_directory_that_is_empty_or_not_there_is_the_destination(tmp_path):
    for data in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=f"--source=IMAGES --dest={data} --resolution=SIZE"):
            manifest.load(str(data))


def test_an_unfinished_conversion_says_how_to_go_on(tmp_path):
    (tmp_path / ".partial").mkdir()
    with pytest.raises(DataError, match="unfinished conversion.*again"):
        manifest.load(str(tmp_path))


def test_a_label_file_is_told_from_a_manifest(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": [["a.png", 0]]}')
    with pytest.raises(DataError, match="holds labels of images, not a converted data set"):
        manifest.load(str(tmp_path))


def _edit(document, path, value):
    *parents, last = path
    for part in parents:
        document = document[part]
    if value is DELETE:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 3, "version 3 is not 1 or 2"),
        (["version"], 1, "fingerprint does not fit"),
        (["version"], True, "version is bool, not int"),
        (["num_images"], 138, "the shards hold 139 images"),
        (["num_images"], "139", "num_images is str, not int"),
        (["resolution"], [2], "resolution"),
        (["resolution"], [2, 0], "resolution"),
        (["resolution"], [2.0, 3.0], "resolution holds something that is not int"),
        (["channels"], 5, "channels is 5, not in 1 to 4"),
        (["block"], 0, "block is 0"),
        (["block"], 32, "index does not fit"),
        (["label_names"], ["a"], "differ in length"),
        (["label_names"], ["a", "a"], "two classes have the same name"),
        (["label_counts"], [70, 70], "do not sum up"),
        (["label_counts"], [-1, 140], "do not sum up"),
        (["shards"], [], "names are missing"),
        (["shards", 0, "name"], "../set.tfrecord", "no shard's name"),
        (["shards", 0, "name"], "/etc/passwd", "no shard's name"),
        (["shards", 0, "name"], "set-00001-of-00002.tfrecord", "the same"),
        (["shards", 0, "count"], 0, "count is 0"),
        (["shards", 0, "index"], [0], "index does not fit"),
        (["shards", 0, "index"], [0, 10**9], "index does not fit"),
        (["shards", 0, "index"], [5, 90], "index does not fit"),
        (["shards", 0, "crc32c"], 2**32, "crc32c"),
        (["shards", 0, "crc32c"], 7, "fingerprint does not fit"),
        (["skipped"], [{"name": "a"}], "skipped"),
        (["fingerprint"], DELETE, "fingerprint is missing"),
        (["crop"], "none", "fingerprint does not fit"),
    ],
)
def test_a_changed_manifest_is_refused(saved, path, value, message):
    _, file = saved
    document = json.loads(file.read_text())
    _edit(document, path, value)
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        manifest.load(str(file.parent))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "\xff"])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError):
        manifest.load(str(tmp_path))


@given(st.integers(1, 10**8), st.integers(1, 10**13))
def test_a_block_is_a_megabyte_or_64_records_or_one(num_images, num_bytes):
    block = manifest.block_records(num_images, num_bytes)
    mean = num_bytes / num_images
    assert 1 <= block <= 64 and block & (block - 1) == 0
    assert block == 1 or block * mean <= 1 << 20
    assert block == 64 or 2 * block * mean > 1 << 20
