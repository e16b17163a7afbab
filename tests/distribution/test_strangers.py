"""Who connects while workers gather, and what comes over their connections later on."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.core.errors import PreemptedError, TrainerError
from trainer.distribution import meeting
from trainer.distribution import membership as membership_lib
from trainer.distribution.cluster import Cluster, PeerError
from trainer.distribution.membership import Membership

OWN = {"trainer": "1", "config": "c0ffee"}
LONG = 120.0  # seconds: how long a busy machine may take for what should come at once


def hello(index: Any, identity: Any = None) -> bytes:
    return json.dumps({"index": index, "identity": identity or OWN}).encode() + b"\n"


class Gathering:
    """A chief that gathers in a thread of its own, and what came of it."""

    def __init__(self, workers: int, limit: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        names = tuple(f"worker:{index}" for index in range(workers))
        addresses = tuple(f"127.0.0.1:{self.port}" for _ in range(workers))
        self._cluster = Cluster("TF_CONFIG", names, addresses, 0)
        self.lines: dict[int, meeting.Line] = {}
        self.error: TrainerError | None = None
        self._sockets = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, args=(limit,))
        self._thread.start()

    def _run(self, limit: float) -> None:
        try:
            self.lines = meeting.gather(self._cluster, OWN, limit)
        except TrainerError as error:
            self.error = error

    def connect(self) -> socket.socket:
        ends = time.monotonic() + LONG
        while True:
            try:
                found = socket.create_connection(("127.0.0.1", self.port), LONG)
                return self._sockets.enter_context(found)
            except ConnectionRefusedError:  # it doesn't listen yet
                assert time.monotonic() < ends
                time.sleep(0.01)

    def wait(self) -> None:
        self._thread.join(LONG)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.wait()
        self._sockets.close()
        for line in self.lines.values():
            line.close()


@contextlib.contextmanager
def gathering(workers: int, limit: float = LONG) -> Iterator[Gathering]:
    found = Gathering(workers, limit)
    try:
        yield found
    finally:
        found.close()


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it, which is waited for."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


STRANGERS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\n" * 3,
    b"\0" * 100 + b"\n",
    b"x" * (1 << 17),
    b"[" * 60_000 + b"\n",
    b"{}\n",
    b"[1]\n",
    b"NaN\n",
    b'{"index": NaN}\n',
    b'{"index": 1}\n',
    b'{"index": 1, "identity": {"trainer": ' + b"1" * 5000 + b"}}\n",
    b'{"index": 1, "identity": {}}\n',
    b'{"index": 1, "identity": {"trainer": 1}}\n',
    *map(hello, ([], {}, True, 1.0, "1", None, -1, 0, 2, 10**9)),
    hello(1, [1]),
    hello(1) + b'{"go": true}\n',
    hello(1).replace(b"1,", b"1" * 5000 + b",", 1),
    b"\xff\xfe\n",
    b"\n",
]


def test_strangers_are_passed_over() -> None:
    """One after the other, then the worker, which is taken."""
    with gathering(2) as chief:
        for stranger in STRANGERS:
            connection = chief.connect()
            with contextlib.suppress(ConnectionError):  # closed before all is sent
                connection.sendall(stranger)
            assert is_closed(connection), stranger[:60]
        worker = chief.connect()
        worker.sendall(hello(1))
        assert json.loads(worker.recv(100)) == {"go": True}
        chief.wait()
        assert (set(chief.lines), chief.error) == ({1}, None)


def test_nobody_waits_for_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for who says a byte now and then: all connections are served at once."""
    monkeypatch.setattr(meeting, "_HELLO_SEC", 10 * LONG)
    with gathering(3) as chief:
        silent = [chief.connect() for _ in range(10)]
        for connection in silent[:5]:
            connection.sendall(b"{")
        workers = [chief.connect(), chief.connect()]
        for index, worker in enumerate(workers):
            worker.sendall(hello(index + 1)[:5])
        for index, worker in enumerate(workers):
            worker.sendall(hello(index + 1)[5:])
        chief.wait()
        assert (set(chief.lines), chief.error) == ({1, 2}, None)
        assert all(map(is_closed, silent))


def test_who_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_HELLO_SEC", 0.2)
    with gathering(2) as chief:
        assert is_closed(chief.connect())
        chief.connect().sendall(hello(1))


