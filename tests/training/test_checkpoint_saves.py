"""Saves in the background: what is written, when, where, and what happens if they are cut off."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.gcs.fixture import Gcs
from tests.training.test_checkpoint import SHAPE, file_of, info, make_config, names, save, small
from trainer.config import CheckpointConfig
from trainer.core import lease as lease_lib
from trainer.core import storage
from trainer.core.errors import CheckpointError, StorageError
from trainer.core.fencing import Record
from trainer.core.lease import LeaseLostError, Owner
from trainer.training import build, checkpoint
from trainer.training.checkpoint import Checkpoints, Inventory
from trainer.training.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]


class Gate:
    """Holds saves back before they write anything, until it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.inside = self.most = 0
        self._write = checkpoint._write_files

    def write_files(self, *args: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.opened.wait(60)
        try:
            return self._write(*args)
        finally:
            self.inside -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(checkpoint, "_write_files", gate.write_files)
    yield gate
    gate.opened.set()


def read(found: checkpoint.Found, name: str) -> np.ndarray:
    return tf.train.load_checkpoint(found.prefix).get_tensor(checkpoint._key(name))


# ------------------------------------------------------------------------------ in the background


def test_steps_go_on_while_bytes_move(tmp_path: pathlib.Path, gate: Gate) -> None:
    """And change nothing of what is saved, however they change variables."""
    table = {f"v{n}": tf.Variable(tf.fill([1000], float(n))) for n in range(4)}
    count = tf.Variable(7, dtype=tf.int64)
    checkpoints = Checkpoints(str(tmp_path), CheckpointConfig(), {**table, "count": count})
    checkpoints.save(1, info())
    assert gate.entered.wait(60)
    assert not (tmp_path / "checkpoints").exists()

    table["v0"].assign_add(tf.ones([1000]))
    table["v1"].assign(tf.zeros([1000]))
    table["v2"].scatter_nd_update([[3]], [9.0])

    @tf.function(jit_compile=True)
    def step() -> None:
        for variable in table.values():
            variable.assign(variable * 3 + 1)
        count.assign_add(1)

    for _ in range(3):
        step()
    gate.opened.set()
    checkpoints.wait()
    found = checkpoint.find(str(tmp_path))
    for n in range(4):
        np.testing.assert_array_equal(read(found, f"v{n}"), np.full([1000], n, np.float32))
    assert read(found, "count") == 7
    assert count.numpy() == 10


def test_one_save_at_a_time(tmp_path: pathlib.Path, gate: Gate) -> None:
    checkpoints = small(tmp_path)
    checkpoints.save(1, info())
    second = threading.Thread(target=checkpoints.save, args=(2, info()))
    second.start()
    assert gate.entered.wait(60)
    time.sleep(0.2)
    assert second.is_alive()  # it waits for the first
    gate.opened.set()
    second.join(60)
    checkpoints.wait()
    assert gate.most == 1
    assert names(tmp_path) == ["step-000000001", "step-000000002"]


@pytest.mark.parametrize("how", ["save", "wait"])
def test_an_error_comes_with_the_next_call(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    checkpoints = small(tmp_path)
    good = save(checkpoints, 10, info())

    def full(path: str) -> None:
        raise StorageError(f"cannot write {path}: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "sync", full)
        checkpoints.save(20, info())  # says nothing yet
        with pytest.raises(CheckpointError, match="disk is full") as caught:
            checkpoints.wait() if how == "wait" else checkpoints.save(30, info())
    assert "step-000000020" in str(caught.value)
    assert names(tmp_path) == ["step-000000010"]
    assert checkpoint.find(str(tmp_path)).path == good
    checkpoints.wait()  # once is enough
    save(checkpoints, 40, info())
    assert names(tmp_path) == ["step-000000010", "step-000000040"]


def test_only_the_writer_writes(tmp_path: pathlib.Path) -> None:
    variables = {"number": tf.Variable(1.0)}
    checkpoints = Checkpoints(str(tmp_path), CheckpointConfig(), variables, writer=False)
    checkpoints.save(1, info())
    checkpoints.wait()
    assert list(tmp_path.iterdir()) == []


def test_without_the_lease_nothing_is_committed_or_removed(tmp_path: pathlib.Path) -> None:
    with lease_lib.acquire(str(tmp_path), renew_sec=1000, stale_sec=0) as lease:
        checkpoints = Checkpoints(
            str(tmp_path), CheckpointConfig(keep_last=1), {"v": tf.Variable(1.0)}, lease=lease
        )
        save(checkpoints, 10, info())
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        (tmp_path / lease_lib.NAME).write_text('{"somebody": "else"}')
        checkpoints.save(20, info())
        with pytest.raises(LeaseLostError, match="another job"):
            checkpoints.wait()
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p for p in before if after.get(p) != before[p]} == {tmp_path / lease_lib.NAME}
    assert after.keys() == before.keys()


def test_a_lease_lost_while_values_are_written_commits_nothing(
    tmp_path: pathlib.Path, gate: Gate
) -> None:
    with lease_lib.acquire(str(tmp_path), renew_sec=1000, stale_sec=0) as lease:
        checkpoints = Checkpoints(
            str(tmp_path), CheckpointConfig(), {"v": tf.Variable(1.0)}, lease=lease
        )
        checkpoints.save(10, info())
        assert gate.entered.wait(60)
        (tmp_path / lease_lib.NAME).write_text('{"somebody": "else"}')
        gate.opened.set()
        with pytest.raises(LeaseLostError):
            checkpoints.wait()
    assert checkpoint.newest(str(tmp_path))[0] is None


def test_what_is_known_is_not_looked_for_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run lists its checkpoints once."""
    for step in (10, 20):
        save(small(tmp_path, keep_last=9), step, info(step))
    inventory = Inventory(str(tmp_path))
    found, _ = inventory.newest()
    assert found is not None
    monkeypatch.setattr(storage, "walk", None)
    number = tf.Variable(0.0)
    settings = CheckpointConfig(keep_last=2)
    checkpoints = Checkpoints(str(tmp_path), settings, {"number": number}, inventory=inventory)
    checkpoints.restore(found)
    save(checkpoints, 25, info(25))
    assert names(tmp_path) == ["step-000000020", "step-000000025"]


def test_a_damaged_one_that_was_passed_over_does_not_count(tmp_path: pathlib.Path) -> None:
    for step in (10, 20):
        save(small(tmp_path, keep_last=9), step, info(step))
    file_of(str(tmp_path / "checkpoints" / "step-000000020"), "state.index").write_bytes(b"torn")
    inventory = Inventory(str(tmp_path))
    found, _ = inventory.newest()
    assert found is not None and found.step == 10
    settings, number = CheckpointConfig(keep_last=2), tf.Variable(0.0)
    checkpoints = Checkpoints(str(tmp_path), settings, {"number": number}, inventory=inventory)
    save(checkpoints, 30, info(30))
    assert names(tmp_path) == ["step-000000010", "step-000000020", "step-000000030"]


# ------------------------------------------------------------------------------ killed

# Saves step 10; then, at a moment of the save of step 20, tells so and waits to be killed.
KILLED = """
import re, sys, time
import tensorflow as tf
from trainer.core import lease as lease_lib, storage
from trainer.config import CheckpointConfig
from trainer.training import checkpoint

workdir, name, pattern = sys.argv[1:]
variables = {"number": tf.Variable(1.5)}
lease = lease_lib.acquire(workdir, keeps_record=True)
checkpoints = checkpoint.Checkpoints(
    workdir, CheckpointConfig(keep_last=1), variables, lease=lease
)
info = {"kimg": 0.0}
checkpoints.save(10, info)
checkpoints.wait()
if name:
    real = getattr(storage, name)

    def deadly(path, *args):
        path = list(path) if name == "remove_files" else path
        if re.search(pattern, str(path)):
            print("now", flush=True)
            time.sleep(600)
        return real(path, *args)

    setattr(storage, name, deadly)
variables["number"].assign(2.5)
checkpoints.save(20, info)
if not name:
    checkpoints.wait()
    lease.release()
    sys.exit(3)
time.sleep(600)
"""
MOMENTS = {
    "nothing written": ("write_text_atomic", r"20/state-.*\.json", 10, 1.5),
    "nothing missing but the marker": ("write_text_atomic", "20/COMMITTED", 10, 1.5),
    "committed, the old one still there": ("remove_files", "step-000000010", 20, 2.5),
    "": ("", "", 20, 2.5),  # not killed
}


def test_killed_while_saving(tmp_path: pathlib.Path) -> None:
    jobs = {}
    for number, (name, pattern, *_) in enumerate(MOMENTS.values()):
        workdir = tmp_path / str(number)
        jobs[workdir] = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(workdir), name, pattern],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
    for (workdir, job), (moment, expected) in zip(jobs.items(), MOMENTS.items(), strict=True):
        if moment:
            assert job.stdout is not None and job.stdout.readline() == "now\n"
            job.send_signal(signal.SIGKILL)
        assert job.wait(120) == (-9 if moment else 3), moment
        *_, step, value = expected
        # The next life restores it, goes on past step 20, and leaves nothing else.
        number = tf.Variable(0.0)
        with lease_lib.acquire(str(workdir), keeps_record=True, log=lambda _: None) as lease:
            inventory = Inventory(str(workdir), record=lease.record)
            lease.settle(inventory.last_steps(lease.record.pending))
            inventory.record = lease.record
            found, skipped = inventory.newest()
            assert found is not None, moment
            assert found.step == step, moment
            assert len(skipped) == (moment.startswith("nothing missing")), moment
            checkpoints = Checkpoints(
                str(workdir),
                CheckpointConfig(keep_last=1),
                {"number": number},
                inventory=inventory,
                lease=lease,
            )
            checkpoints.restore(found)
            assert number.numpy() == value, moment
            save(checkpoints, 20 if step == 10 else 30, info())
        assert names(workdir) == [f"step-0000000{20 if step == 10 else 30}"], moment
        assert len(list(workdir.glob("checkpoints/*/*"))) == 4, moment


# Saves again and again, and tells of each that is committed.
BUSY = """
import sys
import tensorflow as tf
from trainer.config import CheckpointConfig
from trainer.training.checkpoint import Checkpoints

first = int(sys.argv[2])
variable = tf.Variable(tf.zeros([1 << 18]))
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2), {"v": variable})
for step in range(first, first + 100000):
    variable.assign(tf.fill([1 << 18], float(step)))
    checkpoints.save(step, {"kimg": 0.0, "step": step})
    checkpoints.wait()
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: pathlib.Path) -> None:
    """Whatever was committed is there, and is what it was."""
    random, last, torn = np.random.default_rng(1), 0, 0
    for _ in range(12):
        job = subprocess.Popen(
            [sys.executable, "-c", BUSY, str(tmp_path), str(last + 1)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert job.stdout is not None
        committed = int(job.stdout.readline())
        time.sleep(random.uniform(0, 0.5))
        job.kill()
        rest = job.stdout.read().split()
        committed = int(rest[-1]) if rest else committed
        found, skipped = checkpoint.newest(str(tmp_path))
        assert found is not None
        assert committed <= found.step == found.info["step"] <= committed + 1
        assert (read(found, "v") == found.step).all()
        last, torn = found.step, torn + len(skipped)
    assert torn > 0  # or the kills came at no interesting moment


# ------------------------------------------------------------------------------ placements


def make_state(precision: str = "float32", replicas: int = 1, seed: int = 0) -> TrainState:
    config = make_config()
    config = dataclasses.replace(
        config, run=dataclasses.replace(config.run, precision=precision, seed=seed)
    )
    strategy = tf.distribute.get_strategy()
    if replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(replicas)])
    with strategy.scope():
        return build.state(config, build.recipe(config, SHAPE))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("float32", 2), ("float32", 1)),
        (("float32", 1), ("float32", 4)),
        (("float32", 2), ("bfloat16", 4)),
        (("float16", 4), ("float64", 2)),
        (("float64", 1), ("float32", 2)),
    ],
)
def test_onto_another_placement_and_precision(
    tmp_path: pathlib.Path, before: tuple[str, int], after: tuple[str, int]
) -> None:
    state, random = make_state(*before), np.random.default_rng(3)
    for variable in state.variables().values():
        value = random.integers(-1000, 1000, variable.shape) / 8  # the same in every precision
        variable.assign(tf.cast(value, variable.dtype))
    save(Checkpoints(str(tmp_path), CheckpointConfig(), state.variables()), 5, info())
    other = make_state(*after, seed=9)
    found = checkpoint.find(str(tmp_path))
    Checkpoints(str(tmp_path), CheckpointConfig(), other.variables()).restore(found)
    wanted = state.variables()
    for name, variable in other.variables().items():
        copies = getattr(variable, "values", (variable,))
        assert len(copies) == after[1]
        for copy in copies:
            np.testing.assert_array_equal(copy.numpy(), wanted[name].numpy(), err_msg=name)


