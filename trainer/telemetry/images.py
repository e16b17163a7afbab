"""Image grids: which images a snapshot shows, and how they become pixels, PNGs and sheets."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.core import storage

MAX_TILES = 256
"""The most tiles a grid holds. NVIDIA's rule alone gives 1,024 for every resolution up to 128x128,
which costs a small machine half a minute for each snapshot; 16x16 tiles still show a collapse."""

_CANVAS = (4320, 7680)  # height and width in pixels, as NVIDIA's
_MIN_SHEET_TILE = 96  # pixels; narrower tiles leave no room for "seed 1234"
_FONT_SIZE = 12
_PADDING = 3


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Contents of a snapshot grid, row by row.

    Attributes:
      size: (columns, rows).
      indices: [columns * rows] int64, the records to show in `reals.png`.
      labels: [columns * rows] int64, the class of each tile; -1 everywhere without labels.
    """

    size: tuple[int, int]
    indices: np.ndarray
    labels: np.ndarray


def grid_size(resolution: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of a snapshot grid.

    NVIDIA's rule, as many tiles as fit into 7680x4320 pixels with 7 to 32 columns and 4 to 32
    rows, then shrunk in proportion to `MAX_TILES`.

    Args:
      resolution: (height, width) of one image in pixels.
    """
    height, width = resolution
    cols = min(max(_CANVAS[1] // width, 7), 32)
    rows = min(max(_CANVAS[0] // height, 4), 32)
    shrink = min(1.0, math.sqrt(MAX_TILES / (cols * rows)))
    return max(7, int(cols * shrink)), max(4, int(rows * shrink))


def grid_layout(
    resolution: tuple[int, int],
    num_images: int,
    labels: np.ndarray | Sequence[int] | None = None,
    *,
    seed: int = 0,
) -> GridLayout:
    """Chooses the tiles of a run's snapshot grids; the same arguments give the same tiles.

    Without labels the tiles are a random subset of the records. With labels each row shows one
    class, in ascending order, starting over when there are more rows than classes; a class that
    comes round again shows its next images. Records repeat only when there are too few of them.

    Args:
      resolution: (height, width) of one image.
      num_images: how many records the data set has.
      labels: class of records 0, 1, 2, ... Records are shuffled at conversion, so the first few
        thousand stand for all; classes not among them get no row. Negative means no class.
      seed: picks the records.

    Raises:
      ValueError: there is no record to show.
    """
    cols, rows = grid_size(resolution)
    rng = np.random.RandomState(seed)
    if labels is None:
        if num_images < 1:
            raise ValueError("a grid needs at least one image")
        # Of a large data set, drawing with rejection is cheaper than shuffling all its records.
        few = num_images <= 16 * cols * rows
        order = rng.permutation(num_images) if few else _distinct(rng, num_images, cols * rows)
        return GridLayout((cols, rows), np.resize(order, cols * rows), np.full(cols * rows, -1))
    known = np.asarray(labels, np.int64)
    classes = np.unique(known[known >= 0])
    if classes.size == 0:
        raise ValueError("a grid of classes needs at least one labelled image")
    members = {c: rng.permutation(np.flatnonzero(known == c)) for c in classes.tolist()}
    row_classes = np.resize(classes, rows)
    indices = []
    for c in row_classes.tolist():
        indices.append(np.resize(members[c], cols))
        members[c] = np.roll(members[c], -cols)
    return GridLayout((cols, rows), np.concatenate(indices), np.repeat(row_classes, cols))


def _distinct(rng: np.random.RandomState, limit: int, count: int) -> np.ndarray:
    """`count` different numbers below `limit`, which is much larger."""
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[int(rng.randint(limit, dtype=np.int64))] = None
    return np.fromiter(drawn, np.int64)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pixels from a network's output, any shape, [-1, 1] to 0..255; what is outside is clipped.

    The one rule of the project is that of NVIDIA's `generate.py` and of its metrics,
    `trunc(clip(x * 127.5 + 128, 0, 255))`: rounding to nearest, with ties going up. NVIDIA's
    `save_image_grid` rounds the same numbers with ties to even.
    """
    scaled = np.asarray(images).astype(np.float32) * np.float32(127.5) + np.float32(128)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def tile(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Lays images out row by row without gaps.

    Args:
      images: [N, H, W, C]; missing tiles at the end stay zero.
      size: (columns, rows) with columns * rows >= N.

    Returns:
      [rows * H, columns * W, C] of the same dtype.

    Raises:
      ValueError: more images than tiles.
    """
    (cols, rows), (count, height, width, channels) = size, images.shape
    if count > cols * rows:
        raise ValueError(f"{count} images do not fit into a grid of {cols} x {rows}")
    grid = np.zeros((cols * rows, height, width, channels), images.dtype)
    grid[:count] = images
    grid = grid.reshape(rows, cols, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, cols * width, channels)


def split(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The images of a full grid: the inverse of `tile`.

    Args:
      grid: [rows * H, columns * W, C].
      size: (columns, rows).

    Returns:
      [columns * rows, H, W, C] of the same dtype.
    """
    (cols, rows), (height, width, channels) = size, grid.shape
    parts = grid.reshape(rows, height // rows, cols, width // cols, channels)
    return parts.transpose(0, 2, 1, 3, 4).reshape(-1, height // rows, width // cols, channels)


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """Root mean square distance of pixels between two images of the same class.

    Pairs of different classes are left out: a generator that makes one image for each class, or the
    same one for all, has a spread of 0. Without classes every pair counts. The mean square over pairs
    is twice the variance within classes, so no pair is formed.

    Args:
      images: [N, H, W, C] uint8.
      labels: [N] int64, the class of each image; -1 everywhere without classes.

    Returns:
      0 to 255; NaN if no class has two images.
    """
    squares, freedom = 0.0, 0
    for c in np.unique(labels):
        members = images[labels == c]
        mean = members.mean(axis=0, dtype=np.float32)
        # One by one: all at once would need the memory of a large grid in floats.
        squares += sum(float(np.square(image - mean).mean()) for image in members)
        freedom += len(members) - 1
    return math.sqrt(2 * squares / freedom) if freedom else math.nan


def to_pillow(image: np.ndarray) -> Image.Image:
    """A [H, W, C] uint8 array as a Pillow image: L, LA, RGB or RGBA for C = 1, 2, 3, 4."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def save_image(
    path: str, image: np.ndarray | Image.Image, fence: storage.Fence = contextlib.nullcontext
) -> None:
    """Writes a PNG atomically, to a local path or a URL, replacing what is there.

    Args:
      path: where to.
      image: [H, W, C] uint8 with 1 to 4 channels, or a Pillow image.
      fence: around the step in which it appears.

    Raises:
      StorageError: the path cannot be written.
    """
    buffer = io.BytesIO()
    (to_pillow(image) if isinstance(image, np.ndarray) else image).save(buffer, format="PNG")
    storage.write_bytes_atomic(path, buffer.getvalue(), fence)


def save_grid(path: str, images: np.ndarray, size: tuple[int, int]) -> None:
    """Writes [N, H, W, C] uint8 images as one PNG of (columns, rows) tiles; see `tile`."""
    save_image(path, tile(images, size))


def enlarge(image: np.ndarray, min_width: int) -> np.ndarray:
    """Repeats the pixels of a [H, W, C] image by the least whole factor that reaches a width."""
    factor = max(1, -(-min_width // image.shape[1]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def labelled_sheet(images: Sequence[np.ndarray], captions: Sequence[str], cols: int) -> Image.Image:
    """A sheet with a caption under each tile, on white.

    Args:
      images: [H, W, C] uint8 each, all of one shape. Those narrower than 96 pixels are enlarged by
        a whole factor so that the captions can be read.
      captions: one for each image, of one or more lines; what is too long for a tile is cut.
      cols: tiles in a row.

    Returns:
      An RGB image, or RGBA when the images have an alpha channel.
    """
    tiles = [to_pillow(enlarge(image, _MIN_SHEET_TILE)) for image in images]
    width, height = tiles[0].size
    font = ImageFont.load_default(size=_FONT_SIZE)
    line_height = _FONT_SIZE + _PADDING
    caption_height = line_height * max(caption.count("\n") + 1 for caption in captions) + _PADDING
    step_x, step_y = width + _PADDING, height + caption_height
    rows = -(-len(tiles) // cols)
    mode = "RGBA" if tiles[0].mode.endswith("A") else "RGB"
    sheet = Image.new(mode, (cols * step_x + _PADDING, rows * step_y + _PADDING), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = _PADDING + i % cols * step_x, _PADDING + i // cols * step_y
        sheet.paste(picture.convert(mode), (x, y))
        for j, text in enumerate(caption.split("\n")):
            draw.text((x, y + height + j * line_height), _cut(text, font, width), "black", font)
    return sheet


def _cut(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
