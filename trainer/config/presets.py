"""The presets that ship with the package: configs that are known by name."""

from __future__ import annotations

import difflib

from trainer.core import documents, storage
from trainer.core.errors import ConfigError
from trainer.core.text import shorten

_SUFFIX = ".yaml"


def directory() -> str:
    """The directory of the presets: in an installed package, or beside that of a checkout."""
    installed = storage.resolve("package:presets")
    return installed if storage.isdir(installed) else storage.sibling(installed, "../configs")


def names() -> list[str]:
    """The names of all presets, sorted."""
    found = storage.listdir(directory())
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def find(text: str, file: str) -> str:
    """The file of the preset that a text names, or `file` if it names none but is a path.

    A name has neither a slash nor a suffix.

    Args:
      text: as a user wrote it.
      file: what it means as a path.

    Raises:
      ConfigError: there is no such preset; names the nearest.
    """
    if "/" in text or "." in text:
        return file
    if text not in names():
        is_file = storage.isfile(file)
        hint = f"for the file of this name give ./{text}" if is_file else nearest(text)
        raise ConfigError(f"unknown preset {shorten(text)!r}; {hint}")
    return _path(text)


def _path(name: str) -> str:
    return storage.join(directory(), f"{name}{_SUFFIX}")


def nearest(text: str) -> str:
    """'did you mean the preset auto?' for the name or path of a config that does not exist."""
    stem = text.rpartition("/")[2].removesuffix(_SUFFIX)
    close = difflib.get_close_matches(stem[:100], names(), n=1, cutoff=0.5)
    return f"did you mean the preset {close[0]}?" if close else "--config=list lists the presets"


def listing() -> str:
    """A line for each preset: its name and its description."""
    width = max(map(len, names())) + 2
    return "\n".join(f"{name:<{width}}{_description(name)}" for name in names())


def _description(name: str) -> str:
    return shorten(documents.read_yaml(_path(name))["description"])
