"""From a resolved config to networks, phases and draws."""

from __future__ import annotations

from trainer.config import Config
from trainer.distribution.precision import full_dtype, half_dtype
from trainer.families import registry
from trainer.families.network import Discriminator, StyleGenerator
from trainer.families.protocol import DataShape
from trainer.layers.ops import Formulas
from trainer.training.augment import AugmentPipe
from trainer.training.phases import Phases, Sampler
from trainer.training.state import TrainState


def formulas(platform: str, jit: bool) -> Formulas:
    """How layers are computed fastest.

    Args:
      platform: "CPU", "GPU" or "TPU".
      jit: whether the step is compiled.
    """
    if platform == "TPU":
        return Formulas.TPU
    return Formulas.XLA_CPU if jit and platform == "CPU" else Formulas.GENERIC


def networks(
    config: Config,
    data: DataShape,
    formulas: Formulas = Formulas.GENERIC,
    *,
    rounded: bool = True,
    clamped: bool | None = None,
) -> tuple[StyleGenerator, Discriminator]:
    """Both networks.

    Args:
      config: resolved.
      data: what they make and judge.
      formulas: how layers are computed.
      rounded: whether 16-bit blocks are; without, they keep their clamp. Pictures are drawn so:
        uncompiled, CPUs take 16 bits an order of magnitude slower than 32.
      clamped: whether activations are clamped; by default where `run.precision` is in 16 bits.
    """
    half, group_size = half_dtype(config.run.precision), config.training.group_size
    assert isinstance(group_size, int)
    build = registry.networks(config.model.family).build
    made: tuple[StyleGenerator, Discriminator] = build(
        config.model,
        data,
        group_size=group_size,
        clamped=half is not None if clamped is None else clamped,
        half_dtype=half if rounded else None,
        formulas=formulas,
    )
    return made


def state(config: Config, generator: StyleGenerator, discriminator: Discriminator) -> TrainState:
    """The variables of a run at its start; to be called in its strategy's scope."""
    return TrainState(
        generator,
        discriminator,
        seed=config.run.seed,
        freeze_d=config.training.freeze_d,
        augment_p=config.augment.p if config.augment.mode != "none" else 0.0,
        dtype=full_dtype(config.run.precision),
    )


def phases_and_draws(
    config: Config,
    data: DataShape,
    generator: StyleGenerator,
    discriminator: Discriminator,
    *,
    static_shapes: bool,
) -> tuple[Phases, Sampler]:
    """What a step computes, and what it draws at random."""
    training = config.training
    group_size, gamma = training.group_size, training.r1_gamma
    assert isinstance(group_size, int) and not isinstance(gamma, str)
    pipe = None if config.augment.mode == "none" else AugmentPipe.preset(config.augment.pipe)
    phases = Phases(
        generator=generator,
        discriminator=discriminator,
        noise_mode=training.noise_mode,
        pipe=pipe,
        group_size=group_size,
        r1_gamma=gamma,
        pl_weight=training.pl_weight,
        pl_decay=training.pl_decay,
        g_reg_interval=training.g_reg_interval,
        d_reg_interval=training.d_reg_interval,
        freeze_d=training.freeze_d,
        static_shapes=static_shapes,
    )
    sampler = Sampler(
        seed=config.run.seed,
        generator=generator,
        group_size=group_size,
        pl_group_size=group_size // training.pl_batch_shrink,
        style_mixing_prob=training.style_mixing_prob,
        noise_mode=training.noise_mode,
        label_counts=data.label_counts,
        pipe=pipe,
        dtype=full_dtype(config.run.precision),
    )
    return phases, sampler
