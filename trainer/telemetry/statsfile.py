"""`stats.jsonl`: one JSON object for each tick, in NVIDIA's form.

A statistic is `{"num": ..., "mean": ..., "std": ...}`; beside them stand `timestamp` (Unix
seconds), `tick` and `nimg`. NVIDIA writes NaN, which is not JSON: here a non-finite number is
`null`, so that every line can be read by any JSON parser (the console shows it as nan or inf).
"""

from __future__ import annotations

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


def append(path: str, stats: Mapping[str, Stat], *, tick: int, nimg: int) -> None:
    """Adds one line.

    Args:
      path: the file, made when it does not exist.
      stats: by NVIDIA's names, as `Loss/G/loss`.
      tick: number of the tick.
      nimg: images shown to the discriminator since the start of the run.

    Raises:
      StorageError: the file cannot be written.
    """
    line: dict[str, Any] = {name: _to_json(stat) for name, stat in stats.items()}
    line.update(timestamp=time.time(), tick=tick, nimg=nimg)
    storage.append(path, json.dumps(line, allow_nan=False).encode() + b"\n")


def _to_json(stat: Stat) -> dict[str, float | None]:
    mean, std = (float(x) if math.isfinite(x) else None for x in (stat.mean, stat.std))
    return {"num": int(stat.num), "mean": mean, "std": std}


def truncate_after(path: str, nimg: int) -> int:
    """Drops the lines of ticks after a position, so that a resumed run writes none twice.

    A line torn by a crash goes too. A run that starts over (`nimg` 0) keeps nothing.

    Args:
      path: the file; it need not exist.
      nimg: where the run goes on, in images.

    Returns:
      How many lines were dropped.

    Raises:
      StorageError: the file cannot be read or written.
    """
    found = storage.read_version(path)
    if found is None:
        return 0
    before = found[0]  # as bytes: a crash can tear a line anywhere, or leave zeros
    lines = before.split(b"\n")
    kept = [line for line in lines if 0 < _position(line) <= nimg]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        storage.write_bytes_atomic(path, after)
    return sum(1 for line in lines if line) - len(kept)


def _position(line: bytes) -> float:
    """`nimg` of a line; infinite when it is no line of ours."""
    try:
        return float(documents.parse_object(line)["nimg"])
    except (ValueError, KeyError, TypeError):
        return math.inf
