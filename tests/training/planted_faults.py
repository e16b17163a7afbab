"""Plants mistakes in the training step that only several replicas bring out, and shows what they do.

    python -m tests.training.planted_faults DATA

Prints as JSON how far each takes a few steps on two replicas from the same steps in one piece: the
largest relative L2 of a tensor of the state, by the fault's name, '' being none. A program, since
only one mirrored strategy can train in a process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
import yaml

from tests.training.placement import CONFIG, GROUP, distance
from trainer import config as config_lib
from trainer.data import manifest as manifest_lib
from trainer.data.manifest import Manifest
from trainer.data.pipeline import ImageStream
from trainer.families.protocol import DataShape
from trainer.families.stylegan2.networks import Discriminator
from trainer.objectives.sampler import Sampler
from trainer.training import build, step
from trainer.training.state import TrainState
from trainer.training.step import TrainStep

BATCH, STEPS, REPLICAS = 16, 4, 2

# Replaces an attribute by a function of the original while a fault is planted.
Patch = tuple[Any, str, Callable[..., Any]]


def _seeds(original: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(self: Any, phase: Any, group_index: tf.Tensor) -> Any:
        groups = BATCH // GROUP
        local = tf.range(group_index.shape[0], dtype=group_index.dtype)
        return original(self, phase, group_index // groups * groups + local)

    return drawn


def _groups(original: Callable[..., Any]) -> Callable[..., Any]:
    def judged(self: Any, params: Any, images: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        # NVIDIA's groups: of the N images here, n is in group n mod N / G.
        order = np.arange(images.shape[0]).reshape(GROUP, -1).T.ravel()
        logits = original(self, params, tf.gather(images, order), tf.gather(c, order))
        return tf.gather(logits, np.argsort(order))

    return judged


def _gradient_mean(original: Callable[..., Any]) -> Callable[..., Any]:
    def mean(values: list[tf.Tensor]) -> list[tf.Tensor]:
        # The moments in reports have three values.
        return [v if v.shape == [3] else v / REPLICAS for v in original(values)]

    return mean


def _local(chosen: Callable[[str, tf.Tensor], bool]) -> Callable[..., Any]:
    """Takes for some sums over replicas what this replica alone would."""

    def patch(original: Callable[..., Any]) -> Callable[..., Any]:
        def summed(self: Any, values: Any) -> Any:
            return replaced(original(self, values), values)

        return summed

    def replaced(total: Any, mine: Any, name: str = "") -> Any:
        if isinstance(total, dict):
            return {key: replaced(value, mine[key], key) for key, value in total.items()}
        if isinstance(total, (tuple, list)):
            return type(total)(replaced(*pair, name) for pair in zip(total, mine, strict=True))
        return mine * REPLICAS if chosen(name, total) else total

    return patch


# What could be taken for each replica by mistake.
FAULTS: dict[str, Patch] = {
    "": (Sampler, "__call__", lambda original: original),
    "seeds": (Sampler, "__call__", _seeds),
    "groups": (Discriminator, "__call__", _groups),
    "gradient mean": (step, "_all_reduce", _gradient_mean),
    "path length mean": (
        TrainStep,
        "_sum_over_replicas",
        _local(lambda name, value: name in ("", "pl_mean")),
    ),
    "w mean": (
        TrainStep,
        "_sum_over_replicas",
        _local(lambda name, value: name == "mapping.w_avg"),
    ),
    "ADA statistic": (
        TrainStep,
        "_sum_over_replicas",
        _local(lambda name, value: name == "Loss/signs/real"),
    ),
}


def state_after(manifest: Manifest, strategy: tf.distribute.Strategy) -> dict[str, np.ndarray]:
    """The state after a few steps, op by op: tracing a graph would take longest."""
    settings = yaml.safe_load(CONFIG)
    settings["run"]["precision"] = "float64"
    settings["training"]["batch_size"] = BATCH
    settings["augment"]["adjust_kimg"] = 10 * BATCH / 1000
    config = config_lib.resolve(config_lib.from_dict(settings), resolution=manifest.resolution)
    arithmetic = config_lib.batch_arithmetic(config, strategy.num_replicas_in_sync)
    shape = DataShape(manifest.resolution, manifest.channels, tuple(manifest.label_counts))
    recipe = build.recipe(config, shape)
    seed = config.run.seed
    with strategy.scope():
        state = TrainState(*recipe[:2], seed=seed, augment_p=config.augment.p, dtype=tf.float64)
    train_step = TrainStep(config, arithmetic, strategy, state, *recipe, jit=False)
    stream = ImageStream(
        manifest,
        group_size=GROUP,
        groups_per_batch=arithmetic.groups_per_step,
        seed=seed,
        use_labels=True,
        window=config.data.window,
    )
    for _ in range(STEPS):
        train_step(*next(stream))
    return {name: variable.numpy() for name, variable in state.variables().items()}


def main(data: str) -> None:
    """Prints what each fault does."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration() for _ in range(REPLICAS)]
    tf.config.set_logical_device_configuration(cpu, parts)
    tf.config.run_functions_eagerly(True)
    manifest = manifest_lib.load(data)
    wanted = state_after(manifest, tf.distribute.get_strategy())
    mirrored = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(REPLICAS)])
    found = {}
    for name, (owner, attribute, patch) in FAULTS.items():
        with mock.patch.object(owner, attribute, patch(getattr(owner, attribute))):
            state = state_after(manifest, mirrored)
        found[name] = max(distance(state[key], value) for key, value in wanted.items())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
