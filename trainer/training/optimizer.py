"""Adam (Kingma and Ba 2015) as a pure function, and its settings under lazy regularisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

Tensors = Mapping[str, tf.Tensor]


class Adam(NamedTuple):
    """Settings of one network's optimizer: floats, or [] where they follow a schedule.

    Attributes:
      lr: learning rate.
      beta1, beta2: decay of the first and second moments.
      eps: added to the root of the corrected second moment.
    """

    lr: float | tf.Tensor
    beta1: float | tf.Tensor
    beta2: float | tf.Tensor
    eps: float = 1e-8

    def lazy(self, reg_interval: int | None) -> Adam:
        """The settings for lazy regularisation (StyleGAN2, appendix B).

        One optimizer serves the main loss at every step and the regulariser at every
        `reg_interval`-th, so it steps k + 1 times in k; rate and decay are corrected for that.
        None: there is no regulariser.
        """
        if reg_interval is None:
            return self
        ratio = reg_interval / (reg_interval + 1)
        return Adam(self.lr * ratio, self.beta1**ratio, self.beta2**ratio, self.eps)

    def update(
        self, count: tf.Tensor, params: Tensors, first: Tensors, second: Tensors, grads: Tensors
    ) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """One step.

        Args:
          count: [] int64, how many steps were made, this one included.
          params, first, second, grads: by name, all with the names of `grads`, of one dtype.

        Returns:
          The new params, first and second moments.
        """
        new_params, new_first, new_second = {}, {}, {}
        (dtype,) = {grad.dtype for grad in grads.values()}
        steps = tf.cast(count, dtype)
        correction1 = 1 - tf.pow(tf.convert_to_tensor(self.beta1, dtype), steps)
        correction2 = 1 - tf.pow(tf.convert_to_tensor(self.beta2, dtype), steps)
        step, root_correction2 = self.lr / correction1, tf.math.rsqrt(correction2)
        for name, grad in grads.items():
            m = first[name] * self.beta1 + grad * (1 - self.beta1)
            v = second[name] * self.beta2 + tf.square(grad) * (1 - self.beta2)
            new_params[name] = params[name] - step * m / (tf.sqrt(v) * root_correction2 + self.eps)
            new_first[name], new_second[name] = m, v
        return new_params, new_first, new_second


def ema_beta(
    batch_size: int,
    images: tf.Tensor,
    ema_kimg: float | tf.Tensor,
    rampup: float | None,
    dtype: tf.DType = tf.float32,
) -> tf.Tensor:
    """Decay of the generator's moving average in one step.

    Args:
      batch_size: images per step.
      images: [] int64, images seen before this step.
      ema_kimg: half-life in thousands of images; [] if it follows a schedule.
      rampup: the half-life is at most this fraction of the images seen; None doesn't limit it.
      dtype: of the result.

    Returns:
      []: G_ema = lerp(G, G_ema, beta).
    """
    half_life = tf.convert_to_tensor(ema_kimg * 1000, dtype)
    if rampup is not None:
        half_life = tf.minimum(half_life, tf.cast(images, dtype) * rampup)
    return tf.exp(-math.log(2) * batch_size / tf.maximum(half_life, 1e-8))
