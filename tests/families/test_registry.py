"""Families by name, and the config's keys that go with the one that is chosen."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, ClassVar, Literal

import pytest

from trainer import config as config_lib
from trainer.config import loading
from trainer.core.errors import ConfigError
from trainer.families import protocol, registry
from trainer.families.protocol import DataShape


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_familys_keys_choose_it(name: str) -> None:
    keys = registry.keys(name)
    config = config_lib.from_dict({"model": {"family": name}})
    assert type(config.model) is keys
    assert config.model.family == name


@pytest.mark.parametrize("name", registry.NAMES)
def test_tables_are_those_of_the_networks(name: str) -> None:
    from trainer.training import build

    objective = {} if registry.keys(name).STYLES else {"pl_weight": 0}
    config = config_lib.from_dict({"model": {"family": name}, "objective": objective})
    config = config_lib.resolve(config, resolution=(64, 64))
    data = DataShape((64, 64), 3, (1, 2))
    tables = config.model.tables(data)
    g, d = build.networks(config, data)
    assert g.specs == tables.generator
    assert d.specs == tables.discriminator
    assert tables.generator.trainable > 0 and tables.generator.flop > 0


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "stylgan2",
            r"c\.yaml: model\.family = 'stylgan2': unknown family; did you mean stylegan2",
        ),
        ("vae", "unknown family; families are stylegan2"),
        ([1], r"model\.family = a list: unknown family"),
        (None, r"model\.family = "),
    ],
)
def test_unknown_families(family: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_lib.from_dict({"model": {"family": family}}, where="c.yaml")


@dataclasses.dataclass(frozen=True)
class Other(protocol.Keys):
    """A family that isn't there.

    Attributes:
      stages: in the networks.
    """

    NAME: ClassVar[str] = "model"

    family: Literal["other"] = "other"
    stages: int = 4


@pytest.fixture
def _two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.keys
    monkeypatch.setattr(registry, "NAMES", ("stylegan2", "other"))
    monkeypatch.setattr(registry, "keys", lambda name: Other if name == "other" else real(name))
    loading.known_keys.cache_clear()


def test_a_group_too_small_for_batch_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = registry.keys(registry.DEFAULT)
    monkeypatch.setattr(keys, "SMALLEST_GROUP", 16)
    training = {"batch_size": 32, "group_size": 8}
    config = config_lib.from_dict({"training": training})
    with pytest.raises(ConfigError, match=r"group_size = 8: .* a group, which needs 16 images"):
        config_lib.resolve(config, resolution=(32, 32))
    config = config_lib.from_dict({"training": {**training, "group_size": 16}})
    assert config_lib.resolve(config, resolution=(32, 32)).training.group_size == 16


@pytest.mark.usefixtures("_two_families")
def test_keys_are_those_of_the_chosen_family(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {family: other, stages: 3}\n")
    assert config_lib.load(str(path)).model == Other(stages=3)
    assert config_lib.load(str(path), ["model.stages=5"]).model == Other(stages=5)
    with pytest.raises(ConfigError, match="unknown key model.stags; did you mean model.stages"):
        config_lib.load(str(path), ["model.stags=5"])
    with pytest.raises(ConfigError, match=r"model\.w_dim is a key of stylegan2, and .* is other"):
        config_lib.load(str(path), ["model.w_dim=5"])
    with pytest.raises(ConfigError, match=r"c\.yaml: model\.stages is a key of other"):
        config_lib.load(str(path), ["model.family=stylegan2"])
