"""Construction of networks, objective and state from a resolved config."""

from __future__ import annotations

from typing import NamedTuple

from trainer.augment.pipe import AugmentPipe
from trainer.config import Config
from trainer.core.schedule import Schedule
from trainer.distribution.precision import full_dtype, half_dtype
from trainer.families import registry
from trainer.families.network import Discriminator, Generator
from trainer.families.protocol import DataShape
from trainer.layers.ops import Backend
from trainer.objectives.objective import objective
from trainer.objectives.phase import Networks, Objective
from trainer.objectives.sampler import Sampler
from trainer.training.state import TrainState


def backend(platform: str, jit: bool) -> Backend:
    """The backend that computes layers fastest.

    Args:
      platform: "CPU", "GPU" or "TPU".
      jit: whether the step is compiled.
    """
    if platform == "TPU":
        return Backend.TPU
    return Backend.XLA_CPU if jit and platform == "CPU" else Backend.GENERIC


def networks(
    config: Config,
    data: DataShape,
    backend: Backend = Backend.GENERIC,
    *,
    rounded: bool = True,
    clamped: bool | None = None,
) -> tuple[Generator, Discriminator]:
    """Both networks.

    Args:
      config: resolved.
      data: what they make and judge.
      backend: how layers are computed.
      rounded: whether 16-bit blocks are; without, they keep their clamp. Images are rendered so:
        uncompiled, CPUs take 16 bits an order of magnitude slower than 32.
      clamped: whether activations are clamped; by default where `run.precision` is in 16 bits.
    """
    half, group_size = half_dtype(config.run.precision), config.training.group_size
    assert isinstance(group_size, int)
    build = registry.networks(config.model.family).build
    made: tuple[Generator, Discriminator] = build(
        config.model,
        data,
        group_size=group_size,
        clamped=half is not None if clamped is None else clamped,
        half_dtype=half if rounded else None,
        backend=backend,
    )
    return made


class Recipe(NamedTuple):
    """Networks, objective and state of the step.

    Attributes:
      networks: as they are trained.
      objective: what they are trained to do.
      sampler: of all random numbers that takes.
    """

    networks: Networks
    objective: Objective
    sampler: Sampler


def recipe(
    config: Config,
    data: DataShape,
    backend: Backend = Backend.GENERIC,
    *,
    static_shapes: bool = False,
) -> Recipe:
    """The same for the step of a run.

    Args:
      config: resolved.
      data: what is trained on.
      backend: how layers are computed.
      static_shapes: whether all shapes must be known while tracing (XLA, TPU).
    """
    generator, discriminator = networks(config, data, backend)
    training, group_size = config.training, config.training.group_size
    assert isinstance(group_size, int)
    pipe = (
        None
        if config.augment.mode == "none"
        else AugmentPipe.preset(config.augment.pipe, config.augment.color)
    )
    trained = Networks(
        generator=generator,
        discriminator=discriminator,
        pipe=pipe,
        group_size=group_size,
        freeze_d=training.freeze_d,
        static_shapes=static_shapes,
    )
    sampler = Sampler(
        seed=config.run.seed,
        generator=generator,
        group_size=group_size,
        label_counts=data.label_counts,
        pipe=pipe,
        dtype=full_dtype(config.run.precision),
    )
    return Recipe(trained, objective(config.objective, group_size), sampler)


def state(config: Config, recipe: Recipe) -> TrainState:
    """The variables of a run at its start; to be called in its strategy's scope."""
    p = config.augment.p
    p = p.at(0) if isinstance(p, Schedule) else p
    return TrainState(
        recipe.networks,
        recipe.objective,
        seed=config.run.seed,
        augment_p=p if config.augment.mode != "none" else 0.0,
        dtype=full_dtype(config.run.precision),
    )
