"""A workdir's lease: which job writes it, so that two never do.

`<workdir>/lease.json` is made with a precondition (nobody else has made it) and renewed by a thread
with another (nobody else has written it since), so of any number of jobs one has it. Another job
watches it. If it changes, its owner is alive, and the other job stops; if it stays the same for
`STALE_SEC` by the watcher's own clock, the owner is gone, and the lease is taken over. No clock of
another machine counts. Where the owner was a process of this machine that has ended, it is taken
over at once.

An owner that was paused finds out before it writes: `Lease.check` believes in the lease for less
time than others wait, and otherwise renews it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from trainer.core import documents, flags, storage
from trainer.core.errors import StorageError
from trainer.core.storage import ConflictError

NAME = "lease.json"
RENEW_SEC = 15.0
STALE_SEC = 60.0
_LAST_RENEWAL_SEC = 5.0  # that a job waits at its end for one that is under way

_JOB_VARIABLES = ("CLOUD_ML_JOB_ID", "SLURM_JOB_ID")


class LeaseHeldError(StorageError):
    """Another job writes this workdir."""


class LeaseLostError(StorageError):
    """This job wrote the workdir, and another one does now."""


@dataclass(frozen=True)
class Owner:
    """Who has a lease.

    Attributes:
      token: of this lease alone.
      host: its name.
      pid: of the process.
      job: as the scheduler calls it; may be empty.
      since: UTC, by the owner's clock.
      machine: tells machines, containers and boots apart; empty if that can't be known.
      started: when the process did, by the owner's clock: numbers of processes are used again.
    """

    token: str
    host: str
    pid: int
    job: str
    since: str
    machine: str
    started: float

    @classmethod
    def this_process(cls, job: str = "") -> Owner:
        """A new lease's owner."""
        now = datetime.datetime.now(datetime.timezone.utc)
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            job=job or next(filter(None, map(flags.env, _JOB_VARIABLES)), ""),
            since=now.strftime("%Y-%m-%d %H:%M:%S UTC"),
            machine=machine(),
            started=psutil.Process().create_time(),
        )

    @classmethod
    def parse(cls, data: bytes) -> Owner | None:
        """The owner that a lease names, None if it is damaged."""
        try:
            owner = documents.as_record(cls, documents.parse_object(data))
            return owner if 0 < owner.pid < 1 << 31 else None
        except documents.DocumentError:
            return None

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"

    def state_here(self) -> str:
        """'running', 'stopped' or 'ended' if it is a process of this machine, 'elsewhere' if not."""
        if not self.machine or self.machine != machine():
            return "elsewhere"
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.started:
                return "ended"
            status = process.status()
        except psutil.NoSuchProcess:
            return "ended"
        except psutil.Error:
            return "running"
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "ended"
        return "stopped" if status == psutil.STATUS_STOPPED else "running"


def machine() -> str:
    """The boot and the container, within which process numbers mean something; '' if unknown."""
    boot = "/proc/sys/kernel/random/boot_id"
    try:
        return f"{storage.read_text(boot).strip()} {os.readlink('/proc/self/ns/pid')}"
    except (StorageError, OSError):
        return ""


