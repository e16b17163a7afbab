"""The layers StyleGAN networks are made of, as pure functions on [N, H, W, C] tensors.

The formulas are those of NVIDIA's reference networks (Karras et al. 2020, "Analyzing and improving
the image quality of StyleGAN", and Karras et al. 2020, "Training generative adversarial networks
with limited data"); how they are computed was chosen by measurement:

* a modulated convolution scales its input by the style, convolves with shared weights and scales
  its output by the demodulation factor, instead of making one weight tensor for each sample;
* a strided or transposed convolution is the sum, or the interleaving, of four dense convolutions
  over even and odd rows and columns, since compilers run dilated ones several times slower;
* what remains depends on the compiler, and `Backend` chooses: on a CPU under XLA a FIR filter is a
  sum of shifted slices, a 3x3 convolution Winograd's, and a sum over pixels a matrix product.

Weights are [kh, kw, in, out] and [in, out]. Filters are NumPy constants.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.layers import packing, winograd


class Backend(enum.Enum):
    """Implementations of the layers: the values are the same, the speed is not.

    Attributes:
      XLA_CPU: for XLA on CPUs. It fuses shifted slices into one loop, and runs depthwise
        convolutions 8 times, reductions to the last axis 10 times slower than it could.
      TPU: for TPUs, where multiplications are cheap and memory is not: a resampling convolution
        and its filter are one convolution, and narrow maps can be packed (see `packing`).
      GENERIC: one TensorFlow op for each operation.
    """

    XLA_CPU = "xla_cpu"
    TPU = "tpu"
    GENERIC = "generic"


# On TPUs maps of up to so many channels are resampled by one dense convolution, and images of up to
# so many are filtered by shifting.
_BLOCKS_MAX_CHANNELS = 128
_SHIFT_MAX_CHANNELS = 4


def setup_filter(taps: Sequence[float]) -> np.ndarray:
    """A one-dimensional filter scaled to sum 1; applied along both axes it is NVIDIA's 2-D one."""
    filter_taps = np.asarray(taps, np.float64)
    return filter_taps / filter_taps.sum()


RESAMPLE_FILTER = setup_filter([1, 3, 3, 1])

# --------------------------------------------------------------------------------------
# FIR filtering


def _slice(x: tf.Tensor, axis: int, start: int, count: int, step: int = 1) -> tf.Tensor:
    if (start, count, step) == (0, x.shape[axis], 1):
        return x
    index: list[slice] = [slice(None)] * 4
    index[axis] = slice(start, start + (count - 1) * step + 1, step)
    return x[tuple(index)]


def _pad(x: tf.Tensor, axis: int, before: int, after: int) -> tf.Tensor:
    """Zero padding along one axis; negative amounts crop."""
    size = x.shape[axis]
    x = _slice(x, axis, max(-before, 0), size + min(before, 0) + min(after, 0))
    if before > 0 or after > 0:
        paddings = [[0, 0] for _ in range(4)]
        paddings[axis] = [max(before, 0), max(after, 0)]
        x = tf.pad(x, paddings)
    return x


def _weighted_sum(terms: list[tuple[float, tf.Tensor]]) -> tf.Tensor:
    total = None
    for weight, term in terms:
        scaled = term * tf.constant(weight, term.dtype)
        total = scaled if total is None else total + scaled
    assert total is not None
    return total


def _correlate(x: tf.Tensor, taps: np.ndarray, axis: int, count: int, step: int) -> tf.Tensor:
    """y[o] = sum_t taps[t] x[o * step + t] along `axis`, for `count` outputs."""
    return _weighted_sum(
        [(float(tap), _slice(x, axis, t, count, step)) for t, tap in enumerate(taps)]
    )


