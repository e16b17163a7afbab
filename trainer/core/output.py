"""Standard output and standard error, which may go away while a program runs.

`| head` has seen enough, ctrl-C at a terminal ends `tee` as well, a terminal hangs up, a pager reads
no further, the disk under a log is full. None of this may cost more than lines: `install` puts streams
into `sys` that hand what is printed to a thread of their own, which alone writes it. So printing

- never raises an OSError,
- waits for a slow reader in the main thread only, as any program does, and even there no longer once
  `hurry` was called; other threads wait for a second at most,
- ends a command whose output nobody reads any more, quietly and with the code that a shell reports
  for such an end, unless `outlive_readers` was called, as training does: it saves first.

Lines that a full disk doesn't take are lost. Where writing works again, a line says how many; a
command that isn't training ends with an error then, when all else is done.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import errno
import io
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.core.errors import StorageError
from trainer.core.text import printable

_NAMES = {1: "standard output", 2: "standard error"}
_ENDED = 128 + signal.SIGPIPE
_PATIENCE_SEC = 1.0  # without any progress, where a print doesn't wait for its reader
_MOST_BYTES = 1 << 20  # held for a reader that doesn't read

# What writing fails with when there is no reader any more, for pipes, sockets and closed descriptors.
_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.EBADF}


class _Mode:
    """The modes of both streams."""

    outlives = False  # go on without a reader
    hurried = False  # don't wait for one
    # The interpreter ends, and its threads with it, where they are: one may have a lock for good.
    over = False


_mode = _Mode()


class _Stream(io.RawIOBase):
    """A text stream's target: a queue, emptied by a thread that alone writes to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.name, self.mode = _NAMES[descriptor], "w"
        self.changed = threading.Condition()  # guards all that follows
        self.has_reader = True
        self.failure = ""  # of writing, though there is a reader; the first one
        self._descriptor = descriptor
        self._pieces: collections.deque[bytes] = collections.deque()
        self._bytes = self._taken = self._finished = 0  # bytes held; pieces
        self._moved = 0.0  # when a piece was last begun or finished
        self._unheard = False  # something was printed for nobody
        self._lost, self._why = 0, ""  # lines since writing last worked

    def start(self) -> None:
        """Starts the thread; in a forked process, which has none, with nothing to write."""
        self.changed = threading.Condition()
        self._pieces.clear()
        self._bytes, self._finished = 0, self._taken
        threading.Thread(target=self._run, name=f"writer of {self.name}", daemon=True).start()

    # ------------------------------------------------------------------ those who print

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Takes hold of it; waits only where too much is held already."""
        data = bytes(data)
        if _mode.over:
            self._write_at_exit(data)
            return len(data)
        with self.changed:
            if not self.has_reader:
                self._unheard = True
            else:
                if not self._bytes:
                    self._moved = time.monotonic()
                self._wait(lambda: self._bytes < _MOST_BYTES)
                if self._bytes < _MOST_BYTES:
                    self._pieces.append(data)
                    self._bytes, self._taken = self._bytes + len(data), self._taken + 1
                    self.changed.notify_all()
                else:
                    self._lose(data, "nobody read them")
        return len(data)

    def flush(self) -> None:
        """Waits until what was taken is written, as far as the caller may wait.

        Raises:
          SystemExit: nobody reads it, and that ends the command.
        """
        if _mode.over:
            return
        with self.changed:
            last = self._taken
            self._wait(lambda: self._finished >= last)
            main = threading.current_thread() is threading.main_thread()
            if self._unheard and main and not _mode.outlives:
                _mode.outlives = True
                raise SystemExit(_ENDED)

    def hurry(self) -> None:
        """Wakes who waits."""
        with self.changed:
            self._moved = time.monotonic()
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        main = threading.current_thread() is threading.main_thread()
        while not ready():
            left = self._moved + _PATIENCE_SEC - time.monotonic()
            if main and not _mode.hurried:
                self.changed.wait()
            elif left > 0:
                self.changed.wait(left)
            else:
                return

    def _write_at_exit(self, data: bytes) -> None:
        # Where a piece is held still, another would block for ever.
        if self.has_reader and not self._bytes:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, data)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._pieces)
                data = self._pieces.popleft()
                note = f"note: {self._lost} lines are lost here ({self._why})\n"
                begin = note.encode() if self._lost else b""
            error = _write(self._descriptor, begin + data)
            failed_first = False
            with self.changed:
                self._bytes -= len(data)
                self._finished, self._moved = self._finished + 1, time.monotonic()
                if error is None:
                    self._lost = 0
                elif _is_gone(self._descriptor, error):
                    self.has_reader, self._unheard = False, True
                else:
                    failed_first = not self.failure
                    self.failure = self.failure or error.strerror or str(error)
                    self._lose(data, error.strerror or str(error))
                self.changed.notify_all()
            if failed_first and self._descriptor == 1 and _mode.outlives:
                print(f"note: {self.name} can't be written ({self.failure})", file=sys.stderr)

    def _lose(self, data: bytes, reason: str) -> None:
        self._lost, self._why = self._lost + data.count(b"\n"), reason


def log(line: str) -> None:
    """A line on stderr for whoever watches: what is worth knowing and stops nothing."""
    print(printable(line), file=sys.stderr, flush=True)


def _write(descriptor: int, data: bytes) -> OSError | None:
    """Writes all of it, however long that takes; the error if it can't be."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # whoever started this program shares a descriptor that never waits
            select.select([], [descriptor], [])
        except OSError as error:
            return error
    return None


