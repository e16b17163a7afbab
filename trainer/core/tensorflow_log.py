"""Lines that TensorFlow writes to stderr while it is imported.

Its libraries log before they have read TF_CPP_MIN_LOG_LEVEL: which CPU kernels they chose, that no
CUDA was found, that the log is not set up yet. These lines are left out here as that variable would
have it, and all others pass, those of a crash included: a process of its own, which outlives one
that aborts, reads them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import select
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from trainer.core.flags import env

# "I0000 00:00:1795728545.080837   31883 port.cc:153] ..." by absl, and the form before it,
# "2026-11-26 21:30:00.123456: I tensorflow/core/util/port.cc:153] ...".
_ENTRY = re.compile(
    rb"(?:([IWEF])\d{4} \d\d:\d\d:[\d.:]+ +\d+|\d{4}-\d\d-\d\d \d\d:\d\d:[\d.]+: ([IWEF])) "
    rb"[\w./+-]+:\d+\] "
)
# What belongs to no entry, and the entries called errors that healthy builds for GPUs write.
_HARMLESS = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|To enable the following instructions: .* rebuild TensorFlow with the appropriate"
    rb"|.*\] Unable to register cu(DNN|FFT|BLAS) factory: .* already been registered"
)
_LEVELS = b"IWEF"  # by TF_CPP_MIN_LOG_LEVEL, the least that is shown
_END = b"\0end of the import"
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def harmless(line: bytes, level: int = 2) -> bool:
    """Whether a line of stderr is one that TensorFlow's healthy start writes.

    Args:
      line: without or with its end.
      level: TF_CPP_MIN_LOG_LEVEL; errors are never harmless, whatever it is.
    """
    if level < 1:
        return False
    entry = _ENTRY.match(line)
    if entry and _LEVELS.index(entry[1] or entry[2]) < min(level, 2):
        return True
    return _HARMLESS.match(line) is not None


def hide_start_up() -> None:
    """Hides the harmless lines of TensorFlow's import, whenever it comes; commands call it first."""
    if "tensorflow" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TensorFlow as the other finders do, and filters stderr while it is executed."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "tensorflow":
            return None
        found = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def filtered(module: types.ModuleType) -> None:
                with _harmless_lines_left_out(_level()):
                    execute(module)

            spec.loader.exec_module = filtered  # type: ignore[method-assign]
        return spec


def _level() -> int:
    text = env("TF_CPP_MIN_LOG_LEVEL") or "0"
    return int(text) if text.isdigit() else 0


@contextmanager
def _harmless_lines_left_out(level: int) -> Iterator[None]:
    """Sends the file descriptor 2 through another process, which leaves out harmless lines.

    Not through a thread: libraries log while they hold Python's lock, and what a thread has not
    passed on is lost when the process aborts. Where that can't be done, stderr stays as it is.
    """
    try:
        shown = os.dup(2) if level else -1
    except OSError:  # closed
        shown = -1
    if shown < 0:
        yield
        return
    reading, writing = os.pipe()
    sys.stderr.flush()
    # From now to its end, so that ctrl-C doesn't end it before this process has said its last.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        child = os.fork()
        if not child:
            try:
                os.close(writing)
                os.close(2)
                _pass_on(reading, shown, level)
            finally:
                os._exit(0)
    except OSError:
        child = 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(reading)
    if child:
        os.dup2(writing, 2)
    try:
        yield
    finally:
        if child:
            sys.stderr.flush()
            os.dup2(shown, 2)
            with suppress(BrokenPipeError):  # the other process was killed
                os.write(writing, _END + b"\n")
            os.waitpid(child, 0)  # until all lines are out
        os.close(writing)
        os.close(shown)


def _pass_on(reading: int, shown: int, level: int) -> None:
    """Copies lines, the harmless left out, until `_END` or until nobody can write any more."""
    rest = b""
    while chunk := os.read(reading, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            last = line.endswith(_END)
            text = line.removesuffix(_END)
            if not harmless(text, level):
                _write(shown, text if last else text + b"\n")
            if last:
                return
    _write(shown, rest)


def _write(shown: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(shown, data) :]
        except BlockingIOError:
            select.select([], [shown], [])
        except OSError:  # nobody reads it any more
            return
