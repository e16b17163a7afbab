"""The keys of StyleGAN2's networks, the sizes they can make, their parameters and costs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from trainer.core.errors import ConfigError
from trainer.core.sections import AT_LEAST_0, AT_LEAST_1, FRACTION, POSITIVE, Auto, fill, key
from trainer.families import protocol
from trainer.families.protocol import DataShape, Spec, Table, Tables
from trainer.families.sizes import base_grid, nearest_resolutions

# The learning rate of the mapping network relative to the rest (StyleGAN, appendix C).
MAPPING_LR = 0.01

_AUTO_GPUS = 8  # NVIDIA's rule scales with the GPUs; a fixed count keeps the result placement-free


@dataclasses.dataclass(frozen=True)
class Keys(protocol.Keys):
    """The two networks, in NVIDIA's terms.

    Attributes:
      family: which pair of networks.
      z_dim: length of the latent z (NVIDIA: 512).
      w_dim: length of the intermediate latent w (NVIDIA: 512).
      mapping_layers: layers of G's mapping network (NVIDIA: `map`, 8, or 2 in auto and cifar).
      d_mapping_layers: layers of the mapping of labels in a conditional D (NVIDIA: 8).
      channel_base: channels of a resolution are channel_base / resolution, at most `channel_max`
        (NVIDIA: fmaps * 32768). 'auto': 32768 from 512 pixels on, else 16384.
      channel_max: most channels of any layer (NVIDIA: 512).
      g_architecture: 'skip' sums RGB outputs, 'resnet' has residual blocks, 'orig' has neither
        (StyleGAN2 paper, figure 7).
      d_architecture: the same for the discriminator (NVIDIA: resnet, or orig in cifar).
      num_fp16_res: the highest this many resolutions run in a 16-bit `run.precision`, but never
        the lowest (NVIDIA: 4); 'all' takes that one too, the fastest on TPUs. What must not be
        rounded stays in float32: fully connected layers, RGB sums, demodulation, minibatch
        standard deviation, logits and losses.
      conv_clamp: activations are clamped to +- this when `run.precision` is 16-bit, null for no
        clamp (NVIDIA: 256).
      style_mixing_prob: probability of style mixing in training (NVIDIA: 0.9, or 0 in cifar).
      noise_mode: G's noise inputs in training: 'random', 'const' or 'none' (NVIDIA: random).
    """

    STYLES: ClassVar[bool] = True

    family: Literal["stylegan2"] = "stylegan2"
    z_dim: int = key(512, AT_LEAST_1)
    w_dim: int = key(512, AT_LEAST_1)
    mapping_layers: int = key(8, AT_LEAST_1)
    d_mapping_layers: int = key(8, AT_LEAST_1)
    channel_base: int | Auto = key(32768, AT_LEAST_1)
    channel_max: int = key(512, AT_LEAST_1)
    g_architecture: Literal["skip", "resnet", "orig"] = "skip"
    d_architecture: Literal["skip", "resnet", "orig"] = "resnet"
    num_fp16_res: int | Literal["all"] = key(4, AT_LEAST_0)
    conv_clamp: float | None = key(256.0, POSITIVE)
    style_mixing_prob: float = key(0.9, FRACTION)
    noise_mode: Literal["random", "const", "none"] = "random"

    @classmethod
    def nearest_resolutions(cls, height: int, width: int) -> list[tuple[int, int]]:
        """The closest (height, width) that `base_grid` takes; square ones for a square."""
        return nearest_resolutions(height, width)

    def resolved(self, resolution: tuple[int, int]) -> Keys:
        """The keys with what NVIDIA's --cfg=auto takes; a rectangle counts as its longer side.

        Raises:
          ConfigError: the networks cannot make this resolution, or not with so few channels.
        """
        grid = base_grid(resolution)
        found = fill(self, {"channel_base": 32768 if max(resolution) >= 512 else 16384})
        nominal = 4 << grid.doublings
        if isinstance(found.channel_base, int) and found.channel_base < nominal:
            raise ConfigError(
                f"model.channel_base = {found.channel_base} leaves the highest resolution without "
                f"channels; set it to {nominal} or more"
            )
        return found

    def auto_values(
        self, resolution: tuple[int, int], batch_size: int | None
    ) -> dict[str, dict[str, Any]]:
        """NVIDIA's --cfg=auto; R1 weight and EMA half-life follow a given batch size."""
        side = max(resolution)
        batch, group = _auto_batch(side)
        if batch_size is not None:
            batch, group = batch_size, min(batch_size, 4)
        lr = 0.002 if side >= 1024 else 0.0025
        return {
            "training": {
                "batch_size": batch,
                "group_size": group,
                "g_lr": lr,
                "d_lr": lr,
                "ema_kimg": batch * 10 / 32,
            },
            "objective": {"r1_gamma": 0.0002 * side**2 / batch},
        }

    def tables(self, data: DataShape) -> Tables:
        """The parameters of resolved keys, and what they cost."""
        assert isinstance(self.channel_base, int)
        shared: dict[str, Any] = {
            "c_dim": len(data.label_counts),
            "resolution": data.resolution,
            "img_channels": data.channels,
            "channel_base": self.channel_base,
            "channel_max": self.channel_max,
        }
        generator = generator_table(
            z_dim=self.z_dim,
            w_dim=self.w_dim,
            mapping_layers=self.mapping_layers,
            architecture=self.g_architecture,
            **shared,
        )
        discriminator = discriminator_table(
            mapping_layers=self.d_mapping_layers, architecture=self.d_architecture, **shared
        )
        grid = base_grid(data.resolution)
        widths = [
            channels(level, self.channel_base, self.channel_max)
            for level in range(grid.doublings + 1)
        ]
        values = sum(
            (grid.height * grid.width << 2 * level) * (2 * widths[level] + widths[level - 1])
            for level in range(1, grid.doublings + 1)
        )
        return Tables(generator, discriminator, values)


