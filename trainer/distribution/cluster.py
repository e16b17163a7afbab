"""The processes of a run on several hosts: who they are, that all come, and that all stay.

Before TensorFlow starts, every worker says hello to the chief over TCP, on the address that the
chief's TensorFlow will take afterwards. So a missing worker, another version of TensorFlow or
another config is known by name, within a time limit. The connections stay open while the run lasts.
A worker that dies closes its own, one that hangs falls silent; then all others end, too, since
TensorFlow alone would wait for it or end in a stack dump. Its own heartbeats are set to come later
(`heartbeat_timeout`).

Anybody can connect to the port while the workers gather. All connections are served at once; who
says nothing, or something else than a worker does, is closed, and is no more than a part of the
message about who is missing.

Over the same connections the workers agree after which step to stop early (`Membership.ask_to_stop`
and `begin`). It costs a step nothing but the look at a variable:

1. Any worker asks the chief, and the chief tells all to hold: none begins another step for now.
2. Each answers at once, from the thread that listens, how many steps its loop has begun.
3. The chief tells all the largest number. Those behind it go on up to there, and all stop.

So every step that one worker has begun is begun by all, and no sum over workers is left waiting.
Nobody waits for a step to end before it answers, so a hold lasts as long as a message takes.

Needs no TensorFlow.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import json
import math
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import trainer
from trainer.core import config as config_lib
from trainer.core import documents, flags
from trainer.core.config import Config
from trainer.core.errors import ConfigError, PreemptedError, TrainerError, UsageError
from trainer.core.text import quoted, shorten

SOURCES = ("TF_CONFIG", "CLUSTER_SPEC")  # the first that is set counts

# Vertex AI's names of the pools, which CLUSTER_SPEC uses.
_POOLS = {
    "workerpool0": "chief",
    "workerpool1": "worker",
    "workerpool2": "ps",
    "workerpool3": "evaluator",
}
_TRAINING = ("chief", "master", "worker")  # the jobs that train, in TensorFlow's order

_BEATS = 4  # messages in the time after which a silent peer counts as gone
_RETRY_SEC = 0.2
_HELLO_SEC = 5.0  # in which who connects must have said hello
_SEND_SEC = 5.0  # after which a message counts as sent in vain
_MOST_WAITING = 64  # connections that haven't said hello
_LONGEST_MESSAGE = 1 << 16  # bytes
_LONGEST_REASON = 1000  # characters of what a peer reports
# TensorFlow looks for each at half of its timeout, so twice the silence is above ours.
_HEARTBEATS, _HEARTBEATS_SEC = 4, 60.0
_START_SEC = 60.0  # at least, for TensorFlow's servers: usually they take one or two
# TensorFlow's errors that a single process never meets, and what the others' texts have in common.
_LOST_KINDS = {"UnavailableError", "AbortedError", "DeadlineExceededError"}
_LOST_TEXTS = re.compile(
    r"unhealthy|heartbeat|coordination service|collective ops is aborted|connection reset|"
    r"socket closed|peer health",
    re.IGNORECASE,
)
_LONGEST_DESCRIPTION = 1 << 20  # characters: 10,000 workers have half of it
# What the main thread gets to end by itself when a peer is gone, before the process is ended.
_GRACE_SEC = 3.0
_POLL_SEC = 0.02


class PeerError(TrainerError):
    """A worker is missing or gone; started again together, the workers go on."""

    exit_code = 75


_CODES = {1, *(kind.exit_code for kind in TrainerError.__subclasses__())}


@dataclass(frozen=True)
class Cluster:
    """The workers of a run, this one among them.

    Attributes:
      source: the environment variable that describes it.
      names: as 'worker:0', the chief first.
      addresses: 'host:port' of each.
      index: of this process.
    """

    source: str
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes what users see."""
        return self.index == 0

    def peer(self, index: int) -> str:
        """A worker as messages call it."""
        return f"{self.names[index]} ({self.addresses[index]})"

    def jobs(self) -> dict[str, list[str]]:
        """The addresses by job, as TensorFlow takes them."""
        found: dict[str, list[str]] = {}
        for name, address in zip(self.names, self.addresses, strict=True):
            found.setdefault(name.partition(":")[0], []).append(address)
        return found

    @property
    def task(self) -> tuple[str, int]:
        """Job and number of this process in it."""
        job, _, number = self.names[self.index].partition(":")
        return job, int(number)


