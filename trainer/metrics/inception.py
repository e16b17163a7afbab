"""The Inception network of FID: the one of December 2015, as a pure function of its weights.

It is Inception-v3 (Szegedy et al. 2016) as TensorFlow published it in 2015 with 1008 classes, and
which Heusel et al. (2017) chose for FID. It differs from later releases of Inception-v3: average
pools do not count their padding, and the last block has a maximum pool where the one before it has
an average pool. Figures are comparable only if they come from this network and its weights.

Parameters have the names and the layout of pytorch-fid's state dict, such as
`Mixed_5b.branch5x5_1.conv.weight` [out, in, height, width]. `fold` turns them once, after loading,
into what the functions here compute with.

Hardware that rounds float32 convolutions (TF32 on GPUs, bfloat16 on TPUs) changes features in the
third digit; `tf.config.experimental.enable_tensor_float_32_execution(False)` prevents it on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

RESOLUTION = 299
FEATURES = 2048
CLASSES = 1008
BN_EPSILON = 1e-3

Params: TypeAlias = dict[str, np.ndarray]
"""Arrays by name, float32."""


# ---- the layers ----------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution without bias, batch norm and ReLU."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """A pool of 3 x 3 pixels; an average is over those inside the image."""

    kind: str  # MAX or AVG
    stride: int = 1
    padding: str = "SAME"


class Block(NamedTuple):
    """Branches with the same input, whose outputs are concatenated in this order."""

    name: str
    branches: tuple[tuple[Conv | Pool | Block, ...], ...]


Layer: TypeAlias = Conv | Pool | Block

SHRINK = Pool("MAX", stride=2, padding="VALID")


def _block_5(name: str, pool_channels: int) -> Block:
    """35 x 35 pixels."""
    return Block(
        name,
        (
            (Conv("branch1x1", 64),),
            (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3)),
            ),
            (Pool("AVG"), Conv("branch_pool", pool_channels)),
        ),
    )


def _block_6(name: str, channels: int) -> Block:
    """17 x 17 pixels, 7 x 7 kernels in two factors."""
    return Block(
        name,
        (
            (Conv("branch1x1", 192),),
            (
                Conv("branch7x7_1", channels),
                Conv("branch7x7_2", channels, (1, 7)),
                Conv("branch7x7_3", 192, (7, 1)),
            ),
            (
                Conv("branch7x7dbl_1", channels),
                Conv("branch7x7dbl_2", channels, (7, 1)),
                Conv("branch7x7dbl_3", channels, (1, 7)),
                Conv("branch7x7dbl_4", channels, (7, 1)),
                Conv("branch7x7dbl_5", 192, (1, 7)),
            ),
            (Pool("AVG"), Conv("branch_pool", 192)),
        ),
    )


def _block_7(name: str, pool: str) -> Block:
    """8 x 8 pixels, two branches that fork."""

    def fork(prefix: str) -> Block:
        across, down = Conv(f"{prefix}a", 384, (1, 3)), Conv(f"{prefix}b", 384, (3, 1))
        return Block("", ((across,), (down,)))

    return Block(
        name,
        (
            (Conv("branch1x1", 320),),
            (Conv("branch3x3_1", 384), fork("branch3x3_2")),
            (
                Conv("branch3x3dbl_1", 448),
                Conv("branch3x3dbl_2", 384, (3, 3)),
                fork("branch3x3dbl_3"),
            ),
            (Pool(pool), Conv("branch_pool", 192)),
        ),
    )


LAYERS: tuple[Layer, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2, padding="VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    SHRINK,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    SHRINK,
    _block_5("Mixed_5b", pool_channels=32),
    _block_5("Mixed_5c", pool_channels=64),
    _block_5("Mixed_5d", pool_channels=64),
    Block(
        "Mixed_6a",
        (
            (Conv("branch3x3", 384, (3, 3), stride=2, padding="VALID"),),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3), stride=2, padding="VALID"),
            ),
            (SHRINK,),
        ),
    ),
    _block_6("Mixed_6b", 128),
    _block_6("Mixed_6c", 160),
    _block_6("Mixed_6d", 160),
    _block_6("Mixed_6e", 192),
    Block(
        "Mixed_7a",
        (
            (
                Conv("branch3x3_1", 192),
                Conv("branch3x3_2", 320, (3, 3), stride=2, padding="VALID"),
            ),
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, (3, 3), stride=2, padding="VALID"),
            ),
            (SHRINK,),
        ),
    ),
    _block_7("Mixed_7b", pool="AVG"),
    _block_7("Mixed_7c", pool="MAX"),
)
"""All layers up to the mean over the last 8 x 8 pixels; a linear layer gives the logits."""


def _kernels(
    layers: tuple[Layer, ...], channels: int, prefix: str
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Names and shapes [out, in, height, width] of a chain's kernels, and its output channels."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        if isinstance(layer, Conv):
            found[prefix + layer.name] = (layer.channels, channels, *layer.kernel)
            channels = layer.channels
        elif isinstance(layer, Block):
            inside = f"{prefix}{layer.name}." if layer.name else prefix
            branches = [_kernels(branch, channels, inside) for branch in layer.branches]
            for kernels, _ in branches:
                found |= kernels
            channels = sum(out for _, out in branches)
    return found, channels


KERNELS = _kernels(LAYERS, 3, "")[0]
"""Shapes [out, in, height, width] of the 94 convolutions by their names."""

SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"{name}.{part}": shape if part == "conv.weight" else shape[:1]
        for name, shape in KERNELS.items()
        for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    },
    "fc.weight": (CLASSES, FEATURES),
    "fc.bias": (CLASSES,),
}
"""Shapes of the 472 parameters by the names of pytorch-fid's state dict."""


