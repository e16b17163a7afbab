"""Schedules in the training step: the right value at each step, and one trace for the whole run."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.training.test_loop import TINY, make
from tests.training.test_step import PLAIN, Run
from trainer.core.schedule import Schedule
from trainer.data.manifest import Manifest
from trainer.training import loop, scheduling

# Of a step of four images.
SCHEDULED: dict[str, dict[str, Any]] = {
    "training": {
        "g_lr": {"linear": [0.01, 0.001], "kimg": 0.008},
        "d_lr": {"cosine": [0.01, 0.002], "kimg": 0.008},
        "beta2": {"linear": [0.9, 0.99], "kimg": 0.02},
        "ema_kimg": {"linear": [0, 0.01], "kimg": 0.01},
        "ema_rampup": None,
    },
    "objective": {
        "r1_gamma": {"cosine": [8, 2], "kimg": 0.012},
        "pl_weight": {"linear": [2, 1], "kimg": 0.012},
        "g_reg_interval": 1,
        "d_reg_interval": 1,
    },
    "augment": {"mode": "fixed", "p": {"linear": [0.2, 0.6], "kimg": 0.016}},
}


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_the_step_computes_what_the_host_does(shape: Any, dtype: tf.DType) -> None:
    number = Schedule(shape, 2.0, -1.0, 20_000.0)
    for images in (0, 64, 12_345_678, 20_000_000, 2**40):
        found = scheduling.value(number, tf.constant(images, tf.int64), dtype)
        assert isinstance(found, tf.Tensor) and found.dtype == dtype
        np.testing.assert_allclose(found, number.at(images / 1000), rtol=1e-6, atol=1e-7)
    assert scheduling.value(2.5, tf.constant(5, tf.int64), dtype) == 2.5


@pytest.mark.usefixtures("eagerly")
def test_a_step_takes_the_values_of_its_images(squares: Manifest) -> None:
    """As constants would be that are set anew for each step."""
    exact = {"run": {"precision": "float64"}}
    moving = Run(squares, PLAIN, SCHEDULED, exact)
    for step in range(4):
        before = moving.values()
        reports = moving.steps(1)[0]
        kimg = step * 4 / 1000
        settings = {
            name: number.at(kimg)
            for name, number in vars(moving.config.training).items()
            if isinstance(number, Schedule)
        }
        p = moving.config.augment.p
        assert isinstance(p, Schedule)
        constant = {"training": settings, "augment": {"p": p.at(kimg)}}
        fixed = Run(squares, PLAIN, SCHEDULED, constant, exact)
        assert moving.values()["augment/p"] == pytest.approx(p.at(kimg + 0.004))
        for name, variable in fixed.state.variables().items():
            if name != "augment/p":
                variable.assign(before[name])
        for _ in range(step):
            next(fixed.stream)
        wanted = fixed.steps(1)[0]
        tf.nest.map_structure(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), reports, wanted
        )
        found = moving.values()
        for name, value in fixed.values().items():
            if name != "augment/p":
                np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_schedule_is_traced_once(squares: Manifest) -> None:
    run = Run(
        squares,
        PLAIN,
        {"training": SCHEDULED["training"], "objective": {"pl_weight": 0, "r1_gamma": 0}},
    )
    run.steps(1)
    traced = run.traced
    run.steps(3)
    assert run.traced == traced
    assert run.step._steps.experimental_get_tracing_count() == 1


@pytest.mark.usefixtures("eagerly")
def test_values_are_in_the_statistics_and_a_resumed_run_has_the_right_ones(
    squares: Manifest, tmp_path: pathlib.Path
) -> None:
    sections = {
        "training": {
            **TINY["training"],
            "total_kimg": 0.024,
            "g_lr": {"linear": [0.002, 0.001], "kimg": 0.04},
        },
        "objective": {"pl_weight": 0, "r1_gamma": 0},
        "augment": {"mode": "fixed", "p": {"cosine": [0, 0.4], "kimg": 0.04}},
        "telemetry": {"tick_kimg": 0.008, "tensorboard": False},
    }
    loop.train(make(squares, **sections), str(tmp_path / "run"))
    sections["training"]["total_kimg"] = 0.048
    loop.train(make(squares, **sections), str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").open()]
    kimg = [line["Progress/kimg"]["mean"] for line in lines]
    assert kimg == [0.008 * n for n in range(1, 7)]
    rates = [line["Schedule/g_lr"]["mean"] for line in lines]
    np.testing.assert_allclose(rates, [max(0.002 - 0.025 * k, 0.001) for k in kimg], rtol=1e-6)
    p = Schedule("cosine", 0, 0.4, 0.04)
    np.testing.assert_allclose(
        [line["Schedule/p"]["mean"] for line in lines], [p.at(k) for k in kimg]
    )
    strengths = [line["Progress/augment"]["mean"] for line in lines]
    np.testing.assert_allclose(strengths, [p.at(k) for k in kimg], rtol=1e-5)


def test_advice_is_given_the_weight_of_r1_at_its_tick(squares: Manifest) -> None:
    moving = make(squares, objective={"r1_gamma": {"linear": [1, 0.5], "kimg": 10}})
    assert [loop._r1_gamma(moving, kimg) for kimg in (0, 5, 20)] == [1, 0.75, 0.5]
    assert loop._r1_gamma(make(squares, objective={"r1_gamma": 0.25}), 5) == 0.25
