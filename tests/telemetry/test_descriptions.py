"""Each statistic has a description."""

from __future__ import annotations

import pytest

from trainer import config as config_lib
from trainer.objectives import objective
from trainer.objectives.penalties import PENALTIES
from trainer.telemetry.descriptions import describe


@pytest.mark.parametrize("name", [penalty.report for penalty in PENALTIES])
def test_penalties_are_described(name: str) -> None:
    assert describe(name)


@pytest.mark.parametrize("preset", ["smoke", "r3gan-smoke"])
def test_reports_of_phases_are_described(preset: str) -> None:
    config = config_lib.resolve(config_lib.load(preset), resolution=(32, 32))
    phases = objective.objective(config.objective, 4).phases
    names = {name for phase in phases for name in phase.reports}
    assert {"Loss/G/loss", "Loss/D/loss"} <= names
    assert not [name for name in names if not describe(name)]


def test_names_with_a_part_of_their_own() -> None:
    assert describe("Schedule/training.g_lr") == "Value of training.g_lr now, by its schedule."
    assert describe("Precision/skipped/Gmain").startswith("Updates of the phase Gmain skipped")
    assert describe("Loss/unknown") == ""
