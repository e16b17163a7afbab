"""The command line: how a command starts, how it ends, and the environment it sees."""

from __future__ import annotations

import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from trainer.core.errors import TrainerError, UsageError, require_tensorflow
from trainer.core.text import shorten

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error, too.")

_LONGEST_MESSAGE = 4000  # characters
_INTERRUPTED = 130  # what a shell reports for a program ended by ctrl-C


def env(name: str, default: str | None = None) -> str | None:
    """A variable of the environment; the only place of the core that reads one."""
    return os.environ.get(name, default)


def run(
    main: Callable[[Sequence[str]], int | None], *, usage: str, max_positional: int = 0
) -> None:
    """Runs a command and ends the process with the exit code that its outcome has.

    0 or what `main` returns, 1 for a bug (with its traceback), 130 for ctrl-C, and for a
    TrainerError one line on stderr and the code of its class.

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
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            fail(UsageError(f"{' '.join(str(error).split())}; --help lists the flags"))

    def guarded(argv: Sequence[str]) -> int | None:
        if not _DEBUG.value:
            logging.set_verbosity(logging.WARNING)  # TensorFlow's own remarks
        try:
            if len(argv) > 1 + max_positional:
                extra = argv[1 + max_positional]
                raise UsageError(f"unexpected argument {extra!r}; --help shows how to call this")
            return main(argv)
        except TrainerError as error:
            fail(error)
        except KeyboardInterrupt:
            if _DEBUG.value:
                traceback.print_exc()
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(_INTERRUPTED)

    app.run(guarded, flags_parser=parse)


def _help(main: Callable[..., object], usage: str) -> str:
    # absl files the flags of the started module under the program's name.
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    texts = [flags.FLAGS.module_help(name) for name in (module, __name__)]
    return "\n".join([usage.strip(), "", "flags:", *(text.partition(":\n")[2] for text in texts)])


def fail(error: TrainerError) -> NoReturn:
    """Ends the process with the error's one line and exit code."""
    if flags.FLAGS.is_parsed() and _DEBUG.value:
        traceback.print_exception(error)
    print(f"error: {shorten(str(error), _LONGEST_MESSAGE)}", file=sys.stderr)
    sys.exit(error.exit_code)


def _report_import_errors(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """An excepthook: a command that cannot even be imported ends in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        try:
            require_tensorflow()
        except TrainerError as missing:
            error = missing
    if isinstance(error, TrainerError):
        fail(error)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _report_import_errors
