"""Encoding of a source's images to records, in this process or in several."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from trainer.core import tensorflow_log
from trainer.core.errors import DataError, TrainerError
from trainer.data import images, records, sources

_READERS = 8  # requests to an object store at a time


@dataclass(frozen=True)
class Task:
    """An image to convert.

    Attributes:
      name: its path in the source.
      member: where it lies in an archive; None in a folder.
      label: its class, -1 for none.
    """

    name: str
    member: sources.Member | None
    label: int


@dataclass(frozen=True)
class Done:
    """One task's outcome: a record's payload, or the reason why there is none."""

    payload: bytes | None
    reason: str = ""
    channels: int = 0
    kept: bool = False
    enlarged: bool = False
    stretched: bool = False


def encode_all(
    tasks: list[Task], reader: sources.Reader, options: images.ImageOptions
) -> list[Done]:
    """`encode` of several images; from an object store, whose answers take time, several at once."""
    if not reader.remote or len(tasks) == 1:
        return [encode(task, reader, options) for task in tasks]
    with futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda task: encode(task, reader, options), tasks))


def encode(task: Task, reader: sources.Reader, options: images.ImageOptions) -> Done:
    """One image's record; the same wherever and however often it is made.

    Raises:
      StorageError: the object store did not give it.
    """
    try:
        image = images.encode(reader.read(task.name, task.member), options)
    except DataError as error:
        return Done(None, reason=str(error))
    return Done(
        payload=records.encode_record(image, task.label, task.name),
        channels=image.channels,
        kept=image.kept,
        enlarged=image.enlarged,
        stretched=image.stretched,
    )


def encode_in_processes(
    chunks: Iterable[list[Task]], path: str, options: images.ImageOptions, workers: int
) -> Generator[tuple[Task, Done], None, None]:
    """The outcomes of images, in order, a bounded number under way.

    Args:
      chunks: what goes to a process at a time.
      path: of the source.
      options: how each image is made.
      workers: processes; 1 is this one.

    Raises:
      TrainerError: a process died.
      StorageError: the object store did not give an image.
    """
    if workers == 1:
        reader = sources.Reader(path)
        for chunk in chunks:
            yield from zip(chunk, encode_all(chunk, reader, options), strict=True)
        return
    with _signals_held():
        executor = futures.ProcessPoolExecutor(
            workers,
            # A fork of a process that has threads (fsspec's, a test runner's) can hang.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(path, options),
        )
    with executor as pool:
        under_way: collections.deque[tuple[list[Task], futures.Future[list[Done]]]]
        under_way = collections.deque()
        try:
            for chunk in chunks:
                with _signals_held():  # it may start a process
                    future = pool.submit(_encode_chunk, chunk)
                under_way.append((chunk, future))
                if len(under_way) > 2 * workers + 2:
                    yield from _take(under_way.popleft())
            while under_way:
                yield from _take(under_way.popleft())
        except BrokenProcessPool as error:
            raise TrainerError(
                "a worker process died, perhaps for want of memory; run the same command with "
                "fewer --workers, and it goes on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _take(
    item: tuple[list[Task], futures.Future[list[Done]]],
) -> Iterator[tuple[Task, Done]]:
    chunk, future = item
    return zip(chunk, future.result(), strict=True)


_worker: tuple[sources.Reader, images.ImageOptions]


def _set_up_worker(path: str, options: images.ImageOptions) -> None:
    global _worker
    _worker = sources.Reader(path), options


_FOR_THE_PARENT = {
    signal.SIGINT,
    signal.SIGHUP,
}  # which stops the pool; a terminal sends them to all
_HELD = _FOR_THE_PARENT | {signal.SIGTERM}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Keeps signals back while processes are started, which begin with what is blocked here."""
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        # Blocking doesn't suffice: the signal would come by another thread.
        handlers = {
            number: signal.signal(number, lambda number, _: came.append(number))
            for number in _HELD
            if signal.getsignal(number) != signal.SIG_IGN
        }
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _start_worker(path: str, options: images.ImageOptions) -> None:
    tensorflow_log.hide_start_up()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD - _FOR_THE_PARENT)
    _set_up_worker(path, options)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_chunk(chunk: list[Task]) -> list[Done]:
    reader, options = _worker
    return encode_all(chunk, reader, options)