def test_a_flood_of_connections_takes_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "_HELLO_SEC", 10 * LONG)
    monkeypatch.setattr(meeting, "_MOST_WAITING", 4)
    with gathering(2) as chief:
        flood = [chief.connect() for _ in range(20)]
        assert all(map(is_closed, flood[:16]))
        chief.connect().sendall(hello(1))
        chief.wait()
        assert set(chief.lines) == {1}


def test_a_second_hello_changes_nothing_while_the_first_is_there() -> None:
    with gathering(3) as chief:
        first = chief.connect()
        first.sendall(hello(1))
        second = chief.connect()
        second.sendall(hello(1, {"trainer": "2"}))
        assert is_closed(second)
        chief.connect().sendall(hello(2))
        chief.wait()
        assert (set(chief.lines), chief.error) == ({1, 2}, None)
        assert json.loads(first.recv(100)) == {"go": True}


def test_a_worker_that_ends_while_others_are_awaited_may_come_again() -> None:
    with gathering(3) as chief:
        first = chief.connect()
        first.sendall(hello(1))
        first.shutdown(socket.SHUT_WR)
        assert is_closed(first)
        again = chief.connect()
        again.sendall(hello(1))
        chief.connect().sendall(hello(2))
        chief.wait()
        assert json.loads(again.recv(100)) == {"go": True}


def test_what_is_missing_names_who_came_instead() -> None:
    with gathering(2, limit=3) as chief:
        stranger = chief.connect()
        stranger.sendall(b"GET /\x1b[2J HTTP/1.1\r\n")
        assert is_closed(stranger)
        chief.wait()
        assert isinstance(chief.error, PeerError)
        text = str(chief.error)
        assert "missing after 3 s: worker:1" in text
        assert "1 other connections, the last from" in text
        assert "said something else than a worker" in text
        assert text.isprintable()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n", b"{}\n", b'{"go": 1}\n', b'{"stop": 5}\n', b'{"stop": "x"}\n',
     b'{"stop": "x", "code": 0}\n', b'{"stop": "x", "code": "2"}\n', b"x" * 100_000, b"[" * 60_000],
)  # fmt: skip
def test_something_else_answers_in_the_chiefs_place(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.sendall(answer)
                    connection.recv(1000)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = f"127.0.0.1:{free.getsockname()[1]}"
        cluster = Cluster("TF_CONFIG", ("worker:0", "worker:1"), (address, own), 1)
        with pytest.raises(PeerError, match="worker:0 .*(something else answers|no answer)"):
            meeting.report(cluster, OWN, 0.5)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(LONG)


# ------------------------------------------------------------------------------ while it runs


@contextlib.contextmanager
def member(
    index: int, monkeypatch: pytest.MonkeyPatch, heard: float = 0.0, silence: float = 10 * LONG
) -> Iterator[tuple[Membership, socket.socket]]:
    """One of two workers, and the other's end of their connection."""
    monkeypatch.setattr(membership_lib, "_GRACE_SEC", 10 * LONG)
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname(), LONG)
        ours, _ = server.accept()
    cluster = Cluster("TF_CONFIG", ("worker:0", "worker:1"), ("a:1", "b:1"), index)
    line = meeting.Line(ours)
    if heard:
        theirs.sendall(b'{"beat": true}\n')
        line.heard += heard
    membership = Membership(cluster, {1 - index: line}, silence)
    try:
        yield membership, theirs
    finally:
        membership._leaving.set()
        theirs.close()
        membership._thread.join(LONG)
        line.close()


