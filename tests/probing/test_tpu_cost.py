"""The programs of a step on a slice that isn't there, and what is made of their estimates."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import tensorflow as tf

from trainer import config as config_lib
from trainer.core.errors import ConfigError
from trainer.data.manifest import Manifest
from trainer.data.pipeline import ImageStream
from trainer.distribution import tpu
from trainer.families.protocol import DataShape
from trainer.probing import tpu_compiler, tpu_estimate
from trainer.probing.tpu_cost import LargestBatch, Phase, TpuRun
from trainer.probing.tpu_estimate import Estimate

SMALL: dict[str, Any] = {
    "run": {"precision": "bfloat16"},
    "model": {
        "z_dim": 8,
        "w_dim": 8,
        "mapping_layers": 1,
        "channel_base": 64,
        "channel_max": 8,
        "num_fp16_res": "all",
        "conv_clamp": 256,
    },
    "training": {"batch_size": 32, "group_size": 4, "rounds": 2},
    "objective": {"r1_gamma": 1.0},
    "augment": {"mode": "ada", "pipe": "bgc"},
    "data": {"use_labels": True},
}


def small(replicas: int | None = None, batch: int | None = None, **sections: Any) -> TpuRun:
    merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in SMALL}
    data = DataShape((16, 16), 3, (5, 7, 9))
    return TpuRun.create(config_lib.from_dict(merged), data, "v5e:2x2", replicas, batch)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of four devices known by name only."""
    chip = tpu_compiler.CHIPS["v5e"]
    monkeypatch.setattr(
        tpu_compiler, "topology", lambda name: tpu_compiler.Topology(name, chip, (None,) * 4)
    )


def estimate(seconds: float, hbm: int) -> Estimate:
    return Estimate(1e9, hbm, seconds, seconds / 2, seconds / 10, {}, [])


def phases(seconds: dict[str, float]) -> list[Phase]:
    shares = {"Greg": 1 / 4, "Dreg": 1 / 16}
    return [
        Phase(name, shares.get(name, 1.0), 1.0, estimate(time, 1 << 30))
        for name, time in seconds.items()
    ]


# ---------------------------------------------------------------- the step's programs


@pytest.mark.parametrize("name", ["Gmain", "Greg", "Dmain", "Dreg", "finish"])
def test_the_step_asks_nothing_that_a_tpu_lacks(name: str) -> None:
    """Static shapes and ops that compile, with rounds, labels, mixing, noise and augmentation; no
    single numbers are looked up or scattered; and nothing crosses replicas but the gradients and
    statistics of a phase, and mean path length."""
    run = small()
    program, specs = run.program(name, run.arithmetic)
    graph = tf.function(program, autograph=False).get_concrete_function(*specs).graph
    assert tpu.violations(graph) == []
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    count = collections.Counter(node.op for node in nodes)
    assert (count["XlaAllReduce"] > 0) == (name != "finish")
    assert not [op for op in count if "Segment" in op]
    assert not [node.op for node in definition.node if "Gather" in node.op]  # in the windows' loop
    in_loops = [
        n for f in definition.library.function for n in f.node_def if n.op == "XlaAllReduce"
    ]
    assert not in_loops


def test_the_state_has_no_counter_on_the_host() -> None:
    assert tpu.host_variables(small().state.variables().values()) == []


def test_a_program_is_fed_what_the_pipeline_gives(squares: Manifest) -> None:
    """Bytes, with their groups and channels as they come."""
    a = small(replicas=1).arithmetic
    data = DataShape(squares.resolution, squares.channels, tuple(squares.label_counts))
    run = TpuRun.create(config_lib.from_dict(SMALL), data, "v5e:2x2", 1, None)
    stream = ImageStream(
        squares,
        group_size=a.group_size,
        groups_per_batch=a.groups_per_step,
        seed=0,
        use_labels=True,
        window=8,
    )
    _, specs = run.program("Dmain", run.arithmetic)
    assert tuple(specs) == tuple(tf.TensorSpec.from_tensor(value) for value in next(stream))
    assert specs[0].dtype == tf.uint8


def test_every_narrow_map_is_packed() -> None:
    run = small()
    assert all(block.stage.block > 1 for block in run.recipe.networks.generator.blocks[1:])
    assert all(block.stage.block > 1 for block in run.recipe.networks.discriminator.blocks)


# ---------------------------------------------------------------- the run