# ------------------------------------------------------------------------------ environment


def find(strategy: str) -> Cluster | None:
    """What the environment says about other workers.

    Args:
      strategy: `run.strategy`.

    Returns:
      The cluster if several workers train, or one under 'multi_worker'; None if this process is
      alone.

    Raises:
      ConfigError: the description is wrong, or doesn't fit the strategy.
      EvaluatorTask: this process is to evaluate.
    """
    source = next((name for name in SOURCES if flags.env(name) is not None), "")
    cluster = parse(source, flags.env(source) or "") if source else None
    if cluster is None and strategy == "multi_worker":
        raise ConfigError(
            f"run.strategy = 'multi_worker' needs {' or '.join(SOURCES)} in the environment, "
            "which says who the workers are; set it, or take another strategy"
        )
    if cluster is None or (len(cluster.names) == 1 and strategy != "multi_worker"):
        return None
    if strategy not in ("auto", "multi_worker"):
        raise ConfigError(
            f"run.strategy = {strategy!r}, but {source} names {len(cluster.names)} workers, which "
            f"would all train the same run; take multi_worker or auto, or unset {source}"
        )
    return cluster


class EvaluatorTask(TrainerError):
    """This process is the evaluator of a run: it has nothing to do here."""

    exit_code = 0


def parse(source: str, text: str) -> Cluster | None:
    """The cluster that a TF_CONFIG or a CLUSTER_SPEC describes, None if it names no workers.

    Raises:
      ConfigError, EvaluatorTask: as for `find`.
    """
    try:
        document = documents.parse_json(text, _LONGEST_DESCRIPTION)
    except documents.DocumentError as error:
        what = str(error).removeprefix("it ")
        raise ConfigError(f"{source} {what}; put it right or unset it") from None
    if not isinstance(document, dict):
        raise _wrong(source, "it is no object", '{"cluster": ..., "task": ...}')
    jobs = document.get("cluster") or {}
    if not jobs:
        return None
    jobs = _checked_jobs(source, jobs)
    job, number = _checked_task(source, document.get("task"), jobs)
    if job == "evaluator":
        raise EvaluatorTask("this task is an evaluator, which takes no part in training")
    if "ps" in jobs:
        raise ConfigError(
            f"{source} names parameter servers, which this trainer doesn't use; leave them out "
            "(Vertex AI: worker pool 2)"
        )
    names = [(name, index) for name in _TRAINING for index in range(len(jobs.get(name, ())))]
    addresses = tuple(jobs[name][index] for name, index in names)
    return Cluster(
        source,
        tuple(f"{name}:{index}" for name, index in names),
        addresses,
        names.index((job, number)),
    )


def _wrong(source: str, what: str, expected: str) -> ConfigError:
    return ConfigError(f"{source} is wrong: {what}; expected {expected}")


def _checked_jobs(source: str, jobs: Any) -> dict[str, list[str]]:
    expected = '"cluster": {"chief": ["host:port"], "worker": ["host:port", ...]}'
    if not isinstance(jobs, dict):
        raise _wrong(source, f"its cluster is {quoted(jobs)}", expected)
    checked: dict[str, list[str]] = {}
    for name, addresses in jobs.items():
        job = _POOLS.get(name, name)
        if job not in (*_TRAINING, "ps", "evaluator"):
            raise _wrong(source, f"there is no job {quoted(name)}", "chief, worker or evaluator")
        if not isinstance(addresses, list) or not all(map(_is_address, addresses)):
            raise _wrong(source, f"the addresses of {name} are {_shown(addresses)}", expected)
        checked[job] = addresses
    everyone = [address for job in _TRAINING for address in checked.get(job, ())]
    twice = sorted({address for address in everyone if everyone.count(address) > 1})
    if twice:
        raise _wrong(
            source, f"{shorten(twice[0])} is there twice", "an address of its own for each worker"
        )
    if len(checked.get("chief", ())) + len(checked.get("master", ())) > 1:
        raise _wrong(source, "it names several chiefs", "one chief, the others as worker")
    return checked


