"""Layouts of narrow maps, and of few maps, on TPUs.

A TPU works on 128 channels at a time, and pads maps that have fewer, in memory too. Such maps are
kept with the pixels of each square block side by side in the channels, and convolved by a kernel
over blocks, which holds each weight in every place where it acts and zeros elsewhere. Several
times the multiplications, but all lanes are in use. Resampling is the same with larger blocks on
one side, so that a strided or transposed convolution and its filter become one dense kernel. Images
and noise, whose lines a TPU keeps in its lanes, are brought into blocks by products with matrices
of zeros and ones: modelled on v5e, copies and convolutions took twice as long and more.

A TPU convolves eight images or more in the layout in which it keeps them. For fewer its compiler
cuts each image into tiles around every single convolution, and copies its map twice for that. Here
a block of a network is given tiles: cut once, with rows of their neighbours to spare, of which
each convolution loses one at an edge that isn't the image's, and concatenated without them. Modelled on
v5e, that took a third to a half of the time at 512x512 and 1024x1024 with four images.
"""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

# Maps are packed until they have so many channels, in blocks of at most so many pixels a side.
# Sides of 4 for 32 channels at 1024x1024 keep the next lower grid and save copies, but modelled on
# v5e the block took 92 ms instead of 74, and 8.8 GiB instead of 6.0.
PACK_CHANNELS = 128
_PACK_MAX_BLOCK = 2
# Maps of so many channels at most are taken for images.
_IMAGE_CHANNELS = 4

_TILES_FOR_IMAGES = 8
_TILE_MIN_ROWS = 32
# Rows of the coarser maps of a network's block, which has two convolutions in turn and one of them
# resamples: twice as many rows of maps that are twice as fine.
TILE_HALO = 2

# ------------------------------------------------------------------------------ packing


def block_size(height: int, width: int, channels: int) -> int:
    """Pixels along each side of the blocks in which a TPU keeps maps [N, height, width, channels].

    The base grid of a network, whose short side is 4 to 7 pixels, and what doubles it stay whole.
    """
    block = 1
    while (
        block < _PACK_MAX_BLOCK
        and 2 * block * channels <= PACK_CHANNELS
        and 8 * block <= min(height, width)
    ):
        block *= 2
    return block


