"""From a resolved config to networks, phases and draws."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.config import Config
from trainer.distribution.precision import full_dtype, half_dtype
from trainer.networks.ops import Formulas
from trainer.networks.stylegan2 import Discriminator, Generator
from trainer.training.augment import AugmentPipe
from trainer.training.phases import Phases, Sampler
from trainer.training.state import TrainState


@dataclass(frozen=True)
class DataShape:
    """What the networks must know of the data set.

    Attributes:
      resolution: (height, width).
      channels: 1 to 4.
      label_counts: images of each class; empty for unconditional training.
    """

    resolution: tuple[int, int]
    channels: int
    label_counts: tuple[int, ...]


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
) -> tuple[Generator, Discriminator]:
    """Both networks.

    Args:
      config: resolved.
      data: what they make and judge.
      formulas: how layers are computed.
      rounded: whether 16-bit blocks are; without, they keep their clamp. Pictures are drawn so:
        uncompiled, CPUs take 16 bits an order of magnitude slower than 32.
    """
    model = config.model
    half = half_dtype(config.run.precision)
    group_size = config.training.group_size
    assert isinstance(model.channel_base, int) and isinstance(group_size, int)
    clamp = model.conv_clamp if half is not None else None
    generator = Generator(
        z_dim=model.z_dim,
        c_dim=len(data.label_counts),
        w_dim=model.w_dim,
        resolution=data.resolution,
        img_channels=data.channels,
        mapping_layers=model.mapping_layers,
        channel_base=model.channel_base,
        channel_max=model.channel_max,
        architecture=model.g_architecture,
        num_fp16_res=model.num_fp16_res,
        conv_clamp=clamp,
        half_dtype=half if rounded else None,
        formulas=formulas,
    )
    discriminator = Discriminator(
        c_dim=len(data.label_counts),
        resolution=data.resolution,
        img_channels=data.channels,
        channel_base=model.channel_base,
        channel_max=model.channel_max,
        architecture=model.d_architecture,
        mapping_layers=model.d_mapping_layers,
        mbstd_group_size=group_size,
        num_fp16_res=model.num_fp16_res,
        conv_clamp=clamp,
        half_dtype=half if rounded else None,
        formulas=formulas,
    )
    return generator, discriminator


def state(config: Config, generator: Generator, discriminator: Discriminator) -> TrainState:
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
    generator: Generator,
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
