"""`stats.jsonl`: one JSON object for each tick, in NVIDIA's form.

A statistic is `{"num": ..., "mean": ..., "std": ...}`; beside them stand `timestamp` (Unix
seconds), `tick` and `nimg`. NVIDIA writes NaN, which is not JSON: here a non-finite number is
`null`, so that every line can be read by any JSON parser (the console shows it as nan or inf).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.core import documents, storage


class Stat(NamedTuple):
    """A statistic over one tick: how many values, their mean and standard deviation."""

    num: int
    mean: float
    std: float


def constant(value: float) -> Stat:
    """A quantity that was measured once in the tick."""
    return Stat(1, float(value), 0.0)


def line(stats: Mapping[str, Stat], *, tick: int, nimg: int) -> bytes:
    """One line.

    Args:
      stats: by NVIDIA's names, as `Loss/G/loss`.
      tick: number of the tick.
      nimg: images shown to the discriminator since the start of the run.
    """
    document: dict[str, Any] = {name: _to_json(stat) for name, stat in stats.items()}
    document.update(timestamp=time.time(), tick=tick, nimg=nimg)
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def _to_json(stat: Stat) -> dict[str, float | None]:
    mean, std = (float(x) if math.isfinite(x) else None for x in (stat.mean, stat.std))
    return {"num": int(stat.num), "mean": mean, "std": std}


def open_after(
    path: str, nimg: int, fence: storage.Fence = contextlib.nullcontext
) -> storage.AppendedFile:
    """Drops the lines of ticks after a position, so that a resumed run writes none twice.

    A line torn by a crash goes too. Lines that no run has written stay.

    Args:
      path: the file; it need not exist.
      nimg: where the run goes on, in images.
      fence: around every change.

    Returns:
      The file, for the lines that follow.

    Raises:
      StorageError: the file cannot be read or written.
    """
    found = storage.read_version(path)
    before, version = found or (b"", None)  # as bytes: a crash can tear a line anywhere
    *lines, last = before.split(b"\n")
    kept = [line for line in lines if not _is_later(line, nimg)]
    if last and not _is_torn(last) and not _is_later(last, nimg):
        kept.append(last)
    return storage.AppendedFile(path, b"".join(line + b"\n" for line in kept), version, fence)


def _is_later(line: bytes, nimg: int) -> bool:
    """Whether a line is that of a tick after a position."""
    try:
        document = documents.parse_object(line)
        return "tick" in document and float(document["nimg"]) > nimg
    except (ValueError, KeyError, TypeError):
        return False


def _is_torn(line: bytes) -> bool:
    """Whether a line without its end is the beginning of one of ours, or what a crash puts there."""
    try:
        documents.parse_json(line)
    except documents.DocumentError:
        return line.startswith(b"{") or not line.strip(b"\0")
    return False
