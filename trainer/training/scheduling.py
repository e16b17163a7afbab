"""Scheduled numbers inside a training step: tensors, so that they move without another trace."""

from __future__ import annotations

import math

import tensorflow as tf

from trainer.core.schedule import Number, Schedule


def value(number: Number, images: tf.Tensor, dtype: tf.DType) -> float | tf.Tensor:
    """The value of a scheduled number at a step.

    Args:
      number: of the config.
      images: [] int64, shown before the step.
      dtype: of a scheduled number.

    Returns:
      The number itself, or [] in `dtype` if it follows a schedule.
    """
    if not isinstance(number, Schedule):
        return number
    # In float64 on the way: a run may show more images than float32 can count.
    way = tf.minimum(tf.cast(images, tf.float64) / (number.kimg * 1000), 1.0)
    if number.shape == "cosine":
        way = 1 - (1 + tf.cos(math.pi * way)) / 2
    return tf.cast(number.start + way * (number.end - number.start), dtype)
