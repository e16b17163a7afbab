"""The contents of a checkpoint's `state.json`, checked before anything relies on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer.core import documents
from trainer.core.documents import DocumentError
from trainer.core.errors import CheckpointError
from trainer.core.text import quoted

_NETWORK = ("config", "kimg", "resolution", "channels", "label_counts", "label_names")
_POSITION = ("config", "kimg", "tick", "tick_start", "total_sec", "data_fingerprint")
_COUNTS = ("step", "images", "tick", "tick_start")
_NUMBERS = ("kimg", "total_sec")
_TEXTS = ("config_fingerprint", "data_fingerprint")


def check_network(info: Mapping[str, Any], path: str) -> None:
    """Raises a CheckpointError if what makes the networks of a checkpoint is missing."""
    _check_there(info, path, _NETWORK)


def check_position(info: Mapping[str, Any], path: str) -> None:
    """Raises a CheckpointError if where a run goes on is missing in its checkpoint."""
    _check_there(info, path, _POSITION)


def _check_there(info: Mapping[str, Any], path: str, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in info]
    if missing:
        raise CheckpointError(
            f"state.json of checkpoint {path} has no {', '.join(missing)}; take another "
            "checkpoint, or restore this one from a copy"
        )


def parse(data: bytes) -> dict[str, Any]:
    """The content of a `state.json`.

    Raises:
      DocumentError: it is no JSON object, or a value isn't what it must be.
    """
    info = documents.parse_object(data)
    for key in ("config", "versions"):
        if not isinstance(info.get(key, {}), dict):
            raise _wrong(info, key, "an object")
    for key in _COUNTS:
        if key in info and not _is_count(info[key]):
            raise _wrong(info, key, "a whole number from 0 on")
    for key in _NUMBERS:
        if key in info and not (type(info[key]) in (int, float) and info[key] >= 0):
            raise _wrong(info, key, "a number from 0 on")
    for key in _TEXTS:
        if not isinstance(info.get(key, ""), str):
            raise _wrong(info, key, "text")
    sides = info.get("resolution", [1, 1])
    if not (_is_list(sides, _is_count) and len(sides) == 2 and all(0 < s <= 16384 for s in sides)):
        raise _wrong(info, "resolution", "a height and a width")
    if info.get("channels", 1) not in (1, 2, 3, 4) or not _is_count(info.get("channels", 1)):
        raise _wrong(info, "channels", "1 to 4")
    if not _is_list(info.get("label_counts", []), _is_count):
        raise _wrong(info, "label_counts", "a list of counts")
    if not _is_list(info.get("label_names", []), lambda name: isinstance(name, str)):
        raise _wrong(info, "label_names", "a list of names")
    names, counts = info.get("label_names", []), info.get("label_counts", [])
    if names and len(names) != len(counts):
        raise DocumentError(f"it has {len(names)} label_names and {len(counts)} label_counts")
    return info


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_list(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _wrong(info: dict[str, Any], key: str, expected: str) -> DocumentError:
    return DocumentError(f"its {key} is {quoted(info[key], 40)}, which is not {expected}")
