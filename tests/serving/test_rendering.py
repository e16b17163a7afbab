"""The images of a trained generator, in Python and by classes, seeds and truncation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainer
from trainer.core.errors import CheckpointError, MissingTensorFlowError, UsageError
from trainer.families.stylegan2.networks import Generator
from trainer.serving.rendering import Renderer, TrainedGenerator, choose_class
from trainer.telemetry import images as grids
from trainer.training.checkpoint import Found

Network = tuple[Generator, dict[str, tf.Tensor]]
NAMES = ["cat", "dog", "1", "sea lion"]


def make_network(c_dim: int = 0, channels: int = 3) -> Network:
    """A small generator whose noise can be seen and whose average w is not zero."""
    network = Generator(
        z_dim=8,
        c_dim=c_dim,
        w_dim=12,
        resolution=(16, 32),
        img_channels=channels,
        mapping_layers=2,
        channel_base=128,
        channel_max=8,
    )
    params = {name: tf.constant(value) for name, value in network.init(seed=1).items()}
    for name in params:
        if name.endswith("noise_strength"):
            params[name] = tf.constant(0.3)
        if name.endswith("w_avg"):
            params[name] = tf.linspace(-1.0, 1.0, 12)
    return network, params


@pytest.fixture(scope="module")
def plain() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def conditional() -> Network:
    return make_network(c_dim=4)


def expected(network: Network, seed: int, label: int = -1, psi: float = 1.0) -> np.ndarray:
    """An image by the definition: one seed, no batching, no tracing."""
    generator, params = network
    z = np.random.RandomState(seed).randn(1, generator.z_dim).astype(np.float32)
    c = np.zeros((1, generator.c_dim), np.float32)
    if label >= 0:
        c[0, label] = 1
    ws = generator.mapping(params, tf.constant(z), tf.constant(c), psi)
    return grids.to_uint8(generator.synthesis(params, ws).numpy())[0]


def assert_same_pixels(actual: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for roundings of the last bit that cross from one level to the next."""
    assert actual.shape == wanted.shape
    difference = np.abs(actual.astype(int) - wanted.astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.02


# Classes ---


def test_classes_by_name_and_index() -> None:
    assert choose_class("dog", NAMES) == 1
    assert choose_class("3", NAMES) == choose_class(3, NAMES) == choose_class("003", NAMES) == 3
    assert choose_class("1", NAMES) == 2  # a name goes before an index
    assert choose_class(1, NAMES) == 1  # but a number is no name
    assert choose_class(np.int64(2), NAMES) == 2
    assert choose_class(None, []) == -1


@pytest.mark.parametrize(
    ("wanted", "names", "says"),
    [
        (None, NAMES, "needs label.*cat, dog, 1, sea lion"),
        ("dgo", NAMES, "label=dgo.*did you mean 'dog'"),
        ("4", NAMES, "label=4: there are 4 classes; use an index from 0 to 3 or one of: cat, dog"),
        (4, NAMES, "label=4: there are 4 classes; .* from 0 to 3"),
        ("-1", NAMES, "label=-1: there are 4 classes"),
        (-1, NAMES, "label=-1: there are 4 classes"),
        ("9" * 5000, NAMES, "there are 4 classes"),
        ("all", NAMES, "label=all.*no such class"),
        ("cat", [], "label=cat.*without classes"),
        (0, [], "without classes"),
        ("x", [f"name{i}" for i in range(99)], r"name19, \.\.\."),
    ],
)
def test_wrong_classes(wanted: str | int | None, names: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        choose_class(wanted, names)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_number_is_not_taken_for_a_misspelt_name() -> None:
    digits = [str(digit) for digit in range(10)]
    with pytest.raises(UsageError, match="label=12: there are 10 classes; .* 0 to 9") as caught:
        choose_class("12", digits)
    assert "did you mean" not in str(caught.value)


def test_names_of_classes_in_messages_are_short() -> None:
    names = ["\x1b[2J" + "x" * 5000] * 50
    for wanted in (None, "y" * 5000, "1" * 5000):
        with pytest.raises(UsageError) as caught:
            choose_class(wanted, names)
        assert len(str(caught.value)) < 1500
        assert "\x1b" not in str(caught.value)


# Drawing ------------------------------------------------------------------------------------


def test_images_are_those_of_the_seeds(plain: Network) -> None:
    drawn = list(Renderer(*plain, batch=4).truncated(0.5).images([3, 0, 7, 3, 2], [-1] * 5))
    assert len(drawn) == 5
    for seed, image in zip([3, 0, 7, 3, 2], drawn, strict=True):
        assert_same_pixels(image, expected(plain, seed, psi=0.5))
    assert np.array_equal(drawn[0], drawn[3])


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_an_image_alone_is_the_image_among_others(plain: Network, noise_mode: str) -> None:
    renderer = Renderer(*plain, noise_mode=noise_mode, batch=4)
    together = list(renderer.images(range(6), [-1] * 6))
    for seed in (0, 3, 5):
        (alone,) = renderer.images([seed], [-1])
        assert np.array_equal(alone, together[seed])


def test_noise_modes_differ(plain: Network) -> None:
    modes = ("const", "random", "none")
    const, random, none = (next(Renderer(*plain, noise_mode=m).images([5], [-1])) for m in modes)
    assert (const != none).mean() > 0.1
    assert (random != none).mean() > 0.1
    assert (random != const).mean() > 0.1
    renderer = Renderer(*plain, noise_mode="random")
    ws = np.repeat(renderer.ws([5], [-1]), 2, axis=0)
    one, two = renderer.render(ws, [1, 2])
    assert (one != two).mean() > 0.1


def test_truncation_and_cutoff(plain: Network) -> None:
    average = plain[1]["mapping.w_avg"].numpy()
    full = Renderer(*plain).ws([1], [-1])
    half = Renderer(*plain).truncated(0.5, 2).ws([1], [-1])
    np.testing.assert_allclose(half[:, :2], (full[:, :2] + average) / 2, atol=1e-5)
    np.testing.assert_allclose(half[:, 2:], full[:, 2:], atol=1e-6)
    Renderer(*plain).truncated(1.0, 0)
    Renderer(*plain).truncated(1.0, 6)


@pytest.mark.parametrize("cutoff", [-1, 7])
def test_cutoff_out_of_range(plain: Network, cutoff: int) -> None:
    with pytest.raises(UsageError, match=f"truncation_cutoff={cutoff}.*0 to 6"):
        Renderer(*plain).truncated(1.0, cutoff)


def test_nothing_is_traced_twice(plain: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    synthesis = plain[0].synthesis

    def counted(*args: object) -> tf.Tensor:
        traced.append(args)
        return synthesis(*args)

    monkeypatch.setattr(plain[0], "synthesis", counted)
    renderer = Renderer(*plain, batch=4)
    for count in (1, 3, 4, 9):
        truncated = renderer.truncated(1 / count, count % 3)
        assert len(list(truncated.images(range(count), [-1] * count))) == count
    assert len(traced) == 1


def test_an_unknown_noise_mode(plain: Network) -> None:
    with pytest.raises(UsageError, match="noise_mode=rand: use one of const, random, none"):
        Renderer(*plain, noise_mode="rand")


# A trained generator ------------------------------------------------------------------------


def trained(network: Network, label_names: list[str], **options: Any) -> TrainedGenerator:
    info = {"label_names": label_names, "kimg": 45.6}
    found = Found("runs/a/checkpoints/step-000000123", 123, info, "", {})
    return TrainedGenerator(*network, found, **options)


def test_samples_are_the_images_of_the_seeds(conditional: Network) -> None:
    generator = trained(conditional, NAMES, batch=2)
    for label in ("sea lion", 3):
        images = generator.sample([4, 9, 4], label=label, truncation_psi=0.5)
        assert (images.dtype, images.shape) == (np.uint8, (3, 16, 32, 3))
        for image, seed in zip(images, [4, 9, 4], strict=True):
            assert_same_pixels(image, expected(conditional, seed, label=3, psi=0.5))


def test_samples_without_classes(plain: Network) -> None:
    generator = trained(plain, [])
    (image,) = generator.sample(range(5, 6))
    assert_same_pixels(image, expected(plain, 5))
    assert generator.sample([]).shape == (0, 16, 32, 3)
    with pytest.raises(UsageError, match="label=cat: this network was trained without classes"):
        generator.sample([1], label="cat")


def test_a_trained_generator_says_what_it_is(conditional: Network) -> None:
    generator = trained(conditional, NAMES)
    assert (generator.resolution, generator.labels) == ((16, 32), tuple(NAMES))
    assert (generator.step, generator.kimg) == (123, 45.6)
    assert trained(conditional, []).labels == ("class 0", "class 1", "class 2", "class 3")
    with pytest.raises(UsageError, match="needs label: use an index from 0 to 3 or one of: cat"):
        generator.sample([1])


def test_loading_prints_nothing() -> None:
    """In a process whose first call it is: none of the lines that TensorFlow's start writes."""
    code = """
import trainer
try:
    trainer.load("nowhere")
except trainer.core.errors.CheckpointError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no checkpoint in nowhere: there is no such directory")


def test_load_without_tensorflow_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingTensorFlowError, match="TensorFlow is not installed"):
        trainer.load("runs/a")


def test_load_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        trainer.load(tmp_path)