def pack(x: tf.Tensor, block: int) -> tf.Tensor:
    """[N, H, W, C] -> [N, H/s, W/s, s*s*C]: row in the block, column in the block, channel."""
    if block == 1:
        return x
    _, height, width, channels = x.shape
    if channels <= _IMAGE_CHANNELS:
        places = _places(block, channels, x.dtype)
        return tf.einsum("nhpw,pc->nhwc", _split_columns(x, block), places)
    blocks = tf.reshape(x, [-1, height // block, block, width // block, block, channels])
    blocks = tf.transpose(blocks, [0, 1, 3, 2, 4, 5])
    return tf.reshape(blocks, [-1, height // block, width // block, block**2 * channels])


def unpack(x: tf.Tensor, block: int) -> tf.Tensor:
    """The inverse of `pack`."""
    if block == 1:
        return x
    _, height, width, channels = x.shape
    if channels <= block**2 * _IMAGE_CHANNELS:
        places = _places(block, channels // block**2, x.dtype)
        lines = tf.einsum("nhwc,pc->nhpw", x, places)
        lines = tf.reshape(lines, [-1, block * height, channels // block**2, block * width])
        return tf.einsum("nhcv,wv->nhwc", lines, _column_order(block * width, block, x.dtype))
    blocks = tf.reshape(x, [-1, height, width, block, block, channels // block**2])
    blocks = tf.transpose(blocks, [0, 1, 3, 2, 4, 5])
    return tf.reshape(blocks, [-1, block * height, block * width, channels // block**2])


def _column_order(width: int, block: int, dtype: tf.DType) -> tf.Tensor:
    """[W, W]: a product by it has first the first columns of all blocks, then all second ones."""
    columns = np.arange(width).reshape([-1, block]).T.reshape([-1])
    return tf.one_hot(columns, width, axis=0, dtype=dtype)


def _split_columns(x: tf.Tensor, block: int) -> tf.Tensor:
    """[N, H, W, C] -> [N, H/s, s*C*s, W/s]: row in the block, channel, column in the block."""
    _, height, width, channels = x.shape
    lines = tf.einsum("nhwc,wv->nhcv", x, _column_order(width, block, x.dtype))
    return tf.reshape(lines, [-1, height // block, block * channels * block, width // block])


def _places(block: int, channels: int, dtype: tf.DType) -> tf.Tensor:
    """[s*C*s, s*s*C]: from row, channel, column in a block to row, column, channel."""
    size = block**2 * channels
    places = np.eye(size).reshape([block, block, channels, size]).swapaxes(1, 2)
    return tf.constant(places.reshape([size, size]), dtype)


def repack(x: tf.Tensor, block: int, new_block: int) -> tf.Tensor:
    """A packed map in blocks of another size.

    A resampling convolution with a stride could change the size itself. Modelled on v5e, that gave
    as much as it took; but its derivative takes a v4 33 ms at 1024x1024, where copies take 3 to 6.
    """
    return x if block == new_block else pack(unpack(x, block), new_block)


def pack_noise(
    noise: tf.Tensor, strength: tf.Tensor, channels: int, block: int, dtype: tf.DType
) -> tf.Tensor:
    """Noise of one strength, one value for all channels of a pixel.

    Args:
      noise: [N, H, W, 1].
      strength: [], of the dtype of `noise`.
      channels: of the maps.
      block: pixels along each side of the blocks.
      dtype: of the maps.

    Returns:
      [N, H, W, 1], or packed maps of `channels`.
    """
    if block == 1:
        return tf.cast(noise * strength, dtype)
    spread = tf.constant(np.kron(np.eye(block**2), np.ones([1, channels])), dtype)
    spread *= tf.cast(strength, dtype)
    return tf.einsum("nhpw,pc->nhwc", _split_columns(tf.cast(noise, dtype), block), spread)


# ------------------------------------------------------------------------------ tiles


def num_tiles(images: int | None, rows: int) -> int:
    """Into how many tiles a TPU's maps are cut: of so many images, with so many rows of blocks."""
    if not images or _TILES_FOR_IMAGES % images:
        return 1
    count = _TILES_FOR_IMAGES // images
    return count if rows % count == 0 and rows // count >= _TILE_MIN_ROWS else 1


def _tile_starts(count: int, rows: int, halo: int) -> list[int]:
    each = rows // count
    return [min(max(i * each - halo, 0), rows - each - 2 * halo) for i in range(count)]


def cut(x: tf.Tensor, count: int, halo: int) -> tf.Tensor:
    """[N, H, ...] -> [count * N, H / count + 2 * halo, ...]: the first tiles of all images first."""
    if count == 1:
        return x
    rows = x.shape[1]
    size = rows // count + 2 * halo
    return tf.concat([x[:, i : i + size] for i in _tile_starts(count, rows, halo)], 0)


def concatenate(x: tf.Tensor, count: int, halo: int) -> tf.Tensor:
    """The inverse of `cut`, from that tile of which each row is right."""
    if count == 1:
        return x
    each = x.shape[1] - 2 * halo
    starts = _tile_starts(count, each * count, halo)
    kept = [
        tile[:, i * each - start : (i + 1) * each - start]
        for i, (tile, start) in enumerate(zip(tf.split(x, count), starts, strict=True))
    ]
    return tf.concat(kept, 1)


# ------------------------------------------------------------------------------ convolution


@functools.cache
def _block_matrix(
    size: int, taps: tuple[float, ...], pixels_in: int, pixels_out: int
) -> np.ndarray:
    """The places where a kernel's weights act, on one axis: [size, blocks, pixels_in, pixels_out].

    Entry [t, b, c, a] is what pixel c of the b-th block of the window contributes to pixel a of the
    output's block through weight t. Read off impulses sent through the definition.

    Args:
      size: of the kernel.
      taps: the resampling filter.
      pixels_in, pixels_out: pixels in a block of the input and of the output: as many, or twice as
        many in one of them.
    """
    up, down = max(pixels_out // pixels_in, 1), max(pixels_in // pixels_out, 1)
    assert pixels_in * up == pixels_out * down and up * down <= 2
    reach, pad = 3, size // 2
    matrix = np.zeros([size, 2 * reach + 1, pixels_in, pixels_out])
    for t, b, c in np.ndindex(matrix.shape[:3]):
        x = np.zeros((4 * reach + 1) * pixels_in)
        x[(reach + b) * pixels_in + c] = 1
        kernel = np.eye(size)[t]
        if up == 2:
            x = np.stack([x, np.zeros_like(x)], 1).reshape(-1)
            x = np.pad(x, [(len(taps) + 1) // 2 + pad, (len(taps) - 2) // 2 + pad])
            x = np.convolve(x, 2 * np.asarray(taps), "valid")
            kernel = kernel[::-1]
        elif down == 2:
            x = np.pad(x, [(len(taps) - 1) // 2 + pad, (len(taps) - 2) // 2 + pad])
            x = np.convolve(x, taps, "valid")
        else:
            x = np.pad(x, pad)
        y = np.correlate(x, kernel, "valid")[::down]
        matrix[t, b, c] = y[2 * reach * pixels_out :][:pixels_out]
    used = np.flatnonzero(np.any(matrix != 0, (0, 2, 3)))
    far = np.max(np.abs(used - reach))
    return matrix[:, reach - far : reach + far + 1]


def block_conv2d(
    x: tf.Tensor, weight: tf.Tensor, taps: np.ndarray, blocks: tuple[int, int]
) -> tf.Tensor:
    """`ops.conv2d_resample` as one dense convolution, between maps of which any may be packed.

    Args:
      x: [N, H, W, in], or packed.
      weight: [k, k, in, out].
      taps: the resampling filter.
      blocks: pixels along each side of a block of the input and of the output, 1 if not packed. Both
        maps have the same number of blocks, so these say how it is resampled.

    Returns:
      What `ops.conv2d_resample` does, packed or not.
    """
    pixels_in, pixels_out = blocks
    size, _, inputs, outputs = weight.shape
    matrix = _block_matrix(size, tuple(taps.tolist()), pixels_in, pixels_out)
    places, blocks = tf.constant(matrix, weight.dtype), matrix.shape[1]
    kernel = tf.einsum("tyca,sxdb,tsio->yxcdiabo", places, places, weight)
    shape = [blocks, blocks, pixels_in**2 * inputs, pixels_out**2 * outputs]
    kernel = tf.cast(tf.reshape(kernel, shape), x.dtype)
    return tf.nn.conv2d(x, kernel, strides=1, padding="SAME")


def resample(
    x: tf.Tensor, weight: tf.Tensor, taps: np.ndarray, blocks: tuple[int, int]
) -> tf.Tensor:
    """`block_conv2d`, but a 1x1 kernel apart from the filter where that has all lanes to itself: it
    has no weights to learn, and the kernel then acts on the smaller map."""
    size, _, inputs, outputs = weight.shape
    before, after = blocks
    if size == 1 and before < after and outputs >= PACK_CHANNELS:
        x = block_conv2d(x, weight, taps, (before, before))
        return block_conv2d(x, _identity(outputs, x.dtype), taps, blocks)
    if size == 1 and before > after and inputs >= PACK_CHANNELS:
        x = block_conv2d(x, _identity(inputs, x.dtype), taps, blocks)
        return block_conv2d(x, weight, taps, (after, after))
    return block_conv2d(x, weight, taps, blocks)


def _identity(channels: int, dtype: tf.DType) -> tf.Tensor:
    """The 1x1 kernel that changes nothing."""
    return tf.eye(channels, dtype=dtype)[tf.newaxis, tf.newaxis]
