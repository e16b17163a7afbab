"""Conversion from and to Cloud Storage: the same data set, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tempfile
import zipfile
from typing import IO

import numpy as np
import pytest
from PIL import Image

from tests.gcs.fixture import Gcs
from trainer.core import cloud_requests, storage
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.core.lease import LeaseHeldError
from trainer.data import conversion, images, manifest

IMAGES = 40


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    found = {}
    for number in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, [16, 16, 3], np.uint8)).save(buffer, "PNG")
        found[f"class{number % 2}/{number:02d}.png"] = buffer.getvalue()
    return found


@pytest.fixture(scope="module")
def expected(
    pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the data set as made on the disk."""
    root = tmp_path_factory.mktemp("local")
    for name, data in pictures.items():
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    convert(str(root / "photos"), str(root / "small"))
    return {path.name: path.read_bytes() for path in (root / "small").iterdir()}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_requests, "_FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(cloud_requests, "_LONGEST_WAIT_SECONDS", 0.1)


def settings(source: str, dest: str, **changes) -> conversion.Settings:
    options = images.ImageOptions(resolution=(8, 8))
    return conversion.Settings(source, dest, options, labels="folders", shards=4, **changes)


def convert(source: str, dest: str, progress=lambda *_: None, **changes) -> manifest.Manifest:
    return conversion.convert(settings(source, dest, **changes), progress)[0]


def put_folder(gcs: Gcs, pictures: dict[str, bytes]) -> str:
    for name, data in pictures.items():
        gcs.emulator.put(gcs.bucket, f"photos/{name}", data)
    gcs.emulator.put(gcs.bucket, "photos/", b"")  # as Google's console makes folders
    return f"{gcs.url}/photos"


def put_zip(gcs: Gcs, pictures: dict[str, bytes]) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (name, data) in enumerate(pictures.items()):
            kind = zipfile.ZIP_DEFLATED if number % 3 else zipfile.ZIP_STORED
            info = zipfile.ZipInfo(name)
            if number == 5:  # a header longer than a reader would guess
                info.extra = b"\x99\x99\xd0\x07" + bytes(2000)
            archive.writestr(info, data, kind)
    gcs.emulator.put(gcs.bucket, "photos.zip", buffer.getvalue())
    return f"{gcs.url}/photos.zip"


def made(gcs: Gcs) -> dict[str, bytes]:
    names = [name for name in gcs.emulator.names(gcs.bucket) if name.startswith("small/")]
    return {name.removeprefix("small/"): gcs.emulator.get(gcs.bucket, name) for name in names}


@pytest.mark.parametrize("put", [put_folder, put_zip])
def test_same_data_set_as_on_the_disk(gcs: Gcs, pictures, expected, put) -> None:
    source = put(gcs, pictures)
    gcs.emulator.reset_counts()
    result = convert(source, f"{gcs.url}/small")
    assert made(gcs) == expected
    assert manifest.load(f"{gcs.url}/small").fingerprint == result.fingerprint
    # An image costs a request (a few are looked at beforehand), a shard and its entry one each.
    counts = gcs.emulator.counts()
    assert counts["GET", "read"] <= IMAGES + 30
    assert counts["POST", "write"] == 4 + 4 + 3  # the lease, the plan, the manifest
    assert counts["GET", "list"] <= 8


def test_worker_processes_read_and_the_main_one_writes(gcs: Gcs, pictures, expected) -> None:
    convert(put_folder(gcs, pictures), f"{gcs.url}/small", workers=2)
    assert made(gcs) == expected


