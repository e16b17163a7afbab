"""Every option of the networks against every property that training relies on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.families.network import Network
from trainer.families.stylegan2.networks import Discriminator, Generator
from trainer.layers import ops

GROUP = 2
BATCH = 4


@dataclasses.dataclass(frozen=True)
class Pair:
    """A generator, the discriminator for its images, and a loss that uses both."""

    generator: Generator
    discriminator: Discriminator

    def inputs(self, dtype: tf.DType = tf.float32) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """z, labels and reals for a batch."""
        rng = np.random.default_rng(11)
        generator = self.generator
        z = rng.standard_normal([BATCH, generator.z_dim])
        labels = np.eye(max(generator.c_dim, 1))[np.arange(BATCH) % max(generator.c_dim, 1)]
        reals = np.tanh(rng.standard_normal([BATCH, *generator.resolution, generator.img_channels]))
        return (
            tf.constant(z, dtype),
            tf.constant(labels[:, : generator.c_dim], dtype),
            tf.constant(reals, dtype),
        )

    def images(self, g: Any, z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        return self.generator.synthesis(g, self.generator.mapping(g, z, c))

    def values(
        self, g: Any, d: Any, z: tf.Tensor, c: tf.Tensor, reals: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Images and the logits of reals."""
        return self.images(g, z, c), self.discriminator(d, reals, c)

    def evaluate(
        self, g: Any, d: Any, z: tf.Tensor, c: tf.Tensor, reals: tf.Tensor
    ) -> dict[str, Any]:
        """Images, logits, and the gradients of a loss of fakes and reals."""
        with tf.GradientTape() as tape:
            tape.watch((g, d))
            images = self.images(g, z, c)
            logits = self.discriminator(d, tf.concat([images, reals], 0), tf.concat([c, c], 0))
            fake, real = tf.split(logits, 2)
            loss = tf.reduce_mean(tf.nn.softplus(-fake) + tf.nn.softplus(-real))
        g_grads, d_grads = tape.gradient(loss, (g, d))
        return {"images": images, "logits": logits, "g": g_grads, "d": d_grads}


def build(g: str, d: str, **options: Any) -> Pair:
    half: dict[str, Any] = {
        name: options.pop(name)
        for name in ("half_dtype", "num_fp16_res", "conv_clamp", "backend")
        if name in options
    }
    shared: dict[str, Any] = {
        "c_dim": 0,
        "resolution": (16, 16),
        "mapping_layers": 2,
        "channel_base": 256,
        "channel_max": 16,
        **options,
        **half,
    }
    return Pair(
        Generator(z_dim=8, w_dim=12, architecture=g, **shared),
        Discriminator(architecture=d, mbstd_group_size=GROUP, **shared),
    )


# Every value of every option at least once.
PAIRS: dict[str, Callable[..., Pair]] = {
    "skip-resnet": lambda **o: build("skip", "resnet", **o),
    "resnet-skip": lambda **o: build("resnet", "skip", resolution=(8, 8), **o),
    "orig-orig": lambda **o: build("orig", "orig", resolution=(8, 8), **o),
    "conditional": lambda **o: build("skip", "resnet", c_dim=3, resolution=(8, 8), **o),
    "oblong-gray": lambda **o: build(
        "skip", "resnet", resolution=(16, 8), img_channels=1, backend=ops.Backend.GENERIC, **o
    ),
    "odd-grid-rgba": lambda **o: build(
        "resnet", "orig", resolution=(10, 14), img_channels=4, c_dim=2, **o
    ),
    "clamped": lambda **o: build("skip", "skip", resolution=(8, 8), **{"conv_clamp": 0.7, **o}),
}

every_pair = pytest.mark.parametrize("name", list(PAIRS))


def parameters(network: Network, dtype: tf.DType = tf.float32) -> dict[str, tf.Tensor]:
    """Parameters of which none is zero or one, so that no path is trivially right."""
    rng = np.random.default_rng(3)
    return {
        name: tf.constant(value + 0.3 * rng.standard_normal(value.shape), dtype)
        for name, value in network.init(0).items()
    }


def both(pair: Pair, dtype: tf.DType = tf.float32) -> tuple[Any, Any]:
    return parameters(pair.generator, dtype), parameters(pair.discriminator, dtype)


@functools.cache
def evaluated(name: str) -> dict[str, Any]:
    """Values and gradients of a pair in float32, op by op."""
    pair = PAIRS[name]()
    return pair.evaluate(*both(pair), *pair.inputs())


def deviation(actual: Any, expected: Any) -> float:
    """The largest difference in two structures, relative to the largest value of each tensor."""
    tf.nest.assert_same_structure(actual, expected)
    worst = 0.0
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        if e is None:
            assert a is None
            continue
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        assert np.all(np.isfinite(a))
        worst = max(worst, float(np.max(np.abs(a - e)) / (np.max(np.abs(e)) + 1e-6)))
    return worst


@every_pair
def test_float64(name: str) -> None:
    """The same values and gradients to float32's rounding, and nothing is cast on the way."""
    pair = PAIRS[name]()
    exact = pair.evaluate(*both(pair, tf.float64), *pair.inputs(tf.float64))
    assert exact["images"].dtype == exact["logits"].dtype == tf.float64
    rounded = evaluated(name)
    assert rounded["images"].dtype == rounded["logits"].dtype == tf.float32
    assert deviation(rounded, exact) < 1e-3