def _is_address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    host, _, port = value.rpartition(":")
    return (
        bool(re.fullmatch(r"[\w.:\[\]%-]{1,255}", host, re.ASCII))
        and bool(re.fullmatch(r"\d{1,5}", port, re.ASCII))
        and 0 < int(port) < 65536
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(quoted(each, 60) for each in value[:3])}{', ...' * (len(value) > 3)}]"
    return quoted(value)


def _checked_task(source: str, task: Any, jobs: Mapping[str, list[str]]) -> tuple[str, int]:
    expected = '"task": {"type": "worker", "index": 0}'
    if not isinstance(task, dict) or not {"type", "index"} <= set(task):
        raise _wrong(source, f"its task is {quoted(task)}", expected)
    kind, index = task["type"], task["index"]
    if isinstance(index, str) and re.fullmatch(r"\d{1,9}", index, re.ASCII):
        index = int(index)
    if not isinstance(kind, str) or type(index) is not int:
        what = f"its task is of type {quoted(kind)} with index {quoted(index)}"
        raise _wrong(source, what, f"{expected}, one of the cluster")
    job = _POOLS.get(kind, kind)
    # Evaluators are no part of the cluster in TensorFlow's own description of it.
    members = jobs.get(job, [""] if job == "evaluator" else [])
    if not members:
        what = f"its task is of type {quoted(kind)}"
        raise _wrong(source, what, f"{expected}, one of the cluster")
    if job != "evaluator" and not 0 <= index < len(members):
        raise _wrong(
            source,
            f"task {kind}:{index} is not one of the {len(members)} of the cluster",
            f"an index from 0 to {len(members) - 1}",
        )
    return job, index


# ------------------------------------------------------------------------------ messages


class _Line:
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
    """What must be the same on all workers, by name."""
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
    """How many GPUs TensorFlow will find; sums over workers that have unequally many never end."""
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
        self.lines: dict[int, _Line] = {}
        self.problems: list[TrainerError] = []
        self._cluster, self._own, self._listener = cluster, own, listener
        self._everyone = set(range(1, len(cluster.names)))
        self._waiting: dict[_Line, tuple[float, str]] = {}  # until when they may say hello; who
        self._strangers, self._last_stranger = 0, ""
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    @property
    def missing(self) -> set[int]:
        """Who isn't there."""
        return self._everyone - set(self.lines)

    @property
    def strangers(self) -> str:
        """What to add to a message about who is missing: others have connected instead."""
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
            time.sleep(_POLL_SEC)
            return
        if len(self._waiting) >= _MOST_WAITING:
            self._refuse(next(iter(self._waiting)), "said no hello before many others came")
        line = _Line(connection)
        self._waiting[line] = time.monotonic() + _HELLO_SEC, shorten(str(address[0]), 60)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _read(self, line: _Line) -> None:
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

    def _refuse(self, line: _Line, what: str) -> None:
        _, who = self._waiting.pop(line)
        self._strangers, self._last_stranger = self._strangers + 1, f"from {who}, which {what}"
        self._drop(line)

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line)
        line.close()


def _index_of(hello: Mapping[str, Any]) -> int | None:
    """Which worker says this hello, None if it is none that a worker says."""
    index, theirs = hello.get("index"), hello.get("identity")
    if type(index) is not int or not isinstance(theirs, dict) or "trainer" not in theirs:
        return None
    return index if all(isinstance(value, str) for value in theirs.values()) else None


