"""Sizes of images that networks make by doubling a small grid. Needs no TensorFlow."""

from __future__ import annotations

from typing import NamedTuple

from trainer.core.errors import ConfigError
from trainer.core.text import image_size


class BaseGrid(NamedTuple):
    """The constant input of the synthesis network, and how often it is doubled."""

    height: int
    width: int
    doublings: int


def _try_base_grid(height: int, width: int) -> BaseGrid | None:
    doublings = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 8:
        height, width, doublings = height // 2, width // 2, doublings + 1
    fits = 4 <= min(height, width) <= 7 and max(height, width) <= 32 and doublings >= 1
    return BaseGrid(height, width, doublings) if fits else None


def nearest_resolutions(height: int, width: int, count: int = 3) -> list[tuple[int, int]]:
    """The closest (height, width) that `base_grid` takes; square ones for a square."""
    found: set[tuple[int, int]] = set()
    for doublings in range(1, 12):
        cell = 2**doublings
        rows = {min(max(height // cell + i, 4), 32) for i in range(-1, 3)}
        columns = {min(max(width // cell + i, 4), 32) for i in range(-1, 3)}
        found.update((row * cell, column * cell) for row in rows for column in columns)
    working = [size for size in found if _try_base_grid(*size)]
    if height == width:
        working = [size for size in working if size[0] == size[1]]
    working.sort(key=lambda s: (abs(s[0] - height) + abs(s[1] - width), s))
    return working[:count]


def base_grid(resolution: tuple[int, int]) -> BaseGrid:
    """(h0, w0, n) with resolution = (h0 * 2^n, w0 * 2^n).

    n is the largest for which both sides are whole and at least 4: (32, 32) is (4, 4) doubled 3
    times, (256, 128) is (8, 4) doubled 5 times, (96, 96) is (6, 6) doubled 4 times.

    Args:
      resolution: (height, width) in pixels.

    Raises:
      ConfigError: the short side of the grid would be above 7, the long one above 32, or nothing
        would be left to double; names the nearest sizes that work.
    """
    height, width = resolution
    grid = _try_base_grid(height, width)
    if grid is None:
        nearest = ", ".join(map(image_size, nearest_resolutions(height, width)))
        raise ConfigError(
            f"resolution {image_size(resolution)} (width x height) is not a grid of 4 to 7 (long side up "
            f"to 32) doubled one or more times; convert to one that is, the nearest are {nearest}"
        )
    return grid
