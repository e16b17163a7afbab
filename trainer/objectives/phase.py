"""A phase of a training step, and what its loss is computed from.

A phase is a pure function of parameters, images and draws that works on whole groups and returns
sums over its samples: whoever calls it adds the sums of all rounds and replicas, so nothing here
depends on where or in how many pieces it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from trainer.augment.pipe import AugmentPipe
from trainer.augment.pipe import Draws as AugmentDraws
from trainer.core.schedule import Number
from trainer.families.network import Discriminator, Generator, Output, Params, Sums
from trainer.layers.ops import Backend
from trainer.objectives.sampler import Draws, Sample

Trained = Literal["G", "D"]
Grads = dict[str, tf.Tensor]
# For each reported quantity: how many values, their sum, the sum of their squares.
Report = dict[str, tf.Tensor]
# For "G", "D" and "objective" what their buffers follow: sums over the samples.
BufferSums = dict[str, Sums]


@dataclass(frozen=True)
class Networks:
    """Both networks, and the way of an image to the discriminator.

    Attributes:
      generator, discriminator: the networks.
      pipe: the augmentation, or None.
      group_size: images in a group.
      freeze_d: layers of the discriminator that don't train.
      static_shapes: whether all shapes must be known while tracing (XLA, TPU).
    """

    generator: Generator
    discriminator: Discriminator
    pipe: AugmentPipe | None
    group_size: int
    freeze_d: int
    static_shapes: bool

    def trainable_names(self, network: Trained) -> list[str]:
        """The parameters that the optimizer of a network changes."""
        if network == "G":
            return self.generator.trainable_names()
        return self.discriminator.trainable_names(self.freeze_d)

    def augment(self, images: tf.Tensor, draws: AugmentDraws, p: tf.Tensor) -> tf.Tensor:
        """Images as the discriminator sees them."""
        if self.pipe is None:
            return images
        return self.pipe.apply(
            images,
            p,
            draws,
            group_size=self.group_size,
            static_shapes=self.static_shapes,
            windows=self.generator.backend is Backend.TPU,
        )


@dataclass(frozen=True)
class Batch:
    """The inputs of a loss: some of the batch's groups, on one replica.

    Attributes:
      networks: which.
      g, d: their parameters; none of a network that the phase doesn't apply.
      draws: everything random.
      p: [], probability of augmentation.
      reals: [N, H, W, C] in [-1, 1], if the phase reads any.
      c: [N, c_dim], the labels of the reals.
      buffers: the objective's, before this step.
      numbers: the objective's, at this step: floats, or [] if they follow a schedule.
      mean: [], of `Phase.whole_batch` over the whole batch; None if these groups are all of it.
      scale: [], keeps gradients within float16's range on the way; None leaves them alone.
    """

    networks: Networks
    g: Params
    d: Params
    draws: Draws
    p: tf.Tensor
    reals: tf.Tensor
    c: tf.Tensor
    buffers: Mapping[str, tf.Tensor]
    numbers: Mapping[str, float | tf.Tensor]
    mean: tf.Tensor | None
    scale: tf.Tensor | None

    def paired(self) -> Batch:
        """The same, but each fake has the class of the real that it is compared with."""
        latents = self.draws.latents._replace(c=self.c)
        return dataclasses.replace(self, draws=self.draws._replace(latents=latents))

    def fakes(self) -> Output:
        """The generator's images of the latents that were drawn."""
        return self.networks.generator.apply(self.g, self.draws.latents)

    def between(self, fakes: tf.Tensor) -> tf.Tensor:
        """[N, H, W, C], each somewhere between a real and a fake."""
        return fakes + self.draws.between * (self.reals - fakes)

    def score_fakes(self, fakes: tf.Tensor) -> tf.Tensor:
        """[N, 1], the logits of fakes."""
        seen = self._seen(fakes, self.draws.augment_fake, 0)
        return self.networks.discriminator.apply(self.d, seen, self.draws.latents.c).values

    def score_reals(self, reals: tf.Tensor) -> tf.Tensor:
        """[N, 1], the logits of reals."""
        seen = self._seen(reals, self.draws.augment_real, 1)
        return self.networks.discriminator.apply(self.d, seen, self.c).values

    def score_both(self, fakes: tf.Tensor, reals: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, Sums]:
        """The logits of fakes and of reals, [N, 1] each, in one pass, and what buffers follow."""
        fakes = self._seen(fakes, self.draws.augment_fake, 0)
        reals = self._seen(reals, self.draws.augment_real, 1)
        labels = tf.concat([self.draws.latents.c, self.c], 0)
        both = tf.concat([fakes, reals], 0)
        logits, sums = self.networks.discriminator.apply(self.d, both, labels)
        fake, real = tf.split(logits, 2)
        # Means are taken over the samples, each of which is a fake and a real here.
        return fake, real, {name: total / 2 for name, total in sums.items()}

    def _seen(self, images: tf.Tensor, augment: AugmentDraws, kind: int) -> tf.Tensor:
        """Images as the discriminator sees them: augmented, with noise of their kind."""
        images = self.networks.augment(images, augment, self.p)
        if isinstance(self.draws.noise, tuple):
            return images
        return images + self.numbers["instance_noise"] * self.draws.noise[:, kind]

    def gradient(self, tape: tf.GradientTape, total: tf.Tensor, sources: Any) -> Any:
        """The gradients of a sum, taken at `scale` times their size."""
        # Some parameters have no part in a loss: the last bias none in path length, for example.
        grads = tape.gradient(
            total,
            sources,
            output_gradients=self.scale,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        if self.scale is None:
            return grads
        return tf.nest.map_structure(lambda grad: grad / self.scale, grads)


class Loss(NamedTuple):
    """The result of a phase's loss function.

    Attributes:
      values: [N] or [N, 1], of each sample: their mean over the whole batch is differentiated.
      reports: for each name in `Phase.reports` the values of the samples.
      sums: what buffers follow.
    """

    values: tf.Tensor
    reports: Mapping[str, tf.Tensor]
    sums: BufferSums


@dataclass(frozen=True)
class Phase:
    """One of the passes of a training step, each with an update of one network.

    Attributes:
      name: short, as NVIDIA's.
      trains: whose parameters its loss is differentiated in.
      applies: the networks that its loss applies.
      loss: of the samples.
      sample: what it draws.
      reports: names of the statistics that its loss reports.
      watched: the one among them that must stay finite.
      reads_reals: whether its loss needs any.
      batches: for each run of it in a step, which of the batches of reals that a step reads are its
        own; fakes are drawn by the numbers of its groups, too.
      interval: it runs at every so many steps, and counts for as many (StyleGAN2, appendix B, "lazy
        regularization").
      shrink: it takes the first 1/this of every group.
      whole_batch: [N], values of which the loss needs the mean over the whole batch.
    """

    name: str
    trains: Trained
    applies: tuple[Trained, ...]
    loss: Callable[[Batch], Loss]
    sample: Sample
    reports: tuple[str, ...]
    watched: str
    reads_reals: bool = False
    batches: tuple[int, ...] = (0,)
    interval: int = 1
    shrink: int = 1
    whole_batch: Callable[[Batch], tf.Tensor] | None = None

    def gradients(
        self, networks: Networks, samples: int, inputs: Mapping[str, Any]
    ) -> tuple[Grads, Report, BufferSums]:
        """The contribution of one round on one replica to the whole batch.

        Args:
          networks: to train.
          samples: in the whole batch of this phase, over which losses are averaged.
          inputs: the attributes of `Batch` by name, but for `networks`.

        Returns:
          Gradients of the network that it trains, what to report, and what buffers follow.
        """
        params = inputs[self.trains.lower()]
        weights = {name: params[name] for name in networks.trainable_names(self.trains)}
        watched = {self.trains.lower(): {**params, **weights}}
        batch = Batch(networks=networks, **{**inputs, **watched})
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss = self.loss(batch)
            total = tf.reduce_sum(loss.values) * (self.interval / samples)
        report = {name: moments(loss.reports[name]) for name in self.reports}
        return batch.gradient(tape, total, weights), report, loss.sums

    def whole_batch_sum(self, networks: Networks, inputs: Mapping[str, Any]) -> tf.Tensor:
        """[], what one round on one replica adds to the sum of `whole_batch`."""
        assert self.whole_batch is not None
        return tf.reduce_sum(self.whole_batch(Batch(networks=networks, **inputs)))


@dataclass(frozen=True)
class Objective:
    """The objective of both networks.

    Attributes:
      phases: of a step, in their order.
      numbers: of the config, which the losses need by name and which may follow a schedule.
      buffers: values that the losses carry from step to step, and where they start.
      follow: (buffers, means over the batch of what they follow) -> new buffers.
      lazy: for each network the updates between two of the regulariser that shares its optimizer,
        for which rate and decay of Adam are corrected; None does without.
    """

    phases: tuple[Phase, ...]
    numbers: Mapping[str, Number]
    buffers: Mapping[str, float]
    follow: Callable[[Mapping[str, tf.Tensor], Sums], Sums]
    lazy: Mapping[Trained, int | None]

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of all statistics, each once."""
        return tuple(dict.fromkeys(name for phase in self.phases for name in phase.reports))

    @property
    def watched(self) -> tuple[tuple[str, str], ...]:
        """Quantities that must stay finite: each phase's loss, and all gradients together."""
        return tuple(
            (phase.name, name) for phase in self.phases for name in (phase.watched, "gradients")
        )


def moments(values: tf.Tensor) -> tf.Tensor:
    """[3]: the number of values, their sum, and the sum of their squares."""
    number = tf.cast(tf.size(values), values.dtype)
    return tf.stack([number, tf.reduce_sum(values), tf.reduce_sum(tf.square(values))])
