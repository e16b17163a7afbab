"""Grouped convolutions against one convolution for each group."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.layers.grouped import grouped_conv2d
from trainer.layers.ops import Backend


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize(
    ("channels", "inputs", "outputs"),
    [(12, 4, 6), (32, 8, 64), (48, 16, 48), (6, 6, 5), (80, 2, 40), (144, 8, 144)],
)
def test_each_group_by_itself(backend: Backend, channels: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal([2, 5, 6, channels]))
    weight = tf.constant(rng.standard_normal([3, 3, inputs, outputs]))
    groups = channels // inputs
    expected = [
        tf.nn.conv2d(part, kernel, 1, "SAME")
        for part, kernel in zip(tf.split(x, groups, 3), tf.split(weight, groups, 3), strict=True)
    ]
    found = grouped_conv2d(x, weight, backend)
    assert found.shape == [2, 5, 6, outputs]
    np.testing.assert_allclose(found, tf.concat(expected, 3), rtol=1e-10, atol=1e-10)


def convolutions(channels: int, backend: Backend) -> list[tuple[int, int]]:
    """Inputs and outputs of those that 16 channels in a group become."""
    graph = (
        tf.function(lambda x, weight: grouped_conv2d(x, weight, backend))
        .get_concrete_function(
            tf.TensorSpec([2, 8, 8, channels]), tf.TensorSpec([3, 3, 16, channels])
        )
        .graph
    )
    kernels = [op.inputs[1].shape for op in graph.get_operations() if op.type == "Conv2D"]
    return [(kernel[2], kernel[3]) for kernel in kernels]


def test_lanes_of_a_tpu_are_full_and_convolutions_elsewhere_few() -> None:
    assert convolutions(256, Backend.TPU) == [(128, 128)] * 2
    assert convolutions(64, Backend.TPU) == [(64, 64)]
    assert convolutions(256, Backend.GENERIC) == [(16, 16)] * 16
    assert convolutions(1536, Backend.XLA_CPU) == [(96, 96)] * 16
