"""The layers against NVIDIA's values, plain NumPy forms, and their own derivatives."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.layers import ops, winograd

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
BACKENDS = pytest.mark.parametrize("backend", list(ops.Backend))
# The goldens' own rounding is about 4e-7; gradients of weights sum over more terms.
TOLERANCE = 2e-6


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name) as arrays:
        return dict(arrays)


def cases(name: str, key: str = "case") -> list[Any]:
    """One test for each entry of a golden's description that has `key`."""
    with np.load(GOLDENS / name) as arrays:
        entries = json.loads(str(arrays["meta_json"]))
    return [pytest.param(entry, id=str(entry[key])) for entry in entries if key in entry]


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, 3)


def hwio(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, [2, 3, 1, 0])


def error(actual: Any, expected: Any) -> float:
    """The largest difference relative to the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def value_and_gradients(
    function: Callable[..., tf.Tensor], inputs: list[tf.Tensor], dy: np.ndarray
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
    return y, tape.gradient(y, inputs, tf.constant(dy, y.dtype))


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# ---------------------------------------------------------------- upfirdn2d


@BACKENDS
@pytest.mark.parametrize("case", cases("op_upfirdn2d.npz"))
def test_upfirdn2d_golden(case: dict[str, Any], backend: ops.Backend) -> None:
    golden = load("op_upfirdn2d.npz")
    prefix = f"{case['case']}/"
    taps = golden[prefix + "f"].astype(np.float64) if case["has_f"] else np.ones([1])
    # NVIDIA's order is x before y.
    left, right, top, bottom = case["padding"]
    up, down = (
        tuple(value[::-1]) if isinstance(value, list) else value
        for value in (case["up"], case["down"])
    )
    y, (dx,) = value_and_gradients(
        lambda x: ops.upfirdn2d(
            x,
            taps,
            up,
            down,
            (top, bottom, left, right),
            case["gain"],
            case["flip_filter"],
            backend,
        ),
        [tf.constant(nhwc(golden[prefix + "x"]))],
        nhwc(golden[prefix + "dy"]),
    )
    assert error(y, nhwc(golden[prefix + "y"])) < TOLERANCE
    assert error(dx, nhwc(golden[prefix + "dx"])) < TOLERANCE


@BACKENDS
@pytest.mark.parametrize("name", ["upsample2d", "downsample2d", "filter2d"])
def test_resampling_golden(name: str, backend: ops.Backend) -> None:
    golden = load("op_upfirdn2d.npz")
    taps = golden[f"{name}/f"].astype(np.float64)
    size = len(taps)
    functions: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
        "upsample2d": lambda x: ops.upsample2d(x, taps, backend),
        "downsample2d": lambda x: ops.downsample2d(x, taps, backend),
        "filter2d": lambda x: ops.upfirdn2d(
            x, taps, padding=(size // 2, (size - 1) // 2) * 2, backend=backend
        ),
    }
    y, (dx,) = value_and_gradients(
        functions[name], [tf.constant(nhwc(golden[f"{name}/x"]))], nhwc(golden[f"{name}/dy"])
    )
    assert error(y, nhwc(golden[f"{name}/y"])) < TOLERANCE
    assert error(dx, nhwc(golden[f"{name}/dx"])) < TOLERANCE


@BACKENDS
@pytest.mark.parametrize(
    ("up", "down", "padding"), [(2, 1, (2, 1, 2, 1)), (1, 2, (1, 1, 1, 1)), (2, 3, (3, 0, -1, 2))]
)
def test_second_derivative_of_upfirdn2d(
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    backend: ops.Backend,
    rng: np.random.Generator,
) -> None:
    """The derivative of a function of the gradient, as R1 and path length take it."""
    taps = ops.setup_filter([1, 3, 2, 5])
    x, direction = (tf.constant(rng.standard_normal([1, 7, 6, 2])) for _ in range(2))

    def squared_gradient(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.tanh(ops.upfirdn2d(x, taps, up, down, padding, backend=backend)))
        return tf.reduce_sum(tf.square(tape.gradient(y, x)))

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = squared_gradient(x)
    slope = tf.reduce_sum(tape.gradient(value, x) * direction)
    step = 1e-5
    ahead, behind = squared_gradient(x + step * direction), squared_gradient(x - step * direction)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


def test_unknown_batch_size(rng: np.random.Generator) -> None:
    """A graph whose batch is open gives what one of known shapes gives."""
    x = tf.constant(rng.standard_normal([3, 6, 4, 2]), tf.float32)
    for backend in ops.Backend:

        def resample(x: tf.Tensor, backend: ops.Backend = backend) -> tf.Tensor:
            x = ops.upsample2d(x, ops.RESAMPLE_FILTER, backend)
            return ops.downsample2d(x, ops.RESAMPLE_FILTER, backend)

        signature = [tf.TensorSpec([None, 6, 4, 2])]
        graph = tf.function(resample, input_signature=signature)
        np.testing.assert_allclose(graph(x), resample(x), rtol=1e-6, atol=1e-6)


@BACKENDS
def test_constant_images_keep_their_value(backend: ops.Backend) -> None:
    image = tf.fill([1, 12, 8, 1], 3.0)
    larger = ops.upsample2d(image, ops.RESAMPLE_FILTER, backend)
    smaller = ops.downsample2d(image, ops.RESAMPLE_FILTER, backend)
    assert larger.shape == [1, 24, 16, 1]
    assert smaller.shape == [1, 6, 4, 1]
    # Zeros beyond the border darken it.
    np.testing.assert_allclose(larger[:, 2:-2, 2:-2], 3, rtol=1e-6)
    np.testing.assert_allclose(smaller[:, 1:-1, 1:-1], 3, rtol=1e-6)


# ---------------------------------------------------------------- convolution


def flip_like_nvidia(weight: tf.Tensor, case: dict[str, Any]) -> tf.Tensor:
    """NVIDIA's `flip_weight` chooses what we derive from the direction of resampling."""
    return weight[::-1, ::-1] if case["flip_weight"] != (case["up"] == 1) else weight