def _fir_shift(
    x: tf.Tensor, taps: np.ndarray, axis: int, up: int, down: int, pad: tuple[int, int]
) -> tf.Tensor:
    """`_fir_axis` as sums of shifted slices; zero-stuffed samples are never touched."""
    size = x.shape[axis]
    out = (size * up + pad[0] + pad[1] - len(taps)) // down + 1
    if up == 1:
        return _correlate(_pad(x, axis, *pad), taps, axis, out, down)
    # Output o = up * i + phase meets the stuffed input only at taps t = pad0 - phase (mod up).
    full = (out - 1) * down + 1
    rows = -(-full // up)
    left = pad[0] // up + 1
    right = max(rows + (up + len(taps) - pad[0]) // up - size, 0) + 1
    padded = _pad(x, axis, left, right)
    phases = []
    for phase in range(up):
        offsets = range((pad[0] - phase) % up, len(taps), up)
        terms = [
            (float(taps[t]), _slice(padded, axis, left + (phase + t - pad[0]) // up, rows))
            for t in offsets
        ]
        phases.append(_weighted_sum(terms or [(0.0, _slice(padded, axis, 0, rows))]))
    shape = x.shape.as_list()
    shape[0] = tf.shape(x)[0] if shape[0] is None else shape[0]
    shape[axis] = rows * up
    merged = tf.reshape(tf.stack(phases, axis + 1), shape)
    return _slice(merged, axis, 0, out, down)


def _fir_depthwise(
    x: tf.Tensor, taps: np.ndarray, axis: int, up: int, down: int, pad: tuple[int, int]
) -> tf.Tensor:
    """`_fir_axis` as a depthwise convolution over the zero-stuffed input."""
    channels = x.shape[3]
    if up > 1:
        shape = x.shape.as_list()
        shape[0] = tf.shape(x)[0] if shape[0] is None else shape[0]
        paddings = [[0, 0] for _ in range(5)]
        paddings[axis + 1] = [0, up - 1]
        stuffed = tf.pad(tf.expand_dims(x, axis + 1), paddings)
        shape[axis] *= up
        x = tf.reshape(stuffed, shape)
    x = _pad(x, axis, *pad)
    kernel = np.zeros([len(taps) if axis == 1 else 1, len(taps) if axis == 2 else 1, 1, 1])
    kernel[:, :, 0, 0] = taps[:, np.newaxis] if axis == 1 else taps[np.newaxis, :]
    weights = tf.constant(np.tile(kernel, [1, 1, channels, 1]), x.dtype)
    y = tf.nn.depthwise_conv2d(x, weights, strides=[1, 1, 1, 1], padding="VALID")
    return y if down == 1 else _slice(y, axis, 0, (y.shape[axis] - 1) // down + 1, down)


def _fir_axis(
    x: tf.Tensor,
    taps: np.ndarray,
    axis: int,
    up: int,
    down: int,
    pad: tuple[int, int],
    backend: Backend,
) -> tf.Tensor:
    """Upsamples by zero stuffing, pads, correlates with `taps` and keeps every `down`-th sample.

    The derivative of a FIR filter is the FIR filter with reversed taps and `up` and `down`
    exchanged. Saying so keeps gradients of every order as fast as the filter itself.
    """
    few = backend is Backend.TPU and x.shape[3] <= _SHIFT_MAX_CHANNELS
    compute = _fir_shift if backend is Backend.XLA_CPU or few else _fir_depthwise

    @tf.custom_gradient
    def apply(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        y = compute(x, taps, axis, up, down, pad)
        size, out = x.shape[axis], y.shape[axis]
        back = (len(taps) - 1 - pad[0], size * up - out * down + pad[0] - up + 1)

        def gradient(dy: tf.Tensor) -> tf.Tensor:
            return _fir_axis(dy, taps[::-1], axis, down, up, back, backend)

        return y, gradient

    return apply(x)


def _separate(taps: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """A filter as a sum of products of a column and a row filter (one for all that we use)."""
    if taps.ndim == 1:
        return [(taps, taps)]
    columns, sizes, rows = np.linalg.svd(np.asarray(taps, np.float64))
    rank = int(np.sum(sizes > 1e-12 * sizes[0]))
    return [(columns[:, i] * sizes[i], rows[i]) for i in range(rank)]


def upfirdn2d(
    x: tf.Tensor,
    taps: np.ndarray,
    up: int | tuple[int, int] = 1,
    down: int | tuple[int, int] = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    gain: float = 1.0,
    flip_filter: bool = False,
    backend: Backend = Backend.GENERIC,
) -> tf.Tensor:
    """Upsamples, filters and downsamples a batch of images.

    Args:
      x: [N, H, W, C].
      taps: [k], a filter for both axes, or [ky, kx], one in two dimensions.
      up: zero-stuffing factor, for both axes or (y, x).
      down: the factor of samples kept, for both axes or (y, x).
      padding: zeros added to the stuffed image, (top, bottom, left, right); negative crops.
      gain: a factor on the result.
      flip_filter: False convolves, True correlates, as in NVIDIA's function of this name.
      backend: how it is computed.

    Returns:
      [N, H', W', C] with H' = (H * up + top + bottom - taps) // down + 1.
    """
    up_y, up_x = up if isinstance(up, tuple) else (up, up)
    down_y, down_x = down if isinstance(down, tuple) else (down, down)
    results = []
    for taps_y, taps_x in _separate(taps):
        if not flip_filter:
            taps_y, taps_x = taps_y[::-1], taps_x[::-1]
        y = _fir_axis(x, taps_y * gain, 1, up_y, down_y, padding[:2], backend)
        results.append(_fir_axis(y, taps_x, 2, up_x, down_x, padding[2:], backend))
    return tf.add_n(results) if len(results) > 1 else results[0]


def upsample2d(x: tf.Tensor, taps: np.ndarray, backend: Backend = Backend.GENERIC) -> tf.Tensor:
    """[N, H, W, C] -> [N, 2H, 2W, C]; a constant image keeps its value."""
    size = len(taps)
    before, after = (size + 1) // 2, (size - 2) // 2
    return upfirdn2d(x, taps, up=2, padding=(before, after) * 2, gain=4.0, backend=backend)


def downsample2d(x: tf.Tensor, taps: np.ndarray, backend: Backend = Backend.GENERIC) -> tf.Tensor:
    """[N, H, W, C] -> [N, H/2, W/2, C]; a constant image keeps its value."""
    size = len(taps)
    before, after = (size - 1) // 2, (size - 2) // 2
    return upfirdn2d(x, taps, down=2, padding=(before, after) * 2, backend=backend)


# --------------------------------------------------------------------------------------
# Convolution


def conv2d(x: tf.Tensor, weight: tf.Tensor, backend: Backend = Backend.GENERIC) -> tf.Tensor:
    """Dense correlation with "same" zero padding: [N, H, W, in] -> [N, H, W, out]."""
    if backend is Backend.XLA_CPU and winograd.pays(x.shape, weight.shape):
        return winograd.conv2d(x, weight)
    return tf.nn.conv2d(x, weight, strides=1, padding="SAME")


def _conv2d_valid(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    return tf.nn.conv2d(x, weight, strides=1, padding="VALID")


def _transposed_conv3x3(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """y[2i + k] += x[i] weight[k] in two dimensions: [N, H, W, in] -> [N, 2H+1, 2W+1, out].

    Even outputs meet taps 0 and 2, odd ones tap 1, so each of the four combinations of even and
    odd rows and columns is a small dense convolution, and together they cost what one 3x3 costs.
    """
    height, width, channels = x.shape[1], x.shape[2], weight.shape[3]
    rows = tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]])
    cols = tf.pad(x, [[0, 0], [0, 0], [1, 1], [0, 0]])
    both = tf.pad(rows, [[0, 0], [0, 0], [1, 1], [0, 0]])
    flipped = weight[::-1, ::-1]
    even_even = _conv2d_valid(both, flipped[0::2, 0::2])
    even_odd = _conv2d_valid(rows, flipped[0::2, 1:2])
    odd_even = _conv2d_valid(cols, flipped[1:2, 0::2])
    odd_odd = _conv2d_valid(x, flipped[1:2, 1:2])
    # The odd rows and columns are one short; a zero line completes them and is cut off again.
    even_odd = tf.pad(even_odd, [[0, 0], [0, 0], [0, 1], [0, 0]])
    odd_even = tf.pad(odd_even, [[0, 0], [0, 1], [0, 0], [0, 0]])
    odd_odd = tf.pad(odd_odd, [[0, 0], [0, 1], [0, 1], [0, 0]])
    even = tf.stack([even_even, even_odd], 3)
    odd = tf.stack([odd_even, odd_odd], 3)
    batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    y = tf.reshape(tf.stack([even, odd], 2), [batch, 2 * height + 2, 2 * width + 2, channels])
    return y[:, : 2 * height + 1, : 2 * width + 1]


def _strided_conv3x3(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Stride-2 correlation without padding: [N, 2H+1, 2W+1, in] -> [N, H, W, out].

    The mirror image of `_transposed_conv3x3`: four dense convolutions over even and odd samples.
    """
    return (
        _conv2d_valid(x[:, 0::2, 0::2], weight[0::2, 0::2])
        + _conv2d_valid(x[:, 0::2, 1::2], weight[0::2, 1:2])
        + _conv2d_valid(x[:, 1::2, 0::2], weight[1:2, 0::2])
        + _conv2d_valid(x[:, 1::2, 1::2], weight[1:2, 1:2])
    )


def conv2d_resample(
    x: tf.Tensor,
    weight: tf.Tensor,
    taps: np.ndarray = RESAMPLE_FILTER,
    up: int = 1,
    down: int = 1,
    backend: Backend = Backend.GENERIC,
    blocks: tuple[int, int] = (1, 1),
) -> tf.Tensor:
    """Convolution with optional 2x up- or downsampling (StyleGAN2, section 4.2 and appendix B).

    Args:
      x: [N, H, W, in].
      weight: [k, k, in, out] with k 1 or 3. Applied as a correlation, except when upsampling,
        where, as in NVIDIA's networks, it is a true convolution of the stuffed image.
      taps: the resampling filter.
      up: 1 or 2.
      down: 1 or 2.
      backend: how it is computed.
      blocks: how `x` is packed and the result shall be, see `packing.block_conv2d`.

    Returns:
      [N, H * up / down, W * up / down, out], or packed.
    """
    if blocks != (1, 1):
        assert blocks[0] * up == blocks[1] * down
        return packing.resample(x, weight, taps, blocks)
    size, _, inputs, outputs = weight.shape
    if backend is Backend.TPU and up == 2 and outputs <= _BLOCKS_MAX_CHANNELS:
        return packing.unpack(packing.resample(x, weight, taps, (1, 2)), 2)
    if backend is Backend.TPU and down == 2 and inputs <= _BLOCKS_MAX_CHANNELS:
        return packing.resample(packing.pack(x, 2), weight, taps, (2, 1))
    if up == 2 and size == 1:
        return upsample2d(conv2d(x, weight, backend), taps, backend)
    if up == 2:
        y = _transposed_conv3x3(x, weight)
        before, after = (len(taps) + 1) // 2 - 1, (len(taps) - 2) // 2
        return upfirdn2d(y, taps, padding=(before, after) * 2, gain=4.0, backend=backend)
    if down == 2 and size == 1:
        return conv2d(downsample2d(x, taps, backend), weight, backend)
    if down == 2:
        before, after = (len(taps) - 1) // 2 + 1, (len(taps) - 2) // 2 + 1
        return _strided_conv3x3(
            upfirdn2d(x, taps, padding=(before, after) * 2, backend=backend), weight
        )
    return conv2d(x, weight, backend)


# --------------------------------------------------------------------------------------
# Modulated convolution


def modulated_conv2d(
    x: tf.Tensor,
    weight: tf.Tensor,
    styles: tf.Tensor,
    noise: tf.Tensor | None = None,
    up: int = 1,
    demodulate: bool = True,
    taps: np.ndarray = RESAMPLE_FILTER,
    backend: Backend = Backend.GENERIC,
    blocks: tuple[int, int] = (1, 1),
) -> tf.Tensor:
    """Convolution whose weights are scaled by each sample's style (StyleGAN2, section 2.2).

    Args:
      x: [N, H, W, in].
      weight: [k, k, in, out], float32.
      styles: [N, in], float32.
      noise: broadcastable to the result, added to it, or None.
      up: 1 or 2.
      demodulate: whether each output channel is scaled to unit expected variance (equation 3).
      taps: the resampling filter.
      backend: how it is computed.
      blocks: how `x` is packed and the result shall be, see `packing.block_conv2d`.

    Returns:
      [N, H * up, W * up, out] in the dtype of `x`, or packed.
    """
    dtype = x.dtype
    if dtype == tf.float16 and demodulate:
        # Keeps sums within float16's range; the factors cancel in the demodulation.
        weight *= tf.math.rsqrt(
            tf.reduce_max(tf.square(weight), [0, 1, 2], keepdims=True)
            * float(np.prod(weight.shape[:3]))
        )
        styles *= tf.math.rsqrt(tf.reduce_max(tf.square(styles), 1, keepdims=True))
    y = _scale(x, _for_each_pixel(tf.cast(styles, dtype), blocks[0]), backend)
    y = conv2d_resample(y, tf.cast(weight, dtype), taps, up, 1, backend, blocks)
    if demodulate:
        energy = tf.reduce_sum(tf.square(weight), [0, 1])
        factors = tf.math.rsqrt(tf.linalg.matmul(tf.square(styles), energy) + 1e-8)
        y = _scale(y, _for_each_pixel(tf.cast(factors, dtype), blocks[1]), backend)
    return y if noise is None else y + tf.cast(noise, dtype)


# --------------------------------------------------------------------------------------
# Scales, biases and activations


def _for_each_pixel(values: tf.Tensor, block: int) -> tf.Tensor:
    """[..., C] for maps, or [..., block**2 * C] for packed ones."""
    return tf.concat([values] * block**2, -1) if block > 1 else values


def _as_maps(values: tf.Tensor) -> tf.Tensor:
    """[N, C] -> [N, 1, 1, C]."""
    return tf.reshape(values, [-1, 1, 1, values.shape[1]])


def _sum_over_pixels(x: tf.Tensor) -> tf.Tensor:
    """[N, H, W, C] -> [N, C] as a matrix product."""

    @tf.custom_gradient
    def apply(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        count, height, width, channels = x.shape
        pixels = tf.reshape(x, [-1, height * width, channels])
        ones = tf.ones([count or tf.shape(x)[0], height * width, 1], x.dtype)

        def gradient(dy: tf.Tensor) -> tf.Tensor:
            return tf.broadcast_to(_as_maps(dy), tf.shape(x))

        return tf.squeeze(tf.linalg.matmul(ones, pixels, transpose_a=True), 1), gradient

    return apply(x)


def _scale(x: tf.Tensor, factors: tf.Tensor, backend: Backend) -> tf.Tensor:
    """[N, H, W, C] times one factor [N, C] for each feature map."""
    if backend is not Backend.XLA_CPU:
        return x * _as_maps(factors)

    @tf.custom_gradient
    def apply(x: tf.Tensor, factors: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return _scale(dy, factors, backend), _sum_over_pixels(x * dy)

        return x * _as_maps(factors), gradient

    return apply(x, factors)


def _add_bias(x: tf.Tensor, bias: tf.Tensor, backend: Backend) -> tf.Tensor:
    if backend is not Backend.XLA_CPU or x.shape.rank != 4:
        return x + bias

    @tf.custom_gradient
    def apply(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return dy, tf.reduce_sum(_sum_over_pixels(dy), 0)

        return x + bias, gradient

    return apply(x, bias)


# The gain of each activation that keeps the variance of its input.
_ACTIVATION_GAINS = {"linear": 1.0, "lrelu": math.sqrt(2), "sigmoid": 1.0, "swish": math.sqrt(2)}


def bias_act(
    x: tf.Tensor,
    bias: tf.Tensor | None = None,
    activation: str = "linear",
    alpha: float = 0.2,
    gain: float | None = None,
    clamp: float | None = None,
    backend: Backend = Backend.GENERIC,
    block: int = 1,
) -> tf.Tensor:
    """Adds a bias, applies an activation, scales, and limits.

    Args:
      x: [..., C], or packed.
      bias: [C], or None.
      activation: "linear", "lrelu" (leaky ReLU), "sigmoid" or "swish".
      alpha: the slope of "lrelu" below zero.
      gain: a factor after the activation; None takes the one that keeps the variance.
      clamp: the result is limited to [-clamp, clamp]; None doesn't.
      backend: how it is computed.
      block: pixels along each side of the blocks of `x`, 1 if it is not packed.
    """
    if bias is not None:
        x = _add_bias(x, _for_each_pixel(tf.cast(bias, x.dtype), block), backend)
    if gain is None:
        gain = _ACTIVATION_GAINS[activation]
    if activation == "lrelu":
        # A select between two slopes has, unlike tf.nn.leaky_relu, derivatives of every order
        # that XLA fuses with their neighbours; the gain rides on the slopes.
        slope = tf.where(x >= 0, tf.constant(gain, x.dtype), tf.constant(alpha * gain, x.dtype))
        x *= slope
    else:
        if activation == "sigmoid":
            x = tf.sigmoid(x)
        elif activation == "swish":
            x *= tf.sigmoid(x)
        x *= tf.constant(gain, x.dtype)
    if clamp is not None:
        x = tf.clip_by_value(x, tf.constant(-clamp, x.dtype), tf.constant(clamp, x.dtype))
    return x


def normalize_2nd_moment(x: tf.Tensor) -> tf.Tensor:
    """Scales each row of [N, C] to unit mean square."""
    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), 1, keepdims=True) + 1e-8)


def minibatch_stddev(x: tf.Tensor, group_size: int) -> tf.Tensor:
    """Appends a channel with the spread of each group (Karras et al. 2018, section 3).

    Args:
      x: [N, H, W, C]; every `group_size` consecutive samples are a group.
      group_size: divides N.

    Returns:
      [N, H, W, C + 1].
    """
    _, height, width, channels = x.shape
    groups = tf.reshape(x, [-1, group_size, height, width, channels])
    variance = tf.reduce_mean(tf.square(groups - tf.reduce_mean(groups, 1, keepdims=True)), 1)
    spread = tf.reduce_mean(tf.sqrt(variance + 1e-8), [1, 2, 3])
    column = tf.repeat(spread, group_size)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return tf.concat([x, tf.broadcast_to(column, tf.concat([tf.shape(x)[:3], [1]], 0))], 3)
