"""Each preset loads, resolves, and says what NVIDIA's train.py says under the same name."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from trainer import config as config_lib

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

# NVIDIA's cfg_specs, copied by hand: kimg, mb, mbstd, fmaps, lrate, gamma, ema, ramp, map.
NVIDIA = {
    "stylegan2": (25000, 32, 4, 1, 0.002, 10, 10, None, 8),
    "paper256": (25000, 64, 8, 0.5, 0.0025, 1, 20, None, 8),
    "paper512": (25000, 64, 8, 1, 0.0025, 0.5, 20, None, 8),
    "paper1024": (25000, 32, 4, 1, 0.002, 2, 10, None, 8),
    "cifar": (100000, 64, 32, 1, 0.0025, 0.01, 500, 0.05, 2),
}

# --cfg=auto with 8 GPUs, by resolution: mb, mbstd, fmaps, lrate, gamma, ema.
AUTO = {
    32: (64, 4, 0.5, 0.0025, 0.0032, 20),
    64: (64, 4, 0.5, 0.0025, 0.0128, 20),
    128: (64, 4, 0.5, 0.0025, 0.0512, 20),
    256: (64, 4, 0.5, 0.0025, 0.2048, 20),
    512: (64, 4, 1, 0.0025, 0.8192, 20),
    1024: (32, 4, 1, 0.002, 6.5536, 10),
    2048: (16, 2, 1, 0.002, 52.4288, 5),
}


def load(name: str) -> config_lib.Config:
    return config_lib.load(str(CONFIGS / f"{name}.yaml"))


def spec(config: config_lib.Config) -> tuple[Any, ...]:
    training, model = config.training, config.model
    assert training.g_lr == training.d_lr
    return (
        training.total_kimg,
        training.batch_size,
        training.group_size,
        float(model.channel_base) / 32768,
        training.g_lr,
        config.objective.r1_gamma,
        training.ema_kimg,
        training.ema_rampup,
        model.mapping_layers,
    )


def test_all_presets_are_there() -> None:
    r3gan = {"cifar10", "ffhq64", "ffhq256", "imagenet32", "imagenet64", "smoke"}
    assert set(PRESETS) == {
        *NVIDIA,
        "auto",
        "smoke",
        "smoke-relativistic",
        "emoji64",
        "digits32",
        *(f"r3gan-{n}" for n in r3gan),
    }


@pytest.mark.parametrize("name", NVIDIA)
def test_values_are_nvidias(name: str) -> None:
    config = load(name)
    assert spec(config) == NVIDIA[name]
    assert config_lib.resolve(config, resolution=(32, 32)) == config


@pytest.mark.parametrize("resolution", AUTO)
def test_auto_follows_nvidias_rules(resolution: int) -> None:
    config = config_lib.resolve(load("auto"), resolution=(resolution, resolution))
    mb, mbstd, fmaps, lrate, gamma, ema = AUTO[resolution]
    expected = (25000, mb, mbstd, fmaps, lrate, pytest.approx(gamma), ema, 0.05, 2)
    assert spec(config) == expected
    assert "auto" not in [
        v for keys in (config.model, config.objective, config.training) for v in vars(keys).values()
    ]


@pytest.mark.parametrize("name", [*NVIDIA, "auto"])
def test_what_nvidias_presets_share(name: str) -> None:
    config = load(name)
    is_cifar = name == "cifar"
    assert vars(config.augment) == {
        "mode": "ada",
        "pipe": "bgc",
        "color": 1.0,
        "p": 0.0,
        "target": 0.6,
        "adjust_kimg": 500.0,
        "interval": 4,
    }
    model, objective, training = config.model, config.objective, config.training
    assert (model.z_dim, model.w_dim, model.channel_max) == (512, 512, 512)
    assert (model.num_fp16_res, model.conv_clamp, config.run.precision) == (4, 256, "bfloat16")
    assert (model.g_architecture, model.d_architecture) == (
        "skip",
        "orig" if is_cifar else "resnet",
    )
    assert (training.beta1, training.beta2) == (0, 0.99)
    assert (objective.pl_batch_shrink, objective.pl_decay) == (2, 0.01)
    assert objective.pl_weight == (0 if is_cifar else 2)
    assert model.style_mixing_prob == (0 if is_cifar else 0.9)
    assert (objective.g_reg_interval, objective.d_reg_interval) == (4, 16)
    assert (config.telemetry.tick_kimg, config.telemetry.snap_ticks) == (4, 50)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_on_one_replica_and_says_how_in_its_head(name: str) -> None:
    side = 64 if name == "emoji64" else 32
    config = config_lib.resolve(load(name), resolution=(side, side))
    assert config_lib.batch_arithmetic(config, num_replicas=1).per_replica_batch > 0
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text[: text.index("\n\n")]
    assert f"--config=configs/{name}.yaml" in head
    for part in ("Hardware", "s/kimg", "memory"):
        assert f"\n# {part}" in head


@pytest.mark.parametrize("name", [*NVIDIA, "auto"])
def test_nvidias_presets_fit_8_replicas(name: str) -> None:
    replicas = 2 if name == "cifar" else 8
    config = config_lib.resolve(load(name), resolution=(512, 512))
    assert config_lib.batch_arithmetic(config, replicas).per_replica_batch % 4 == 0


def test_small_presets_are_conditional_and_smoke_brings_its_data() -> None:
    assert load("emoji64").data.use_labels and load("digits32").data.use_labels
    assert load("smoke").data.path == "package:data/fluent_emoji_32"
    assert load("smoke").run.precision == "float32"
