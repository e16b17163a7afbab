"""Stopping in time: on a signal, when Google Cloud takes the machine, or when the time is up.

Whatever the cause, the run stops between two steps, saves, and ends with exit code 75; all workers
stop after the same step (`membership.Membership`). Asking costs a step nothing: threads wait for the
causes, the loop looks at a variable.

- SIGTERM, SIGHUP unless nohup has it ignored, and ctrl-C once; ctrl-C again ends the process at
  once.
- Output that nobody reads any more: `tee` is gone, or the terminal.
- The metadata server of a Google Cloud machine: `instance/preempted`, and `maintenance-event` if it
  says that the machine will be terminated. It is asked to answer when the value changes, so that an
  hour costs two dozen requests. Where there is none, nothing more is asked.
- `run.max_hours`, counted from the start of this process.

After SIGTERM or a preemption the machine may be gone in 30 seconds. If nothing has been saved by
`run.grace_time`, be it that a step, a disk or another worker hangs, the process ends as it is: what
was committed before is whole. After a hangup or the loss of its reader the machine stays, and a save
may take its time. Needs no TensorFlow.
"""

from __future__ import annotations

import http.client
import select
import signal
import socket
import sys
import threading
import time
import types

from trainer.config import RunConfig
from trainer.core import flags, output
from trainer.core.errors import PreemptedError
from trainer.distribution.membership import Membership

# google-auth's names, so that what points it elsewhere or switches it off does so here, too.
_HOST, _NO_HOST = "GCE_METADATA_HOST", "NO_GCE_CHECK"
_DEFAULT_HOST = "metadata.google.internal"
_PATH = "/computeMetadata/v1/instance/"
_FLAVOR = {"Metadata-Flavor": "Google"}

# What the values are when the machine goes away, and why then. Other maintenance moves the machine
# while it runs.
_EVENTS = {
    "preempted": ("TRUE", "Google Cloud is preempting this machine"),
    "maintenance-event": (
        "TERMINATE_ON_HOST_MAINTENANCE",
        "Google Cloud will end this machine for maintenance",
    ),
}
_ATTEMPTS, _ATTEMPT_SEC = 3, 2.0  # to find the server at all
_POLL_SEC = 300
_LATE_SEC = 30.0  # after which an answer that should have come doesn't
_RETRY_SEC = 10.0

# Why the user wants the run to stop; so the texts begin, on whichever worker it was.
_INTERRUPT, _TIME = "interrupted", "run.max_hours"
# Maintenance is announced up to an hour ahead.
_MAINTENANCE_SEC = 3900.0

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# Bytes to the watching thread; the others are numbers of signals.
_CLOSE, _WAKE = b"\0", b"\xff"


