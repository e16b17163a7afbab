"""The four phases of a training step: what each draws at random and which gradients it takes.

Gmain and Dmain run at every step, the regularisers Greg (path length) and Dreg (R1) at every few
(StyleGAN2, appendix B, "lazy regularization"). A phase is a pure function of parameters, images
and draws that works on whole groups and returns sums over its samples: whoever calls it adds the
sums of all rounds and replicas, so nothing here depends on where or in how many pieces it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from trainer.core.seeds import Purpose, fold_in_groups
from trainer.families.network import Discriminator, Params, StyleGenerator
from trainer.layers.ops import Formulas
from trainer.training import losses
from trainer.training.augment import AugmentPipe
from trainer.training.augment import Draws as AugmentDraws

Grads = dict[str, tf.Tensor]
# For each reported quantity: how many values, their sum, the sum of their squares.
Report = dict[str, tf.Tensor]


class Latents(NamedTuple):
    """What a batch of fakes is made from.

    Attributes:
      z: [N, z_dim], standard normal.
      c: [N, c_dim], one-hot labels.
      mix_z: [N, z_dim], the second latent of style mixing.
      mix_cutoff: [N] int32, the first layer that takes the second latent; num_ws mixes none.
      noise: [N, sum of layers' H * W] standard normal, or [N, 0] where noise isn't random.
    """

    z: tf.Tensor
    c: tf.Tensor
    mix_z: tf.Tensor
    mix_cutoff: tf.Tensor
    noise: tf.Tensor


class Draws(NamedTuple):
    """Everything random in one phase of one round; a field its phase doesn't use is empty.

    Attributes:
      latents: of the fakes.
      pl_noise: [N, H, W, C], standard normal (Greg).
      augment_fake, augment_real: for `AugmentPipe.apply`.
    """

    latents: Latents = ()  # type: ignore[assignment]
    pl_noise: tf.Tensor = ()
    augment_fake: AugmentDraws = {}  # noqa: RUF012 (never changed)
    augment_real: AugmentDraws = {}  # noqa: RUF012


# (phase, group_index [groups] int64) -> the draws of these groups.
Draw = Callable[[str, tf.Tensor], Draws]


@dataclass(frozen=True)
class Sampler:
    """Turns seeds into draws: the only source of randomness in training.

    Attributes:
      seed: the run's seed.
      generator: for the sizes of latents and noise.
      group_size: images in a group.
      pl_group_size: images of each group that Greg takes.
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
    pl_group_size: int
    style_mixing_prob: float
    noise_mode: str
    label_counts: tuple[int, ...]
    pipe: AugmentPipe | None
    dtype: tf.DType = tf.float32

    def __call__(self, phase: str, group_index: tf.Tensor) -> Draws:
        return tf.nest.map_structure(self._convert, self._draw(phase, group_index))

    def _convert(self, draw: tf.Tensor) -> tf.Tensor:
        return tf.cast(draw, self.dtype) if draw.dtype.is_floating else draw

    def _draw(self, phase: str, group_index: tf.Tensor) -> Draws:
        shape = (*self.generator.resolution, self.generator.img_channels)

        def augment(purpose: Purpose) -> AugmentDraws:
            if self.pipe is None:
                return {}
            seeds = fold_in_groups(self.seed, purpose, group_index)
            return self.pipe.draw(seeds, self.group_size, shape)

        if phase == "Gmain":
            latents = self.latents(Purpose.GMAIN, group_index, self.group_size)
            return Draws(latents, augment_fake=augment(Purpose.AUGMENT_GMAIN))
        if phase == "Greg":
            latents = self.latents(Purpose.GREG, group_index, self.pl_group_size)
            seeds = fold_in_groups(self.seed, Purpose.PL_NOISE, group_index)
            normal = tf.random.stateless_normal
            noise = [normal([self.pl_group_size, *shape], s) for s in tf.unstack(seeds)]
            return Draws(latents, pl_noise=tf.concat(noise, 0))
        if phase == "Dmain":
            return Draws(
                self.latents(Purpose.DMAIN, group_index, self.group_size),
                augment_fake=augment(Purpose.AUGMENT_DMAIN_FAKE),
                augment_real=augment(Purpose.AUGMENT_DMAIN_REAL),
            )
        return Draws(augment_real=augment(Purpose.AUGMENT_DREG))

    def latents(self, purpose: Purpose, group_index: tf.Tensor, group_size: int) -> Latents:
        """Draws the latents of `group_size` fakes for each group."""
        seeds = fold_in_groups(self.seed, purpose, group_index)
        parts = [self._group_latents(seed, group_size) for seed in tf.unstack(seeds)]
        return Latents(*(tf.concat(field, 0) for field in zip(*parts, strict=True)))

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


def moments(values: tf.Tensor) -> tf.Tensor:
    """[3]: the number of values, their sum, and the sum of their squares."""
    number = tf.cast(tf.size(values), values.dtype)
    return tf.stack([number, tf.reduce_sum(values), tf.reduce_sum(tf.square(values))])


def _gradients(
    tape: tf.GradientTape, total: tf.Tensor, sources: Any, scale: tf.Tensor | None
) -> Any:
    """The gradients of a sum in what it was made from, taken at `scale` times their size."""
    # Some parameters have no part in a loss: the last bias none in path length, for example.
    grads = tape.gradient(
        total,
        sources,
        output_gradients=scale,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return grads if scale is None else tf.nest.map_structure(lambda grad: grad / scale, grads)


@dataclass(frozen=True)
class Phases:
    """The gradients of each phase, summed over the samples of one round on one replica.

    Attributes:
      generator, discriminator: the networks.
      noise_mode: "random", "const" or "none".
      pipe: the augmentation, or None.
      group_size: images in a group.
      r1_gamma, pl_weight, pl_decay: weights as in NVIDIA's code.
      g_reg_interval, d_reg_interval: how much a regulariser's gradient is scaled up for running
        only so often.
      freeze_d: layers of the discriminator that don't train.
      static_shapes: whether all shapes must be known while tracing (XLA, TPU).
    """

    generator: StyleGenerator
    discriminator: Discriminator
    noise_mode: str
    pipe: AugmentPipe | None
    group_size: int
    r1_gamma: float
    pl_weight: float
    pl_decay: float
    g_reg_interval: int
    d_reg_interval: int
    freeze_d: int
    static_shapes: bool

    def gmain(
        self,
        g: Params,
        d: Params,
        draws: Draws,
        p: tf.Tensor,
        batch: int,
        scale: tf.Tensor | None = None,
    ) -> tuple[Grads, Report, tf.Tensor]:
        """Logistic loss of the generator.

        Args:
          g, d: parameters.
          draws: of this round's groups.
          p: [], probability of augmentation.
          batch: images in the whole batch, over which losses are averaged.
          scale: [], keeps gradients within float16's range on the way; they come out unscaled.

        Returns:
          Gradients of the generator, what to report, and the sum of w over the samples [w_dim].
        """
        weights = {name: g[name] for name in self.generator.trainable_names()}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            images, w = self._generate({**g, **weights}, draws.latents)
            logits = self._score(d, images, draws.latents.c, draws.augment_fake, p)
            loss = losses.generator_logistic(logits)
            total = tf.reduce_sum(loss) / batch
        report = {
            "Loss/scores/fake": moments(logits),
            "Loss/signs/fake": moments(tf.sign(logits)),
            "Loss/G/loss": moments(loss),
        }
        return _gradients(tape, total, weights, scale), report, tf.reduce_sum(w, 0)

    def path_lengths(self, g: Params, draws: Draws, scale: tf.Tensor | None = None) -> tf.Tensor:
        """The lengths alone: [N]."""
        return self._path_lengths(g, draws, scale)[0]

    def greg(
        self,
        g: Params,
        draws: Draws,
        batch_mean: tf.Tensor | None,
        moving_mean: tf.Tensor,
        batch: int,
        scale: tf.Tensor | None = None,
    ) -> tuple[Grads, Report, tf.Tensor, tf.Tensor]:
        """Path length regularisation of the generator.

        Args:
          g: parameters.
          draws: of this round's groups.
          batch_mean: [], mean length over the whole batch; None if this round is the whole batch.
          moving_mean: [], of the lengths before this step.
          batch: images in the whole (shrunk) batch.
          scale: as for `gmain`, of the first and of the second gradient.

        Returns:
          Gradients, what to report, the sum of w [w_dim], and the new moving mean [].
        """
        weights = {name: g[name] for name in self.generator.trainable_names()}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            lengths, w = self._path_lengths({**g, **weights}, draws, scale)
            mean = tf.reduce_mean(lengths) if batch_mean is None else batch_mean
            penalty, coefficients, moving_mean = losses.path_length_coefficients(
                tf.stop_gradient(lengths), mean, moving_mean, self.pl_decay
            )
            factor = self.pl_weight * self.g_reg_interval / batch
            total = tf.reduce_sum(coefficients * lengths) * factor
        report = {
            "Loss/pl_penalty": moments(penalty),
            "Loss/G/reg": moments(penalty * self.pl_weight),
        }
        grads = _gradients(tape, total, weights, scale)
        return grads, report, tf.reduce_sum(w, 0), moving_mean

    def dmain(
        self,
        g: Params,
        d: Params,
        images: tf.Tensor,
        c: tf.Tensor,
        draws: Draws,
        p: tf.Tensor,
        batch: int,
        scale: tf.Tensor | None = None,
    ) -> tuple[Grads, Report, tf.Tensor]:
        """Logistic loss of the discriminator, on fakes and reals in one pass.

        Args:
          g, d: parameters.
          images: [N, H, W, C] in [-1, 1], reals.
          c: [N, c_dim], their labels.
          draws, p, batch, scale: as for `gmain`.

        Returns:
          Gradients of the discriminator, what to report, and the sum of w [w_dim].
        """
        fakes, w = self._generate(g, draws.latents)
        fakes = self._augment(tf.stop_gradient(fakes), draws.augment_fake, p)
        reals = self._augment(images, draws.augment_real, p)
        both, labels = tf.concat([fakes, reals], 0), tf.concat([draws.latents.c, c], 0)
        weights = {name: d[name] for name in self.discriminator.trainable_names(self.freeze_d)}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            logits = self.discriminator({**d, **weights}, both, labels)
            fake_logits, real_logits = tf.split(logits, 2)
            loss = losses.discriminator_logistic(fake_logits, real_logits)
            total = tf.reduce_sum(loss) / batch
        report = {
            "Loss/scores/fake": moments(fake_logits),
            "Loss/signs/fake": moments(tf.sign(fake_logits)),
            "Loss/scores/real": moments(real_logits),
            "Loss/signs/real": moments(tf.sign(real_logits)),
            "Loss/D/loss": moments(loss),
        }
        return _gradients(tape, total, weights, scale), report, tf.reduce_sum(w, 0)

    def dreg(
        self,
        d: Params,
        images: tf.Tensor,
        c: tf.Tensor,
        draws: Draws,
        p: tf.Tensor,
        batch: int,
        scale: tf.Tensor | None = None,
    ) -> tuple[Grads, Report]:
        """R1 regularisation of the discriminator, at the images before augmentation.

        Args:
          d, images, c, draws, p, batch: as for `dmain`.
          scale: as for `greg`.

        Returns:
          Gradients of the discriminator and what to report.
        """
        weights = {name: d[name] for name in self.discriminator.trainable_names(self.freeze_d)}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(images)
                logits = self._score({**d, **weights}, images, c, draws.augment_real, p)
                score = tf.reduce_sum(logits)
            penalty = losses.r1_penalty(_gradients(inner, score, images, scale))
            factor = self.r1_gamma / 2 * self.d_reg_interval / batch
            total = tf.reduce_sum(penalty) * factor
        report = {
            "Loss/scores/real": moments(logits),
            "Loss/signs/real": moments(tf.sign(logits)),
            "Loss/r1_penalty": moments(penalty),
            "Loss/D/reg": moments(penalty * (self.r1_gamma / 2)),
        }
        return _gradients(tape, total, weights, scale), report

    # ----------------------------------------------------------------------------------

    def _ws(self, g: Params, latents: Latents) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixed ws [N, num_ws, w_dim], and the w of the first latent [N, w_dim]."""
        w = self.generator.map(g, latents.z, latents.c)
        mixed = self.generator.map(g, latents.mix_z, latents.c)
        layer = tf.range(self.generator.num_ws)[tf.newaxis, :, tf.newaxis]
        first = layer < latents.mix_cutoff[:, tf.newaxis, tf.newaxis]
        ws = tf.where(first, self.generator.broadcast(w), self.generator.broadcast(mixed))
        return ws, w

    def _synthesize(self, g: Params, ws: tf.Tensor, latents: Latents) -> tf.Tensor:
        noise = self.generator.noise(g, self.noise_mode, latents.noise)
        return self.generator.synthesis(g, ws, noise)

    def _generate(self, g: Params, latents: Latents) -> tuple[tf.Tensor, tf.Tensor]:
        ws, w = self._ws(g, latents)
        return self._synthesize(g, ws, latents), w

    def _path_lengths(
        self, g: Params, draws: Draws, scale: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        ws, w = self._ws(g, draws.latents)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(ws)
            images = self._synthesize(g, ws, draws.latents)
            pixels = images.shape[1] * images.shape[2]
            total = tf.reduce_sum(images * draws.pl_noise) / tf.sqrt(tf.cast(pixels, images.dtype))
        return losses.path_lengths(_gradients(tape, total, ws, scale)), w

    def _augment(self, images: tf.Tensor, draws: AugmentDraws, p: tf.Tensor) -> tf.Tensor:
        if self.pipe is None:
            return images
        return self.pipe.apply(
            images,
            p,
            draws,
            group_size=self.group_size,
            static_shapes=self.static_shapes,
            windows=self.generator.formulas is Formulas.TPU,
        )

    def _score(
        self, d: Params, images: tf.Tensor, c: tf.Tensor, draws: AugmentDraws, p: tf.Tensor
    ) -> tf.Tensor:
        return self.discriminator(d, self._augment(images, draws, p), c)
