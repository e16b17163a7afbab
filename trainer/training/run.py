"""Every decision of a run, made once: for training, for probes and for TPUs that aren't there."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from trainer import config as config_lib
from trainer.config import BatchArithmetic, Config, Cost
from trainer.core.errors import ConfigError
from trainer.data.manifest import Manifest
from trainer.distribution import precision
from trainer.distribution.cluster import Cluster
from trainer.distribution.strategy import Placement, choose
from trainer.families.protocol import DataShape
from trainer.training import build
from trainer.training.build import Recipe
from trainer.training.preemption import Preemption
from trainer.training.state import TrainState
from trainer.training.step import TrainStep


def shape_of(manifest: Manifest, config: Config) -> DataShape:
    """The shape of a data set, as networks need it."""
    counts = manifest.condition_counts(config.data.use_labels)
    return DataShape(manifest.resolution, manifest.channels, counts)


@dataclass(frozen=True)
class Run:
    """Everything that follows from a config, the shape of the data and the devices.

    Attributes:
      config: resolved.
      data: what is trained on.
      placement: where.
      jit: whether the step is compiled.
      arithmetic: how a batch divides.
      recipe: what the step trains.
    """

    config: Config
    data: DataShape
    placement: Placement
    jit: bool
    arithmetic: BatchArithmetic
    recipe: Recipe

    @classmethod
    def create(
        cls,
        config: Config,
        data: DataShape,
        cluster: Cluster | None = None,
        stop: Preemption | None = None,
    ) -> Run:
        """Decides for the devices of this machine and of the other workers.

        Args:
          config: as loaded.
          data: what is trained on.
          cluster: the workers, if there are several.
          stop: what may end the run early: the workers meet before TensorFlow waits for them.

        Raises:
          ConfigError: the config doesn't fit itself, the data or the devices.
        """
        config = config_lib.resolve(config, resolution=data.resolution)
        if stop:
            stop.meet()
        placement, jit = choose(config.run, cluster)
        if stop:
            stop.listen()
        if config.run.deterministic:
            tf.config.experimental.enable_op_determinism()
        arithmetic, recipe = decide(
            config, data, placement.platform, jit, placement.strategy.num_replicas_in_sync
        )
        return cls(config, data, placement, jit, arithmetic, recipe)

    @property
    def separate_devices(self) -> int:
        """The number of replicas that compute apart from each other: those on one CPU share it."""
        return self.arithmetic.num_replicas if self.placement.accelerated else 1

    def cost(self) -> Cost:
        """A summary that takes nothing to run."""
        return config_lib.estimate_cost(self.config, self.arithmetic, self.data)

    def state(self) -> TrainState:
        """The variables at the start of the run, on its devices."""
        with self.placement.strategy.scope():
            return build.state(self.config, self.recipe)

    def step(self, state: TrainState) -> TrainStep:
        """The step that trains a state."""
        strategy = self.placement.strategy
        return TrainStep(self.config, self.arithmetic, strategy, state, *self.recipe, jit=self.jit)


def check_data(run: Run, num_images: int) -> None:
    """Refuses a data set that several batches of one step would show more than once.

    Raises:
      ConfigError: it is smaller than what a step reads.
    """
    a = run.arithmetic
    read = a.groups_per_step * a.group_size
    if a.batches > 1 and read > num_images:
        raise ConfigError(
            f"a step reads {a.batches} batches of {a.global_batch} images (objective.d_steps = "
            f"{run.config.objective.d_steps}), and the data set has {num_images}; make "
            "training.batch_size or objective.d_steps smaller"
        )


def decide(
    config: Config, data: DataShape, platform: str, jit: bool, replicas: int
) -> tuple[BatchArithmetic, Recipe]:
    """The division of the batch, and the objective of the step.

    Args:
      config: resolved.
      data: what is trained on.
      platform: "CPU", "GPU" or "TPU".
      jit: whether the step is compiled.
      replicas: over all workers.

    Raises:
      ConfigError: the config doesn't fit the data or the devices.
    """
    precision.prepare(config.run.precision, platform)
    arithmetic = config_lib.batch_arithmetic(config, replicas)
    backend = build.backend(platform, jit)
    return arithmetic, build.recipe(config, data, backend, static_shapes=jit)