class Preemption:
    """Why a run has to stop, once it has to; a context manager that watches while it is open.

    Args:
      run: the config's section: `max_hours` and `grace_time`.
      members: the ties to the other workers, if there are any.
    """

    def __init__(self, run: RunConfig, members: Membership | None = None) -> None:
        self._members, self._grace, self._hours = members, run.grace_time, run.max_hours
        self._limit = None if run.max_hours is None else time.monotonic() + 3600 * run.max_hours
        self._reason: str | None = None
        self._deadline: float | None = None
        self._interrupts = 0
        self._closed = threading.Event()
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._handlers: dict[int, object] = {}
        self._wakeup = -1

    def begin(self, steps: int) -> str | None:
        """Called before each call of the training step; see `Membership.begin`.

        This is also where a lost reader is noticed, since printing doesn't raise.

        Args:
          steps: how many will have been begun with this call, from the start of the run.

        Returns:
          None if it may be made, else why the run stops before it.
        """
        if self._reason is None and (stream := output.closed()):
            self._notice(f"nobody reads {stream} any more", hurry=False)
        return self._members.begin(steps) if self._members is not None else self._reason

    def meet(self) -> None:
        """Waits until all workers have come here; see `Membership.meet`."""
        if self._members is not None:
            self._members.meet()

    def listen(self) -> None:
        """Takes hold of the signals, again: to be called when TensorFlow has started.

        With several workers its runtime installs a handler of its own for SIGTERM.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            before = signal.signal(number, signal.SIG_IGN if ignored else _leave_to_the_thread)
            self._handlers.setdefault(number, before)
            signal.siginterrupt(number, False)

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            # A handler runs when the main thread gets to it, which may hang in a step; the bytes
            # that signals write are read at once.
            self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self.listen()
        threading.Thread(target=self._watch, daemon=True).start()
        if (flags.env(_NO_HOST) or "").lower() != "true":
            host = flags.env(_HOST) or _DEFAULT_HOST
            for name in _EVENTS:
                watcher = threading.Thread(
                    target=self._follow, args=(host, name), name=f"metadata {name}", daemon=True
                )
                watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._sender.send(_CLOSE)

    def _notice(self, reason: str, *, hurry: bool) -> None:
        """The machine or the user wants the run to stop; the first reason is the one told."""
        output.hurry()  # a print that waits for its reader holds up neither the loop nor the save
        if hurry and self._deadline is None:
            self._deadline = time.monotonic() + self._grace
            self._sender.send(_WAKE)
        if self._reason is None:
            self._reason = reason
            if self._members is not None:
                self._members.ask_to_stop(reason)

    # ------------------------------------------------------------------ signals and times

    def _watch(self) -> None:
        while True:
            times = [t for t in (self._limit, self._deadline) if t is not None]
            wait = max(0.0, min(times) - time.monotonic()) if times else None
            if select.select([self._receiver], [], [], wait)[0]:
                received = self._receiver.recv(1024)
                if _CLOSE in received:
                    return
                for number in received.replace(_WAKE, b""):
                    self._signalled(number)
            if self._limit is not None and time.monotonic() >= self._limit:
                self._limit = None
                self._notice(f"{_TIME} = {self._hours:g} is over", hurry=False)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                reason = self._reason or ""
                flags.fail_at_once(
                    PreemptedError(
                        f"{reason}: nothing saved within run.grace_time = {self._grace:g} s; run the "
                        "same command again: it goes on from the newest checkpoint",
                        patience(reason),
                    )
                )

    def _signalled(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._notice("SIGTERM", hurry=True)
        elif number == signal.SIGHUP:
            self._notice("SIGHUP", hurry=False)
        elif number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                flags.interrupt()
            self._notice(_INTERRUPT, hurry=False)
            print("stopping after this step, to save; ctrl-C again ends at once", file=sys.stderr)

    # ------------------------------------------------------------------ metadata server

    def _follow(self, host: str, name: str) -> None:
        """Waits for a value to become the one that ends the machine."""
        bad, reason = _EVENTS[name]
        etag, failures = "", 0
        while not self._closed.is_set():
            try:
                value, etag = _ask(host, name, etag)
                failures = 0
            except _NotThereError:
                return
            except (OSError, http.client.HTTPException):
                failures += 1
                if not etag and failures >= _ATTEMPTS:
                    return
                self._closed.wait(_RETRY_SEC if etag else _ATTEMPT_SEC)
                continue
            if value == bad and not self._closed.is_set():
                self._notice(reason, hurry=name == "preempted")
                return


def patience(reason: str) -> float:
    """Seconds within which the machine is taken away from a run that stops for this reason.

    0 if it isn't taken away: the user has stopped the run. See `TrainerError.patience`.
    """
    if reason.startswith((_INTERRUPT, _TIME)):
        return 0.0
    maintenance = reason.startswith(_EVENTS["maintenance-event"][1])
    return _MAINTENANCE_SEC if maintenance else PreemptedError.patience


class _NotThereError(Exception):
    """No metadata server, or none that has the value."""


def _ask(host: str, name: str, etag: str) -> tuple[str, str]:
    """A value and its tag: at once without a tag, else when it isn't that of the tag any more.

    Raises:
      OSError, http.client.HTTPException: no answer, or that of a server that is busy.
      _NotThereError: not a metadata server, or none that knows the value.
    """
    query = f"?wait_for_change=true&timeout_sec={_POLL_SEC}&last_etag={etag}" if etag else ""
    timeout = _POLL_SEC + _LATE_SEC if etag else _ATTEMPT_SEC
    connection = http.client.HTTPConnection(host, timeout=timeout)  # proxies don't lead to it
    try:
        connection.request("GET", f"{_PATH}{name}{query}", headers=_FLAVOR)
        reply = connection.getresponse()
        value = reply.read(1000).decode("utf-8", "replace").strip()
    finally:
        connection.close()
    if reply.status >= 500 or reply.status == 429:
        raise ConnectionError(f"the metadata server answers {reply.status}")
    new = reply.getheader("ETag")
    if reply.status != 200 or not new or reply.getheader("Metadata-Flavor") != "Google":
        raise _NotThereError
    return value, new


def _leave_to_the_thread(number: int, frame: types.FrameType | None) -> None:
    """A handler must be there for a signal to be written down at all."""
