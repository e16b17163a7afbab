"""Small runs of any family, without a word about which there are."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tensorflow as tf

from tests.training.conftest import TINY_MODEL
from tests.training.test_step import Run
from trainer.core import sections
from trainer.data import manifest as manifest_lib
from trainer.data.manifest import Manifest
from trainer.families import registry

# What makes networks small, where a family has such a key.
_SMALL: dict[str, Any] = {**TINY_MODEL, "group_channels": 4, "blocks": 1, "num_fp16_res": 1}


def make(
    family: str,
    manifest: Manifest,
    *,
    precision: str = "float64",
    rounds: int = 1,
    replicas: int = 0,
    jit: bool = False,
) -> Run:
    """Training on three classes with augmentation, R1, and path length where there are styles."""
    keys = registry.keys(family)
    small = {name: value for name, value in _SMALL.items() if name in sections.keys(keys)}
    config: dict[str, Any] = {
        "run": {"precision": precision},
        "data": {"use_labels": True, "window": 8},
        "model": {"family": family, **small},
        "objective": {
            "pl_weight": 2 if keys.STYLES else 0,
            "g_reg_interval": 2,
            "d_reg_interval": 2,
        },
        "training": {"batch_size": 8, "rounds": rounds, "ema_kimg": 0.05},
        "augment": {"mode": "fixed", "p": 0.3},
    }
    return Run(manifest, base=config, replicas=replicas, jit=jit)


def main(family: str, data: str, out: str) -> None:
    """Makes two steps on two replicas, op by op, and writes the state."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.config.run_functions_eagerly(True)
    run = make(family, manifest_lib.load(data), replicas=2)
    run.steps(2)
    arrays: dict[str, Any] = run.values()
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
