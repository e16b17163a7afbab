"""Taking elements from an iterator that may stand still, without standing still with it."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_TICK_SEC = 1.0


class Fetcher:
    """Takes elements in a thread of its own, one ahead.

    The one who waits stays in charge: signals are served, and waiting can end in an error, while
    the thread sits in a read that nothing can interrupt. The thread ends with the iterator's first
    error, or when nobody has the fetcher any more.

    Args:
      iterator: endless, and not used by others from now on.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._found: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        gone = threading.Event()
        weakref.finalize(self, _end, gone, self._room)
        # A daemon: a read that stands still must not keep the process from ending.
        threading.Thread(
            target=_fetch, args=(iterator, self._found, self._room, gone), daemon=True
        ).start()

    def next(self, waiting: Callable[[float], None]) -> Any:
        """The next element.

        Args:
          waiting: called about every second with the seconds since the call before, at most two
            (a process that was paused did not wait); what it raises ends the wait.

        Raises:
          Exception: what the iterator raised; the fetcher is of no more use then.
        """
        while True:
            start = time.monotonic()
            try:
                element, error = self._found.get(timeout=_TICK_SEC)
            except queue.Empty:
                waiting(min(time.monotonic() - start, 2 * _TICK_SEC))
                continue
            if error is not None:
                raise error
            self._room.release()
            return element


def _end(gone: threading.Event, room: threading.Semaphore) -> None:
    gone.set()
    room.release()


def _fetch(
    iterator: Iterator[Any],
    found: queue.SimpleQueue[tuple[Any, Exception | None]],
    room: threading.Semaphore,
    gone: threading.Event,
) -> None:
    # A function that knows nothing of the fetcher, which could never be collected otherwise.
    while True:
        room.acquire()
        if gone.is_set():
            return
        try:
            element = next(iterator)
        except Exception as error:
            found.put((None, error))
            return
        found.put((element, None))
        del element  # the next may take its memory
