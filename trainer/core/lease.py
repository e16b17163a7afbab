"""A workdir's lease: which job writes it, so that two never do.

`<workdir>/lease.json` is made with a precondition (nobody else has made it) and renewed by a thread
with another (nobody else has written it since), so of any number of jobs one has it. Another job
watches it. If it changes, its owner is alive, and the other job stops; if it stays the same for
`STALE_SEC` by the watcher's own clock, the owner is gone, and the lease is taken over. No clock of
another machine counts. Where the owner was a process of this machine that has ended, it is taken
over at once.

An owner that was paused finds out before it writes: `Lease.check` believes in the lease for less
time than others wait, and otherwise renews it. One that is paused between the look and the write
can't find out. On a local disk `Lease.fenced` keeps others from taking over in between; what goes to
a store has names that hold the lease's token, or is bound to the version that it follows, and the
lease's document records what of a job that lost it still counts (see `trainer.core.fencing`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import psutil

from trainer.core import documents, flags, storage
from trainer.core.documents import DocumentError
from trainer.core.errors import StorageError
from trainer.core.fencing import Mark, Record
from trainer.core.storage import ConflictError

NAME = "lease.json"
RENEW_SEC = 15.0
STALE_SEC = 60.0
_LAST_RENEWAL_SEC = 5.0  # that a job waits at its end for one that is under way

_JOB_VARIABLES = ("CLOUD_ML_JOB_ID", "SLURM_JOB_ID")


class LeaseHeldError(StorageError):
    """Another job writes this workdir."""


class LeaseLostError(ConflictError):
    """This job wrote the workdir, and another one does now."""


@dataclass(frozen=True)
class Owner:
    """The holder of a lease.

    Attributes:
      token: of this lease alone.
      host: its name.
      pid: of the process.
      job: as the scheduler calls it; may be empty.
      since: UTC, by the owner's clock.
      machine: tells machines, containers and boots apart; empty if that can't be known.
      started: clock ticks from the boot to the start of the process, which no clock that is set
        moves: numbers of processes are used again.
    """

    token: str
    host: str
    pid: int
    job: str
    since: str
    machine: str
    started: int

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
            started=_process(os.getpid())[0] if machine() else 0,
        )

    @classmethod
    def parse(cls, data: bytes) -> Owner | None:
        """The owner that a lease names, None if it is damaged."""
        try:
            owner = documents.as_record(cls, _parse(data))
            return owner if 0 < owner.pid < 1 << 31 else None
        except DocumentError:
            return None

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"

    def state_here(self) -> str:
        """'running', 'stopped' or 'ended' if it is a process of this machine, 'elsewhere' if not."""
        if not self.machine or self.machine != machine():
            return "elsewhere"
        try:
            started, state = _process(self.pid)
        except StorageError:
            # Processes of others can be hidden; whether they are there is known all the same.
            return "elsewhere" if psutil.pid_exists(self.pid) else "ended"
        if started != self.started or state in "ZXx":
            return "ended"
        return "stopped" if state in "Tt" else "running"


def _process(pid: int) -> tuple[int, str]:
    """The start of a process of this machine, in clock ticks since the boot, and its state.

    Raises:
      StorageError: there is none, or it can't be seen.
    """
    # After the command's name, which may hold anything, the last parenthesis included.
    fields = storage.read_bytes(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[19]), fields[0].decode()


def machine() -> str:
    """The boot and the container, within which process numbers mean something; '' if unknown."""
    boot = "/proc/sys/kernel/random/boot_id"
    try:
        return f"{storage.read_text(boot).strip()} {os.readlink('/proc/self/ns/pid')}{_times()}"
    except (StorageError, OSError):
        return ""


def _times() -> str:
    """The namespace of boot times, of which a container may have its own; '' in older kernels."""
    try:
        return f" {os.readlink('/proc/self/ns/time')}"
    except OSError:
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
      record: what counts of the jobs before.
      keeps_record: whether that outlives the lease.
      began: on `_elapsed_clock`, before it was written.
      renew_sec: seconds between two renewals.
      stale_sec: seconds after which others take it over.
    """

    def __init__(
        self,
        path: str,
        owner: Owner,
        version: str,
        record: Record,
        *,
        keeps_record: bool,
        began: float,
        renew_sec: float,
        stale_sec: float,
    ) -> None:
        self._path, self._owner, self._version = path, owner, version
        self._record, self._keeps_record = record, keeps_record
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

    @property
    def token(self) -> str:
        """16 hexadecimal digits that no other lease has: for the names of what its owner writes."""
        return self._owner.token

    @property
    def record(self) -> Record:
        """The fence that this job found."""
        return self._record

    def check(self) -> None:
        """Called before anything is written; asks the store only if a renewal is overdue.

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

    @contextlib.contextmanager
    def fenced(self) -> Iterator[None]:
        """Holds the lease for one short change of the workdir.

        On a local disk nobody can take the lease over until the block ends. Of a store it is only
        known that nobody had shortly before.

        Raises:
          LeaseLostError, StorageError: as `check`.
        """
        self.check()
        if storage.is_remote(self._path):
            yield
            return
        with storage.locked(os.path.dirname(self._path) or "."):
            there = storage.read_version(self._path)
            owner = Owner.parse(there[0]) if there else None
            if owner is None or owner.token != self.token:
                self._lost = self._lost_now()
                raise self._lost
            yield

    def settle(self, through: Mapping[str, int]) -> None:
        """Records what counts of the jobs from which the lease was taken over.

        Args:
          through: the last step that there is of each, by token; of one that isn't named nothing.

        Raises:
          LeaseLostError, StorageError: it couldn't be recorded.
        """
        if self._record.pending:
            with self._lock:
                self._write_record(self._record.settled(through))

    @contextlib.contextmanager
    def removing(self, marks: frozenset[Mark]) -> Iterator[None]:
        """A block that removes what jobs have written of some steps.

        First it is recorded that this doesn't count any more, so that what is removed late, by a
        job that was paused in the block, is nothing that another one has gone on from.

        Raises:
          LeaseLostError, StorageError: it couldn't be recorded; nothing may be removed.
        """
        with self._lock:
            self._write_record(dataclasses.replace(self._record, removing=marks))
        try:
            yield
        finally:
            # Written with the next renewal.
            self._record = dataclasses.replace(self._record, removing=frozenset())

    def release(self) -> None:
        """Lets the next job begin at once; a lease that was lost stays as it is."""
        self._ending.set()
        self._thread.join(_LAST_RENEWAL_SEC)
        with contextlib.suppress(StorageError):
            if self._lost is not None:
                return
            if self._keeps_record and self._record.superseded:
                data = _document(self._owner, self._count + 1, self._record, released=True)
                storage.write_version(self._path, data, self._version)
            else:
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
            data = _document(self._owner, self._count, self._record)
            self._version = storage.write_version(self._path, data, self._version)
        except ConflictError:
            self._lost = self._lost_now()
        else:
            self._confirmed = began

    def _write_record(self, record: Record) -> None:
        before, self._record = self._record, record
        try:
            self._renew()
            if self._lost is not None:
                raise self._lost
        except StorageError:
            self._record = before
            raise

    def _lost_now(self) -> LeaseLostError:
        return LeaseLostError(
            f"{self._path} is {_named(self._path)} now, because this process showed no sign of "
            f"life for {self._stale_sec:g} s; nothing was written since, and this job ends"
        )


def _document(owner: Owner, count: int, record: Record, *, released: bool = False) -> bytes:
    document = {**dataclasses.asdict(owner), "renewed": count, "released": released}
    document |= record.document()
    return json.dumps({**document, "crc32c": _checksum(document)}, indent=1).encode()


def _checksum(document: Mapping[str, Any]) -> int:
    return int(google_crc32c.value(json.dumps(document).encode()))


def _parse(data: bytes) -> dict[str, Any]:
    """A lease's document: with one digit changed, it could declare void what counts.

    Raises:
      DocumentError: it is damaged.
    """
    document = documents.parse_object(data)
    if document.pop("crc32c", None) != _checksum(document):
        raise DocumentError("its checksum is wrong")
    return document


def _parse_record(data: bytes) -> tuple[Record, bool]:
    """The contents of a lease's document, and whether it was given back."""
    try:
        document = _parse(data)
        return Record.parse(document), document["released"] is True
    except (ValueError, KeyError, TypeError):
        return Record(), False


