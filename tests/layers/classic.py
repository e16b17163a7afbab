"""A small GAN with batch and spectral normalisation, trained by the real step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import config as config_lib
from trainer.families import network
from trainer.families.network import Output, Params, Sums
from trainer.families.protocol import Spec, Table
from trainer.layers import normalization
from trainer.layers.ops import Backend
from trainer.objectives.objective import objective
from trainer.objectives.phase import Networks
from trainer.objectives.sampler import Sampler
from trainer.training.state import TrainState
from trainer.training.step import TrainStep

BATCH, GROUP, CHANNELS = 64, 16, 6


class Generator(network.Generator):
    """z -> 4x4 maps -> batch norm -> ReLU -> 4x4 images."""

    def __init__(self) -> None:
        table = Table()
        table.dense("fc", 8, 16 * CHANNELS)
        for key, start in (("scale", 1.0), ("offset", 0.0), ("mean", 0.0), ("square", 1.0)):
            trainable = key in ("scale", "offset")
            table[f"norm.{key}"] = Spec((CHANNELS,), start, False, trainable)
        table.conv("rgb", CHANNELS, 3, 1, 16)
        super().__init__(table)
        self.z_dim = self.w_dim = 8
        self.num_ws, self.noise_shapes, self.c_dim = 1, [], 0
        self.resolution, self.img_channels, self.backend = (4, 4), 3, Backend.GENERIC

    def map(self, params: Params, z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        return z

    def synthesis(
        self, params: Params, ws: tf.Tensor, noise: list[tf.Tensor] | None = None
    ) -> tf.Tensor:
        return self._images(params, ws[:, 0], None)[0]

    def apply(self, params: Params, latents: network.Latents) -> Output:
        return Output(*self._images(params, latents.z, GROUP))

    def follow(self, buffers: Mapping[str, tf.Tensor], means: Sums) -> Sums:
        return normalization.follow_moments(buffers, means)

    def _images(
        self, params: Params, z: tf.Tensor, group_size: int | None
    ) -> tuple[tf.Tensor, Sums]:
        x = tf.linalg.matmul(z, params["fc.weight"]) + params["fc.bias"]
        x = tf.reshape(x, [-1, 4, 4, CHANNELS])
        x, sums = normalization.batch_norm(params, "norm", x, group_size)
        x = tf.nn.conv2d(tf.nn.relu(x), params["rgb.weight"], 1, "SAME") + params["rgb.bias"]
        return tf.tanh(x), sums


class Discriminator(network.Discriminator):
    """Images -> a spectrally normalised convolution -> logits."""

    def __init__(self) -> None:
        table = Table()
        table.conv("conv", 3, CHANNELS, 3, 16)
        table["conv.u"] = Spec((CHANNELS,), 1.0, True, trainable=False)
        table.dense("out", 16 * CHANNELS, 1)
        super().__init__(table)
        self.c_dim, self.freezable_layers = 0, []
        self.resolution, self.img_channels, self.backend = (4, 4), 3, Backend.GENERIC

    def apply(self, params: Params, images: tf.Tensor, c: tf.Tensor) -> Output:
        weight, u = normalization.spectral_norm(params["conv.weight"], params["conv.u"])
        x = tf.nn.conv2d(images, weight, 1, "SAME") + params["conv.bias"]
        x = tf.reshape(tf.nn.leaky_relu(x), [-1, 16 * CHANNELS])
        logits = tf.linalg.matmul(x, params["out.weight"]) + params["out.bias"]
        return Output(logits, {"conv.u": u * tf.cast(tf.shape(images)[0], u.dtype)})

    def follow(self, buffers: Mapping[str, tf.Tensor], means: Sums) -> Sums:
        return means


def train(steps: int, *, rounds: int = 1, replicas: int = 0) -> dict[str, np.ndarray]:
    """The state after some steps in float64, op by op, on random images."""
    config = config_lib.from_dict(
        {
            "run": {"precision": "float64"},
            "objective": {"adversarial": "hinge", "pl_weight": 0, "d_steps": 2, "r1_gamma": 0},
            "training": {"batch_size": BATCH, "group_size": GROUP, "rounds": rounds},
            "augment": {"mode": "none"},
        }
    )
    strategy = tf.distribute.get_strategy()
    if replicas:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(replicas)])
    networks = Networks(Generator(), Discriminator(), None, GROUP, 0, False)
    phases = objective(config.objective, GROUP)
    sampler = Sampler(3, networks.generator, GROUP, (), None, tf.float64)
    with strategy.scope():
        state = TrainState(networks, phases, seed=0, dtype=tf.float64)
    arithmetic = config_lib.batch_arithmetic(config, max(replicas, 1))
    step = TrainStep(config, arithmetic, strategy, state, networks, phases, sampler, jit=False)
    groups = arithmetic.groups_per_step
    rng = np.random.default_rng(0)
    for index in range(steps):
        images = tf.constant(rng.uniform(-1, 1, [groups, GROUP, 4, 4, 3]))
        labels = tf.fill([groups, GROUP], tf.constant(-1, tf.int64))
        numbers = tf.range(groups * index, groups * (index + 1), dtype=tf.int64)
        step(images, labels, numbers)
    return {name: variable.numpy() for name, variable in state.variables().items()}


def main(out: str) -> None:
    """Makes three steps on two replicas, and writes the state."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.config.run_functions_eagerly(True)
    arrays: dict[str, Any] = train(3, replicas=2)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
