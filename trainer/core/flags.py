"""The command line: how a command starts, how it ends, and the environment it sees."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from trainer.core import installation, output
from trainer.core.errors import PreemptedError, TrainerError, UsageError, require_tensorflow
from trainer.core.text import shorten

_LONGEST_MESSAGE = 4000  # characters
_INTERRUPTED = 130  # what a shell reports for a program ended by ctrl-C

# Vertex AI's number of the job that this process is part of.
_JOB = "CLOUD_ML_JOB_ID"
# There a job that ends with a code from 1 to 127 has failed for good. This one, of SIGABRT, is among
# the few that count as a fault of the machine, after which its processes are started again.
_TRY_AGAIN = 128 + signal.SIGABRT

_STOPS = (signal.SIGTERM, signal.SIGHUP)


def env(name: str, default: str | None = None) -> str | None:
    """A variable of the environment; the only place of the core that reads one."""
    return os.environ.get(name, default)


def run(
    main: Callable[[Sequence[str]], int | None], *, usage: str, max_positional: int = 0
) -> None:
    """Runs a command and ends the process with the exit code that its outcome has.

    0 or what `main` returns, 1 for a bug (with its traceback), 130 for ctrl-C, 75 for SIGTERM and
    SIGHUP, 141 if nobody reads its output, and for a TrainerError one line on stderr and the code of
    its class (see `fail`).

    Args:
      main: takes the arguments that are not flags, the program's name first.
      usage: what the command does and how it is called; shown by --help above the flags.
      max_positional: most arguments that are not flags; more are a usage error.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        arguments = argv[1 : list(argv).index("--")] if "--" in argv else argv[1:]
        if any(
            text in {"-h", "-help", "--help", "-helpshort", "--helpshort"} for text in arguments
        ):
            print(_help(main, usage))
            output.check()
            sys.exit(0)
        if "--version" in arguments:
            print(installation.describe())
            output.check()
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            text = " ".join(str(error).split())
            raise UsageError(f"{text}; --help lists the flags") from None

    def guarded(argv: Sequence[str]) -> int | None:
        if not flags.FLAGS.debug:
            logging.set_verbosity(logging.WARNING)  # TensorFlow's own remarks
        if len(argv) > 1 + max_positional:
            extra = argv[1 + max_positional]
            raise UsageError(f"unexpected argument {extra!r}; --help shows how to call this")
        code = main(argv)
        output.check()
        return code

    if "debug" not in flags.FLAGS:
        flags.DEFINE_bool("debug", False, "Show the traceback of an error, too.")
    output.install()
    # absl's handler has taken hold of the stream that was there before.
    logging.get_absl_handler().python_handler.setStream(sys.stderr)
    for number in _STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, _stop)
    try:
        app.run(guarded, flags_parser=parse)
    except TrainerError as error:
        fail(error)
    except KeyboardInterrupt:
        _interrupted()
    except _Stopped as stopped:
        fail(PreemptedError(f"{stopped}: ended before it was done; run the same command again"))
    finally:
        _ignore_stops()


def _debugging() -> bool:
    """Whether the command has parsed its flags, and tracebacks are asked for."""
    return "debug" in flags.FLAGS and flags.FLAGS.is_parsed() and bool(flags.FLAGS.debug)


def _ignore_stops() -> None:
    """The process is ending already."""
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)


def _interrupted() -> NoReturn:
    _ignore_stops()
    output.outlive_readers()
    output.hurry()
    if _debugging() and sys.exc_info()[0]:
        traceback.print_exc()
    print("interrupted; run the same command again to go on", file=sys.stderr)
    sys.exit(_INTERRUPTED)


class _Stopped(BaseException):
    """A signal wants the command to end; not an Exception, which libraries may catch."""


def _stop(number: int, frame: types.FrameType | None) -> NoReturn:
    _ignore_stops()
    output.hurry()
    raise _Stopped(signal.Signals(number).name)


def _help(main: Callable[..., object], usage: str) -> str:
    # absl files the flags of the started module under the program's name.
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    texts = [flags.FLAGS.module_help(name) for name in (module, __name__)]
    return "\n".join([usage.strip(), "", "flags:", *(text.partition(":\n")[2] for text in texts)])


def fail(error: TrainerError) -> NoReturn:
    """Ends the process with the error's one line and exit code.

    In a job on Vertex AI code 75 would end the job for good, while one whose machine is taken away is
    started again: there the process waits for that, as long as the error allows for it. If nothing
    comes, it ends with 134, after which the job is started again, too. 75 is left for what the user
    wanted: the time is up, or ctrl-C.
    """
    _ignore_stops()
    output.outlive_readers()
    if _debugging():
        traceback.print_exception(error)
    print(f"{error.heading}: {shorten(str(error), _LONGEST_MESSAGE)}", file=sys.stderr)
    code, job = error.exit_code, env(_JOB)
    if job and code == PreemptedError.exit_code and error.patience:
        _wait_for_the_end(job, error.patience)
        code = _TRY_AGAIN
    sys.exit(code)


def fail_at_once(error: TrainerError) -> NoReturn:
    """`fail` without waiting for the main thread, which may hang; from any thread."""
    _at_once(lambda: fail(error))


def interrupt() -> NoReturn:
    """Ends the process as ctrl-C does, from any thread, without waiting for the main thread."""
    _at_once(_interrupted)


def _at_once(end: Callable[[], NoReturn]) -> NoReturn:
    code: int | str | None = 1
    try:
        end()
    except SystemExit as ended:
        code = ended.code
    finally:
        output.hurry()
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def _wait_for_the_end(job: str, seconds: float) -> None:
    print(
        f"job {job}: waiting to be ended with the machine, so that Vertex AI starts the job again; "
        f"otherwise this process ends with {_TRY_AGAIN} in {seconds:g} s",
        file=sys.stderr,
    )
    time.sleep(seconds)


def guard_imports() -> None:
    """Lets a command that cannot even be imported end in one line; a command's first call."""
    sys.excepthook = _report_import_errors


def _report_import_errors(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """An excepthook."""
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        try:
            require_tensorflow()
        except TrainerError as missing:
            error = missing
    if isinstance(error, TrainerError):
        fail(error)
    if isinstance(error, KeyboardInterrupt):
        _interrupted()
    output.outlive_readers()
    sys.__excepthook__(kind, error, trace)
