"""Penalties against NumPy and against the forms they were derived from."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core import sections
from trainer.objectives.keys import D_PENALTIES, ObjectiveConfig
from trainer.objectives.penalties import (
    PENALTIES,
    distances_from_1,
    path_length_coefficients,
    path_lengths,
    squared_lengths,
)


def test_every_penalty_has_a_weight_in_the_config() -> None:
    assert {penalty.key for penalty in PENALTIES} == set(D_PENALTIES)
    assert set(D_PENALTIES) < set(sections.keys(ObjectiveConfig))


def test_squared_lengths_and_distances_from_1() -> None:
    slopes = np.random.default_rng(0).standard_normal([3, 4, 5, 2])
    squares = np.sum(slopes**2, (1, 2, 3))
    np.testing.assert_allclose(squared_lengths(tf.constant(slopes)), squares, rtol=1e-12)
    distances = distances_from_1(tf.constant(slopes))
    np.testing.assert_allclose(distances, (np.sqrt(squares) - 1) ** 2, rtol=1e-12)


def test_a_flat_discriminator_has_a_finite_gradient() -> None:
    """The root of no slope at all has an infinite derivative."""
    slopes = tf.zeros([2, 3, 3, 1], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(slopes)
        distances = distances_from_1(slopes)
    np.testing.assert_allclose(distances, [1, 1], rtol=1e-12)
    np.testing.assert_array_equal(tape.gradient(distances, slopes), slopes)


def test_path_lengths() -> None:
    gradients = np.random.default_rng(0).standard_normal([3, 6, 8])
    expected = np.sqrt(np.mean(np.sum(gradients**2, 2), 1))
    np.testing.assert_allclose(path_lengths(tf.constant(gradients)), expected, rtol=1e-12)


def nvidias_penalty(lengths: tf.Tensor, moving_mean: float, decay: float) -> tuple[tf.Tensor, ...]:
    """mean((l - m)^2) with the gradient through m = lerp(moving mean, mean(l), decay)."""
    with tf.GradientTape() as tape:
        tape.watch(lengths)
        mean = moving_mean + decay * (tf.reduce_mean(lengths) - moving_mean)
        penalties = tf.square(lengths - mean)
        value = tf.reduce_mean(penalties)
    return penalties, mean, tape.gradient(value, lengths)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.floats(0, 50), min_size=2, max_size=8),
    moving_mean=st.floats(0, 10),
    decay=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_path_length_gradient_is_nvidias(
    lengths: list[float], moving_mean: float, decay: float
) -> None:
    whole = tf.constant(lengths, tf.float64)
    penalties, mean, gradient = nvidias_penalty(whole, moving_mean, decay)
    old = tf.constant(moving_mean, tf.float64)
    found, coefficients, new = path_length_coefficients(whole, tf.reduce_mean(whole), old, decay)
    np.testing.assert_allclose(found, penalties, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(new, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(coefficients / len(lengths), gradient, rtol=1e-6, atol=1e-6)


def test_path_length_gradient_does_not_depend_on_the_parts() -> None:
    """Two rounds that know the mean of the whole batch add up to one."""
    lengths = tf.constant([1.0, 2.0, 5.0, 0.5, 7.0, 3.0], tf.float64)
    old, mean = tf.constant(1.5, tf.float64), tf.reduce_mean(lengths)
    _, whole, new = path_length_coefficients(lengths, mean, old, 0.3)
    parts = [path_length_coefficients(p, mean, old, 0.3) for p in tf.split(lengths, [4, 2])]
    np.testing.assert_allclose(tf.concat([part[1] for part in parts], 0), whole)
    assert all(part[2] == new for part in parts)


def test_path_length_coefficients_are_constants() -> None:
    """Differentiating coefficient times length must not reach into the coefficient."""
    lengths = tf.constant([1.0, 4.0], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(lengths)
        _, coefficients, _ = path_length_coefficients(
            lengths, tf.reduce_mean(lengths), tf.constant(1.0, tf.float64), 0.1
        )
        total = tf.reduce_sum(coefficients * lengths)
    np.testing.assert_allclose(tape.gradient(total, lengths), coefficients)
