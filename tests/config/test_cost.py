"""The cost of a config against a count of the operations in the phases' own graphs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import config as config_lib
from trainer.config import Config
from trainer.families.network import Network
from trainer.families.protocol import DataShape
from trainer.training import build

OPS = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter")


def make_config(*, resolution: tuple[int, int], model: dict[str, Any], **objective: Any) -> Config:
    small = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1}
    config = config_lib.from_dict(
        {
            "model": small | model,
            "training": {"batch_size": 4},
            "objective": {"r1_gamma": 1.0} | objective,
            "augment": {"mode": "none"},
        }
    )
    return config_lib.resolve(config, resolution=resolution)


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
    networks, objective, sampler = build.recipe(
        config, DataShape(resolution, 3, ()), static_shapes=True
    )

    def params(network: Network) -> dict[str, tf.Tensor]:
        return {name: tf.constant(value) for name, value in network.init(1).items()}

    inputs: dict[str, Any] = {
        "g": params(networks.generator),
        "d": params(networks.discriminator),
        "reals": tf.zeros([4, *resolution, 3]),
        "c": tf.zeros([4, 0]),
        "p": tf.constant(0.0),
        "buffers": {"pl_mean": tf.constant(0.0)},
        "numbers": objective.numbers,
        "mean": None,
        "scale": None,
    }
    by_graph = 0.0
    for phase in objective.phases:
        function = functools.partial(phase.gradients, networks, 4 // phase.shrink)
        draws = sampler(phase, tf.constant([0], tf.int64))
        by_graph += traced_flop(function, {**inputs, "draws": draws}) / phase.interval
    # Resampling convolutions compute one more line at the border, and nobody needs the gradient
    # in the reals.
    assert estimate(config, resolution).gflop_per_image == pytest.approx(by_graph / 4e9, rel=0.02)


def test_an_image_of_64_pixels_costs_27_gflop() -> None:
    config = make_config(resolution=(64, 64), model={"channel_base": 8192, "channel_max": 128})
    assert estimate(config, (64, 64)).gflop_per_image == pytest.approx(26.8, abs=0.1)


def test_regularisers_cost_as_often_as_they_are_due() -> None:
    model = {"channel_base": 512, "channel_max": 16}

    def gflop(**objective: Any) -> float:
        config = make_config(resolution=(32, 32), model=model, **objective)
        return estimate(config, (32, 32)).gflop_per_image

    nothing = gflop(pl_weight=0.0, r1_gamma=0.0)
    greg, dreg = gflop(r1_gamma=0.0) - nothing, gflop(pl_weight=0.0) - nothing
    assert gflop() == pytest.approx(nothing + greg + dreg)
    assert gflop(g_reg_interval=2) == pytest.approx(nothing + 2 * greg + dreg)
    assert gflop(d_reg_interval=4) == pytest.approx(nothing + greg + 4 * dreg)
    assert gflop(pl_batch_shrink=1) == pytest.approx(nothing + 2 * greg + dreg)


def test_counts_parameters() -> None:
    config = make_config(resolution=(8, 8), model={"channel_base": 64, "channel_max": 8})
    generator, discriminator = build.networks(config, DataShape((8, 8), 3, ()))
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
