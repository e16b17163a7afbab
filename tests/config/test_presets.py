"""Each preset loads, resolves, and says what NVIDIA's train.py says under the same name."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from trainer import config as config_lib
from trainer.config import presets
from trainer.core import storage
from trainer.core.errors import ConfigError, StorageError

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
    return config_lib.load(name)


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
    _, head, _ = (CONFIGS / f"{name}.yaml").read_text().split("\n\n", maxsplit=2)
    assert f"--config={name} " in head
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


# ---------------------------------------------------------------- by name


def test_a_name_is_the_preset_wherever_one_is(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("paper256") == config_lib.load(str(CONFIGS / "paper256.yaml"))
    assert load("paper256").training.batch_size == 64
    (tmp_path / "paper256").write_text("training: {batch_size: 8}")
    (tmp_path / "paper256.yaml").write_text("training: {batch_size: 16}")
    assert load("paper256").training.batch_size == 64
    assert load("./paper256").training.batch_size == 8
    assert load("paper256.yaml").training.batch_size == 16


def test_a_base_may_be_a_preset(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.yaml").write_text("base: paper256\nrun: {seed: 7}\n")
    config = config_lib.load(str(tmp_path / "a.yaml"))
    assert (config.run.seed, config.training.batch_size) == (7, 64)


def test_presets_are_found_inside_an_installed_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "tiny.yaml").write_text("description: Tiny\nrun: {seed: 7}\n")
    monkeypatch.setattr(storage, "_PACKAGE_ROOT", str(tmp_path))
    assert load("tiny").run.seed == 7
    assert presets.listing() == "tiny  Tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paper-256", "unknown preset 'paper-256'; did you mean the preset paper256?"),
        ("qqqqqq", "unknown preset 'qqqqqq'; --config=list lists the presets"),
        ("mine", "unknown preset 'mine'; for the file of this name give ./mine"),
        (
            "configs/smokes.yaml",
            "cannot read configs/smokes.yaml: it does not exist; check the "
            "path; did you mean the preset smoke?",
        ),
        (
            "auto.yaml",
            "cannot read auto.yaml: it does not exist; check the path; did you mean the "
            "preset auto?",
        ),
        (
            "mine/auto.yaml",
            "cannot read mine/auto.yaml: a part of the path is a file, not a "
            "directory; check the path; did you mean the preset auto?",
        ),
        (
            "memory://nowhere/qqqqqq.yaml",
            "cannot read memory://nowhere/qqqqqq.yaml: it does not "
            "exist; check the path; --config=list lists the presets",
        ),
        ("based.yaml", "based.yaml: base: unknown preset 'atuo'; did you mean the preset auto?"),
        (
            "below.yaml",
            "cannot read cifra.yaml: it does not exist; check the path; did you mean "
            "the preset cifar?",
        ),
    ],
)
def test_a_config_that_does_not_exist_is_a_usage_error(
    text: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    (tmp_path / "based.yaml").write_text("base: atuo\n")
    (tmp_path / "below.yaml").write_text("base: cifra.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_config_that_cannot_be_read_is_no_usage_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StorageError, match="it is a directory") as caught:
        load(str(tmp_path))
    assert caught.value.exit_code == 4


# ---------------------------------------------------------------- descriptions


def test_each_preset_has_a_line_in_the_list() -> None:
    lines = presets.listing().splitlines()
    assert [line.split()[0] for line in lines] == PRESETS
    for line in lines:
        _, description = line.split(maxsplit=1)
        assert description[0].isupper()
        assert not description.endswith((".", "..."))
        assert len(line) <= 100


def test_a_description_changes_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.yaml").write_text("description: Mine, and no other's\nrun: {seed: 7}\n")
    (tmp_path / "b.yaml").write_text("run: {seed: 7}\n")
    described, bare = (config_lib.load(str(tmp_path / name)) for name in ("a.yaml", "b.yaml"))
    assert described == bare
    assert config_lib.to_yaml(described) == config_lib.to_yaml(bare)
    assert config_lib.fingerprint(described) == config_lib.fingerprint(bare)


def test_a_description_is_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.yaml").write_text("description: {hunter2: 1}\nrun: {seed: 7}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: description: expected a line of text$"):
        config_lib.load(str(tmp_path / "a.yaml"))