def _gather(cluster: Cluster, own: Mapping[str, str], limit: float) -> dict[int, _Line]:
    """The connections to all other workers, once all have said hello and are the same."""
    with _listen(cluster) as listener:
        gathering = _Gathering(cluster, own, listener)
        gathering.run(time.monotonic() + limit)
    lines, problems = gathering.lines, gathering.problems
    if gathering.missing:
        missing = ", ".join(cluster.peer(index) for index in sorted(gathering.missing))
        problems.append(_missing(limit, missing + gathering.strangers))
    for line in lines.values():
        line.send(**(_stop(problems[0]) if problems else {"go": True}))
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


def _stop(problem: TrainerError) -> dict[str, Any]:
    return {"stop": shorten(str(problem), _LONGEST_REASON), "code": problem.exit_code}


def _report(cluster: Cluster, own: Mapping[str, str], limit: float) -> dict[int, _Line]:
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
        line = _Line(connection)
        line.send(index=cluster.index, identity=dict(own))
        # The chief's own limit ends the wait; it may have begun later than this one.
        try:
            reply = line.wait_for(time.monotonic() + limit + 5) or {}
            verdict = _error(reply) if "stop" in reply else None
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


def _error(message: Mapping[str, Any]) -> TrainerError:
    """What a peer has reported.

    Raises:
      ValueError: it is no report.
    """
    text, code = message.get("stop"), message.get("code")
    if not isinstance(text, str) or type(code) is not int or code not in _CODES:
        raise ValueError("not a report")
    error = TrainerError(shorten(text, _LONGEST_REASON))
    error.exit_code = code
    return error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return shorten(value, _LONGEST_REASON)


