"""Cost of a config: parameters, multiplications, memory; counted, with nothing run."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.batch import BatchArithmetic
from trainer.config.schema import Config
from trainer.families.protocol import DataShape

_MIB = 1 << 20
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """The cost of one config.

    Attributes:
      g_params, d_params: trainable parameters.
      gflop_per_image: multiplications and additions of all convolutions, in 1e9, for each real
        image shown: all phases at their intervals, forward and backward.
      state_mib: variables of the run on each replica.
      activations_mib: estimate of the largest phase's feature maps on each replica.
    """

    g_params: int
    d_params: int
    gflop_per_image: float
    state_mib: float
    activations_mib: float

    @property
    def total_mib(self) -> float:
        """Memory of one replica."""
        return self.state_mib + self.activations_mib


def estimate_cost(config: Config, arithmetic: BatchArithmetic, data: DataShape) -> Cost:
    """Counts what can be counted without running anything.

    Args:
      config: resolved.
      arithmetic: of its batch.
      data: what the networks are for.
    """
    tables = config.model.tables(data)
    g_passes, d_passes = config.objective.passes()
    flop = g_passes * tables.generator.flop + d_passes * tables.discriminator.flop
    g_params, d_params = tables.generator.trainable, tables.discriminator.trainable
    # G has a moving average besides the parameters and two moments, and all have gradients once.
    full = 8 if config.run.precision == "float64" else 4
    state = full * (5 * g_params + 4 * d_params) / _MIB
    maps = 2 * tables.feature_values  # fakes and reals together
    width = _BYTES[config.run.precision]
    activations = 3.5 * width * maps * arithmetic.per_replica_batch / _MIB
    return Cost(g_params, d_params, flop / 1e9, state, activations)
