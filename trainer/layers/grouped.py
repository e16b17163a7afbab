"""Grouped convolutions: each group of channels is convolved by itself (Xie et al. 2017, "ResNeXt").

Few backends do them well: TensorFlow has no gradients of them on a CPU without oneDNN, XLA took 150
times as long there as for the same by slices, and narrow groups leave most of a TPU's lanes empty.
So they are dense convolutions of several groups at once, whose kernels are zero between groups.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from trainer.layers import ops
from trainer.layers.ops import Backend

# Channels that fill the lanes of a TPU's matrix unit. Modelled by the compiler for a v5e, in bfloat16,
# with both gradients, 16 channels in a group: 32 x 16 x 16 maps of 1536 channels take 3.2 ms natively and
# 1.5 ms in blocks of 128; of 768 channels at 64 x 64 35 and 9.3 ms; 8 x 256 x 256 maps of 192 channels 62
# ms natively.
_LANES = 128
# Elsewhere zeros cost more than further convolutions, but many of them take long to compile. 256
# channels in groups of 16, 32 x 16 x 16 maps under XLA on a CPU: 16 convolutions 9 ms, 8 of two groups
# 12 ms, 2 of eight 38 ms.
_MOST_CONVOLUTIONS = 16


def grouped_conv2d(
    x: tf.Tensor, weight: tf.Tensor, backend: Backend = Backend.GENERIC
) -> tf.Tensor:
    """A convolution with zero padding, group by group.

    Args:
      x: [N, H, W, C].
      weight: [k, k, C / groups, out]; the first out / groups kernels are those of the first group,
        and so on.
      backend: how it is computed.

    Returns:
      [N, H, W, out].
    """
    inputs = weight.shape[2]
    groups = x.shape[3] // inputs
    together = _together(groups, inputs, backend)
    kernels = _block_diagonal(weight, groups, together)
    parts = tf.split(x, groups // together, 3)
    done = [ops.conv2d(part, kernel, backend) for part, kernel in zip(parts, kernels, strict=True)]
    return tf.concat(done, 3) if len(done) > 1 else done[0]


def _together(groups: int, inputs: int, backend: Backend) -> int:
    """The number of groups to convolve at once: a divisor of all."""
    if backend is Backend.TPU:
        wanted = max(_LANES // inputs, 1)
    else:
        wanted = math.ceil(groups / _MOST_CONVOLUTIONS)
    larger = (n for n in range(min(wanted, groups), groups + 1) if groups % n == 0)
    return next(larger)


def _block_diagonal(weight: tf.Tensor, groups: int, together: int) -> list[tf.Tensor]:
    """Kernels [k, k, together * in, together * out] that are zero between groups."""
    size, _, inputs, outputs = weight.shape
    if together == 1:
        return tf.split(weight, groups, 3)
    parts, out = groups // together, outputs // groups
    split = tf.reshape(weight, [size, size, inputs, parts, together, out])
    same = tf.constant(np.eye(together), weight.dtype)
    blocks = tf.einsum("hwipgo,fg->phwfigo", split, same)
    shape = [parts, size, size, together * inputs, together * out]
    return tf.unstack(tf.reshape(blocks, shape))
