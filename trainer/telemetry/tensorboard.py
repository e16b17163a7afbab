"""TensorBoard events of a run, on a local disk or on gs://.

The step is the position in whole kimg, `nimg // 1000`, as in NVIDIA's code, so that curves of both lie
on one axis. TensorBoard's steps are whole numbers: a run whose ticks are shorter than 1 kimg counts
images instead, so that they stay apart.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from trainer.core import storage, tfrecord
from trainer.core.errors import DataError
from trainer.telemetry.descriptions import describe
from trainer.telemetry.statsfile import Stat

_MAX_PIXELS = 2048  # per side: every snapshot is kept in the events, and the PNGs have it whole


# What these write is what `tf.summary.scalar`, `.image` and `.text` do, but they are in TensorBoard's
# package, which a machine that trains need not have.
def _shown_by(plugin: str, description: str = "") -> tf.compat.v1.SummaryMetadata:
    metadata = tf.compat.v1.SummaryMetadata(summary_description=description)
    metadata.plugin_data.plugin_name = plugin
    return metadata


# The scalar by which a resumed run knows what to take back: steps are too coarse for it.
_TICK = "Progress/tick"

_NAME = re.compile(r"events\.out\.tfevents\.tick(\d+)\.(?:([0-9a-f]{8})\.)?.*")
_NUMBERS = itertools.count()


class TensorBoard:
    """Writes scalars and image grids into one directory.

    Each process of a run has a file of its own, which has the first tick and the run in its name. It
    is there before the first event is, so that a process that comes too late with its first one
    makes no file, and is gone if there was none. Events are added to it as
    `storage.AppendedFile` does: in an object store no more than once a second, and always before a
    checkpoint counts on them.

    Args:
      logdir: where the event files go.
      resume_tick: the first tick that will be written; what earlier processes of the run wrote from
        there on is taken out.
      sizes: bytes of the files in `logdir`, by name; looked up if they aren't given.
      run: tells this run from others that may write there; '' if none may.
      images_per_step: 1000 for steps in kimg, 1 for steps in images.
      fence: around every change.

    Raises:
      StorageError: an earlier event file cannot be replaced.
    """

    def __init__(
        self,
        logdir: str,
        resume_tick: int,
        sizes: Mapping[str, int] | None = None,
        *,
        run: str = "",
        images_per_step: int = 1000,
        fence: storage.Fence = contextlib.nullcontext,
    ):
        drop_from(logdir, resume_tick, sizes, mark=mark(run) if run else "", fence=fence)
        name = (
            f"events.out.tfevents.tick{resume_tick:09d}.{mark(run)}.{time.time():.0f}."
            f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        )
        self._path, self._fence, self._empty = storage.join(logdir, name), fence, True
        self._file = storage.AppendedFile(self._path, _head(), None, fence)
        self._images_per_step = images_per_step
        self._described: set[str] = set()  # readers take it from the first event of a file

    def flush(self) -> None:
        """Writes what is held back."""
        self._file.flush()

    def close(self) -> None:
        """The same; without any event the file is removed."""
        self.flush()
        if self._empty:
            with self._fence():
                storage.remove(self._path)

    def scalars(self, stats: Mapping[str, Stat], nimg: int) -> None:
        """Adds the mean of each statistic that was measured, and says what it is: one call a tick.

        They are one event, so a crash leaves all or none of them. `Progress/tick` must be there.
        """
        summary = tf.compat.v1.Summary()
        for name, stat in stats.items():
            if stat.num:
                text = "" if name in self._described else describe(name)
                self._described.add(name)
                value = summary.value.add(tag=name, metadata=_shown_by("scalars", text))
                value.tensor.CopyFrom(tf.make_tensor_proto(stat.mean, tf.float32))
        self._add(summary, nimg)

    def image(self, name: str, image: np.ndarray, nimg: int) -> None:
        """Adds a [H, W, C] uint8 image to the last tick; above 2048 pixels a side it is thinned
        out."""
        thin = -(-max(image.shape[:2]) // _MAX_PIXELS)
        shown = image[::thin, ::thin]
        # As the plugin wants it: width, height, PNG.
        content = [str(shown.shape[1]), str(shown.shape[0]), tf.io.encode_png(shown).numpy()]
        summary = tf.compat.v1.Summary()
        value = summary.value.add(tag=name, metadata=_shown_by("images"))
        value.tensor.CopyFrom(tf.make_tensor_proto(content, tf.string))
        self._add(summary, nimg)

    def text(self, name: str, markdown: str, nimg: int) -> None:
        """Adds a text in Markdown to the last tick."""
        summary = tf.compat.v1.Summary()
        value = summary.value.add(tag=name, metadata=_shown_by("text"))
        value.tensor.CopyFrom(tf.make_tensor_proto(markdown, tf.string))
        self._add(summary, nimg)

    def _add(self, summary: tf.compat.v1.Summary, nimg: int) -> None:
        step = nimg // self._images_per_step
        event = tf.compat.v1.Event(wall_time=time.time(), step=step, summary=summary)
        self._empty = False
        self._file.add(_framed(event))


def _framed(event: tf.compat.v1.Event) -> bytes:
    return tfrecord.frame(event.SerializeToString())


def _head() -> bytes:
    """With what an event file begins; its size is always the same."""
    return _framed(tf.compat.v1.Event(wall_time=time.time(), file_version="brain.Event:2"))


def drop_from(
    logdir: str,
    tick: int,
    sizes: Mapping[str, int] | None = None,
    *,
    mark: str = "",
    fence: storage.Fence = contextlib.nullcontext,
) -> None:
    """Takes a tick and what follows out of a run's event files in a directory.

    TensorBoard has a mark for restarts, but not every reader of events minds it, and it speaks of
    steps.

    Args:
      logdir: the directory; it need not exist.
      tick: the first one to drop.
      sizes: bytes of the files there, by name; looked up if they aren't given.
      mark: in the names of the run's files; '' if there are no other runs' files.
      fence: around every change.

    Raises:
      StorageError: a file cannot be replaced.
    """
    if sizes is None:
        sizes = {name: digest.bytes for name, digest in storage.walk(logdir).items()}
    starts = {name: int(match[1]) for name in sizes if (match := own(name, mark))}
    # A file without an event may have come late, and says nothing of where others end.
    late = [n for n, start in starts.items() if start >= tick or sizes[n] <= len(_head())]
    if not mark:
        late += filter(storage.TAIL.fullmatch, sizes)
    if late:
        with fence():
            storage.remove_files(storage.join(logdir, name) for name in late)
    before = {name: start for name, start in starts.items() if name not in late}
    # The files' names tell where each begins; all but the last end before this tick.
    last = max(before.values(), default=0)
    for name, start in before.items():
        if start == last:
            _cut(storage.join(logdir, name), tick, fence)


def mark(run: str) -> str:
    """The part common to the names of a run's event files: 8 hexadecimal digits."""
    return f"{zlib.crc32(run.encode()):08x}"


