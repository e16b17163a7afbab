"""Starting over in a workdir: what a run has written is moved aside, and nothing is removed."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection

from trainer.core import storage
from trainer.core.lease import Lease
from trainer.telemetry import tensorboard

_CHECKPOINTS = "checkpoints/"
_WRITTEN = re.compile(r"stats\.jsonl|config\.yaml|reals\.png|fakes(_init|\d{6,})\.png")


def move(workdir: str, events: str, files: Collection[str], lease: Lease) -> str:
    """Moves a run's checkpoints, statistics, grids and events into a directory of their own.

    Args:
      workdir: of the run.
      events: directory of TensorBoard's events, '' for none.
      files: what there is in the workdir, by `storage.walk`.
      lease: of the workdir.

    Returns:
      The directory, in the workdir. Events that lie elsewhere are moved to one of the same name there.

    Raises:
      LeaseLostError: another job writes the workdir now.
      StorageError: something can't be moved; the same command goes on with the rest.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    name = f"before-{now:%Y%m%dT%H%M%SZ}"
    target = storage.join(workdir, name)
    moves = {
        storage.join(workdir, file): storage.join(target, file)
        for file in files
        if _WRITTEN.fullmatch(file)
    }
    if events:
        below = storage.join(events, "").startswith(storage.join(workdir, ""))
        moves |= {
            storage.join(events, file): storage.join(events, name, file)
            for file in storage.walk(events)
            if tensorboard.own(file, "" if below else tensorboard.mark(workdir))
        }
    # The checkpoints last: as long as one is there, a start that is cut off is made again.
    moves |= {
        storage.join(workdir, file): storage.join(target, file)
        for file in sorted(files)
        if file.startswith(_CHECKPOINTS)
    }
    for source, place in moves.items():
        with lease.fenced():
            if not storage.is_remote(place):
                storage.makedirs(place.rpartition("/")[0])
            storage.rename(source, place)
            storage.remove_empty(source.rpartition("/")[0])
    return target
