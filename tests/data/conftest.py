"""Small data sets made on the spot: every image tells its own number."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from trainer.core import storage
from trainer.data import images, manifest, records


def numbered_pixels(number: int, height: int = 2, width: int = 3) -> np.ndarray:
    """uint8 [H, W, 3]: the first pixel's red and green are the number, all columns differ."""
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    pixels[0, 0, :2] = divmod(number, 256)
    return pixels


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def numbered_payload(number: int, label: int, source: str = "") -> bytes:
    pixels = numbered_pixels(number)
    image = images.EncodedImage(png(pixels), "png", *pixels.shape, False, False, False)
    return records.encode_record(image, label, source or f"{number}.png")


Build = Callable[..., manifest.Manifest]


def _build(
    directory: pathlib.Path,
    counts: Sequence[int],
    *,
    block: int = 64,
    classes: int = 0,
    payloads: dict[int, bytes] | None = None,
) -> manifest.Manifest:
    """Writes shards of numbered images; image n has class n mod classes, or no label."""
    shards = []
    number = 0
    labels = []
    for place, count in enumerate(counts):
        name = f"set-{place:05d}-of-{len(counts):05d}.tfrecord"
        with storage.open_write_atomic(str(directory / name)) as file:
            writer = records.ShardWriter(file)
            for _ in range(count):
                labels.append(number % classes if classes else -1)
                payload = numbered_payload(number, labels[-1])
                writer.write((payloads or {}).get(number, payload))
                number += 1
        index = writer.offsets[::block]
        shards.append(manifest.Shard(name, count, writer.bytes, writer.crc32c, index))
    return manifest.save(
        manifest.Manifest(
            name="set",
            num_images=number,
            resolution=(2, 3),
            channels=3,
            label_names=[f"class {n}" for n in range(classes)],
            label_counts=[labels.count(n) for n in range(classes)],
            crop="center",
            filter="box",
            background="",
            block=block,
            shards=shards,
        ),
        str(directory),
    )


@pytest.fixture(scope="session")
def build() -> Build:
    """`_build`, as fixtures are the way to share code between test modules."""
    return _build


@pytest.fixture(scope="session")
def pixels_of() -> Callable[[int], np.ndarray]:
    """`numbered_pixels`."""
    return numbered_pixels


@pytest.fixture(scope="session")
def payload_of() -> Callable[..., bytes]:
    """`numbered_payload`."""
    return numbered_payload
