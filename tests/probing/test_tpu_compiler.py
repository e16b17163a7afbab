"""How a program is made ready for the TPU compiler, and that it compiles."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.core.errors import ConfigError, UsageError
from trainer.distribution import tpu
from trainer.probing import tpu_compiler, tpu_estimate

SPECS = [tf.TensorSpec([2, 8, 8, 4]), tf.TensorSpec([2], tf.int32)]


def program(replicas: int) -> Any:
    """Reads and writes variables, draws random numbers, and sums over replicas."""
    weight = tf.Variable(tf.ones([3, 3, 4, 4]))
    steps = tf.Variable(np.int64(0))

    def run(x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        x += tf.random.stateless_normal(x.shape, seed)
        with tf.GradientTape() as tape:
            value = tf.convert_to_tensor(weight)
            tape.watch(value)
            loss = tf.reduce_sum(tf.nn.conv2d(x, value, 1, "SAME") ** 2)
        (total,) = tpu.cross_replica_sum(replicas)([tape.gradient(loss, value)])
        weight.assign_sub(total * 1e-3)
        steps.assign_add(1)
        return loss

    return run


@pytest.fixture(scope="module")
def edited() -> tuple[Any, Any, dict[int, int]]:
    """The module as lowered, as edited, and the aliases."""
    from tensorflow.compiler.xla.service import hlo_pb2

    lowered = tpu_compiler.lower(program(4), SPECS)
    text, aliases = tpu_compiler._edited(lowered)
    return (
        hlo_pb2.HloModuleProto.FromString(lowered),
        hlo_pb2.HloModuleProto.FromString(text),
        aliases,
    )


def instructions(module: Any, opcode: str) -> list[Any]:
    return [i for c in module.computations for i in c.instructions if i.opcode == opcode]


def test_random_numbers_become_the_hardware_s(edited: tuple[Any, Any, dict[int, int]]) -> None:
    before, after, _ = edited
    assert [i.rng_algorithm for i in instructions(before, "rng-bit-generator")] == [2]
    (generator,) = instructions(after, "rng-bit-generator")
    assert generator.rng_algorithm == 0
    assert list(generator.shape.tuple_shapes[0].dimensions) == [2]
    (state,) = (
        i for c in after.computations for i in c.instructions if i.id in generator.operand_ids
    )
    assert (state.opcode, list(state.shape.dimensions)) == ("slice", [2])
    ids = [i.id for c in after.computations for i in c.instructions]
    assert len(ids) == len(set(ids))


def test_updated_variables_take_the_place_of_their_arguments(
    edited: tuple[Any, Any, dict[int, int]],
) -> None:
    before, after, aliases = edited
    program_shape = after.host_program_shape
    assert len(aliases) == 2
    for argument, result in aliases.items():
        given, returned = program_shape.parameters[argument], program_shape.result
        shape = returned.tuple_shapes[result]
        assert list(given.dimensions) == list(shape.dimensions)
        assert given.element_type == shape.element_type
    assert before.input_output_alias.entries
    assert not after.input_output_alias.entries
    assert not instructions(after, "copy")


def test_the_sum_over_replicas_stays(edited: tuple[Any, Any, dict[int, int]]) -> None:
    (reduction,) = instructions(edited[1], "all-reduce")
    assert list(reduction.shape.dimensions) == [3, 3, 4, 4]


def test_what_no_tpu_runs_is_refused_before_it_is_compiled() -> None:
    def run(x: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda v: v, [x], tf.float32)

    with pytest.raises(ValueError, match="no kernel for EagerPyFunc"):
        tpu_compiler.lower(run, [tf.TensorSpec([2])])


@pytest.mark.parametrize("name", ["v9:2x2", "2x2", ""])
def test_unknown_tpu(name: str) -> None:
    with pytest.raises(ConfigError, match="one of v2, v3, v4, v5e"):
        tpu_compiler.topology(name)


def test_missing_compiler_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"cpu,tpu-probe"):
        tpu_compiler.topology("v5e:4x4")


# ---------------------------------------------------------------- with the compiler


@pytest.mark.slow
@pytest.mark.parametrize(("name", "replicas"), [("v5e:2x2", 4), ("v4:2x2x1", 1)])
def test_a_program_compiles_for_a_tpu(name: str, replicas: int) -> None:
    pytest.importorskip("libtpu")
    topology = tpu_compiler.topology(name)
    hlo = tpu_compiler.lower(program(replicas), SPECS)
    found = tpu_estimate.estimate(tpu_compiler.compile_hlo(hlo, topology, replicas), topology)
    assert 0 < found.adjusted < 1e-3
    assert 0 < found.raw < 1e-3
    assert 0 < found.hbm < 1 << 24
    assert found.unestimated.get("all-reduce", 0) == (1 if replicas > 1 else 0)


@pytest.mark.slow
def test_an_unknown_slice_is_named() -> None:
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match="--topology=v5e:3x7"):
        tpu_compiler.topology("v5e:3x7")


@pytest.mark.slow
def test_a_matrix_product_reaches_the_peak() -> None:
    """4096 x 4096 x 4096 in bfloat16 keeps the matrix units busy, or the times mean nothing."""
    pytest.importorskip("libtpu")
    topology = tpu_compiler.topology("v5e:2x2")
    specs = [tf.TensorSpec([4096, 4096], tf.bfloat16)] * 2
    hlo = tpu_compiler.lower(lambda x, y: x @ y, specs)
    found = tpu_estimate.estimate(tpu_compiler.compile_hlo(hlo, topology, 1), topology)
    assert found.flop == pytest.approx(2 * 4096**3, rel=0.01)
    assert 0.85 < found.roofline / found.raw <= 1
