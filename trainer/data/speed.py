"""How fast the input pipeline is, against decoding alone on the same bytes and processors.

And how fast the storage is, by requests at a time and by their size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import data
from trainer.core import storage, tfrecord
from trainer.data import pipeline, shards
from trainer.data.manifest import Manifest

READERS = (1, 4, 16, 64)
BLOCKS = (1, 4, 16)

_ROUNDS = 3
_CALL = 64
_SAMPLES = 4096


@dataclass(frozen=True)
class Speed:
    """Images per second: of the pipeline, and of `tf.io.decode_jpeg` alone."""

    pipeline: float
    decode: float

    @property
    def share(self) -> float:
        """The pipeline's part of what decoding alone reaches."""
        return self.pipeline / self.decode


@dataclass(frozen=True)
class Reading:
    """What so many requests at a time give.

    Attributes:
      readers: requests at a time.
      block_bytes: read at a time, on average.
      bytes: per second.
      images: per second.
    """

    readers: int
    block_bytes: float
    bytes: float
    images: float


def measure_reading(manifest: Manifest, *, seconds: float = 10.0) -> list[Reading]:
    """Times reading alone, from random places of all shards, without decoding.

    Args:
      manifest: the data set.
      seconds: to measure for, in all.

    Returns:
      one for each of READERS and, of BLOCKS times the data set's own block, those sizes that its
      shards have; the size changes slowest.
    """
    shortest = min(len(shard.index) for shard in manifest.shards)
    sizes = [blocks for blocks in BLOCKS if blocks <= shortest]
    each = seconds / len(sizes) / len(READERS)
    return [_time_reading(manifest, n, blocks, each) for blocks in sizes for n in READERS]


def _time_reading(manifest: Manifest, readers: int, blocks: int, seconds: float) -> Reading:
    draw = np.random.default_rng(0)
    places = []
    for number, shard in enumerate(manifest.shards):
        ends = [*shard.index, shard.bytes]
        for first in range(0, len(shard.index) - blocks + 1, blocks):
            length = ends[first + blocks] - ends[first]
            places.append((manifest.path(number), ends[first], length))
    places = [places[n] for n in draw.permutation(len(places))]
    paths, offsets, lengths = (list(part) for part in zip(*places, strict=True))
    records_each = blocks * manifest.block

    def read(path: tf.Tensor, offset: tf.Tensor) -> tf.data.Dataset:
        found = pipeline.records_from(path, offset, pipeline.buffer_bytes(manifest, blocks))
        whole = found.take(records_each).batch(records_each)
        return whole.map(lambda each: (tf.size(each), tf.reduce_sum(tf.strings.length(each))))

    dataset = tf.data.Dataset.from_tensor_slices((paths, tf.constant(offsets, tf.int64)))
    dataset = dataset.repeat().interleave(
        read,
        cycle_length=readers,
        block_length=1,
        num_parallel_calls=readers,
        deterministic=False,
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    iterator = iter(dataset.with_options(options))
    next(iterator)
    images = total = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count, size = next(iterator)
        images, total = images + int(count), total + int(size)
    return Reading(readers, sum(lengths) / len(lengths), total / elapsed, images / elapsed)


def measure(stream: pipeline.ImageStream, manifest: Manifest, *, seconds: float = 10.0) -> Speed:
    """Times a stream and bare decoding in turns, so that other load on the machine hits both.

    Args:
      stream: the pipeline; it is advanced.
      manifest: the stream's data set.
      seconds: to measure for, in all.
    """
    groups, size = stream.element_spec[1].shape
    contenders = [(iter(stream), groups * size), (iter(_bare(manifest)), _CALL)]
    best = [0.0, 0.0]
    for iterator, _ in contenders:
        next(iterator)
    for _ in range(_ROUNDS):
        for place, (iterator, images) in enumerate(contenders):
            rate = _rate(iterator, images, seconds / _ROUNDS / len(contenders))
            best[place] = max(best[place], rate)
    return Speed(pipeline=best[0], decode=best[1])


def _rate(iterator: Iterator[Any], images: int, seconds: float) -> float:
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(iterator)
        count += images
    return count / elapsed


def _bare(manifest: Manifest) -> tf.data.Dataset:
    """Nothing but decoding, from memory, in calls of many images on all processors."""
    encoded: list[bytes] = []
    with storage.open_read(manifest.path(0)) as file:
        for payload in tfrecord.read_records(file):
            example = tf.train.Example.FromString(payload)
            encoded.append(example.features.feature["image/encoded"].bytes_list.value[0])
            if len(encoded) == _SAMPLES:
                break
    calls = [
        [encoded[(start + n) % len(encoded)] for n in range(_CALL)]
        for start in range(0, len(encoded), _CALL)
    ]

    def decode(names: tf.Tensor) -> list[tf.Tensor]:
        return [shards.decode(each) for each in tf.unstack(names, _CALL)]

    dataset = tf.data.Dataset.from_tensor_slices(calls).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = data.processors()
    return dataset.map(decode, num_parallel_calls=data.processors()).with_options(options)
