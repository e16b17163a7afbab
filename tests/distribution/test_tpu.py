"""What a TPU asks of a program, told from its graph alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

from trainer.distribution import tpu


def graph_of(function: Callable[..., object], *specs: tf.TensorSpec) -> tf.Graph:
    return tf.function(function, autograph=False).get_concrete_function(*specs).graph


def in_a_function(function: Callable[[tf.Tensor], object]) -> Callable[[tf.Tensor], object]:
    return tf.function(function, autograph=False)


def in_a_loop(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], Any]:
    def loop(x: tf.Tensor) -> Any:
        return tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, function(x)), [0, x])

    return loop


def saved(x: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([tf.io.write_file("values", tf.io.serialize_tensor(x))]):
        return tf.identity(x)


@pytest.mark.parametrize("wrap", [lambda f: f, in_a_function, in_a_loop])
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda x: tf.py_function(lambda v: v, [x], tf.float32), "EagerPyFunc"),
        (lambda x: tf.numpy_function(lambda v: v, [x], tf.float32), "PyFunc"),
        (lambda x: tf.strings.to_number(tf.strings.as_string(x)), "AsString"),
        (saved, "WriteFile"),
        (lambda x: tf.cast(tf.unique(tf.reshape(x, [-1]))[1], tf.float32), "a shape unknown"),
    ],
)
def test_what_a_tpu_cannot_run_is_named(
    bad: Callable[[tf.Tensor], tf.Tensor], named: str, wrap: Callable[..., Callable[..., object]]
) -> None:
    def program(x: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.reshape(bad(x), [4]), [4]) * 2

    found = tpu.violations(graph_of(wrap(program), tf.TensorSpec([4])))
    assert any(named in text for text in found), found


def test_a_shape_left_open_is_named() -> None:
    found = tpu.violations(graph_of(lambda x: x * 2, tf.TensorSpec([None, 3])))
    assert found
    assert all("a shape unknown while tracing" in text for text in found)


def test_a_program_of_ordinary_ops_is_fine() -> None:
    """With variables, functions, loops, derivatives and random numbers."""
    variable = tf.Variable(tf.ones([3, 3, 2, 2]))

    @tf.function(jit_compile=True, autograph=False)
    def layer(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        return tf.nn.leaky_relu(tf.nn.conv2d(x, weight, 1, "SAME"))

    def program(x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        weight = tf.convert_to_tensor(variable)
        x += tf.random.stateless_normal(x.shape, seed)
        with tf.GradientTape() as tape:
            tape.watch(weight)
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = tf.reduce_sum(layer(x, weight))
            penalty = tf.reduce_mean(tf.square(inner.gradient(score, x)))
        variable.assign_sub(tape.gradient(penalty, weight))
        return in_a_loop(lambda value: value * 2)(x)[1]

    specs = tf.TensorSpec([2, 4, 4, 2]), tf.TensorSpec([2], tf.int32)
    assert tpu.violations(graph_of(program, *specs)) == []


def test_counters_on_the_host_are_named() -> None:
    variables = [tf.Variable(0, dtype=tf.int64), tf.Variable(0, dtype=tf.int32, name="steps")]
    assert tpu.host_variables(variables) == ["steps:0"]


def test_a_sum_over_replicas_is_one_collective_for_each_tensor() -> None:
    values = [tf.TensorSpec([3]), tf.TensorSpec([2, 2])]
    graph = graph_of(lambda *v: tpu.cross_replica_sum(4)(list(v)), *values)
    reductions = [op for op in graph.get_operations() if op.type == "XlaAllReduce"]
    assert [op.outputs[0].shape.as_list() for op in reductions] == [[3], [2, 2]]
    assert tpu.violations(graph) == []
    alone = graph_of(lambda *v: tpu.cross_replica_sum(1)(list(v)), *values)
    assert not [op for op in alone.get_operations() if op.type == "XlaAllReduce"]