# ------------------------------------------------------------------------------ Cloud Storage


def kinds(gcs: Gcs) -> list[tuple[str, str]]:
    """The requests since the last time, but for the one in which the client meets the bucket."""
    log = [(r.method, r.kind) for r in gcs.emulator.log() if r.kind != "bucket"]
    gcs.emulator.reset_counts()
    return log


def number_in(workdir: str, value: float = 0.0, **settings: int) -> tuple[Checkpoints, tf.Variable]:
    number = tf.Variable(value)
    return Checkpoints(workdir, CheckpointConfig(**settings), {"number": number}), number


def test_on_cloud_storage(
    gcs: Gcs, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a start and a save ask for is bounded, and no object is written twice."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # which no other test uses
    workdir = f"{gcs.url}/runs/first"
    inventory = Inventory(workdir)
    assert inventory.newest() == (None, [])
    assert kinds(gcs) == [("GET", "list")]
    number = tf.Variable(1.0)
    settings = CheckpointConfig(keep_last=2)
    checkpoints = Checkpoints(workdir, settings, {"number": number}, inventory=inventory)
    for step in (10, 20, 30, 40):
        number.assign_add(1.0)
        save(checkpoints, step, info(step))
        log = kinds(gcs)
        assert log.count(("POST", "write")) == 4
        assert log.count(("GET", "stat")) == 3
        # The checkpoint that is replaced.
        assert log.count(("DELETE", "delete")) == 4 * (step > 20)
        assert len(log) <= 11, log
    assert {name.split("/")[3] for name in gcs.emulator.names(gcs.bucket)} == {
        "step-000000030",
        "step-000000040",
    }
    # The next start.
    inventory = Inventory(workdir)
    found, skipped = inventory.newest()
    assert found is not None and (found.step, skipped) == (40, [])
    # Besides, whether there is a lease, which says what counts: a run has that read already.
    lease = [("GET", "list"), ("GET", "read")]
    assert sorted(kinds(gcs)) == sorted([("GET", "list"), ("GET", "read"), ("GET", "read"), *lease])
    checkpoints, other = number_in(workdir)
    checkpoints.restore(found)
    assert other.numpy() == 5.0
    assert set(kinds(gcs)) == {("GET", "read")}
    assert checkpoint.read_parameters(found, "G") == {}
    assert not list(tmp_path.glob("stylegan-checkpoint-*"))


@pytest.mark.parametrize("name", ["COMMITTED", "state.json", "state.index", "state.data"])
@pytest.mark.parametrize("how", ["cut", "other", "gone"])
def test_damage_on_cloud_storage(gcs: Gcs, name: str, how: str) -> None:
    workdir = f"{gcs.url}/run"
    checkpoints, number = number_in(workdir, 1.0)
    save(checkpoints, 10, info())
    number.assign(2.0)
    save(checkpoints, 20, info())
    first, dot, rest = name.partition(".")
    pattern = re.compile(rf".*20/{first}-[0-9a-f]+{dot}{rest}.*")
    (damaged,) = filter(pattern.fullmatch, gcs.emulator.names(gcs.bucket))
    data = gcs.emulator.get(gcs.bucket, damaged)
    if how == "gone":
        storage.remove(f"{gcs.url}/{damaged}")
    else:
        changed = data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1])
        gcs.emulator.put(gcs.bucket, damaged, changed)
    found, skipped = checkpoint.newest(workdir)
    assert found is not None and found.step == 10
    assert len(skipped) == 1 and "step-000000020: " in skipped[0]
    checkpoints, other = number_in(workdir)
    checkpoints.restore(found)
    assert other.numpy() == 1.0
    # Going on leaves it, for it may be restored from elsewhere.
    before = {n: gcs.emulator.get(gcs.bucket, n) for n in gcs.emulator.names(gcs.bucket)}
    save(checkpoints, 15, info())
    after = {n: gcs.emulator.get(gcs.bucket, n) for n in gcs.emulator.names(gcs.bucket)}
    assert before.items() <= after.items()


