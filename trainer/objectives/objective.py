"""Construction of a step's phases from the `objective` section of a config.

StyleGAN2's training (Karras et al. 2020) is Gmain, Greg, Dmain and Dreg, with logistic losses, path
length and R1 at intervals; R3GAN's (Huang et al. 2024) is Dmain and Gmain, with relativistic losses
and penalties at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from trainer.core.schedule import Number
from trainer.core.seeds import Purpose
from trainer.families.network import StyleGenerator, Sums
from trainer.objectives import penalties
from trainer.objectives.adversarial import LOSSES, smoothed
from trainer.objectives.keys import D_PENALTIES, ObjectiveConfig
from trainer.objectives.penalties import (
    PENALTIES,
    Penalty,
    path_length_coefficients,
    path_lengths,
)
from trainer.objectives.phase import Batch, Loss, Objective, Phase
from trainer.objectives.sampler import Draws, Sampler

_FAKE = ("Loss/scores/fake", "Loss/signs/fake")
_REAL = ("Loss/scores/real", "Loss/signs/real")


def objective(keys: ObjectiveConfig, group_size: int) -> Objective:
    """The phases of both networks; a penalty whose weight is 0 is left out.

    Args:
      keys: resolved and checked.
      group_size: images in a group.
    """
    names = (*D_PENALTIES, "pl_weight", "instance_noise")
    numbers: dict[str, Number] = {name: getattr(keys, name) for name in names}
    of_d = [penalty for penalty in PENALTIES if penalty.key in keys.d_penalties]
    at_every_step = keys.d_reg_interval is None
    g_phases = [_generator_phase(keys)]
    if keys.pl_weight != 0:
        g_phases.append(_path_length_phase(keys, group_size))
    d_phases = [_discriminator_phase(keys, of_d if at_every_step else [])]
    if of_d and not at_every_step:
        d_phases.append(_penalty_phase(keys, of_d))

    def follow(buffers: Mapping[str, tf.Tensor], means: Sums) -> Sums:
        return {
            name: penalties.follow(buffers[name], mean, keys.pl_decay)
            for name, mean in means.items()
        }

    return Objective(
        phases=tuple(g_phases + d_phases if keys.first == "G" else d_phases + g_phases),
        numbers=numbers,
        buffers={"pl_mean": 0.0} if keys.pl_weight != 0 else {},
        follow=follow,
        # NVIDIA corrects Adam also where a weight of 0 leaves the penalty out.
        lazy={
            "G": keys.g_reg_interval,
            "D": keys.d_reg_interval and keys.d_reg_interval * keys.d_steps,
        },
    )


# ---------------------------------------------------------------------------------- the generator


def _generator_phase(keys: ObjectiveConfig) -> Phase:
    loss_of = LOSSES[keys.adversarial].generator
    relativistic, noisy = keys.is_relativistic, keys.instance_noise != 0

    def loss(batch: Batch) -> Loss:
        batch = batch.paired() if relativistic else batch
        images, sums = batch.fakes()
        if relativistic:
            fake, real, _ = batch.score_both(images, batch.reals)
        else:
            fake, real = batch.score_fakes(images), None
        values = loss_of(fake, real)
        return Loss(values, {**_scores("fake", fake), "Loss/G/loss": values}, {"G": sums})

    def sample(sampler: Sampler, index: tf.Tensor) -> Draws:
        return Draws(
            sampler.latents(Purpose.GMAIN, index),
            augment_fake=sampler.augmentation(Purpose.AUGMENT_GMAIN, index),
            augment_real=sampler.augmentation(Purpose.AUGMENT_GMAIN_REAL, index)
            if relativistic
            else {},
            noise=sampler.noise_pair(Purpose.NOISE_GMAIN, index) if noisy else (),
        )

    return Phase(
        "Gmain",
        trains="G",
        applies=("G", "D"),
        reads_reals=relativistic,
        # Of fresh reals, which D's updates of this step have not seen.
        batches=(keys.d_steps if relativistic else 0,),
        loss=loss,
        sample=sample,
        reports=(*_FAKE, "Loss/G/loss"),
        watched="Loss/G/loss",
    )


def _path_length_phase(keys: ObjectiveConfig, group_size: int) -> Phase:
    size = group_size // keys.pl_batch_shrink

    def loss(batch: Batch) -> Loss:
        lengths, sums = _path_lengths(batch)
        mean = tf.reduce_mean(lengths) if batch.mean is None else batch.mean
        penalty, coefficients, _ = path_length_coefficients(
            tf.stop_gradient(lengths), mean, batch.buffers["pl_mean"], keys.pl_decay
        )
        pl_weight = batch.numbers["pl_weight"]
        reports = {"Loss/pl_penalty": penalty, "Loss/G/reg": penalty * pl_weight}
        followed = {"G": sums, "objective": {"pl_mean": tf.reduce_sum(lengths)}}
        return Loss(coefficients * lengths * pl_weight, reports, followed)

    assert keys.g_reg_interval is not None
    return Phase(
        "Greg",
        trains="G",
        applies=("G",),
        interval=keys.g_reg_interval,
        shrink=keys.pl_batch_shrink,
        whole_batch=lambda batch: _path_lengths(batch)[0],
        loss=loss,
        sample=lambda sampler, index: Draws(
            sampler.latents(Purpose.GREG, index, size),
            image_noise=sampler.image_noise(Purpose.PL_NOISE, index, size),
        ),
        reports=("Loss/pl_penalty", "Loss/G/reg"),
        watched="Loss/pl_penalty",
    )


def _path_lengths(batch: Batch) -> tuple[tf.Tensor, Sums]:
    """[N], how far each image moves with its styles along a random direction of its pixels."""
    generator, latents = batch.networks.generator, batch.draws.latents
    assert isinstance(generator, StyleGenerator)
    ws, sums = generator.ws(batch.g, latents)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(ws)
        images = generator.render(batch.g, ws, latents)
        pixels = tf.cast(images.shape[1] * images.shape[2], images.dtype)
        total = tf.reduce_sum(images * batch.draws.image_noise) / tf.sqrt(pixels)
    return path_lengths(batch.gradient(tape, total, ws)), sums


# ------------------------------------------------------------------------------ the discriminator


def _discriminator_phase(keys: ObjectiveConfig, penalised: Sequence[Penalty]) -> Phase:
    loss_of = LOSSES[keys.adversarial].discriminator
    relativistic, noisy = keys.is_relativistic, keys.instance_noise != 0
    kinds = {penalty.images for penalty in penalised}

    def loss(batch: Batch) -> Loss:
        batch = batch.paired() if relativistic else batch
        images, sums = batch.fakes()
        seen = {"fakes": images, "reals": batch.reals}
        sloped = {kind: seen[kind] for kind in sorted(kinds & set(seen))}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sloped)
            fake, real, d_sums = batch.score_both(images, batch.reals)
            total = tf.reduce_sum(fake) + tf.reduce_sum(real) if sloped else None
        values = smoothed(loss_of(fake, real), real, keys.label_smoothing)
        reports = {**_scores("fake", fake), **_scores("real", real), "Loss/D/loss": values}
        if penalised:
            slopes = batch.gradient(tape, total, sloped) if sloped else {}
            if "between" in kinds:
                slopes["between"] = _slopes(batch, batch.between(images), "real")[1]
            penalty, of_penalties = _weighted(batch, penalised, slopes)
            values, reports = values[:, 0] + penalty, reports | of_penalties
        return Loss(values, reports, {"G": sums, "D": d_sums})

    def sample(sampler: Sampler, index: tf.Tensor) -> Draws:
        return Draws(
            sampler.latents(Purpose.DMAIN, index),
            augment_fake=sampler.augmentation(Purpose.AUGMENT_DMAIN_FAKE, index),
            augment_real=sampler.augmentation(Purpose.AUGMENT_DMAIN_REAL, index),
            noise=sampler.noise_pair(Purpose.NOISE_DMAIN, index) if noisy else (),
            between=sampler.uniform(Purpose.BETWEEN, index) if "between" in kinds else (),
        )

    return Phase(
        "Dmain",
        trains="D",
        applies=("G", "D"),
        reads_reals=True,
        batches=tuple(range(keys.d_steps)),
        loss=loss,
        sample=sample,
        reports=(*_FAKE, *_REAL, "Loss/D/loss", *_reports(penalised)),
        watched="Loss/D/loss",
    )


def _penalty_phase(keys: ObjectiveConfig, penalised: Sequence[Penalty]) -> Phase:
    kinds = {penalty.images for penalty in penalised}
    noisy, fakes = keys.instance_noise != 0, kinds != {"reals"}

    def loss(batch: Batch) -> Loss:
        slopes, reports = {}, {}
        if "reals" in kinds:
            logits, slopes["reals"] = _slopes(batch, batch.reals, "real")
            reports = _scores("real", logits)
        if fakes:
            images, _ = batch.fakes()
            if "fakes" in kinds:
                _, slopes["fakes"] = _slopes(batch, images, "fake")
            if "between" in kinds:
                _, slopes["between"] = _slopes(batch, batch.between(images), "real")
        values, of_penalties = _weighted(batch, penalised, slopes)
        return Loss(values, reports | of_penalties, {})

    def sample(sampler: Sampler, index: tf.Tensor) -> Draws:
        return Draws(
            sampler.latents(Purpose.DREG, index) if fakes else (),  # type: ignore[arg-type]
            augment_fake=sampler.augmentation(Purpose.AUGMENT_DREG_FAKE, index)
            if "fakes" in kinds
            else {},
            augment_real=sampler.augmentation(Purpose.AUGMENT_DREG, index),
            noise=sampler.noise_pair(Purpose.NOISE_DREG, index) if noisy else (),
            between=sampler.uniform(Purpose.BETWEEN, index) if "between" in kinds else (),
        )

    assert keys.d_reg_interval is not None
    return Phase(
        "Dreg",
        trains="D",
        applies=("G", "D") if fakes else ("D",),
        reads_reals=True,
        interval=keys.d_reg_interval,
        loss=loss,
        sample=sample,
        reports=(*(_REAL if "reals" in kinds else ()), *_reports(penalised)),
        watched="Loss/D/reg",
    )


def _slopes(batch: Batch, images: tf.Tensor, kind: str) -> tuple[tf.Tensor, tf.Tensor]:
    """The logits of images, scored as "fake" or "real" ones, and their gradients in the pixels."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(images)
        logits = batch.score_fakes(images) if kind == "fake" else batch.score_reals(images)
        total = tf.reduce_sum(logits)
    return logits, batch.gradient(tape, total, images)


def _weighted(
    batch: Batch, penalised: Sequence[Penalty], slopes: Mapping[str, tf.Tensor]
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """[N], the sum of penalties times their weights; and what to report of them."""
    reports, terms = {}, []
    for penalty in penalised:
        values = penalty.of_slopes(slopes[penalty.images])
        reports[penalty.report] = values
        terms.append(values * (batch.numbers[penalty.key] * penalty.factor))
    total = tf.add_n(terms) if len(terms) > 1 else terms[0]
    return total, reports | {"Loss/D/reg": total}


def _reports(penalised: Sequence[Penalty]) -> tuple[str, ...]:
    names = tuple(penalty.report for penalty in penalised)
    return (*names, "Loss/D/reg") if names else ()


def _scores(kind: str, logits: tf.Tensor) -> dict[str, tf.Tensor]:
    return {f"Loss/scores/{kind}": logits, f"Loss/signs/{kind}": tf.sign(logits)}
