"""Of any number of jobs one writes a workdir, and one that lost it finds out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.gcs.fixture import Gcs
from trainer.core import lease as lease_lib
from trainer.core import storage
from trainer.core.errors import StorageError
from trainer.core.fencing import Record, Superseded
from trainer.core.lease import Lease, LeaseHeldError, LeaseLostError, Owner, acquire

ROOT = pathlib.Path(__file__).parents[2]

# Waits for a moment that all share, tries to get the lease, and then does what it is told.
PROGRAM = """
import sys, time
from trainer.core import lease

workdir, start, stale = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, start - time.time()))
try:
    held = lease.acquire(workdir, who="night", renew_sec=0.2, stale_sec=stale)
except lease.LeaseHeldError as error:
    print(f"held: {error}", flush=True)
    sys.exit(error.exit_code)
print("got it", flush=True)
for command in sys.stdin:
    try:
        held.check()
        print("still mine", flush=True)
    except lease.LeaseLostError as error:
        print(f"lost: {error}", flush=True)
held.release()
"""


class Job:
    """A process that wants the lease."""

    def __init__(
        self,
        workdir: str,
        *,
        start: float = 0.0,
        stale: float = 60.0,
        environment: dict[str, str] | None = None,
    ):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, workdir, str(start), str(stale)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def result(self) -> str:
        """Whether it got the lease."""
        while not (line := self.line()).startswith(("got it", "held: ")):
            assert line, "the process has ended"
        return line

    def ask(self) -> str:
        """What it thinks of its lease."""
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.line()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """Lets it end by itself."""
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """Starts jobs; what is left of them at the end is killed."""
    jobs: list[Job] = []

    def started(*args: Any, **kwargs: Any) -> Job:
        jobs.append(Job(*args, **kwargs))
        return jobs[-1]

    yield started
    for job in jobs:
        job.kill()


def lease_file(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / lease_lib.NAME


def leave(workdir: pathlib.Path, **changes: Any) -> Owner:
    """The lease of somebody who is gone, on another machine."""
    owner = dataclasses.replace(Owner.this_process(), host="far", machine="other", **changes)
    workdir.mkdir(exist_ok=True)
    lease_file(workdir).write_bytes(lease_lib._document(owner, 3, Record()))
    return owner


@contextlib.contextmanager
def renewed(workdir: pathlib.Path, owner: Owner, every: float) -> Iterator[None]:
    """Somebody far away who is alive."""
    ending = threading.Event()

    def renew() -> None:
        count = 10
        while not ending.wait(every):
            count += 1
            data = lease_lib._document(owner, count, Record())
            storage.write_bytes_atomic(str(lease_file(workdir)), data)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


# ------------------------------------------------------------------------------ one at a time


def test_the_next_job_begins_when_one_has_ended(tmp_path: pathlib.Path) -> None:
    workdir, said = str(tmp_path / "run"), []
    for _ in range(3):
        with acquire(workdir, log=said.append) as lease:
            lease.check()
            assert lease_file(tmp_path / "run").exists()
        assert list((tmp_path / "run").iterdir()) == []
    assert said == []


def test_a_second_job_is_told_of_the_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "7331")
    with acquire(str(tmp_path)) as first:
        began = time.monotonic()
        with pytest.raises(LeaseHeldError) as caught:
            acquire(str(tmp_path))
        assert time.monotonic() - began < 5
        first.check()
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert str(tmp_path) in message
    assert f"job 7331, process {os.getpid()} on " in message
    assert "UTC" in message
    assert "--workdir" in message


@pytest.mark.parametrize("stale_one", [False, True])
def test_of_jobs_started_in_the_same_moment_one_wins(
    tmp_path: pathlib.Path, start: Callable[..., Job], stale_one: bool
) -> None:
    workdir = tmp_path / "run"
    if stale_one:
        leave(workdir)
    moment = time.time() + 2
    jobs = [start(str(workdir), start=moment, stale=1.0 if stale_one else 60.0) for _ in range(6)]
    lines = [job.result() for job in jobs]
    winners = [job for job, line in zip(jobs, lines, strict=True) if line == "got it"]
    assert len(winners) == 1
    for job, line in zip(jobs, lines, strict=True):
        if job is not winners[0]:
            assert f"process {winners[0].process.pid} on" in line
            assert job.end() == 4
    assert winners[0].ask() == "still mine"


# ------------------------------------------------------------------------------ gone


def test_a_killed_process_of_this_machine_is_followed_at_once(
    tmp_path: pathlib.Path, start: Callable[..., Job]
) -> None:
    job = start(str(tmp_path))
    assert job.result() == "got it"
    job.kill()
    said: list[str] = []
    began = time.monotonic()
    with acquire(str(tmp_path), log=said.append):
        assert time.monotonic() - began < 5
    assert len(said) == 1
    assert f"process {job.process.pid} on" in said[0]
    assert "which has ended" in said[0]


def test_a_process_number_that_is_used_again() -> None:
    owner = Owner.this_process()
    earlier = dataclasses.replace(owner, started=owner.started - 100)
    assert owner.state_here() == "running"
    assert earlier.state_here() == "ended"
    assert dataclasses.replace(owner, machine="other").state_here() == "elsewhere"
    assert dataclasses.replace(earlier, machine="").state_here() == "elsewhere"


@pytest.mark.parametrize("step", [-3600.0, -0.01, 0.01, 3600.0])
def test_a_clock_that_is_set_ends_nobody(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """The kernel's time of the boot moves with the clock, and process start times with it."""
    owner = Owner.this_process()
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + step)
    now = time.time() + step
    monkeypatch.setattr(time, "time", lambda: now)
    assert owner.state_here() == "running"
    assert Owner.this_process().started == owner.started


