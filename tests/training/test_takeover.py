"""A job is stopped before any request it makes, loses the lease, and goes on: nothing comes of that.

The first job and those that take over are threads of one process here; that the first one's lease is
old when it goes on is put in by hand. With real processes and signals: `tests.training.chaos`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tensorflow as tf

from tests.gcs.fixture import Gcs
from trainer.config import CheckpointConfig
from trainer.core import cloud_requests, cloud_storage, storage, tfrecord
from trainer.core import lease as lease_lib
from trainer.core.errors import StorageError
from trainer.core.lease import Lease
from trainer.telemetry.statsfile import constant
from trainer.telemetry.writers import Telemetry
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoints, Inventory

FIRST, LAST, LATER = 2, 5, 6
# What a job does on a disk, and may be stopped before: not within the lock, where none is for long.
ON_DISK = (
    "locked",
    "makedirs",
    "sync",
    "digest",
    "walk",
    "read_version",
    "write_bytes_atomic",
    "open_read",
)


def train(workdir: str, steps: int, leases: list[Lease]) -> None:
    """A run of one number: the loop, without what has nothing to do with storage."""
    with contextlib.ExitStack() as closing:
        lease = lease_lib.acquire(
            workdir, renew_sec=1000, stale_sec=0.02, keeps_record=True, log=lambda _: None
        )
        closing.enter_context(lease)
        # Believes in its lease, and asks for it no more, until it has been stopped.
        lease._stale_sec = 1e6
        leases.append(lease)
        files = storage.walk(workdir)
        inventory = Inventory(workdir, files, lease.record)
        lease.settle(inventory.last_steps(lease.record.pending))
        inventory.record = lease.record
        found, _ = inventory.newest()
        number, step = tf.Variable(1.0, dtype=tf.float64), 0
        checkpoints = Checkpoints(
            workdir,
            CheckpointConfig(keep_last=2),
            {"number": number},
            inventory=inventory,
            lease=lease,
        )
        if found is not None:
            checkpoints.restore(found)
            step = found.step
        telemetry = Telemetry(
            workdir,
            tensorboard=storage.join(workdir, "tensorboard"),
            files=files,
            total_kimg=1,
            resume_kimg=step / 1000,
            resume_tick=step,
            fence=lease.fenced,
        )
        closing.callback(telemetry.close)
        while step < steps:
            number.assign(number * 3 + step)
            step += 1
            telemetry.tick(
                {"number": constant(float(number.numpy()))},
                tick=step - 1,
                nimg=step,
                augment_p=0.0,
                r1_gamma=1.0,
                total_sec=0.0,
                tick_sec=0.0,
                maintenance_sec=0.0,
            )
            if step % 2 == 0 or step == steps:
                checkpoints.save(step, {"kimg": step / 1000, "step": step}, telemetry.flush)
                checkpoints.wait()


def read(workdir: str) -> dict[str, Any]:
    """All that the next job reads, without what differs from run to run."""
    files = storage.walk(workdir)
    inventory = Inventory(workdir, files, lease_lib.read_record(workdir))
    found, _ = inventory.newest()
    assert found is not None
    values = {}
    with checkpoint._reader(found) as reader:
        for name in reader.get_variable_to_shape_map():
            values[name] = reader.get_tensor(name).tobytes()
    passing = ("Timing/", "Resources/", "timestamp")
    text = storage.read_text(storage.join(workdir, "stats.jsonl"))
    events = []
    for name in sorted(files):
        if name.startswith("tensorboard/events.out.tfevents."):
            with storage.open_read(storage.join(workdir, name)) as file:
                for record in tfrecord.read_records(file):
                    event = tf.compat.v1.Event.FromString(record)
                    events += [
                        (event.step, value.tag, value.tensor.SerializeToString())
                        for value in event.summary.value
                        if not value.tag.startswith(passing)
                    ]
    counting = [
        stored.step
        for stored in inventory._stored.values()
        if stored.marked and not inventory.record.is_void(*stored.mark) and stored.is_whole()
    ]
    return {
        "info": found.info,
        "values": values,
        "counting": sorted(counting),
        "stats": [
            {k: v for k, v in json.loads(line).items() if not k.startswith(passing)}
            for line in text.splitlines()
        ],
        "events": sorted(events),
    }


class Stopped:
    """A job that is stopped before its k-th request, as by SIGSTOP, and goes on when it is told to."""

    def __init__(self, workdir: str, at: int) -> None:
        self._at, self._count, self._leases = at, 0, list[Lease]()
        self._go_on, self.stopped = threading.Event(), threading.Event()
        self._workdir = workdir
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def before_request(self) -> None:
        if self.stopped.is_set():
            return  # another job's
        self._count += 1
        if self._count == self._at:
            self.stopped.set()
            assert self._go_on.wait(300)

    def _run(self) -> None:
        try:
            train(self._workdir, LAST, self._leases)
        except StorageError as error:
            self.error = error
        finally:
            self.ended = not self.stopped.is_set()
            self.stopped.set()

    def start(self) -> bool:
        """Runs until it is stopped; whether it was."""
        self._thread.start()
        assert self.stopped.wait(300)
        return not getattr(self, "ended", False)

    def finish(self) -> None:
        """Goes on to its end, however that is; its lease is old by now."""
        for lease in self._leases:
            lease._stale_sec = 0.02
        self._go_on.set()
        self._thread.join(300)
        assert not self._thread.is_alive()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Stopped]:
    """The job to be stopped, if there is one; its requests are counted."""
    current: list[Stopped] = []
    inside = threading.local()

    def hook() -> None:
        if current and not getattr(inside, "lock", False):
            current[0].before_request()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            hook()
            return function(*args, **kwargs)

        return call

    lock = storage.locked

    @contextlib.contextmanager
    def locked(folder: str) -> Iterator[None]:
        hook()
        with lock(folder):
            inside.lock = True
            try:
                yield
            finally:
                inside.lock = False

    for name in ON_DISK:
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
    monkeypatch.setattr(storage, "locked", locked)
    monkeypatch.setattr(cloud_requests, "tried", counted(cloud_requests.tried))
    monkeypatch.setattr(cloud_storage, "_AT_ONCE", 1)
    monkeypatch.setattr(cloud_storage, "REWRITE_SECONDS", 0.0)
    # As if each was on a machine of its own: of a process of this one it is known that it lives.
    monkeypatch.setattr(lease_lib, "machine", lambda: "")
    return current


def copied(source: str, target: str) -> str:
    for name in storage.walk(source):
        data = storage.read_bytes(storage.join(source, name))
        storage.write_bytes_atomic(storage.join(target, name), data)
    return target


def stop_everywhere(root: str, folder: pathlib.Path, jobs: list[Stopped], stride: int) -> int:
    """Stops the first job at every so many requests; returns how often that was."""
    begun, undisturbed = str(folder / "begun"), str(folder / "undisturbed")
    train(begun, FIRST, [])
    copied(begun, undisturbed)
    train(undisturbed, LAST, [])
    wanted = read(undisturbed)
    train(undisturbed, LATER, [])
    wanted_later = read(undisturbed)
    count = 0
    for start in (None, begun):
        for at in itertools.count(1, stride):
            workdir = storage.join(root, f"{'begun' if start else 'new'}-{at}")
            if start:
                copied(start, workdir)
            first = Stopped(workdir, at)
            jobs.append(first)
            if not first.start():
                assert first.error is None
                jobs.clear()
                break
            count += 1
            train(workdir, LAST, [])
            seen = read(workdir)
            # One more may count, if the first had been about to remove it.
            assert {**seen, "counting": seen["counting"][-2:]} == wanted, at
            first.finish()
            jobs.clear()
            assert read(workdir) == seen, (at, first.error)
            train(workdir, LATER, [])
            assert read(workdir) == wanted_later, (at, first.error)
    return count


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.proof)])
def test_stopped_before_any_use_of_the_disk(
    tmp_path: pathlib.Path, jobs: list[Stopped], stride: int
) -> None:
    count = stop_everywhere(str(tmp_path / "runs"), tmp_path, jobs, stride)
    assert count * stride > 60


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.proof)])
def test_stopped_before_any_request_to_cloud_storage(
    gcs: Gcs, tmp_path: pathlib.Path, jobs: list[Stopped], stride: int
) -> None:
    count = stop_everywhere(f"{gcs.url}/runs", tmp_path, jobs, stride)
    assert count * stride > 60
