"""The controller of ADA, which sets the strength of augmentation."""

from __future__ import annotations

import tensorflow as tf


def adjust(
    p: tf.Tensor, sign_mean: tf.Tensor, batch_images: int, target: float, adjust_kimg: float
) -> tf.Tensor:
    """The ADA controller (section 3.1): one step of p towards r_t = target.

    Args:
      p: scalar, the probability in use.
      sign_mean: scalar, r_t: the mean of sign(D(real)) over the images since the last step.
      batch_images: how many images those were shown: batch size times the interval between steps.
      target: the r_t to hold.
      adjust_kimg: thousands of images in which p may travel from 0 to 1.

    Returns:
      scalar, at least 0; not limited above, as with NVIDIA.
    """
    step = batch_images / (adjust_kimg * 1000)
    return tf.maximum(p + tf.sign(sign_mean - target) * step, 0)
