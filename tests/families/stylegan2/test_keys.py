"""Sizes that StyleGAN2's networks can make."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from trainer.core.errors import ConfigError
from trainer.families.sizes import base_grid, nearest_resolutions


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        ((32, 32), (4, 4, 3)),
        ((64, 64), (4, 4, 4)),
        ((1024, 1024), (4, 4, 8)),
        ((256, 128), (8, 4, 5)),
        ((128, 256), (4, 8, 5)),
        ((96, 96), (6, 6, 4)),
        ((8, 8), (4, 4, 1)),
        ((14, 10), (7, 5, 1)),
        ((512, 64), (32, 4, 4)),
    ],
)
def test_base_grid(resolution: tuple[int, int], expected: tuple[int, int, int]) -> None:
    assert base_grid(resolution) == expected


@pytest.mark.parametrize(
    ("resolution", "nearest"),
    [
        ((100, 100), "96x96, 112x112"),
        ((4, 4), "8x8"),
        ((1, 1), "8x8"),
        ((257, 129), r"129x257 \(width x height\).*128x256"),
        ((200, 300), "nearest are 288x192"),
        ((1080, 1920), "1792x1024"),
        ((1024, 64), "128x1024"),
        ((30, 30), "28x28|32x32"),
    ],
)
def test_impossible_resolution_names_possible_ones(
    resolution: tuple[int, int], nearest: str
) -> None:
    with pytest.raises(ConfigError, match=nearest):
        base_grid(resolution)


@hypothesis.given(st.integers(1, 2100), st.integers(1, 2100))
@hypothesis.settings(deadline=None)
def test_base_grid_or_neighbours_that_work(height: int, width: int) -> None:
    try:
        h0, w0, n = base_grid((height, width))
    except ConfigError:
        nearest = nearest_resolutions(height, width)
        assert nearest
        assert all(base_grid(size) for size in nearest)
        return
    assert (h0 * 2**n, w0 * 2**n) == (height, width)
    assert 4 <= min(h0, w0) <= 7
    assert max(h0, w0) <= 32
    assert n >= 1
