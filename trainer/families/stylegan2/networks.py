"""StyleGAN2's generator and discriminator (Karras et al. 2020), value for value NVIDIA's.

Names are NVIDIA's; a `b16` block is the third above the base grid, also where that grid isn't 4x4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.families import network
from trainer.families.network import Output, Params
from trainer.families.protocol import DataShape
from trainer.families.sizes import base_grid
from trainer.families.stylegan2.keys import (
    MAPPING_LR,
    Keys,
    channels,
    discriminator_table,
    generator_table,
)
from trainer.layers import ops
from trainer.layers.stages import Maps, Stage

NumHalf = int | Literal["all"]

_SQRT_HALF = math.sqrt(0.5)


def build(
    keys: Keys,
    data: DataShape,
    *,
    group_size: int,
    clamped: bool,
    half_dtype: tf.DType | None,
    backend: ops.Backend,
) -> tuple[Generator, Discriminator]:
    """Both networks.

    Args:
      keys: resolved.
      data: what they make and judge.
      group_size: images over which minibatch standard deviation is taken.
      clamped: whether activations are clamped, as they are where blocks are in 16 bits.
      half_dtype: of the blocks that are; None for full precision throughout.
      backend: how layers are computed.
    """
    assert isinstance(keys.channel_base, int)
    clamp = keys.conv_clamp if clamped else None
    generator = Generator(
        z_dim=keys.z_dim,
        c_dim=len(data.label_counts),
        w_dim=keys.w_dim,
        resolution=data.resolution,
        img_channels=data.channels,
        mapping_layers=keys.mapping_layers,
        channel_base=keys.channel_base,
        channel_max=keys.channel_max,
        architecture=keys.g_architecture,
        num_fp16_res=keys.num_fp16_res,
        conv_clamp=clamp,
        half_dtype=half_dtype,
        backend=backend,
        style_mixing_prob=keys.style_mixing_prob,
        noise_mode=keys.noise_mode,
    )
    discriminator = Discriminator(
        c_dim=len(data.label_counts),
        resolution=data.resolution,
        img_channels=data.channels,
        channel_base=keys.channel_base,
        channel_max=keys.channel_max,
        architecture=keys.d_architecture,
        mapping_layers=keys.d_mapping_layers,
        mbstd_group_size=group_size,
        num_fp16_res=keys.num_fp16_res,
        conv_clamp=clamp,
        half_dtype=half_dtype,
        backend=backend,
    )
    return generator, discriminator


def _dense(
    params: Params,
    name: str,
    x: tf.Tensor,
    *,
    activation: str = "linear",
    lr_multiplier: float = 1.0,
) -> tf.Tensor:
    """A fully connected layer with equalised learning rate (Karras et al. 2018, section 4.1)."""
    weight = params[f"{name}.weight"]
    weight *= tf.constant(lr_multiplier / math.sqrt(weight.shape[0]), weight.dtype)
    bias = params[f"{name}.bias"]
    if lr_multiplier != 1:
        bias *= tf.constant(lr_multiplier, bias.dtype)
    return ops.bias_act(tf.linalg.matmul(x, weight), bias, activation)


def _equalized(weight: tf.Tensor) -> tf.Tensor:
    """A convolution's weight scaled by its fan-in."""
    return weight * tf.constant(1 / math.sqrt(np.prod(weight.shape[:-1])), weight.dtype)


def _conv(
    params: Params,
    name: str,
    stage: Stage,
    x: Maps,
    *,
    activation: str = "linear",
    up: int = 1,
    down: int = 1,
    gain: float = 1.0,
    clamp: float | None = None,
) -> Maps:
    """A convolution with equalised learning rate, bias and activation."""
    weight = tf.cast(_equalized(params[f"{name}.weight"]), x.tensor.dtype)
    x = stage.conv(x, weight, up=up, down=down)
    act_gain = gain * (math.sqrt(2) if activation == "lrelu" else 1.0)
    act_clamp = None if clamp is None else clamp * gain
    return stage.bias_act(x, params.get(f"{name}.bias"), activation, gain=act_gain, clamp=act_clamp)


def _mapping_layers(params: Params, z: tf.Tensor | None, c: tf.Tensor, layers: int) -> tf.Tensor:
    """Normalised z and label embedding through the fully connected layers: [N, w_dim]."""
    inputs = [] if z is None else [ops.normalize_2nd_moment(z)]
    if "mapping.embed.weight" in params:
        inputs.append(ops.normalize_2nd_moment(_dense(params, "mapping.embed", c)))
    x = tf.concat(inputs, 1)
    for layer in range(layers):
        x = _dense(params, f"mapping.fc{layer}", x, activation="lrelu", lr_multiplier=MAPPING_LR)
    return x


