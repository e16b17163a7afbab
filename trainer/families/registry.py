"""The families of networks there are. Nothing else in the package names one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import cast

from trainer.core.errors import ConfigError
from trainer.core.text import quoted
from trainer.families.protocol import Keys

NAMES = ("stylegan2", "r3gan")
DEFAULT = "stylegan2"


def keys(family: object) -> type[Keys]:
    """The `model:` section of a family.

    Raises:
      ConfigError: there is no such family.
    """
    if family not in NAMES:
        close = difflib.get_close_matches(str(family)[:100], NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"families are {', '.join(NAMES)}"
        raise ConfigError(f"model.family = {quoted(family)}: unknown family; {hint}")
    return cast(type[Keys], importlib.import_module(f"trainer.families.{family}.keys").Keys)


def default_keys() -> Keys:
    """The keys of a config that chooses no family."""
    keys_of_default: Callable[[], Keys] = keys(DEFAULT)
    return keys_of_default()


def networks(family: str) -> ModuleType:
    """The module of a family's networks, which needs TensorFlow; see `families.network`."""
    return importlib.import_module(f"trainer.families.{family}.networks")


def nearest_resolutions(height: int, width: int, count: int = 3) -> list[tuple[int, int]]:
    """The closest (height, width) that some family can make; the size itself if one can."""
    found = {size for name in NAMES for size in keys(name).nearest_resolutions(height, width)}
    nearest = sorted(found, key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
    return nearest[:count]
