"""Adversarial losses, sample by sample.

Every function returns one value for each sample; means over the whole batch are taken by the step,
which alone knows how the batch is spread over rounds and replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf


class Adversarial(NamedTuple):
    """A loss for each network: (fake, real), two [N, 1], -> [N, 1].

    Attributes:
      discriminator: of the logits of fakes and reals.
      generator: of the logits of fakes; those of reals are None unless the loss is relativistic.
    """

    discriminator: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    generator: Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]


def cross_entropy(fake: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """-log(1 - sigmoid(D(G(z)))) - log sigmoid(D(x)) (Goodfellow et al. 2014)."""
    return tf.nn.softplus(fake) + tf.nn.softplus(-real)


def non_saturating(fake: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
    """-log sigmoid(D(G(z))) (Goodfellow et al. 2014, section 3)."""
    del real
    return tf.nn.softplus(-fake)


def saturating(fake: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
    """log(1 - sigmoid(D(G(z)))) (Goodfellow et al. 2014, equation 1)."""
    del real
    return -tf.nn.softplus(fake)


def squared_distances(fake: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """Half the squared distances to 0 and to 1 (Mao et al. 2017, equation 9)."""
    return (tf.square(fake) + tf.square(real - 1)) / 2


def squared_distance_to_1(fake: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
    """Half the squared distance to 1 (Mao et al. 2017, equation 9)."""
    del real
    return tf.square(fake - 1) / 2


def hinge(fake: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """max(0, 1 + D(G(z))) + max(0, 1 - D(x)) (Lim and Ye 2017); G's loss is `negated`."""
    return tf.nn.relu(1 + fake) + tf.nn.relu(1 - real)


def difference(fake: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """D(G(z)) - D(x) (Arjovsky et al. 2017)."""
    return fake - real


def negated(fake: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
    """-D(G(z))."""
    del real
    return -fake


def relativistic_discriminator(fake: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """-log sigmoid(D(x) - D(G(z))) (Jolicoeur-Martineau 2019, "RpGAN")."""
    return tf.nn.softplus(fake - real)


def relativistic_generator(fake: tf.Tensor, real: tf.Tensor | None) -> tf.Tensor:
    """-log sigmoid(D(G(z)) - D(x))."""
    assert real is not None
    return tf.nn.softplus(real - fake)


LOSSES = {
    "logistic": Adversarial(cross_entropy, non_saturating),
    "minimax": Adversarial(cross_entropy, saturating),
    "hinge": Adversarial(hinge, negated),
    "least_squares": Adversarial(squared_distances, squared_distance_to_1),
    "wasserstein": Adversarial(difference, negated),
    "relativistic": Adversarial(relativistic_discriminator, relativistic_generator),
}


def smoothed(loss: tf.Tensor, real: tf.Tensor, smoothing: float) -> tf.Tensor:
    """`cross_entropy` with a target for reals of 1 - smoothing (Salimans et al. 2016, section 3.4).

    (1 - s) softplus(-x) + s softplus(x) = softplus(-x) + s x.
    """
    return loss + smoothing * real if smoothing else loss
