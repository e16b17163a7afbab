"""What a config will cost: parameters, multiplications, memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.core.config import BatchArithmetic, Config, base_grid
from trainer.distribution.precision import full_dtype, half_dtype
from trainer.networks.stylegan2 import Block, Discriminator, Generator, Network

_MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Of one config.

    Attributes:
      g_params, d_params: trainable parameters.
      gflop_per_image: multiplications and additions of all convolutions, in 1e9, for each real
        image shown: the four phases at their intervals, forward and backward.
      state_mib: variables of the run on each replica.
      activations_mib: estimate of the largest phase's feature maps on each replica.
    """

    g_params: int
    d_params: int
    gflop_per_image: float
    state_mib: float
    activations_mib: float


def estimate(
    config: Config, arithmetic: BatchArithmetic, generator: Generator, discriminator: Discriminator
) -> Cost:
    """Counts what can be counted without running anything."""
    g, d = _flop(generator, {"conv0", "skip"}), _flop(discriminator, {"conv1", "skip"})
    training = config.training
    # In units of one forward pass: a gradient in the inputs and one in the weights cost as much
    # each, and differentiating a gradient doubles what it cost.
    flop = (3 * g + 2 * d) + (g + 6 * d)
    if training.pl_weight > 0:
        flop += 6 * g / training.pl_batch_shrink / training.g_reg_interval
    if training.r1_gamma != "auto" and training.r1_gamma > 0:
        flop += 6 * d / training.d_reg_interval
    g_params, d_params = _count(generator), _count(discriminator)
    # G has a moving average besides the parameters and two moments, and all have gradients once.
    full = full_dtype(config.run.precision)
    state = full.size * (5 * g_params + 4 * d_params) / _MIB
    maps = _feature_values(discriminator.blocks) * 2  # fakes and reals together
    width = (half_dtype(config.run.precision) or full).size
    activations = 3.5 * width * maps * arithmetic.per_replica_batch / _MIB
    return Cost(g_params, d_params, flop / 1e9, state, activations)


def _count(network: Network) -> int:
    return sum(int(np.prod(network.specs[name].shape)) for name in network.trainable_names())


def _feature_values(blocks: list[Block]) -> int:
    """Values in the feature maps of one image between convolutions."""
    return sum(b.height * b.width * (2 * b.inputs + b.outputs) for b in blocks)


def _flop(network: Generator | Discriminator, resampled: set[str]) -> float:
    """Of all convolutions in a forward pass of one image.

    Args:
      network: whose variables tell its convolutions.
      resampled: layers that multiply once for each pixel of the smaller of their two sizes.
    """
    height, width, _ = base_grid(network.resolution)
    # The discriminator's epilogue is no block.
    pixels = {"b4": height * width} | {b.name: b.height * b.width for b in network.blocks}
    total = 0.0
    for name, spec in network.specs.items():
        if len(spec.shape) == 4:
            block, layer = name.split(".")[-3:-1]
            total += 2 * np.prod(spec.shape) * pixels[block] / (4 if layer in resampled else 1)
    return total
