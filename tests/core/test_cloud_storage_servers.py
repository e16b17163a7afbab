"""Cloud Storage as others have written it, too, and with answers that say no more than they must."""

from __future__ import annotations

import io
import os
import re
from concurrent import futures
from typing import Any

import google_crc32c
import pytest

from tests.gcs.emulator import SERVERS
from tests.gcs.fixture import Gcs
from trainer.core import cloud_reading, cloud_requests, cloud_storage, storage
from trainer.core.errors import StorageError

# What answers lack; the first: of objects under a key of the customer's (CMEK), in listings.
LEFT_OUT = {
    "nothing": {},
    "checksums of listings": {"match": " list ", "left_out": ("crc32c", "md5Hash", "etag")},
    "sizes of listings": {"match": " list ", "left_out": ("size", "crc32c")},
    "all checksums": {"left_out": ("crc32c", "md5Hash", "etag", "x-goog-hash", "updated")},
    "generations of contents and writes": {
        "match": " (read|write|part|compose|copy) ",
        "left_out": ("generation", "metageneration", "x-goog-generation", "x-goog-hash"),
    },
    "all that writes answer": {
        "match": " (write|part|compose|copy) ",
        "left_out": ("generation", "size", "crc32c", "md5Hash", "contentType", "etag", "id"),
    },
}
# Of answers to writes that a client sends in parts it needs the checksum, ours need not have it.
LARGE = 9 << 20

NAMES = ("a b", "50%25", "#1?x=y&z", "snow \u2603", "e\u0301", "semi;colon", "[x]*", "+plus", "'\"")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_requests, "_FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(cloud_requests, "_LONGEST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 5.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All holds on each of the servers: what only one of them does must not be relied upon."""
    if "gcs" in metafunc.fixturenames:
        metafunc.parametrize("gcs", SERVERS, indirect=True)


def append(path: str, data: bytes) -> None:
    """Adds to an object as one who has just looked at it, or has begun it."""
    content, version = storage.read_version(path) or (b"", None)
    generation = int(version or cloud_storage.put_if(path, content, 0) or 0)
    state = (generation, len(content), google_crc32c.value(content))
    assert cloud_storage.append(path, data, state) is not None


@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_everything_works_whatever_is_left_out(
    gcs: Gcs, left_out: str, tmp_path: os.PathLike[str]
) -> None:
    root, data = f"{gcs.url}/run", os.urandom(100_000)
    local = os.path.join(tmp_path, "x")
    with gcs.emulator.faulty(**LEFT_OUT[left_out]):
        storage.write_bytes_atomic(f"{root}/a/x", data)
        storage.write_bytes_atomic(f"{root}/a/empty", b"")
        storage.download(f"{root}/a/x", local)
        storage.upload(local, f"{root}/a/y")
        assert storage.read_bytes(f"{root}/a/y") == data
        assert storage.read_bytes(f"{root}/a/empty") == b""
        assert storage.read_range(f"{root}/a/y", 99_990, 100) == data[-10:]
        assert storage.read_range(f"{root}/a/y", 100_000, 100) == b""
        with storage.open_read(f"{root}/a/y") as file:
            assert file.seek(-7, io.SEEK_END) == 99_993
            assert file.read() == data[-7:]
        expected = storage.Digest(len(data), google_crc32c.value(data))
        found = storage.walk(root)
        assert {name: digest.bytes for name, digest in found.items()} == {
            "a/x": len(data),
            "a/y": len(data),
            "a/empty": 0,
        }
        listed = left_out not in {"checksums of listings", "all checksums"}
        assert found["a/x"].crc32c == (expected.crc32c if listed else None)
        assert storage.digest(f"{root}/a/x") == expected == storage.digest(local)
        assert storage.digest(f"{root}/a/empty") == storage.Digest(0, 0)
        assert storage.listdir(root) == ["a"]
        storage.rename(f"{root}/a", f"{root}/b")
        assert sorted(storage.walk(root)) == ["b/empty", "b/x", "b/y"]
        for text in (b"1\n", b"2\n", b"3\n"):
            append(f"{root}/log", text)
        assert storage.read_bytes(f"{root}/log") == b"1\n2\n3\n"

        version = storage.write_version(f"{root}/lease", b"1", None)
        with pytest.raises(storage.ConflictError):
            storage.write_version(f"{root}/lease", b"theirs", None)
        again = storage.write_version(f"{root}/lease", b"2", version)
        assert storage.read_version(f"{root}/lease") == (b"2", again)
        with pytest.raises(storage.ConflictError):
            storage.remove_version(f"{root}/lease", version)
        storage.remove_version(f"{root}/lease", again)
        assert storage.read_version(f"{root}/lease") is None
        storage.remove_tree(f"{root}/b")
    assert gcs.emulator.names(gcs.bucket) == ["run/log"]


@pytest.mark.parametrize("left_out", ["nothing", "all checksums"])
def test_an_upload_in_parts(gcs: Gcs, left_out: str) -> None:
    data = os.urandom(LARGE)
    with gcs.emulator.faulty(**LEFT_OUT[left_out]):
        storage.write_bytes_atomic(f"{gcs.url}/x", data)
        assert storage.read_bytes(f"{gcs.url}/x") == data
    assert {"write", "part"} <= {request.kind for request in gcs.emulator.log()}


@pytest.mark.parametrize("left_out", ["nothing", "all checksums"])
def test_other_bytes_than_are_stored_are_not_taken(
    gcs: Gcs, left_out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a checksum beside the content it is asked for; with none at all the length counts,
    and there is one line on that."""
    storage.write_bytes_atomic(f"{gcs.url}/x", b"as it is")
    others, whole = [b"as it was", b"as it"], cloud_storage._whole

    def read(blob: Any, **options: Any) -> bytes:
        data = whole(blob, **options)
        return others.pop() if others else data

    monkeypatch.setattr(cloud_storage, "_whole", read)
    with gcs.emulator.faulty(left_out=("x-goog-hash", *LEFT_OUT[left_out].get("left_out", ()))):
        assert storage.read_bytes(f"{gcs.url}/x") == b"as it is"
        assert storage.read_bytes(f"{gcs.url}/x") == b"as it is"
    assert others == []
    note = f"note: {gcs.url} tells no checksums; of what is read there only sizes are compared\n"
    assert capsys.readouterr().err == ("" if left_out == "nothing" else note)