def _is_gone(descriptor: int, error: OSError) -> bool:
    """Whether a write failed because the reader has gone."""
    if error.errno != errno.EIO:
        return error.errno in _GONE
    return stat.S_ISCHR(os.fstat(descriptor).st_mode)  # a terminal that hung up, not a bad disk


_streams: list[_Stream] = []  # those installed


def reopen_closed() -> None:
    """Opens the standard descriptors that the program was started without (`>&-`), on nothing.

    Otherwise the next files opened would get their numbers, and what is printed would be in them.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def install() -> None:
    """Makes `sys.stdout` and `sys.stderr` such streams; those that somebody has replaced stay."""
    reopen_closed()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue
        if old is not None:
            with contextlib.suppress(OSError):
                old.flush()
        stream = _Stream(descriptor)
        text = io.TextIOWrapper(
            stream,
            encoding=old.encoding if old is not None else "utf-8",
            errors="backslashreplace",  # nor may a name from outside raise
            line_buffering=True,
        )
        setattr(sys, name, text)
        stream.start()
        os.register_at_fork(after_in_child=stream.start)
        if not _streams:
            atexit.register(_end)
        _streams.append(stream)


def _end() -> None:
    if not _mode.over:
        outlive_readers()
        hurry()
        for stream in _streams:
            stream.flush()
        _mode.over = True


def outlive_readers() -> None:
    """Lets the program go on when its output has lost its reader; see `closed`."""
    _mode.outlives = True


def closed() -> str:
    """The stream that was found to have no reader any more; '' if there is none such."""
    return next((stream.name for stream in _streams if not stream.has_reader), "")


def hurry() -> None:
    """Limits each later print to a second of waiting for a reader; from any thread."""
    _mode.hurried = True
    for stream in _streams:
        stream.hurry()


def check() -> None:
    """Called at the end of a command: whether all that it printed has arrived.

    Raises:
      StorageError: it could not be written, as on a full disk.
      SystemExit: nobody reads it any more.
    """
    sys.stdout.flush()
    failed = next((each for each in _streams if each.failure and each.fileno() == 1), None)
    if failed is not None and not _mode.outlives:
        raise StorageError(
            f"{failed.name} could not be written ({failed.failure}); what else the command does is "
            "done"
        )