def read_record(workdir: str) -> Record:
    """The fence of a workdir, for those who only read it.

    Raises:
      StorageError: the lease can't be read.
    """
    there = storage.read_version(storage.join(workdir, NAME))
    return _parse_record(there[0])[0] if there else Record()


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
    keeps_record: bool = False,
    log: Callable[[str], object] = print,
) -> Lease:
    """Takes the lease of a workdir, from a job that is gone if need be.

    Args:
      workdir: of the run, local or gs://.
      who: the job's name, for the messages of others; by default what the scheduler says.
      renew_sec: seconds between two renewals.
      stale_sec: seconds without one after which the owner counts as gone.
      keeps_record: whether what jobs have written that lost the lease is told apart by their tokens;
        the lease object then stays, given back, where there was such a job.
      log: is told when there is to be a wait, and when the lease was another's.

    Raises:
      LeaseHeldError: another job writes this workdir; names it.
      StorageError: the lease can't be read or written.
    """
    path, owner = storage.join(workdir, NAME), Owner.this_process(who)
    gone = _Gone(None)
    while True:
        began = _elapsed_clock()
        record = gone.record if keeps_record else Record()
        try:
            version = storage.write_version(path, _document(owner, 0, record), gone.version)
        except ConflictError:
            gone = _watch(workdir, renew_sec, stale_sec, log)
            continue
        if gone.description:
            log(f"took over {workdir} from {gone.description}")
        lease = Lease(
            path,
            owner,
            version,
            record,
            keeps_record=keeps_record,
            began=began,
            renew_sec=renew_sec,
            stale_sec=stale_sec,
        )
        if gone.description and not storage.is_remote(path):
            with lease.fenced():
                _sweep(workdir)
        return lease


