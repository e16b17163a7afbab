"""A step cut into blocks: nothing of it is missing, and a TPU lacks nothing that it asks for."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.config.test_cost import traced_flop
from trainer import config as config_lib
from trainer.distribution import tpu
from trainer.families.protocol import DataShape
from trainer.training import tpu_blocks, tpu_compiler, tpu_estimate
from trainer.training.tpu_blocks import Stage
from trainer.training.tpu_cost import TpuRun
from trainer.training.tpu_estimate import Estimate

MODEL: dict[str, Any] = {
    "z_dim": 8,
    "w_dim": 8,
    "mapping_layers": 1,
    "channel_base": 128,
    "channel_max": 16,
    "num_fp16_res": "all",
    "conv_clamp": 256,
}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = tpu_compiler.CHIPS["v5e"]
    monkeypatch.setattr(
        tpu_compiler, "topology", lambda name: tpu_compiler.Topology(name, chip, (None,) * 4)
    )


def run(replicas: int = 1, rounds: int = 1, **model: Any) -> TpuRun:
    config = config_lib.from_dict(
        {
            "run": {"precision": "bfloat16"},
            "model": {**MODEL, **model},
            "training": {"batch_size": 8 * replicas * rounds, "rounds": rounds, "r1_gamma": 1.0},
            "augment": {"mode": "ada", "pipe": "bgc"},
        }
    )
    return TpuRun.create(config, DataShape((16, 16), 3, ()), "v5e:2x2", replicas, None)


def flop_by_phase(of: TpuRun) -> dict[str, float]:
    found: dict[str, float] = collections.defaultdict(float)
    for phase, stage, mode, trained, times in tpu_blocks.parts(of):
        program, specs = tpu_blocks.program(stage, mode, trained=trained)
        found[phase] += times * traced_flop(program, *specs)
    return found


@pytest.mark.parametrize("model", [{}, {"g_architecture": "resnet", "d_architecture": "skip"}])
def test_the_blocks_convolve_what_the_phases_do(model: dict[str, Any]) -> None:
    of = run(**model)
    phases, (g, d) = of.phases, (of.state.g, of.state.d)
    index, p = tf.constant([0, 1], tf.int64), tf.constant(0.0)
    images, c = tf.zeros([8, 16, 16, 3]), tf.zeros([8, 0])
    draws = {phase: of.draw(phase, index) for phase in ("Gmain", "Greg", "Dmain", "Dreg")}
    g, d = ({name: tf.constant(v) for name, v in table.items()} for table in (g, d))
    whole = {
        "Gmain": traced_flop(phases.gmain, g, d, draws["Gmain"], p, 8),
        "Greg": traced_flop(phases.greg, g, draws["Greg"], None, p, 4),
        "Dmain": traced_flop(phases.dmain, g, d, images, c, draws["Dmain"], p, 8),
        "Dreg": traced_flop(phases.dreg, d, images, c, draws["Dreg"], p, 8),
    }
    assert flop_by_phase(of) == pytest.approx(whole, rel=0.05)


def test_rounds_count() -> None:
    """Two cost twice, and the mean path length over them a pass of first derivatives."""

    def times(of: TpuRun) -> dict[str, int]:
        found: dict[str, int] = collections.defaultdict(int)
        for phase, stage, mode, _, times in tpu_blocks.parts(of):
            if stage.name in ("G b16", "D b16"):
                found[f"{phase} {stage.name} {mode}"] += times
        return found

    once = times(run())
    assert once == {
        "Gmain G b16 first": 1,
        "Gmain D b16 first": 1,
        "Greg G b16 second": 1,
        "Dmain G b16 forward": 1,
        "Dmain D b16 first": 1,
        "Dreg D b16 second": 1,
    }
    assert times(run(replicas=2)) == once
    several = once | {"Greg G b16 first": 1}
    assert times(run(rounds=2)) == {key: 2 * n for key, n in several.items()}


def test_a_tpu_lacks_nothing() -> None:
    for phase, stage, mode, trained, _ in tpu_blocks.parts(run()):
        program, specs = tpu_blocks.program(stage, mode, trained=trained)
        graph = tf.function(program, autograph=False).get_concrete_function(*specs).graph
        assert tpu.violations(graph) == [], f"{phase} {stage.name}"


def test_derivatives() -> None:
    """Of (ax)^2, for the outputs' gradient b and seeds s of the output, t of the first derivative."""

    def function(params: Any, inputs: Any, _: Any) -> Any:
        return [tf.square(params["a"] * inputs[0])]

    one = tf.TensorSpec([])
    stage = Stage("square", {"a": one}, [one], [], function)
    a, x, b, s, t = (tf.constant(v) for v in (2.0, 3.0, 5.0, 7.0, 11.0))
    program, specs = tpu_blocks.program(stage, "first", trained=True)
    assert len(specs) == 3
    assert np.array(program(a, x, b)).tolist() == [36, 2 * 2 * 9 * 5, 2 * 4 * 3 * 5]
    program, specs = tpu_blocks.program(stage, "second", trained=True)
    assert len(specs) == 5
    output, first, da, dx, db = np.array(program(a, x, b, s, t)).tolist()
    assert (output, first) == (36, 2 * 4 * 3 * 5)
    # s (ax)^2 + t 2 a^2 x b in a, x and b.
    assert da == 7 * 2 * 2 * 9 + 11 * 4 * 2 * 3 * 5
    assert dx == 7 * 2 * 4 * 3 + 11 * 2 * 4 * 5
    assert db == 11 * 2 * 4 * 3
    program, specs = tpu_blocks.program(stage, "first", trained=False)
    assert np.array(program(a, x, b)).tolist() == [36, 2 * 4 * 3 * 5]


def test_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_compiler, "lower", lambda *_: None)
    monkeypatch.setattr(tpu_compiler, "compile_hlo", lambda *_: None)
    one = Estimate(10.0, 1 << 30, 0.5, 0.25, 0.125, {"gather": 2}, [(0.5, "x", "y")])
    monkeypatch.setattr(tpu_estimate, "estimate", lambda *_: one)
    of = run(rounds=2)
    parts = list(tpu_blocks.compile_parts(of))
    sums = tpu_blocks.total(parts)
    assert [each.name for each in sums] == ["Gmain", "Greg", "Dmain", "Dreg", "finish"]
    assert [each.share for each in sums] == [1, 1 / 4, 1, 1 / 16, 1]
    assert sums[-1].estimate is not None
    assert sums[-1].estimate.raw == 0.5
    found = sums[0].estimate
    assert found is not None
    # Mapping, three blocks, augmentation, two blocks and the epilogue; twice. The update, once.
    assert found.raw == pytest.approx(0.5 * (2 * (1 + 3 + 1 + 2 + 1) + 1))
    assert found.unestimated == {"gather": 2 * 17}
    assert found.hbm == 9 << 30


def test_a_part_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: Any) -> None:
        raise RuntimeError("no such op")

    monkeypatch.setattr(tpu_compiler, "lower", lower)
    sums = tpu_blocks.total(list(tpu_blocks.compile_parts(run())))
    assert all(each.estimate is None for each in sums)
    assert sums[0].error == "Gmain G mapping: no such op"
