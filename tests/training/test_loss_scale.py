"""The loss scale of each phase: when it falls, when it grows, and when it gives up."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.training import loss_scale
from trainer.training.loss_scale import GOOD, IN_A_ROW, SKIPPED


class Scales:
    """The scale of a phase."""

    def __init__(self, scale: float = 1024.0, good: int = 0) -> None:
        self.scale = tf.constant(scale)
        self.counts = tf.constant([good, 0, 0], tf.int64)
        self._exhausted = False

    def given_up(self) -> bool:
        return self._exhausted

    def update(self, *outcomes: bool) -> tuple[float, list[int]]:
        """The phase's scale and counts after these updates were finite or not."""
        for finite in outcomes:
            self.scale, self.counts, exhausted = loss_scale.update(
                self.scale, self.counts, tf.constant(finite)
            )
            self._exhausted = bool(exhausted)
        assert self.counts.dtype == tf.int64
        return float(self.scale), self.counts.numpy().tolist()


def test_a_bad_update_halves_the_scale_and_is_counted() -> None:
    scales = Scales(good=7)
    assert scales.update(False) == (512.0, [0, 1, 1])
    assert scales.update(False) == (256.0, [0, 2, 2])
    # A good one ends the row; what was skipped in this tick stays counted.
    assert scales.update(True) == (256.0, [1, 2, 0])
    assert not scales.given_up()
    assert (GOOD, SKIPPED, IN_A_ROW) == (0, 1, 2)


def test_a_row_of_good_updates_doubles_the_scale() -> None:
    scales = Scales(good=loss_scale._GROWTH_INTERVAL - 2)
    assert scales.update(True) == (1024.0, [loss_scale._GROWTH_INTERVAL - 1, 0, 0])
    assert scales.update(True) == (2048.0, [0, 0, 0])
    assert scales.update(True) == (2048.0, [1, 0, 0])


@pytest.mark.parametrize(("start", "finite", "end"), [(1.0, False, 1.0), (2.0**24, True, 2.0**24)])
def test_limits(start: float, finite: bool, end: float) -> None:
    scales = Scales(start, good=loss_scale._GROWTH_INTERVAL - 1)
    assert scales.update(finite)[0] == end


def test_it_gives_up_only_at_no_scale_at_all() -> None:
    scales = Scales(loss_scale._LARGEST)
    scales.update(*[False] * (loss_scale.MAX_SKIPPED - 1))
    assert not scales.given_up()
    scale, counts = scales.update(False)
    assert scales.given_up()
    assert (scale, counts[IN_A_ROW]) == (1.0, loss_scale.MAX_SKIPPED)


def test_it_compiles() -> None:
    compiled = tf.function(loss_scale.update, jit_compile=True, autograph=False)
    scales = Scales()
    found = compiled(scales.scale, scales.counts, tf.constant(False))
    wanted = loss_scale.update(scales.scale, scales.counts, tf.constant(False))
    tf.nest.map_structure(np.testing.assert_array_equal, found, wanted)
