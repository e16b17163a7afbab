"""Generator and discriminator against NVIDIA's values, and what their options promise."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.core.errors import ConfigError
from trainer.families.network import Network
from trainer.families.stylegan2.networks import Discriminator, Generator
from trainer.layers import ops, packing

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
SMALL: dict[str, Any] = {"channel_base": 256, "channel_max": 16}
# The goldens' own rounding: 3e-6 for images and logits, 5e-5 for gradients.
VALUES, GRADIENTS = 1e-5, 2e-4

Arrays = dict[str, np.ndarray]


def load(name: str) -> Arrays:
    with np.load(GOLDENS / name) as arrays:
        return dict(arrays)


def part(golden: Arrays, prefix: str) -> Arrays:
    return {name[len(prefix) :]: golden[name] for name in golden if name.startswith(prefix)}


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, 3)


def constants(arrays: Mapping[str, np.ndarray], dtype: tf.DType = tf.float32) -> dict[str, Any]:
    return {name: tf.constant(array, dtype) for name, array in arrays.items()}


def error(actual: Any, expected: Any) -> float:
    """The largest difference relative to the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def randomized(network: Network, seed: int = 0) -> Arrays:
    """Parameters of which none is zero or one, so that no path is trivially right."""
    rng = np.random.default_rng(seed)
    return {
        name: (value + 0.3 * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in network.init(seed).items()
    }


def small_generator(**kwargs: Any) -> Generator:
    defaults = dict(z_dim=8, c_dim=0, w_dim=12, resolution=(16, 16), mapping_layers=2, **SMALL)
    return Generator(**{**defaults, **kwargs})


def small_discriminator(**kwargs: Any) -> Discriminator:
    defaults = dict(c_dim=0, resolution=(16, 16), mapping_layers=2, **SMALL)
    return Discriminator(**{**defaults, **kwargs})


def normal(*shape: int, seed: int = 1) -> tf.Tensor:
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), tf.float32)


def one_hot(classes: list[int], depth: int) -> tf.Tensor:
    return tf.one_hot(classes, depth)


def nothing(batch: int) -> tf.Tensor:
    return tf.zeros([batch, 0])


def nothing64(batch: int) -> tf.Tensor:
    return tf.zeros([batch, 0], tf.float64)


# ---------------------------------------------------------------- goldens


def golden_generator(backend: ops.Backend = ops.Backend.XLA_CPU) -> Generator:
    return Generator(
        z_dim=64,
        c_dim=0,
        w_dim=64,
        resolution=(64, 64),
        mapping_layers=3,
        channel_base=2048,
        channel_max=64,
        backend=backend,
    )


@pytest.fixture(scope="module")
def net64() -> tuple[Arrays, Generator, dict[str, Any]]:
    golden, generator = load("sg2_net64_c0.npz"), golden_generator()
    return golden, generator, constants(generator.from_nvidia(part(golden, "G/")))


def test_mapping_golden(net64: tuple[Arrays, Generator, dict[str, Any]]) -> None:
    golden, generator, params = net64
    ws = generator.mapping(params, tf.constant(golden["in/z"]), nothing(8))
    assert ws.shape == [8, generator.num_ws, 64]
    for layer in range(generator.num_ws):
        assert error(ws[:, layer], golden["out/ws"]) < VALUES


@pytest.mark.parametrize(
    ("name", "psi", "cutoff"),
    [("img_psi1", 1.0, None), ("img_psi0.5", 0.5, None), ("img_psi0.5_cutoff4", 0.5, 4)],
)
def test_images_and_truncation_golden(
    net64: tuple[Arrays, Generator, dict[str, Any]], name: str, psi: float, cutoff: int | None
) -> None:
    golden, generator, params = net64
    ws = generator.mapping(params, tf.constant(golden["in/z"][:1]), nothing(1), psi, cutoff)
    assert error(generator.synthesis(params, ws), nhwc(golden[f"out/{name}"])) < VALUES


def test_images_without_noise_golden(net64: tuple[Arrays, Generator, dict[str, Any]]) -> None:
    golden, generator, params = net64
    ws = generator.mapping(params, tf.constant(golden["in/z"][:1]), nothing(1))
    images = generator.synthesis(params, ws, generator.noise(params, "none"))
    assert error(images, nhwc(golden["out/img_nonoise"])) < VALUES


