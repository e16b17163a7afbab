"""The snapshot grid: its size, its order, its pixels."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.core import storage
from trainer.telemetry import images


@pytest.mark.parametrize(
    ("resolution", "size"),
    [
        ((1024, 1024), (7, 4)),  # NVIDIA's own sizes, where they are within the bound
        ((512, 512), (15, 8)),
        ((2048, 2048), (7, 4)),
        ((32, 32), (16, 16)),  # 32 x 32 of NVIDIA's, shrunk
        ((256, 256), (21, 11)),
        ((1024, 256), (30, 4)),  # height and width are not mixed up
    ],
)
def test_grid_size(resolution: tuple[int, int], size: tuple[int, int]) -> None:
    assert images.grid_size(resolution) == size


@given(st.integers(2, 5000), st.integers(2, 5000))
def test_grid_size_is_bounded(height: int, width: int) -> None:
    cols, rows = images.grid_size((height, width))
    assert 7 <= cols <= 32
    assert 4 <= rows <= 32
    assert cols * rows <= images.MAX_TILES


def test_layout_without_labels_is_a_random_subset() -> None:
    layout = images.grid_layout((1024, 1024), 100)
    assert len(set(layout.indices.tolist())) == 28
    assert set(layout.indices.tolist()) <= set(range(100))
    assert layout.indices.tolist() != sorted(layout.indices.tolist())
    assert (layout.labels == -1).all()
    again = images.grid_layout((1024, 1024), 100)
    assert np.array_equal(layout.indices, again.indices)
    other = images.grid_layout((1024, 1024), 100, seed=1)
    assert not np.array_equal(layout.indices, other.indices)


def test_layout_of_few_and_of_very_many_images() -> None:
    few = images.grid_layout((1024, 1024), 5).indices
    assert np.bincount(few).max() == 6  # 28 tiles of 5 images: as even as can be
    assert set(few.tolist()) == set(range(5))
    many = images.grid_layout((1024, 1024), 10**10).indices
    assert len(set(many.tolist())) == 28
    assert many.max() > 2**32
    with pytest.raises(ValueError, match="at least one"):
        images.grid_layout((32, 32), 0)


def test_layout_rows_are_classes_in_turn() -> None:
    labels = np.array([7, 2, 2, 7, 5, -1, 2, 7] * 10)
    layout = images.grid_layout((1024, 1024), len(labels), labels)
    assert layout.size == (7, 4)
    rows = layout.labels.reshape(4, 7)
    assert rows.tolist() == [[2] * 7, [5] * 7, [7] * 7, [2] * 7]
    assert np.array_equal(labels[layout.indices], layout.labels)
    first, fourth = layout.indices[:7], layout.indices[21:]
    assert not set(first.tolist()) & set(fourth.tolist())  # the class goes on, not over again


def test_layout_repeats_the_images_of_a_small_class_only() -> None:
    labels = [0] * 50 + [1] * 3
    layout = images.grid_layout((1024, 1024), 53, labels)
    assert len(set(layout.indices[:7].tolist())) == 7
    assert set(layout.indices[7:14].tolist()) == {50, 51, 52}


def test_layout_refuses_labels_without_a_class() -> None:
    with pytest.raises(ValueError, match="labelled"):
        images.grid_layout((32, 32), 3, [-1, -1, -1])


def test_to_uint8_inverts_the_scaling_of_the_pipeline() -> None:
    pixels = np.arange(256)
    assert np.array_equal(images.to_uint8(pixels / 127.5 - 1), pixels)


def test_to_uint8_rounds_and_clips() -> None:
    x = (np.array([-0.6, 0.4, 0.6, 100.4, 100.6, 254.6, 300, -40]) / 127.5 - 1).astype(np.float32)
    result = images.to_uint8(x)
    assert result.dtype == np.uint8
    assert result.tolist() == [0, 0, 1, 100, 101, 255, 255, 0]
    assert images.to_uint8(np.zeros(1)).tolist() == [128]
    assert images.to_uint8(np.array([0.5], np.float16)).tolist() == [191]


def _numbered(count: int, height: int = 2, width: int = 3, channels: int = 3) -> np.ndarray:
    values = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(values, (count, height, width, channels)).copy()


def test_tile_is_row_major() -> None:
    grid = images.tile(_numbered(6), (3, 2))
    assert grid.shape == (4, 9, 3)
    assert grid[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert grid[1::2, 2::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tile_keeps_images_upright_and_fills_up_with_zeros() -> None:
    image = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(1, 2, 3, 4)
    grid = images.tile(image, (2, 2))
    assert np.array_equal(grid[:2, :3], image[0])
    assert not grid[2:].any()
    assert not grid[:, 3:].any()
    with pytest.raises(ValueError, match="5 images"):
        images.tile(_numbered(5), (2, 2))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_save_grid_round_trips_every_channel_count(tmp_path, channels: int, mode: str) -> None:
    rng = np.random.RandomState(channels)
    tiles = rng.randint(0, 256, (4, 5, 6, channels)).astype(np.uint8)
    path = str(tmp_path / "deep" / "grid.png")
    images.save_grid(path, tiles, (2, 2))
    picture = Image.open(path)
    assert (picture.format, picture.mode) == ("PNG", mode)
    pixels = np.asarray(picture).reshape(10, 12, channels)
    assert np.array_equal(pixels, images.tile(tiles, (2, 2)))


def test_save_grid_writes_to_a_url() -> None:
    images.save_grid("memory://bucket/grid.png", _numbered(1), (1, 1))
    data = storage.read_bytes("memory://bucket/grid.png")
    assert Image.open(io.BytesIO(data)).size == (3, 2)


def test_sheet_puts_tiles_in_order_with_their_captions_below() -> None:
    tiles = np.zeros((3, 96, 96, 3), np.uint8)
    tiles[..., 0] = np.array([50, 100, 150])[:, None, None]
    sheet = images.labelled_sheet(list(tiles), ["seed 1", "", "seed 3"], cols=2)
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB"
    step_x, step_y = 96 + 3, (pixels.shape[0] - 3) // 2
    corners = [(3, 3), (3, 3 + step_x), (3 + step_y, 3)]
    for (y, x), tile in zip(corners, tiles, strict=True):
        assert np.array_equal(pixels[y : y + 96, x : x + 96], tile)
    below = [pixels[y + 96 : y + step_y - 3, x : x + 96].min() < 100 for y, x in corners]
    assert below == [True, False, True]
    assert (pixels[3 + step_y :, 3 + step_x :] == 255).all()  # the missing tile stays white


def test_sheet_enlarges_small_tiles_by_whole_factors_and_keeps_alpha() -> None:
    tile = np.random.RandomState(0).randint(0, 256, (32, 20, 4)).astype(np.uint8)
    sheet = images.labelled_sheet([tile], ["seed 0\nclass"], cols=1)
    assert sheet.mode == "RGBA"
    pixels = np.asarray(sheet)
    assert pixels.shape[1] == 5 * 20 + 6
    assert np.array_equal(pixels[3 : 3 + 160 : 5, 3 : 3 + 100 : 5], tile)


def test_sheet_cuts_captions_that_are_wider_than_a_tile() -> None:
    tile = np.full((96, 96, 1), 255, np.uint8)
    pixels = np.asarray(images.labelled_sheet([tile] * 2, ["x" * 200, ""], cols=2))
    assert (pixels[:, 3 + 99 :] == 255).all()
    assert (pixels < 128).any()


def test_split_is_the_inverse_of_tile() -> None:
    pictures = np.random.RandomState(0).randint(0, 256, (6, 2, 5, 3)).astype(np.uint8)
    assert np.array_equal(images.split(images.tile(pictures, (3, 2)), (3, 2)), pictures)


def test_spread_is_that_of_all_pairs() -> None:
    pictures = np.random.RandomState(0).randint(0, 256, (7, 4, 3, 2)).astype(np.uint8)
    floats = pictures.astype(float)
    squares = [np.mean((floats[i] - floats[j]) ** 2) for i in range(7) for j in range(i)]
    found = images.spread(pictures, np.full(7, -1))
    assert found == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)


def test_spread_compares_images_of_one_class() -> None:
    """One image for each class is no variety, wherever its tiles are."""
    labels = np.array([4, 1, 4, 1])
    pictures = (labels * 50).astype(np.uint8).reshape(4, 1, 1, 1) + np.zeros((4, 2, 2, 1), np.uint8)
    assert images.spread(pictures, labels) == 0
    assert images.spread(pictures, np.full(4, -1)) > 50
    pictures[0] += 10
    # One class has a pair that is 10 apart, the other one that is 0 apart.
    assert images.spread(pictures, labels) == pytest.approx(np.sqrt((10**2 + 0) / 2))
    assert np.isnan(images.spread(pictures[:2], labels[:2]))
