"""The Inception network against the reference's values for generated weights."""

from __future__ import annotations

import json
import pathlib
import zlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.metrics import inception

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "inception_fid_arch.npz"
# Features of two images differ by 3%, the two ways to resize by 1%; the golden's rounding is 5e-7.
TOLERANCE = 4e-6


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def meta(golden: dict[str, np.ndarray]) -> dict[str, Any]:
    return json.loads(str(golden["meta_json"]))


@pytest.fixture(scope="module")
def folded(params: inception.Params) -> dict[str, tf.Tensor]:
    return {name: tf.constant(array) for name, array in inception.fold(params).items()}


def synthetic(size: int, count: int, frequency: int, shift: int) -> np.ndarray:
    """Images [count, size, size, 3] uint8 of crossing triangle waves, by an exact integer rule."""

    def triangle(t: np.ndarray) -> np.ndarray:
        return np.abs(t % 510 - 255)

    n, y, x, c = np.ogrid[:count, :size, :size, :3]
    first = triangle(frequency * (3 * x + (2 + c) * y) + 57 * n + shift)
    second = triangle(frequency * (5 * y - (1 + c) * x) + 1000 + 91 * n)
    return ((first + second) // 2).astype(np.uint8)


def error(actual: Any, expected: np.ndarray) -> float:
    """The largest difference relative to the largest value."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def check_outputs(
    golden: dict[str, np.ndarray], case: str, outputs: Any, params: inception.Params
) -> None:
    pooled, logits = outputs
    assert error(pooled, golden[f"{case}/features"]) < TOLERANCE
    assert error(pooled[:, :64], golden[f"f64/{case}/features_first64"]) < TOLERANCE
    assert error(logits, golden[f"{case}/logits"]) < TOLERANCE
    probabilities = tf.nn.softmax(logits - params["fc.bias"])
    assert error(probabilities, golden[f"{case}/probs_nobias"]) < 2 * TOLERANCE


def test_table_is_that_of_the_reference(meta: dict[str, Any]) -> None:
    shapes = {name: tuple(shape) for name, shape in meta["parameter_shapes"].items()}
    assert shapes == inception.SHAPES
    assert list(shapes) == list(inception.SHAPES)
    trained = [np.prod(shape) for name, shape in shapes.items() if "running" not in name]
    assert sum(trained) == meta["n_params"]


def test_generated_weights_are_those_of_the_golden(
    golden: dict[str, np.ndarray], meta: dict[str, Any], params: inception.Params
) -> None:
    for name, expected in meta["weights_check_sumsq"].items():
        np.testing.assert_array_equal(params[name].ravel()[:8], golden[f"weights_check/{name}"])
        assert np.sum(np.square(params[name].astype(np.float64))) == pytest.approx(expected)


def test_network_equals_the_reference_layer_by_layer(
    golden: dict[str, np.ndarray],
    meta: dict[str, Any],
    params: inception.Params,
    folded: dict[str, tf.Tensor],
) -> None:
    images = synthetic(299, 3, meta["img_mul"], meta["img_shift"])
    assert zlib.crc32(images.tobytes()) == meta["crc32_img299_nhwc"]
    x = inception.preprocess_half_pixel(images)
    np.testing.assert_allclose(x, 2 * (images / 255) - 1, atol=2e-7)  # nothing to resize
    names = []
    for name, y in inception.activations(folded, x):
        first = np.asarray(y[0], np.float64)
        statistics = [first.mean(), np.sqrt(np.mean(first**2)), np.abs(first).max()]
        assert error(statistics, golden[f"in299/stat0/{name}"]) < TOLERANCE, name
        means = first.mean(axis=(0, 1))
        assert error(means, golden[f"in299/chan_mean0/{name}"]) < TOLERANCE, name
        names.append(name)
    assert names == [n.rpartition("/")[2] for n in golden if n.startswith("in299/stat0/")]
    check_outputs(golden, "in299", inception.features(folded, x), params)


@pytest.mark.parametrize(
    ("case", "resize", "preprocess"),
    [
        ("in64_halfpixel", inception.resize_half_pixel, inception.preprocess_half_pixel),
        ("in64_legacy", inception.resize_legacy, inception.preprocess_legacy),
    ],
)
def test_preprocessing_equals_the_reference(
    case: str,
    resize: Any,
    preprocess: Any,
    golden: dict[str, np.ndarray],
    meta: dict[str, Any],
    params: inception.Params,
    folded: dict[str, tf.Tensor],
) -> None:
    images = golden["in/img64_nhwc_u8"]
    assert zlib.crc32(images.tobytes()) == meta["crc32_img64_nhwc"]
    np.testing.assert_array_equal(images, synthetic(64, 2, 4 * meta["img_mul"], 33))
    crop = np.moveaxis(np.asarray(resize(images))[:, :12, 280:], 3, 1)
    assert error(crop, golden[f"{case}/resized_crop"]) < 1e-6
    forward = tf.function(lambda x: inception.features(folded, preprocess(x)))
    check_outputs(golden, case, forward(images), params)


def test_the_two_ways_to_resize_differ(golden: dict[str, np.ndarray]) -> None:
    images = golden["in/img64_nhwc_u8"]
    difference = inception.resize_legacy(images) - inception.resize_half_pixel(images)
    assert np.abs(difference).max() > 9


def test_legacy_preprocessing_maps_128_to_zero() -> None:
    images = np.full([1, 8, 8, 3], 128, np.uint8)
    images[0, 0, 0] = 0
    x = np.asarray(inception.preprocess_legacy(images))
    assert (x[0, 0, 0] == -1).all() and (x[0, -1, -1] == 0).all()
