"""TensorBoard events of a run, on a local disk or on gs://.

The step is the position in kimg, `nimg // 1000`, as in NVIDIA's code, so that curves of both lie on
one axis; ticks shorter than 1 kimg share a step.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

from trainer.core import storage, tfrecord
from trainer.core.errors import DataError
from trainer.telemetry.statsfile import Stat

_CHUNK = 1 << 24  # bytes
_MAX_PIXELS = 2048  # per side: every snapshot is kept in the events, and the PNGs have it whole


def _shown_by(plugin: str) -> tf.compat.v1.SummaryMetadata:
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = plugin
    return metadata


# `tf.summary.scalar` and `tf.summary.image` write the same, but they are in TensorBoard's package,
# which a machine that trains need not have.
_SCALAR = _shown_by("scalars")
_IMAGE = _shown_by("images")  # strings: width, height, PNG


def step_of(nimg: int) -> int:
    """TensorBoard's step for a position in images."""
    return nimg // 1000


# The scalar by which a resumed run knows what to take back: steps are too coarse for it.
_TICK = "Progress/tick"

_NAME = re.compile(r"events\.out\.tfevents\.tick(\d+)\..*")
_NUMBERS = itertools.count()


class TensorBoard:
    """Writes scalars and image grids into one directory.

    Each process of a run has a file of its own, which begins with its first event and has the first
    tick in its name. Events are added to it as `storage.append` does: in an object store no more
    than once a second, and always before a checkpoint counts on them.

    Args:
      logdir: where the event files go.
      resume_tick: the first tick that will be written; what an earlier process wrote from there on
        is taken out.
      names: of the files in `logdir`; looked up if they aren't given.

    Raises:
      StorageError: an earlier event file cannot be replaced.
    """

    def __init__(self, logdir: str, resume_tick: int, names: Iterable[str] | None = None):
        drop_from(logdir, resume_tick, names)
        name = (
            f"events.out.tfevents.tick{resume_tick:09d}.{time.time():.0f}.{socket.gethostname()}."
            f"{os.getpid()}.{next(_NUMBERS)}"
        )
        self._path = storage.join(logdir, name)
        self._head = _framed(
            tf.compat.v1.Event(wall_time=time.time(), file_version="brain.Event:2")
        )

    def scalars(self, stats: Mapping[str, Stat], nimg: int) -> None:
        """Adds the mean of each statistic that was measured: one call a tick.

        They are one event, so a crash leaves all or none of them. `Progress/tick` must be there.
        """
        summary = tf.compat.v1.Summary()
        for name, stat in stats.items():
            if stat.num:
                value = summary.value.add(tag=name, metadata=_SCALAR)
                value.tensor.CopyFrom(tf.make_tensor_proto(stat.mean, tf.float32))
        self._add(summary, nimg)

    def image(self, name: str, image: np.ndarray, nimg: int) -> None:
        """Adds a [H, W, C] uint8 image to the last tick; above 2048 pixels a side it is thinned
        out."""
        thin = -(-max(image.shape[:2]) // _MAX_PIXELS)
        shown = image[::thin, ::thin]
        content = [str(shown.shape[1]), str(shown.shape[0]), tf.io.encode_png(shown).numpy()]
        summary = tf.compat.v1.Summary()
        value = summary.value.add(tag=name, metadata=_IMAGE)
        value.tensor.CopyFrom(tf.make_tensor_proto(content, tf.string))
        self._add(summary, nimg)

    def _add(self, summary: tf.compat.v1.Summary, nimg: int) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), step=step_of(nimg), summary=summary)
        data, self._head = self._head + _framed(event), b""
        storage.append(self._path, data)


def _framed(event: tf.compat.v1.Event) -> bytes:
    return tfrecord.frame(event.SerializeToString())


def drop_from(logdir: str, tick: int, names: Iterable[str] | None = None) -> None:
    """Takes a tick and what follows out of the event files in a directory.

    TensorBoard has a mark for restarts, but not every reader of events minds it, and it speaks of
    steps.

    Args:
      logdir: the directory; it need not exist.
      tick: the first one to drop.
      names: of the files there; looked up if they aren't given.

    Raises:
      StorageError: a file cannot be replaced.
    """
    if names is None:
        names = storage.listdir(logdir) if storage.isdir(logdir) else []
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    late = [match[0] for match in matches if int(match[1]) >= tick]
    storage.remove_files(storage.join(logdir, name) for name in late)
    before = [match for match in matches if int(match[1]) < tick]
    if before:
        # The files' names tell where each begins; all but the last end before this tick.
        last = max(before, key=lambda match: int(match[1]))
        _cut(storage.join(logdir, last[0]), tick)


def _cut(path: str, tick: int) -> None:
    """Drops the end of a file: a tick and what follows, and an event that a crash has torn."""
    kept = 0
    with storage.open_read(path) as file, contextlib.suppress(DataError):
        for payload in tfrecord.read_records(file):
            if _tick_of(tf.compat.v1.Event.FromString(payload)) >= tick:
                break
            kept += len(payload) + tfrecord.OVERHEAD
    if kept < storage.size(path):
        with storage.open_read(path) as file, storage.open_write_atomic(path) as copy:
            for start in range(0, kept, _CHUNK):
                copy.write(file.read(min(_CHUNK, kept - start)))


def _tick_of(event: tf.compat.v1.Event) -> float:
    """The tick that an event tells, -1 if it tells none."""
    for value in event.summary.value:
        if value.tag == _TICK:
            return float(tf.make_ndarray(value.tensor))
    return -1
