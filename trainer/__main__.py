"""`python -m trainer` and `stylegan-trainer`: lists the commands, or runs one of them."""

from __future__ import annotations

import difflib
import runpy
import sys

from trainer.core import flags, output
from trainer.core.errors import UsageError

_MODULES = {"train": "trainer.task"}  # the others are named as their modules
_COMMANDS = {
    "train": "train a network: --config, --data, --workdir",
    "convert": "turn images into a data set: --source, --dest, --resolution",
    "generate": "draw images with a trained network: --run, --seeds, --out",
    "export": "make a SavedModel of a trained network: --run, --dest",
    "probe": "measure what a config costs: step|data, --config",
}


def _listing() -> str:
    lines = [f"  {name:<10}{text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        [
            "Trains networks of the StyleGAN family.",
            "",
            "stylegan-trainer COMMAND [FLAGS], with COMMAND one of",
            *lines,
            "",
            "COMMAND --help lists its flags.",
        ]
    )


def main() -> None:
    """Hands the rest of the command line to the command that the first word names."""
    output.install()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in {"", "help", "-h", "--help"}:
        print(_listing())
        output.check()
        sys.exit(0)
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(_COMMANDS)}"
        flags.fail(UsageError(f"unknown command {name!r}; {hint}"))
    del sys.argv[1]
    # Started only now: a listing must not wait for TensorFlow, nor need it.
    runpy.run_module(_MODULES.get(name, f"trainer.{name}"), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
