"""StyleGAN2's training (Karras et al. 2020): logistic losses, path length and R1."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from trainer.config import TrainingConfig
from trainer.core.schedule import Number
from trainer.core.seeds import Purpose
from trainer.families.network import Sums
from trainer.objectives import penalties
from trainer.objectives.adversarial import discriminator_logistic, generator_logistic
from trainer.objectives.penalties import path_length_coefficients, path_lengths, r1_penalty
from trainer.objectives.phase import Batch, Loss, Objective, Phase
from trainer.objectives.sampler import Draws


def objective(training: TrainingConfig, group_size: int) -> Objective:
    """The four phases; a regulariser (appendix B) whose weight is 0 is left out.

    Args:
      training: resolved.
      group_size: images in a group.
    """
    gamma = training.r1_gamma
    assert gamma != "auto"
    numbers: dict[str, Number] = {"r1_gamma": gamma, "pl_weight": training.pl_weight}

    def generator(batch: Batch) -> Loss:
        images, sums = batch.fakes()
        logits = batch.score_fakes(images)
        loss = generator_logistic(logits)
        return Loss(loss, {**_scores("fake", logits), "Loss/G/loss": loss}, {"G": sums})

    def path_length(batch: Batch) -> Loss:
        lengths, sums = _path_lengths(batch)
        mean = tf.reduce_mean(lengths) if batch.mean is None else batch.mean
        penalty, coefficients, _ = path_length_coefficients(
            tf.stop_gradient(lengths), mean, batch.buffers["pl_mean"], training.pl_decay
        )
        pl_weight = batch.numbers["pl_weight"]
        reports = {"Loss/pl_penalty": penalty, "Loss/G/reg": penalty * pl_weight}
        followed = {"G": sums, "objective": {"pl_mean": tf.reduce_sum(lengths)}}
        return Loss(coefficients * lengths * pl_weight, reports, followed)

    def discriminator(batch: Batch) -> Loss:
        images, sums = batch.fakes()
        fake, real = batch.score_both(images)
        loss = discriminator_logistic(fake, real)
        reports = {**_scores("fake", fake), **_scores("real", real), "Loss/D/loss": loss}
        return Loss(loss, reports, {"G": sums})

    def r1(batch: Batch) -> Loss:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(batch.reals)
            logits = batch.score_reals(batch.reals)
            score = tf.reduce_sum(logits)
        penalty = r1_penalty(batch.gradient(tape, score, batch.reals))
        loss = penalty * (batch.numbers["r1_gamma"] / 2)
        reports = {**_scores("real", logits), "Loss/r1_penalty": penalty, "Loss/D/reg": loss}
        return Loss(loss, reports, {})

    phases = [
        Phase(
            "Gmain",
            trains="G",
            applies=("G", "D"),
            loss=generator,
            sample=lambda sampler, index: Draws(
                sampler.latents(Purpose.GMAIN, index),
                augment_fake=sampler.augmentation(Purpose.AUGMENT_GMAIN, index),
            ),
            reports=("Loss/scores/fake", "Loss/signs/fake", "Loss/G/loss"),
            watched="Loss/G/loss",
        ),
        Phase(
            "Greg",
            trains="G",
            applies=("G",),
            interval=training.g_reg_interval,
            shrink=training.pl_batch_shrink,
            whole_batch=lambda batch: _path_lengths(batch)[0],
            loss=path_length,
            sample=lambda sampler, index: Draws(
                sampler.latents(Purpose.GREG, index, group_size // training.pl_batch_shrink),
                image_noise=sampler.image_noise(
                    Purpose.PL_NOISE, index, group_size // training.pl_batch_shrink
                ),
            ),
            reports=("Loss/pl_penalty", "Loss/G/reg"),
            watched="Loss/pl_penalty",
        ),
        Phase(
            "Dmain",
            trains="D",
            applies=("G", "D"),
            reals=1,
            loss=discriminator,
            sample=lambda sampler, index: Draws(
                sampler.latents(Purpose.DMAIN, index),
                augment_fake=sampler.augmentation(Purpose.AUGMENT_DMAIN_FAKE, index),
                augment_real=sampler.augmentation(Purpose.AUGMENT_DMAIN_REAL, index),
            ),
            reports=(
                "Loss/scores/fake",
                "Loss/signs/fake",
                "Loss/scores/real",
                "Loss/signs/real",
                "Loss/D/loss",
            ),
            watched="Loss/D/loss",
        ),
        Phase(
            "Dreg",
            trains="D",
            applies=("D",),
            reals=1,
            interval=training.d_reg_interval,
            loss=r1,
            sample=lambda sampler, index: Draws(
                augment_real=sampler.augmentation(Purpose.AUGMENT_DREG, index)
            ),
            reports=("Loss/scores/real", "Loss/signs/real", "Loss/r1_penalty", "Loss/D/reg"),
            watched="Loss/r1_penalty",
        ),
    ]
    weights = {"Greg": training.pl_weight, "Dreg": gamma}
    left_out = {name for name, weight in weights.items() if weight == 0}

    def follow(buffers: Mapping[str, tf.Tensor], means: Sums) -> Sums:
        return {
            name: penalties.follow(buffers[name], mean, training.pl_decay)
            for name, mean in means.items()
        }

    return Objective(
        phases=tuple(phase for phase in phases if phase.name not in left_out),
        numbers=numbers,
        buffers={} if "Greg" in left_out else {"pl_mean": 0.0},
        follow=follow,
        # Also where a weight of 0 leaves the regulariser out.
        lazy={"G": training.g_reg_interval, "D": training.d_reg_interval},
    )


def _scores(kind: str, logits: tf.Tensor) -> dict[str, tf.Tensor]:
    return {f"Loss/scores/{kind}": logits, f"Loss/signs/{kind}": tf.sign(logits)}


def _path_lengths(batch: Batch) -> tuple[tf.Tensor, Sums]:
    """[N], how far each image moves with its styles along a random direction of its pixels."""
    networks, latents = batch.networks, batch.draws.latents
    ws, sums = networks.generator.ws(batch.g, latents)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(ws)
        images = networks.generator.render(batch.g, ws, latents, networks.noise_mode)
        pixels = tf.cast(images.shape[1] * images.shape[2], images.dtype)
        total = tf.reduce_sum(images * batch.draws.image_noise) / tf.sqrt(pixels)
    return path_lengths(batch.gradient(tape, total, ws)), sums
