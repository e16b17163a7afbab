"""`make smoke-gcs`, as a proof."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gcs.emulator import ROOT


@pytest.mark.slow
def test_everything_runs_on_cloud_storage() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gcs.smoke"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "none twice and none missing" in done.stdout