@pytest.mark.parametrize("name", ["a b", "(x)", ") R 1 (", "x) Z 1 2 3"])
def test_names_of_commands_are_no_matter(tmp_path: pathlib.Path, name: str) -> None:
    program = tmp_path / name
    program.symlink_to(sys.executable)
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, sys.argv[1].encode()); print(1, flush=True); input()"
    with subprocess.Popen(
        [str(program), "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert name in pathlib.Path(f"/proc/{process.pid}/stat").read_text()
        started, _ = lease_lib._process(process.pid)
        owner = dataclasses.replace(Owner.this_process(), pid=process.pid, started=started)
        assert owner.state_here() == "running"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert owner.state_here() == "stopped"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert owner.state_here() == "ended"  # but not yet waited for
    assert owner.state_here() == "ended"


def test_without_proc_nobody_is_known_to_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Owner.this_process()
    gone = dataclasses.replace(there, pid=2**22 + 1)

    def missing(path: str) -> bytes:
        raise StorageError(f"cannot read {path}: it does not exist")

    monkeypatch.setattr(storage, "read_bytes", missing)
    with monkeypatch.context() as patch:
        patch.setattr(lease_lib, "machine", lambda: there.machine)
        # As where other users' processes are hidden.
        assert (there.state_here(), gone.state_here()) == ("elsewhere", "ended")
    assert lease_lib.machine() == ""
    assert Owner.this_process().started == 0
    assert Owner.this_process().state_here() == gone.state_here() == "elsewhere"


@pytest.mark.parametrize("skew", [-1e8, 0, 1e8])
def test_one_that_is_gone_elsewhere_is_waited_for(tmp_path: pathlib.Path, skew: float) -> None:
    """Whatever its clock says."""
    owner = leave(tmp_path, job="night", since="1990-01-01", started=int(time.time() + skew))
    os.utime(lease_file(tmp_path), (time.time() + skew,) * 2)
    said: list[str] = []
    began = time.monotonic()
    with acquire(str(tmp_path), renew_sec=0.5, stale_sec=2.0, log=said.append) as lease:
        waited = time.monotonic() - began
        lease.check()
    assert 2.0 <= waited < 10
    assert len(said) == 2
    assert f"in use by {owner}" in said[0]
    assert "no sign of life for 2 s" in said[0]
    assert said[1].startswith(f"took over {tmp_path} from job night, process")


def test_one_that_is_alive_elsewhere_stops_the_second(tmp_path: pathlib.Path) -> None:
    owner = leave(tmp_path, since="2100-01-01")
    with renewed(tmp_path, owner, every=0.3):
        began = time.monotonic()
        with pytest.raises(LeaseHeldError, match="on far, since 2100-01-01"):
            acquire(str(tmp_path), renew_sec=0.3, stale_sec=30.0, log=lambda line: None)
        assert time.monotonic() - began < 10
    assert Owner.parse(lease_file(tmp_path).read_bytes()) == owner


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\x00", b'{"host": 3}', b"[" * 100_000]
)
def test_a_damaged_lease_is_waited_for(tmp_path: pathlib.Path, content: bytes) -> None:
    lease_file(tmp_path).write_bytes(content)
    said: list[str] = []
    with acquire(str(tmp_path), renew_sec=0.2, stale_sec=0.5, log=said.append) as lease:
        lease.check()
    assert "in use by another job" in said[0]


def test_one_given_back_while_it_is_watched(tmp_path: pathlib.Path) -> None:
    leave(tmp_path)

    def log(line: str) -> None:
        lease_file(tmp_path).unlink()

    began = time.monotonic()
    with acquire(str(tmp_path), renew_sec=0.2, stale_sec=60.0, log=log) as lease:
        lease.check()
    assert time.monotonic() - began < 10


# ------------------------------------------------------------------------------ lost


def test_a_paused_job_finds_out_before_it_writes(
    tmp_path: pathlib.Path, start: Callable[..., Job]
) -> None:
    paused = start(str(tmp_path), stale=1.0)
    assert paused.result() == "got it"
    paused.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    other = start(str(tmp_path), stale=1.0)
    assert other.result() == "got it"
    paused.process.send_signal(signal.SIGCONT)
    found = paused.ask()  # the first thing it does
    assert found.startswith("lost: ")
    assert f"process {other.process.pid} on" in found
    assert "no sign of life for 1 s" in found
    assert paused.end() == 0
    assert other.ask() == "still mine"
    assert lease_file(tmp_path).exists()
    other.end()
    assert not lease_file(tmp_path).exists()


def test_a_paused_job_that_nobody_followed_goes_on(
    tmp_path: pathlib.Path, start: Callable[..., Job]
) -> None:
    job = start(str(tmp_path), stale=0.5)
    assert job.result() == "got it"
    job.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    job.process.send_signal(signal.SIGCONT)
    assert job.ask() == "still mine"


def quiet_lease(workdir: pathlib.Path, stale_sec: float = 60.0) -> Lease:
    """One that renews itself only when it is checked."""
    return acquire(str(workdir), renew_sec=1000, stale_sec=stale_sec)


def test_a_check_asks_nothing_while_the_lease_is_fresh(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_lease(tmp_path) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_version", None)
            for _ in range(100):
                lease.check()
        now = lease_lib._elapsed_clock()
        for late in (31, 62, 93):
            before = lease_file(tmp_path).read_bytes()
            monkeypatch.setattr(lease_lib, "_elapsed_clock", lambda late=late: now + late)
            lease.check()
            assert lease_file(tmp_path).read_bytes() != before


def test_a_late_check_fails_while_the_store_does(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> str:
        raise StorageError("no answer")

    with quiet_lease(tmp_path) as lease:
        now = lease_lib._elapsed_clock()
        monkeypatch.setattr(lease_lib, "_elapsed_clock", lambda: now + 40)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_version", broken)
            for _ in range(2):
                with pytest.raises(StorageError, match="no answer") as caught:
                    lease.check()
                assert not isinstance(caught.value, LeaseLostError)
        lease.check()


def test_an_outage_does_not_end_the_renewals(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = storage.write_version, []

    def failing(*args: Any) -> str:
        calls.append(1)
        if len(calls) < 3:
            raise StorageError("no answer")
        return write(*args)

    with acquire(str(tmp_path), renew_sec=0.1, stale_sec=60) as lease:
        before = lease_file(tmp_path).read_bytes()
        monkeypatch.setattr(storage, "write_version", failing)
        deadline = time.monotonic() + 20
        while lease_file(tmp_path).read_bytes() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(lease_file(tmp_path).read_bytes())["renewed"] > 0
        lease.check()


def test_a_lease_that_was_removed_is_lost(tmp_path: pathlib.Path) -> None:
    lease = quiet_lease(tmp_path, stale_sec=0.0)
    lease_file(tmp_path).unlink()
    with pytest.raises(LeaseLostError, match="is another job's now"):
        lease.check()
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()


# ------------------------------------------------------------------------------ what is recorded


def test_a_changed_digit_of_a_lease_makes_nothing_void(tmp_path: pathlib.Path) -> None:
    record = Record((Superseded("ab", 19, frozenset({("cd", 20)})),))
    content = lease_lib._document(Owner.this_process(), 3, record)
    for place, byte in enumerate(content):
        if chr(byte).isalnum():
            changed = bytes([*content[:place], byte ^ 1, *content[place + 1 :]])
            lease_file(tmp_path).write_bytes(changed)
            assert lease_lib.read_record(str(tmp_path)) == Record(), changed
            assert Owner.parse(changed) is None
    lease_file(tmp_path).write_bytes(content)
    assert lease_lib.read_record(str(tmp_path)) == record


def test_a_job_that_lost_the_lease_is_remembered(tmp_path: pathlib.Path) -> None:
    """By the next one and those after it, until somebody has looked how far it got."""
    removing = frozenset({("ab", 10)})
    owner = dataclasses.replace(Owner.this_process(), pid=2**22 + 1)
    document = lease_lib._document(owner, 3, Record((), removing))
    lease_file(tmp_path).write_bytes(document)
    assert lease_lib.read_record(str(tmp_path)).is_void("ab", 10)
    with acquire(str(tmp_path), keeps_record=True, log=lambda _: None) as lease:
        assert lease.record.pending == [owner.token]
    with acquire(str(tmp_path), keeps_record=True, log=lambda _: None) as lease:
        assert lease.record.superseded == (Superseded(owner.token, None, removing),)
        lease.settle({owner.token: 30})
        assert lease.record.pending == []
    with acquire(str(tmp_path), keeps_record=True) as lease:
        record = lease_lib.read_record(str(tmp_path))
        assert record == lease.record == Record((Superseded(owner.token, 30, removing),))
    voids = [record.is_void(owner.token, 30), record.is_void(owner.token, 31)]
    assert voids == [False, True]
    assert record.is_void("ab", 10)
    assert not record.is_void("cd", 31)


def test_a_removal_is_recorded_before_it_begins(tmp_path: pathlib.Path) -> None:
    with quiet_lease(tmp_path) as lease:
        with lease.removing(frozenset({("ab", 10)})):
            assert lease_lib.read_record(str(tmp_path)).is_void("ab", 10)
        lease._renew()
        assert not lease_lib.read_record(str(tmp_path)).is_void("ab", 10)
        lease_file(tmp_path).write_bytes(lease_lib._document(Owner.this_process(), 0, Record()))
        with pytest.raises(LeaseLostError), lease.removing(frozenset({("ab", 20)})):
            raise AssertionError("not reached")


def test_on_a_disk_a_fence_sees_every_other_owner(tmp_path: pathlib.Path) -> None:
    with quiet_lease(tmp_path) as lease:
        with lease.fenced():
            pass
        lease_file(tmp_path).write_bytes(lease_lib._document(Owner.this_process(), 0, Record()))
        lease.check()  # which believes in it for half a minute
        with pytest.raises(LeaseLostError), lease.fenced():
            raise AssertionError("not reached")


HOLDER = """
import sys
from trainer.core import storage
with storage.locked(sys.argv[1]):
    print("locked", flush=True)
    input()
"""


def test_a_lock_that_is_held_for_ever_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_LOCK_SECONDS", 0.2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with pytest.raises(StorageError) as caught:
            acquire(str(tmp_path))
        holder.kill()
    message = str(caught.value)
    assert f"process {holder.pid} has its lock" in message
    assert str(tmp_path) in message and "kill -CONT" in message and "\n" not in message
    with acquire(str(tmp_path)) as lease:
        lease.check()


def test_a_workdir_that_cannot_be(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError) as caught:
        acquire(str(tmp_path / "file" / "run"))
    assert caught.value.exit_code == 4
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------ Cloud Storage


def test_on_cloud_storage_one_wins_and_the_next_follows(
    gcs: Gcs, start: Callable[..., Job]
) -> None:
    workdir, environment = f"{gcs.url}/run", gcs.environment()
    moment = time.time() + 3
    jobs = [start(workdir, start=moment, environment=environment) for _ in range(4)]
    lines = [job.result() for job in jobs]
    (winner,) = (job for job, line in zip(jobs, lines, strict=True) if line == "got it")
    for job, line in zip(jobs, lines, strict=True):
        if job is not winner:
            assert f"process {winner.process.pid} on" in line
    assert winner.ask() == "still mine"
    winner.kill()
    said: list[str] = []
    with acquire(workdir, log=said.append) as lease:
        lease.check()
        assert gcs.emulator.names(gcs.bucket) == [f"run/{lease_lib.NAME}"]
    assert "which has ended" in said[0]
    assert gcs.emulator.names(gcs.bucket) == []


def test_on_cloud_storage_a_paused_job_finds_out(gcs: Gcs, start: Callable[..., Job]) -> None:
    workdir, environment = f"{gcs.url}/run", gcs.environment()
    paused = start(workdir, stale=2.0, environment=environment)
    assert paused.result() == "got it"
    paused.process.send_signal(signal.SIGSTOP)
    other = start(workdir, stale=2.0, environment=environment)
    assert other.result() == "got it"
    paused.process.send_signal(signal.SIGCONT)
    assert paused.ask().startswith("lost: ")
    assert other.ask() == "still mine"


def test_on_cloud_storage_with_faults(gcs: Gcs) -> None:
    """An answer that gets lost after the lease was written is not another job's success."""
    with acquire(f"{gcs.url}/run", renew_sec=0.2, stale_sec=60) as lease:
        with gcs.emulator.faulty(error_rate=0.3, reset_rate=0.3, seed=5):
            time.sleep(4)
        lease.check()
        faults = sum(n for (kind, _), n in gcs.emulator.counts().items() if kind == "fault")
    assert faults >= 3


def test_requests(gcs: Gcs) -> None:
    """One to take the lease, one to give it back."""
    gcs.emulator.reset_counts()
    with acquire(f"{gcs.url}/run") as lease:
        lease.check()
    # The client itself asks for the bucket, once.
    log = [request for request in gcs.emulator.log() if request.kind != "bucket"]
    requests = [(request.method, request.kind) for request in log]
    assert requests == [("POST", "write"), ("DELETE", "delete")]
