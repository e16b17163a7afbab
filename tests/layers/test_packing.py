"""Maps as TPUs have them against plain ones."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.layers.test_ops import derivatives, error
from trainer.layers import ops, packing


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def test_packing_puts_a_block_into_the_channels(rng: np.random.Generator) -> None:
    x = rng.standard_normal([2, 6, 4, 3])
    packed = packing.pack(tf.constant(x), 2).numpy()
    assert packed.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(
        packed[1, 2, 0, 2 * 3 : 3 * 3], x[1, 5, 0]
    )  # odd row, even column
    np.testing.assert_array_equal(packing.unpack(tf.constant(packed), 2), x)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_repacking_keeps_the_map(channels: int, rng: np.random.Generator) -> None:
    x = tf.constant(rng.standard_normal([2, 8, 12, channels]))
    for block, new_block in ((1, 4), (4, 2), (2, 1), (2, 2)):
        found = packing.repack(packing.pack(x, block), block, new_block)
        np.testing.assert_array_equal(found, packing.pack(x, new_block))


@pytest.mark.parametrize(
    ("channels", "block"), [(512, 1), (128, 1), (65, 1), (64, 2), (48, 2), (32, 2), (1, 2)]
)
def test_narrow_maps_are_packed_until_they_fill_the_lanes(channels: int, block: int) -> None:
    assert packing.block_size(64, 32, channels) == block


@pytest.mark.parametrize(
    ("height", "width", "block"),
    [(4, 4, 1), (5, 7, 1), (7, 32, 1), (8, 8, 2), (10, 14, 2), (64, 8, 2)],
)
def test_the_base_grid_of_a_network_stays_whole(height: int, width: int, block: int) -> None:
    assert packing.block_size(height, width, 1) == block


@pytest.mark.parametrize("block", [1, 2, 4])
def test_packed_noise_is_one_value_for_all_channels(block: int, rng: np.random.Generator) -> None:
    """And so is its gradient in the strength."""
    noise, strength = rng.standard_normal([2, 4, 8, 1]), tf.constant(0.3, tf.float64)
    weights = rng.standard_normal([2, 4, 8, 5])
    with tf.GradientTape() as tape:
        tape.watch(strength)
        packed = packing.pack_noise(tf.constant(noise), strength, 5, block, tf.float64)
        loss = tf.reduce_sum(packing.unpack(packed, block) * weights)
    expected = np.repeat(noise, 5, 3) if block > 1 else noise
    np.testing.assert_array_equal(packing.unpack(packed, block), 0.3 * expected)
    slope = tape.gradient(loss, strength)
    np.testing.assert_allclose(slope, np.sum(noise * weights), rtol=1e-12)


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2, 1), (1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("up", "down", "blocks"),
    [
        (1, 1, (2, 2)),
        (1, 1, (4, 4)),
        (1, 1, (1, 1)),
        (2, 1, (1, 2)),
        (2, 1, (2, 4)),
        (1, 2, (2, 1)),
        (1, 2, (4, 2)),
    ],
)
def test_convolution_over_blocks_is_the_plain_one(
    up: int,
    down: int,
    blocks: tuple[int, int],
    size: int,
    taps: tuple[int, ...],
    rng: np.random.Generator,
) -> None:
    """Values, gradients and gradients of gradients, with filters that aren't symmetric, too."""
    filter_taps = ops.setup_filter(taps)
    x, weight = rng.standard_normal([2, 8, 12, 3]), rng.standard_normal([size, size, 3, 5])

    def over_blocks(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        x = packing.pack(x, blocks[0])
        y = ops.conv2d_resample(x, weight, filter_taps, up, down, blocks=blocks)
        return packing.unpack(y, blocks[1])

    def plain(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        return ops.conv2d_resample(x, weight, filter_taps, up, down)

    if blocks == (1, 1):
        over_blocks = functools.partial(packing.block_conv2d, taps=filter_taps, blocks=blocks)
    inputs = [tf.constant(x), tf.constant(weight)]
    ours, theirs = (
        derivatives(function, inputs, np.random.default_rng(1)) for function in (over_blocks, plain)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert error(actual, expected) < 1e-12


@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
def test_a_wide_pointwise_kernel_on_a_tpu_is_the_plain_one(
    up: int, down: int, rng: np.random.Generator
) -> None:
    x, weight = (
        tf.constant(rng.standard_normal(s))
        for s in (
            [2, 8, 4, packing.PACK_CHANNELS],
            [1, 1, packing.PACK_CHANNELS, packing.PACK_CHANNELS],
        )
    )
    apart = [
        ops.conv2d_resample(x, weight, ops.setup_filter([1, 2, 3, 4]), up, down, backend)
        for backend in (ops.Backend.TPU, ops.Backend.GENERIC)
    ]
    assert error(*apart) < 1e-12


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("demodulate", [True, False])
def test_packed_modulated_conv2d_is_the_plain_one(
    demodulate: bool, block: int, rng: np.random.Generator
) -> None:
    shapes = [2, 4, 8, 5], [3, 3, 5, 7], [2, 5], [2, 4, 8, 7], [7]
    x, weight, styles, noise, bias = (tf.constant(rng.standard_normal(s)) for s in shapes)

    def layer(block: int) -> tf.Tensor:
        y = ops.modulated_conv2d(
            packing.pack(x, block),
            weight,
            styles,
            packing.pack(noise, block),
            demodulate=demodulate,
            blocks=(block, block),
        )
        return packing.unpack(ops.bias_act(y, bias, "lrelu", block=block), block)

    assert error(layer(block), layer(1)) < 1e-12


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    ("images", "rows", "count"),
    [
        *[(4, 64, 2), (4, 62, 1), (4, 65, 1), (1, 256, 8), (1, 128, 1)],
        *[(8, 512, 1), (16, 512, 1), (3, 512, 1), (None, 512, 1)],
    ],
)
def test_tiles_make_eight_images_of_fewer(images: int | None, rows: int, count: int) -> None:
    """If they divide, and are not too low for it to pay."""
    assert packing.num_tiles(images, rows) == count


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("halo", [1, 2, 4])
def test_tiles_overlap_and_concatenate(count: int, halo: int, rng: np.random.Generator) -> None:
    x = tf.constant(rng.standard_normal([3, 64, 5, 2]))
    tiles = packing.cut(x, count, halo)
    if count > 1:
        assert tiles.shape == [3 * count, 64 // count + 2 * halo, 5, 2]
    np.testing.assert_array_equal(packing.concatenate(tiles, count, halo), x)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_what_goes_wrong_at_the_edges_of_tiles_is_not_concatenated(
    count: int, rng: np.random.Generator
) -> None:
    """Two convolutions in turn are wrong in two rows, and right in all that is kept. With a halo
    of one, two tiles still have two rows to spare, each at its only inner edge."""
    x = tf.constant(rng.standard_normal([2, 64, 6, 3]))
    weight = tf.constant(rng.standard_normal([3, 3, 3, 3]))

    def twice(x: tf.Tensor) -> tf.Tensor:
        return ops.conv2d(tf.tanh(ops.conv2d(x, weight)), weight)

    tiles = twice(packing.cut(x, count, 2))
    assert error(packing.concatenate(tiles, count, 2), twice(x)) < 1e-12
    narrow = packing.concatenate(twice(packing.cut(x, count, 1)), count, 1)
    assert (error(narrow, twice(x)) > 1e-3) == (count > 2)