@every_pair
def test_graph_with_an_open_batch(name: str) -> None:
    pair = PAIRS[name]()
    g, d = both(pair)
    inputs = pair.inputs()
    signature = [tf.TensorSpec([None, *tensor.shape[1:]]) for tensor in inputs]
    graph = tf.function(
        lambda z, c, reals: pair.values(g, d, z, c, reals),
        input_signature=signature,
        autograph=False,
    )
    assert deviation(graph(*inputs), pair.values(g, d, *inputs)) < 1e-5


# A compilation takes seconds; `test_gradients_in_xla` compares the values, too, and those of all pairs
# among the proofs.
COMPILED = ("skip-resnet", "resnet-skip", "orig-orig", "conditional")


@pytest.mark.parametrize("name", COMPILED)
def test_xla(name: str) -> None:
    pair = PAIRS[name]()
    compiled = tf.function(pair.values, jit_compile=True, autograph=False)
    arguments = (*both(pair), *pair.inputs())
    assert deviation(compiled(*arguments), pair.values(*arguments)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMPILED else pytest.mark.proof)
        for name in PAIRS
    ],
)
def test_gradients_in_xla(name: str) -> None:
    pair = PAIRS[name]()
    compiled = tf.function(pair.evaluate, jit_compile=True, autograph=False)
    assert deviation(compiled(*both(pair), *pair.inputs()), evaluated(name)) < 1e-4


@every_pair
def test_every_parameter_learns(name: str) -> None:
    pair, found = PAIRS[name](), evaluated(name)
    networks: tuple[tuple[Network, str], ...] = (
        (pair.generator, "g"),
        (pair.discriminator, "d"),
    )
    for network, key in networks:
        for parameter in network.trainable_names():
            assert np.any(np.asarray(found[key][parameter]) != 0), parameter


@every_pair
@pytest.mark.parametrize(
    ("half", "count", "close"),
    [(tf.bfloat16, 4, 0.15), (tf.bfloat16, "all", 0.15), (tf.float16, 4, 0.03)],
)
def test_16_bits_are_close(name: str, half: tf.DType, count: int | str, close: float) -> None:
    """Values and gradients are finite, in 32 bits at the ends, and near those of 32 bits."""
    options: dict[str, Any] = {} if name == "clamped" else {"conv_clamp": 256.0}
    full = PAIRS[name](**options)
    pair = PAIRS[name](num_fp16_res=count, half_dtype=half, **options)
    z, c, reals = pair.inputs()
    g, d = both(pair)
    expected, actual = (p.images(g, z, c) for p in (full, pair))
    assert actual.dtype == tf.float32
    assert 0 < deviation(actual, expected) < close
    # The same images for both: differences would add up.
    expected, actual = (p.discriminator(d, reals, c) for p in (full, pair))
    assert actual.dtype == tf.float32
    assert 0 < deviation(actual, expected) < close
    found = pair.evaluate(g, d, z, c, reals)
    for grads in (found["g"], found["d"]):
        for gradient in grads.values():
            assert gradient is None or (
                gradient.dtype == tf.float32 and np.all(np.isfinite(gradient))
            )


@every_pair
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    pair = PAIRS[name]()
    g, _ = both(pair)
    z, c, _ = pair.inputs()
    together = pair.images(g, z, c)
    alone = pair.images(g, z[2:3], c[2:3])
    assert deviation(alone, together[2:3]) < 1e-5
    assert deviation(together[0], together[2]) > 0.01


@every_pair
def test_a_groups_logits_do_not_depend_on_other_groups(name: str) -> None:
    pair = PAIRS[name]()
    _, d = both(pair)
    _, c, reals = pair.inputs()
    logits = pair.discriminator(d, reals, c)
    alone = pair.discriminator(d, reals[GROUP:], c[GROUP:])
    assert deviation(alone, logits[GROUP:]) < 1e-5
    # Within a group they do: minibatch-stddev compares its images.
    mixed = tf.concat([reals[:1], reals[2:3]], 0)
    assert deviation(pair.discriminator(d, mixed, c[:GROUP])[0], logits[0]) > 1e-5


@pytest.mark.parametrize("name", ["conditional", "odd-grid-rgba"])
def test_labels_matter(name: str) -> None:
    pair = PAIRS[name]()
    g, d = both(pair)
    z, c, reals = pair.inputs()
    other = tf.roll(c, 1, 1)
    assert deviation(pair.images(g, z, other), pair.images(g, z, c)) > 0.01
    logits = pair.discriminator(d, reals, c)
    assert deviation(pair.discriminator(d, reals, other), logits) > 0.01


@every_pair
def test_start_and_round_trip(name: str) -> None:
    """Fresh parameters repeat, and pass unharmed through NVIDIA's layouts into a new network."""
    for network, twin in zip(
        dataclasses.astuple(PAIRS[name]()), dataclasses.astuple(PAIRS[name]()), strict=True
    ):
        params = network.init(5)
        assert list(params) == list(network.specs)
        back = twin.from_nvidia(network.to_nvidia(twin.init(5)))
        for parameter, spec in network.specs.items():
            assert params[parameter].shape == spec.shape
            np.testing.assert_array_equal(back[parameter], params[parameter])
        assert any(
            not np.array_equal(value, params[parameter])
            for parameter, value in network.init(6).items()
        )
        assert set(network.trainable_names()) == {
            parameter
            for parameter in network.specs
            if not parameter.endswith(("noise_const", "w_avg"))
        }
