"""The stream on Cloud Storage: requests, failures, delays, memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from tests.gcs.fixture import Gcs
from trainer.core.errors import DataError, StorageError
from trainer.data import manifest, pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stored(build, tmp_path, gcs: Gcs) -> tuple[manifest.Manifest, manifest.Manifest]:
    """The same data set on the disk and on Cloud Storage: 8 shards of 256, in blocks of 32."""
    local = build(tmp_path, [256] * 8, block=32)
    upload(gcs, tmp_path)
    return local, manifest.load(f"{gcs.url}/set")


@pytest.fixture
def large(build, tmp_path, payload_of, gcs: Gcs) -> manifest.Manifest:
    """A data set larger than TensorFlow's cache: 8 shards of 512, in blocks of 32 with 1 MB."""
    source = "x" * 30_000
    payloads = {n: payload_of(n, -1, source) for n in range(32)}
    repeat(build(tmp_path, [32], block=32, payloads=payloads), tmp_path, blocks=16, shards=8)
    upload(gcs, tmp_path)
    return manifest.load(f"{gcs.url}/set")


def repeat(data: manifest.Manifest, folder: Path, *, blocks: int, shards: int) -> None:
    """Makes a large data set of a small one: of its only shard, over and over."""
    content = Path(data.path(0)).read_bytes()
    Path(data.path(0)).unlink()
    count = blocks * data.shards[0].count
    index = [n * len(content) for n in range(blocks)]
    made = []
    for number in range(shards):
        name = f"large-{number:05d}-of-{shards:05d}.tfrecord"
        (folder / name).write_bytes(content * blocks)
        crc = google_crc32c.value(content * blocks)
        made.append(manifest.Shard(name, count, len(content) * blocks, crc, index))
    manifest.save(dataclasses.replace(data, num_images=count * shards, shards=made), str(folder))


def upload(gcs: Gcs, folder: Path) -> None:
    for path in folder.iterdir():
        gcs.emulator.put(gcs.bucket, f"set/{path.name}", path.read_bytes())


def stream_of(data: manifest.Manifest, **options: Any) -> pipeline.ImageStream:
    return pipeline.ImageStream(
        data, **{"group_size": 4, "groups_per_batch": 8, "seed": 3, "window": 128, **options}
    )


def batches(stream: pipeline.ImageStream, count: int) -> list[tuple[bytes, list[int]]]:
    return [
        (images.numpy().tobytes(), groups.numpy().tolist())
        for images, _, groups in itertools.islice(stream, count)
    ]


# A block of about a megabyte is in two of those that TensorFlow's file system reads and keeps.
READS_PER_BLOCK = 2


def test_requests_keep_to_their_budget(large, gcs):
    """For 1000 images of 30 KB: 63 requests; for small images, by blocks of 64: 32."""
    gcs.emulator.reset_counts()
    stream = stream_of(large)
    assert gcs.emulator.counts()["GET", "stat"] == 8
    gcs.emulator.reset_counts()
    shown = 32 * len(batches(stream, 100))
    time.sleep(1)  # what is ahead is being read
    counts = gcs.emulator.counts()
    ahead = 8 * 3 * 128  # of each lane: the window at hand, the groups ready, the next window
    assert counts["GET", "list"] == 0
    assert counts["GET", "stat"] <= 8 * 4  # those that read a shard first don't wait for another
    assert counts["GET", "read"] <= READS_PER_BLOCK * (shown + ahead) / 32


def test_a_worker_reads_only_its_own_shards(stored, gcs):
    gcs.emulator.reset_counts()
    batches(stream_of(stored[1], worker=1, num_workers=4), 20)
    asked = {request.object.rpartition("/")[2] for request in gcs.emulator.log()}
    assert asked == {stored[1].shards[n].name for n in (1, 5)}


def test_the_order_outlasts_failing_requests(stored, gcs):
    """Refused, reset and cut off: each a sixth of all."""
    expected = batches(stream_of(stored[0]), 120)
    stream = stream_of(stored[1])
    with gcs.emulator.faulty(error_rate=1 / 6, reset_rate=1 / 6, truncate_rate=1 / 6):
        found = batches(stream, 120)
        faults = sum(n for key, n in gcs.emulator.counts().items() if key[0] == "fault")
    assert found == expected
    assert faults > 5


def test_a_shard_that_stands_still_is_named(stored, gcs):
    data = stored[1]
    told: list[str] = []
    with gcs.emulator.faulty(latency_sec=60.0, match=f"read .*{data.shards[3].name}"):
        stream = stream_of(data, stall_timeout=6, log=told.append)
        name = rf"shard {data.shards[3].name} of .* has given nothing for \d+ s"
        start = time.monotonic()
        with pytest.raises(DataError, match=rf"{name}; that is data\.stall_timeout=6"):
            batches(stream, 1)
        assert 5 < time.monotonic() - start < 20
    assert len(told) >= 1
    assert all(data.shards[3].name in line for line in told)


def test_a_process_ends_although_a_read_stands_still(stored, gcs):
    code = (
        "import sys; from trainer.core import flags; from trainer.core.errors import DataError\n"
        "from trainer.data import manifest, pipeline\n"
        "data = manifest.load(sys.argv[1])\n"
        "stream = pipeline.ImageStream(\n"
        "    data, group_size=4, groups_per_batch=8, seed=1, stall_timeout=2)\n"
        "try: next(stream)\n"
        "except DataError as error: flags.fail(error)"
    )
    with gcs.emulator.faulty(latency_sec=50.0, match="read .*tfrecord"):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, f"{gcs.url}/set"],
            cwd=ROOT, env=gcs.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "has given nothing for" in done.stderr.splitlines()[-1]
    assert time.monotonic() - start < 45


