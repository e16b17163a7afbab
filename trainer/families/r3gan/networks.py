"""R3GAN's generator and discriminator (Huang et al. 2024, section 3), value for value the authors'.

Names are those of the authors' parameters: `MainLayers.2.Layers.1` is the second layer of the third
stage, counted from z in the generator and from the image in the discriminator.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainer.families import network
from trainer.families.network import Output, Params
from trainer.families.protocol import DataShape
from trainer.families.r3gan.keys import Keys, Layout, discriminator_table, generator_table
from trainer.layers import grouped, ops


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
      group_size: without effect: no layer looks at several images.
      clamped: without effect: activations aren't clamped.
      half_dtype: of the stages in 16 bits; None for full precision throughout.
      backend: how layers are computed.
    """
    del group_size, clamped
    layout = keys.layout(data)
    shared: dict[str, Any] = {
        "num_fp16_res": keys.num_fp16_res,
        "half_dtype": half_dtype,
        "backend": backend,
    }
    return Generator(layout, z_dim=keys.z_dim, **shared), Discriminator(layout, **shared)


class Generator(network.Generator):
    """z, c -> images. Its only w is z with the embedding of the class behind it.

    Args:
      layout: its layers.
      z_dim: length of z, and of the embedding of a class.
      num_fp16_res: how many of the highest resolutions run in `half_dtype`.
      half_dtype: tf.float16, tf.bfloat16, or None for full precision throughout.
      backend: how layers are computed.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        z_dim: int,
        num_fp16_res: int = 0,
        half_dtype: tf.DType | None = None,
        backend: ops.Backend = ops.Backend.GENERIC,
    ) -> None:
        super().__init__(generator_table(layout, z_dim))
        self.z_dim, self.c_dim = z_dim, layout.c_dim
        self.w_dim, self.num_ws = 2 * z_dim if layout.c_dim else z_dim, 1
        self.noise_shapes = []
        self.resolution, self.img_channels = layout.resolution, layout.img_channels
        self.backend = backend
        self._blocks = layout.blocks
        stages = len(layout.widths)
        self._dtypes = [half_dtype if n >= stages - num_fp16_res else None for n in range(stages)]

    def map(self, params: Params, z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        """See `network.Generator.map`."""
        if not self.c_dim:
            return z
        return tf.concat([z, tf.linalg.matmul(c, params["EmbeddingLayer.weight"])], 1)

    def synthesis(
        self, params: Params, ws: tf.Tensor, noise: list[tf.Tensor] | None = None
    ) -> tf.Tensor:
        """See `network.Generator.synthesis`."""
        del noise
        first = "MainLayers.0.Layers.0"
        scales = tf.linalg.matmul(ws[:, 0], params[f"{first}.LinearLayer.weight"])
        x = params[f"{first}.Basis"] * scales[:, tf.newaxis, tf.newaxis]
        for stage, (blocks, dtype) in enumerate(zip(self._blocks, self._dtypes, strict=True)):
            x = tf.cast(x, dtype or ws.dtype)
            if stage:
                x = _change_width(params, f"MainLayers.{stage}.Layers.0", x, self.backend)
                x = ops.upsample2d(x, ops.RESAMPLE_FILTER, self.backend)
            for block in range(blocks):
                x = _block(params, f"MainLayers.{stage}.Layers.{block + 1}", x, self.backend)
        return tf.cast(_conv(params, "AggregationLayer.Layer", x, self.backend), ws.dtype)


class Discriminator(network.Discriminator):
    """Images, c -> logits.

    Args:
      layout: its layers.
      num_fp16_res: how many of the highest resolutions run in `half_dtype`.
      half_dtype: tf.float16, tf.bfloat16, or None for full precision throughout.
      backend: how layers are computed.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        num_fp16_res: int = 0,
        half_dtype: tf.DType | None = None,
        backend: ops.Backend = ops.Backend.GENERIC,
    ) -> None:
        super().__init__(discriminator_table(layout))
        self.c_dim = layout.c_dim
        self.resolution, self.img_channels = layout.resolution, layout.img_channels
        self.backend = backend
        self._blocks = list(reversed(layout.blocks))
        stages = len(layout.widths)
        self._dtypes = [half_dtype if n < num_fp16_res else None for n in range(stages)]
        # `MainLayers.0.Layers.2` is one layer, whatever lies in it; the last one is the head.
        layers = (".".join(name.split(".")[:4]) for name in self.specs if "Layers." in name)
        self.freezable_layers = ["ExtractionLayer", *dict.fromkeys(layers)][:-1]

    def apply(self, params: Params, images: tf.Tensor, c: tf.Tensor) -> Output:
        """See `network.Discriminator.apply`."""
        full = params["ExtractionLayer.Layer.weight"].dtype
        x = tf.cast(images, self._dtypes[0] or full)
        x = _conv(params, "ExtractionLayer.Layer", x, self.backend)
        for stage, (blocks, dtype) in enumerate(zip(self._blocks, self._dtypes, strict=True)):
            name = f"MainLayers.{stage}.Layers"
            x = tf.cast(x, dtype or full)
            for block in range(blocks):
                x = _block(params, f"{name}.{block}", x, self.backend)
            if stage < len(self._blocks) - 1:
                x = ops.downsample2d(x, ops.RESAMPLE_FILTER, self.backend)
                x = _change_width(params, f"{name}.{blocks}", x, self.backend)
        head = f"MainLayers.{len(self._blocks) - 1}.Layers.{self._blocks[-1]}"
        # A depthwise convolution whose kernels are as large as the maps.
        basis = params[f"{head}.Basis.weight"][:, :, 0]
        x = tf.reduce_sum(tf.cast(x, full) * basis, [1, 2])
        x = tf.linalg.matmul(x, params[f"{head}.LinearLayer.weight"])
        if self.c_dim:
            embedding = tf.linalg.matmul(c, params["EmbeddingLayer.weight"])
            x = tf.reduce_sum(x * embedding, 1, keepdims=True)
        return Output(x, {})


def _conv(params: Params, name: str, x: tf.Tensor, backend: ops.Backend) -> tf.Tensor:
    """A convolution without bias."""
    return ops.conv2d(x, tf.cast(params[f"{name}.weight"], x.dtype), backend)


def _change_width(params: Params, name: str, x: tf.Tensor, backend: ops.Backend) -> tf.Tensor:
    """A 1x1 convolution, where stages have different widths."""
    layer = f"{name}.LinearLayer.Layer"
    return _conv(params, layer, x, backend) if f"{layer}.weight" in params else x


def _block(params: Params, name: str, x: tf.Tensor, backend: ops.Backend) -> tf.Tensor:
    """A residual block: 1x1 to the hidden channels, grouped 3x3, 1x1 back (figure 3)."""

    def activation(layer: str, y: tf.Tensor) -> tf.Tensor:
        bias = params[f"{name}.{layer}.Bias"]
        return ops.bias_act(y, bias, "lrelu", gain=1.0, backend=backend)

    y = activation("NonLinearity1", _conv(params, f"{name}.LinearLayer1.Layer", x, backend))
    weight = tf.cast(params[f"{name}.LinearLayer2.Layer.weight"], x.dtype)
    y = activation("NonLinearity2", grouped.grouped_conv2d(y, weight, backend))
    return x + _conv(params, f"{name}.LinearLayer3.Layer", y, backend)
