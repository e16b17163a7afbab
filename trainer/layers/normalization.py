"""Batch and spectral normalisation, whose moving values follow a forward pass and are not moved by it.

A layer returns sums over its samples besides its result; the step adds those of all rounds and
replicas, and the family's `follow` moves the buffers by their means. So results don't depend on the
placement: statistics are those of a group, and what a layer uses of its buffers is what they were
before the step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

Tensors = Mapping[str, tf.Tensor]
Sums = dict[str, tf.Tensor]

_DECAY = 0.9  # of the moving moments


def batch_norm(
    params: Tensors, name: str, x: tf.Tensor, group_size: int | None, epsilon: float = 1e-5
) -> tuple[tf.Tensor, Sums]:
    """Normalises each channel to mean 0 and variance 1, then scales and shifts it.

    Args:
      params: `<name>.scale` and `<name>.offset`, and the buffers `<name>.mean` and `<name>.square`,
        all [C].
      name: of the layer.
      x: [N, H, W, C].
      group_size: images over which moments are taken in training, consecutive ones, which divides
        N; None takes the moving moments. A family that uses it sets `Keys.SMALLEST_GROUP`.
      epsilon: added to the variance.

    Returns:
      [N, H, W, C], and what the buffers follow; nothing where they are taken.
    """
    if group_size is None:
        mean, square = params[f"{name}.mean"], params[f"{name}.square"]
        return _scaled(params, name, x, mean, square - tf.square(mean), epsilon), {}
    shape = tf.shape(x)
    groups = tf.reshape(x, tf.concat([[shape[0] // group_size, group_size], shape[1:]], 0))
    mean, variance = tf.nn.moments(groups, [1, 2, 3], keepdims=True)
    y = tf.reshape(_scaled(params, name, groups, mean, variance, epsilon), shape)
    # Of each image, so that the moments of the whole batch are means over its images.
    first, second = (tf.reduce_mean(value, [1, 2]) for value in (x, tf.square(x)))
    sums = {"mean": tf.reduce_sum(first, 0), "square": tf.reduce_sum(second, 0)}
    return y, {f"{name}.{key}": tf.stop_gradient(value) for key, value in sums.items()}


def _scaled(
    params: Tensors,
    name: str,
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    factor = params[f"{name}.scale"] * tf.math.rsqrt(tf.maximum(variance, 0) + epsilon)
    return (x - mean) * factor + params[f"{name}.offset"]


def spectral_norm(weight: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A weight divided by its largest singular value (Miyato et al. 2018, algorithm 1).

    The value is estimated by one step of power iteration from the singular vector of the step before.

    Args:
      weight: [..., out].
      u: [out], a buffer, which starts from normal noise.

    Returns:
      The weight, and what `u` follows: [out], the same for every sample.
    """
    matrix = tf.reshape(weight, [-1, weight.shape[-1]])
    # Both singular vectors count as constants.
    v = tf.stop_gradient(_unit(tf.linalg.matvec(matrix, u)))
    new = tf.stop_gradient(_unit(tf.linalg.matvec(matrix, v, transpose_a=True)))
    norm = tf.tensordot(v, tf.linalg.matvec(matrix, new), 1)
    return weight / norm, new


def _unit(x: tf.Tensor) -> tf.Tensor:
    return x * tf.math.rsqrt(tf.maximum(tf.reduce_sum(tf.square(x)), np.finfo(np.float32).tiny))


def follow_moments(buffers: Tensors, means: Tensors) -> Sums:
    """The buffers of `batch_norm` after a step, for a family's `follow`."""
    return {name: mean + _DECAY * (buffers[name] - mean) for name, mean in means.items()}
