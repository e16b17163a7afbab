"""Waiting for an iterator without being at its mercy."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from trainer.data import fetch, pipeline


def no_wait(seconds: float) -> None:
    raise AssertionError(f"waited for {seconds}")


def test_elements_come_in_order_and_one_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    fetcher = fetch.Fetcher(numbers())
    assert [fetcher.next(no_wait) for _ in range(100)] == list(range(100))
    ends = time.monotonic() + 10
    while len(made) < 101 and time.monotonic() < ends:
        time.sleep(0.01)
    time.sleep(0.1)  # in which one too many would be made
    assert made == list(range(101))


def test_errors_come_in_their_turn() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    fetcher = fetch.Fetcher(failing())
    assert fetcher.next(no_wait) == 1
    with pytest.raises(KeyError, match="two"):
        fetcher.next(no_wait)


def stuck(end: threading.Event) -> Iterator[int]:
    end.wait()
    yield 7


def test_who_waits_hears_of_it_and_may_give_up(monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_TICK_SEC", 0.01)
    end = threading.Event()
    fetcher = fetch.Fetcher(stuck(end))
    seconds: list[float] = []

    def thrice(waited: float) -> None:
        seconds.append(waited)
        if len(seconds) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        fetcher.next(thrice)
    # A busy machine, or one that paused the process, makes no long wait of a short one.
    assert all(0.009 < waited <= 0.02 for waited in seconds)
    end.set()
    assert fetcher.next(lambda waited: None) == 7


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


def test_the_thread_ends_with_the_fetcher() -> None:
    before = threads()
    fetcher = fetch.Fetcher(itertools.count())
    assert fetcher.next(no_wait) == 0
    (own,) = threads() - before
    assert own.daemon
    del fetcher
    own.join(5)
    assert not own.is_alive()


def test_the_thread_ends_with_the_stream(build, tmp_path) -> None:
    """Which nothing may keep alive, the functions of its dataset least of all."""
    before = threads()
    stream = pipeline.ImageStream(build(tmp_path, [9]), group_size=2, groups_per_batch=1, seed=0)
    next(stream)
    (own,) = threads() - before
    del stream
    own.join(5)
    assert not own.is_alive()
