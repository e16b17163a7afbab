"""One result wherever a run is computed, and no way to take anything for each replica unseen."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.training import placement as placement_lib
from tests.training.placement import PLACEMENTS, Outcome, Placement, distances, run
from trainer.data.manifest import Manifest

# float64 decides. How far float32's rounding takes a small bias in eight steps differs from CPU to
# CPU: 2.3e-4 was seen with oneDNN on one with AVX-512.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
SHOWS = 0.01  # by what a mistake takes the state off, at least


def assert_same(found: Outcome, wanted: Outcome, tolerance: float) -> None:
    apart = {name: value for name, value in distances(found, wanted).items() if value > tolerance}
    assert not apart
    assert found.images == wanted.images
    assert len(found.stats) == len(wanted.stats) > 1
    for line, expected in zip(found.stats, wanted.stats, strict=True):
        assert line.keys() == expected.keys()
        for name, stat in expected.items():
            values, numbers = (
                list(s.values()) if isinstance(s, dict) else [s] for s in (line[name], stat)
            )
            np.testing.assert_allclose(
                values, numbers, rtol=10 * tolerance, atol=10 * tolerance, err_msg=name
            )


@pytest.fixture(scope="module")
def in_one_piece(squares: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(Placement(), squares.directory, tmp_path_factory.mktemp("runs") / "whole")


def test_two_workers_in_two_rounds_are_one(
    squares: Manifest, in_one_piece: Outcome, tmp_path: pathlib.Path
) -> None:
    found = run(Placement(workers=2, rounds=2), squares.directory, tmp_path / "run")
    assert_same(found, in_one_piece, TOLERANCE["float64"])
    # All gradients and statistics of a phase at once, and before them Greg's mean length.
    assert sum(found.collectives.values()) == 5
    assert in_one_piece.collectives == {}


def test_the_comparison_is_one(in_one_piece: Outcome) -> None:
    """The steps use every image once, and everything that can move does."""
    assert sorted(in_one_piece.images) == list(range(placement_lib.STEPS * 16 // 2))
    assert in_one_piece.values["counters/step"] == placement_lib.STEPS
    strengths = [line["Progress/augment"]["mean"] for line in in_one_piece.stats]
    assert min(np.diff(strengths)) < 0 < max(np.diff(strengths))
    for phase in ("Loss/pl_penalty", "Loss/r1_penalty"):
        assert sum(line[phase]["num"] for line in in_one_piece.stats if phase in line) > 0
    assert in_one_piece.values["objective/pl_mean"] > 0


# Workers, replicas, rounds and steps in a row together; and the formulas of TPUs.
SOME = (
    Placement(workers=2, replicas=2, rounds=2, steps_per_loop=4),
    Placement(replicas=2, rounds=2, tpu=True),
)


@pytest.mark.parametrize(
    ("precision", "placements"),
    [
        pytest.param("float64", SOME, marks=pytest.mark.slow),
        pytest.param("float64", PLACEMENTS, marks=pytest.mark.proof),
        pytest.param("float32", (Placement(replicas=2, rounds=2),), marks=pytest.mark.slow),
    ],
)
def test_every_placement_gives_the_same(
    squares: Manifest,
    tmp_path: pathlib.Path,
    precision: str,
    placements: tuple[Placement, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = placement_lib.run_all(placements, squares.directory, tmp_path, precision)
    with capsys.disabled():
        print(f"\n{precision}\n{placement_lib.table(outcomes)}")
    for placement, outcome in outcomes.items():
        assert_same(outcome, outcomes[placement.whole], TOLERANCE[precision])


@pytest.mark.proof
def test_what_is_taken_for_each_replica_shows(squares: Manifest) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.planted_faults", squares.directory],
        cwd=placement_lib.ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("") < TOLERANCE["float64"]
    assert len(found) == 6
    assert not [fault for fault, apart in found.items() if apart < SHOWS]
