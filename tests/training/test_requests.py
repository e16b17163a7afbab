"""What a run asks of Cloud Storage: few listings, and no object anew too often."""

from __future__ import annotations

import collections
import itertools

import pytest

from tests.gcs.fixture import Gcs
from tests.training.conftest import TINY_MODEL
from trainer import config as config_lib
from trainer.config import Config
from trainer.data.manifest import Manifest
from trainer.training import loop

_STEPS = 6
# Of one object in Cloud Storage; ours and the emulator's clocks are read at other moments.
_REWRITE_SECONDS = 0.9


def _config(manifest: Manifest, steps: int) -> Config:
    return config_lib.from_dict(
        {
            "run": {"jit": "off"},
            "data": {"path": manifest.directory},
            "model": TINY_MODEL,
            "training": {"batch_size": 8, "total_kimg": 0.008 * steps},
            "checkpoint": {"every_steps": 2},
            # Grids are named by their kimg, of which all steps here make a tenth: so one a start.
            "telemetry": {"tick_kimg": 0.008, "snap_ticks": 100},
        }
    )


@pytest.mark.usefixtures("eagerly")
@pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")
def test_requests_of_a_run(squares: Manifest, gcs: Gcs) -> None:
    """Of a start and of a resumption; every step is a tick here, and the last one a snapshot."""
    workdir = f"{gcs.url}/run"
    for steps, lists in ((_STEPS, 1), (2 * _STEPS, 1), (2 * _STEPS, 1)):
        gcs.emulator.reset_counts()
        loop.train(_config(squares, steps), workdir)
        counts = gcs.emulator.counts()
        assert counts["GET", "list"] == lists
        written = collections.defaultdict(list)
        for request in gcs.emulator.log():
            if request.kind in ("write", "compose") and not request.object.endswith(".tail"):
                written[request.object].append(request.time)
        for name, times in written.items():
            gaps = [b - a for a, b in itertools.pairwise(times)]
            # The lease is taken and given back in one start, however short that is.
            assert name.endswith("lease.json") or min(gaps, default=9) > _REWRITE_SECONDS, name
    # Of the last start, which found nothing to do: one look at each file it needs.
    assert sum(n for (_, kind), n in counts.items() if kind in ("stat", "read")) < 12