def _auto_batch(resolution: int) -> tuple[int, int]:
    """(batch size, group size) of NVIDIA's --cfg=auto with `_AUTO_GPUS` GPUs.

    Above 2048 pixels NVIDIA's group would be one image, of which path length cannot take a half.
    """
    batch = max(min(_AUTO_GPUS * min(4096 // resolution, 32), 64), _AUTO_GPUS)
    return batch, min(max(batch // _AUTO_GPUS, 2), 4)


# ---------------------------------------------------------------- parameters


def channels(level: int, channel_base: int, channel_max: int) -> int:
    """Channels of the block `level` doublings above the base grid."""
    return min(channel_base // (4 << level), channel_max)


def _mapping(table: Table, z_dim: int, c_dim: int, w_dim: int, layers: int) -> None:
    if c_dim:
        table.dense("mapping.embed", c_dim, w_dim)
    features = z_dim + (w_dim if c_dim else 0)
    for layer in range(layers):
        table.dense(f"mapping.fc{layer}", features, w_dim, lr_multiplier=MAPPING_LR)
        features = w_dim


def generator_table(
    *,
    z_dim: int,
    c_dim: int,
    w_dim: int,
    resolution: tuple[int, int],
    img_channels: int,
    mapping_layers: int,
    channel_base: int,
    channel_max: int,
    architecture: str,
) -> Table:
    """The parameters of `networks.Generator`, which explains the arguments."""
    table = Table()
    grid = base_grid(resolution)
    inputs = 0
    for level in range(grid.doublings + 1):
        name, outputs = f"synthesis.b{4 << level}", channels(level, channel_base, channel_max)
        height, width = grid.height << level, grid.width << level
        layers = [("conv0", inputs, height * width // 4)] if inputs else []
        if not inputs:
            table[f"{name}.const"] = Spec((height, width, outputs), 1.0, True)
        for layer, layer_inputs, pixels in [*layers, ("conv1", outputs, height * width)]:
            table.conv(f"{name}.{layer}", layer_inputs, outputs, 3, pixels)
            table[f"{name}.{layer}.noise_strength"] = Spec((), 0.0, False)
            table[f"{name}.{layer}.noise_const"] = Spec((height, width), 1.0, True, trainable=False)
            table.dense(f"{name}.{layer}.affine", w_dim, layer_inputs, bias=1.0)
        if architecture == "skip" or level == grid.doublings:
            table.conv(f"{name}.torgb", outputs, img_channels, 1, height * width)
            table.dense(f"{name}.torgb.affine", w_dim, outputs, bias=1.0)
        if inputs and architecture == "resnet":
            table.conv(f"{name}.skip", inputs, outputs, 1, height * width // 4, bias=False)
        inputs = outputs
    _mapping(table, z_dim, c_dim, w_dim, mapping_layers)
    table["mapping.w_avg"] = Spec((w_dim,), 0.0, False, trainable=False)
    return table


def discriminator_table(
    *,
    c_dim: int,
    resolution: tuple[int, int],
    img_channels: int,
    mapping_layers: int,
    channel_base: int,
    channel_max: int,
    architecture: str,
) -> Table:
    """The parameters of `networks.Discriminator`, which explains the arguments."""
    table = Table()
    height, width, doublings = base_grid(resolution)
    for level in range(doublings, 0, -1):
        name, pixels = f"b{4 << level}", height * width << 2 * level
        inputs, outputs = (channels(n, channel_base, channel_max) for n in (level, level - 1))
        if architecture == "skip" or level == doublings:
            table.conv(f"{name}.fromrgb", img_channels, inputs, 1, pixels)
        table.conv(f"{name}.conv0", inputs, inputs, 3, pixels)
        table.conv(f"{name}.conv1", inputs, outputs, 3, pixels // 4)
        if architecture == "resnet":
            table.conv(f"{name}.skip", inputs, outputs, 1, pixels // 4, bias=False)
    last, pixels = channels(0, channel_base, channel_max), height * width
    if architecture == "skip":
        table.conv("b4.fromrgb", img_channels, last, 1, pixels)
    table.conv("b4.conv", last + 1, last, 3, pixels)
    flat = height, width, last
    table["b4.fc.weight"] = Spec((pixels * last, last), 1.0, True, grid=flat)
    table["b4.fc.bias"] = Spec((last,), 0.0, False)
    table.dense("b4.out", last, last if c_dim else 1)
    if c_dim:
        _mapping(table, 0, c_dim, last, mapping_layers)
    return table
