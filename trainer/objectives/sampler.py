"""Seeds to draws: the only source of randomness in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import tensorflow as tf

from trainer.augment.pipe import AugmentPipe
from trainer.augment.pipe import Draws as AugmentDraws
from trainer.core.seeds import Purpose, fold_in_groups
from trainer.families.network import Latents, StyleGenerator


class Draws(NamedTuple):
    """Everything random in one phase of one round; a field its phase doesn't use is empty.

    Attributes:
      latents: of the fakes.
      image_noise: [N, H, W, C], standard normal.
      augment_fake, augment_real: for `AugmentPipe.apply`.
    """

    latents: Latents = ()  # type: ignore[assignment]
    image_noise: tf.Tensor = ()
    augment_fake: AugmentDraws = {}  # noqa: RUF012 (never changed)
    augment_real: AugmentDraws = {}  # noqa: RUF012


@dataclass(frozen=True)
class Sampler:
    """Turns the seeds of groups into draws.

    Attributes:
      seed: the run's seed.
      generator: for the sizes of latents and noise.
      group_size: images in a group.
      style_mixing_prob: how often a group's fakes mix two latents.
      noise_mode: "random", "const" or "none".
      label_counts: images of each class in the data set: fakes have classes as often as reals.
      pipe: the augmentation, or None.
      dtype: of the draws. They are made in float32 and converted, so that the numbers of a run
        do not depend on its precision.
    """

    seed: int
    generator: StyleGenerator
    group_size: int
    style_mixing_prob: float
    noise_mode: str
    label_counts: tuple[int, ...]
    pipe: AugmentPipe | None
    dtype: tf.DType = tf.float32

    def __call__(self, phase: Drawing, group_index: tf.Tensor) -> Draws:
        """The draws of a phase for groups, [groups] int64."""
        return tf.nest.map_structure(self._convert, phase.sample(self, group_index))

    def _convert(self, draw: tf.Tensor) -> tf.Tensor:
        return tf.cast(draw, self.dtype) if draw.dtype.is_floating else draw

    def augmentation(self, purpose: Purpose, group_index: tf.Tensor) -> AugmentDraws:
        """Draws the augmentation of all images of each group."""
        if self.pipe is None:
            return {}
        seeds = fold_in_groups(self.seed, purpose, group_index)
        return self.pipe.draw(seeds, self.group_size, self._image_shape)

    def image_noise(self, purpose: Purpose, group_index: tf.Tensor, size: int) -> tf.Tensor:
        """Draws [groups * size, H, W, C], standard normal: `size` images for each group."""
        seeds = fold_in_groups(self.seed, purpose, group_index)
        shape = [size, *self._image_shape]
        return tf.concat([tf.random.stateless_normal(shape, s) for s in tf.unstack(seeds)], 0)

    def latents(self, purpose: Purpose, group_index: tf.Tensor, size: int | None = None) -> Latents:
        """Draws the latents of `size` fakes for each group, by default of a whole one."""
        seeds = fold_in_groups(self.seed, purpose, group_index)
        parts = [self._group_latents(seed, size or self.group_size) for seed in tf.unstack(seeds)]
        return Latents(*(tf.concat(field, 0) for field in zip(*parts, strict=True)))

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return (*self.generator.resolution, self.generator.img_channels)

    def _group_latents(self, seed: tf.Tensor, size: int) -> Latents:
        generator = self.generator
        noises = sum(height * width for height, width in generator.noise_shapes)
        num_noises = noises if self.noise_mode == "random" else 0
        row = 2 * generator.z_dim + num_noises
        normal = tf.random.stateless_normal([size, row], seed)
        z, mix_z, noise = tf.split(normal, [generator.z_dim, generator.z_dim, num_noises], 1)
        # Flipping bits gives a second stream of the same seed. One pair of numbers decides for
        # the whole group whether and where styles mix, one for each image its class.
        uniform = tf.random.stateless_uniform([size + 2], tf.bitwise.invert(seed))
        num_ws = generator.num_ws
        cutoff = 1 + tf.cast(uniform[1] * (num_ws - 1), tf.int32)
        cutoff = tf.where(
            uniform[0] < self.style_mixing_prob, tf.minimum(cutoff, num_ws - 1), num_ws
        )
        return Latents(z, self._classes(uniform[2:]), mix_z, tf.repeat(cutoff, size), noise)

    def _classes(self, uniform: tf.Tensor) -> tf.Tensor:
        if not self.generator.c_dim:
            return tf.zeros([uniform.shape[0], 0])
        counts = tf.constant(self.label_counts, tf.float32)
        bounds = tf.cumsum(counts) / tf.reduce_sum(counts)
        # Comparing with the inner bounds can't fall off the end by rounding.
        index = tf.reduce_sum(tf.cast(uniform[:, tf.newaxis] >= bounds[:-1], tf.int32), 1)
        return tf.one_hot(index, self.generator.c_dim)


# What a phase draws for groups.
Sample = Callable[[Sampler, tf.Tensor], Draws]


class Drawing(Protocol):
    """What draws: a `phase.Phase`."""

    @property
    def name(self) -> str:
        """The name of the phase."""

    @property
    def sample(self) -> Sample:
        """What it draws."""
