"""The ties between the workers of a run while it lasts: that all stay, and stop together.

The connections over which the workers met stay open. A worker that dies closes its own, one that
hangs falls silent; then all others end, too, since TensorFlow alone would wait for it or end in a
stack dump. Its own heartbeats are set to come later (`heartbeat_timeout`).

Over the same connections the workers agree after which step to stop early (`Membership.ask_to_stop`
and `begin`). It costs a step nothing but the look at a variable:

1. Any worker asks the chief, and the chief tells all to hold: none begins another step for now.
2. Each answers at once, from the thread that listens, how many steps its loop has begun.
3. The chief tells all the largest number. Those behind it go on up to there, and all stop.

So every step that one worker has begun is begun by all, and no sum over workers is left waiting.
Nobody waits for a step to end before it answers, so a hold lasts as long as a message takes.

Needs no TensorFlow.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from trainer.config import Config
from trainer.core import flags
from trainer.core.errors import PreemptedError, TrainerError
from trainer.core.text import shorten
from trainer.distribution import meeting
from trainer.distribution.cluster import Cluster, PeerError
from trainer.distribution.meeting import Line, parse_reason, parse_steps, parse_stop, stop_message

_BEATS = 4  # messages in the time after which a silent peer counts as gone
# TensorFlow looks for each at half of its timeout, so twice the silence is above ours.
_HEARTBEATS, _HEARTBEATS_SEC = 4, 60.0
_START_SEC = 60.0  # at least, for TensorFlow's servers: usually they take one or two
# TensorFlow's errors that a single process never meets, and what the others' texts have in common.
_LOST_KINDS = {"UnavailableError", "AbortedError", "DeadlineExceededError"}
_LOST_TEXTS = re.compile(
    r"unhealthy|heartbeat|coordination service|collective ops is aborted|connection reset|"
    r"socket closed|peer health",
    re.IGNORECASE,
)
# What the main thread gets to end by itself when a peer is gone, before the process is ended.
_GRACE_SEC = 3.0
_POLL_SEC = 0.02


class Membership:
    """This worker's ties to the others while a run lasts.

    Args:
      cluster: who they are.
      lines: the connections to them: the chief's to all, any other's to the chief.
      silence: seconds after which a silent peer counts as gone.
    """

    def __init__(self, cluster: Cluster, lines: Mapping[int, Line], silence: float) -> None:
        self._cluster, self._lines, self._silence = cluster, dict(lines), silence
        self._finished: set[int] = set()
        self._closed: set[int] = set()
        self._verdict: TrainerError | None = None
        self._hold = threading.Condition()  # guards the next six
        self._there: set[int] = set()  # the chief's: who has come to `meet`
        self._met = False
        self._begun = 0  # steps
        self._stop_reason: str | None = None
        self._last_step: int | None = None  # after which all stop
        self._answers: dict[int, int] = {}  # the chief's: steps begun, by worker
        self._decided, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for index, line in self._lines.items():
            selector.register(line, selectors.EVENT_READ, index)
        beat = 0.0
        while not self._leaving.is_set() and self._verdict is None:
            if time.monotonic() >= beat:
                beat = time.monotonic() + self._silence / _BEATS
                self._send_beats()
            ready = selector.select(max(0.0, beat - time.monotonic()))
            if time.monotonic() > beat + self._silence / _BEATS:
                # This process itself stood still, or TensorFlow kept Python's lock: what the others
                # did then isn't known.
                for line in self._lines.values():
                    line.heard = time.monotonic()
            for key, _ in ready:
                if not self._read(key.data):
                    selector.unregister(key.fileobj)
            self._look_for_silence()
        if self._verdict is not None and not self._leaving.wait(_GRACE_SEC):
            self.end(self._verdict)

    def _send_beats(self) -> None:
        for index, line in self._lines.items():
            if index not in self._closed:
                line.send(beat=True)

    def _look_for_silence(self) -> None:
        for index, line in self._lines.items():
            quiet = time.monotonic() - line.heard
            if index not in self._finished and quiet > self._silence:
                self._lost(index, f"has been silent for {quiet:.0f} s")

    def _read(self, index: int) -> bool:
        """Takes in what a peer says; whether it may say more."""
        try:
            messages = self._lines[index].receive()
            for message in messages or ():
                self._take(index, message)
        except ValueError:
            self._closed.add(index)
            self._lost(index, "has sent what no worker sends")
            return False
        if messages is None:
            self._closed.add(index)
            if index not in self._finished:
                self._lost(index, "has ended")
        return messages is not None

    def _take(self, index: int, message: Mapping[str, Any]) -> None:
        """Acts on a message; raises a ValueError if it is none that a worker sends."""
        if "done" in message:
            # Its last answer, too: it may be gone before anybody asks.
            self._answered(index, parse_steps(message["done"]))
            self._finished.add(index)
        elif "stop" in message:
            self._decide(parse_stop(message))
        elif "here" in message:
            self._came(index)
        elif "all_here" in message:
            with self._hold:
                self._met = True
                self._hold.notify_all()
        elif "please_stop" in message:
            self._hold_all(parse_reason(message["please_stop"]))
        elif "hold" in message:
            with self._hold:
                self._stop_reason = parse_reason(message["hold"])
                self._lines[index].send(begun=self._begun)
        elif "begun" in message:
            self._answered(index, parse_steps(message["begun"]))
        elif "last_step" in message:
            with self._hold:
                self._last_step = parse_steps(message["last_step"])
                self._hold.notify_all()

    def _lost(self, index: int, what: str) -> None:
        self._decide(
            PeerError(
                f"{self._cluster.peer(index)} {what}: see its own log; start all workers again, "
                "they go on from the newest checkpoint"
            )
        )

    def _decide(self, verdict: TrainerError) -> None:
        """The first reason to stop counts, for all workers."""
        if self._verdict is None:
            self._verdict = verdict
            if self._cluster.is_chief:
                self._tell(verdict)
            self._decided.set()
            with self._hold:
                self._hold.notify_all()

    def _tell(self, problem: TrainerError) -> None:
        for line in self._lines.values():
            line.send(**stop_message(problem))

    def ask_to_stop(self, reason: str) -> None:
        """Has all workers stop after one and the same step; returns at once, from any thread.

        Args:
          reason: for the users of all workers.
        """
        if len(self._cluster.names) > 1:
            reason = f"{reason} on {self._cluster.peer(self._cluster.index)}"
        if self._cluster.is_chief:
            self._hold_all(reason)
        else:
            self._lines[0].send(please_stop=reason)

    def meet(self) -> None:
        """Waits until all workers have come here, once in a run.

        To be called just before TensorFlow's server starts, which keeps Python's lock until all
        servers have: waiting there for a worker that reads or imports for minutes, this one would
        look as if it hung itself.

        Raises:
          TrainerError: a worker is gone or has failed.
        """
        if self._cluster.is_chief:
            self._came(self._cluster.index)
        else:
            self._lines[0].send(here=True)
        with self._hold:
            self._hold.wait_for(lambda: self._met or self._verdict)
            if self._verdict is not None:
                raise self._verdict

    def _came(self, index: int) -> None:
        with self._hold:
            self._there.add(index)
            if len(self._there) == len(self._cluster.names):
                self._met = True
                for line in self._lines.values():
                    line.send(all_here=True)
                self._hold.notify_all()

    def begin(self, steps: int) -> str | None:
        """Called before each call of the training step.

        While the workers agree on the last step, this waits.

        Args:
          steps: how many will have been begun with this call, from the start of the run.

        Returns:
          None if it may be made, else why the run stops before it.

        Raises:
          TrainerError: a worker is gone or has failed.
        """
        with self._hold:
            self._hold.wait_for(
                lambda: self._stop_reason is None or self._last_step is not None or self._verdict
            )
            if self._verdict is not None:
                raise self._verdict
            if self._last_step is not None and steps > self._last_step:
                return self._stop_reason
            self._begun = steps
            return None

    def _hold_all(self, reason: str) -> None:
        """The chief's first part of a stop; later requests change nothing."""
        with self._hold:
            if self._stop_reason is not None:
                return
            self._stop_reason = reason
            begun = self._begun
            for line in self._lines.values():
                line.send(hold=reason)
        self._answered(self._cluster.index, begun)

    def _answered(self, index: int, begun: int) -> None:
        """The chief's second part: once all have answered, everybody hears the last step."""
        if not self._cluster.is_chief:
            return
        with self._hold:
            self._answers[index] = begun
            if self._stop_reason is None or self._last_step is not None:
                return
            if len(self._answers) < len(self._cluster.names):
                return
            self._last_step = max(self._answers.values())
            for line in self._lines.values():
                line.send(last_step=self._last_step)
            self._hold.notify_all()

    def reason(self, wait: float) -> TrainerError | None:
        """Why a collective failed: what is known of the other workers after up to `wait` seconds."""
        self._decided.wait(wait)
        return self._verdict

    def finish(self) -> None:
        """Tells the others that this worker has done its part, and waits until all have.

        It may be long until the chief has exported its network; one that hangs is found by its
        silence, and `reason` says so. Who leaves earlier pulls TensorFlow's connections away from the others; the chief, to whom
        all are connected, leaves last.
        """
        for line in self._lines.values():
            line.send(done=self._begun)
        everyone, deadline = set(self._lines), math.inf
        while time.monotonic() < deadline and self._verdict is None:
            if everyone <= (self._closed if self._cluster.is_chief else self._finished):
                break
            if everyone <= self._finished and deadline == math.inf:
                # Nothing is left to do but to leave; who hangs in that isn't waited for.
                deadline = time.monotonic() + self._silence
            time.sleep(_POLL_SEC)
        self._leaving.set()

    def end(self, error: TrainerError) -> NoReturn:
        """Tells the others why, and ends this process as a command ends on an error.

        At once: TensorFlow's own way out waits for peers that are gone.
        """
        self._leaving.set()
        if self._verdict is None:
            text = f"{self._cluster.peer(self._cluster.index)} has stopped: {error}"
            ending = TrainerError(text)
            ending.exit_code = error.exit_code
            self._tell(ending)
        code: Any = 1
        try:
            flags.fail(error)
        except SystemExit as ended:
            code = ended.code
        finally:
            _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def member(cluster: Cluster | None, config: Config) -> Iterator[Membership | None]:
    """Runs its body as one of the workers; without a cluster it does nothing more.

    All workers end together: when one fails, the others end with its exit code, or with 75 if it
    died without a word. A PreemptedError is what all have agreed on: each ends by itself, once all
    have done their part.

    Args:
      cluster: who they are.
      config: as loaded.

    Yields:
      The ties to the others, None without a cluster.

    Raises:
      PeerError: some have not come in time.
      UsageError: one differs.
      ConfigError: this worker's port is taken.
    """
    if cluster is None:
        yield None
        return
    meet = meeting.gather if cluster.is_chief else meeting.report
    lines = meet(cluster, meeting.identity(config), config.run.join_seconds)
    membership = Membership(cluster, lines, config.run.worker_timeout)
    try:
        yield membership
    except PreemptedError:
        membership.finish()
        raise
    except TrainerError as error:
        membership.end(error)
    except Exception as error:
        # Most likely a sum over workers that a lost one has broken; that will be known at once.
        reason = membership.reason(wait=_GRACE_SEC) or lost_peer(error)
        if reason is None:
            raise
        membership.end(reason)
    membership.finish()
    reason = membership.reason(wait=0)
    if reason is not None:
        membership.end(reason)


def start_timeout(worker_timeout: float) -> float:
    """Seconds in which all of TensorFlow's servers must have started, after `Membership.meet`.

    Args:
      worker_timeout: seconds after which a silent worker counts as gone.
    """
    return max(worker_timeout, _START_SEC)


def heartbeat_timeout(worker_timeout: float) -> float:
    """Seconds for TensorFlow's own heartbeats: so many that `Membership` finds a hang first.

    Args:
      worker_timeout: seconds after which a silent worker counts as gone.
    """
    return _HEARTBEATS * worker_timeout + _HEARTBEATS_SEC


def lost_peer(error: BaseException) -> PeerError | None:
    """The meaning of a TensorFlow error that is about another worker, else None.

    It comes first only if this process found no time to hear of the loss itself.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OpError" not in kinds:
        return None
    if not kinds & _LOST_KINDS and not _LOST_TEXTS.search(str(error)):
        return None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return PeerError(
        f"TensorFlow has lost a worker ({shorten(lines[0])}): see the logs of the others; start "
        "all workers again, they go on from the newest checkpoint"
    )
