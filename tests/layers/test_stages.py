"""Layers on maps in tiles: the same values as on whole maps, or an error."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.layers.test_ops import error
from trainer.layers import packing
from trainer.layers.ops import Backend
from trainer.layers.stages import Maps, Stage

# (kernel, up, down) of convolutions in turn, on maps of 64x8 or of half of that.
WITHIN_THE_HALO = [
    [(3, 2, 1), (3, 1, 1), (1, 1, 1)],
    [(3, 1, 1), (3, 1, 2)],
    [(3, 1, 1), (3, 1, 1), (3, 1, 1)],
    [(1, 1, 2)],
    [(5, 1, 1)],
]


def run(convolutions: list[tuple[int, int, int]], backend: Backend) -> Maps:
    rng = np.random.default_rng(0)
    stage = Stage.of(64, 8, 3, backend)
    coarse = convolutions[0][1] == 2
    x = stage.enter(tf.constant(rng.standard_normal([2, 32, 4, 3] if coarse else [2, 64, 8, 3])))
    for kernel, up, down in convolutions:
        weight = tf.constant(rng.standard_normal([kernel, kernel, 3, 3]))
        x = stage.conv(x, weight, up=up, down=down)
    return stage.leave(x)


@pytest.fixture(autouse=True)
def low_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_TILE_MIN_ROWS", 2)


@pytest.mark.parametrize("pack_channels", [0, 16])
@pytest.mark.parametrize("convolutions", WITHIN_THE_HALO)
def test_tiles_give_what_whole_maps_give(
    convolutions: list[tuple[int, int, int]],
    pack_channels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "PACK_CHANNELS", pack_channels)
    tiles, whole = (run(convolutions, b).plain() for b in (Backend.TPU, Backend.GENERIC))
    assert error(tiles, whole) < 1e-12


@pytest.mark.parametrize(
    "convolutions",
    [
        [(3, 2, 1), (3, 1, 1), (3, 1, 1)],
        [(3, 1, 1), (3, 1, 1), (3, 1, 2)],
        [(3, 1, 1)] * 5,
        [(11, 1, 1)],
    ],
)
def test_more_layers_than_the_halo_has_rows_for_are_refused(
    convolutions: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silently wrong rows at the edges of tiles, if a network's stage had them."""
    monkeypatch.setattr(packing, "PACK_CHANNELS", 0)
    with pytest.raises(ValueError, match="beyond a tile, whose halo has"):
        run(convolutions, Backend.TPU)
    run(convolutions, Backend.GENERIC)


def test_a_sum_has_the_longer_reach() -> None:
    a, b = (Maps(tf.zeros([16, 8, 4, 1]), tiles=8, halo=2, reach=n) for n in (1, 3))
    assert (a + b).reach == (b + a).reach == 3