def own(name: str, mark: str) -> re.Match[str] | None:
    """The match of an event file's name if it is a run's; its first group is the tick."""
    match = _NAME.fullmatch(name)
    return match if match and (not mark or match[2] == mark) else None


def _cut(path: str, tick: int, fence: storage.Fence) -> None:
    """Drops the end of a file: a tick and what follows, and an event that a crash has torn.

    Readers stop at a damaged event. What is whole behind it moves up. Where there is nothing to drop it is written anew all the same, so that a process that was
    paused, and comes to add an event, finds another file.
    """
    kept, version = 0, storage.version(path)
    try:
        with storage.open_read(path) as file:
            for payload in _before(tick, tfrecord.read_records(file)):
                kept += len(payload) + tfrecord.OVERHEAD
    except DataError:
        content = storage.read_bytes(path)
        behind = list(_before(tick, tfrecord.whole_records(content[kept:])))
        if behind:
            start = content[:kept] or _head()
            whole = b"".join(map(tfrecord.frame, behind))
            storage.AppendedFile(path, start + whole, version, fence)
            return
    storage.shorten(path, kept, version, fence)


def _before(tick: int, payloads: Iterable[bytes]) -> Iterator[bytes]:
    """The events that come before a tick."""
    for payload in payloads:
        if _tick_of(tf.compat.v1.Event.FromString(payload)) >= tick:
            return
        yield payload


def _tick_of(event: tf.compat.v1.Event) -> float:
    """The tick that an event tells, -1 if it tells none."""
    for value in event.summary.value:
        if value.tag == _TICK:
            return float(tf.make_ndarray(value.tensor))
    return -1
