"""3x3 convolutions by Winograd's algorithm (Lavin and Gray 2016), for XLA on CPUs."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# Winograd's transforms for two outputs of a three-tap filter (Lavin and Gray 2016, section 4.1):
# y = A^T [(G w) * (B^T x)] along each axis.
# With 32 to 64 channels it took 15% longer than the plain convolutions, and a first step of 106 s
# instead of 82; with few pixels it saves nothing worth the time to compile it.
_MIN_CHANNELS = 128
_MIN_PIXELS = 16 * 16
# Most space for a transformed input; about a last-level cache.
_BYTES = 32 << 20
_WEIGHT = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def pays(x: tf.TensorShape, weight: tf.TensorShape) -> bool:
    """Whether it speeds up a convolution of maps [N, H, W, in] with a kernel [k, k, in, out]."""
    size, _, inputs, outputs = weight
    _, height, width, _ = x
    return bool(
        size == 3
        and min(inputs, outputs) >= _MIN_CHANNELS
        and height * width >= _MIN_PIXELS
        and height % 2 == width % 2 == 0
    )


def _input(s: list[tf.Tensor]) -> list[tf.Tensor]:
    return [s[0] - s[2], s[1] + s[2], s[2] - s[1], s[1] - s[3]]


def _output(m: list[tf.Tensor]) -> list[tf.Tensor]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def conv2d(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """A 3x3 correlation with 4/9 of the multiplications: a third less time at 128 channels.

    Each 2x2 of outputs comes from a 4x4 of inputs by 16 products in a transformed space. The
    gradient in the weights gains nothing that way and stays a convolution.
    """

    @tf.custom_gradient
    def apply(x: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return conv2d(dy, _reversed(weight)), _weight_gradient(x, dy)

        return _in_parts(x, weight), gradient

    return apply(x, weight)


def _in_parts(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """A few images at a time, since the transformed ones take four times the space."""
    num, height, width, inputs = x.shape
    fitting = max(_BYTES // (4 * height * width * inputs * x.dtype.size), 1)
    if num is None or num <= fitting:
        return _product(x, weight)
    size = max(divisor for divisor in range(1, fitting + 1) if num % divisor == 0)
    parts = tf.reshape(x, [num // size, size, height, width, inputs])
    y = tf.map_fn(lambda part: _product(part, weight), parts)
    return tf.reshape(y, [num, height, width, weight.shape[3]])


def _product(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    _, height, width, inputs = x.shape
    rows, cols, outputs = height // 2, width // 2, weight.shape[3]
    pairs = tf.reshape(
        tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), [-1, rows + 1, 2, cols + 1, 2, inputs]
    )

    def tiles(i: int, j: int) -> tf.Tensor:
        """Element (i, j) of every 4x4 tile."""
        return pairs[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + cols, j % 2]

    by_column = [_input([tiles(i, j) for i in range(4)]) for j in range(4)]
    elements = [e for row in zip(*by_column, strict=True) for e in _input(list(row))]
    transformed = tf.stack([tf.reshape(element, [-1, inputs]) for element in elements])
    matrix = tf.constant(_WEIGHT, weight.dtype)
    kernels = tf.reshape(
        tf.einsum("ai,bj,ijcd->abcd", matrix, matrix, weight), [16, inputs, outputs]
    )
    products = tf.reshape(tf.linalg.matmul(transformed, kernels), [4, 4, -1, rows, cols, outputs])
    lines = _output([products[i] for i in range(4)])
    y = [_output([line[j] for j in range(4)]) for line in lines]
    merged = tf.stack([tf.stack(line, 3) for line in y], 2)
    return tf.reshape(merged, [-1, height, width, outputs])


def _reversed(weight: tf.Tensor) -> tf.Tensor:
    """The kernel whose correlation is the gradient of a correlation with `weight`."""
    return tf.transpose(weight[::-1, ::-1], [0, 1, 3, 2])


def _weight_gradient(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """The gradient of a 3x3 correlation in its weights: [3, 3, in, out]."""

    @tf.custom_gradient
    def apply(x: tf.Tensor, dy: tf.Tensor) -> tuple[tf.Tensor, object]:
        def gradient(dw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return conv2d(dy, _reversed(dw)), conv2d(x, dw)

        shape = [3, 3, x.shape[3], dy.shape[3]]
        value = tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=shape, out_backprop=dy, strides=[1, 1, 1, 1], padding="SAME"
        )
        return value, gradient

    return apply(x, dy)