def _steps(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("not a number of steps")
    return value


# ------------------------------------------------------------------------------ while it runs


class Membership:
    """This worker's ties to the others while a run lasts.

    Args:
      cluster: who they are.
      lines: the connections to them: the chief's to all, any other's to the chief.
      silence: seconds after which a silent peer counts as gone.
    """

    def __init__(self, cluster: Cluster, lines: Mapping[int, _Line], silence: float) -> None:
        self._cluster, self._lines, self._silence = cluster, dict(lines), silence
        self._finished: set[int] = set()
        self._closed: set[int] = set()
        self._verdict: TrainerError | None = None
        self._hold = threading.Condition()  # guards the next six
        self._there: set[int] = set()  # the chief's: who has come to `meet`
        self._met = False
        self._begun = 0  # steps
        self._stop_reason: str | None = None
        self._last_step: int | None = None  # after which all stop
        self._answers: dict[int, int] = {}  # the chief's: steps begun, by worker
        self._decided, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for index, line in self._lines.items():
            selector.register(line, selectors.EVENT_READ, index)
        beat = 0.0
        while not self._leaving.is_set() and self._verdict is None:
            if time.monotonic() >= beat:
                beat = time.monotonic() + self._silence / _BEATS
                self._send_beats()
            ready = selector.select(max(0.0, beat - time.monotonic()))
            if time.monotonic() > beat + self._silence / _BEATS:
                # This process itself stood still, or TensorFlow kept Python's lock: what the others
                # did then isn't known.
                for line in self._lines.values():
                    line.heard = time.monotonic()
            for key, _ in ready:
                if not self._read(key.data):
                    selector.unregister(key.fileobj)
            self._look_for_silence()
        if self._verdict is not None and not self._leaving.wait(_GRACE_SEC):
            self.end(self._verdict)

    def _send_beats(self) -> None:
        for index, line in self._lines.items():
            if index not in self._closed:
                line.send(beat=True)

    def _look_for_silence(self) -> None:
        for index, line in self._lines.items():
            quiet = time.monotonic() - line.heard
            if index not in self._finished and quiet > self._silence:
                self._lost(index, f"has been silent for {quiet:.0f} s")

    def _read(self, index: int) -> bool:
        """Takes in what a peer says; whether it may say more."""
        try:
            messages = self._lines[index].receive()
            for message in messages or ():
                self._take(index, message)
        except ValueError:
            self._closed.add(index)
            self._lost(index, "has sent what no worker sends")
            return False
        if messages is None:
            self._closed.add(index)
            if index not in self._finished:
                self._lost(index, "has ended")
        return messages is not None

    def _take(self, index: int, message: Mapping[str, Any]) -> None:
        """Acts on a message; raises a ValueError if it is none that a worker sends."""
        if message.get("done"):
            self._finished.add(index)
        elif "stop" in message:
            self._decide(_error(message))
        elif "here" in message:
            self._came(index)
        elif "all_here" in message:
            with self._hold:
                self._met = True
                self._hold.notify_all()
        elif "please_stop" in message:
            self._hold_all(_text(message["please_stop"]))
        elif "hold" in message:
            with self._hold:
                self._stop_reason = _text(message["hold"])
                self._lines[index].send(begun=self._begun)
        elif "begun" in message:
            self._answered(index, _steps(message["begun"]))
        elif "last_step" in message:
            with self._hold:
                self._last_step = _steps(message["last_step"])
                self._hold.notify_all()

    def _lost(self, index: int, what: str) -> None:
        self._decide(
            PeerError(
                f"{self._cluster.peer(index)} {what}: see its own log; start all workers again, "
                "they go on from the newest checkpoint"
            )
        )

    def _decide(self, verdict: TrainerError) -> None:
        """The first reason to stop counts, for all workers."""
        if self._verdict is None:
            self._verdict = verdict
            if self._cluster.is_chief:
                self._tell(verdict)
            self._decided.set()
            with self._hold:
                self._hold.notify_all()

    def _tell(self, problem: TrainerError) -> None:
        for line in self._lines.values():
            line.send(**_stop(problem))

    def ask_to_stop(self, reason: str) -> None:
        """Has all workers stop after one and the same step; returns at once, from any thread.

        Args:
          reason: for the users of all workers.
        """
        if len(self._cluster.names) > 1:
            reason = f"{reason} on {self._cluster.peer(self._cluster.index)}"
        if self._cluster.is_chief:
            self._hold_all(reason)
        else:
            self._lines[0].send(please_stop=reason)

    def meet(self) -> None:
        """Waits until all workers have come here, once in a run.

        To be called just before TensorFlow's server starts, which keeps Python's lock until all
        servers have: waiting there for a worker that reads or imports for minutes, this one would
        look as if it hung itself.

        Raises:
          TrainerError: a worker is gone or has failed.
        """
        if self._cluster.is_chief:
            self._came(self._cluster.index)
        else:
            self._lines[0].send(here=True)
        with self._hold:
            self._hold.wait_for(lambda: self._met or self._verdict)
            if self._verdict is not None:
                raise self._verdict

    def _came(self, index: int) -> None:
        with self._hold:
            self._there.add(index)
            if len(self._there) == len(self._cluster.names):
                self._met = True
                for line in self._lines.values():
                    line.send(all_here=True)
                self._hold.notify_all()

    def begin(self, steps: int) -> str | None:
        """To be called before each call of the training step.

        While the workers agree on the last step, this waits.

        Args:
          steps: how many will have been begun with this call, from the start of the run.

        Returns:
          None if it may be made, else why the run stops before it.

        Raises:
          TrainerError: a worker is gone or has failed.
        """
        with self._hold:
            self._hold.wait_for(
                lambda: self._stop_reason is None or self._last_step is not None or self._verdict
            )
            if self._verdict is not None:
                raise self._verdict
            if self._last_step is not None and steps > self._last_step:
                return self._stop_reason
            self._begun = steps
            return None

    def _hold_all(self, reason: str) -> None:
        """The chief's first part of a stop; later requests change nothing."""
        with self._hold:
            if self._stop_reason is not None:
                return
            self._stop_reason = reason
            begun = self._begun
            for line in self._lines.values():
                line.send(hold=reason)
        self._answered(self._cluster.index, begun)

    def _answered(self, index: int, begun: int) -> None:
        """The chief's second part: once all have answered, everybody hears the last step."""
        with self._hold:
            self._answers[index] = begun
            if len(self._answers) < len(self._cluster.names):
                return
            self._last_step = max(self._answers.values())
            for line in self._lines.values():
                line.send(last_step=self._last_step)
            self._hold.notify_all()

    def reason(self, wait: float) -> TrainerError | None:
        """Why a collective failed: what is known of the other workers after up to `wait` seconds."""
        self._decided.wait(wait)
        return self._verdict

    def finish(self) -> None:
        """Tells the others that this worker has done its part, and waits until all have.

        It may be long until the chief has exported its network; one that hangs is found by its
        silence, and `reason` says so. Who leaves earlier pulls TensorFlow's connections away from the others; the chief, to whom
        all are connected, leaves last.
        """
        for line in self._lines.values():
            line.send(done=True)
        everyone, deadline = set(self._lines), math.inf
        while time.monotonic() < deadline and self._verdict is None:
            if everyone <= (self._closed if self._cluster.is_chief else self._finished):
                break
            if everyone <= self._finished and deadline == math.inf:
                # Nothing is left to do but to leave; who hangs in that isn't waited for.
                deadline = time.monotonic() + self._silence
            time.sleep(_POLL_SEC)
        self._leaving.set()

    def end(self, error: TrainerError) -> NoReturn:
        """Tells the others why, and ends this process as a command ends on an error.

        At once: TensorFlow's own way out waits for peers that are gone.
        """
        self._leaving.set()
        if self._verdict is None:
            text = f"{self._cluster.peer(self._cluster.index)} has stopped: {error}"
            ending = TrainerError(text)
            ending.exit_code = error.exit_code
            self._tell(ending)
        code: Any = 1
        try:
            flags.fail(error)
        except SystemExit as ended:
            code = ended.code
        finally:
            _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def member(cluster: Cluster | None, config: Config) -> Iterator[Membership | None]:
    """Runs its body as one of the workers; without a cluster it does nothing more.

    All workers end together: when one fails, the others end with its exit code, or with 75 if it
    died without a word. A PreemptedError is what all have agreed on: each ends by itself, once all
    have done their part.

    Args:
      cluster: who they are.
      config: as loaded.

    Yields:
      The ties to the others, None without a cluster.

    Raises:
      PeerError: some have not come in time.
      UsageError: one differs.
      ConfigError: this worker's port is taken.
    """
    if cluster is None:
        yield None
        return
    meet = _gather if cluster.is_chief else _report
    lines = meet(cluster, identity(config), config.run.join_timeout)
    membership = Membership(cluster, lines, config.run.worker_timeout)
    try:
        yield membership
    except PreemptedError:
        membership.finish()
        raise
    except TrainerError as error:
        membership.end(error)
    except Exception as error:
        # Most likely a sum over workers that a lost one has broken; that will be known at once.
        reason = membership.reason(wait=_GRACE_SEC) or lost_peer(error)
        if reason is None:
            raise
        membership.end(reason)
    membership.finish()
    reason = membership.reason(wait=0)
    if reason is not None:
        membership.end(reason)


def start_timeout(worker_timeout: float) -> float:
    """Seconds in which all of TensorFlow's servers must have started, after `Membership.meet`.

    Args:
      worker_timeout: seconds after which a silent worker counts as gone.
    """
    return max(worker_timeout, _START_SEC)


def heartbeat_timeout(worker_timeout: float) -> float:
    """Seconds for TensorFlow's own heartbeats: so many that `Membership` finds a hang first.

    Args:
      worker_timeout: seconds after which a silent worker counts as gone.
    """
    return _HEARTBEATS * worker_timeout + _HEARTBEATS_SEC


def lost_peer(error: BaseException) -> PeerError | None:
    """What an error of TensorFlow means if it is about another worker, else None.

    It comes first only if this process found no time to hear of the loss itself.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OpError" not in kinds:
        return None
    if not kinds & _LOST_KINDS and not _LOST_TEXTS.search(str(error)):
        return None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return PeerError(
        f"TensorFlow has lost a worker ({shorten(lines[0])}): see the logs of the others; start "
        "all workers again, they go on from the newest checkpoint"
    )
