"""`python -m trainer` and `stylegan-trainer`: lists the commands, or runs one of them.

Each runs as `python -m trainer.MODULE`, too; the module of `train` is `trainer.task`, as Vertex AI
has it.
"""

from __future__ import annotations

import ast
import difflib
import pkgutil
import runpy
import sys
from collections.abc import Mapping

import trainer

try:
    from trainer.core import flags, installation, output
    from trainer.core.errors import UsageError
except ModuleNotFoundError as missing:
    print(
        f"error: {missing.name} is not installed for {sys.executable}; take the Python of the "
        "environment that has the trainer (after `make`: .venv/bin/python), or pip install '.[cpu]'",
        file=sys.stderr,
    )
    sys.exit(2)

_NAMES = {"task": "train"}  # the others are called as their modules


def _commands() -> dict[str, tuple[str, str]]:
    """Each command's module and the first line of its docstring."""
    found = {}
    for _, module, is_package in pkgutil.iter_modules(trainer.__path__):
        if module.startswith("_"):
            continue
        try:
            # Read, not imported: a listing must not wait for TensorFlow, nor need it.
            source = pkgutil.get_data("trainer", f"{module}{'/__main__' * is_package}.py") or b""
        except OSError:
            continue  # a package that is no command
        first_line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        found[_NAMES.get(module, module)] = f"trainer.{module}", first_line
    return found


def _listing(commands: Mapping[str, tuple[str, str]]) -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in sorted(commands.items())]
    return "\n".join(
        [
            "Trains networks of the StyleGAN family.",
            "",
            "python -m trainer COMMAND [FLAGS], with COMMAND one of",
            *lines,
            "",
            "COMMAND --help lists its flags, --version the versions of what is installed.",
        ]
    )


def main() -> None:
    """Hands the rest of the command line to the command that the first word names."""
    flags.guard_imports()
    output.install()
    commands = _commands()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in {"", "help", "-h", "--help"}:
        print(_listing(commands))
        output.check()
        sys.exit(0)
    if name == "--version":
        print(installation.describe())
        output.check()
        sys.exit(0)
    name = _NAMES.get(name, name)  # a module's own name is fine, too
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        known = ", ".join(sorted(commands))
        hint = f"did you mean {close[0]}?" if close else f"commands are {known}"
        flags.fail(UsageError(f"unknown command {name!r}; {hint}"))
    del sys.argv[1]
    runpy.run_module(commands[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
