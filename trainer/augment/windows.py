"""Bilinear samples of an image under an affine map, without looking up single pixels.

A TPU fetches single numbers one after the other; blocks it moves, and matrices it multiplies, fast.
Under an affine map neighbours come from neighbours: a small square of samples, here a tile, lies in
a window of a few blocks of the canvas. A block is fetched whole. Its contribution to a tile is a
product with a matrix, of each sample's weights for the block's rows, and a sum over the columns by
the weights for those; in either all but two weights are zero. The results are those of four
look-ups to the last bits.

The canvas is a table of blocks from the start: [N * blocks along x * blocks along y, BLOCK (y),
C * BLOCK (x)]. In this order it is one product of matrices, written as it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

# Samples along the side of a tile and pixels along that of a block. Two by two blocks are enough
# for a tile unless the map shrinks the image to less than two thirds: only then more are read.
TILE, BLOCK = 16, 32
# Blocks of a column that are read at once, since matrix units are more than a block high.
_PAIR = 2
# Tiles that are sampled at a time, at most: what these need stays on the chip.
_TILES_AT_ONCE = 512
_SUBLANES = 8  # rows in which a TPU keeps them; others are copied


@dataclass(frozen=True)
class Cells:
    """Samples of each tile of a canvas: the pixels they lie between, and how far from the first.

    Attributes:
      row, column: [M, S] int32, of the pixel above and to the left. It and the one below and to
        the right are on the canvas.
      down, right: [M, S], from that pixel, 0 to 1.
      image: [M] int32, whose canvas it is.
    """

    row: tf.Tensor
    column: tf.Tensor
    down: tf.Tensor
    right: tf.Tensor
    image: tf.Tensor

    def parts(self, size: int) -> tuple[tf.Tensor, ...]:
        """Processes all of it, some tiles at a time: [groups of tiles, size, ...]."""
        parts = self.row, self.column, self.down, self.right, self.image
        return tuple(_grouped(part, size) for part in parts)


def sample(
    table: tf.Tensor, cells: Cells, blocks: tuple[int | tf.Tensor, int | tf.Tensor]
) -> tf.Tensor:
    """Bilinear samples, differentiable to any order in the canvas.

    Args:
      table: [N * blocks, BLOCK, C * BLOCK], the canvas; see this module.
      cells: where to sample.
      blocks: (along x, along y) of one image's canvas.

    Returns:
      [M, C, S].
    """
    shape, channels = tf.shape(table), table.shape[2] // BLOCK
    num_tiles = cells.row.shape[0]
    size = _group_size(num_tiles)
    rows = [size, _PAIR * BLOCK, channels * BLOCK]
    parts = cells.parts(size)

    # Two linear maps, each the transpose, hence the derivative, of the other. The loops in them are
    # not to be differentiated as well, so they are given what has no gradient.
    @tf.custom_gradient
    def gather(table: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        pixels = tf.stop_gradient(table)
        ones = tf.repeat(tf.eye(channels, dtype=table.dtype), BLOCK, axis=1)

        def group(cells: tuple[tf.Tensor, ...]) -> tf.Tensor:
            def add(total: tf.Tensor, block: _Blocks) -> tf.Tensor:
                found = tf.reshape(tf.gather(pixels, block.index), rows)
                found = tf.matmul(found, block.by_row, transpose_a=True)
                found *= tf.tile(block.by_column, [1, channels, 1])
                return total + tf.einsum("cr,trs->tcs", ones, found)

            zero = tf.zeros([size, channels, TILE**2], table.dtype)
            return _Window(Cells(*cells), blocks).fold(add, zero)

        found = tf.map_fn(group, parts, fn_output_signature=table.dtype)
        return tf.reshape(found, [-1, channels, TILE**2])[:num_tiles], spread

    @tf.custom_gradient
    def spread(samples: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def group(table: tf.Tensor, given: tuple[tf.Tensor, ...]) -> tf.Tensor:
            *cells, values = given

            def add(total: tf.Tensor, block: _Blocks) -> tf.Tensor:
                found = values[:, :, tf.newaxis] * block.by_column[:, tf.newaxis]
                found = tf.reshape(found, [size, channels * BLOCK, TILE**2])
                found = tf.matmul(block.by_row, found, transpose_b=True)
                found = tf.reshape(found, [size, _PAIR, BLOCK, channels * BLOCK])
                return tf.tensor_scatter_nd_add(total, block.index[..., tf.newaxis], found)

            return _Window(Cells(*cells), blocks).fold(add, table)

        zero = tf.zeros(shape, samples.dtype)
        given = (*parts, _grouped(tf.stop_gradient(samples), size))
        return tf.foldl(group, given, initializer=zero), gather

    return gather(table)


def _group_size(num_tiles: int) -> int:
    """Tiles at a time, so that few are added to fill the last group."""
    groups = -(-num_tiles // _TILES_AT_ONCE)
    return -(-num_tiles // (groups * _SUBLANES)) * _SUBLANES


def _grouped(tiles: tf.Tensor, size: int) -> tf.Tensor:
    """[M, ...] -> [groups of tiles, size, ...], filled with zeros."""
    num, *shape = tiles.shape
    tiles = tf.pad(tiles, [[0, -num % size]] + [[0, 0]] * len(shape))
    return tf.reshape(tiles, [-1, size, *shape])


@dataclass(frozen=True)
class _Blocks:
    """A pair of blocks, one above the other, for each of some tiles.

    Attributes:
      index: [tiles, _PAIR], in the table. A block beyond the canvas has some index, and no weight.
      by_row: [tiles, _PAIR * BLOCK, S] weights of the rows.
      by_column: [tiles, BLOCK, S] weights of the columns.
    """

    index: tf.Tensor
    by_row: tf.Tensor
    by_column: tf.Tensor


class _Window:
    """The blocks that some tiles are sampled from: those of one tile are a square."""

    def __init__(self, cells: Cells, blocks: tuple[int | tf.Tensor, int | tf.Tensor]) -> None:
        self._cells, self._blocks = cells, blocks
        self._top = tf.reduce_min(cells.row, axis=1) // BLOCK
        self._left = tf.reduce_min(cells.column, axis=1) // BLOCK
        last_row = (tf.reduce_max(cells.row, axis=1) + 1) // BLOCK
        last_column = (tf.reduce_max(cells.column, axis=1) + 1) // BLOCK
        # Two columns even where one would do, so that the first two are a pair of columns.
        self._columns = tf.maximum(tf.reduce_max(last_column - self._left) + 1, 2)
        self._pairs = tf.reduce_max(last_row - self._top) // _PAIR + 1

    def fold(self, add: Callable[[tf.Tensor, _Blocks], tf.Tensor], total: tf.Tensor) -> tf.Tensor:
        """Adds what the blocks of the window contribute."""

        def run(start: int, end: int | tf.Tensor, total: tf.Tensor) -> tf.Tensor:
            _, total = tf.while_loop(
                lambda number, _: number < end,
                lambda number, total: (number + 1, add(total, self._blocks_of(number))),
                (tf.constant(start), total),
            )
            return total

        return run(2, self._pairs * self._columns, run(0, 2, total))

    def _blocks_of(self, number: tf.Tensor) -> _Blocks:
        top = self._top + _PAIR * (number // self._columns)
        left = self._left + number % self._columns
        cells, (wide, high) = self._cells, self._blocks
        first = (cells.image * wide + tf.minimum(left, wide - 1)) * high
        below = tf.minimum(top[:, tf.newaxis] + tf.range(_PAIR), high - 1)
        return _Blocks(
            first[:, tf.newaxis] + below,
            _weights(cells.row, cells.down, top, _PAIR * BLOCK),
            _weights(cells.column, cells.right, left, BLOCK),
        )


def _weights(first: tf.Tensor, fraction: tf.Tensor, block: tf.Tensor, size: int) -> tf.Tensor:
    """Of `size` rows or columns from a block on, for samples between two: [M, S] -> [M, size, S]."""
    first = (first - (block * BLOCK)[:, tf.newaxis])[:, tf.newaxis]
    fraction = fraction[:, tf.newaxis]
    place = tf.range(size)[:, tf.newaxis]
    zero = tf.zeros([], fraction.dtype)
    before = tf.where(place == first, 1 - fraction, zero)
    return before + tf.where(place == first + 1, fraction, zero)
