"""Cost of a run on a slice of TPUs: the real training step, compiled for it phase by phase."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer import config as config_lib
from trainer.config import BatchArithmetic, Config
from trainer.core.errors import ConfigError
from trainer.distribution import tpu
from trainer.families.protocol import DataShape
from trainer.probing import tpu_compiler, tpu_estimate
from trainer.probing.tpu_compiler import Topology
from trainer.probing.tpu_estimate import Estimate
from trainer.training import build
from trainer.training.build import Recipe
from trainer.training.run import decide
from trainer.training.state import TrainState
from trainer.training.step import TrainStep


@dataclass(frozen=True)
class Phase:
    """One program of a step.

    Attributes:
      name: as in `TrainStep.programs`.
      share: in which share of all steps it runs.
      seconds: that lowering and compiling took.
      estimate: None if it didn't compile.
      error: why it didn't, in one line.
    """

    name: str
    share: float
    seconds: float
    estimate: Estimate | None
    error: str = ""


@dataclass(frozen=True)
class LargestBatch:
    """The number of images that a replica has room for.

    Attributes:
      images: at most, 0 if a single group doesn't fit.
      phase: which needs the most memory.
      other: images for which that was compiled, too.
      error: why it didn't compile; then more than `images` may fit.
    """

    images: int
    phase: str
    other: int
    error: str = ""


@dataclass(frozen=True)
class TpuRun:
    """A run on a slice that isn't there."""

    config: Config
    data: DataShape
    topology: Topology
    arithmetic: BatchArithmetic
    state: TrainState
    recipe: Recipe

    @classmethod
    def create(
        cls,
        config: Config,
        data: DataShape,
        topology_name: str,
        replicas: int | None,
        per_replica_batch: int | None,
    ) -> TpuRun:
        """Takes the decisions of a run.

        Args:
          config: as loaded.
          data: what the networks must know of it.
          topology_name: of the slice, as v5e:2x2.
          replicas: how many of its devices take part; None is all.
          per_replica_batch: images of one replica in one round, which then make the batch; None
            takes the config's batch.

        Raises:
          ConfigError: the config doesn't fit itself, the data or the slice.
          UsageError: the compiler is missing.
        """
        slice_ = tpu_compiler.topology(topology_name)
        replicas = replicas or len(slice_.devices)
        if replicas > len(slice_.devices):
            raise ConfigError(
                f"--replicas={replicas}, but {topology_name} has {len(slice_.devices)} devices; "
                "give a larger slice"
            )
        if per_replica_batch:
            batch = replicas * per_replica_batch * config.training.rounds
            training = dataclasses.replace(config.training, batch_size=batch)
            config = dataclasses.replace(config, training=training)
        config = config_lib.resolve(config, resolution=data.resolution)
        arithmetic, recipe = decide(config, data, "TPU", True, replicas)
        return cls(config, data, slice_, arithmetic, build.state(config, recipe), recipe)

    def compile_phases(self) -> Iterator[Phase]:
        """Compiles one program after the other: minutes each, for large networks."""
        for name in self._step(self.arithmetic).programs:
            yield self._compile(name, self.arithmetic, self.share(name))

    def share(self, phase: str) -> float:
        """The share of all steps that run a phase."""
        runs = {
            each.name: len(each.batches) / each.interval for each in self.recipe.objective.phases
        }
        return runs.get(phase, 1.0)

    def largest_batch(self, phases: list[Phase]) -> LargestBatch:
        """The largest per-replica batch that fits, by a line through two sizes.

        The phase that needs most memory is compiled once more, at another size.

        Args:
          phases: all compiled, at the run's size.
        """
        worst, needed = max(
            ((p, p.estimate.hbm) for p in phases if p.estimate), key=lambda pair: pair[1]
        )
        group, here = self.arithmetic.group_size, self.arithmetic.per_replica_batch
        there = group if here > group else 2 * group
        room = self.topology.chip.hbm - needed
        other = self._compile(worst.name, self._with_batch(there), 1.0)
        if other.estimate is None:
            return LargestBatch(here if room >= 0 else 0, worst.name, there, other.error)
        slope = (other.estimate.hbm - needed) / (there - here)
        return LargestBatch(max(int(here + room / slope) // group * group, 0), worst.name, there)

    def seconds_per_kimg(self, phases: list[Phase]) -> tuple[float, float]:
        """Raw and adjusted, of the whole slice with the regularisers as often as they are due."""
        per_kimg = 1000 / self.arithmetic.global_batch
        done = [(phase.share, phase.estimate) for phase in phases if phase.estimate]
        raw = sum(share * estimate.raw for share, estimate in done)
        adjusted = sum(share * estimate.adjusted for share, estimate in done)
        return raw * per_kimg, adjusted * per_kimg

    def _with_batch(self, per_replica: int) -> BatchArithmetic:
        a = self.arithmetic
        batch = per_replica * a.num_replicas * a.rounds
        return dataclasses.replace(
            a,
            global_batch=batch,
            groups_per_step=a.batches * batch // a.group_size,
            per_replica_batch=per_replica,
        )

    def _step(self, arithmetic: BatchArithmetic) -> TrainStep:
        return TrainStep(
            self.config,
            arithmetic,
            tpu.stand_in(),
            self.state,
            *self.recipe,
            jit=True,
            all_reduce=tpu.cross_replica_sum(arithmetic.num_replicas),
        )

    def _specs(self, arithmetic: BatchArithmetic) -> Sequence[tf.TensorSpec]:
        """The arguments of a phase on one replica."""
        a = arithmetic
        groups = a.groups_per_step // a.batches // a.num_replicas
        size, shape = arithmetic.group_size, (*self.data.resolution, self.data.channels)
        return (
            tf.TensorSpec([groups, size, *shape], tf.uint8),
            tf.TensorSpec([groups, size], tf.int64),
            tf.TensorSpec([groups], tf.int64),
        )

    def program(
        self, name: str, arithmetic: BatchArithmetic
    ) -> tuple[Callable[..., Any], Sequence[tf.TensorSpec]]:
        """One of the step's programs as a replica runs it, and its arguments."""
        step = self._step(arithmetic)
        if name == "finish":
            return _flat(step.programs[name], step.no_reports())
        return step.programs[name], self._specs(arithmetic)

    def _compile(self, name: str, arithmetic: BatchArithmetic, share: float) -> Phase:
        program, specs = self.program(name, arithmetic)
        start = time.monotonic()
        try:
            hlo = tpu_compiler.lower(program, specs)
            executable = tpu_compiler.compile_hlo(hlo, self.topology, arithmetic.num_replicas)
            found = tpu_estimate.estimate(executable, self.topology)
        except (RuntimeError, ValueError, tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:200]
            return Phase(name, share, time.monotonic() - start, None, reason)
        return Phase(name, share, time.monotonic() - start, found)


def _flat(
    program: Callable[..., Any], example: Any
) -> tuple[Callable[..., Any], list[tf.TensorSpec]]:
    """A program that takes the tensors of its nested argument one by one, and their specs."""
    specs = [tf.TensorSpec.from_tensor(tensor) for tensor in tf.nest.flatten(example)]
    return lambda *values: program(tf.nest.pack_sequence_as(example, values)), specs
