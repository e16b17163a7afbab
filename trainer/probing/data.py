"""Speed of the input pipeline, against decoding alone on the same bytes and processors.

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
from trainer.core import tfrecord
from trainer.data import lanes, pipeline, shards
from trainer.data.manifest import Manifest
from trainer.data.shards import BadRecords

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
    """The rates at one number of concurrent requests.

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


def measure_reading(
    manifest: Manifest, bad_records: BadRecords | None = None, *, seconds: float = 10.0
) -> list[Reading]:
    """Times reading alone, from random places of all shards, without decoding.

    Args:
      manifest: the data set.
      bad_records: how many damaged records may be left out; by default none. What is read together
        with one doesn't count.
      seconds: to measure for, in all.

    Returns:
      one for each of READERS and, of BLOCKS times the data set's own block, those sizes that its
      shards have; the size changes slowest.
    """
    shortest = min(len(shard.index) for shard in manifest.shards)
    sizes = [blocks for blocks in BLOCKS if blocks <= shortest]
    each = seconds / len(sizes) / len(READERS)
    bad = bad_records or BadRecords(manifest)
    return [_time_reading(manifest, bad, n, blocks, each) for blocks in sizes for n in READERS]


def _time_reading(
    manifest: Manifest, bad_records: BadRecords, readers: int, blocks: int, seconds: float
) -> Reading:
    rng = np.random.default_rng(0)
    places = []
    for number, shard in enumerate(manifest.shards):
        ends = [*shard.index, shard.bytes]
        for first in range(0, len(shard.index) - blocks + 1, blocks):
            length = ends[first + blocks] - ends[first]
            places.append((number, first, ends[first], length))
    places = [places[n] for n in rng.permutation(len(places))]
    numbers, firsts, offsets, lengths = (list(part) for part in zip(*places, strict=True))
    paths = [manifest.path(number) for number in numbers]
    records_each = blocks * manifest.block

    def read(place: tf.Tensor, path: tf.Tensor, offset: tf.Tensor) -> tf.data.Dataset:
        found = lanes.records_from(path, offset, lanes.buffer_bytes(manifest, blocks))
        whole = found.take(records_each).batch(records_each)
        sizes = whole.map(lambda each: (tf.size(each), tf.reduce_sum(tf.strings.length(each))))
        # Whatever cannot be read gives nothing; `look` finds out why.
        nothing = tf.data.Dataset.from_tensors((tf.constant(0), tf.constant(0)))
        given = sizes.ignore_errors().concatenate(nothing).take(1)
        return given.map(lambda count, size: (place, count, size))

    def look(place: int) -> None:
        """Counts damaged records; raises what else makes a place unreadable."""
        for block in range(firsts[place], firsts[place] + blocks):
            bad_records.records(numbers[place], block)

    dataset = tf.data.Dataset.from_tensor_slices(
        (range(len(paths)), paths, tf.constant(offsets, tf.int64))
    )
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
    # On however busy a machine: until something has been read.
    while (elapsed := time.perf_counter() - start) < seconds or not images:
        place, count, size = (int(each) for each in next(iterator))
        if size + count * tfrecord.OVERHEAD != lengths[place]:
            look(place)
            continue
        images, total = images + count, total + size
    return Reading(readers, sum(lengths) / len(lengths), total / elapsed, images / elapsed)


def measure(
    stream: pipeline.ImageStream,
    manifest: Manifest,
    bad_records: BadRecords | None = None,
    *,
    seconds: float = 10.0,
) -> Speed:
    """Times a stream and bare decoding in turns, so that other load on the machine hits both.

    Args:
      stream: the pipeline; it is advanced.
      manifest: the stream's data set.
      bad_records: how many damaged records may be left out; by default none.
      seconds: to measure for, in all.
    """
    groups, size = stream.element_spec[1].shape
    contenders = [
        (iter(stream), groups * size),
        (iter(_bare(manifest, bad_records or BadRecords(manifest))), _CALL),
    ]
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
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        next(iterator)
        count += images
    return count / elapsed


def _bare(manifest: Manifest, bad_records: BadRecords) -> tf.data.Dataset:
    """Nothing but decoding, from memory, in calls of many images on all processors."""
    encoded: list[bytes] = []
    for block in range(len(manifest.shards[0].index)):
        for payload in bad_records.records(0, block):
            example = tf.train.Example.FromString(payload)
            encoded.append(example.features.feature["image/encoded"].bytes_list.value[0])
        if len(encoded) >= _SAMPLES:
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
