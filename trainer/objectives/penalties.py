"""Penalties on gradients, sample by sample: what regularises the two networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from trainer.objectives.keys import D_PENALTIES


@dataclass(frozen=True)
class Penalty:
    """A penalty on the slopes of the discriminator: gradients of an image's logit in its pixels.

    Attributes:
      key: of its weight in the `objective` section.
      of_slopes: [N, H, W, C] -> [N].
      factor: of the weight.
      report: its name in the statistics.
    """

    key: str
    of_slopes: Callable[[tf.Tensor], tf.Tensor]
    factor: float
    report: str

    @property
    def images(self) -> str:
        """At which the slopes are taken: see `D_PENALTIES`."""
        return D_PENALTIES[self.key]


def squared_lengths(slopes: tf.Tensor) -> tf.Tensor:
    """[N, H, W, C] -> [N], of each sample."""
    return tf.reduce_sum(tf.square(slopes), [1, 2, 3])


def distances_from_1(slopes: tf.Tensor) -> tf.Tensor:
    """[N, H, W, C] -> [N], the squared distance of each sample's length from 1."""
    # At 0 the root has an infinite derivative.
    return tf.square(tf.sqrt(tf.maximum(squared_lengths(slopes), 1e-30)) - 1)


PENALTIES = (
    # Mescheder et al. 2018, equations 9 and 10.
    Penalty("r1_gamma", squared_lengths, 0.5, "Loss/r1_penalty"),
    Penalty("r2_gamma", squared_lengths, 0.5, "Loss/r2_penalty"),
    # Gulrajani et al. 2017, equation 3.
    Penalty("gradient_penalty", distances_from_1, 1.0, "Loss/gradient_penalty"),
)


def path_lengths(ws_gradients: tf.Tensor) -> tf.Tensor:
    """Path lengths: the change of an image with its latents (StyleGAN2, section 3.2).

    Args:
      ws_gradients: [N, num_ws, w_dim], of sum(image * noise) with noise of variance 1 / (H W).

    Returns:
      [N]: the lengths, averaged over the layers in the square.
    """
    return tf.sqrt(tf.reduce_mean(tf.reduce_sum(tf.square(ws_gradients), 2), 1))


def follow(moving_mean: tf.Tensor, batch_mean: tf.Tensor, decay: float) -> tf.Tensor:
    """A moving mean after a batch, of which `decay` is the weight."""
    return moving_mean + decay * (batch_mean - moving_mean)


def path_length_coefficients(
    lengths: tf.Tensor, batch_mean: tf.Tensor, moving_mean: tf.Tensor, decay: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The path length penalty and its exact derivative, given only the mean over the whole batch.

    With m = lerp(moving_mean, batch_mean, decay), NVIDIA's penalty is mean((l - m)^2) with the
    gradient through m. Its derivative in l_i is c_i / n with
    c_i = 2 [(l_i - m) - decay * mean(l - m)], so differentiating mean(stop_gradient(c_i) l_i) gives
    the same gradient whichever round or replica a sample is in.

    Args:
      lengths: [N], some of the batch.
      batch_mean: [], of the lengths over the whole batch.
      moving_mean: [], before this step.
      decay: weight of the batch in the moving mean.

    Returns:
      The penalties [N], the coefficients [N], and the new moving mean [].
    """
    mean = follow(moving_mean, batch_mean, decay)
    difference = lengths - mean
    coefficients = 2 * (difference - decay * (batch_mean - mean))
    return tf.square(difference), tf.stop_gradient(coefficients), mean
