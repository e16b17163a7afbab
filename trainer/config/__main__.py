"""Explains the keys of a config, with their types, defaults and limits: KEY.

  python -m trainer config                    lists all keys, section by section
  python -m trainer config training           lists those of a section
  python -m trainer config training.g_lr      says all about a key; its section may be left out

Keys are overridden with --set section.key=value. A resumed run keeps the keys that define its
numbers, unless --allow_change names them; it may change where and how they are computed, stored and
shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.core import flags

if __name__ == "__main__":
    flags.guard_imports()

from trainer.config import explain


def main(argv: Sequence[str]) -> None:
    """Explains what the command line names."""
    print(explain.explain(*argv[1:]))


if __name__ == "__main__":
    flags.run(main, usage=__doc__ or "", max_positional=1)
