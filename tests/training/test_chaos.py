"""A run that is killed again and again ends as one that never was, down to the last bit."""

from __future__ import annotations

import pathlib

import pytest

from tests.gcs.fixture import Gcs
from tests.training.chaos import chaos


@pytest.mark.slow
def test_twenty_kills_on_a_storage_that_fails(
    gcs: Gcs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toll = chaos(tmp_path, kills=20, steps=60, emulator=gcs.emulator, bucket=gcs.url)
    with capsys.disabled():
        print(f"\none worker, on gs://: {toll}")
    assert sum(toll.kills.values()) == 20
    assert sum(toll.faults.values()) > 20
    assert toll.records_lost == 0


@pytest.mark.slow
def test_five_kills_of_one_of_two_workers(
    gcs: Gcs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toll = chaos(tmp_path, kills=5, steps=24, workers=2, emulator=gcs.emulator, bucket=gcs.url)
    with capsys.disabled():
        print(f"\ntwo workers, on gs://: {toll}")
    assert sum(toll.kills.values()) == 5
    assert toll.records_lost == 0
    # A worker that was killed before all had met is missed after run.join_timeout.
    assert toll.slowest_end < 60 + 30
