"""Follows a job on Vertex AI and the ticks of its run, and has it submitted again if asked to.

Vertex AI starts a job's replicas again by itself when Spot VMs are taken (up to six times) and after
codes that may be a fault of the machine (134 and 139, up to three times). After any other code, and
when those starts are used up, the job has ended for good, and only another one goes on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.core import documents, storage
from trainer.core.errors import StorageError
from trainer.core.text import printable
from trainer.vertex.service import Job, JobFailedError, ServiceError

# A service that answers nothing for so long is no matter of a moment.
PATIENCE_SEC = 3600.0

T = TypeVar("T")


class Ticks:
    """The lines that a run adds to its `stats.jsonl`.

    Args:
      workdir: of the run.

    Attributes:
      kimg: thousands of images of the newest tick, 0 before the first.
    """

    def __init__(self, workdir: str) -> None:
        self._path = storage.join(workdir, "stats.jsonl")
        self._offset = 0
        self.kimg = 0.0

    def new(self) -> list[str]:
        """One text for each tick since the last look."""
        if not storage.exists(self._path):
            return []
        size = storage.size(self._path)
        # A resumed run drops what came after its checkpoint.
        self._offset = min(self._offset, size)
        start = max(self._offset - 1, 0)
        data = storage.read_range(self._path, start, min(size - start, documents.LONGEST))
        # And what it writes instead may be of other lengths: then this is in the midst of a line.
        skipped = data.find(b"\n") + 1 if self._offset else 0
        whole = data[skipped : data.rfind(b"\n") + 1]
        if not whole and len(data) == documents.LONGEST:
            whole = data[skipped:]  # of a line without an end, which is no tick
        self._offset = start + skipped + len(whole)
        return [self._line(line) for line in whole.split(b"\n") if line]

    def _line(self, line: bytes) -> str:
        try:
            tick = documents.parse_object(line)
            shown, self.kimg = tick_line(tick), tick["nimg"] / 1000
        except (ValueError, KeyError, TypeError) as error:
            reason = error if isinstance(error, documents.DocumentError) else "numbers are missing"
            return f"{self._path}: a line is no tick of a run ({reason}); passed over"
        return shown


def tick_line(stats: dict[str, Any]) -> str:
    """A tick of `stats.jsonl` in one line.

    Raises:
      KeyError, TypeError, ValueError: it isn't one.
    """
    parts = [f"tick {stats['tick']:<6d}kimg {stats['nimg'] / 1000:<10.1f}"]
    for label, key in {
        "sec/kimg": "Timing/sec_per_kimg",
        "augment": "Progress/augment",
        "D signs": "Loss/signs/real",
        "G loss": "Loss/G/loss",
    }.items():
        stat = stats.get(key)
        mean = stat.get("mean") if isinstance(stat, dict) else None
        if isinstance(mean, (int, float)):
            parts.append(f"{label} {mean:<9.3g}")
    return " ".join(parts).rstrip()


@dataclass
class Resumes:
    """When a job that has ended is submitted again.

    Attributes:
      limit: how often at most.
      done: how often it was.
      kimg: of the run when a job ended last, None before the first end.
    """

    limit: int
    done: int = 0
    kimg: float | None = None

    def refusal(self, job: Job, kimg: float) -> str | None:
        """Why a job that has ended isn't submitted again; None if it is to be."""
        if not job.goes_on:
            return "another try would not end differently"
        if self.kimg is not None and kimg <= self.kimg:
            return f"the job before it, too, ended at kimg {self.kimg:g}: the run makes no progress"
        if self.done >= self.limit:
            return f"it was submitted again {self.done} times, as --max_resumes allows"
        self.done, self.kimg = self.done + 1, kimg
        return None


def follow(
    job: Job,
    look: Callable[[Job], Job],
    submit_again: Callable[[Job], Job],
    resumes: Resumes | None,
    poll_sec: float,
) -> JobFailedError | None:
    """Prints what a job, its run, and the jobs that go on with it do, until the last has ended.

    Args:
      job: to begin with.
      look: the job as it is now.
      submit_again: starts a job that goes on.
      resumes: None: none is started.
      poll_sec: seconds between two looks.

    Returns:
      The error that the last job's end is, None if the run is finished.

    Raises:
      ServiceError, StorageError: there was no answer for an hour.
    """
    print(f"{printable(job.name)}, run in {printable(job.workdir)}", flush=True)
    ticks, state = Ticks(job.workdir), ""
    lines = ticks.new()  # where this can't be read at all, no patience helps
    while True:
        if job.state != state:
            state = job.state
            print(printable(state), flush=True)
        for line in lines:
            print(printable(line), flush=True)
        if job.has_ended:
            error = job.ended_how()
            if error is None or resumes is None:
                return error
            refusal = resumes.refusal(job, ticks.kimg)
            if refusal is not None:
                return JobFailedError(f"{error}; not submitted again: {refusal}", error.exit_code)
            again = patiently(functools.partial(submit_again, job), poll_sec)
            line = (
                f"{job.name} ended at kimg {ticks.kimg:g} ({job.why}); {again.name} goes on "
                f"({resumes.done} of {resumes.limit})"
            )
            print(printable(line), flush=True)
            job, state, lines = again, "", []
            continue
        time.sleep(poll_sec)
        job = patiently(functools.partial(look, job), poll_sec)
        lines = patiently(ticks.new, poll_sec)


def patiently(action: Callable[[], T], wait_sec: float) -> T:
    """The result of a request to a service that may not answer for a while, and is asked again.

    Raises:
      ServiceError, StorageError: it hasn't answered for an hour.
    """
    since = None
    while True:
        try:
            return action()
        except (ServiceError, StorageError) as error:
            if since is None:
                since = time.monotonic()
                print(
                    printable(f"{error} (tried again for {PATIENCE_SEC / 60:g} minutes)"),
                    flush=True,
                )
            if time.monotonic() - since > PATIENCE_SEC:
                raise
            time.sleep(wait_sec)