@pytest.mark.parametrize(
    "message",
    [b'{"begun": "x"}', b'{"begun": -1}', b'{"begun": true}', b'{"stop": 5}', b'{"stop": "x"}',
     b'{"stop": "x", "code": 1e999}', b'{"stop": "x", "code": 300}', b'{"hold": []}',
     b'{"last_step": 1.5}', b'{"done": true}', b'{"please_stop": {}}', b"[]", b"GET / HTTP/1.1", b"[" * 1000,
     b"x" * 100_000, b'{"last_step": ' + b"1" * 5000 + b"}"],
)  # fmt: skip
@pytest.mark.parametrize("index", [0, 1])
def test_a_malformed_message_ends_all(
    index: int, message: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with member(index, monkeypatch) as (membership, theirs):
        with contextlib.suppress(ConnectionError):
            theirs.sendall(message + b"\n")
        reason = membership.reason(wait=LONG)
        assert isinstance(reason, PeerError)
        assert f"worker:{1 - index}" in str(reason)
        assert "has sent what no worker sends" in str(reason)
        with pytest.raises(PeerError):
            membership.begin(1)


def test_a_report_of_a_peer_is_bounded_and_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with member(1, monkeypatch) as (membership, theirs):
        theirs.sendall(json.dumps({"stop": "\x1b[2J\n" + "x" * 50_000, "code": 3}).encode() + b"\n")
        reason = membership.reason(wait=LONG)
        assert reason is not None
        assert reason.exit_code == 3
        assert len(str(reason)) < 1100
        assert str(reason).isprintable()


def test_who_stood_still_does_not_blame_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they sent meanwhile is read before their silence is judged."""
    with member(1, monkeypatch, heard=-20 * LONG) as (membership, theirs):
        theirs.sendall(b'{"hold": "SIGTERM"}\n')
        with theirs.makefile("rb") as answers:
            while b"begun" not in answers.readline():
                pass
        assert membership.reason(wait=0) is None


def test_silence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with member(0, monkeypatch, silence=1.0) as (membership, _):
        assert "has been silent for 1 s" in str(membership.reason(wait=LONG))


def test_workers_meet_before_the_servers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with member(0, monkeypatch) as (chief, theirs):
        thread = threading.Thread(target=chief.meet)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        theirs.sendall(b'{"here": true}\n')
        thread.join(LONG)
        assert not thread.is_alive()
    with member(1, monkeypatch) as (worker, theirs):
        theirs.sendall(b'{"all_here": true}\n')
        worker.meet()
    with member(1, monkeypatch) as (worker, theirs):
        theirs.close()
        with pytest.raises(PeerError, match="has ended"):
            worker.meet()


def test_who_has_left_is_not_asked_for_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may be done, and gone, before the chief or a third one wants to stop."""
    with member(0, monkeypatch, silence=2.0) as (chief, theirs):
        theirs.sendall(b'{"done": 8}\n')
        theirs.shutdown(socket.SHUT_WR)
        ends = time.monotonic() + LONG
        while not chief._closed:
            assert time.monotonic() < ends
            time.sleep(0.01)
        chief.ask_to_stop("SIGTERM")
        assert chief.begin(8) is None
        assert "SIGTERM" in str(chief.begin(9))
        assert chief.reason(wait=0) is None


def test_a_worker_that_hangs_at_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with member(0, monkeypatch, silence=1.0) as (chief, _):
        chief.finish()
        assert "has been silent" in str(chief.reason(wait=0))


def test_a_chief_that_exports_for_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a silence, as long as it gives signs of life."""
    with member(1, monkeypatch, silence=0.4) as (worker, theirs):
        thread = threading.Thread(target=worker.finish)
        thread.start()
        for _ in range(10):
            theirs.sendall(b'{"beat": true}\n')
            thread.join(0.1)
        if worker.reason(wait=0) is None:  # the test itself wasn't held up
            assert thread.is_alive()
            theirs.sendall(b'{"done": 8}\n')
            thread.join(LONG)
            assert not thread.is_alive()


class OpError(Exception):
    """As TensorFlow's."""


class UnavailableError(OpError):
    pass


class InternalError(OpError):
    pass


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (UnavailableError("Connection refused\nAdditional GRPC error"), True),
        (InternalError("The following tasks are unhealthy (stopped sending heartbeats):\nx"), True),
        (InternalError("Collective ops is aborted by: ..."), True),
        (InternalError("Blas GEMM launch failed"), False),
        (RuntimeError("tasks are unhealthy"), False),
        (PreemptedError("Connection reset"), False),
    ],
)
def test_what_tensorflow_reports_of_a_lost_worker(error: Exception, lost: bool) -> None:
    found = membership_lib.lost_peer(error)
    assert (found is not None) == lost
    if found is not None:
        assert found.exit_code == 75
        assert "\n" not in str(found)


def test_tensorflow_looks_for_hangs_later() -> None:
    """Its heartbeats begin to fail at half of their timeout, ours after the last beat and a grace."""
    for limit in (0.1, 5, 120, 3600):
        ours = limit * (1 + 2 / membership_lib._BEATS) + membership_lib._GRACE_SEC
        assert membership_lib.heartbeat_timeout(limit) / 2 > ours
