"""The cost of a config against a count of the operations in the phases' own graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import config as config_lib
from trainer.config import Config
from trainer.families.network import Discriminator, StyleGenerator
from trainer.families.protocol import DataShape
from trainer.layers.ops import Formulas
from trainer.training import build

OPS = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter")


def make_config(*, resolution: tuple[int, int], model: dict[str, Any], **training: Any) -> Config:
    small = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1}
    config = config_lib.from_dict(
        {
            "model": small | model,
            "training": {"batch_size": 4, "r1_gamma": 1.0} | training,
            "augment": {"mode": "none"},
        }
    )
    return config_lib.resolve(config, resolution=resolution)


def networks(
    config: Config, resolution: tuple[int, int]
) -> tuple[DataShape, StyleGenerator, Discriminator]:
    data = DataShape(resolution, 3, ())
    return (data, *build.networks(config, data, Formulas.GENERIC))


def estimate(config: Config, resolution: tuple[int, int]) -> config_lib.Cost:
    arithmetic = config_lib.batch_arithmetic(config, 1)
    return config_lib.estimate_cost(config, arithmetic, DataShape(resolution, 3, ()))


def flop_of(operation: tf.Operation) -> float:
    """Two for each weight, at each place of the convolution's result."""
    result = operation.outputs[0] if operation.type == "Conv2D" else operation.inputs[2]
    if operation.type == "Conv2DBackpropFilter":
        kernel = operation.outputs[0].shape
    else:
        kernel = operation.inputs[1].shape
    images, height, width, _ = result.shape
    return 2.0 * np.prod(kernel) * images * height * width


def traced_flop(function: Any, *args: Any) -> float:
    """Of the convolutions that a function's results depend on."""
    graph = tf.function(function, autograph=False).get_concrete_function(*args).graph
    waiting, seen, total = list(graph.outputs), set(), 0.0
    while waiting:
        tensor = waiting.pop()
        operation = tensor.op
        # Custom gradients tie unrelated tensors together in an IdentityN.
        apart = operation.type == "IdentityN"
        key = (operation.name, tensor.value_index if apart else None)
        if key in seen:
            continue
        seen.add(key)
        waiting += [operation.inputs[tensor.value_index]] if apart else operation.inputs
        total += flop_of(operation) if operation.type in OPS else 0.0
    return total


@pytest.mark.parametrize(
    ("resolution", "model"),
    [
        ((64, 64), {"channel_base": 512, "channel_max": 16}),
        ((64, 128), {"channel_base": 512, "channel_max": 16, "g_architecture": "resnet"}),
        (
            (64, 64),
            {
                "channel_base": 256,
                "channel_max": 32,
                "g_architecture": "orig",
                "d_architecture": "skip",
            },
        ),
    ],
)
def test_counts_what_the_phases_compute(resolution: tuple[int, int], model: dict[str, Any]) -> None:
    config = make_config(resolution=resolution, model=model)
    data, generator, discriminator = networks(config, resolution)
    phases, draw = build.phases_and_draws(
        config, data, generator, discriminator, static_shapes=True
    )
    g = {name: tf.constant(value) for name, value in generator.init(1).items()}
    d = {name: tf.constant(value) for name, value in discriminator.init(1).items()}
    images, c = tf.zeros([4, *resolution, 3]), tf.zeros([4, 0])
    one, p = tf.constant([0], tf.int64), tf.constant(0.0)
    traced = {
        "Gmain": traced_flop(phases.gmain, g, d, draw("Gmain", one), p, 4),
        "Greg": traced_flop(phases.greg, g, draw("Greg", one), None, p, 2),
        "Dmain": traced_flop(phases.dmain, g, d, images, c, draw("Dmain", one), p, 4),
        "Dreg": traced_flop(phases.dreg, d, images, c, draw("Dreg", one), p, 4),
    }
    by_graph = traced["Gmain"] + traced["Greg"] / 4 + traced["Dmain"] + traced["Dreg"] / 16
    # Resampling convolutions compute one more line at the border, and nobody needs the gradient
    # in the reals.
    assert estimate(config, resolution).gflop_per_image == pytest.approx(by_graph / 4e9, rel=0.02)


def test_an_image_of_64_pixels_costs_27_gflop() -> None:
    config = make_config(
        resolution=(64, 64), model={"channel_base": 8192, "channel_max": 128}, batch_size=8
    )
    assert estimate(config, (64, 64)).gflop_per_image == pytest.approx(26.8, abs=0.1)


def test_regularisers_cost_as_often_as_they_are_due() -> None:
    model = {"channel_base": 512, "channel_max": 16}

    def gflop(**training: Any) -> float:
        config = make_config(resolution=(32, 32), model=model, **training)
        return estimate(config, (32, 32)).gflop_per_image

    nothing = gflop(pl_weight=0.0, r1_gamma=0.0)
    greg, dreg = gflop(r1_gamma=0.0) - nothing, gflop(pl_weight=0.0) - nothing
    assert gflop() == pytest.approx(nothing + greg + dreg)
    assert gflop(g_reg_interval=2) == pytest.approx(nothing + 2 * greg + dreg)
    assert gflop(d_reg_interval=4) == pytest.approx(nothing + greg + 4 * dreg)
    assert gflop(pl_batch_shrink=1) == pytest.approx(nothing + 2 * greg + dreg)


def test_counts_parameters() -> None:
    config = make_config(resolution=(8, 8), model={"channel_base": 64, "channel_max": 8})
    _, generator, discriminator = networks(config, (8, 8))
    costs = estimate(config, (8, 8))
    buffers = ("w_avg", "noise_const")
    assert costs.g_params == sum(
        value.size for name, value in generator.init(1).items() if not name.endswith(buffers)
    )
    assert costs.d_params == sum(value.size for value in discriminator.init(1).values())


def test_memory_follows_the_number_format() -> None:
    config = make_config(resolution=(8, 8), model={"channel_base": 64, "channel_max": 8})

    def memory(precision: str) -> tuple[float, float]:
        run = dataclasses.replace(config.run, precision=precision)
        costs = estimate(dataclasses.replace(config, run=run), (8, 8))
        return costs.state_mib, costs.activations_mib

    state, activations = memory("float32")
    assert memory("float64") == pytest.approx((2 * state, 2 * activations))
    assert memory("bfloat16") == memory("float16") == pytest.approx((state, activations / 2))
