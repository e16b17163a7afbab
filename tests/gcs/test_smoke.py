"""`make smoke-gcs`, as a proof."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gcs.emulator import ROOT, SERVERS


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(server, marks=pytest.mark.proof if number else pytest.mark.slow)
        for number, server in enumerate(SERVERS)
    ],
)
def test_everything_runs_on_cloud_storage(server: str) -> None:
    command = [sys.executable, "-m", "tests.gcs.smoke", server]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "none twice and none missing" in done.stdout
