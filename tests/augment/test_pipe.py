"""ADA against NVIDIA's values, a plain NumPy resampler, and its own promises."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.augment import controller, warp
from trainer.augment import pipe as pipe_lib
from trainer.augment import windows as windows_lib
from trainer.core.errors import ConfigError

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "ada_debug_percentile.npz"
COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return {
            name: np.transpose(arrays[name], [0, 2, 3, 1])
            for name in arrays.files
            if name != "meta_json"
        }


def golden_cases() -> list[str]:
    with np.load(GOLDEN) as arrays:
        return [name.removesuffix("/out") for name in arrays.files if name.endswith("/out")]


def pipe_of(name: str) -> pipe_lib.AugmentPipe:
    if name in pipe_lib.PIPES:
        return pipe_lib.AugmentPipe.preset(name)
    ops: dict[str, Any] = dict.fromkeys(COLOR if name in ("color", "gray_color") else [name], 1.0)
    return pipe_lib.AugmentPipe(**ops)


def percentile_draws(percentile: float, num: int) -> pipe_lib.Draws:
    """NVIDIA's `debug_percentile`: each draw takes the value at that percentile, every gate opens.

    NVIDIA's code takes erfinv(2u - 1) for a normal (which is the percentile over sqrt(2)),
    erfinv(u) for the noise's sigma, and no second rotation.
    """
    normal = tf.math.erfinv(tf.constant(2 * percentile - 1, tf.float32))

    def fill(value: float | tf.Tensor, count: int) -> tf.Tensor:
        return tf.fill([num] if count == 1 else [num, count], tf.cast(value, tf.float32))

    draws = {
        name: fill(0.0 if name.endswith("_gate") else percentile, count)
        for name, count in pipe_lib.UNIFORM_FIELDS.items()
    }
    draws |= {name: fill(normal, count) for name, count in pipe_lib.NORMAL_FIELDS.items()}
    draws["rotate_post"] = fill(0.5, 1)
    draws["noise"] = fill(tf.math.erfinv(tf.constant(percentile, tf.float32)), 1)
    return draws


def images_of(shape: Sequence[int], dtype: tf.DType = tf.float32, seed: int = 1) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, [seed, 7], -1, 1, dtype)


def seeds_of(*groups: int) -> tf.Tensor:
    return tf.stack([tf.constant([1000 + 17 * g, -5 - g], tf.int32) for g in groups])


def relative_error(actual: tf.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


class TestGolden:
    @pytest.mark.parametrize("case", golden_cases())
    def test_values_and_gradients(self, golden: dict[str, np.ndarray], case: str) -> None:
        name, percentile = case.split("/")
        images = tf.constant(golden["in/gray" if name == "gray_color" else "in/images"])
        draws = percentile_draws(float(percentile), len(images))
        if f"{case}/noise_randn" in golden:
            draws["noise_image"] = tf.constant(golden[f"{case}/noise_randn"])
        with tf.GradientTape() as tape:
            tape.watch(images)
            out = pipe_of(name).apply(images, tf.constant(1.0), draws)
        assert relative_error(out, golden[f"{case}/out"]) < 1e-5
        if f"{case}/dx" in golden:
            dx = tape.gradient(out, images, tf.constant(golden[f"{case}/dy"]))
            assert relative_error(dx, golden[f"{case}/dx"]) < 5e-5

    def test_under_xla(self, golden: dict[str, np.ndarray]) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bgc")

        @tf.function(jit_compile=True)
        def run(images: tf.Tensor, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(images)
                out = pipe.apply(images, 1.0, percentile_draws(0.7, 4), static_shapes=True)
            return out, tape.gradient(out, images, dy)

        out, dx = run(golden["in/images"], golden["bgc/0.7/dy"])
        assert relative_error(out, golden["bgc/0.7/out"]) < 1e-5
        assert relative_error(dx, golden["bgc/0.7/dx"]) < 5e-5


def test_filters_are_what_the_paper_names() -> None:
    # An orthogonal low-pass filter: its even shifts are orthonormal, it sums to one.
    for shift in range(0, 12, 2):
        product = np.dot(warp.LOWPASS[shift:], warp.LOWPASS[: 12 - shift])
        assert product == pytest.approx(0.5 if shift == 0 else 0, abs=1e-10)
    # The bands together let everything through.
    impulse = np.zeros(43)
    impulse[21] = 1
    np.testing.assert_allclose(pipe_lib.FILTER_BANK.sum(axis=0), impulse, atol=1e-10)


def plain_warp(
    image: np.ndarray, linear: np.ndarray, offset: np.ndarray, margin: np.ndarray
) -> np.ndarray:
    """Appendix B.2 step by step for one [H, W] image: pad, upsample, sample, downsample, crop."""
    height, width = image.shape
    (x0, x1), (y0, y1) = margin
    padded = np.pad(image, [(y0, y1), (x0, x1)], mode="reflect")
    dilated = np.zeros([2 * n for n in padded.shape])
    dilated[::2, ::2] = padded
    up = dilated
    for axis in (0, 1):
        up = np.apply_along_axis(
            lambda line: np.convolve(line, 2 * warp.LOWPASS)[5 : 5 + len(line)], axis, up
        )
    rows, columns = 2 * (height + 6), 2 * (width + 6)
    sampled = np.zeros([rows, columns])
    for r in range(rows):
        for c in range(columns):
            # Pixel centres of the output and the upsampled image, in input pixels from the middle.
            out = np.array([(c + 0.5 - columns / 2) / 2, (r + 0.5 - rows / 2) / 2])
            x, y = linear @ (out + 0.25) + offset - 0.25
            x = 2 * (x + width / 2 + x0) - 0.5
            y = 2 * (y + height / 2 + y0) - 0.5
            for j in (int(np.floor(y)), int(np.floor(y)) + 1):
                for i in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= j < up.shape[0] and 0 <= i < up.shape[1]:
                        sampled[r, c] += (1 - abs(y - j)) * (1 - abs(x - i)) * up[j, i]
    for axis in (0, 1):
        sampled = np.apply_along_axis(
            lambda line: np.correlate(line, warp.LOWPASS)[1:-1:2], axis, sampled
        )
    return sampled


@pytest.mark.parametrize("group_size", [2, 4])
def test_warp_equals_the_plain_steps_for_images_with_different_margins(group_size: int) -> None:
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, [4, 20, 28, 1])
    theta, scale = rng.uniform(-3, 3, 4), np.array([0.6, 0.8, 0.9, 1.1])
    linear = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    linear = np.moveaxis(linear, -1, 0) * scale[:, np.newaxis, np.newaxis]
    offset = rng.normal(0, 1.5, [4, 2])

    size = (20, 28)
    margin = warp.margins(tf.constant(linear), tf.constant(offset), size, group_size)
    assert len(np.unique(margin)) > 1
    assert margin.numpy().max() < 19
    expected = [
        plain_warp(images[n, :, :, 0], linear[n], offset[n], margin[n // group_size].numpy())
        for n in range(4)
    ]
    for static_shapes, windows in ((False, False), (True, False), (False, True), (True, True)):
        out = warp.warp(
            tf.constant(images),
            tf.constant(linear),
            tf.constant(offset),
            group_size=group_size,
            static_shapes=static_shapes,
            windows=windows,
        )
        np.testing.assert_allclose(out[..., 0], expected, atol=1e-10)


def test_windows_give_what_looking_up_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients, and gradients of gradients, compiled; of images that are turned, slanted,
    and shrunk and enlarged so much that a tile needs many blocks, and only part of one. The tiles
    are several groups, of which one is filled."""
    monkeypatch.setattr(windows_lib, "_TILES_AT_ONCE", 100)
    rng = np.random.default_rng(4)
    images = tf.constant(rng.uniform(-1, 1, [4, 60, 76, 3]))
    linear = np.eye(2) + rng.normal(0, 0.3, [4, 2, 2])
    linear[2], linear[3] = [[0, 4.5], [-3.5, 0]], [[0.1, 0], [0, 0.2]]
    linear, offset = tf.constant(linear), tf.constant(rng.normal(0, 1.5, [4, 2]))

    def derivatives(windows: bool) -> list[tf.Tensor]:
        with tf.GradientTape() as outer:
            outer.watch(images)
            with tf.GradientTape() as inner:
                inner.watch(images)
                out = warp.warp(
                    images, linear, offset, group_size=2, static_shapes=True, windows=windows
                )
                score = tf.reduce_sum(tf.sin(3 * out))
            slope = inner.gradient(score, images)
            penalty = tf.reduce_sum(tf.square(slope))
        return [out, slope, outer.gradient(penalty, images)]

    compiled = tf.function(lambda: derivatives(True), jit_compile=True, autograph=False)
    for ours, theirs in zip(compiled(), derivatives(False), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_margins_are_the_corners_reach_beyond_the_image() -> None:
    turn = np.array([[[1.0, 0], [0, 1]], [[0, -1], [1, 0]], [[3, 0], [0, 3]]])
    shift = np.array([[0.0, 0], [0.5, 2], [0, 0]])
    margin = warp.margins(tf.constant(turn), tf.constant(shift), (9, 17), 1)
    # A quarter turn of 9 x 17 spans 4 pixels from the centre in x and 8 in y; 6 for the filters.
    np.testing.assert_array_equal(margin[0], [[6, 6], [6, 6]])
    np.testing.assert_array_equal(margin[1], [[2, 3], [8, 8]])
    np.testing.assert_array_equal(margin[2], [[16, 16], [8, 8]])


def test_geometry_is_the_inverse_of_the_operations_in_order() -> None:
    """With random draws and half of the gates open, as 3x3 matrices acting on column vectors."""
    pipe = pipe_lib.AugmentPipe.preset("bg")
    height, width, p = 20, 36, 0.5
    draws = pipe.draw(seeds_of(11), 16, (height, width, 3))
    double = {name: tf.cast(value, tf.float64) for name, value in draws.items()}
    shape = tf.TensorShape([16, height, width, 3])
    linear, offset = pipe._geometry(double, tf.constant(p, tf.float64), shape)

    def turn(angle: float) -> np.ndarray:
        cos, sin = np.cos(angle), np.sin(angle)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def shift(x: float, y: float) -> np.ndarray:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    for n in range(16):
        d = {name: value[n].numpy() for name, value in double.items()}
        p_rot = 1 - np.sqrt(1 - p)
        # What happens to the image, first to last.
        steps = [
            ("xflip", p, np.diag([1 - 2 * np.floor(2 * d["xflip"]), 1, 1])),
            ("rotate90", p, turn(-np.pi / 2 * np.floor(4 * d["rotate90"]))),
            ("xint", p, shift(*np.round((2 * d["xint"] - 1) / 8 * [width, height]))),
            ("scale", p, np.diag([2 ** (0.2 * d["scale"])] * 2 + [1])),
            ("rotate_pre", p_rot, turn(-np.pi * (2 * d["rotate_pre"] - 1))),
            ("aniso", p, np.diag([2 ** (0.2 * d["aniso"]), 2 ** (-0.2 * d["aniso"]), 1])),
            ("rotate_post", p_rot, turn(-np.pi * (2 * d["rotate_post"] - 1))),
            ("xfrac", p, shift(*(d["xfrac"] / 8 * [width, height]))),
        ]
        forward = np.eye(3)
        for name, probability, matrix in steps:
            if d[name + "_gate"] < probability:
                forward = matrix @ forward
        inverse = np.linalg.inv(forward)
        np.testing.assert_allclose(linear[n], inverse[:2, :2], atol=1e-9)
        np.testing.assert_allclose(offset[n], inverse[:2, 2], atol=1e-8)


def test_translation_and_cutout_take_x_first() -> None:
    images = images_of([1, 32, 64, 1])
    pipe = pipe_lib.AugmentPipe(xint=1.0)
    draws = pipe.draw(seeds_of(0), 1, (32, 64, 1))
    draws["xint"] = tf.constant([[0.75, 0.25]])  # by +64/16 and -32/16 pixels
    moved = pipe.apply(images, 1.0, draws)
    np.testing.assert_allclose(moved[:, :-2, 4:], images[:, 2:, :-4], atol=1e-5)

    draws["cutout"] = tf.constant([[1.0, 0.25]])
    cut = pipe_lib.AugmentPipe(cutout=1.0).apply(tf.ones_like(images), 1.0, draws)
    expected = np.ones([1, 32, 64, 1])
    expected[:, :16, 48:] = 0
    np.testing.assert_array_equal(cut, expected)


class TestGroups:
    def test_output_does_not_depend_on_the_neighbours(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bgcfnc")
        images = images_of([8, 16, 16, 3])
        draws = pipe.draw(seeds_of(3, 4), 4, (16, 16, 3))
        both = pipe.apply(images, 0.8, draws, group_size=4)
        for group in (0, 1):
            part = slice(4 * group, 4 * group + 4)
            alone = {name: value[part] for name, value in draws.items()}
            apart = pipe.apply(images[part], 0.8, alone)
            np.testing.assert_allclose(both[part], apart, atol=1e-5)

    def test_whole_call_is_one_group_by_default(self) -> None:
        pipe = pipe_lib.AugmentPipe(scale=1.0)
        images = images_of([2, 16, 16, 1])
        draws = pipe.draw(seeds_of(0), 2, (16, 16, 1))
        # The second image is shrunk so much that, were the margin its own, it would differ.
        draws["scale"] = tf.constant([-6.0, -4.0])
        together = pipe.apply(images, 1.0, draws)
        apart = pipe.apply(images, 1.0, draws, group_size=1)
        np.testing.assert_allclose(together[0], apart[0], atol=1e-6)
        assert np.abs(together[1] - apart[1]).max() > 3e-5

    def test_size_must_divide(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("b")
        draws = pipe.draw(seeds_of(0, 1), 3, (8, 8, 3))
        with pytest.raises(ValueError, match="6 images don't divide into groups of 4"):
            pipe.apply(images_of([6, 8, 8, 3]), 1.0, draws, group_size=4)


class TestDraws:
    def test_depend_on_the_groups_own_seed_only(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bgcfn")
        together = pipe.draw(seeds_of(5, 9, 2), 4, (8, 8, 3))
        alone = pipe.draw(seeds_of(9), 4, (8, 8, 3))
        assert together.keys() == alone.keys()
        for name, value in together.items():
            np.testing.assert_array_equal(value[4:8], alone[name])
            assert not np.array_equal(value[:4], value[4:8])

    def test_shapes_ranges_and_moments(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bgcfn")
        draws = pipe.draw(seeds_of(*range(4)), 2000, (2, 2, 1))
        for name, count in pipe_lib.UNIFORM_FIELDS.items():
            value = draws[name].numpy()
            assert value.shape == ((8000,) if count == 1 else (8000, count))
            assert 0 <= value.min() < 0.01 < 0.99 < value.max() < 1
            assert value.mean() == pytest.approx(0.5, abs=0.02)
        for name, count in pipe_lib.NORMAL_FIELDS.items():
            value = draws[name].numpy()
            assert value.shape == ((8000,) if count == 1 else (8000, count))
            assert value.mean() == pytest.approx(0, abs=0.06)
            assert value.std() == pytest.approx(1, abs=0.04)
        assert draws["noise_image"].shape == [8000, 2, 2, 1]

    def test_fields_are_uncorrelated(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bgcfn")
        draws = pipe.draw(seeds_of(7), 4000, (1, 2, 1))
        columns = np.concatenate([np.reshape(v, [4000, -1]) for v in draws.values()], axis=1)
        correlation = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
        assert np.abs(correlation).max() < 0.08

    def test_image_noise_only_where_the_pipe_has_noise(self) -> None:
        draws = pipe_lib.AugmentPipe.preset("bgcf").draw(seeds_of(0), 4, (8, 8, 3))
        assert "noise_image" not in draws


class TestProbability:
    @pytest.mark.parametrize(
        ("op", "share_of_changed"),
        [
            ("xflip", 0.5),
            ("rotate90", 0.75),
            ("scale", 1.0),
            ("rotate", 1.0),
            ("aniso", 1.0),
            ("xfrac", 1.0),
            ("brightness", 1.0),
            ("contrast", 1.0),
            ("lumaflip", 0.5),
            ("hue", 1.0),
            ("saturation", 1.0),
            ("noise", 1.0),
        ],
    )
    def test_an_operation_happens_with_probability_p(
        self, op: str, share_of_changed: float
    ) -> None:
        multiplier: dict[str, Any] = {op: 0.5}
        pipe = pipe_lib.AugmentPipe(**multiplier)
        images = images_of([3000, 4, 4, 3])
        draws = pipe.draw(seeds_of(1), 3000, (4, 4, 3))
        out = pipe.apply(images, 0.6, draws)
        changed = np.abs(out - images).max(axis=(1, 2, 3)) > 2e-4
        assert changed.mean() == pytest.approx(0.3 * share_of_changed, abs=0.03)

    def test_p_zero_changes_nothing(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bgcfnc")
        images = images_of([4, 16, 24, 3])
        out = pipe.apply(images, 0.0, pipe.draw(seeds_of(1), 4, (16, 24, 3)))
        np.testing.assert_allclose(out, images, atol=1e-5)

    def test_p_is_a_tensor_and_does_not_retrace(self) -> None:
        pipe = pipe_lib.AugmentPipe.preset("bg")
        traces: list[None] = []

        @tf.function
        def run(images: tf.Tensor, seeds: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
            traces.append(None)
            return pipe.apply(images, p, pipe.draw(seeds, 4, (8, 8, 3)), group_size=4)

        images = images_of([4, 8, 8, 3])
        off, on = (run(images, seeds_of(1), tf.constant(p)) for p in (0.0, 1.0))
        assert len(traces) == 1
        assert np.abs(on - off).max() > 0.1


def test_static_shapes_xla_and_eager_agree() -> None:
    pipe = pipe_lib.AugmentPipe.preset("bgcfnc")
    images = images_of([4, 12, 20, 3])
    draws = pipe.draw(seeds_of(1, 2), 2, (12, 20, 3))
    eager = pipe.apply(images, 0.7, draws, group_size=2)

    @tf.function(jit_compile=True)
    def compiled(images: tf.Tensor, draws: pipe_lib.Draws) -> tf.Tensor:
        return pipe.apply(images, 0.7, draws, group_size=2, static_shapes=True)

    static = pipe.apply(images, 0.7, draws, group_size=2, static_shapes=True)
    np.testing.assert_allclose(static, eager, atol=2e-6)
    np.testing.assert_allclose(compiled(images, draws), eager, atol=2e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_second_derivatives(jit_compile: bool) -> None:
    # As in R1: the squared gradient of a critic of augmented images, differentiated again.
    pipe = pipe_lib.AugmentPipe.preset("bgcfnc")
    images = images_of([2, 8, 8, 3], tf.float64)
    draws = pipe.draw(seeds_of(4), 2, (8, 8, 3))

    def critic_gradient(images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(images)
            out = pipe.apply(images, 1.0, draws, static_shapes=jit_compile)
            score = tf.reduce_sum(tf.sin(2 * out))
        return tape.gradient(score, images)

    @tf.function(jit_compile=jit_compile)
    def penalty_gradient(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(images)
            penalty = tf.reduce_sum(critic_gradient(images) ** 2)
        return penalty, tape.gradient(penalty, images)

    direction = images_of([2, 8, 8, 3], tf.float64, seed=2)
    step = 1e-5
    above, _ = penalty_gradient(images + step * direction)
    below, _ = penalty_gradient(images - step * direction)
    _, gradient = penalty_gradient(images)
    assert gradient.dtype == tf.float64
    slope = float(tf.reduce_sum(gradient * direction))
    assert slope == pytest.approx(float(above - below) / (2 * step), rel=1e-6)
    assert abs(slope) > 1


@pytest.mark.parametrize(("channels", "colors"), [(2, 1), (4, 3)])
def test_alpha_follows_the_geometry_and_keeps_its_value(channels: int, colors: int) -> None:
    images = images_of([4, 12, 12, channels])
    pipe = pipe_lib.AugmentPipe.preset("bgc")
    draws = pipe.draw(seeds_of(6), 4, (12, 12, channels))
    out = pipe.apply(images, 0.9, draws)
    geometry = pipe_lib.AugmentPipe.preset("bg").apply(images, 0.9, draws)
    np.testing.assert_allclose(out[..., colors:], geometry[..., colors:], atol=1e-6)
    without_alpha = pipe.apply(images[..., :colors], 0.9, draws)
    np.testing.assert_allclose(out[..., :colors], without_alpha, atol=1e-6)


def test_five_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 channels"):
        pipe_lib.AugmentPipe().apply(images_of([1, 8, 8, 5]), 1.0, {})


def test_presets_add_one_kind_of_operation_each() -> None:
    ops = [pipe_lib.PIPES[name] for name in ("b", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc")]
    assert [len(pipe) for pipe in ops] == [3, 7, 12, 13, 14, 15]
    assert all(small.items() <= large.items() for small, large in itertools.pairwise(ops))
    with pytest.raises(ConfigError, match="'bgz'; choose one of b, bg, bgc"):
        pipe_lib.AugmentPipe.preset("bgz")


def test_colours_can_change_less_often_than_the_rest() -> None:
    """R3GAN's pipeline: half as often, with cutout."""
    pipe = pipe_lib.AugmentPipe.preset("bgc-cutout", color=0.5)
    assert (pipe.brightness, pipe.contrast, pipe.lumaflip, pipe.hue, pipe.saturation) == (0.5,) * 5
    assert (pipe.xflip, pipe.rotate90, pipe.xint, pipe.scale, pipe.rotate) == (1,) * 5
    assert (pipe.aniso, pipe.xfrac, pipe.cutout, pipe.imgfilter, pipe.noise) == (1, 1, 1, 0, 0)


class TestController:
    @pytest.mark.parametrize(
        ("p", "sign_mean", "expected"),
        [
            (0.2, 0.9, 0.2 + 256 / 500_000),
            (0.2, 0.3, 0.2 - 256 / 500_000),
            (0.2, 0.6, 0.2),
            (0.0001, -1.0, 0.0),
            (1.0, 0.9, 1.0 + 256 / 500_000),
        ],
    )
    def test_one_step(self, p: float, sign_mean: float, expected: float) -> None:
        new = controller.adjust(tf.constant(p), tf.constant(sign_mean), 256, 0.6, 500)
        assert float(new) == pytest.approx(expected, abs=1e-7)

    def test_full_range_takes_adjust_kimg(self) -> None:
        p = tf.constant(0.0)
        for _ in range(100):
            p = controller.adjust(p, tf.constant(1.0), 100, 0.6, 10)
        assert float(p) == pytest.approx(1.0, abs=1e-5)
