"""The estimate without TensorFlow against the one that counts the networks themselves."""

from __future__ import annotations

import pytest

from trainer.core import config as config_lib
from trainer.core.config import Config
from trainer.training import build, cost
from trainer.vertex import sizes


@pytest.mark.parametrize(
    ("preset", "overrides", "resolution", "classes"),
    [
        ("stylegan2", [], (1024, 1024), 0),
        ("paper256", [], (256, 256), 0),
        ("cifar", ["data.use_labels=true"], (32, 32), 10),
        ("emoji64", [], (64, 64), 9),
        ("auto", ["run.precision=float32"], (128, 256), 0),
        ("smoke", ["model.g_architecture=resnet", "model.d_architecture=skip"], (32, 32), 0),
        ("smoke", ["model.g_architecture=orig", "run.precision=float64"], (96, 64), 0),
    ],
)
def test_the_same_as_the_networks(
    preset: str, overrides: list[str], resolution: tuple[int, int], classes: int
) -> None:
    loaded = config_lib.load(f"configs/{preset}.yaml", overrides)
    config: Config = config_lib.resolve(loaded, resolution=resolution)
    arithmetic = config_lib.batch_arithmetic(config, 1)
    shape = build.DataShape(resolution, 3, (1,) * classes)
    exact = cost.estimate(config, arithmetic, *build.networks(config, shape))
    counted = sizes.estimate(config, arithmetic, resolution, num_classes=classes)
    assert (counted.g_params, counted.d_params) == (exact.g_params, exact.d_params)
    assert counted.state_mib == pytest.approx(exact.state_mib)
    assert counted.activations_mib == pytest.approx(exact.activations_mib)
