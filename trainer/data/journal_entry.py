"""The entries of a conversion's journal, one for each shard that is complete.

A damaged entry is none: its shard is made again.
"""

from __future__ import annotations

import itertools
from typing import Any

from trainer.core import documents

_LONGEST = 1 << 30  # bytes: a shard of 50 million images has half of it
_FLAGS = ("kept", "enlarged", "stretched")


def read_entry(path: str, name: str, size: int, num_classes: int) -> dict[str, Any] | None:
    """The entry of a shard, None if it is damaged or of another file.

    Args:
      path: of the entry.
      name: of the shard.
      size: bytes that the shard has.
      num_classes: of the data set, 0 without labels.

    Raises:
      StorageError: the entry cannot be read.
    """
    try:
        entry = documents.read_object(path, _LONGEST)
    except documents.DocumentError:
        return None
    offsets, labels, skipped = (entry.get(key) for key in ("offsets", "labels", "skipped"))
    whole = (
        (entry.get("name"), entry.get("bytes")) == (name, size)
        and _is_count(entry.get("crc32c"), 1 << 32)
        and isinstance(offsets, list)
        and _are_rising(offsets, size)
        and _are_labels(labels, num_classes, len(offsets))
        and isinstance(skipped, list)
        and all(map(_is_skipped, skipped))
        and all(_is_count(entry.get(key), len(offsets) + 1) for key in _FLAGS)
    )
    return entry if whole else None


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _are_rising(offsets: list[Any], size: int) -> bool:
    return (
        bool(offsets)
        and all(_is_count(offset, size) for offset in offsets)
        and offsets[0] == 0
        and all(low < high for low, high in itertools.pairwise(offsets))
    )


def _are_labels(labels: Any, num_classes: int, count: int) -> bool:
    """Whether they are [label, images of it], each label once, of so many images in all."""
    if not isinstance(labels, list) or not all(
        isinstance(each, list)
        and len(each) == 2
        and type(each[0]) is int
        and -1 <= each[0] < num_classes
        and _is_count(each[1], count + 1)
        for each in labels
    ):
        return False
    return len({label for label, _ in labels}) == len(labels) and count == sum(
        images for _, images in labels
    )


def _is_skipped(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"name", "reason"}
        and all(isinstance(text, str) for text in entry.values())
    )