def replaced(gcs: Gcs, data: manifest.Manifest, content: bytes | None) -> None:
    """Puts another content in the place of shard 2, or removes it."""
    name = f"set/{data.shards[2].name}"
    if content is not None:
        gcs.emulator.put(gcs.bucket, name, content)
    else:
        gcs.emulator._raw("DELETE", f"/storage/v1/b/{gcs.bucket}/o/{name.replace('/', '%2F')}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: None, r"set-00002-of-00008.tfrecord of .* is missing"),
        (lambda content: content[:-9], r"set-00002-of-00008.tfrecord of .* bytes, the manifest"),
        (lambda content: content[:-1] + b"\0", r"set-00002-of-00008.tfrecord .* another content"),
    ],
)
def test_another_shard_is_named_before_training(stored, gcs, change, message):
    content = gcs.emulator.get(gcs.bucket, f"set/{stored[1].shards[2].name}")
    replaced(gcs, stored[1], change(content))
    with pytest.raises(DataError, match=message):
        stream_of(stored[1])


def test_a_shard_renamed_under_way_is_named(large, gcs):
    stream = stream_of(large, window=32)
    batches(stream, 1)
    replaced(gcs, large, None)
    with pytest.raises(DataError, match=r"large-00002-of-00008.tfrecord of .* is missing"):
        batches(stream, 200)


@pytest.mark.parametrize(
    ("faults", "message"),
    [({"forbidden": True}, "permission denied"), ({"expired_token": True}, "expired credentials")],
)
def test_a_manifest_out_of_reach_is_a_matter_of_the_storage(stored, gcs, faults, message):
    with gcs.emulator.faulty(**faults), pytest.raises(StorageError, match=message) as caught:
        manifest.load(stored[1].directory)
    assert "\n" not in str(caught.value)


def test_a_missing_bucket_is_named(gcs):
    with pytest.raises(StorageError, match="there is no bucket nowhere-at-all"):
        manifest.load("gs://nowhere-at-all/set")


def test_a_half_uploaded_manifest_is_told(stored, gcs):
    content = gcs.emulator.get(gcs.bucket, "set/dataset.json")
    gcs.emulator.put(gcs.bucket, "set/dataset.json", content[: len(content) // 2])
    with pytest.raises(
        DataError, match="dataset.json is not what the converter wrote, or only a part of it"
    ):
        manifest.load(stored[1].directory)


def test_a_data_set_without_its_manifest_is_none(stored, gcs):
    name = "set%2Fdataset.json"
    gcs.emulator._raw("DELETE", f"/storage/v1/b/{gcs.bucket}/o/{name}")
    with pytest.raises(DataError, match="no data set at gs://"):
        manifest.load(stored[1].directory)


def test_a_storage_that_refuses_is_told_from_a_missing_shard(stored, gcs):
    with (
        gcs.emulator.faulty(forbidden=True),
        pytest.raises(StorageError, match="permission denied"),
    ):
        stream_of(stored[1])


# ---- slow proofs ---------------------------------------------------------------------------------

# Makes what it is told on standard input, line by line: 'rate SECONDS', 'images NUMBER'.
CHILD = """
import json, sys, time
import psutil
import tensorflow as tf
tf.stack([tf.zeros([3])])
before = psutil.Process().memory_info().rss
from trainer.data import manifest, pipeline
data = manifest.load(sys.argv[1])
stream = pipeline.ImageStream(data, group_size=4, groups_per_batch=8, seed=1)
next(stream)
for line in sys.stdin:
    what, number = line.split()
    start, images = time.monotonic(), 0
    while (images if what == "images" else time.monotonic() - start) < float(number):
        images += next(stream)[0].shape[0] * 4
    rate = images / (time.monotonic() - start)
    print(json.dumps([rate, psutil.Process().memory_info().rss - before]), flush=True)
"""


class Child:
    """A process with a stream, so that its memory is its own."""

    def __init__(self, path: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, path],
            cwd=ROOT,
            env=environment | {"TF_CPP_MIN_LOG_LEVEL": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *unused: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, what: str, number: float) -> tuple[float, float]:
        """Images per second, and bytes of memory above those of TensorFlow alone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what} {number}\n")
        self._process.stdin.flush()
        rate, memory = json.loads(self._process.stdout.readline())
        return rate, memory


@pytest.mark.proof
def test_delayed_requests_leave_the_rate(large, gcs):
    """50 ms more for each request: at least 85% of the images per second."""
    rates: dict[float, list[float]] = {0.0: [], 0.05: []}
    with Child(large.directory, gcs.environment()) as child:
        child.ask("rate", 1)
        for _ in range(5):
            for latency, found in rates.items():
                gcs.emulator.faults.update(latency_sec=latency)
                found.append(child.ask("rate", 4)[0])
    assert statistics.median(rates[0.05]) >= 0.85 * statistics.median(rates[0.0]), rates


@pytest.mark.parametrize(
    "blocks",
    [pytest.param(60, marks=pytest.mark.slow), pytest.param(391, marks=pytest.mark.proof)],
)
def test_memory_is_flat_over_an_epoch(build, tmp_path, blocks):
    """Of 30,720 or of 200,192 images."""
    repeat(build(tmp_path, [64], block=64), tmp_path, blocks=blocks, shards=8)
    with Child(str(tmp_path), dict(os.environ)) as child:
        memory = [child.ask("images", 64 * blocks)[1] for _ in range(9)]
    assert max(memory) < 500e6, memory
    assert memory[-1] < memory[1] + 10e6, memory
