"""What the phases of a config compute, through the real step, and part by part against the whole."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.training.test_step import PLAIN, Run, distance
from trainer.data.manifest import Manifest
from trainer.objectives.phase import Phase
from trainer.training.step import Batch

pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")

EXACT = {"run": {"precision": "float64"}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "WGAN-GP": {
        "adversarial": "wasserstein",
        "first": "D",
        "d_steps": 2,
        "r1_gamma": 0,
        "gradient_penalty": 10,
        "d_reg_interval": None,
        "gradient_clip": 0.5,
    },
    "relativistic": {
        "adversarial": "relativistic",
        "first": "D",
        "d_reg_interval": None,
        "pl_weight": 0,
        "g_reg_interval": None,
    },
    "lazy": {
        "adversarial": "minimax",
        "r1_gamma": 0,
        "gradient_penalty": {"linear": [1, 2], "kimg": 1},
        "label_smoothing": 0.1,
        "instance_noise": {"linear": [0.2, 0], "kimg": 1},
    },
}
EVERY = pytest.mark.parametrize("name", OBJECTIVES)


def made(manifest: Manifest, objective: Mapping[str, Any], **training: Any) -> Run:
    """A conditional run in float64, with augmentation."""
    sections = {
        "objective": dict(objective),
        "training": training,
        "augment": {"mode": "fixed", "p": 0.3},
    }
    return Run(manifest, EXACT, sections)


@EVERY
@pytest.mark.usefixtures("eagerly")
def test_two_rounds_are_one(squares: Manifest, name: str) -> None:
    whole, halves = (made(squares, OBJECTIVES[name], rounds=rounds) for rounds in (1, 2))
    reports = whole.steps(2), halves.steps(2)
    found = halves.values()
    # Differences of logits don't depend on their bias, whose gradient is rounding alone.
    wanted = {key: value for key, value in whole.values().items() if "b4.out.bias" not in key}
    apart = {key: distance(found[key], value) for key, value in wanted.items()}
    assert not {key: value for key, value in apart.items() if value > 1e-9}
    for one, two in zip(*reports, strict=True):
        tf.nest.map_structure(functools.partial(np.testing.assert_allclose, rtol=1e-7), one, two)


@pytest.mark.usefixtures("eagerly")
def test_each_update_of_d_reads_reals_of_its_own(squares: Manifest) -> None:
    drawn: list[tuple[str, list[int]]] = []
    objective = {**OBJECTIVES["relativistic"], "d_steps": 2}
    run = Run(squares, PLAIN, {"objective": objective})
    draw = run.step._draw

    def recorded(phase: Phase, group_index: tf.Tensor) -> Any:
        drawn.append((phase.name, group_index.numpy().tolist()))
        return draw(phase, group_index)

    run.step._draw = recorded
    run.steps(2)
    # Batches of one group: two for D, one for G, and so on.
    assert drawn == [
        ("Dmain", [0]),
        ("Dmain", [1]),
        ("Gmain", [2]),
        ("Dmain", [3]),
        ("Dmain", [4]),
        ("Gmain", [5]),
    ]
    values = run.values()
    assert (values["D_opt/count"], values["G_opt/count"], values["counters/step"]) == (4, 2, 2)
    assert values["counters/images"] == 8  # a step counts as one batch


def test_a_fake_has_the_class_of_the_real_that_it_is_compared_with(
    squares: Manifest,
) -> None:
    run = made(squares, OBJECTIVES["relativistic"])
    for name in ("Gmain", "Dmain"):
        phase = {each.name: each for each in run.objective.phases}[name]
        inputs = run.step.inputs(phase, first_batch(run))
        labels: list[np.ndarray] = []
        discriminator = run.step._networks.discriminator

        def apply(params: Any, images: Any, c: Any, real: Any = discriminator.apply) -> Any:
            labels.append(c.numpy())  # noqa: B023
            return real(params, images, c)

        discriminator.apply = apply  # type: ignore[method-assign]
        phase.gradients(run.step._networks, 8, inputs)
        fake, real = np.split(labels[0], 2)
        np.testing.assert_array_equal(fake, real)
        np.testing.assert_array_equal(real, inputs["c"])


def first_batch(run: Run) -> Batch:
    images, labels, index = next(run.stream)
    groups = index.shape[0] // run.config.objective.batches
    return Batch(images[:groups], labels[:groups], index[:groups])


def gradients(run: Run, name: str, batch: Batch, draws: Any = None) -> dict[str, np.ndarray]:
    phase = {each.name: each for each in run.objective.phases}[name]
    inputs = run.step.inputs(phase, batch)
    if draws is not None:
        inputs["draws"] = draws
    grads, _, _ = phase.gradients(run.step._networks, 8, inputs)
    return {key: value.numpy() for key, value in grads.items()}


@pytest.mark.parametrize("penalty", ["r1_gamma", "r2_gamma", "gradient_penalty"])
def test_a_penalty_at_every_step_is_the_same_as_at_intervals(
    squares: Manifest,
    penalty: str,
) -> None:
    """The gradients of D's loss with it are those without it, and those of a phase of its own."""
    weights = {"r1_gamma": 0, "gradient_penalty": 0, penalty: 3}
    together = made(squares, {**weights, "d_reg_interval": None})
    apart = made(squares, {**weights, "d_reg_interval": 5})
    batch = first_batch(together)
    phases = {phase.name: phase for phase in together.objective.phases}
    assert list(phases) == ["Gmain", "Greg", "Dmain"]
    draws = together.step._draw(phases["Dmain"], batch.group_index)
    whole = gradients(together, "Dmain", batch, draws)
    main, own = (gradients(apart, name, batch, draws) for name in ("Dmain", "Dreg"))
    for name, value in whole.items():
        np.testing.assert_allclose(value, main[name] + own[name] / 5, rtol=1e-8, atol=1e-10)