def test_a_run_divides_the_batch_of_its_config() -> None:
    a = small().arithmetic
    assert (a.num_replicas, a.rounds, a.per_replica_batch) == (4, 2, 4)
    a = small(replicas=2).arithmetic
    assert (a.num_replicas, a.rounds, a.per_replica_batch, a.global_batch) == (2, 2, 8, 32)


def test_a_batch_per_replica_makes_the_batch() -> None:
    a = small(batch=12).arithmetic
    assert (a.global_batch, a.per_replica_batch, a.groups_per_step) == (96, 12, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": 5}, "has 4 devices"),
        ({"batch": 3}, "does not divide"),
        ({"run": {"precision": "float16"}}, "TPUs compute in bfloat16"),
    ],
)
def test_what_does_not_fit_the_slice_is_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**arguments)


# ---------------------------------------------------------------- sums


def test_seconds_per_kimg_count_regularisers_as_often_as_they_are_due() -> None:
    found = phases({"Gmain": 1.0, "Greg": 8.0, "Dmain": 2.0, "Dreg": 16.0, "finish": 0.5})
    raw, adjusted = small().seconds_per_kimg(found)
    assert raw == pytest.approx((1 + 2 + 2 + 1 + 0.5) * 1000 / 32)
    assert adjusted == pytest.approx(raw / 2)


def test_the_regularisers_shares_are_those_of_their_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tpu_compiler, "lower", lambda program, specs: b"")
    monkeypatch.setattr(tpu_compiler, "compile_hlo", lambda hlo, topology, replicas: None)
    monkeypatch.setattr(tpu_estimate, "estimate", lambda executable, topology: estimate(1.0, 1))
    run = small(objective={"g_reg_interval": 5, "d_reg_interval": 3})
    assert {p.name: p.share for p in run.compile_phases()} == {
        "Gmain": 1,
        "Greg": 1 / 5,
        "Dmain": 1,
        "Dreg": 1 / 3,
        "finish": 1,
    }
    without = small(objective={"pl_weight": 0, "r1_gamma": 0.0})
    assert [p.name for p in without.compile_phases()] == ["Gmain", "Dmain", "finish"]


@pytest.mark.parametrize(
    ("batch", "other", "fixed", "each", "expected"),
    [
        (4, 8, 2.0, 0.5, 28),  # (16 - 2) / 0.5
        (8, 4, 2.0, 0.9, 12),  # 15.6 images, in groups of 4
        (4, 8, 15.0, 2.0, 0),
    ],
)
def test_the_largest_batch_is_read_off_a_line_through_two_sizes(
    batch: int,
    other: int,
    fixed: float,
    each: float,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def needs(images: int) -> Estimate:
        return estimate(1.0, int((fixed + each * images) * 2**30))

    # What is compiled is stood for by the images that a replica is given in a round.
    monkeypatch.setattr(
        tpu_compiler, "lower", lambda _, specs: specs[0].shape[0] * specs[0].shape[1] // 2
    )
    monkeypatch.setattr(tpu_compiler, "compile_hlo", lambda images, topology, replicas: images)
    monkeypatch.setattr(tpu_estimate, "estimate", lambda images, topology: needs(images))
    run = small(batch=batch)
    found = [Phase("Gmain", 1.0, 1.0, estimate(1.0, 5)), Phase("Dreg", 1.0, 1.0, needs(batch))]
    assert run.largest_batch(found) == LargestBatch(expected, "Dreg", other)


def refuse(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """No program compiles."""

    def fail(program: Any, specs: Any) -> bytes:
        raise RuntimeError(reason)

    monkeypatch.setattr(tpu_compiler, "lower", fail)


def test_a_size_that_does_not_compile_leaves_the_one_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch, "too large")
    run, gib = small(batch=4), 1 << 30
    found = [Phase("Greg", 1.0, 1.0, estimate(1.0, 2 * gib))]
    assert run.largest_batch(found) == LargestBatch(4, "Greg", 8, "too large")
    found = [Phase("Greg", 1.0, 1.0, estimate(1.0, 17 * gib))]
    assert run.largest_batch(found) == LargestBatch(0, "Greg", 8, "too large")


def test_a_phase_that_does_not_compile_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch, "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 40G")
    first = next(small().compile_phases())
    assert (first.name, first.estimate) == ("Gmain", None)
    assert first.error == "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40G"
