"""The meeting of a run's workers: all send a hello to the chief, which compares them.

Before TensorFlow starts, every worker says hello to the chief over TCP, on the address that the
chief's TensorFlow will take afterwards. So a missing worker, another version of TensorFlow or
another config is known by name, within a time limit.

Anybody can connect to the port while the workers gather. All connections are served at once; who
says nothing, or something else than a worker does, is closed, and is no more than a part of the
message about who is missing. Needs no TensorFlow.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import trainer
from trainer import config as config_lib
from trainer.config import Config
from trainer.core import documents, flags
from trainer.core.errors import ConfigError, TrainerError, UsageError
from trainer.core.text import shorten
from trainer.distribution.cluster import Cluster, PeerError

_RETRY_SEC = 0.2
_HELLO_SEC = 5.0  # in which who connects must have said hello
_SEND_SEC = 5.0  # after which a message counts as sent in vain
_PAUSE_SEC = 0.02
_MOST_WAITING = 64  # connections that haven't said hello
_LONGEST_MESSAGE = 1 << 16  # bytes
_LONGEST_REASON = 1000  # characters of what a peer reports
# Exit codes of errors; 0 would be none.
_CODES = {1, *(kind.exit_code for kind in TrainerError.__subclasses__())} - {0}


# ------------------------------------------------------------------------------ messages


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._rest = connection, b""
        self._lock = threading.Lock()
        self.heard = time.monotonic()
        connection.settimeout(_SEND_SEC)
        with contextlib.suppress(OSError):  # it may be closed again
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends; a peer that is gone is noticed when reading."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, after waiting for some; None at the end.

        Raises:
          ValueError: what comes is no message, or one that is too long.
        """
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_MESSAGE:
            raise ValueError("not a message")
        messages = [documents.parse_object(line, _LONGEST_MESSAGE) for line in lines]
        if messages:
            self.heard = time.monotonic()
        return messages

    def wait_for(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or None at the end of the connection or at the deadline.

        What follows it stays in the socket, for whoever watches that.

        Raises:
          ValueError: what comes is no message.
        """
        line = b""
        try:
            while not line.endswith(b"\n"):
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                byte = self._socket.recv(1)
                if not byte or time.monotonic() >= deadline:
                    return None
                line += byte
                if len(line) > _LONGEST_MESSAGE:
                    raise ValueError("not a message")
        except OSError:  # a timeout, too
            return None
        self._socket.settimeout(_SEND_SEC)
        self.heard = time.monotonic()
        return documents.parse_object(line, _LONGEST_MESSAGE)

    def close(self) -> None:
        self._socket.close()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(cluster: Cluster) -> socket.socket:
    """A socket on this worker's port, on all its interfaces as TensorFlow's will be."""
    port = _host_and_port(cluster.addresses[cluster.index])[1]
    listener = socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", port))
        listener.listen(max(128, len(cluster.names)))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{cluster.peer(cluster.index)} can't listen on port {port} ({error.strerror}); end "
            f"the program that uses it, or give another port in {cluster.source}"
        ) from None
    return listener


# ------------------------------------------------------------------------------ start


def identity(config: Config) -> dict[str, str]:
    """Values that must be the same on all workers, by name."""
    # TensorFlow's wheels have several names, and importing it takes seconds.
    wheels = importlib.metadata.packages_distributions().get("tensorflow", [])
    return {
        "trainer": trainer.__version__,
        "TensorFlow": importlib.metadata.version(wheels[0]) if wheels else "none",
        "config": config_lib.fingerprint(config),
        "rounds": str(config.training.rounds),
        "run.cpu_replicas": str(config.run.cpu_replicas),
        "GPUs": str(_count_gpus()),
    }


def _count_gpus() -> int:
    """The number of GPUs TensorFlow will find; sums over unequally many never end."""
    visible = flags.env("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(glob.glob("/dev/nvidia[0-9]*"))
    return sum(name.strip() not in ("", "-1") for name in visible.split(","))


class _Gathering:
    """The chief's part of the start: takes the hello of all and compares what they are.

    Args:
      cluster: who they are.
      own: the chief's own identity.
      listener: on the chief's port.
    """

    def __init__(self, cluster: Cluster, own: Mapping[str, str], listener: socket.socket) -> None:
        self.lines: dict[int, Line] = {}
        self.problems: list[TrainerError] = []
        self._cluster, self._own, self._listener = cluster, own, listener
        self._everyone = set(range(1, len(cluster.names)))
        self._waiting: dict[Line, tuple[float, str]] = {}  # until when they may say hello; who
        self._strangers, self._last_stranger = 0, ""
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    @property
    def missing(self) -> set[int]:
        """The workers that are missing."""
        return self._everyone - set(self.lines)

    @property
    def strangers(self) -> str:
        """An end for messages about missing workers: others have connected instead."""
        if not self._strangers:
            return ""
        return f" ({self._strangers} other connections, the last {self._last_stranger})"

    def run(self, deadline: float) -> None:
        """Takes connections until all are there, or until the deadline."""
        try:
            while self.missing and (now := time.monotonic()) < deadline:
                first = min([deadline, *(until for until, _ in self._waiting.values())])
                for key, _ in self._selector.select(max(0.0, first - now)):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                now = time.monotonic()
                for line in [line for line, (until, _) in self._waiting.items() if until <= now]:
                    self._refuse(line, "said no hello in time")
        finally:
            self._selector.close()
            for line in self._waiting:
                line.close()

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # it has gone again, or there are too many
            time.sleep(_PAUSE_SEC)
            return
        if len(self._waiting) >= _MOST_WAITING:
            self._refuse(next(iter(self._waiting)), "said no hello before many others came")
        line = Line(connection)
        self._waiting[line] = time.monotonic() + _HELLO_SEC, shorten(str(address[0]), 60)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _read(self, line: Line) -> None:
        try:
            messages = line.receive()
        except ValueError:
            messages = None
        if line not in self._waiting:
            # A worker has nothing to add to its hello: it has ended, or never was one.
            if messages != []:
                self.lines = {index: each for index, each in self.lines.items() if each is not line}
                self._drop(line)
            return
        if messages == []:
            return
        index = _index_of(messages[0]) if messages is not None and len(messages) == 1 else None
        if index not in self._everyone:
            self._refuse(line, "said something else than a worker")
        elif index in self.lines:
            self._refuse(line, f"called itself {self._cluster.names[index]}, which is there")
        else:
            assert index is not None and messages is not None
            del self._waiting[line]
            self.lines[index] = line
            self.problems += _mismatches(self._cluster, self._own, messages[0])

    def _refuse(self, line: Line, what: str) -> None:
        _, who = self._waiting.pop(line)
        self._strangers, self._last_stranger = self._strangers + 1, f"from {who}, which {what}"
        self._drop(line)

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line)
        line.close()


def _index_of(hello: Mapping[str, Any]) -> int | None:
    """The index of the worker that sent this hello, None if it isn't one of a worker."""
    index, theirs = hello.get("index"), hello.get("identity")
    if type(index) is not int or not isinstance(theirs, dict) or "trainer" not in theirs:
        return None
    return index if all(isinstance(value, str) for value in theirs.values()) else None


def gather(cluster: Cluster, own: Mapping[str, str], limit: float) -> dict[int, Line]:
    """The connections to all other workers, once all have said hello and are the same."""
    with _listen(cluster) as listener:
        gathering = _Gathering(cluster, own, listener)
        gathering.run(time.monotonic() + limit)
    lines, problems = gathering.lines, gathering.problems
    if gathering.missing:
        missing = ", ".join(cluster.peer(index) for index in sorted(gathering.missing))
        problems.append(_missing(limit, missing + gathering.strangers))
    for line in lines.values():
        line.send(**(stop_message(problems[0]) if problems else {"go": True}))
    if problems:
        raise problems[0]
    return lines


def _missing(limit: float, who: str) -> PeerError:
    return PeerError(
        f"missing after {limit:g} s: {who}; start all workers, open their ports to each other, or "
        "raise run.join_timeout"
    )


def _mismatches(
    cluster: Cluster, own: Mapping[str, str], hello: Mapping[str, Any]
) -> list[TrainerError]:
    theirs = hello["identity"]
    return [
        UsageError(
            f"{cluster.peer(hello['index'])} has {name} {shorten(theirs.get(name), 60)}, "
            f"{cluster.peer(0)} has "
            f"{value}; start all workers with the same"
        )
        for name, value in own.items()
        if theirs.get(name) != value
    ]


def stop_message(problem: TrainerError) -> dict[str, Any]:
    return {"stop": shorten(str(problem), _LONGEST_REASON), "code": problem.exit_code}


def report(cluster: Cluster, own: Mapping[str, str], limit: float) -> dict[int, Line]:
    """Another worker's part of the start: says hello to the chief and waits for its verdict."""
    _listen(cluster).close()  # TensorFlow will need the port
    host, port = _host_and_port(cluster.addresses[0])
    deadline = time.monotonic() + limit
    why = "no answer"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host, port), max(0.01, min(limit, 5)))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(_RETRY_SEC)
            continue
        line = Line(connection)
        line.send(index=cluster.index, identity=dict(own))
        # The chief's own limit ends the wait; it may have begun later than this one.
        try:
            reply = line.wait_for(time.monotonic() + limit + 5) or {}
            verdict = parse_stop(reply) if "stop" in reply else None
            if reply and verdict is None and reply.get("go") is not True:
                raise ValueError("not an answer")
        except ValueError:
            reply, verdict, why = {}, None, "something else answers there"
        if verdict is not None:
            raise verdict
        if reply:
            return {0: line}
        line.close()
        time.sleep(_RETRY_SEC)
    raise _missing(limit, f"{cluster.peer(0)} ({why})")


def parse_stop(message: Mapping[str, Any]) -> TrainerError:
    """A peer's report.

    Raises:
      ValueError: it is no report.
    """
    text, code = message.get("stop"), message.get("code")
    if not isinstance(text, str) or type(code) is not int or code not in _CODES:
        raise ValueError("not a report")
    error = TrainerError(shorten(text, _LONGEST_REASON))
    error.exit_code = code
    return error


def parse_reason(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return shorten(value, _LONGEST_REASON)


def parse_steps(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("not a number of steps")
    return value
