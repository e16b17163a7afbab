"""Adversarial losses, sample by sample.

Every function returns one value for each sample; means over the whole batch are taken by the step,
which alone knows how the batch is spread over rounds and replicas.
"""

from __future__ import annotations

import tensorflow as tf


def generator_logistic(fake_logits: tf.Tensor) -> tf.Tensor:
    """Non-saturating loss -log sigmoid(D(G(z))) (Goodfellow et al. 2014): [N, 1] -> [N, 1]."""
    return tf.nn.softplus(-fake_logits)


def discriminator_logistic(fake_logits: tf.Tensor, real_logits: tf.Tensor) -> tf.Tensor:
    """-log(1 - sigmoid(D(G(z)))) - log sigmoid(D(x)): two [N, 1] -> [N, 1]."""
    return tf.nn.softplus(fake_logits) + tf.nn.softplus(-real_logits)
