"""A run that is killed again and again ends as one that never was, down to the last bit."""

from __future__ import annotations

import pathlib

import pytest

from tests.gcs.fixture import Gcs
from tests.training.chaos import MOMENTS, disturbed


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(len(MOMENTS), 6 * len(MOMENTS), marks=pytest.mark.slow),
        pytest.param(20, 60, marks=pytest.mark.proof),
    ],
)
def test_kills_on_a_storage_that_fails(
    gcs: Gcs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], kills: int, steps: int
) -> None:
    toll = disturbed(tmp_path, kills=kills, steps=steps, emulator=gcs.emulator, bucket=gcs.url)
    with capsys.disabled():
        print(f"\none worker, on gs://: {toll}")
    assert sum(toll.kills.values()) == kills
    assert sum(toll.faults.values()) > kills
    assert toll.records_lost == 0


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(1, 9, marks=pytest.mark.slow),
        pytest.param(5, 24, marks=pytest.mark.proof),
    ],
)
def test_kills_of_one_of_two_workers(
    gcs: Gcs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], kills: int, steps: int
) -> None:
    toll = disturbed(
        tmp_path, kills=kills, steps=steps, workers=2, emulator=gcs.emulator, bucket=gcs.url
    )
    with capsys.disabled():
        print(f"\ntwo workers, on gs://: {toll}")
    assert sum(toll.kills.values()) == kills
    assert toll.records_lost == 0
    # A worker that was killed before all had met is missed after run.join_timeout.
    assert toll.slowest_end < 60 + 30