def test_style_mixing_golden(net64: tuple[Arrays, Generator, dict[str, Any]]) -> None:
    golden, generator, params = net64
    z = tf.constant(golden["in/z"])
    first, second = (generator.mapping(params, z[i : i + 1], nothing(1)) for i in (0, 2))
    ws = tf.concat([first[:, :5], second[:, 5:]], 1)
    assert error(generator.synthesis(params, ws), nhwc(golden["out/img_mix5"])) < VALUES


@pytest.mark.parametrize("backend", list(ops.Backend))
def test_path_length_gradients_golden(
    net64: tuple[Arrays, Generator, dict[str, Any]], backend: ops.Backend
) -> None:
    """Second-order gradients through the whole generator, parameter by parameter.

    In float64, as one activation of the first sample (layer 6, pixel 30,15, channel 40) is 5e-7
    where others are 4: which side of the leaky ReLU's kink it falls on in float32 depends on how a
    processor's convolution rounds, and the gradient jumps by 5e-3 of the largest.
    """
    golden, dtype = net64[0], tf.float64
    generator = golden_generator(backend)
    params = constants(generator.from_nvidia(part(golden, "G/")), dtype)
    z, pl_noise = (tf.constant(a, dtype) for a in (golden["in/z"][:4], nhwc(golden["pl/noise"])))
    weights = {name: params[name] for name in generator.trainable_names()}
    with tf.GradientTape() as tape:
        tape.watch(weights)
        ws = generator.mapping({**params, **weights}, z, tf.zeros([4, 0], dtype))
        with tf.GradientTape() as inner:
            inner.watch(ws)
            images = generator.synthesis({**params, **weights}, ws)
            total = tf.reduce_sum(images * pl_noise)
        ws_gradients = inner.gradient(total, ws)
        lengths = tf.sqrt(tf.reduce_mean(tf.reduce_sum(tf.square(ws_gradients), 2), 1))
        before = tf.constant(golden["pl/mean_before"], dtype)
        mean = before + 0.01 * (tf.reduce_mean(lengths) - before)
        loss = tf.reduce_mean(2 * tf.square(lengths - mean))
    assert error(ws_gradients, golden["pl/grads_wrt_ws"]) < VALUES
    assert error(lengths, golden["pl/lengths"]) < VALUES
    grads = tape.gradient(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    ours = generator.to_nvidia({**params, **grads})
    full, statistics = part(golden, "pl/grad_full/"), part(golden, "pl/grad_stat/")
    assert set(statistics) == set(weights)
    for name, expected in full.items():
        assert error(ours[name], expected) < GRADIENTS, name
    for name, expected in statistics.items():
        value = ours[name].astype(np.float64)
        absolute = np.abs(value)
        # The sum may cancel: its rounding is that of its terms. So it is with noise strengths,
        # each one such sum.
        allowed = GRADIENTS * (10 if "noise_strength" in name else 1)
        scale = np.maximum(expected[[2, 1, 2, 3]], 1e-12)
        found = np.array([value.sum(), (value**2).sum(), absolute.sum(), absolute.max()])
        assert np.all(np.abs(found - expected) <= allowed * scale), name


@pytest.fixture(scope="module")
def trace32() -> tuple[Arrays, Generator, Discriminator]:
    golden = load("sg2_train_trace_c0.npz")
    sizes: dict[str, Any] = {"resolution": (32, 32), "channel_base": 512, "channel_max": 32}
    generator = Generator(z_dim=32, c_dim=0, w_dim=32, mapping_layers=2, **sizes)
    return golden, generator, Discriminator(c_dim=0, mapping_layers=2, **sizes)


def test_both_networks_golden(trace32: tuple[Arrays, Generator, Discriminator]) -> None:
    """Logits of fakes and the generator's gradient through the residual discriminator."""
    golden, generator, discriminator = trace32
    g = constants(generator.from_nvidia(part(golden, "G0/")))
    d = constants(discriminator.from_nvidia(part(golden, "D0/")))
    # NVIDIA's group n mod 2 is ours when the even samples come first.
    z = tf.constant(golden["it1/Gmain/z"][[0, 2, 4, 6, 1, 3, 5, 7]])
    weights = {name: g[name] for name in generator.trainable_names()}
    with tf.GradientTape() as tape:
        tape.watch(weights)
        params = {**g, **weights}
        images = generator.synthesis(params, generator.mapping(params, z, nothing(8)))
        logits = discriminator(d, images, nothing(8))
        loss = tf.reduce_mean(tf.nn.softplus(-logits))
    grads = tape.gradient(loss, weights)
    assert error(tf.reduce_mean(logits)[tf.newaxis], golden["it1/Gmain/scores/fake"]) < VALUES
    assert error(loss[tf.newaxis], golden["it1/Gmain/G/loss"]) < VALUES
    energy = sum(float(tf.reduce_sum(tf.square(grad))) for grad in grads.values())
    assert error(energy, golden["it1/Gmain/grad_sumsq"]) < GRADIENTS


def test_skip_discriminator_golden() -> None:
    golden = load("sg2_D32_skip.npz")
    discriminator = Discriminator(
        c_dim=0,
        resolution=(32, 32),
        channel_base=512,
        channel_max=32,
        architecture="skip",
        mbstd_group_size=8,
    )
    params = constants(discriminator.from_nvidia(part(golden, "D/")))
    logits = discriminator(params, tf.constant(nhwc(golden["in/img"])), nothing(8))
    assert error(logits, golden["out/logits"]) < VALUES
    assert set(part(golden, "D/")) == set(discriminator.specs)


def test_resnet_generator_golden() -> None:
    golden = load("sg2_G32_resnet.npz")
    generator = Generator(
        z_dim=32,
        c_dim=0,
        w_dim=32,
        resolution=(32, 32),
        mapping_layers=2,
        channel_base=512,
        channel_max=32,
        architecture="resnet",
    )
    params = constants(generator.from_nvidia(part(golden, "G/")))
    ws = generator.mapping(params, tf.constant(golden["in/z"]), nothing(4))
    assert error(generator.synthesis(params, ws), nhwc(golden["out/img"])) < VALUES
    assert set(part(golden, "G/")) == set(generator.specs)


def test_names_are_nvidias(
    net64: tuple[Arrays, Generator, dict[str, Any]],
    trace32: tuple[Arrays, Generator, Discriminator],
) -> None:
    def names(golden: Arrays, prefix: str) -> set[str]:
        return {name for name in part(golden, prefix) if not name.endswith("resample_filter")}

    assert set(net64[1].specs) == names(net64[0], "G/")
    assert set(trace32[1].specs) == names(trace32[0], "G0/")
    assert set(trace32[2].specs) == names(trace32[0], "D0/")
    buffers = {name for name, spec in net64[1].specs.items() if not spec.trainable}
    assert buffers == {
        name for name in net64[1].specs if name.endswith(("noise_const", "mapping.w_avg"))
    }


def test_trace_settings_match(trace32: tuple[Arrays, Generator, Discriminator]) -> None:
    """The golden was made for the network that `trace32` builds."""
    meta = json.loads(str(trace32[0]["meta_json"]))
    assert (meta["res"], meta["channel_base"], meta["channel_max"]) == (32, 512, 32)
    assert meta["mbstd_group"] == trace32[2].mbstd_group_size


# ---------------------------------------------------------------- architectures and shapes


def layers(network: Network) -> set[str]:
    """The names above `weight`, `bias` and the like."""
    return {name.rpartition(".")[0] for name in network.specs if "mapping" not in name}


def test_orig_generator_converts_to_rgb_once() -> None:
    skip, orig = layers(small_generator()), layers(small_generator(architecture="orig"))
    assert skip - orig == {
        f"synthesis.{block}.{layer}"
        for block in ("b4", "b8")
        for layer in ("torgb", "torgb.affine")
    }
    assert not orig - skip
    resnet = layers(small_generator(architecture="resnet"))
    assert resnet - orig == {"synthesis.b8.skip", "synthesis.b16.skip"}


def test_orig_discriminator_has_one_path() -> None:
    orig = layers(small_discriminator(architecture="orig"))
    assert layers(small_discriminator()) - orig == {"b8.skip", "b16.skip"}
    assert layers(small_discriminator(architecture="skip")) - orig == {"b8.fromrgb", "b4.fromrgb"}
    assert "b16.fromrgb" in orig


def test_num_ws_is_nvidias() -> None:
    """Two for each resolution, whatever the architecture: 2 log2(resolution) - 2."""
    for architecture in ("skip", "resnet", "orig"):
        assert small_generator(architecture=architecture).num_ws == 6
    assert small_generator(resolution=(1024, 1024), channel_base=1024).num_ws == 18


def test_each_w_reaches_the_image_from_its_layer_on() -> None:
    """NVIDIA's order of ws: a block's conversion to RGB shares the next block's first."""
    generator = small_generator(architecture="orig")
    params = constants(randomized(generator))
    ws = generator.mapping(params, normal(1, 8), nothing(1))
    with tf.GradientTape() as tape:
        tape.watch(ws)
        image = generator.synthesis(params, ws)
    grads = tape.gradient(image, ws)
    assert np.all(np.any(np.asarray(grads) != 0, (0, 2)))
    # With everything else frozen, w number 5 acts through the last conversion to RGB alone.
    params["synthesis.b16.torgb.affine.weight"] *= 0
    with tf.GradientTape() as tape:
        tape.watch(ws)
        image = generator.synthesis(params, ws)
    assert np.any(np.asarray(tape.gradient(image, ws)) != 0, (0, 2)).tolist() == [True] * 5 + [
        False
    ]


@pytest.mark.parametrize(
    ("resolution", "grid", "channels"),
    [
        ((16, 16), (4, 4), 4),
        ((32, 16), (8, 4), 1),
        ((24, 40), (6, 10), 2),
        ((96, 96), (6, 6), 3),
    ],
)
def test_shapes(resolution: tuple[int, int], grid: tuple[int, int], channels: int) -> None:
    generator = small_generator(resolution=resolution, img_channels=channels)
    discriminator = small_discriminator(resolution=resolution, img_channels=channels)
    g, d = generator.init(0), discriminator.init(0)
    assert g["synthesis.b4.const"].shape == (*grid, 16)
    assert d["b4.fc.weight"].shape == (grid[0] * grid[1] * 16, 16)
    ws = generator.mapping(constants(g), normal(4, 8), nothing(4))
    images = generator.synthesis(constants(g), ws)
    assert images.shape == [4, *resolution, channels]
    assert 0.01 < float(tf.math.reduce_std(images)) < 10
    logits = discriminator(constants(d), images, nothing(4))
    assert logits.shape == [4, 1]
    assert np.all(np.isfinite(logits))


def test_impossible_resolution_is_refused() -> None:
    for build in (small_generator, small_discriminator):
        with pytest.raises(ConfigError, match="nearest"):
            build(resolution=(50, 51))


def test_channels_follow_the_nominal_resolution() -> None:
    generator = small_generator(resolution=(64, 32), channel_base=512, channel_max=64)
    assert [(b.name, b.height, b.width, b.outputs) for b in generator.blocks] == [
        ("b4", 8, 4, 64),
        ("b8", 16, 8, 64),
        ("b16", 32, 16, 32),
        ("b32", 64, 32, 16),
    ]


@pytest.mark.parametrize(
    ("g_architecture", "d_architecture"), [("skip", "resnet"), ("resnet", "skip")]
)
@pytest.mark.parametrize(
    ("pack_channels", "max_block", "blocks"),
    [(0, 4, [1, 1, 1]), (16, 4, [1, 1, 2]), (128, 4, [1, 2, 4]), (128, 2, [1, 2, 2])],
)
def test_backends_give_the_same_networks(
    g_architecture: str,
    d_architecture: str,
    pack_channels: int,
    max_block: int,
    blocks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images, logits and gradients. On TPUs with no map packed, the finest, all on one grid, and
    all, on several grids."""
    monkeypatch.setattr(packing, "PACK_CHANNELS", pack_channels)
    monkeypatch.setattr(packing, "_PACK_MAX_BLOCK", max_block)
    results = []
    for backend in ops.Backend:
        shared: dict[str, Any] = {
            "resolution": (32, 16),
            "channel_base": 128,
            "backend": backend,
        }
        generator = small_generator(architecture=g_architecture, **shared)
        discriminator = small_discriminator(architecture=d_architecture, **shared)
        expected = blocks if backend is ops.Backend.TPU else [1, 1, 1]
        assert [block.stage.block for block in generator.blocks] == expected
        assert [block.stage.block for block in discriminator.blocks] == expected[:0:-1]
        g, d = (constants(randomized(n), tf.float64) for n in (generator, discriminator))
        random = normal(4, sum(height * width for height, width in generator.noise_shapes))
        with tf.GradientTape() as tape:
            tape.watch((g, d))
            ws = generator.mapping(g, tf.cast(normal(4, 8), tf.float64), nothing64(4))
            noise = generator.noise(g, "random", tf.cast(random, tf.float64))
            images = generator.synthesis(g, ws, noise)
            logits = discriminator(d, images, nothing64(4))
        grads = tape.gradient(logits, (g, d), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        results.append([images, logits, *tf.nest.flatten(grads)])
    for values in zip(*results, strict=True):
        for ours in values[:-1]:
            np.testing.assert_allclose(ours, values[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("g_architecture", "d_architecture"), [("skip", "resnet"), ("resnet", "skip")]
)
@pytest.mark.parametrize("pack_channels", [0, 16, 128])
@pytest.mark.parametrize(("images", "tiles"), [(1, 8), (2, 4), (4, 2), (3, 1), (8, 1)])
def test_tiles_give_the_same_networks(
    g_architecture: str,
    d_architecture: str,
    pack_channels: int,
    images: int,
    tiles: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images, logits and gradients, with noise of each image and with the network's own; with no
    map packed, the finest, and all."""
    monkeypatch.setattr(packing, "PACK_CHANNELS", pack_channels)
    cut, cuts = packing.cut, []

    def counted(x: tf.Tensor, count: int, *halo: int) -> tf.Tensor:
        cuts.append(count)
        return cut(x, count, *halo)

    monkeypatch.setattr(packing, "cut", counted)
    shared: dict[str, Any] = {
        "resolution": (64, 32),
        "channel_base": 128,
        "backend": ops.Backend.TPU,
    }
    generator = small_generator(architecture=g_architecture, **shared)
    discriminator = small_discriminator(architecture=d_architecture, mbstd_group_size=1, **shared)
    g, d = (constants(randomized(n), tf.float64) for n in (generator, discriminator))
    z = tf.cast(normal(images, 8), tf.float64)
    numbers = sum(height * width for height, width in generator.noise_shapes)
    noises = {
        mode: generator.noise(g, mode, tf.cast(normal(images, numbers), tf.float64))
        for mode in ("random", "const", "none")
    }

    def run() -> list[tf.Tensor]:
        results = []
        for noise in noises.values():
            with tf.GradientTape() as tape:
                tape.watch((g, d))
                pictures = generator.synthesis(g, generator.mapping(g, z, nothing64(images)), noise)
                logits = discriminator(d, pictures, nothing64(images))
            zero = tf.UnconnectedGradients.ZERO
            grads = tape.gradient(logits, (g, d), unconnected_gradients=zero)
            results += [pictures, logits, *tf.nest.flatten(grads)]
        return results

    whole = run()
    assert set(cuts) == {1}
    monkeypatch.setattr(packing, "_TILE_MIN_ROWS", 2)
    in_tiles = run()
    assert max(cuts) == tiles
    for ours, theirs in zip(in_tiles, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- noise and truncation


def test_noise_modes() -> None:
    generator = small_generator()
    params = constants(randomized(generator))
    ws = generator.mapping(params, normal(2, 8), nothing(2))
    const = generator.noise(params, "const")
    assert [tuple(image.shape) for image in const] == [(4, 4), (8, 8), (8, 8), (16, 16), (16, 16)]
    default = generator.synthesis(params, ws)
    np.testing.assert_array_equal(generator.synthesis(params, ws, const), default)
    # The same numbers given as random noise make the same images.
    flat = tf.concat([tf.reshape(image, [1, -1]) for image in const], 1)
    noise = generator.noise(params, "random", tf.tile(flat, [2, 1]))
    np.testing.assert_allclose(
        generator.synthesis(params, ws, noise), default, rtol=1e-5, atol=1e-5
    )
    noise = generator.noise(params, "random", tf.concat([flat, -flat], 0))
    other = generator.synthesis(params, ws, noise)
    np.testing.assert_allclose(other[0], default[0], rtol=1e-5, atol=1e-5)
    assert error(other[1], default[1]) > 0.01
    silent = {name: v * 0 if "noise_strength" in name else v for name, v in params.items()}
    without = generator.synthesis(params, ws, generator.noise(params, "none"))
    np.testing.assert_allclose(generator.synthesis(silent, ws), without, rtol=1e-6, atol=1e-6)


def test_truncation() -> None:
    generator = small_generator()
    params = constants(randomized(generator))
    z = normal(2, 8)
    plain = generator.mapping(params, z, nothing(2)).numpy()
    average = params["mapping.w_avg"].numpy()
    none = generator.mapping(params, z, nothing(2), 0.0).numpy()
    np.testing.assert_allclose(none, np.broadcast_to(average, none.shape), atol=1e-6)
    half = generator.mapping(params, z, nothing(2), 0.5, 2).numpy()
    np.testing.assert_allclose(half[:, 2:], plain[:, 2:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(half[:, :2], (average + plain[:, :2]) / 2, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- labels


def reference_mapping(params: Arrays, inputs: list[np.ndarray], num_layers: int) -> np.ndarray:
    """A mapping network in float64 NumPy; inputs are not yet normalised."""
    x = np.concatenate([v / np.sqrt(np.mean(v**2, 1, keepdims=True) + 1e-8) for v in inputs], 1)
    for layer in range(num_layers):
        weight, bias = (params[f"mapping.fc{layer}.{kind}"] for kind in ("weight", "bias"))
        x = x @ weight.astype(np.float64) * (0.01 / np.sqrt(weight.shape[0])) + bias * 0.01
        x = np.where(x >= 0, x, 0.2 * x) * np.sqrt(2)
    return x


def reference_embedding(params: Arrays, c: np.ndarray) -> np.ndarray:
    weight = params["mapping.embed.weight"].astype(np.float64)
    return c @ weight / np.sqrt(weight.shape[0]) + params["mapping.embed.bias"]


def test_labels_enter_the_generator_after_the_latent() -> None:
    generator = small_generator(c_dim=3)
    params = randomized(generator)
    assert params["mapping.fc0.weight"].shape == (8 + 12, 12)
    z, c = normal(4, 8), one_hot([0, 1, 2, 0], 3)
    w = generator.map(constants(params), z, c)
    embedding = reference_embedding(params, c.numpy())
    expected = reference_mapping(params, [z.numpy().astype(np.float64), embedding], 2)
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)
    same_z = generator.map(constants(params), tf.tile(z[:1], [3, 1]), one_hot([0, 1, 2], 3))
    assert len(np.unique(np.round(same_z.numpy()[:, 0], 6))) == 3


def test_discriminator_projects_onto_the_label() -> None:
    """A class's logit is that of an unconditional network whose last layer is the projection."""
    conditional, plain = small_discriminator(c_dim=3), small_discriminator()
    params = randomized(conditional)
    images = normal(4, 16, 16, 3)
    assert conditional.cmap_dim == 16
    for index in range(3):
        c = np.eye(3)[[index]]
        cmap = reference_mapping(params, [reference_embedding(params, c)], 2)[0] / np.sqrt(16)
        projected = {name: params[name] for name in plain.specs}
        projected["b4.out.weight"] = (params["b4.out.weight"] @ cmap)[:, np.newaxis]
        projected["b4.out.bias"] = (params["b4.out.bias"] @ cmap)[np.newaxis]
        expected = plain(constants(projected), images, nothing(4))
        actual = conditional(constants(params), images, one_hot([index] * 4, 3))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(lambda: small_generator(resolution=(32, 16), c_dim=3), id="G"),
        pytest.param(lambda: small_discriminator(resolution=(32, 16), c_dim=3), id="D"),
    ],
)
def test_nvidia_layouts(network: Any) -> None:
    network = network()
    params = randomized(network)
    theirs = network.to_nvidia(params)
    for name, value in theirs.items():
        if name.endswith(".weight") and value.ndim == 4:
            assert value.shape == tuple(np.array(network.specs[name].shape)[[3, 2, 0, 1]])
    back = network.from_nvidia({**theirs, "b8.resample_filter": np.ones([4, 4])})
    assert set(back) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    name = next(iter(theirs))
    with pytest.raises(ValueError, match=f"{name}.*missing"):
        network.from_nvidia({k: v for k, v in theirs.items() if k != name})
    with pytest.raises(ValueError, match=f"{name}.*shape"):
        network.from_nvidia({**theirs, name: theirs[name][:1]})


def test_flattening_layer_keeps_nvidias_order() -> None:
    """Their feature maps are flattened channels first, ours last: rows must move along."""
    network = small_discriminator(resolution=(32, 16))
    params = network.init(0)
    theirs = network.to_nvidia(params)["b4.fc.weight"]
    height, width, channels = 8, 4, 16
    ours = params["b4.fc.weight"].reshape(height, width, channels, -1)
    np.testing.assert_array_equal(
        theirs[5].reshape(channels, height, width)[3, 6, 2], ours[6, 2, 3, 5]
    )


def test_start_depends_on_seed_and_name_only() -> None:
    small, large = small_generator(), small_generator(resolution=(32, 32), c_dim=2)
    first, again, other = small.init(3), small.init(3), small.init(4)
    bigger = large.init(3)
    name = "synthesis.b16.conv1.weight"
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert not np.array_equal(first[name], other[name])
    np.testing.assert_array_equal(first[name][..., :8], bigger[name][..., :8])
    twins = first["synthesis.b8.conv0.weight"], first["synthesis.b8.conv1.weight"]
    assert twins[0].shape == twins[1].shape
    assert not np.array_equal(*twins)


def test_start_has_nvidias_scales() -> None:
    g = small_generator(c_dim=2, w_dim=64, z_dim=64).init(0)
    assert np.std(g["synthesis.b4.conv1.weight"]) == pytest.approx(1, rel=0.1)
    assert np.std(g["mapping.fc1.weight"]) == pytest.approx(100, rel=0.1)
    assert np.all(g["synthesis.b4.conv1.affine.bias"] == 1)
    assert np.all(g["synthesis.b4.torgb.affine.bias"] == 1)
    for name in ("synthesis.b4.conv1.noise_strength", "mapping.w_avg", "synthesis.b4.conv1.bias"):
        assert np.all(g[name] == 0)
    assert all(value.dtype == np.float32 for value in g.values())


@pytest.mark.parametrize(
    ("architecture", "order"),
    [
        ("resnet", ["b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0", "b8.conv1"]),
        ("orig", ["b16.fromrgb", "b16.conv0", "b16.conv1", "b8.conv0", "b8.conv1"]),
        ("skip", ["b16.fromrgb", "b16.conv0", "b16.conv1", "b8.fromrgb", "b8.conv0", "b8.conv1"]),
    ],
)
def test_freeze_d(architecture: str, order: list[str]) -> None:
    """Layers freeze one after the other from the image inwards, as NVIDIA counts them."""
    discriminator = small_discriminator(architecture=architecture)
    everything = set(discriminator.trainable_names())
    assert everything == set(discriminator.specs)
    for count in range(len(order) + 1):
        frozen = everything - set(discriminator.trainable_names(count))
        assert {name.rpartition(".")[0] for name in frozen} == set(order[:count])
    # The epilogue is never frozen.
    all_of_them = len(discriminator.freezable_layers)
    left = discriminator.trainable_names(all_of_them)
    rest = {name.split(".")[1] for name in left if "b4." in name}
    assert {"conv", "fc", "out"} <= rest


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, set()),
        (1, {"b32"}),
        (2, {"b16", "b32"}),
        (4, {"b8", "b16", "b32"}),
        ("all", {"b4", "b8", "b16", "b32"}),
    ],
)
def test_which_blocks_are_16_bit(count: int | str, expected: set[str]) -> None:
    options: dict[str, Any] = {
        "resolution": (32, 32),
        "num_fp16_res": count,
        "half_dtype": tf.bfloat16,
    }
    for network in (small_generator(**options), small_discriminator(**options)):
        found = {block.name for block in network.blocks if block.dtype is tf.bfloat16}
        if isinstance(network, Discriminator) and network._epilogue_dtype is tf.bfloat16:
            found.add("b4")  # it is no block there
        assert found == expected
        assert all(block.dtype in (None, tf.bfloat16) for block in network.blocks)


