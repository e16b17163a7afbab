"""The config reaches the networks, the phases and the draws."""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

from trainer import config as config_lib
from trainer.augment.pipe import AugmentPipe
from trainer.families.protocol import DataShape
from trainer.families.stylegan2.networks import Discriminator, Generator
from trainer.training import build

SHAPE = DataShape((16, 32), 4, (5, 3))


def make(**sections: dict[str, Any]) -> config_lib.Config:
    return config_lib.resolve(config_lib.from_dict(sections), resolution=SHAPE.resolution)


MODEL: dict[str, Any] = {
    "z_dim": 6,
    "w_dim": 10,
    "mapping_layers": 3,
    "d_mapping_layers": 2,
    "channel_base": 128,
    "channel_max": 12,
    "g_architecture": "resnet",
    "d_architecture": "skip",
    "num_fp16_res": 1,
    "conv_clamp": 100.0,
}


def test_networks_are_those_of_the_config() -> None:
    g, d = build.networks(make(model=MODEL), SHAPE)
    assert (g.z_dim, g.c_dim, g.resolution, g.img_channels) == (6, 2, (16, 32), 4)
    assert (d.c_dim, d.resolution, d.img_channels) == (2, (16, 32), 4)
    assert (g.architecture, d.architecture) == ("resnet", "skip")
    g_shapes = {name: spec.shape for name, spec in g.specs.items()}
    d_shapes = {name: spec.shape for name, spec in d.specs.items()}
    assert g_shapes["mapping.embed.weight"] == (2, 10)
    assert g_shapes["mapping.fc0.weight"] == (16, 10)
    assert "mapping.fc2.weight" in g_shapes
    assert "mapping.fc3.weight" not in g_shapes
    assert g_shapes["synthesis.b4.const"][-1] == 12
    assert "mapping.fc1.weight" in d_shapes
    assert "mapping.fc2.weight" not in d_shapes


def test_no_classes_without_label_counts() -> None:
    g, d = build.networks(make(model=MODEL), DataShape((16, 32), 3, ()))
    assert (g.c_dim, d.c_dim) == (0, 0)
    assert not any("embed" in name for name in [*g.specs, *d.specs])


@pytest.mark.parametrize(
    ("precision", "half"),
    [("float32", None), ("float64", None), ("bfloat16", tf.bfloat16), ("float16", tf.float16)],
)
def test_full_precision_turns_the_clamp_off(precision: str, half: tf.DType | None) -> None:
    config = make(model=MODEL, run={"precision": precision})
    for network in build.networks(config, SHAPE):
        assert isinstance(network, Generator | Discriminator)
        assert network.conv_clamp == (None if half is None else 100.0)
        assert {block.dtype for block in network.blocks} == {half, None}


def test_unrounded_networks_keep_the_clamp() -> None:
    config = make(model=MODEL, run={"precision": "bfloat16"})
    for network in build.networks(config, SHAPE, rounded=False):
        assert isinstance(network, Generator | Discriminator)
        assert network.conv_clamp == 100.0
        assert {block.dtype for block in network.blocks} == {None}


def recipe(**sections: dict[str, Any]) -> build.Recipe:
    return build.recipe(make(model=MODEL, **sections), SHAPE)


def test_phases_are_those_of_the_config() -> None:
    networks, objective, sampler = recipe(
        training={"group_size": 2, "freeze_d": 3},
        objective={"pl_batch_shrink": 2, "g_reg_interval": 5, "d_reg_interval": 7},
        run={"seed": 11},
    )
    intervals = {phase.name: (phase.interval, phase.shrink) for phase in objective.phases}
    assert intervals == {"Gmain": (1, 1), "Greg": (5, 2), "Dmain": (1, 1), "Dreg": (7, 1)}
    assert objective.lazy == {"G": 5, "D": 7}
    assert (networks.group_size, sampler.group_size, networks.freeze_d) == (2, 2, 3)
    assert isinstance(networks.discriminator, Discriminator)
    assert networks.discriminator.mbstd_group_size == 2
    assert (sampler.seed, sampler.label_counts) == (11, (5, 3))


def test_augmentation_is_one_for_both() -> None:
    networks, _, sampler = recipe(augment={"mode": "fixed", "p": 0.5, "pipe": "bg"})
    assert networks.pipe == sampler.pipe == AugmentPipe.preset("bg")
    networks, _, sampler = recipe(augment={"mode": "none"})
    assert networks.pipe is None
    assert sampler.pipe is None