@pytest.mark.parametrize("stop", [1, 15, 25, 39])
def test_goes_on_after_an_interruption(gcs: Gcs, pictures, expected, stop: int) -> None:
    source = put_folder(gcs, pictures)

    def interrupt(count: int, *_: int) -> None:
        if count == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, f"{gcs.url}/small", interrupt)
    assert "dataset.json" not in made(gcs)
    gcs.emulator.reset_counts()
    earlier = []
    convert(source, f"{gcs.url}/small", lambda count, before, total: earlier.append(before))
    assert earlier[0] == 10 * (stop // 10)
    assert made(gcs) == expected
    written = [r.object for r in gcs.emulator.log() if r.kind == "write"]
    assert len([name for name in written if re.search(r"\.tfrecord$", name)]) == 4 - stop // 10


def test_faults_change_nothing(gcs: Gcs, pictures, expected) -> None:
    source = put_zip(gcs, pictures)
    with gcs.emulator.faulty(error_rate=0.1, reset_rate=0.1, truncate_rate=0.1, seed=2):
        convert(source, f"{gcs.url}/small")
    assert made(gcs) == expected


def test_an_outage_is_not_a_bad_image(gcs: Gcs, pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put_folder(gcs, pictures)
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 0.3)
    with (
        gcs.emulator.faulty(error_rate=1.0, match="read .*07.png"),
        pytest.raises(StorageError, match=r"07.png: Cloud Storage answered"),
    ):
        convert(source, f"{gcs.url}/small", skip_bad=True)


def test_overwrite_removes_what_was_there(gcs: Gcs, pictures, expected) -> None:
    source = put_folder(gcs, pictures)
    first = settings(source, f"{gcs.url}/small")
    conversion.convert(dataclasses.replace(first, shards=8), lambda *_: None)
    with pytest.raises(UsageError, match="holds a data set already"):
        convert(source, f"{gcs.url}/small")
    convert(source, f"{gcs.url}/small", overwrite=True)
    assert made(gcs) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gs://not-there/photos", "there is no bucket not-there"),
        ("{url}/none", "no folder or zip archive at gs://.*/none; check --source"),
        ("{url}/text.zip", "neither a folder nor a readable zip"),
    ],
)
def test_source_that_is_none(gcs: Gcs, source: str, message: str) -> None:
    gcs.emulator.put(gcs.bucket, "text.zip", b"no zip")
    with pytest.raises((DataError, StorageError), match=message):
        convert(source.format(url=gcs.url), f"{gcs.url}/small")
    assert made(gcs) == {}


def test_labels_from_cloud_storage(gcs: Gcs, pictures) -> None:
    source = put_folder(gcs, pictures)
    text = json.dumps({"labels": [[name, n % 3] for n, name in enumerate(pictures)]})
    storage.write_text_atomic(f"{gcs.url}/labels.json", text)
    chosen = dataclasses.replace(
        settings(source, f"{gcs.url}/small"), labels=f"{gcs.url}/labels.json"
    )
    assert conversion.convert(chosen, lambda *_: None)[0].label_counts == [14, 13, 13]


def _full(dir: str) -> IO[bytes]:  # noqa: A002
    return open("/dev/full", "wb")


def test_full_disk_for_temporary_files(gcs: Gcs, pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    source = put_folder(gcs, pictures)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", _full)
    with pytest.raises(StorageError, match="disk of temporary files .* is full"):
        convert(source, f"{gcs.url}/small")
    assert not any(name.endswith(".tfrecord") for name in made(gcs))


def test_a_second_conversion_is_refused_and_a_late_shard_replaces_nothing(gcs, pictures, expected):
    source, dest = put_folder(gcs, pictures), f"{gcs.url}/small"
    done = []

    def meanwhile(count: int, *_: int) -> None:
        if count == 15 and not done:
            done.append(count)
            with pytest.raises(LeaseHeldError, match="--dest"):
                convert(source, dest, seed=1, overwrite=True)

    convert(source, dest, meanwhile)
    assert made(gcs) == expected
    name = next(name for name in expected if name.endswith(".tfrecord"))
    with (
        pytest.raises(storage.ConflictError),
        storage.open_write_atomic(f"{dest}/{name}", new=True) as file,
    ):
        file.write(b"late")
    with storage.open_write_atomic(f"{dest}/{name}", new=True) as file:
        file.write(expected[name])  # as where an answer got lost
    assert made(gcs) == expected


def test_folder_objects_are_counted(gcs: Gcs, pictures) -> None:
    source = put_folder(gcs, pictures)
    gcs.emulator.put(gcs.bucket, "photos/empty/", b"")
    gcs.emulator.put(gcs.bucket, "photos/class0//odd.png", pictures["class0/00.png"])
    result, report = conversion.convert(settings(source, f"{gcs.url}/small"), lambda *_: None)
    assert result.num_images == IMAGES + 1
    assert report.ignored == ["1 names in the source end with '/', as those of folders: empty/"]


def test_folders_without_a_name(gcs: Gcs, pictures) -> None:
    """As an upload with a '/' too many makes them: every image is read, and has its class."""
    for number, content in enumerate(pictures.values()):
        storage.write_bytes_atomic(f"{gcs.url}/pictures//{number % 2}//{number}.png", content)
    made = convert(f"{gcs.url}/pictures", f"{gcs.url}/made")
    assert made.num_images == len(pictures)
    assert made.label_names == ["0", "1"]
