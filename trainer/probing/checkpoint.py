"""The pause that a checkpoint makes in training, and the speed of its transfers."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

import tensorflow as tf

from trainer import config as config_lib
from trainer.config import CheckpointConfig
from trainer.core import storage
from trainer.probing.step import Timing
from trainer.training.checkpoint import Checkpoints, Inventory
from trainer.training.run import Run


@dataclass(frozen=True)
class CheckpointSpeed:
    """Measurements of one checkpoint.

    Attributes:
      variables: how many.
      bytes: of all files of a checkpoint.
      stall: seconds that `Checkpoints.save` takes of the loop's time.
      write: seconds from then until the checkpoint is committed and the one before removed.
      restore: seconds to find it, to check it and to put it into the variables.
    """

    variables: int
    bytes: int
    stall: Timing
    write: Timing
    restore: Timing


def measure(run: Run, workdir: str, repeats: int) -> CheckpointSpeed:
    """Saves and restores the state of a run that has just begun.

    Args:
      run: from `Run.create`.
      workdir: local or gs://; what is written there is in a directory of its own, and removed.
      repeats: how often.
    """
    variables = run.state().variables()
    folder = storage.join(workdir, f"probe-{secrets.token_hex(4)}")
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1), variables)
    info = {"kimg": 0.0, "config": config_lib.to_dict(run.config)}
    times: dict[str, list[float]] = {"stall": [], "write": [], "restore": []}
    size = 0
    try:
        for step in range(1, repeats + 2):
            # As after a step, every value is new.
            for variable in variables.values():
                variable.assign(variable + tf.ones_like(variable))
            tf.test.experimental.sync_devices()
            began = time.perf_counter()
            checkpoints.save(step, info)
            saved = time.perf_counter()
            checkpoints.wait()
            written = time.perf_counter()
            found, _ = Inventory(folder).newest()
            assert found is not None and found.step == step
            checkpoints.restore(found)
            tf.test.experimental.sync_devices()
            ended = time.perf_counter()
            size = sum(digest.bytes for digest in found.files.values())
            if step > 1:  # the first one makes connections and memory ready
                times["stall"].append(saved - began)
                times["write"].append(written - saved)
                times["restore"].append(ended - written)
    finally:
        storage.remove_tree(folder)
    stall, write, restore = (Timing.of(seconds) for seconds in times.values())
    return CheckpointSpeed(len(variables), size, stall, write, restore)
