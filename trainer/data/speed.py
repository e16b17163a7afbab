"""How fast the input pipeline is, against decoding alone on the same bytes and processors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer import data
from trainer.core import storage
from trainer.data import pipeline, records
from trainer.data.manifest import Manifest

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


def measure(stream: pipeline.ImageStream, manifest: Manifest, *, seconds: float = 10.0) -> Speed:
    """Times a stream and bare decoding in turns, so that other load on the machine hits both.

    Args:
      stream: the pipeline; it is advanced.
      manifest: the stream's data set.
      seconds: to measure for, in all.
    """
    groups, size = stream.dataset.element_spec[1].shape
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
        for payload in records.read_records(file):
            example = tf.train.Example.FromString(payload)
            encoded.append(example.features.feature["image/encoded"].bytes_list.value[0])
            if len(encoded) == _SAMPLES:
                break
    calls = [
        [encoded[(start + n) % len(encoded)] for n in range(_CALL)]
        for start in range(0, len(encoded), _CALL)
    ]

    def decode(names: tf.Tensor) -> list[tf.Tensor]:
        return [pipeline.decode(each) for each in tf.unstack(names, _CALL)]

    dataset = tf.data.Dataset.from_tensor_slices(calls).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = data.processors()
    return dataset.map(decode, num_parallel_calls=data.processors()).with_options(options)
