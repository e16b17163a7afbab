"""What a step draws at random: reproducible group by group, and distributed as meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import ObjectiveConfig
from trainer.core.seeds import Purpose
from trainer.families.network import Latents
from trainer.families.stylegan2.networks import Generator
from trainer.objectives.objective import objective
from trainer.objectives.phase import moments
from trainer.objectives.sampler import Draws, Sampler

PHASES = {phase.name: phase for phase in objective(ObjectiveConfig(), 4).phases}


def sampler(**kwargs: Any) -> Sampler:
    generator = Generator(
        z_dim=8,
        c_dim=kwargs.pop("c_dim", 0),
        w_dim=8,
        resolution=(16, 8),
        mapping_layers=1,
        channel_base=64,
        channel_max=8,
        style_mixing_prob=kwargs.pop("style_mixing_prob", 0.5),
        noise_mode=kwargs.pop("noise_mode", "random"),
    )
    defaults: dict[str, Any] = {
        "seed": 3,
        "generator": generator,
        "group_size": 4,
        "label_counts": (),
        "pipe": None,
    }
    return Sampler(**{**defaults, **kwargs})


def groups(*index: int) -> tf.Tensor:
    return tf.constant(index, tf.int64)


def latents_of(draws: Draws) -> Latents:
    assert isinstance(draws.latents, Latents)
    return draws.latents


def tensors(draws: Draws) -> list[np.ndarray]:
    return [np.asarray(tensor) for tensor in tf.nest.flatten(draws)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_groups_draws_do_not_depend_on_the_others(phase: str) -> None:
    """One call for three groups is three calls for one, in whatever order."""
    draw = sampler(c_dim=3, label_counts=(5, 1, 2))
    together = tensors(draw(PHASES[phase], groups(5, 2**40, 7)))
    alone = [tensors(draw(PHASES[phase], groups(index))) for index in (5, 2**40, 7)]
    reverse = tensors(draw(PHASES[phase], groups(7, 5)))
    for field, whole in enumerate(together):
        parts = np.split(whole, 3)
        for index in range(3):
            np.testing.assert_array_equal(parts[index], alone[index][field])
        np.testing.assert_array_equal(reverse[field], np.concatenate([parts[2], parts[0]]))


def test_draws_in_a_graph_are_the_same() -> None:
    """Outside XLA, whose generator is another: the step draws before it calls compiled code."""
    draw = sampler(c_dim=3, label_counts=(5, 1, 2))
    graph = tf.function(lambda index: draw(PHASES["Greg"], index), autograph=False)
    for eager, traced in zip(
        tensors(draw(PHASES["Greg"], groups(1, 9))), tensors(graph(groups(1, 9))), strict=True
    ):
        np.testing.assert_array_equal(eager, traced)


def test_groups_phases_and_seeds_differ() -> None:
    draw, other = sampler(), sampler(seed=4)
    found = [
        np.asarray(latents_of(source(PHASES[phase], groups(index))).z)[row].tobytes()
        for source in (draw, other)
        for phase in ("Gmain", "Greg", "Dmain")
        for index in (0, 1)
        for row in (0, 1)
    ]
    assert len(set(found)) == len(found)


def test_fields_and_shapes() -> None:
    draw = sampler(c_dim=3, label_counts=(5, 1, 2))
    sizes = sum(height * width for height, width in draw.generator.noise_shapes)
    for phase, rows in (("Gmain", 8), ("Greg", 4), ("Dmain", 8)):
        latents = latents_of(draw(PHASES[phase], groups(0, 1)))
        assert latents.z.shape == latents.mix_z.shape == [rows, 8]
        assert latents.c.shape == [rows, 3]
        assert latents.mix_cutoff.shape == [rows]
        assert latents.noise.shape == [rows, sizes]
    assert np.asarray(draw(PHASES["Greg"], groups(0, 1)).image_noise).shape == (4, 16, 8, 3)
    assert draw(PHASES["Gmain"], groups(0)).image_noise == ()
    assert draw(PHASES["Dreg"], groups(0)) == Draws()
    plain = sampler(noise_mode="const").latents(Purpose.GMAIN, groups(0, 1), 4)
    assert plain.noise.shape == [8, 0]
    assert plain.c.shape == [8, 0]


@pytest.fixture(scope="module")
def many() -> tuple[Sampler, Any]:
    """The latents of 1000 groups."""
    draw = sampler(c_dim=4, label_counts=(10, 0, 60, 30), noise_mode="const")
    compute = tf.function(lambda index: draw.latents(Purpose.GMAIN, index, 4), autograph=False)
    parts = [compute(tf.range(i, i + 10, dtype=tf.int64)) for i in range(0, 1000, 10)]
    return draw, [np.concatenate(field) for field in zip(*parts, strict=True)]


def test_latents_are_standard_normal(many: tuple[Sampler, Any]) -> None:
    z, _, mix_z, _, _ = many[1]
    for value in (z, mix_z):
        assert abs(value.mean()) < 0.02
        assert value.std() == pytest.approx(1, abs=0.02)
    # The two latents of an image and the images of a group are independent.
    assert abs(np.mean(z * mix_z)) < 0.02
    assert abs(np.mean(z[0::4] * z[1::4])) < 0.03


def test_classes_are_as_frequent_as_in_the_data(many: tuple[Sampler, Any]) -> None:
    c = many[1][1]
    np.testing.assert_array_equal(c.sum(1), 1)
    np.testing.assert_allclose(c.mean(0), [0.1, 0, 0.6, 0.3], atol=0.03)
    assert c[:, 1].sum() == 0


def test_a_group_mixes_styles_together(many: tuple[Sampler, Any]) -> None:
    draw, (_, _, _, cutoff, _) = many
    num_ws = draw.generator.num_ws
    by_group = cutoff.reshape(-1, 4)
    assert np.all(by_group == by_group[:, :1])
    mixed = by_group[:, 0][by_group[:, 0] < num_ws]
    assert len(mixed) / len(by_group) == pytest.approx(0.5, abs=0.05)
    values, counts = np.unique(mixed, return_counts=True)
    assert values.tolist() == list(range(1, num_ws))
    np.testing.assert_allclose(counts / len(mixed), 1 / (num_ws - 1), atol=0.06)


@pytest.mark.parametrize(("prob", "mixes"), [(0.0, False), (1.0, True)])
def test_mixing_can_be_never_or_always(prob: float, mixes: bool) -> None:
    draw = sampler(style_mixing_prob=prob, noise_mode="none")
    latents = draw.latents(Purpose.DMAIN, tf.range(40, dtype=tf.int64), 4)
    assert np.all((latents.mix_cutoff.numpy() < draw.generator.num_ws) == mixes)


def test_path_length_noise_is_standard_normal() -> None:
    noise = np.asarray(sampler()(PHASES["Greg"], tf.range(20, dtype=tf.int64)).image_noise)
    assert abs(noise.mean()) < 0.03
    assert noise.std() == pytest.approx(1, abs=0.03)


def test_moments() -> None:
    values = tf.constant([[1.0], [2.0], [-4.0]])
    np.testing.assert_allclose(moments(values), [3, -1, 21])
