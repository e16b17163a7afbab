"""The keys of R3GAN's networks (config E of the paper), their parameters and costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from trainer.core.errors import ConfigError
from trainer.core.sections import AT_LEAST_0, AT_LEAST_1, key
from trainer.families import protocol
from trainer.families.protocol import DataShape, Spec, Table, Tables
from trainer.families.sizes import BaseGrid, base_grid, nearest_resolutions

# Hidden channels of a block for each of its channels.
EXPANSION = 2
# What keeps the variance behind a leaky ReLU of slope 0.2.
_GAIN = math.sqrt(2 / (1 + 0.2**2))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layers that both networks have.

    Attributes:
      c_dim: number of classes, 0 if unconditional.
      resolution: (height, width), the base grid times 2 ** (stages - 1).
      img_channels: 1 to 4.
      widths: channels of each stage, from the base grid up.
      blocks: residual blocks of each stage, likewise.
      group_channels: hidden channels in a group of the grouped convolutions.
    """

    c_dim: int
    resolution: tuple[int, int]
    img_channels: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    group_channels: int


@dataclasses.dataclass(frozen=True)
class Keys(protocol.Keys):
    """Two networks of residual blocks with grouped convolutions, without normalisation or styles.

    Attributes:
      family: which pair of networks.
      z_dim: length of the latent z, and of the embedding of a class that is appended to it
        (published: 64).
      channel_base: channels of a resolution are channel_base / resolution, at most `channel_max`
        (published: 24576; on ImageNet 49152 at 32 and 98304 at 64 pixels).
      channel_max: most channels of any stage (published: 768; on ImageNet 1536).
      group_channels: hidden channels in a group of the grouped convolutions (published: 16; on
        ImageNet 32).
      blocks: residual blocks at each resolution (published: 2).
      num_fp16_res: the highest this many resolutions run in a 16-bit `run.precision` (published: 3 at
        32 pixels, else 4).
    """

    family: Literal["r3gan"] = "r3gan"
    z_dim: int = key(64, AT_LEAST_1)
    channel_base: int = key(24576, AT_LEAST_1)
    channel_max: int = key(768, AT_LEAST_1)
    group_channels: int = key(16, AT_LEAST_1)
    blocks: int = key(2, AT_LEAST_1)
    num_fp16_res: int = key(4, AT_LEAST_0)

    @classmethod
    def nearest_resolutions(cls, height: int, width: int) -> list[tuple[int, int]]:
        """The closest (height, width) that `base_grid` takes; square ones for a square."""
        return nearest_resolutions(height, width)

    def resolved(self, resolution: tuple[int, int]) -> Keys:
        """The keys themselves: none is 'auto'.

        Raises:
          ConfigError: the networks cannot make this resolution, or groups don't divide channels.
        """
        for level, width in enumerate(self.widths(base_grid(resolution))):
            hidden = EXPANSION * width
            if not width or hidden % self.group_channels:
                raise ConfigError(
                    f"model.group_channels = {self.group_channels} does not divide the {hidden} "
                    f"hidden channels at {4 << level} pixels; change it, model.channel_base or "
                    "model.channel_max"
                )
        return self

    def widths(self, grid: BaseGrid) -> list[int]:
        """Channels of each stage, from the base grid up."""
        return [
            min(self.channel_base // (4 << level), self.channel_max)
            for level in range(grid.doublings + 1)
        ]

    def auto_values(
        self, resolution: tuple[int, int], batch_size: int | None
    ) -> dict[str, dict[str, Any]]:
        """The settings published for FFHQ at 64 pixels.

        The weight of R1 grows with the cube of the resolution, as between its 2 there and the 150
        at 256 pixels.
        """
        batch = 256 if batch_size is None else batch_size
        return {
            "training": {
                "batch_size": batch,
                "group_size": min(batch, 16),
                "g_lr": 2e-4,
                "d_lr": 2e-4,
                "ema_kimg": 500.0,
            },
            "objective": {"r1_gamma": 2 * (max(resolution) / 64) ** 3},
        }

    def tables(self, data: DataShape) -> Tables:
        """The parameters of resolved keys, and what they cost."""
        grid = base_grid(data.resolution)
        widths = self.widths(grid)
        layout = self.layout(data)
        # The input of each block, and twice the hidden maps, before and after what acts on them.
        values = sum(
            (grid.height * grid.width << 2 * level) * width * (1 + 4 * EXPANSION) * self.blocks
            for level, width in enumerate(widths)
        )
        return Tables(generator_table(layout, self.z_dim), discriminator_table(layout), values)

    def layout(self, data: DataShape) -> Layout:
        """The layers of both networks for a data set."""
        widths = self.widths(base_grid(data.resolution))
        return Layout(
            c_dim=len(data.label_counts),
            resolution=data.resolution,
            img_channels=data.channels,
            widths=tuple(widths),
            blocks=(self.blocks,) * len(widths),
            group_channels=self.group_channels,
        )


def generator_table(layout: Layout, z_dim: int) -> Table:
    """The parameters of `networks.Generator`."""
    widths, blocks, group_channels = layout.widths, layout.blocks, layout.group_channels
    c_dim = layout.c_dim
    table, grid = Table(), base_grid(layout.resolution)
    features = 2 * z_dim if c_dim else z_dim
    first = "MainLayers.0.Layers.0"
    table[f"{first}.Basis"] = Spec((grid.height, grid.width, widths[0]), 1.0, True)
    _linear(table, f"{first}.LinearLayer", features, widths[0])
    inputs = widths[0]
    for stage, width in enumerate(widths):
        pixels = grid.height * grid.width << 2 * stage
        if inputs != width:
            name = f"MainLayers.{stage}.Layers.0.LinearLayer.Layer"
            _conv(table, name, inputs, width, 1, pixels // 4)
        for block in range(blocks[stage]):
            name = f"MainLayers.{stage}.Layers.{block + 1}"
            _block(table, name, width, group_channels, pixels, sum(blocks))
        inputs = width
    _conv(table, "AggregationLayer.Layer", inputs, layout.img_channels, 1, pixels)
    if c_dim:
        _linear(table, "EmbeddingLayer", c_dim, z_dim)
    return table


def discriminator_table(layout: Layout) -> Table:
    """The parameters of `networks.Discriminator`."""
    widths, blocks, group_channels = layout.widths, layout.blocks, layout.group_channels
    c_dim = layout.c_dim
    table, grid = Table(), base_grid(layout.resolution)
    top = len(widths) - 1
    pixels = grid.height * grid.width << 2 * top
    _conv(table, "ExtractionLayer.Layer", layout.img_channels, widths[top], 1, pixels)
    for stage, level in enumerate(range(top, -1, -1)):
        pixels = grid.height * grid.width << 2 * level
        width = widths[level]
        for block in range(blocks[level]):
            name = f"MainLayers.{stage}.Layers.{block}"
            _block(table, name, width, group_channels, pixels, sum(blocks))
        if level and widths[level - 1] != width:
            name = f"MainLayers.{stage}.Layers.{blocks[level]}.LinearLayer.Layer"
            _conv(table, name, width, widths[level - 1], 1, pixels // 4)
    name, last = f"MainLayers.{top}.Layers.{blocks[0]}", widths[0]
    basis = grid.height, grid.width, 1, last
    table[f"{name}.Basis.weight"] = Spec(basis, 1 / math.sqrt(pixels), True, pixels=1)
    _linear(table, f"{name}.LinearLayer", last, last if c_dim else 1)
    if c_dim:
        _linear(table, "EmbeddingLayer", c_dim, last, gain=1 / math.sqrt(last))
    return table


def _linear(table: Table, name: str, inputs: int, outputs: int, gain: float = 1.0) -> None:
    table[f"{name}.weight"] = Spec((inputs, outputs), gain / math.sqrt(inputs), True)


def _conv(
    table: Table, name: str, inputs: int, outputs: int, size: int, pixels: int, gain: float = 1.0
) -> None:
    """A convolution of `inputs` channels, or of those of one group."""
    deviation = gain / math.sqrt(inputs * size**2)
    table[f"{name}.weight"] = Spec((size, size, inputs, outputs), deviation, True, pixels=pixels)


def _block(
    table: Table, name: str, width: int, group_channels: int, pixels: int, num_blocks: int
) -> None:
    """A residual block, which at the start is the identity (Fixup, Zhang et al. 2019)."""
    hidden = EXPANSION * width
    gain = _GAIN * num_blocks**-0.25
    _conv(table, f"{name}.LinearLayer1.Layer", width, hidden, 1, pixels, gain)
    _conv(table, f"{name}.LinearLayer2.Layer", group_channels, hidden, 3, pixels, gain)
    _conv(table, f"{name}.LinearLayer3.Layer", hidden, width, 1, pixels, gain=0.0)
    for layer in ("NonLinearity1", "NonLinearity2"):
        table[f"{name}.{layer}.Bias"] = Spec((hidden,), 0.0, False)
