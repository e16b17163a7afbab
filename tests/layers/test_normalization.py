"""Batch and spectral normalisation: against NumPy, and the same on every placement."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.layers import classic
from tests.training.test_step import distance
from trainer.layers.normalization import batch_norm, follow_moments, spectral_norm

pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")
ROOT = pathlib.Path(__file__).parents[2]


def parameters(channels: int) -> dict[str, tf.Tensor]:
    rng = np.random.default_rng(1)
    values = {key: rng.uniform(0.5, 2, channels) for key in ("scale", "offset", "mean", "square")}
    values["square"] += values["mean"] ** 2
    return {f"norm.{key}": tf.constant(value) for key, value in values.items()}


def test_batch_norm_takes_the_moments_of_each_group() -> None:
    params = parameters(3)
    x = np.random.default_rng(0).standard_normal([8, 2, 5, 3]) * 3 + 1
    found, sums = batch_norm(params, "norm", tf.constant(x), 4)
    scale, offset = params["norm.scale"].numpy(), params["norm.offset"].numpy()
    for group, part in zip(np.split(found.numpy(), 2), np.split(x, 2), strict=True):
        mean, variance = part.mean((0, 1, 2)), part.var((0, 1, 2))
        expected = (part - mean) / np.sqrt(variance + 1e-5) * scale + offset
        np.testing.assert_allclose(group, expected, rtol=1e-10)
    assert set(sums) == {"norm.mean", "norm.square"}
    np.testing.assert_allclose(sums["norm.mean"] / 8, x.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(sums["norm.square"] / 8, (x**2).mean((0, 1, 2)), rtol=1e-10)


def test_batch_norm_by_its_moving_moments() -> None:
    params = parameters(3)
    x = np.random.default_rng(0).standard_normal([3, 2, 5, 3])
    found, sums = batch_norm(params, "norm", tf.constant(x), None)
    mean, square = params["norm.mean"].numpy(), params["norm.square"].numpy()
    expected = (x - mean) / np.sqrt(square - mean**2 + 1e-5)
    expected = expected * params["norm.scale"].numpy() + params["norm.offset"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert sums == {}


def test_moving_moments_come_to_those_of_the_data() -> None:
    buffers = {"a": tf.zeros([2], tf.float64)}
    for _ in range(200):
        buffers = follow_moments(buffers, {"a": tf.constant([3.0, -1.0], tf.float64)})
    np.testing.assert_allclose(buffers["a"], [3, -1], rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 3, 4, 7), (5, 3)])
def test_spectral_norm_comes_to_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight, u = tf.constant(rng.standard_normal(shape)), tf.constant(rng.standard_normal(shape[-1]))
    for _ in range(300):
        normalised, u = spectral_norm(weight, u)
    norm = np.linalg.svd(weight.numpy().reshape(-1, shape[-1]))[1][0]
    np.testing.assert_allclose(normalised, weight / norm, rtol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(u), 1, rtol=1e-10)


def test_spectral_norm_has_the_gradient_of_a_fixed_direction() -> None:
    """Of W / (v' W u) with v and u constant (Miyato et al. 2018, equation 12)."""
    rng = np.random.default_rng(0)
    weight, u = tf.constant(rng.standard_normal([5, 3])), tf.constant(rng.standard_normal(3))
    dy = rng.standard_normal([5, 3])
    with tf.GradientTape() as tape:
        tape.watch([weight, u])
        normalised, new = spectral_norm(weight, u)
        total = tf.reduce_sum(normalised * dy)
    in_weight, in_u = tape.gradient(total, [weight, u])
    w = weight.numpy()
    v = w @ u.numpy()
    v /= np.linalg.norm(v)
    norm = v @ w @ new.numpy()
    expected = (dy - np.sum(dy * w / norm) * np.outer(v, new)) / norm
    np.testing.assert_allclose(in_weight, expected, rtol=1e-10)
    assert in_u is None or not np.any(in_u)


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    """Three steps in one piece."""
    tf.config.run_functions_eagerly(True)
    values = classic.train(3)
    tf.config.run_functions_eagerly(False)
    return values


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    apart = {name: distance(found[name], value) for name, value in wanted.items()}
    assert not {name: value for name, value in apart.items() if value > 1e-9}


def test_buffers_move(whole: dict[str, np.ndarray]) -> None:
    fresh = classic.Generator().init(0), classic.Discriminator().init(0)
    for name in ("norm.mean", "norm.square"):
        assert distance(whole[f"G/{name}"], fresh[0][name]) > 0.01
        np.testing.assert_array_equal(whole[f"G_ema/{name}"], whole[f"G/{name}"])
    assert distance(whole["D/conv.u"], fresh[1]["conv.u"]) > 0.01
    # As of one power iteration for each of D's updates, and no more: it is of length 1.
    np.testing.assert_allclose(np.linalg.norm(whole["D/conv.u"]), 1, rtol=1e-9)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("rounds", [2, 4])
def test_rounds_change_nothing(whole: dict[str, np.ndarray], rounds: int) -> None:
    assert_same(classic.train(3, rounds=rounds), whole)


@pytest.mark.slow
def test_replicas_change_nothing(whole: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "values.npz"
    command = [sys.executable, "-m", "tests.layers.classic", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as arrays:
        assert_same(dict(arrays), whole)