@BACKENDS
@pytest.mark.parametrize("case", cases("op_conv_resample_bias_act.npz"))
def test_conv2d_resample_golden(case: dict[str, Any], backend: ops.Backend) -> None:
    golden = load("op_conv_resample_bias_act.npz")
    prefix = f"{case['case']}/"
    y, (dx, dw) = value_and_gradients(
        lambda x, w: ops.conv2d_resample(
            x, flip_like_nvidia(w, case), up=case["up"], down=case["down"], backend=backend
        ),
        [tf.constant(nhwc(golden[prefix + "x"])), tf.constant(hwio(golden[prefix + "w"]))],
        nhwc(golden[prefix + "dy"]),
    )
    assert error(y, nhwc(golden[prefix + "y"])) < TOLERANCE
    assert error(dx, nhwc(golden[prefix + "dx"])) < TOLERANCE
    assert error(dw, hwio(golden[prefix + "dw"])) < TOLERANCE


def naive_correlation(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [H, W, in], kernel [k, k, in, out]: "valid" correlation."""
    size = kernel.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))
    return np.einsum("hwiyx,yxio->hwo", windows, kernel)


def naive_conv2d_resample(x: np.ndarray, kernel: np.ndarray, up: int, down: int) -> np.ndarray:
    """Stuffs, pads, filters, convolves and drops samples, one after the other, as defined."""
    size, channels = kernel.shape[0], x.shape[2]
    taps = np.array([1, 3, 3, 1]) / 8
    blur = np.einsum("y,x,io->yxio", taps, taps, np.eye(channels))
    pad = size // 2
    if up == 2:
        stuffed = np.zeros([2 * x.shape[0], 2 * x.shape[1], channels])
        stuffed[::2, ::2] = x
        padded = np.pad(stuffed, [(2 + pad, 1 + pad)] * 2 + [(0, 0)])
        return naive_correlation(naive_correlation(padded, blur * 4), kernel[::-1, ::-1])
    if down == 2:
        padded = np.pad(x, [(1 + pad, 1 + pad)] * 2 + [(0, 0)])
        return naive_correlation(naive_correlation(padded, blur), kernel)[::2, ::2]
    return naive_correlation(np.pad(x, [(pad, pad)] * 2 + [(0, 0)]), kernel)


@BACKENDS
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("shape", "up", "down"),
    [((5, 7), 2, 1), ((1, 4), 2, 1), ((10, 14), 1, 2), ((4, 6), 1, 2), ((5, 6), 1, 1)],
)
def test_conv2d_resample_against_its_definition(
    shape: tuple[int, int],
    up: int,
    down: int,
    size: int,
    backend: ops.Backend,
    rng: np.random.Generator,
) -> None:
    x = rng.standard_normal([2, *shape, 3])
    weight = rng.standard_normal([size, size, 3, 4])
    y = ops.conv2d_resample(tf.constant(x), tf.constant(weight), up=up, down=down, backend=backend)
    expected = np.stack([naive_conv2d_resample(image, weight, up, down) for image in x])
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


def derivatives(
    function: Callable[..., tf.Tensor], inputs: list[tf.Tensor], rng: np.random.Generator
) -> list[np.ndarray]:
    """Value, gradients, and gradients of a function of these gradients."""
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            y = function(*inputs)
            total = tf.reduce_sum(tf.sin(y))
        first = inner.gradient(total, inputs)
        mixed = tf.add_n([tf.reduce_sum(tf.square(g) * rng.random(g.shape)) for g in first])
    return [value.numpy() for value in (y, *first, *outer.gradient(mixed, inputs))]


def compare_formulas(function: Callable[..., tf.Tensor], inputs: list[np.ndarray]) -> None:
    """Every backend in float64, to the second derivative."""
    results = [
        derivatives(
            lambda *tensors, backend=backend: function(*tensors, backend=backend),
            [tf.constant(array) for array in inputs],
            np.random.default_rng(1),
        )
        for backend in ops.Backend
    ]
    for values in zip(*results, strict=True):
        for ours in values[:-1]:
            assert error(ours, values[-1]) < 1e-12


@pytest.mark.parametrize(
    ("shape", "inputs", "outputs", "fast"),
    [
        ((2, 16, 16), 128, 129, True),
        ((1, 8, 32), 130, 128, True),
        ((1, 32, 10), 128, 128, True),
        ((1, 17, 16), 128, 128, False),
        ((1, 16, 17), 128, 128, False),
        ((1, 16, 16), 127, 128, False),
        ((1, 8, 8), 128, 128, False),
    ],
)
def test_formulas_of_conv2d_agree(
    shape: tuple[int, int, int],
    inputs: int,
    outputs: int,
    fast: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On either side of each limit of the fast algorithm, which is really taken where it can be."""
    product = winograd._product
    calls = []

    def counted(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        calls.append(x.shape)
        return product(x, weight)

    monkeypatch.setattr(winograd, "_product", counted)
    x = rng.standard_normal([*shape, inputs])
    weight = rng.standard_normal([3, 3, inputs, outputs]) / 10
    compare_formulas(ops.conv2d, [x, weight])
    assert bool(calls) == fast


@BACKENDS
def test_conv2d_is_a_correlation(backend: ops.Backend, rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal([2, 16, 18, 16]), rng.standard_normal([3, 3, 16, 18])
    y = ops.conv2d(tf.constant(x), tf.constant(weight), backend)
    expected = [naive_correlation(np.pad(v, [(1, 1), (1, 1), (0, 0)]), weight) for v in x]
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("up", [1, 2])
def test_formulas_of_modulated_conv2d_agree(up: int, rng: np.random.Generator) -> None:
    shapes = [2, 16, 16, 16], [3, 3, 16, 17], [2, 16]
    x, weight, styles = (rng.standard_normal(shape) for shape in shapes)
    compare_formulas(
        lambda x, w, s, backend: ops.modulated_conv2d(x, w, s, up=up, backend=backend),
        [x, weight, styles],
    )


def test_formulas_of_bias_act_agree(rng: np.random.Generator) -> None:
    compare_formulas(
        lambda x, bias, backend: ops.bias_act(x, bias, "swish", backend=backend),
        [rng.standard_normal([2, 4, 3, 5]), rng.standard_normal([5])],
    )


@BACKENDS
@pytest.mark.parametrize("case", cases("op_modulated_conv2d.npz"))
def test_modulated_conv2d_golden(case: dict[str, Any], backend: ops.Backend) -> None:
    golden = load("op_modulated_conv2d.npz")
    prefix = f"{case['case']}/"
    noise = tf.constant(nhwc(golden[prefix + "noise"])) if case["noise"] else None
    y, (dx, dw, ds) = value_and_gradients(
        lambda x, w, s: ops.modulated_conv2d(
            x,
            flip_like_nvidia(w, case),
            s,
            noise,
            case["up"],
            case["demodulate"],
            backend=backend,
        ),
        [
            tf.constant(nhwc(golden[prefix + "x"])),
            tf.constant(hwio(golden[prefix + "w"])),
            tf.constant(golden[prefix + "s"]),
        ],
        nhwc(golden[prefix + "dy"]),
    )
    assert error(y, nhwc(golden[prefix + "y"])) < TOLERANCE
    assert error(dx, nhwc(golden[prefix + "dx"])) < TOLERANCE
    assert error(dw, hwio(golden[prefix + "dw"])) < TOLERANCE
    assert error(ds, golden[prefix + "ds"]) < TOLERANCE


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("up", "size"), [(1, 3), (2, 3), (1, 1)])
def test_modulated_conv2d_equals_one_weight_per_sample(
    up: int, size: int, demodulate: bool, rng: np.random.Generator
) -> None:
    """Equations 1 and 3 of StyleGAN2 as they are written."""
    x = tf.constant(rng.standard_normal([3, 5, 4, 6]))
    weight = tf.constant(rng.standard_normal([size, size, 6, 7]))
    styles = tf.constant(rng.standard_normal([3, 6]))
    rows = []
    for sample in range(3):
        own = weight * styles[sample][:, tf.newaxis]
        if demodulate:
            own /= tf.sqrt(tf.reduce_sum(tf.square(own), [0, 1, 2]) + 1e-8)
        rows.append(ops.conv2d_resample(x[sample : sample + 1], own, up=up))
    y = ops.modulated_conv2d(x, weight, styles, up=up, demodulate=demodulate)
    np.testing.assert_allclose(y, tf.concat(rows, 0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 3e3])
def test_float16_modulation_stays_in_range(scale: float, rng: np.random.Generator) -> None:
    """Weights times styles of 1e7 would be infinite in float16; demodulation cancels the scale."""
    x = rng.standard_normal([2, 6, 6, 32]).astype(np.float32)
    weight = rng.standard_normal([3, 3, 32, 8]).astype(np.float32) * scale
    styles = rng.standard_normal([2, 32]).astype(np.float32) * scale
    expected = ops.modulated_conv2d(tf.constant(x), tf.constant(weight), tf.constant(styles))
    actual = ops.modulated_conv2d(
        tf.constant(x, tf.float16), tf.constant(weight), tf.constant(styles)
    )
    assert actual.dtype == tf.float16
    assert error(actual, expected) < 5e-3


# ---------------------------------------------------------------- everything else


@BACKENDS
@pytest.mark.parametrize("case", cases("op_conv_resample_bias_act.npz", "bias_act"))
def test_bias_act_golden(case: dict[str, Any], backend: ops.Backend) -> None:
    golden = load("op_conv_resample_bias_act.npz")
    prefix = f"bias_act{case['bias_act']}/"
    y, (dx, db) = value_and_gradients(
        lambda x, b: ops.bias_act(
            x,
            b,
            case["act"],
            case.get("alpha", 0.2),
            case.get("gain"),
            case.get("clamp"),
            backend,
        ),
        [tf.constant(nhwc(golden[prefix + "x"])), tf.constant(golden[prefix + "b"])],
        nhwc(golden[prefix + "dy"]),
    )
    assert error(y, nhwc(golden[prefix + "y"])) < TOLERANCE
    assert error(dx, nhwc(golden[prefix + "dx"])) < TOLERANCE
    assert error(db, golden[prefix + "db"]) < TOLERANCE


def test_bias_act_without_bias_and_with_second_derivatives() -> None:
    x = tf.constant([-2.0, -0.5, 0.5, 2.0], tf.float64)
    np.testing.assert_allclose(ops.bias_act(x), x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = ops.bias_act(x, None, "lrelu", clamp=2.0)
        slope = inner.gradient(y, x)
    root = np.sqrt(2)
    np.testing.assert_allclose(y, [-0.4 * root, -0.1 * root, 0.5 * root, 2.0])
    np.testing.assert_allclose(slope, [0.2 * root, 0.2 * root, root, 0.0])
    curvature = outer.gradient(slope, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    np.testing.assert_array_equal(curvature, np.zeros(4))


def test_normalize_2nd_moment(rng: np.random.Generator) -> None:
    x = rng.standard_normal([5, 16]) * np.array([[1e-3], [1], [10], [1e3], [0]])
    expected = x / np.sqrt(np.mean(x**2, 1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(ops.normalize_2nd_moment(tf.constant(x)), expected, rtol=1e-12)


def test_minibatch_stddev(rng: np.random.Generator) -> None:
    x = rng.standard_normal([6, 4, 2, 5])
    y = ops.minibatch_stddev(tf.constant(x), 3).numpy()
    np.testing.assert_array_equal(y[..., :5], x)
    for group in (slice(0, 3), slice(3, 6)):
        spread = np.mean(np.sqrt(np.var(x[group], 0) + 1e-8))
        np.testing.assert_allclose(y[group, ..., 5], spread, rtol=1e-12)


def test_minibatch_stddev_of_a_group_ignores_other_groups(rng: np.random.Generator) -> None:
    x = rng.standard_normal([8, 4, 4, 3]).astype(np.float32)
    changed = x.copy()
    changed[4:] *= 100
    before, after = (ops.minibatch_stddev(tf.constant(v), 4).numpy() for v in (x, changed))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.all(after[4:, ..., 3] > 50 * before[4:, ..., 3])


def test_minibatch_stddev_of_equal_samples_has_finite_gradients() -> None:
    x = tf.ones([4, 2, 2, 1])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = ops.minibatch_stddev(x, 4)
    np.testing.assert_allclose(y[..., 1], 1e-4, rtol=1e-5)
    assert np.all(np.isfinite(tape.gradient(y, x)))