def _elapsed_clock() -> float:
    """Seconds that go on while the machine sleeps, where the system has them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """The right to write a workdir, from `acquire`; a context that gives it back at its end.

    Args:
      path: of the lease object.
      owner: this job.
      version: of the object, just written.
      began: on `_elapsed_clock`, before it was written.
      renew_sec: seconds between two renewals.
      stale_sec: seconds after which others take it over.
    """

    def __init__(
        self,
        path: str,
        owner: Owner,
        version: str,
        *,
        began: float,
        renew_sec: float,
        stale_sec: float,
    ) -> None:
        self._path, self._owner, self._version = path, owner, version
        self._confirmed, self._renew_sec, self._stale_sec = began, renew_sec, stale_sec
        self._count = 0
        self._lost: LeaseLostError | None = None
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()

    def check(self) -> None:
        """To be called before anything is written; asks the store only if a renewal is overdue.

        Raises:
          LeaseLostError: another job has taken the lease over.
          StorageError: the lease is overdue, and the store doesn't answer.
        """
        if self._age() > self._stale_sec / 2:
            with self._lock:
                if self._age() > self._stale_sec / 2:
                    self._renew()
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Lets the next job begin at once; a lease that was lost stays as it is."""
        self._ending.set()
        self._thread.join(_LAST_RENEWAL_SEC)
        with contextlib.suppress(StorageError):
            if self._lost is None:
                storage.remove_version(self._path, self._version)

    def _age(self) -> float:
        """Seconds for which others may have seen nothing of this owner."""
        return _elapsed_clock() - self._confirmed

    def _keep(self) -> None:
        while self._lost is None and not self._ending.wait(self._renew_sec):
            # An outage is the next renewal's concern, or that of whoever checks.
            with self._lock, contextlib.suppress(StorageError):
                if self._age() > self._renew_sec / 2:
                    self._renew()

    def _renew(self) -> None:
        if self._lost is not None:
            return
        began = _elapsed_clock()
        self._count += 1
        try:
            data = _document(self._owner, self._count)
            self._version = storage.write_version(self._path, data, self._version)
        except ConflictError:
            self._lost = LeaseLostError(
                f"{self._path} is {_named(self._path)} now, because this process showed no sign of "
                f"life for {self._stale_sec:g} s; nothing was written since, and this job ends"
            )
        else:
            self._confirmed = began


def _document(owner: Owner, count: int) -> bytes:
    return json.dumps({**dataclasses.asdict(owner), "renewed": count}, indent=1).encode()


def _named(path: str) -> str:
    """Whose a lease is, for messages."""
    with contextlib.suppress(StorageError):
        there = storage.read_version(path)
        owner = Owner.parse(there[0]) if there else None
        if owner is not None:
            return f"that of {owner}"
    return "another job's"


def acquire(
    workdir: str,
    *,
    who: str = "",
    renew_sec: float = RENEW_SEC,
    stale_sec: float = STALE_SEC,
    say: Callable[[str], object] = print,
) -> Lease:
    """Takes the lease of a workdir, from a job that is gone if need be.

    Args:
      workdir: of the run, local or gs://.
      who: the job's name, for the messages of others; by default what the scheduler says.
      renew_sec: seconds between two renewals.
      stale_sec: seconds without one after which the owner counts as gone.
      say: is told when there is to be a wait, and when the lease was another's.

    Raises:
      LeaseHeldError: another job writes this workdir; names it.
      StorageError: the lease can't be read or written.
    """
    path, owner = storage.join(workdir, NAME), Owner.this_process(who)
    gone = _Gone(None, "")
    while True:
        began = _elapsed_clock()
        try:
            version = storage.write_version(path, _document(owner, 0), gone.version)
        except ConflictError:
            gone = _watch(workdir, renew_sec, stale_sec, say)
            continue
        if gone.version is not None:
            say(f"took over {workdir} from {gone.description}")
        return Lease(path, owner, version, began=began, renew_sec=renew_sec, stale_sec=stale_sec)


@dataclass(frozen=True)
class _Gone:
    """A lease that may be taken: its version, None if there is none any more, and whose it was."""

    version: str | None
    description: str


def _watch(workdir: str, renew_sec: float, stale_sec: float, say: Callable[[str], object]) -> _Gone:
    """Waits until a lease is given back or its owner is known to be gone."""
    began, first = _elapsed_clock(), ""
    while True:
        waited = _elapsed_clock() - began
        there = storage.read_version(storage.join(workdir, NAME))
        if there is None:
            return _Gone(None, "")
        data, version = there
        owner = Owner.parse(data)
        name, state = (owner, owner.state_here()) if owner else ("another job", "elsewhere")
        if state == "running" or version != (first or version):
            raise LeaseHeldError(
                f"{workdir} is in use by {name}; end that one first, or take another --workdir"
            )
        if state == "ended":
            return _Gone(version, f"{name}, which has ended")
        if waited >= stale_sec:
            return _Gone(version, f"{name}, which showed no sign of life for {stale_sec:g} s")
        if not first:
            say(
                f"{workdir} is in use by {name}; if it shows no sign of life for {stale_sec:g} s, "
                "this job takes over"
            )
        first = version
        time.sleep(min(renew_sec / 5, stale_sec - waited))
