"""TensorBoard events of a run, on a local disk or on gs://.

The step is the position in kimg, `nimg // 1000`, as in NVIDIA's code, so that curves of both lie on
one axis; ticks shorter than 1 kimg share a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf

from trainer.core import storage
from trainer.telemetry.statsfile import Stat

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


class TensorBoard:
    """Writes scalars and image grids into one directory.

    Args:
      logdir: where the event files go.
      resume_nimg: where the run goes on, in images; what an earlier process wrote for later steps
        is taken out.

    Raises:
      StorageError: an earlier event file cannot be replaced.
    """

    def __init__(self, logdir: str, resume_nimg: int):
        drop_after(logdir, step_of(resume_nimg) if resume_nimg else -1)
        self._writer = tf.summary.create_file_writer(logdir)

    def scalars(self, stats: Mapping[str, Stat], nimg: int) -> None:
        """Adds the mean of each statistic that was measured, and flushes: one call a tick."""
        with self._writer.as_default(step=step_of(nimg)):
            for name, stat in stats.items():
                if stat.num:
                    tf.summary.write(name, tf.constant(stat.mean, tf.float32), metadata=_SCALAR)
        self._writer.flush()

    def image(self, name: str, image: np.ndarray, nimg: int) -> None:
        """Adds a [H, W, C] uint8 image; above 2048 pixels a side it is thinned out."""
        thin = -(-max(image.shape[:2]) // _MAX_PIXELS)
        shown = image[::thin, ::thin]
        size = [str(shown.shape[1]), str(shown.shape[0])]
        with self._writer.as_default(step=step_of(nimg)):
            tf.summary.write(name, tf.stack([*size, tf.io.encode_png(shown)]), metadata=_IMAGE)

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


def drop_after(logdir: str, step: int) -> None:
    """Takes what follows a step out of the event files in a directory.

    TensorBoard has a mark for restarts, but not every reader of events minds it, and
    `tf.summary.create_file_writer` cannot write it.

    Args:
      logdir: the directory; it need not exist.
      step: the last one to keep.

    Raises:
      StorageError: a file cannot be replaced.
    """
    names = storage.listdir(logdir) if storage.isdir(logdir) else []
    for name in names:
        if "tfevents" not in name:
            continue
        path = storage.join(logdir, name)
        if all(event.step <= step for event in _events(path)):
            continue
        kept = storage.join(logdir, f"kept-{name.replace('tfevents', 'partial')}")
        with tf.io.TFRecordWriter(kept) as writer:
            for event in _events(path):
                if event.step <= step:
                    writer.write(event.SerializeToString())
        storage.rename(kept, path)


def _events(path: str) -> Iterator[tf.compat.v1.Event]:
    """The events of a file, as far as it is whole: a crash can tear the last one."""
    try:
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            yield tf.compat.v1.Event.FromString(record)
    except tf.errors.DataLossError:
        return