def test_slopes_are_those_of_what_is_between(squares: Manifest) -> None:
    """WGAN-GP's penalty by hand, of images that are partly a real and partly a fake."""
    run = Run(squares, EXACT, PLAIN, {"objective": OBJECTIVES["WGAN-GP"]})
    (phase,) = [each for each in run.objective.phases if each.name == "Dmain"]
    inputs = run.step.inputs(phase, first_batch(run))
    _, report, _ = phase.gradients(run.step._networks, 4, inputs)
    networks, draws = run.step._networks, inputs["draws"]
    fakes = networks.generator.apply(inputs["g"], draws.latents).values
    part = draws.between.numpy()
    assert part.shape == (4, 1, 1, 1)
    assert np.all((part >= 0) & (part < 1)) and len(np.unique(part)) == 4
    mixed = tf.constant((1 - part) * fakes.numpy() + part * inputs["reals"].numpy())
    with tf.GradientTape() as tape:
        tape.watch(mixed)
        score = tf.reduce_sum(networks.discriminator(inputs["d"], mixed, inputs["c"]))
    lengths = np.linalg.norm(tape.gradient(score, mixed).numpy().reshape(4, -1), axis=1)
    expected = (lengths - 1) ** 2
    count, total, squares_ = report["Loss/gradient_penalty"].numpy()
    np.testing.assert_allclose([count, total], [4, expected.sum()], rtol=1e-10)
    np.testing.assert_allclose(squares_, np.sum(expected**2), rtol=1e-10)
    np.testing.assert_allclose(report["Loss/D/reg"][1], 10 * expected.sum(), rtol=1e-10)


def test_instance_noise_is_added_to_all_that_d_sees(squares: Manifest) -> None:
    run = Run(squares, EXACT, PLAIN, {"objective": {"instance_noise": 0.5}})
    seen: list[np.ndarray] = []
    networks = run.step._networks
    real = networks.discriminator.apply

    def apply(params: Any, images: tf.Tensor, c: Any) -> Any:
        seen.append(images.numpy())
        return real(params, images, c)

    networks.discriminator.apply = apply  # type: ignore[method-assign]
    batch = first_batch(run)
    noises = []
    for phase in run.objective.phases:
        inputs = run.step.inputs(phase, batch)
        if phase.name == "Greg":
            continue
        phase.gradients(networks, 4, inputs)
        noise = inputs["draws"].noise.numpy()
        assert noise.shape == (4, 2, 8, 8, 3)
        noises.append(noise)
        fakes = inputs["g"] and networks.generator.apply(inputs["g"], inputs["draws"].latents)[0]
        expected = [fakes + 0.5 * noise[:, 0]] if phase.name != "Dreg" else []
        if phase.reads_reals:
            expected.append(inputs["reals"] + 0.5 * noise[:, 1])
        np.testing.assert_allclose(seen[-1], np.concatenate(expected), rtol=1e-12)
    assert len(seen) == 3
    flat = np.stack(noises)
    assert flat.std() == pytest.approx(1, abs=0.1)
    assert len(np.unique(flat)) == flat.size


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_gradients_are_clipped_together(squares: Manifest, clip: float) -> None:
    """To a length that they have over all replicas and rounds; a shorter one stays."""
    plain = {"pl_weight": 0, "r1_gamma": 0}
    run = Run(squares, EXACT, PLAIN, {"objective": {**plain, "gradient_clip": clip}})
    reports = run.steps(1)[0]
    for network in ("G", "D"):
        # Adam's first moments are the gradients of the last update, as its beta1 is 0.
        moments = [
            value
            for name, value in run.values().items()
            if name.startswith(f"{network}_opt/first/")
        ]
        length = np.sqrt(sum(np.sum(np.square(value)) for value in moments))
        before = float(np.sqrt(reports[f"{network}main"]["gradients"]))
        assert before > 1e-3
        np.testing.assert_allclose(length, min(before, clip), rtol=1e-9)
