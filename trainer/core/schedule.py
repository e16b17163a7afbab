"""Numbers of a config that may follow a schedule: `{cosine: [1e-4, 1e-5], kimg: 1000}`.

A plain number stays what it is. A schedule goes from the first value to the second in so many
thousands of images and stays there: linearly, or along half a period of the cosine, which starts
and ends slowly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SHAPES = ("cosine", "linear")


@dataclass(frozen=True)
class Schedule:
    """A number that moves.

    Attributes:
      shape: of the way.
      start, end: where it begins, and where it stays.
      kimg: thousands of images in which it gets there.
    """

    shape: Literal["cosine", "linear"]
    start: float
    end: float
    kimg: float

    def at(self, kimg: float) -> float:
        """The number after so many thousands of images."""
        way = min(kimg / self.kimg, 1.0)
        if self.shape == "cosine":
            way = 1 - (1 + math.cos(math.pi * way)) / 2
        return self.start + way * (self.end - self.start)


Number = float | Schedule

EXAMPLE = "{cosine: [first, last], kimg: thousands of images}"


def from_document(document: Mapping[Any, Any]) -> Schedule | None:
    """The schedule that a mapping says, None if it says none."""
    shapes = [shape for shape in SHAPES if shape in document]
    if len(shapes) != 1 or set(document) != {shapes[0], "kimg"}:
        return None
    ends, kimg = document[shapes[0]], document["kimg"]
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        return None
    if not all(_is_number(value) for value in (*ends, kimg)) or kimg <= 0:
        return None
    start, end = map(float, ends)
    return Schedule("cosine" if shapes[0] == "cosine" else "linear", start, end, float(kimg))


def to_document(schedule: Schedule) -> dict[str, Any]:
    """The inverse of `from_document`."""
    return {schedule.shape: [schedule.start, schedule.end], "kimg": schedule.kimg}


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
