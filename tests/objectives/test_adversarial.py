"""Adversarial losses against their formulas in NumPy."""

from __future__ import annotations

import typing
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from trainer.core import sections
from trainer.objectives.adversarial import LOSSES, smoothed
from trainer.objectives.keys import ObjectiveConfig

FAKE = np.array([[-300.0], [-2.0], [0.0], [1.5], [300.0]])
REAL = FAKE[::-1] + 0.25


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) without overflow."""
    return np.logaddexp(0, x)


# (discriminator's, generator's), of the logits of fakes and reals.
FORMULAS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "logistic": (lambda f, r: softplus(f) + softplus(-r), lambda f, r: softplus(-f)),
    "minimax": (lambda f, r: softplus(f) + softplus(-r), lambda f, r: -softplus(f)),
    "hinge": (lambda f, r: np.maximum(0, 1 + f) + np.maximum(0, 1 - r), lambda f, r: -f),
    "least_squares": (
        lambda f, r: 0.5 * f**2 + 0.5 * (r - 1) ** 2,
        lambda f, r: 0.5 * (f - 1) ** 2,
    ),
    "wasserstein": (lambda f, r: f - r, lambda f, r: -f),
    "relativistic": (lambda f, r: softplus(f - r), lambda f, r: softplus(r - f)),
}


def test_every_loss_is_a_choice_and_has_a_formula_here() -> None:
    choices = typing.get_args(sections.keys(ObjectiveConfig)["adversarial"].hint)
    assert set(choices) == set(LOSSES) == set(FORMULAS)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    fake, real = tf.constant(FAKE), tf.constant(REAL)
    of_d, of_g = FORMULAS[name]
    found = LOSSES[name].discriminator(fake, real)
    np.testing.assert_allclose(found, of_d(FAKE, REAL), rtol=1e-12)
    reals = real if ObjectiveConfig(adversarial=name).is_relativistic else None
    generator = LOSSES[name].generator(fake, reals)
    np.testing.assert_allclose(generator, of_g(FAKE, REAL), rtol=1e-12)
    assert found.shape == generator.shape == [5, 1]


@pytest.mark.parametrize(("name", "slope"), [("logistic", -1.0), ("minimax", 0.0)])
def test_what_a_generator_learns_when_it_loses(name: str, slope: float) -> None:
    """Where the discriminator is sure of the fakes, the saturating loss has no gradient left."""
    logits = tf.constant([[-30.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = LOSSES[name].generator(logits, None)
    np.testing.assert_allclose(tape.gradient(loss, logits), [[slope]], atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_labels_are_those_of_reals_alone(smoothing: float) -> None:
    plain = LOSSES["logistic"].discriminator(tf.constant(FAKE), tf.constant(REAL))
    found = smoothed(plain, tf.constant(REAL), smoothing)
    # The cross entropy with the target 1 - smoothing, and 0 for fakes.
    of_reals = (1 - smoothing) * softplus(-REAL) + smoothing * softplus(REAL)
    np.testing.assert_allclose(found, of_reals + softplus(FAKE), rtol=1e-12)
