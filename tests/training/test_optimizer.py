"""Adam against PyTorch's formula and Keras's, and the numbers of lazy regularisation."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.training.optimizer import Adam, ema_beta

TRACE = pathlib.Path(__file__).parents[1] / "goldens" / "sg2_train_trace_c0.npz"
SHAPES = {"weight": (3, 4), "bias": (4,), "strength": ()}


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    with np.load(TRACE) as arrays:
        return json.loads(str(arrays["meta_json"]))


def random_steps(count: int) -> list[dict[str, np.ndarray]]:
    """Gradients over many orders of magnitude, so that epsilon and the corrections show."""
    rng = np.random.default_rng(5)
    return [
        {
            name: rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 3)
            for name, shape in SHAPES.items()
        }
        for _ in range(count)
    ]


def run(adam: Adam, steps: list[dict[str, np.ndarray]], dtype: tf.DType) -> dict[str, np.ndarray]:
    params = {name: tf.ones(shape, dtype) for name, shape in SHAPES.items()}
    first = {name: tf.zeros(shape, dtype) for name, shape in SHAPES.items()}
    second = dict(first)
    for index, grads in enumerate(steps):
        tensors = {name: tf.constant(grad, dtype) for name, grad in grads.items()}
        count = tf.constant(index + 1, tf.int64)
        params, first, second = adam.update(count, params, first, second, tensors)
    return {name: value.numpy() for name, value in params.items()}


def pytorch(adam: Adam, steps: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """As documented for torch.optim.Adam: epsilon is added after the bias correction."""
    params = {name: np.ones(shape) for name, shape in SHAPES.items()}
    for name in SHAPES:
        m, v = np.zeros(SHAPES[name]), np.zeros(SHAPES[name])
        for t, grads in enumerate(steps, 1):
            m = adam.beta1 * m + (1 - adam.beta1) * grads[name]
            v = adam.beta2 * v + (1 - adam.beta2) * grads[name] ** 2
            m_hat, v_hat = m / (1 - adam.beta1**t), v / (1 - adam.beta2**t)
            params[name] = params[name] - adam.lr * m_hat / (np.sqrt(v_hat) + adam.eps)
    return params


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_is_pytorchs(beta1: float) -> None:
    adam, steps = Adam(0.01, beta1, 0.99), random_steps(12)
    expected = pytorch(adam, steps)
    for dtype, tolerance in ((tf.float64, 1e-12), (tf.float32, 1e-5)):
        for name, value in run(adam, steps, dtype).items():
            np.testing.assert_allclose(value, expected[name], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_is_kerass_but_for_epsilon(beta1: float) -> None:
    """Keras adds epsilon before the correction, so there must be none to speak of."""
    keras = pytest.importorskip("keras")

    adam, steps = Adam(0.01, beta1, 0.99, eps=1e-20), random_steps(8)
    variables = {name: tf.Variable(tf.ones(shape)) for name, shape in SHAPES.items()}
    keras_adam = keras.optimizers.Adam(learning_rate=0.01, beta_1=beta1, beta_2=0.99, epsilon=1e-20)
    keras_adam.build(list(variables.values()))
    for grads in steps:
        keras_adam.apply(
            [tf.constant(grads[name], tf.float32) for name in SHAPES], list(variables.values())
        )
    for name, value in run(adam, steps, tf.float32).items():
        np.testing.assert_allclose(value, variables[name], rtol=2e-5, err_msg=name)


def test_first_step_has_the_length_of_the_learning_rate() -> None:
    params = run(Adam(0.002, 0.0, 0.99), random_steps(1), tf.float64)
    for value in params.values():
        np.testing.assert_allclose(np.abs(1 - value), 0.002, rtol=0.1)


def test_only_parameters_with_gradients_are_returned() -> None:
    adam = Adam(0.1, 0.0, 0.99)
    all_params = {"a": tf.ones([2]), "frozen": tf.ones([2])}
    zeros = {name: tf.zeros([2]) for name in all_params}
    for result in adam.update(tf.constant(1), all_params, zeros, zeros, {"a": tf.ones([2])}):
        assert set(result) == {"a"}


def test_lazy_settings_are_nvidias(trace: dict[str, Any]) -> None:
    for network, lr in (("G", 0.0025), ("D", 0.0025)):
        adam = Adam(lr, 0.0, 0.99).lazy(trace[f"{network}_reg_interval"])
        assert adam.lr == pytest.approx(trace[f"lr_{network}"], rel=1e-12)
        assert [adam.beta1, adam.beta2] == pytest.approx(trace[f"betas_{network}"], rel=1e-12)
        assert adam.eps == trace["eps"]


def test_lazy_settings_by_hand() -> None:
    adam = Adam(0.0025, 0.5, 0.99).lazy(4)
    assert adam.lr == pytest.approx(0.002)
    assert (adam.beta1, adam.beta2) == pytest.approx((0.5**0.8, 0.99**0.8))
    # k + 1 steps in k iterations decay as much as k plain ones.
    assert adam.beta2**5 == pytest.approx(0.99**4)


def test_ema_half_life(trace: dict[str, Any]) -> None:
    seen = tf.constant(0, tf.int64)
    beta = float(ema_beta(trace["batch"], seen, 0.02, None))
    assert beta == pytest.approx(trace["ema_beta"], rel=1e-6)
    # Half of what was there is left after ema_kimg.
    assert float(ema_beta(32, seen, 10.0, None)) ** (10_000 / 32) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("images", "half_life"), [(0, 0.0), (1000, 50.0), (100_000, 5000.0), (400_000, 10_000.0)]
)
def test_ema_rampup(images: int, half_life: float) -> None:
    """At first the average follows the weights, then the half-life grows up to its limit."""
    beta = float(ema_beta(32, tf.constant(images, tf.int64), 10.0, 0.05))
    expected = 0.5 ** (32 / half_life) if half_life else 0.0
    assert beta == pytest.approx(expected, rel=1e-5)
    assert ema_beta(32, tf.constant(images, tf.int64), 10.0, 0.05).dtype == tf.float32
    exact = ema_beta(32, tf.constant(images, tf.int64), 10.0, 0.05, tf.float64)
    assert exact.dtype == tf.float64
    assert float(exact) == pytest.approx(expected, rel=1e-12)
