"""The published presets: numbers of parameters, and schedules."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import pytest

from trainer import config as config_lib
from trainer.config import Config, Schedule
from trainer.core.errors import ConfigError
from trainer.families.protocol import DataShape

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"


class Published(NamedTuple):
    """What the authors' train.py makes of a preset."""

    resolution: int
    classes: int
    parameters: tuple[int, int]  # of G and D
    fp16_stages: int
    batch: int
    images: float  # until all schedules end
    gamma: tuple[float, float]
    p: float
    ema: float  # images


PUBLISHED = {
    "cifar10": Published(32, 10, (20781952, 21280512), 3, 512, 2e7, (0.05, 0.005), 0.55, 5e6),
    "ffhq64": Published(64, 0, (22429824, 22381440), 4, 256, 2e7, (2, 0.2), 0.3, 5e5),
    "ffhq256": Published(256, 0, (23057952, 23009568), 4, 256, 2e7, (150, 15), 0.3, 5e5),
    "imagenet32": Published(32, 1000, (82914304, 86548992), 3, 4096, 2e8, (0.5, 0.05), 0.5, 5e7),
    "imagenet64": Published(64, 1000, (103570432, 107205120), 4, 4096, 2e8, (1, 0.1), 0.4, 5e7),
}

every_preset = pytest.mark.parametrize("name", PUBLISHED)


def load(name: str) -> Config:
    return config_lib.load(str(CONFIGS / f"r3gan-{name}.yaml"))


@every_preset
def test_parameters(name: str) -> None:
    published = PUBLISHED[name]
    side = published.resolution, published.resolution
    config = config_lib.resolve(load(name), resolution=side)
    labels = (1,) * published.classes if config.data.use_labels else ()
    assert len(labels) == published.classes
    tables = config.model.tables(DataShape(side, 3, labels))
    assert (tables.generator.trainable, tables.discriminator.trainable) == published.parameters


@every_preset
def test_schedules(name: str) -> None:
    published, config = PUBLISHED[name], load(name)
    kimg = published.images / 1000
    training, objective, augment = config.training, config.objective, config.augment
    assert config.model.num_fp16_res == published.fp16_stages
    assert (training.batch_size, training.beta1, training.ema_rampup) == (published.batch, 0, None)
    assert training.g_lr == training.d_lr == Schedule("cosine", 2e-4, 5e-5, kimg)
    assert training.beta2 == Schedule("cosine", 0.9, 0.99, kimg)
    assert objective.r1_gamma == objective.r2_gamma == Schedule("cosine", *published.gamma, kimg)
    assert training.ema_kimg == Schedule("cosine", 0, published.ema / 1000, kimg)
    assert augment.p == Schedule("cosine", 0, published.p, kimg)
    assert (augment.mode, augment.pipe, augment.color) == ("fixed", "bgc-cutout", 0.5)
    assert (objective.adversarial, objective.first) == ("relativistic", "D")
    assert objective.d_reg_interval is objective.g_reg_interval is None
    # A third of the way, where the authors' cosine has come a quarter of its way.
    assert isinstance(augment.p, Schedule)
    assert augment.p.at(kimg / 3) == pytest.approx(published.p / 4, rel=1e-9)
    assert augment.p.at(2 * kimg) == published.p


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"group_channels": 20}, r"group_channels = 20 does not divide the 1536 hidden .* 4 pix"),
        (
            {"channel_base": 64, "group_channels": 1},
            r"does not divide the 0 hidden channels at 128",
        ),
        ({"w_dim": 5}, r"model\.w_dim is a key of stylegan2, and model\.family is r3gan"),
        ({"blocs": 1}, r"unknown key model\.blocs; did you mean model\.blocks"),
    ],
)
def test_wrong_keys(model: dict[str, Any], message: str) -> None:
    def resolve() -> None:
        config_lib.from_dict({"model": {"family": "r3gan", **model}}).model.resolved((128, 128))

    with pytest.raises(ConfigError, match=message):
        resolve()


def test_a_size_it_cannot_make() -> None:
    config = config_lib.from_dict({"model": {"family": "r3gan"}})
    with pytest.raises(ConfigError, match="100x100.*nearest are 96x96"):
        config.model.resolved((100, 100))
