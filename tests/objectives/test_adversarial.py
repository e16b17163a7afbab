"""Adversarial losses against NumPy."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.objectives import adversarial


def test_logistic_losses() -> None:
    fake = np.array([[-300.0], [-2.0], [0.0], [1.5], [300.0]])
    real = fake[::-1] + 0.25
    fooled = adversarial.generator_logistic(tf.constant(fake))
    # log(1 + exp(x)) without overflow.
    np.testing.assert_allclose(fooled, np.logaddexp(0, -fake), rtol=1e-12)
    both = adversarial.discriminator_logistic(tf.constant(fake), tf.constant(real))
    np.testing.assert_allclose(both, np.logaddexp(0, fake) + np.logaddexp(0, -real), rtol=1e-12)
    assert fooled.shape == both.shape == [5, 1]


def test_generator_keeps_learning_when_it_loses() -> None:
    """Non-saturating: the gradient stays where the discriminator is sure of the fakes."""
    logits = tf.constant([[-30.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = adversarial.generator_logistic(logits)
    np.testing.assert_allclose(tape.gradient(loss, logits), [[-1.0]])
