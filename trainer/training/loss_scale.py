"""Dynamic loss scaling: keeps the gradients of float16 blocks within that format's range.

float16 holds values from 6e-8 to 65504. Gradients are those of a scaled loss, divided again in
float32 (Micikevicius et al. 2018, "Mixed precision training", section 3.2). Each phase has a scale
of its own, since their gradients differ by orders of magnitude. Powers of two only move the
exponent: where nothing leaves the range, the scale changes no number.
"""

from __future__ import annotations

import tensorflow as tf

# A new run's scale. It finds the right one by itself: each update that can't be used halves it. That
# costs a phase its first updates, and a regulariser has few of them, so it starts low.
INITIAL = 2.0**8
# A scale of 1 is none; there NVIDIA's code trains, which scales nothing.
_SMALLEST, _LARGEST = 1.0, 2.0**24
# So many good updates in a row double it.
_GROWTH_INTERVAL = 1000

# So many bad updates in a row are no matter of scale, which is at its smallest by then.
MAX_SKIPPED = 25

# The columns of the counts of each phase.
GOOD, SKIPPED, IN_A_ROW = range(3)


def update(
    scale: tf.Tensor, counts: tf.Tensor, finite: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The scale of a phase after an update.

    Args:
      scale: [], in use.
      counts: [3] int64: good updates since the scale last changed, updates skipped in this tick, and
        updates skipped in a row.
      finite: [] bool, whether all its gradients were.

    Returns:
      The new scale and counts, and whether MAX_SKIPPED is reached: [] bool.
    """
    good, skipped, in_a_row = tf.unstack(counts)
    zero = tf.zeros_like(good)
    grown = tf.logical_and(finite, good + 1 >= _GROWTH_INTERVAL)
    scale = tf.where(finite, tf.where(grown, scale * 2, scale), scale / 2)
    scale = tf.clip_by_value(scale, _SMALLEST, _LARGEST)
    good = tf.where(tf.logical_and(finite, tf.logical_not(grown)), good + 1, zero)
    skipped = tf.where(finite, skipped, skipped + 1)
    in_a_row = tf.where(finite, zero, in_a_row + 1)
    return scale, tf.stack([good, skipped, in_a_row]), in_a_row >= MAX_SKIPPED