def test_faults_of_cloud_storage_are_sat_out(gcs: Gcs) -> None:
    """Failed, broken and cut-off answers, while saving, looking and restoring."""
    workdir = f"{gcs.url}/run"
    values = tf.Variable(tf.random.stateless_uniform([1 << 18], [1, 2]))
    wanted = values.numpy()
    settings = CheckpointConfig(keep_last=1)
    with gcs.emulator.faulty(error_rate=0.1, reset_rate=0.1, truncate_rate=0.05, seed=4):
        checkpoints = Checkpoints(workdir, settings, {"values": values})
        for step in (1, 2, 3):
            save(checkpoints, step, info())
        values.assign(tf.zeros_like(values))
        found = checkpoint.find(workdir)
        checkpoints.restore(found)
        committed = sum(n for kind, n in gcs.emulator.counts().items() if kind[0] == "fault")
    assert committed >= 3
    assert found.step == 3
    assert values.numpy().tobytes() == wanted.tobytes()


def test_what_does_not_arrive_is_not_committed(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir, upload = f"{gcs.url}/run", storage.upload

    def losing(local: str, path: str) -> None:
        if path.endswith(".index"):
            pathlib.Path(local).write_bytes(b"something else")
        upload(local, path)

    monkeypatch.setattr(storage, "upload", losing)
    checkpoints, _ = number_in(workdir)
    checkpoints.save(10, info())
    with pytest.raises(CheckpointError, match="not in the store as it was written"):
        checkpoints.wait()
    assert checkpoint.newest(workdir)[0] is None


def test_what_killed_saves_left_on_the_disk_goes(
    gcs: Gcs, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = subprocess.Popen(["true"])
    done.wait()
    start = f"stylegan-checkpoint-{zlib.crc32(lease_lib.machine().encode()):08x}"
    mine = [f"{start}-{os.getpid()}-abc", "stylegan-checkpoint-00000000-1-abc", "other"]
    for name in (*mine, f"{start}-{done.pid}-xyz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.index").write_text("")
    checkpoints, _ = number_in(f"{gcs.url}/run")
    save(checkpoints, 10, info())
    assert {path.name for path in tmp_path.iterdir()} == set(mine)


# Files may not grow past this, as on a full disk.
FULL = """
import resource, sys
import tensorflow as tf
from trainer.config import CheckpointConfig
from trainer.core.errors import CheckpointError
from trainer.training.checkpoint import Checkpoints, find

values = tf.Variable(tf.random.stateless_uniform([1 << 16], [1, 2]))
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=1), {"values": values})
checkpoints.save(10, {"kimg": 1.0})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
for attempt in (lambda: checkpoints.save(20, {}), lambda: checkpoints.restore(find(sys.argv[1]))):
    try:
        attempt()
        checkpoints.wait()
    except Exception as error:
        print(f"{error.exit_code} {error}")
"""


def test_a_full_disk_of_temporary_files(gcs: Gcs, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, f"{gcs.url}/run"],
        cwd=ROOT,
        env=gcs.environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    for line, text in zip(lines, ("set TMPDIR", f"copy to {tmp_path}"), strict=True):
        assert line.startswith("4 ")
        assert text in line
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.find(f"{gcs.url}/run").step == 10


def test_a_bucket_that_is_not_there(gcs: Gcs) -> None:
    checkpoints, _ = number_in("gs://no-such-bucket-anywhere/run")
    checkpoints.save(10, info())
    with pytest.raises(CheckpointError, match="there is no bucket") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value)


def test_a_save_whose_files_the_next_job_has_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was stopped in the middle of it, and is told why it ends."""

    def removed(*_: object) -> None:
        other = dataclasses.replace(Owner.this_process(), token="ab" * 8)
        (tmp_path / "lease.json").write_bytes(lease_lib._document(other, 1, Record()))
        lease._confirmed -= 1000
        raise StorageError("cannot read state.json: it does not exist")

    monkeypatch.setattr(checkpoint, "_write_files", removed)
    with lease_lib.acquire(str(tmp_path), keeps_record=True) as lease:
        checkpoints = Checkpoints(
            str(tmp_path), CheckpointConfig(), {"number": tf.Variable(1.5)}, lease=lease
        )
        checkpoints.save(3, {"kimg": 0.0})
        with pytest.raises(LeaseLostError, match="this job ends"):
            checkpoints.wait()
