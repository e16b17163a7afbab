"""Parameters and memory of a config, counted from its numbers alone.

The same as `training.cost` counts from the networks themselves, for which TensorFlow is needed;
a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.config import BatchArithmetic, Config, base_grid

_MIB = 1 << 20
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """Of one config.

    Attributes:
      g_params, d_params: trainable parameters.
      state_mib: variables of the run on each replica.
      activations_mib: estimate of the largest phase's feature maps on each replica.
    """

    g_params: int
    d_params: int
    state_mib: float
    activations_mib: float

    @property
    def total_mib(self) -> float:
        """Of one replica."""
        return self.state_mib + self.activations_mib


def estimate(
    config: Config,
    arithmetic: BatchArithmetic,
    resolution: tuple[int, int],
    *,
    channels: int = 3,
    num_classes: int = 0,
) -> Sizes:
    """Counts.

    Args:
      config: resolved.
      arithmetic: of its batch.
      resolution: (height, width) of the images.
      channels: of the images.
      num_classes: 0 without `data.use_labels`.
    """
    grid = base_grid(resolution)
    base, most = config.model.channel_base, config.model.channel_max
    assert isinstance(base, int)
    widths = [min(base // (4 << level), most) for level in range(grid.doublings + 1)]
    g = _generator(config, widths, grid.height * grid.width, channels, num_classes)
    d = _discriminator(config, widths, grid.height * grid.width, channels, num_classes)
    full = 8 if config.run.precision == "float64" else 4
    state = full * (5 * g + 4 * d) / _MIB
    maps = 2 * sum(
        (grid.height << level) * (grid.width << level) * (2 * widths[level] + widths[level - 1])
        for level in range(1, grid.doublings + 1)
    )
    width = _BYTES[config.run.precision]
    activations = 3.5 * width * maps * arithmetic.per_replica_batch / _MIB
    return Sizes(g, d, state, activations)


def _dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _conv(inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> int:
    return kernel * kernel * inputs * outputs + (outputs if bias else 0)


def _mapping(z_dim: int, num_classes: int, w_dim: int, layers: int) -> int:
    total, features = 0, z_dim
    if num_classes:
        total, features = _dense(num_classes, w_dim), z_dim + w_dim
    for _ in range(layers):
        total += _dense(features, w_dim)
        features = w_dim
    return total


def _generator(
    config: Config, widths: list[int], grid: int, channels: int, num_classes: int
) -> int:
    model = config.model
    w_dim, architecture = model.w_dim, model.g_architecture
    total = _mapping(model.z_dim, num_classes, w_dim, model.mapping_layers) + grid * widths[0]
    for level, width in enumerate(widths):
        inputs = [width] if level == 0 else [widths[level - 1], width]
        # A layer: convolution with bias, strength of the noise, style.
        total += sum(_conv(n, width, 3) + 1 + _dense(w_dim, n) for n in inputs)
        if architecture == "skip" or level == len(widths) - 1:
            total += _conv(width, channels, 1) + _dense(w_dim, width)
        if architecture == "resnet" and level:
            total += _conv(widths[level - 1], width, 1, bias=False)
    return total


def _discriminator(
    config: Config, widths: list[int], grid: int, channels: int, num_classes: int
) -> int:
    architecture, last = config.model.d_architecture, widths[0]
    total = 0
    for level in range(len(widths) - 1, 0, -1):
        inputs, outputs = widths[level], widths[level - 1]
        if architecture == "skip" or level == len(widths) - 1:
            total += _conv(channels, inputs, 1)
        total += _conv(inputs, inputs, 3) + _conv(inputs, outputs, 3)
        if architecture == "resnet":
            total += _conv(inputs, outputs, 1, bias=False)
    if architecture == "skip":
        total += _conv(channels, last, 1)
    total += _conv(last + 1, last, 3) + grid * last * last + last
    total += _dense(last, last if num_classes else 1)
    if num_classes:
        total += _mapping(0, num_classes, last, config.model.d_mapping_layers)
    return total
