"""What tests of training share: a small labelled data set, tiny networks, and eager steps."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.core import storage
from trainer.data import images, manifest, records

COUNT, SHARDS, SIZE = 64, 4, 8
COUNTS = (32, 20, 12)

# The keys of `model` for networks that trace in seconds.
TINY_MODEL: dict[str, Any] = {
    "z_dim": 8,
    "w_dim": 8,
    "mapping_layers": 1,
    "d_mapping_layers": 1,
    "channel_base": 64,
    "channel_max": 8,
}


def picture(rng: np.random.Generator, label: int) -> np.ndarray:
    """uint8 [8, 8, 3]: a bright square on noise; its class is its colour."""
    pixels = rng.integers(0, 100, [SIZE, SIZE, 3])
    top, left = rng.integers(0, SIZE // 2, 2)
    pixels[top : top + 4, left : left + 4, label] = 250
    return pixels.astype(np.uint8)


def write(directory: pathlib.Path, *, seed: int = 0, labelled: bool = True) -> manifest.Manifest:
    """Writes 64 images in four shards, their classes in a fixed random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
    shards, block = [], 8
    for shard, members in enumerate(np.split(labels, SHARDS)):
        name = f"squares-{shard:05d}-of-{SHARDS:05d}.tfrecord"
        with storage.open_write_atomic(str(directory / name)) as file:
            writer = records.ShardWriter(file)
            for number, label in enumerate(members.tolist()):
                buffer = io.BytesIO()
                Image.fromarray(picture(rng, label)).save(buffer, "PNG")
                image = images.EncodedImage(
                    buffer.getvalue(), "png", SIZE, SIZE, 3, False, False, False
                )
                payload = records.encode_record(image, label if labelled else -1, f"{number}.png")
                writer.write(payload)
        index = writer.offsets[::block]
        shards.append(manifest.Shard(name, len(members), writer.bytes, writer.crc32c, index))
    return manifest.save(
        manifest.Manifest(
            name="squares",
            num_images=COUNT,
            resolution=(SIZE, SIZE),
            channels=3,
            label_names=["red", "green", "blue"] if labelled else [],
            label_counts=list(COUNTS) if labelled else [],
            crop="center",
            filter="box",
            background="",
            block=block,
            shards=shards,
        ),
        str(directory),
    )


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """64 images 8x8 of 3 classes (32, 20 and 12 images) in 4 shards."""
    return write(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def other_squares(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """The same but for the pixels."""
    return write(tmp_path_factory.mktemp("other_squares"), seed=1)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> manifest.Manifest:
    """The same without classes."""
    return write(tmp_path_factory.mktemp("unlabelled"), labelled=False)


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Steps that run op by op: right for a few steps, where tracing would take longest."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
