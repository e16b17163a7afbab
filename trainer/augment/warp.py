"""The geometric half of ADA: resample images under an affine map without aliasing.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B.2:
reflect the image beyond its edges, upsample twice with an orthogonal low-pass filter (sym6), sample
bilinearly under the map, filter and decimate. All of it is linear in the images, so derivatives of
any order exist.

How the reflection is laid out. NVIDIA pads by the largest margin that any image of the batch
needs; what lies beyond reads as zero. Here the margin belongs to a group of images, so that the
result does not depend on which groups share a call. All groups are drawn on one canvas that is
large enough for each, and zeroed beyond their own margins. Reflection, zeroing and upsampling
along an axis are together one small matrix, so a canvas is two matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.augment.windows import BLOCK, TILE, Cells, sample

# The sym6 scaling filter (Daubechies 1992, "least asymmetric", six vanishing moments).
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
LOWPASS = np.asarray(_SYM6) / np.sum(_SYM6)
_TAPS = len(LOWPASS)
_REACH = _TAPS // 4  # pixels of the image that a filter reaches to either side


def margins(
    linear: tf.Tensor, offset: tf.Tensor, size: tuple[int, int], group_size: int
) -> tf.Tensor:
    """Pixels of reflection that each group needs beyond each edge.

    Args:
      linear: [N, 2, 2] linear part of the map from output to input pixels, (x, y) order.
      offset: [N, 2] its translation in input pixels, about the image's centre.
      size: (height, width).
      group_size: images in a group.

    Returns:
      [groups, 2 (x, y), 2 (before, after)] int32, at most width - 1 and height - 1.
    """
    extent = np.asarray([size[1], size[0]])
    centre = tf.constant((extent - 1) / 2, linear.dtype)
    reach = tf.reduce_sum(tf.abs(linear) * centre, axis=-1)
    need = tf.stack([reach - offset, reach + offset], axis=-1)
    need = tf.reduce_max(tf.reshape(need, [-1, group_size, 2, 2]), axis=1)
    need += (2 * _REACH - centre)[:, tf.newaxis]
    limit = tf.constant(extent[:, np.newaxis] - 1, linear.dtype)
    return tf.cast(tf.math.ceil(tf.clip_by_value(need, 0, limit)), tf.int32)


def warp(
    images: tf.Tensor,
    linear: tf.Tensor,
    offset: tf.Tensor,
    *,
    group_size: int,
    static_shapes: bool,
    windows: bool = False,
) -> tf.Tensor:
    """Resamples images under one affine map each.

    Args:
      images: [N, H, W, C] float32 or float64.
      linear, offset: the map from output to input pixels, see `margins`.
      group_size: consecutive images that share their margins; divides N.
      static_shapes: make the canvas as large as any margin can need, so that every shape is known
        while tracing (XLA, TPU). Otherwise it is as large as this call's margins need. The
        results are equal.
      windows: sample as in `windows`, for TPUs: they are slow to look up pixels, and pad
        what comes last in a shape to 128, so that three colours there would take 40 times the
        memory. The results are equal.

    Returns:
      [N, H, W, C], as `images`.
    """
    _, height, width, _ = images.shape
    margin = margins(linear, offset, (height, width), group_size)
    if static_shapes:
        bound_x, bound_y = width - 1, height - 1
    else:
        bound_x, bound_y = tf.unstack(tf.reduce_max(margin, axis=[0, 2]))
    up_x = _upsampler(width, bound_x, margin[:, 0], images.dtype)
    up_y = _upsampler(height, bound_y, margin[:, 1], images.dtype)
    up_y, up_x = (tf.repeat(matrix, group_size, axis=0) for matrix in (up_y, up_x))
    origin = (2 * bound_y + 1, 2 * bound_x + 1)
    if windows:
        return _warp_by_windows(images, linear, offset, up_y, up_x, origin)
    u, v = (tf.range(_num_samples(size)) for size in (width, height))
    x, y = _sample_positions(linear, offset, (height, width), u, v[:, tf.newaxis])
    samples = _bilinear(separable(images, up_y, up_x), x, y, origin)
    # Low-pass, keep every other pixel, and crop what the filter reached beyond the image.
    down_y = _dilated_toeplitz(LOWPASS, -1, height, samples.shape[1], images.dtype)
    down_x = _dilated_toeplitz(LOWPASS, -1, width, samples.shape[2], images.dtype)
    return separable(samples, down_y[tf.newaxis], down_x[tf.newaxis])


def _warp_by_windows(
    images: tf.Tensor,
    linear: tf.Tensor,
    offset: tf.Tensor,
    up_y: tf.Tensor,
    up_x: tf.Tensor,
    origin: tuple[int | tf.Tensor, int | tf.Tensor],
) -> tf.Tensor:
    """The rest of `warp`, with the canvas in blocks and the samples in tiles."""
    num, height, width, channels = images.shape
    size = tf.shape(up_y)[1], tf.shape(up_x)[1]
    up_y, up_x = _in_blocks(up_y), _in_blocks(up_x)
    blocks = tf.shape(up_x)[1], tf.shape(up_y)[1]
    table = tf.einsum("nhwc,nxqw->nxhcq", images, up_x)
    table = tf.reshape(table, [num, blocks[0], height, channels * BLOCK])
    up_y = tf.reshape(up_y, [num, blocks[1] * BLOCK, height])
    table = tf.einsum("nkh,nxhr->nxkr", up_y, table)
    table = tf.reshape(table, [num * blocks[0] * blocks[1], BLOCK, channels * BLOCK])

    high, wide = (-(-_num_samples(extent) // TILE) for extent in (height, width))
    u = tf.reshape(tf.range(wide * TILE), [wide, 1, TILE])
    v = tf.reshape(tf.range(high * TILE), [high, 1, TILE, 1])
    row, column, down, right = (
        tf.reshape(part, [num * high * wide, TILE**2])
        for part in _cells(*_sample_positions(linear, offset, (height, width), u, v), origin, size)
    )
    image = tf.repeat(tf.range(num), high * wide)
    samples = sample(table, Cells(row, column, down, right, image), blocks)
    samples = tf.reshape(samples, [num, high, wide, channels, TILE, TILE])
    # Beyond the samples that are needed the filters are zero.
    down_y = _dilated_toeplitz(LOWPASS, -1, height, high * TILE, images.dtype)
    down_x = _dilated_toeplitz(LOWPASS, -1, width, wide * TILE, images.dtype)
    down_y = tf.reshape(down_y, [height, high, TILE])
    down_x = tf.reshape(down_x, [width, wide, TILE])
    samples = tf.einsum("ntucij,wuj->ntciw", samples, down_x)
    return tf.einsum("hti,ntciw->nhwc", down_y, samples)


def _in_blocks(matrix: tf.Tensor) -> tf.Tensor:
    """[N, K, size] -> [N, blocks, BLOCK, size], filled with zeros."""
    num, rows, size = matrix.shape[0], tf.shape(matrix)[1], matrix.shape[2]
    matrix = tf.pad(matrix, [[0, 0], [0, -rows % BLOCK], [0, 0]])
    return tf.reshape(matrix, [num, -(-rows // BLOCK), BLOCK, size])


def separable(images: tf.Tensor, vertical: tf.Tensor, horizontal: tf.Tensor) -> tf.Tensor:
    """Applies a matrix along the height and one along the width.

    Args:
      images: [N, H, W, C].
      vertical: [N or 1, H', H].
      horizontal: [N or 1, W', W].

    Returns:
      [N, H', W', C].
    """
    num, height, width, channels = images.shape
    out_width = tf.shape(horizontal)[1]
    out = tf.reshape(tf.transpose(images, [0, 1, 3, 2]), [num, height * channels, width])
    out = tf.matmul(out, horizontal, transpose_b=True)
    out = tf.transpose(tf.reshape(out, [num, height, channels, out_width]), [0, 1, 3, 2])
    out = tf.matmul(vertical, tf.reshape(out, [num, height, out_width * channels]))
    return tf.reshape(out, [num, tf.shape(vertical)[1], out_width, channels])


def _upsampler(size: int, bound: int | tf.Tensor, margin: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Reflection, zeroing beyond the margin and 2x upsampling along one axis, as a matrix.

    Args:
      size: pixels along the axis.
      bound: pixels of reflection on the canvas, at least every group's margin.
      margin: [groups, 2 (before, after)] int32.
      dtype: of the result.

    Returns:
      [groups, K, size]: matrix @ image is the canvas, K = 2 (size + 2 bound) + 3. Position 0 and
      the last two are zero, so that a sampler may clip to them.
    """
    columns = 2 * (size + 2 * bound) + 3
    # Row r of `spread` is where pixel r - bound of the reflected image goes.
    spread = _dilated_toeplitz(2 * LOWPASS, 4, size + 2 * bound, columns, dtype)
    inside = spread[bound : bound + size]
    # Pixel w of the image is also pixel -w (before it) and pixel 2 (size - 1) - w (after it).
    before = tf.pad(spread[:bound][::-1], [[1, size - 1 - bound], [0, 0]])
    after = tf.pad(spread[bound + size :][::-1], [[size - 1 - bound, 1], [0, 0]])

    pixel = tf.range(size)
    has_before = pixel <= margin[:, :1]
    has_after = size - 1 - pixel <= margin[:, 1:]
    matrix = (
        inside
        + tf.cast(has_before, dtype)[:, :, tf.newaxis] * before
        + tf.cast(has_after, dtype)[:, :, tf.newaxis] * after
    )
    first = 2 * (bound - margin[:, :1]) + 1
    last = 2 * (bound + size + margin[:, 1:])
    position = tf.range(columns)
    written = (position >= first) & (position <= last)
    return tf.linalg.matrix_transpose(matrix * tf.cast(written, dtype)[:, tf.newaxis])


def _dilated_toeplitz(
    taps: np.ndarray,
    lead: int,
    rows: int | tf.Tensor,
    columns: int | tf.Tensor,
    dtype: tf.DType,
) -> tf.Tensor:
    """The matrix with taps[lead + c - 2 r] at [r, c], and zero where there is no such tap.

    Rows of a fixed length read off a sequence with a period two longer are shifted by two each.
    Padding the rows by the number of taps keeps the next period out of sight.
    """
    padded = columns + len(taps)
    period = tf.pad(tf.constant(taps, dtype), [[0, padded + 2 - len(taps)]])
    period = tf.roll(period, -lead, axis=0)
    matrix = tf.tile(period, [rows])[: rows * padded]
    return tf.reshape(matrix, [rows, padded])[:, :columns]


def _num_samples(size: int) -> int:
    """The samples along an axis of the output, twice upsampled and still uncropped."""
    return 2 * (size + 2 * _REACH)


def _sample_positions(
    linear: tf.Tensor, offset: tf.Tensor, size: tuple[int, int], u: tf.Tensor, v: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The places that samples come from.

    Args:
      linear, offset: as for `warp`.
      size: (height, width).
      u, v: int32 numbers of samples along x and y, which broadcast with each other.

    Returns:
      x and y, each [N, *shape of u and v], in pixels of the upsampled image from its first.
    """
    height, width = size
    u = tf.cast(u - (width + 2 * _REACH - 1), linear.dtype)[tf.newaxis]
    v = tf.cast(v - (height + 2 * _REACH - 1), linear.dtype)[tf.newaxis]
    shift = 2 * offset + tf.constant([width - 1, height - 1], linear.dtype)
    linear = tf.reshape(linear, [-1, 2, 2] + [1] * (v.shape.rank - 1))
    shift = tf.reshape(shift, [-1, 2] + [1] * (v.shape.rank - 1))
    x = linear[:, 0, 0] * u + (linear[:, 0, 1] * v + shift[:, 0])
    y = linear[:, 1, 0] * u + (linear[:, 1, 1] * v + shift[:, 1])
    return x, y


def _bilinear(
    canvas: tf.Tensor, x: tf.Tensor, y: tf.Tensor, origin: tuple[int | tf.Tensor, int | tf.Tensor]
) -> tf.Tensor:
    """Bilinear samples of a canvas whose first and last two rows and columns are zero.

    Args:
      canvas: [N, Ky, Kx, C].
      x, y: [N, h, w] positions from the origin; beyond the canvas is zero.
      origin: (y, x) on the canvas. Added to whole pixels only, so that rounding doesn't depend on
        the size of the canvas.

    Returns:
      [N, h, w, C].
    """
    size = tf.shape(canvas)[1], tf.shape(canvas)[2]
    corners = _corners(x, y, origin, size)
    return _interpolate(tf.reshape(canvas, [-1, canvas.shape[-1]]), corners)


def _cells(
    x: tf.Tensor,
    y: tf.Tensor,
    origin: tuple[int | tf.Tensor, int | tf.Tensor],
    size: tuple[tf.Tensor, tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Between which pixels positions are.

    Args:
      x, y, origin: as for `_bilinear`.
      size: (Ky, Kx).

    Returns:
      Row and column of the pixel above and to the left, int32, and how far down and right of it.
    """
    (ky, kx), (oy, ox) = size, origin
    x = tf.clip_by_value(x, tf.cast(-ox, x.dtype), tf.cast(kx - 2 - ox, x.dtype))
    y = tf.clip_by_value(y, tf.cast(-oy, y.dtype), tf.cast(ky - 2 - oy, y.dtype))
    left, top = tf.floor(x), tf.floor(y)
    return tf.cast(top, tf.int32) + oy, tf.cast(left, tf.int32) + ox, y - top, x - left


_Corners = tuple[tuple[tf.Tensor, tf.Tensor], ...]


def _corners(
    x: tf.Tensor,
    y: tf.Tensor,
    origin: tuple[int | tf.Tensor, int | tf.Tensor],
    size: tuple[tf.Tensor, tf.Tensor],
) -> _Corners:
    """The four pixels about each position, counted over all images, and their weights."""
    row, column, down, right = _cells(x, y, origin, size)
    ky, kx = size
    first = tf.range(x.shape[0]) * (ky * kx)
    index = tf.reshape(first, [-1, 1, 1]) + row * kx + column
    up, left = 1 - down, 1 - right
    return (
        (index, left * up),
        (index + 1, right * up),
        (index + kx, left * down),
        (index + kx + 1, right * down),
    )


# Two linear maps, each the transpose of the other, so that each is the other's derivative. What
# automatic differentiation would make of `tf.gather` takes twice the time, and warns.


def _interpolate(pixels: tf.Tensor, corners: _Corners) -> tf.Tensor:
    """Weighted sums of four pixels.

    Args:
      pixels: [M, C].
      corners: four ([...] int32 index, [...] weight).

    Returns:
      [..., C].
    """

    @tf.custom_gradient
    def run(pixels: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        num_pixels = tf.shape(pixels)[0]
        terms = [tf.gather(pixels, index) * weight[..., tf.newaxis] for index, weight in corners]
        return tf.add_n(terms), lambda dy: _spread(dy, corners, num_pixels)

    return run(pixels)


def _spread(samples: tf.Tensor, corners: _Corners, num_pixels: tf.Tensor) -> tf.Tensor:
    """Adds each sample to its four pixels by weight: [..., C] -> [num_pixels, C]."""

    def total(plane: tf.Tensor) -> tf.Tensor:
        return tf.add_n(
            [
                tf.math.unsorted_segment_sum(plane * weight, index, num_pixels)
                for index, weight in corners
            ]
        )

    @tf.custom_gradient
    def run(samples: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        # One channel at a time: on a CPU single numbers are summed faster than short rows.
        sums = tf.stack([total(plane) for plane in tf.unstack(samples, axis=-1)], axis=-1)
        return sums, lambda dy: _interpolate(dy, corners)

    return run(samples)
