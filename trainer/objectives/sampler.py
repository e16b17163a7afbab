"""Seeds to draws: the only source of randomness in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import tensorflow as tf

from trainer.augment.pipe import AugmentPipe
from trainer.augment.pipe import Draws as AugmentDraws
from trainer.core.seeds import Purpose, fold_in, fold_in_groups
from trainer.families.network import Generator, Latents


class Draws(NamedTuple):
    """Everything random in one phase of one round; a field its phase doesn't use is empty.

    Attributes:
      latents: of the fakes.
      image_noise: [N, H, W, C], standard normal.
      augment_fake, augment_real: for `AugmentPipe.apply`.
      noise: [N, 2, H, W, C], standard normal: of a fake and of a real.
      between: [N, 1, 1, 1], uniform: how far from a fake to a real.
    """

    latents: Latents = ()  # type: ignore[assignment]
    image_noise: tf.Tensor = ()
    augment_fake: AugmentDraws = {}  # noqa: RUF012 (never changed)
    augment_real: AugmentDraws = {}  # noqa: RUF012
    noise: tf.Tensor = ()
    between: tf.Tensor = ()


@dataclass(frozen=True)
class Sampler:
    """Turns the seeds of groups into draws.

    Attributes:
      seed: the run's seed.
      generator: whose latents are drawn.
      group_size: images in a group.
      label_counts: images of each class in the data set: fakes have classes as often as reals.
      pipe: the augmentation, or None.
      dtype: of the draws. They are made in float32 and converted, so that the numbers of a run
        do not depend on its precision.
    """

    seed: int
    generator: Generator
    group_size: int
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
        return self._normal(purpose, group_index, [size, *self._image_shape])

    def noise_pair(self, purpose: Purpose, group_index: tf.Tensor) -> tf.Tensor:
        """Draws [groups * group_size, 2, H, W, C], standard normal."""
        return self._normal(purpose, group_index, [self.group_size, 2, *self._image_shape])

    def uniform(self, purpose: Purpose, group_index: tf.Tensor) -> tf.Tensor:
        """Draws [groups * group_size, 1, 1, 1] in [0, 1)."""
        seeds = fold_in_groups(self.seed, purpose, group_index)
        shape = [self.group_size, 1, 1, 1]
        return tf.concat([tf.random.stateless_uniform(shape, s) for s in tf.unstack(seeds)], 0)

    def latents(self, purpose: Purpose, group_index: tf.Tensor, size: int | None = None) -> Latents:
        """Draws the latents of `size` fakes for each group, by default of a whole one."""
        size = size or self.group_size
        seeds = tf.unstack(fold_in_groups(self.seed, purpose, group_index))
        # Classes are drawn as if in a run with another seed.
        label_seed = fold_in(self.seed, Purpose.LABELS)
        label_seeds = tf.unstack(fold_in_groups(label_seed, purpose, group_index))
        parts = [
            self.generator.sample(seed, self._classes(tf.random.stateless_uniform([size], label)))
            for seed, label in zip(seeds, label_seeds, strict=True)
        ]
        return tf.nest.map_structure(lambda *groups: tf.concat(groups, 0), *parts)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return (*self.generator.resolution, self.generator.img_channels)

    def _normal(self, purpose: Purpose, group_index: tf.Tensor, shape: list[int]) -> tf.Tensor:
        seeds = fold_in_groups(self.seed, purpose, group_index)
        return tf.concat([tf.random.stateless_normal(shape, s) for s in tf.unstack(seeds)], 0)

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
