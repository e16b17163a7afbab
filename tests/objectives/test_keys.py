"""What makes sense together in the `objective` section, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from trainer import config as config_lib
from trainer.core.errors import ConfigError
from trainer.objectives.keys import ObjectiveConfig

STYLES = {"styles": True, "family": "some", "ada": False}


@pytest.mark.parametrize(
    ("keys", "facts", "message"),
    [
        ({}, {"styles": False}, r"pl_weight: .* styles, and some has none; set it to 0"),
        ({"g_reg_interval": None}, {}, r"g_reg_interval = null: .* phases of its own"),
        (
            {"adversarial": "wasserstein", "label_smoothing": 0.1},
            {},
            r"label_smoothing: wasserstein has no labels .* logistic or minimax",
        ),
        ({"gradient_penalty": 10}, {}, r"gradient_penalty pulls slopes to 1 and r1_gamma pulls"),
        (
            {"adversarial": "wasserstein", "r1_gamma": 0},
            {},
            r"adversarial = wasserstein: nothing bounds .* objective\.gradient_penalty",
        ),
        ({"adversarial": "relativistic"}, {"ada": True}, r"augment\.mode = ada .* relativistic"),
        ({"adversarial": "least_squares"}, {"ada": True}, r"augment\.mode = ada .* least_squares"),
    ],
)
def test_what_makes_no_sense_together(
    keys: dict[str, Any], facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ObjectiveConfig(**keys).check(**{**STYLES, **facts})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "facts"),
    [
        ({}, {}),
        ({}, {"ada": True}),
        ({"pl_weight": 0, "g_reg_interval": None}, {"styles": False}),
        ({"adversarial": "wasserstein", "r1_gamma": 0, "gradient_penalty": 10, "d_steps": 5}, {}),
        ({"adversarial": "minimax", "label_smoothing": 0.1}, {}),
        ({"r1_gamma": {"cosine": [0, 1], "kimg": 5}, "d_reg_interval": None}, {}),
    ],
)
def test_what_does(keys: dict[str, Any], facts: dict[str, Any]) -> None:
    ObjectiveConfig(**keys).check(**{**STYLES, **facts})


def test_resolving_a_config_checks_them() -> None:
    config = config_lib.from_dict({"objective": {"adversarial": "wasserstein", "r1_gamma": 0}})
    with pytest.raises(ConfigError, match="nothing bounds"):
        config_lib.resolve(config, resolution=(32, 32))


@pytest.mark.parametrize(
    ("keys", "batches"),
    [({}, 1), ({"d_steps": 5}, 5), ({"adversarial": "relativistic", "d_steps": 2}, 3)],
)
def test_a_step_reads_a_batch_for_each_update_that_needs_fresh_reals(
    keys: dict[str, Any], batches: int
) -> None:
    assert ObjectiveConfig(**keys).batches == batches
    config = config_lib.from_dict({"objective": keys, "training": {"batch_size": 8}})
    arithmetic = config_lib.batch_arithmetic(config, 2)
    assert arithmetic.global_batch == 8
    assert arithmetic.groups_per_step * arithmetic.group_size == 8 * batches


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("logistc", "did you mean 'logistic'"),
        ("hinges", "did you mean 'hinge'"),
        ("vae", "'relativistic'$"),
    ],
)
def test_an_unknown_loss_is_refused_with_those_there_are(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"adversarial = '{name}' .*'logistic', .*{meant}"):
        ObjectiveConfig(adversarial=name)


def test_an_unknown_penalty_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown key objective\.r1_gama; .* objective\.r1_gamma"
    ):
        config_lib.from_dict({"objective": {"r1_gama": 1}})
