"""The local Cloud Storage itself: all three clients reach it, and its faults and counts are true."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time

import pytest
import tensorflow as tf

from tests.gcs.emulator import ROOT, Emulator
from tests.gcs.fixture import Gcs


def _storage_client():
    from google.cloud import storage

    return storage.Client()


def test_tensorflow_files(gcs: Gcs) -> None:
    path = f"{gcs.url}/a/b.txt"
    with tf.io.gfile.GFile(path, "w") as file:
        file.write("snow \u2603")
    assert tf.io.gfile.exists(path)
    assert tf.io.gfile.listdir(f"{gcs.url}/a") == ["b.txt"]
    assert tf.io.gfile.GFile(path).read() == "snow \u2603"
    tf.io.gfile.rename(path, f"{gcs.url}/c.txt")
    assert gcs.emulator.names(gcs.bucket) == ["c.txt"]
    tf.io.gfile.remove(f"{gcs.url}/c.txt")
    assert gcs.emulator.names(gcs.bucket) == []


def test_tensorflow_records(gcs: Gcs) -> None:
    path = f"{gcs.url}/x.tfrecord"
    records = [bytes([number]) * 5000 for number in range(100)]
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    assert list(tf.data.TFRecordDataset(path).as_numpy_iterator()) == records
    reads = [r for r in gcs.emulator.log() if r.kind == "read"]
    assert {r.object for r in reads} == {f"{gcs.bucket}/x.tfrecord"}
    assert sum(r.sent for r in reads) >= 500_000


def test_tensorflow_checkpoint_and_events(gcs: Gcs) -> None:
    saved = tf.train.Checkpoint(v=tf.Variable(tf.range(1000)))
    path = saved.write(f"{gcs.url}/checkpoint/state")
    other = tf.train.Checkpoint(v=tf.Variable(tf.zeros(1000, tf.int32)))
    other.read(path).assert_consumed()
    assert other.v.numpy().tolist() == list(range(1000))
    writer = tf.summary.create_file_writer(f"{gcs.url}/events")
    with writer.as_default(step=1):
        tf.summary.write("a", tf.constant(1.0), metadata=tf.compat.v1.SummaryMetadata())
    writer.close()
    assert any(name.startswith("events/events.out") for name in gcs.emulator.names(gcs.bucket))


def test_gcsfs(gcs: Gcs) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("gcsfs")
    fs = fsspec.filesystem("gs")
    data = os.urandom(100_000)
    fs.pipe(f"{gcs.url}/a/b.bin", data)
    assert fs.cat(f"{gcs.url}/a/b.bin") == data
    assert fs.ls(f"{gcs.url}/a") == [f"{gcs.bucket}/a/b.bin"]
    counts = gcs.emulator.counts()
    assert counts["POST", "write"] == 1
    assert counts["GET", "read"] >= 1
    assert min(counts["bytes", "received"], counts["bytes", "sent"]) >= len(data)


def test_google_cloud_storage(gcs: Gcs) -> None:
    bucket = _storage_client().bucket(gcs.bucket)
    bucket.blob("x").upload_from_string(b"1" * 1000)
    bucket.blob("large").upload_from_string(b"2" * (9 << 20))
    assert bucket.blob("x").download_as_bytes() == b"1" * 1000
    assert bucket.blob("large").download_as_bytes() == b"2" * (9 << 20)
    assert sorted(blob.name for blob in bucket.list_blobs()) == ["large", "x"]
    objects = {(r.kind, r.object) for r in gcs.emulator.log()}
    kinds = {"x": ("write", "read"), "large": ("write", "part", "read")}
    assert {(k, f"{gcs.bucket}/{name}") for name in kinds for k in kinds[name]} <= objects


def test_generations_are_kept(gcs: Gcs) -> None:
    from google.api_core import exceptions

    bucket = _storage_client().bucket(gcs.bucket)
    first = bucket.blob("lease")
    first.upload_from_string("1", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("lease").upload_from_string("2", if_generation_match=0)
    bucket.blob("lease").upload_from_string("3", if_generation_match=first.generation)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("lease").upload_from_string("4", if_generation_match=first.generation)
    assert gcs.emulator.get(gcs.bucket, "lease") == b"3"


def _read(client: str, url: str) -> bytes:
    if client == "tensorflow":
        return tf.io.gfile.GFile(url, "rb").read()
    if client == "gcsfs":
        return pytest.importorskip("fsspec").filesystem("gs").cat(url)
    bucket, _, name = url[len("gs://") :].partition("/")
    return _storage_client().bucket(bucket).blob(name).download_as_bytes()


CLIENTS = ["tensorflow", "gcsfs", "google-cloud-storage"]


@pytest.mark.parametrize("client", CLIENTS)
def test_faults_and_counts_act_on_every_client(gcs: Gcs, client: str) -> None:
    data = os.urandom(50_000)
    gcs.emulator.put(gcs.bucket, "x", data)
    gcs.emulator.put(gcs.bucket, "before", data)
    _read(client, f"{gcs.url}/before")  # finds its credentials, and so on
    gcs.emulator.reset_counts()
    gcs.emulator.faults.update(fail_next=2, match="read|stat")
    assert _read(client, f"{gcs.url}/x") == data
    counts = gcs.emulator.counts()
    assert counts["fault", "error"] == 2
    assert sum(n for (_, kind), n in counts.items() if kind in {"read", "stat"}) >= 3
    assert counts["bytes", "sent"] >= len(data)


def _request(gcs: Gcs, method: str, target: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", gcs.emulator.port, timeout=10)
    connection.request(method, target, body)
    return connection.getresponse().read()


@pytest.mark.parametrize("fault", ["reset", "truncated"])
def test_broken_connections_break(gcs: Gcs, fault: str) -> None:
    gcs.emulator.put(gcs.bucket, "x", b"0123456789")
    rate = {"reset": "reset_rate", "truncated": "truncate_rate"}[fault]
    with (
        gcs.emulator.faulty(**{rate: 1.0}),
        pytest.raises((ConnectionError, http.client.HTTPException)),
    ):
        _request(gcs, "GET", f"/storage/v1/b/{gcs.bucket}/o/x?alt=media")
    assert [r.fault for r in gcs.emulator.log()] == [fault]


def test_resets_lose_requests_or_answers(gcs: Gcs) -> None:
    with gcs.emulator.faulty(reset_rate=1.0):
        for number in range(20):
            path = f"/upload/storage/v1/b/{gcs.bucket}/o?uploadType=media&name=x{number}"
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                _request(gcs, "POST", path, b"1")
    assert 0 < len(gcs.emulator.names(gcs.bucket)) < 20


def test_latency_and_bandwidth(gcs: Gcs) -> None:
    gcs.emulator.put(gcs.bucket, "x", bytes(100_000))
    with gcs.emulator.faulty(latency_sec=0.3, match="read .*/x$"):
        start = time.monotonic()
        tf.io.gfile.GFile(f"{gcs.url}/x", "rb").read()
        assert time.monotonic() - start > 0.3
    with gcs.emulator.faulty(bandwidth=500_000):
        start = time.monotonic()
        _read("google-cloud-storage", f"{gcs.url}/x")
        assert time.monotonic() - start > 0.2


@pytest.mark.parametrize(("fault", "status"), [("expired_token", 401), ("forbidden", 403)])
def test_refusals(gcs: Gcs, fault: str, status: int) -> None:
    gcs.emulator.put(gcs.bucket, "x", b"1")
    with gcs.emulator.faulty(**{fault: True}), pytest.raises(Exception):  # noqa: B017
        _read("google-cloud-storage", f"{gcs.url}/x")
    assert {r.status for r in gcs.emulator.log()} == {status}


def test_command_gets_the_environment_and_buckets() -> None:
    code = (
        "from trainer.core import storage; storage.write_text_atomic('gs://made/x', ''); "
        "print(storage.listdir('gs://made'))"
    )
    command = [sys.executable, "-m", "tests.gcs.emulator", "--", sys.executable, "-c", code]
    done = subprocess.run(
        [*command, "--to=gs://made/y"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("['x']", 0), done.stderr


def test_nothing_outlives_a_killed_owner() -> None:
    code = (
        "import time; from tests.gcs.emulator import Emulator\n"
        "with Emulator() as e: print(e.port, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    emulator = Emulator()
    emulator.port = int(owner.stdout.readline())
    emulator.url("bucket")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 10
    while _answers(emulator):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _answers(emulator: Emulator) -> bool:
    try:
        return bool(emulator.url("bucket"))
    except (OSError, http.client.HTTPException):
        return False