def test_what_a_server_of_another_content_answers_to_an_upload(
    gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(cloud_storage, "_sums", lambda content: (len(content), 1))
    with pytest.raises(StorageError, match="cannot write gs://.*/x: "):
        storage.write_bytes_atomic(f"{gcs.url}/x", b"1")


def test_names(gcs: Gcs) -> None:
    import tensorflow as tf

    for number, name in enumerate(NAMES):
        storage.write_bytes_atomic(f"{gcs.url}/d/{name}/{name}.bin", b"%d" % number)
        append(f"{gcs.url}/d/{name}/{name}.bin", b"!")
    found = storage.walk(f"{gcs.url}/d")
    assert sorted(found) == sorted(f"{name}/{name}.bin" for name in NAMES)
    assert storage.listdir(f"{gcs.url}/d") == sorted(NAMES)
    for number, name in enumerate(NAMES):
        path = f"{gcs.url}/d/{name}/{name}.bin"
        assert storage.read_bytes(path) == b"%d!" % number
        assert storage.digest(path).bytes == 2
        assert tf.io.gfile.GFile(path, "rb").read() == b"%d!" % number, name
        storage.rename(path, f"{path}.new")
        storage.remove(f"{path}.new")
    assert gcs.emulator.names(gcs.bucket) == []


def test_many_threads_at_once_are_no_reason_for_a_line(
    gcs: Gcs, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write_bytes_atomic(f"{gcs.url}/x", b"1")
    with (
        gcs.emulator.faulty(latency_sec=0.2),
        futures.ThreadPoolExecutor(16) as pool,
    ):
        assert list(pool.map(storage.read_bytes, [f"{gcs.url}/x"] * 16)) == [b"1"] * 16
    assert not [record for record in caplog.records if "pool is full" in record.getMessage()]


def test_folders_that_hold_nothing(gcs: Gcs) -> None:
    """Google's console makes an object `folder/` for one."""
    gcs.emulator.put(gcs.bucket, "a/empty/", b"\n")
    assert storage.isdir(f"{gcs.url}/a/empty")
    assert storage.listdir(f"{gcs.url}/a/empty") == []
    assert storage.listdir(f"{gcs.url}/a") == ["empty"]
    assert storage.walk(f"{gcs.url}/a") == {}
    with pytest.raises(StorageError):
        storage.listdir(f"{gcs.url}/b")


def test_each_append_has_a_tail_of_its_own(gcs: Gcs) -> None:
    """Two jobs that add to an object at once must not take each other's for theirs."""
    for number in range(3):
        append(f"{gcs.url}/log", b"%d\n" % number)
    tails = [r.object for r in gcs.emulator.log() if r.kind == "write" and "tail" in r.object]
    assert len(tails) == len(set(tails)) == 3
    assert gcs.emulator.names(gcs.bucket) == ["log"]


@pytest.mark.parametrize(
    ("pages", "said"),
    [("html", "Error Busy The server cannot serve you."), ("text", "upstream connect error or")],
)
@pytest.mark.parametrize("action", ["read", "write", "list"])
def test_failures_that_are_not_told_in_json(
    gcs: Gcs, pages: str, said: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = {
        "read": lambda: storage.read_bytes(f"{gcs.url}/x"),
        "write": lambda: storage.write_bytes_atomic(f"{gcs.url}/x", b"1"),
        "list": lambda: storage.walk(gcs.url),
    }
    with gcs.emulator.faulty(fail_next=1, pages=pages):
        actions["write"]()
        actions[action]()
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 0.3)
    with (
        gcs.emulator.faulty(error_rate=1.0, pages=pages),
        pytest.raises(StorageError, match=re.escape(said)) as caught,
    ):
        actions[action]()
    assert "<" not in str(caught.value) and "\n" not in str(caught.value)
    assert re.search(r"answered (503|429)", str(caught.value))


def test_an_error_that_is_json_but_not_googles(gcs: Gcs) -> None:
    storage.write_bytes_atomic(f"{gcs.url}/x", b"1")
    with gcs.emulator.faulty(fail_next=2, pages="json"):
        assert storage.read_bytes(f"{gcs.url}/x") == b"1"
        assert len(storage.walk(gcs.url)) == 1


# ---------------------------------------------------------------- without a server


def test_a_failed_precondition_is_told_as_it_is() -> None:
    from google.api_core import exceptions

    error = exceptions.PreconditionFailed("md5Hash validation failed")
    reason = cloud_requests.reason(error, "gs://bucket/x")
    assert reason is not None and "md5Hash validation failed" in reason
    assert "somebody" not in reason


def test_parts_of_compressed_objects_are_refused_by_name() -> None:
    cloud_reading._check_plain("identity")
    with pytest.raises(cloud_reading._CompressedError, match="it is stored compressed .*gzip.*-Z"):
        cloud_reading._check_plain("gzip")
