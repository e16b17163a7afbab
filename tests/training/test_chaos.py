"""A run that is killed, stopped and damaged again and again ends as one that never was."""

from __future__ import annotations

import pathlib

import pytest

from tests.gcs.fixture import Gcs
from tests.training.chaos import MOMENTS, disturbed


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(2, 12, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("on_gcs", "kills", "pauses", "corruptions", "steps"),
    [
        pytest.param(True, len(MOMENTS), 2, 4, 36, marks=pytest.mark.slow, id="small"),
        pytest.param(False, 40, 40, 40, 600, marks=pytest.mark.proof, id="disk"),
        pytest.param(True, 40, 40, 40, 600, marks=pytest.mark.proof, id="gcs"),
    ],
)
def test_kills_pauses_and_corruptions(
    gcs: Gcs,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    on_gcs: bool,
    kills: int,
    pauses: int,
    corruptions: int,
    steps: int,
) -> None:
    toll = disturbed(
        tmp_path,
        kills=kills,
        pauses=pauses,
        corruptions=corruptions,
        steps=steps,
        light=True,
        emulator=gcs.emulator if on_gcs else None,
        bucket=gcs.url,
    )
    with capsys.disabled():
        print(f"\nlight steps, {'on gs://' if on_gcs else 'on disk'}: {toll}")
    assert sum(toll.kills.values()) >= kills
    assert sum(toll.pauses.values()) == pauses
    assert sum(toll.corruptions.values()) == corruptions
    assert toll.records_lost == 0