def _sweep(workdir: str) -> None:
    """Removes what processes have left that were killed while they wrote a lease.

    Whoever is about to write one now finds that it is another's, and doesn't miss it.
    """
    for name in storage.listdir(workdir):
        if re.fullmatch(rf"\.{re.escape(NAME)}\.[0-9a-f]{{8}}\.tmp", name):
            storage.remove(storage.join(workdir, name))


@dataclass(frozen=True)
class _Gone:
    """A lease that may be taken.

    Attributes:
      version: None if there is none any more.
      description: whose it was, '' if it was given back.
      record: for the next owner.
    """

    version: str | None
    description: str = ""
    record: Record = dataclasses.field(default_factory=Record)


def _watch(workdir: str, renew_sec: float, stale_sec: float, log: Callable[[str], object]) -> _Gone:
    """Waits until a lease is given back or its owner is known to be gone."""
    began, first = _elapsed_clock(), ""
    while True:
        waited = _elapsed_clock() - began
        there = storage.read_version(storage.join(workdir, NAME))
        if there is None:
            return _Gone(None)
        data, version = there
        owner, (record, released) = Owner.parse(data), _parse_record(data)
        if released:
            return _Gone(version, "", record)
        next_record = record.taken_over(owner.token) if owner else record
        name, state = (owner, owner.state_here()) if owner else ("another job", "elsewhere")
        if state == "running" or version != (first or version):
            raise LeaseHeldError(
                f"{workdir} is in use by {name}; end that one first, or take another --workdir"
            )
        if state == "ended":
            return _Gone(version, f"{name}, which has ended", next_record)
        if waited >= stale_sec:
            gone = f"{name}, which showed no sign of life for {stale_sec:g} s"
            return _Gone(version, gone, next_record)
        if not first:
            log(
                f"{workdir} is in use by {name}; if it shows no sign of life for {stale_sec:g} s, "
                "this job takes over"
            )
        first = version
        time.sleep(min(renew_sec / 5, stale_sec - waited))