# ---- weights and forward pass --------------------------------------------------------------------


def fold(params: Mapping[str, np.ndarray]) -> Params:
    """Folds every batch norm into its convolution, in float64.

    Args:
      params: the parameters of `SHAPES`.

    Returns:
      For each convolution `<name>.kernel` [height, width, in, out] and `<name>.bias` [out], and
      `fc.kernel` [2048, 1008] and `fc.bias` [1008], float32.
    """
    folded = {
        "fc.kernel": np.ascontiguousarray(params["fc.weight"].T),
        "fc.bias": params["fc.bias"],
    }
    for name in KERNELS:
        kernel, gain, bias, mean, variance = (
            params[f"{name}.{part}"].astype(np.float64)
            for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        scale = gain / np.sqrt(variance + BN_EPSILON)
        folded[f"{name}.kernel"] = np.ascontiguousarray(np.transpose(kernel, [2, 3, 1, 0]) * scale)
        folded[f"{name}.bias"] = bias - mean * scale
    return {name: array.astype(np.float32) for name, array in folded.items()}


def _apply(folded: Mapping[str, tf.Tensor], layer: Layer, x: tf.Tensor, prefix: str) -> tf.Tensor:
    """One layer: [N, H, W, C] -> [N, H', W', C']."""
    if isinstance(layer, Conv):
        kernel, bias = (folded[f"{prefix}{layer.name}.{part}"] for part in ("kernel", "bias"))
        return tf.nn.relu(tf.nn.conv2d(x, kernel, layer.stride, layer.padding) + bias)
    if isinstance(layer, Pool):
        return tf.nn.pool(x, (3, 3), layer.kind, [layer.stride] * 2, layer.padding)
    inside = f"{prefix}{layer.name}." if layer.name else prefix
    outputs = []
    for branch in layer.branches:
        y = x
        for step in branch:
            y = _apply(folded, step, y, inside)
        outputs.append(y)
    return tf.concat(outputs, axis=3)


def activations(
    folded: Mapping[str, tf.Tensor], images: tf.Tensor
) -> Iterator[tuple[str, tf.Tensor]]:
    """The output of each convolution and block of the outermost level, in order.

    Args:
      folded: parameters as `fold` returns them, or the same as tensors.
      images: [N, 299, 299, 3], about -1..1, as the preprocessing functions return them.

    Yields:
      Name and output [N, H, W, C] of each layer; the last one is Mixed_7c [N, 8, 8, 2048].
    """
    x = images
    for layer in LAYERS:
        x = _apply(folded, layer, x, "")
        if not isinstance(layer, Pool):
            yield layer.name, x


def features(folded: Mapping[str, tf.Tensor], images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Features and logits of images.

    The inception score (Salimans et al. 2016) uses the logits without `fc.bias`, as its authors'
    code does.

    Args:
      folded: parameters as `fold` returns them, or the same as tensors.
      images: [N, 299, 299, 3], about -1..1, as the preprocessing functions return them.

    Returns:
      The features [N, 2048], at least 0, and the logits [N, 1008].
    """
    *_, (_, last) = activations(folded, images)
    pooled = tf.reduce_mean(last, axis=[1, 2])
    return pooled, tf.linalg.matmul(pooled, folded["fc.kernel"]) + folded["fc.bias"]


# ---- preprocessing -------------------------------------------------------------------------------


def resize_legacy(images: tf.Tensor) -> tf.Tensor:
    """Resizes as TensorFlow 1 did: bilinear, pixel i of the result at i * size / 299.

    The graph published in 2015 begins with this resize, so the original FID figures have it.
    Nothing is smoothed before an image is made smaller.

    Args:
      images: [N, H, W, 3], any range.

    Returns:
      [N, 299, 299, 3], float32.
    """
    return _resize(images, half_pixel_centers=False)


def resize_half_pixel(images: tf.Tensor) -> tf.Tensor:
    """Resizes bilinearly with half-pixel centres, as pytorch-fid does.

    Pixel i of the result is at (i + 0.5) * size / 299 - 0.5. Nothing is smoothed before an image is
    made smaller.

    Args:
      images: [N, H, W, 3], any range.

    Returns:
      [N, 299, 299, 3], float32.
    """
    return _resize(images, half_pixel_centers=True)


def _resize(images: tf.Tensor, *, half_pixel_centers: bool) -> tf.Tensor:
    return tf.raw_ops.ResizeBilinear(
        images=tf.cast(images, tf.float32),
        size=[RESOLUTION, RESOLUTION],
        half_pixel_centers=half_pixel_centers,
    )


def preprocess_legacy(images: tf.Tensor) -> tf.Tensor:
    """The canonical preprocessing: `resize_legacy`, then (v - 128) / 128.

    Args:
      images: [N, H, W, 3], 0..255.

    Returns:
      [N, 299, 299, 3], -1..0.993, float32.
    """
    return (resize_legacy(images) - 128.0) / 128.0


def preprocess_half_pixel(images: tf.Tensor) -> tf.Tensor:
    """The preprocessing of pytorch-fid: `resize_half_pixel`, then 2 v / 255 - 1.

    Args:
      images: [N, H, W, 3], 0..255.

    Returns:
      [N, 299, 299, 3], -1..1, float32.
    """
    return resize_half_pixel(images) * (2.0 / 255.0) - 1.0