@dataclass(frozen=True)
class Block:
    """One resolution of a network.

    Attributes:
      name: `b4`, `b8`, ...: NVIDIA's name.
      height, width: of its feature maps (the larger ones, for a discriminator block).
      inputs, outputs: channels. A generator's first block has no inputs.
      dtype: in which its convolutions run; None is that of the parameters.
      stage: its layers.
    """

    name: str
    height: int
    width: int
    inputs: int
    outputs: int
    dtype: tf.DType | None
    stage: Stage


def _level_dtype(
    level: int, doublings: int, num_fp16_res: NumHalf, half_dtype: tf.DType | None
) -> tf.DType | None:
    """16-bit for all, or for the highest resolutions, but then never below the second (`b8`)."""
    if num_fp16_res == "all":
        return half_dtype
    return half_dtype if level > max(doublings - num_fp16_res, 0) else None


class Generator(network.StyleGenerator):
    """z, c -> ws -> images.

    Args:
      z_dim: size of the latent.
      c_dim: number of classes, 0 if unconditional.
      w_dim: size of the intermediate latent.
      resolution: (height, width) = base grid times a power of two.
      img_channels: 1 to 4.
      mapping_layers: depth of the mapping network.
      channel_base, channel_max: a block at nominal resolution r has
        min(channel_base // r, channel_max) channels.
      architecture: "skip", "resnet" or "orig" (StyleGAN2, figure 7).
      num_fp16_res: how many of the highest resolutions run in `half_dtype`; with a number `b4`
        never does, as with NVIDIA, with "all" it does.
      conv_clamp: limit of activations in every block (NVIDIA's --fp32 has none).
      half_dtype: tf.float16, tf.bfloat16, or None for full precision throughout.
      backend: how layers are computed.
      style_mixing_prob, noise_mode: see `network.StyleGenerator`.
    """

    def __init__(
        self,
        *,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        resolution: tuple[int, int],
        img_channels: int = 3,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "skip",
        num_fp16_res: NumHalf = 0,
        conv_clamp: float | None = None,
        half_dtype: tf.DType | None = None,
        backend: ops.Backend = ops.Backend.GENERIC,
        style_mixing_prob: float = 0.9,
        noise_mode: str = "random",
    ) -> None:
        super().__init__(
            generator_table(
                z_dim=z_dim,
                c_dim=c_dim,
                w_dim=w_dim,
                resolution=resolution,
                img_channels=img_channels,
                mapping_layers=mapping_layers,
                channel_base=channel_base,
                channel_max=channel_max,
                architecture=architecture,
            )
        )
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.resolution, self.img_channels = resolution, img_channels
        self.mapping_layers, self.architecture = mapping_layers, architecture
        self.conv_clamp, self.backend = conv_clamp, backend
        self.style_mixing_prob, self.noise_mode = style_mixing_prob, noise_mode
        height, width, doublings = base_grid(resolution)
        self.blocks: list[Block] = []
        inputs = 0
        for level in range(doublings + 1):
            outputs = channels(level, channel_base, channel_max)
            dtype = _level_dtype(level, doublings, num_fp16_res, half_dtype)
            size = f"b{4 << level}", height << level, width << level
            stage = Stage.of(height << level, width << level, outputs, backend)
            self.blocks.append(Block(*size, inputs, outputs, dtype, stage))
            inputs = outputs
        # Every convolution takes one w, and so does the last conversion to RGB.
        self.num_ws = sum(self._num_convs(block) for block in self.blocks) + 1
        self.noise_shapes = [
            (block.height, block.width)
            for block in self.blocks
            for _ in range(self._num_convs(block))
        ]

    @staticmethod
    def _num_convs(block: Block) -> int:
        return 2 if block.inputs else 1

    def _has_torgb(self, block: Block) -> bool:
        return self.architecture == "skip" or block is self.blocks[-1]

    # ----------------------------------------------------------------------------------

    def map(self, params: Params, z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        """See `network.StyleGenerator.map`."""
        return _mapping_layers(params, z, c, self.mapping_layers)

    def noise(self, params: Params, mode: str, random: tf.Tensor | None = None) -> list[tf.Tensor]:
        """See `network.StyleGenerator.noise`."""
        if mode == "none":
            return []
        if mode == "const":
            names = [name for name in self.specs if name.endswith(".noise_const")]
            return [params[name] for name in names]
        assert random is not None
        sizes = [height * width for height, width in self.noise_shapes]
        parts = tf.split(random, sizes, axis=1)
        return [
            tf.reshape(part, [-1, height, width])
            for part, (height, width) in zip(parts, self.noise_shapes, strict=True)
        ]

    def synthesis(
        self, params: Params, ws: tf.Tensor, noise: list[tf.Tensor] | None = None
    ) -> tf.Tensor:
        """See `network.Generator.synthesis`."""
        noise = self.noise(params, "const") if noise is None else noise
        styles = iter(tf.unstack(ws, axis=1))
        layer_noise = iter(noise)
        x = img = None
        for block in self.blocks:
            x, img, last = self._block(params, block, x, img, styles, layer_noise)
            # A block's conversion to RGB and the next block's first layer share a w.
            styles = itertools.chain([last], styles) if block is not self.blocks[-1] else styles
        assert img is not None
        return img

    def _block(
        self,
        params: Params,
        block: Block,
        x: Maps | None,
        img: tf.Tensor | None,
        styles: Iterator[tf.Tensor],
        noise: Iterator[tf.Tensor],
    ) -> tuple[Maps, tf.Tensor | None, tf.Tensor]:
        name, stage, full = f"synthesis.{block.name}", block.stage, params["mapping.w_avg"].dtype
        dtype, layer = block.dtype or full, self._layer
        if x is None:
            w = next(styles)
            const = tf.cast(params[f"{name}.const"], dtype)
            images = tf.shape(w)[0] if w.shape[0] is None else w.shape[0]
            x = Maps(tf.tile(const[tf.newaxis], [images, 1, 1, 1]))
            x = layer(params, f"{name}.conv1", stage, x, w, noise)
        else:
            x = stage.enter(x.cast(dtype))
            residual = self.architecture == "resnet"
            gain = _SQRT_HALF if residual else 1.0
            skip = _conv(params, f"{name}.skip", stage, x, up=2, gain=gain) if residual else None
            w0, w1 = next(styles), next(styles)
            x = layer(params, f"{name}.conv0", stage, x, w0, noise, up=2)
            x = layer(params, f"{name}.conv1", stage, x, w1, noise, gain=gain)
            x = x if skip is None else x + skip
        if img is not None:
            img = ops.upsample2d(img, ops.RESAMPLE_FILTER, self.backend)
        last = next(styles)
        if self._has_torgb(block):
            rgb = tf.cast(self._torgb(params, f"{name}.torgb", stage, x, last).plain(), full)
            img = rgb if img is None else img + rgb
        return stage.leave(x), img, last

    def _layer(
        self,
        params: Params,
        name: str,
        stage: Stage,
        x: Maps,
        w: tf.Tensor,
        noise: Iterator[tf.Tensor],
        up: int = 1,
        gain: float = 1.0,
    ) -> Maps:
        """Modulated 3x3 convolution, noise, bias and leaky ReLU."""
        styles = _dense(params, f"{name}.affine", w)
        x = stage.modulated_conv(
            x,
            params[f"{name}.weight"],
            styles,
            next(noise, None),
            strength=params[f"{name}.noise_strength"],
            up=up,
        )
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        bias = params[f"{name}.bias"]
        return stage.bias_act(x, bias, "lrelu", gain=gain * math.sqrt(2), clamp=clamp)

    def _torgb(self, params: Params, name: str, stage: Stage, x: Maps, w: tf.Tensor) -> Maps:
        weight = params[f"{name}.weight"]
        styles = _dense(params, f"{name}.affine", w)
        styles *= tf.constant(1 / math.sqrt(weight.shape[2]), styles.dtype)
        x = stage.modulated_conv(x, weight, styles, demodulate=False)
        return stage.bias_act(x, params[f"{name}.bias"], clamp=self.conv_clamp)


class Discriminator(network.Discriminator):
    """Images, c -> logits.

    Args:
      c_dim: number of classes, 0 if unconditional.
      resolution: (height, width).
      img_channels: 1 to 4.
      channel_base, channel_max: as for the generator.
      architecture: "resnet", "skip" or "orig".
      mapping_layers: depth of the label's mapping network (conditional only).
      mbstd_group_size: images that minibatch-stddev compares: every so many consecutive ones.
      num_fp16_res, conv_clamp, half_dtype, backend: as for the generator.
    """

    def __init__(
        self,
        *,
        c_dim: int,
        resolution: tuple[int, int],
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "resnet",
        mapping_layers: int = 8,
        mbstd_group_size: int = 4,
        num_fp16_res: NumHalf = 0,
        conv_clamp: float | None = None,
        half_dtype: tf.DType | None = None,
        backend: ops.Backend = ops.Backend.GENERIC,
    ) -> None:
        super().__init__(
            discriminator_table(
                c_dim=c_dim,
                resolution=resolution,
                img_channels=img_channels,
                mapping_layers=mapping_layers,
                channel_base=channel_base,
                channel_max=channel_max,
                architecture=architecture,
            )
        )
        self.c_dim, self.resolution, self.img_channels = c_dim, resolution, img_channels
        self.architecture, self.mapping_layers = architecture, mapping_layers
        self.mbstd_group_size, self.conv_clamp, self.backend = (
            mbstd_group_size,
            conv_clamp,
            backend,
        )
        height, width, doublings = base_grid(resolution)
        self.blocks: list[Block] = []
        for level in range(doublings, 0, -1):
            inputs = channels(level, channel_base, channel_max)
            outputs = channels(level - 1, channel_base, channel_max)
            dtype = _level_dtype(level, doublings, num_fp16_res, half_dtype)
            size = f"b{4 << level}", height << level, width << level
            stage = Stage.of(height << level, width << level, inputs, backend)
            self.blocks.append(Block(*size, inputs, outputs, dtype, stage))
        self._epilogue_dtype = _level_dtype(0, doublings, num_fp16_res, half_dtype)
        last = channels(0, channel_base, channel_max)
        self._epilogue_stage = Stage.of(height, width, last, backend)
        # From the image inwards, as NVIDIA counts them; without the epilogue.
        names = (name.rpartition(".")[0] for name in self.specs)
        self.freezable_layers = [
            *dict.fromkeys(name for name in names if not name.startswith(("b4.", "mapping.")))
        ]
        self.cmap_dim = channels(0, channel_base, channel_max) if c_dim else 0

    def apply(self, params: Params, images: tf.Tensor, c: tf.Tensor) -> Output:
        """See `network.Discriminator.apply`."""
        full = params["b4.out.weight"].dtype
        maps, img = None, images
        for block in self.blocks:
            maps, img = self._block(params, block, maps, img)
        assert maps is not None
        x = tf.cast(maps.plain(), full)
        if self.architecture == "skip":
            stage = self._epilogue_stage
            x += self._fromrgb(params, "b4.fromrgb", stage, Maps(tf.cast(img, full))).tensor
        x = self._epilogue(params, x)
        if not self.c_dim:
            return Output(x, {})
        cmap = _mapping_layers(params, None, c, self.mapping_layers)
        return Output(tf.reduce_sum(x * cmap, 1, keepdims=True) / math.sqrt(self.cmap_dim), {})

    def _fromrgb(self, params: Params, name: str, stage: Stage, img: Maps) -> Maps:
        return _conv(params, name, stage, img, activation="lrelu", clamp=self.conv_clamp)

    def _block(
        self, params: Params, block: Block, x: Maps | None, img: tf.Tensor
    ) -> tuple[Maps, tf.Tensor]:
        name, stage, clamp = block.name, block.stage, self.conv_clamp
        dtype = block.dtype or params["b4.out.weight"].dtype
        x = None if x is None else stage.enter(x.cast(dtype))
        if f"{name}.fromrgb.weight" in params:
            img = tf.cast(img, dtype)
            y = self._fromrgb(params, f"{name}.fromrgb", stage, stage.enter(img))
            x = y if x is None else x + y
            if self.architecture == "skip":
                img = ops.downsample2d(img, ops.RESAMPLE_FILTER, self.backend)
        assert x is not None
        residual = self.architecture == "resnet"
        gain = _SQRT_HALF if residual else 1.0
        skip = _conv(params, f"{name}.skip", stage, x, down=2, gain=gain) if residual else None
        x = _conv(params, f"{name}.conv0", stage, x, activation="lrelu", clamp=clamp)
        x = _conv(
            params,
            f"{name}.conv1",
            stage,
            x,
            activation="lrelu",
            down=2,
            gain=gain,
            clamp=clamp,
        )
        return stage.leave(x if skip is None else x + skip), img

    def _epilogue(self, params: Params, x: tf.Tensor) -> tf.Tensor:
        """Minibatch-stddev, convolution and two fully connected layers.

        All in full precision, but for the convolution if the whole network is in 16 bits.
        """
        full, clamp = x.dtype, self.conv_clamp
        x = ops.minibatch_stddev(x, self.mbstd_group_size)
        maps = Maps(tf.cast(x, self._epilogue_dtype or full))
        maps = _conv(params, "b4.conv", self._epilogue_stage, maps, activation="lrelu", clamp=clamp)
        x = tf.cast(maps.tensor, full)
        _, height, width, channels = x.shape
        x = tf.reshape(x, [-1, height * width * channels])
        x = _dense(params, "b4.fc", x, activation="lrelu")
        return _dense(params, "b4.out", x)
