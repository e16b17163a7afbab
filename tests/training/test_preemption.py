"""What stops a run in time: signals, Google Cloud's metadata server, and the clock."""

from __future__ import annotations

import http.server
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.config import RunConfig
from trainer.training import preemption
from trainer.training.preemption import Preemption

ROOT = pathlib.Path(__file__).parents[2]
SOON = 10.0  # seconds: how long a test waits for what should come at once


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def wait_for_reason(stop: Preemption) -> str | None:
    ends = time.monotonic() + SOON
    while (reason := stop.begin(1)) is None and time.monotonic() < ends:
        time.sleep(0.01)
    return reason


class Members:
    """Ties to other workers that note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask_to_stop(self, reason: str) -> None:
        self.asked.append(reason)

    def begin(self, steps: int) -> str | None:
        return "agreed" if self.asked and steps > 7 else None


# ------------------------------------------------------------------------------ signals


def test_sigterm_stops_before_the_next_step_and_leaves_no_trace() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Preemption(RunConfig()) as stop:
        assert stop.begin(1) is None
        signal.raise_signal(signal.SIGTERM)
        assert wait_for_reason(stop) == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_workers_decide_about_the_step() -> None:
    members: Any = Members()
    with Preemption(RunConfig(), members) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        ends = time.monotonic() + SOON
        while not members.asked and time.monotonic() < ends:
            time.sleep(0.01)
        assert stop.begin(7) is None
        assert stop.begin(8) == "agreed"
    assert members.asked == ["SIGTERM"]  # once


# Hangs as a step does: no Python runs in the main thread until it ends.
_PROGRAM = """
import hashlib, sys, time
from trainer.config import RunConfig
from trainer.training.preemption import Preemption

hang, grace = float(sys.argv[1]), float(sys.argv[2])
with Preemption(RunConfig(grace_time=grace)) as stop:
    print("ready", flush=True)
    ends = time.monotonic() + 60
    while (reason := stop.begin(1)) is None and time.monotonic() < ends:
        hashlib.pbkdf2_hmac("sha256", b"", b"", max(1, int(hang * 1e6)))
    time.sleep(0.3)  # the checkpoint
print(reason, flush=True)
sys.exit(75)
"""


def run(hang: float, *signals: int, grace: float = 28.0) -> tuple[int, str]:
    """Exit code, and what was printed on both streams."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(hang), str(grace)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(0.5)  # two that wait to be delivered are one
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_a_step_ends_before_the_run_does() -> None:
    assert run(1.0, signal.SIGTERM) == (75, "SIGTERM\n")


def test_one_that_hangs_ends_in_the_grace_time() -> None:
    began = time.monotonic()
    code, out = run(50.0, signal.SIGTERM, grace=0.5)
    assert time.monotonic() - began < 30
    assert code == 75
    assert "SIGTERM: nothing saved within run.grace_time = 0.5 s; run the same command again" in out
    assert len(out.splitlines()) == 1


def test_ctrl_c_once_saves_and_twice_ends_at_once() -> None:
    code, out = run(0, signal.SIGINT)
    assert (code, out.splitlines()[-1]) == (75, "interrupted")
    assert "ctrl-C again ends at once" in out
    code, out = run(50.0, signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert out.endswith("interrupted; run the same command again to go on\n")


# ------------------------------------------------------------------------------ the clock


def test_the_time_is_up() -> None:
    began = time.monotonic()
    with Preemption(RunConfig(max_hours=0.5 / 3600)) as stop:
        assert stop.begin(1) is None
        assert wait_for_reason(stop) == "run.max_hours = 0.000138889 is over"
    assert time.monotonic() - began >= 0.5


# ------------------------------------------------------------------------------ metadata server


class Metadata(http.server.ThreadingHTTPServer):
    """A metadata server as Google documents it, for the two values that matter here."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.changed = threading.Condition()
        self.requests: list[str] = []
        self.failures = 0  # of the next requests
        self.flavor = "Google"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def set(self, name: str, value: str) -> None:
        with self.changed:
            self.values[name] = value
            self.changed.notify_all()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = url.path.removeprefix("/computeMetadata/v1/instance/")
        self.server.requests.append(self.path)
        assert self.headers["Metadata-Flavor"] == "Google"
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        if name not in self.server.values:
            self.send_error(404)
            return
        with self.server.changed:
            if query.get("wait_for_change") == "true":
                self.server.changed.wait_for(
                    lambda: self._tag(name) != query["last_etag"], int(query["timeout_sec"])
                )
            value, tag = self.server.values[name], self._tag(name)
        self.send_response(200)
        self.send_header("Metadata-Flavor", self.server.flavor)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value.encode())

    def _tag(self, name: str) -> str:
        return f"{hash(self.server.values[name]) & 0xFFFFFFFF:x}"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("NO_GCE_CHECK")
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("preempted", "TRUE", "preempting this machine"),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "for maintenance"),
    ],
)
def test_a_notice(metadata: Metadata, name: str, value: str, reason: str) -> None:
    with Preemption(RunConfig()) as stop:
        while len(metadata.requests) < 4:  # both are known, and both are waited for
            time.sleep(0.01)
        time.sleep(0.5)
        assert stop.begin(1) is None
        assert len(metadata.requests) == 4  # nothing is polled
        metadata.set(name, value)
        assert reason in str(wait_for_reason(stop))


def test_a_notice_that_came_before_the_start(metadata: Metadata) -> None:
    metadata.values["preempted"] = "TRUE"
    with Preemption(RunConfig()) as stop:
        assert "preempting" in str(wait_for_reason(stop))


def test_other_maintenance_is_none_of_our_business(metadata: Metadata) -> None:
    with Preemption(RunConfig()) as stop:
        while len(metadata.requests) < 4:
            time.sleep(0.01)
        metadata.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        while len(metadata.requests) < 5:
            time.sleep(0.01)
        time.sleep(0.2)
        assert stop.begin(1) is None
        # And is watched on.
        metadata.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        assert "maintenance" in str(wait_for_reason(stop))


def test_a_server_that_is_busy_is_asked_again(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_ATTEMPT_SEC", 0.1)
    monkeypatch.setattr(preemption, "_RETRY_SEC", 0.1)
    metadata.failures = 2
    with Preemption(RunConfig()) as stop:
        while len(metadata.requests) < 6:
            time.sleep(0.01)
        metadata.failures = 4  # of those that wait, once they are answered
        metadata.set("maintenance-event", "NONE again")
        metadata.set("preempted", "TRUE")
        assert "preempting" in str(wait_for_reason(stop))


@pytest.mark.parametrize("there", ["nobody", "somebody else", "without the values"])
def test_no_metadata_server(
    metadata: Metadata, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on any machine that isn't Google's: nothing is said, nothing more is asked."""
    monkeypatch.setattr(preemption, "_ATTEMPT_SEC", 0.05)
    if there == "nobody":
        monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    elif there == "somebody else":
        metadata.flavor = "Other"
    else:
        metadata.values.clear()
    # Those of other tests may still wait for a server that is gone.
    others = set(threading.enumerate())
    with Preemption(RunConfig()) as stop:
        ends = time.monotonic() + SOON
        while [t for t in set(threading.enumerate()) - others if t.name.startswith("metadata ")]:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert stop.begin(1) is None
    assert len(metadata.requests) == (0 if there == "nobody" else 2)


def test_switched_off(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    metadata.values["preempted"] = "TRUE"
    with Preemption(RunConfig()) as stop:
        time.sleep(0.3)
        assert stop.begin(1) is None
    assert metadata.requests == []
