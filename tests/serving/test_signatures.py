"""What a served generator draws: generate's images, from latents, and its own from seeds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.serving.test_rendering import Network, assert_same_pixels, make_network
from trainer.layers.ops import Backend
from trainer.serving.rendering import Renderer
from trainer.serving.signatures import Served


def serve(network: Network, **options: Any) -> Served:
    generator, params = network
    return Served(generator, {name: value.numpy() for name, value in params.items()}, **options)


def latents(seeds: list[int]) -> tf.Tensor:
    return tf.constant([np.random.RandomState(seed).randn(8) for seed in seeds], tf.float32)


def draw(served: Served, **inputs: Any) -> np.ndarray:
    """The images, with inputs as plain lists."""
    dtypes = {"seed": tf.int64, "label": tf.int64, "truncation_psi": tf.float32}
    tensors = {name: tf.constant(x, dtypes.get(name)) for name, x in inputs.items()}
    return served.generate(**tensors)["images"].numpy()


@pytest.fixture(scope="module")
def plain() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def conditional() -> Network:
    return make_network(c_dim=4)


@pytest.fixture(scope="module")
def served(plain: Network) -> Served:
    return serve(plain)


@pytest.fixture(scope="module")
def labelled(conditional: Network) -> Served:
    return serve(conditional)


# ------------------------------------------------------------------------------ latents


@pytest.mark.parametrize("mode", ["const", "none"])
def test_latents_make_the_images_of_generate(plain: Network, served: Served, mode: str) -> None:
    renderer = Renderer(*plain, noise_mode=mode).truncated(0.7)
    drawn = draw(served, z=latents([3, 0, 7]), truncation_psi=[0.7], noise_mode=[mode])
    assert drawn.dtype == np.uint8
    for image, wanted in zip(drawn, renderer.images([3, 0, 7], [-1] * 3), strict=True):
        assert_same_pixels(image, wanted)


def test_classes_make_the_images_of_generate(conditional: Network, labelled: Served) -> None:
    wanted = list(Renderer(*conditional).images([1, 1, 2], [0, 3, 2]))
    for image, one in zip(
        draw(labelled, z=latents([1, 1, 2]), label=[0, 3, 2]), wanted, strict=True
    ):
        assert_same_pixels(image, one)


def test_the_defaults_are_all_it_has_learned_with_constant_noise(
    plain: Network, served: Served
) -> None:
    (wanted,) = Renderer(*plain).images([4], [-1])
    assert_same_pixels(draw(served, z=latents([4]))[0], wanted)


def test_each_row_has_its_own_psi_and_noise(plain: Network, served: Served) -> None:
    z, psi, modes = latents([1, 2, 3]), [0.3, 1.0, 0.6], ["none", "const", "random"]
    together = draw(served, z=z, truncation_psi=psi, noise_mode=modes, seed=[5, 6, 7])
    for n in range(3):
        alone = draw(
            served, z=z[n : n + 1], truncation_psi=[psi[n]], noise_mode=[modes[n]], seed=[5 + n]
        )
        assert_same_pixels(together[n], alone[0])
    assert (together[0] != draw(served, z=z[:1], truncation_psi=[1.0])[0]).mean() > 0.1


def test_one_row_serves_all(served: Served, labelled: Served) -> None:
    one = draw(labelled, z=latents([1]), label=[0, 1, 2], truncation_psi=[0.5])
    many = draw(labelled, z=latents([1, 1, 1]), label=[0, 1, 2], truncation_psi=[0.5] * 3)
    assert one.shape == (3, 16, 32, 3)
    assert_same_pixels(one, many)
    assert draw(served).shape == (1, 16, 32, 3)


# ------------------------------------------------------------------------------ seeds


def test_a_seed_makes_the_same_alone_and_among_others(served: Served) -> None:
    many = draw(served, seed=[5, 9, 5, -1, 2**62], noise_mode=["random"])
    for n, seed in enumerate([5, 9, 5, -1, 2**62]):
        assert_same_pixels(draw(served, seed=[seed], noise_mode=["random"])[0], many[n])
    assert (many[0] == many[2]).all()
    for n in (1, 3, 4):
        assert (many[0] != many[n]).mean() > 0.2


def test_seeds_are_the_documented_numbers(served: Served) -> None:
    z = tf.random.stateless_normal([8], tf.constant([9, 0], tf.int64), alg="philox")
    assert_same_pixels(draw(served, seed=[9]), draw(served, z=z[tf.newaxis]))
    assert_same_pixels(draw(served, seed=[9, 9], z=tf.zeros([2, 0])), draw(served, seed=[9, 9]))


def test_noise_is_of_its_seed(served: Served) -> None:
    z = latents([1, 1])
    one, two = draw(served, z=z, seed=[1, 2], noise_mode=["random"])
    assert (one != two).mean() > 0.1
    const, none = draw(served, z=z, noise_mode=["const", "none"])
    assert (const != none).mean() > 0.1
    assert (const != one).mean() > 0.1


def test_random_noise_is_standard_normal(plain: Network, served: Served) -> None:
    """Drawn for all layers in turn; a layer's values are not another layer's."""
    size = sum(height * width for height, width in plain[0].noise_shapes)
    noise = served._noise(
        tf.constant(["random"]), tf.constant([3], tf.int64), tf.constant(1)
    ).numpy()
    assert noise.shape == (1, size)
    assert abs(noise.mean()) < 4 / size**0.5
    assert abs(noise.std() - 1) < 4 / size**0.5
    assert len(np.unique(noise)) > 0.99 * size


# ------------------------------------------------------------------------------ other signatures


def test_mapping_and_synthesis_are_generate_in_two_steps(plain: Network, served: Served) -> None:
    ws = served.mapping(latents([1, 2]), tf.constant([0.7]))["ws"]
    np.testing.assert_allclose(ws, Renderer(*plain).truncated(0.7).ws([1, 2], [-1] * 2), atol=1e-5)
    images = served.synthesis(ws)["images"]
    assert images.dtype == tf.float32
    np.testing.assert_allclose(images, plain[0].synthesis(plain[1], ws), atol=1e-4)


def test_mapping_takes_mixed_classes(conditional: Network, labelled: Served) -> None:
    generator, params = conditional
    c = tf.constant([[0.5, 0.5, 0, 0], [0, 0, 0, 1]])
    wanted = generator.mapping(params, latents([1, 2]), c)
    np.testing.assert_allclose(labelled.mapping(latents([1, 2]), c)["ws"], wanted, atol=1e-5)
    for_all = labelled.mapping(latents([2, 5]), c[1:])["ws"]
    np.testing.assert_allclose(for_all[0], wanted[1], atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (4, "RGBA")])
def test_png_files_hold_the_images(channels: int, mode: str) -> None:
    served = serve(make_network(channels=channels))
    seed = tf.constant([1, 2], tf.int64)
    files = served.png(seed=seed)["image_bytes"].numpy()
    images = served.generate(seed=seed)["images"].numpy()
    for file, image in zip(files, images, strict=True):
        picture = Image.open(io.BytesIO(file))
        assert (picture.format, picture.mode) == ("PNG", mode)
        assert np.array_equal(np.asarray(picture).reshape(image.shape), image)


# ------------------------------------------------------------------------------ wrong inputs


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"z": np.zeros([2, 5], np.float32)}, r"z must have 8 columns.*5"),
        ({"seed": [1, 2], "truncation_psi": [1.0] * 3}, "one row for each image, or one for all"),
        ({"noise_mode": ["konst"]}, "noise_mode must be const, random or none.*konst"),
    ],
)
def test_wrong_inputs_say_what_is_right(served: Served, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=says):
        draw(served, **inputs)


@pytest.mark.parametrize("label", [4, -1])
def test_unknown_classes(labelled: Served, label: int) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="label must be a class from 0 to 3"):
        draw(labelled, seed=[1, 2], label=[0, label])


# ------------------------------------------------------------------------------ compiled


def test_compiled_it_draws_the_same_of_seeds_too(plain: Network, served: Served) -> None:
    """XLA's random numbers are others: they must stay outside."""
    compiled = make_network()[0]
    compiled.backend = Backend.XLA_CPU
    jitted = serve((compiled, plain[1]), jit=True)
    inputs = {"seed": [1, 2], "noise_mode": ["random", "const"]}
    assert_same_pixels(draw(jitted, **inputs), draw(served, **inputs))
    graphs = [f.get_concrete_function().graph for f in jitted.signatures().values()]
    called = {n.attr["f"].func.name for g in graphs for n in g.as_graph_def().node if "f" in n.attr}
    functions = {f.signature.name: f for g in graphs for f in g.as_graph_def().library.function}
    must = {name for name in called if functions[name].attr["_XlaMustCompile"].b}
    assert len(must) >= 2


def test_no_device_is_named() -> None:
    """Else a model could be loaded only where there is such a device."""
    for function in serve(make_network()).signatures().values():
        graph = function.get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
        assert {node.device for node in nodes} == {""}