@pytest.mark.parametrize("g_architecture", ["skip", "resnet"])
@pytest.mark.parametrize(("half", "close"), [(tf.bfloat16, 0.06), (tf.float16, 0.01)])
def test_16_bit_networks_are_close(half: tf.DType, close: float, g_architecture: str) -> None:
    options: dict[str, Any] = {"num_fp16_res": 4, "conv_clamp": 256.0}
    d_architecture = {"skip": "resnet", "resnet": "skip"}[g_architecture]
    results = []
    for dtype in (None, half):
        generator = small_generator(architecture=g_architecture, half_dtype=dtype, **options)
        discriminator = small_discriminator(
            architecture=d_architecture, half_dtype=dtype, **options
        )
        g, d = constants(randomized(generator)), constants(randomized(discriminator))
        images = generator.synthesis(g, generator.mapping(g, normal(4, 8), nothing(4)))
        logits = discriminator(d, tf.tanh(normal(4, 16, 16, 3)), nothing(4))
        assert images.dtype == tf.float32
        assert logits.dtype == tf.float32
        results.append((images, logits))
    (images, logits), (half_images, half_logits) = results
    assert 0 < error(half_images, images) < close
    assert 0 < error(half_logits, logits) < close


def test_clamp_limits_activations() -> None:
    """Weights a thousand times too large: infinite in float16, limited by the clamp."""
    generator = small_generator(num_fp16_res=4, conv_clamp=256.0, half_dtype=tf.float16)
    params = randomized(generator)
    for name in params:
        if name.endswith((".conv0.bias", ".conv1.bias")):
            params[name] *= 1e5
    g = constants(params)
    images = generator.synthesis(g, generator.mapping(g, normal(2, 8), nothing(2)))
    assert np.all(np.isfinite(images))
    discriminator = small_discriminator(num_fp16_res=4, conv_clamp=256.0, half_dtype=tf.float16)
    params = randomized(discriminator)
    for name in params:
        if name.endswith((".conv0.weight", ".conv1.weight")):
            params[name] *= 1e2
    logits = discriminator(constants(params), normal(4, 16, 16, 3), nothing(4))
    assert np.all(np.isfinite(logits))


# ---------------------------------------------------------------- R1


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_r1_gradient_is_the_slope_of_the_penalty(architecture: str) -> None:
    """The second-order gradient of the whole discriminator against a difference in float64."""
    discriminator = small_discriminator(architecture=architecture)
    params = constants(randomized(discriminator), tf.float64)
    images = tf.cast(normal(4, 16, 16, 3), tf.float64)
    rng = np.random.default_rng(2)
    direction = {name: tf.constant(rng.standard_normal(v.shape)) for name, v in params.items()}

    def penalty(weights: Mapping[str, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(images)
            score = tf.reduce_sum(discriminator(weights, images, nothing(4)))
        return tf.reduce_sum(tf.square(tape.gradient(score, images)))

    def moved(step: float) -> dict[str, tf.Tensor]:
        return {name: value + step * direction[name] for name, value in params.items()}

    with tf.GradientTape() as tape:
        tape.watch(params)
        value = penalty(params)
    grads = tape.gradient(value, params, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    slope = tf.add_n([tf.reduce_sum(grads[name] * direction[name]) for name in params])
    # Small enough that no leaky ReLU changes sides.
    step = 1e-8
    difference = (penalty(moved(step)) - penalty(moved(-step))) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-4)
