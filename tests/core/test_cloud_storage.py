"""Cloud Storage when things go wrong, and what it costs when they don't."""

from __future__ import annotations

import base64
import http.server
import io
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import google_crc32c
import pytest

from tests.gcs.emulator import ROOT, SERVERS
from tests.gcs.fixture import Gcs
from trainer import config
from trainer.core import cloud_requests, cloud_storage, storage
from trainer.core.errors import StorageError


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_requests, "_FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(cloud_requests, "_LONGEST_WAIT_SECONDS", 0.1)


def _kinds(gcs: Gcs) -> list[str]:
    return [r.kind for r in gcs.emulator.log() if r.kind != "bucket"]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["error_rate", "reset_rate", "truncate_rate"])
def test_everything_works_through_faults(gcs: Gcs, fault: str) -> None:
    data = os.urandom(3 << 20)
    root = f"{gcs.url}/run"
    with gcs.emulator.faulty(**{fault: 0.3}, seed=5):
        storage.write_bytes_atomic(f"{root}/a/x", data)
        with storage.open_write_atomic(f"{root}/a/y") as file:
            file.write(data)
        log = storage.AppendedFile(f"{root}/log", b"1\n", None)
        log.add(b"2\n")
        log.flush()
        version = storage.write_version(f"{root}/lease", b"1", None)
        version = storage.write_version(f"{root}/lease", b"2", version)
        assert storage.read_bytes(f"{root}/a/x") == data
        with storage.open_read(f"{root}/a/y") as opened:
            assert opened.read() == data
        storage.rename(f"{root}/a", f"{root}/b")
        assert storage.listdir(f"{root}/b") == ["x", "y"]
        assert storage.digest(f"{root}/b/y") == storage.digest(f"{root}/b/x")
        storage.remove_tree(f"{root}/b")
        storage.remove_version(f"{root}/lease", version)
    assert gcs.emulator.counts()["fault", fault.split("_")[0].replace("truncate", "truncated")] > 2
    assert gcs.emulator.names(gcs.bucket) == ["run/log"]
    assert gcs.emulator.get(gcs.bucket, "run/log") == b"1\n2\n"


@pytest.mark.parametrize("kind", ["write", "compose", "delete", "copy"])
def test_success_whose_answer_was_lost_is_no_failure(gcs: Gcs, kind: str) -> None:
    """Half of these resets come after the request was carried out; some seed has one of each."""
    for seed in range(4):
        root = f"{gcs.url}/{seed}"
        with gcs.emulator.faulty(reset_rate=0.6, seed=seed, match=f"^[A-Z]+ {kind} "):
            version = storage.write_version(f"{root}/lease", b"%d" % seed, None)
            log = storage.AppendedFile(f"{root}/log", b"1\n", None)
            log.add(b"2\n")
            log.flush()
            storage.rename(f"{root}/log", f"{root}/kept")
        assert storage.read_version(f"{root}/lease") == (b"%d" % seed, version)
        assert storage.read_text(f"{root}/kept") == "1\n2\n"
        assert storage.listdir(root) == ["kept", "lease"]
    assert gcs.emulator.counts()["fault", "reset"] >= 3


def test_a_write_that_somebody_else_won_is_a_conflict_even_after_a_reset(gcs: Gcs) -> None:
    for seed in range(6):
        path = f"{gcs.url}/{seed}"
        storage.write_version(path, b"theirs", None)
        with (
            gcs.emulator.faulty(reset_rate=0.5, seed=seed),
            pytest.raises(storage.ConflictError),
        ):
            storage.write_version(path, b"mine", None)
        assert storage.read_bytes(path) == b"theirs"


@pytest.mark.parametrize("length", [3, 6])
def test_shortening_whose_answer_was_lost_is_no_conflict(gcs: Gcs, length: int) -> None:
    for seed in range(12):
        path = f"{gcs.url}/log-{seed}"
        storage.write_bytes_atomic(path, b"1\n2\n3\n")
        version = storage.version(path)
        assert version is not None
        with gcs.emulator.faulty(match="write|copy", reset_rate=0.6, seed=seed):
            storage.shorten(path, length, version)
        assert storage.read_bytes(path) == b"1\n2\n3\n"[:length]
        assert storage.version(path) != version
        with pytest.raises(storage.ConflictError):
            storage.shorten(path, 1, version)


def test_retries_end_at_the_deadline_and_wait_between(
    gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 1.0)
    start = time.monotonic()
    with (
        gcs.emulator.faulty(error_rate=1.0),
        pytest.raises(
            StorageError, match=r"answered (503|429) for 1 s .*run the same command again"
        ),
    ):
        storage.read_bytes(f"{gcs.url}/x")
    assert 0.5 < time.monotonic() - start < 5
    assert 5 < len(_kinds(gcs)) < 60


@pytest.mark.parametrize("gcs", SERVERS, indirect=True)
def test_an_upload_goes_on_with_the_part_that_failed(
    gcs: Gcs, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(cloud_storage, "_CHUNK", 1 << 20)
    local, size = tmp_path / "large", 9 << 20
    local.write_bytes(os.urandom(size))
    with gcs.emulator.faulty(match="part", error_rate=0.4, seed=5):
        storage.upload(str(local), f"{gcs.url}/large")
    parts = [r for r in gcs.emulator.log() if r.kind == "part"]
    assert len([r for r in parts if r.fault]) > 2
    assert [r.received for r in parts if not r.fault] == [1 << 20] * 9
    assert _kinds(gcs).count("write") == 1
    assert storage.digest(f"{gcs.url}/large") == storage.digest(str(local))
    # Where the answer gets lost, the servers here keep a part twice, which is found out.
    with gcs.emulator.faulty(match="part", reset_rate=0.1, seed=6):
        storage.upload(str(local), f"{gcs.url}/large")
    assert storage.digest(f"{gcs.url}/large") == storage.digest(str(local))


class _Resumable(http.server.BaseHTTPRequestHandler):
    """Uploads in parts as Google's storage testbench takes them: what comes is added to what is
    there, without a look at where it belongs, and how much that is can be asked.

    Attributes:
      faults: what is done to the next parts: "half" stores half of one and answers 503, "lost" stores
        it and breaks off.
    """

    stored, whole, faults = bytearray(), 0, [""]
    asked = begun = 0

    def do_POST(self) -> None:
        kind = type(self)
        kind.begun, kind.stored = kind.begun + 1, bytearray()
        self.rfile.read(int(self.headers["Content-Length"]))
        kind.whole = int(self.headers["X-Upload-Content-Length"])
        self._answer(200, {}, Location=f"http://{self.headers['Host']}/session")

    def do_PUT(self) -> None:
        kind = type(self)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        kind.asked += not data
        fault = kind.faults.pop(0) if kind.faults and data else ""
        kind.stored += data[: len(data) // 2] if fault == "half" else data
        if fault == "half":
            self._answer(503, {"error": {"message": "busy"}})
        elif fault == "lost":
            self.close_connection = True
        elif len(kind.stored) < kind.whole:
            self._answer(308, {}, Range=f"bytes=0-{len(kind.stored) - 1}")
        else:
            crc = base64.b64encode(google_crc32c.Checksum(bytes(kind.stored)).digest()).decode()
            self._answer(200, {"size": str(len(kind.stored)), "crc32c": crc, "generation": "1"})

    def _answer(self, code: int, document: dict[str, Any], **headers: str) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        pass


@pytest.mark.parametrize("fault", ["half", "lost"])
def test_a_part_that_was_stored_in_spite_of_its_failure(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second upload asks after its faults, where the first has put something else together."""
    monkeypatch.setattr(cloud_storage, "_LARGE", 0)
    monkeypatch.setattr(cloud_storage, "_CHUNK", 1 << 10)
    kind = type("Kind", (_Resumable,), {"faults": ["", fault, "", "", "", "", fault, ""]})
    content = os.urandom(5 << 10)
    with http.server.ThreadingHTTPServer(("localhost", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{server.server_address[1]}")
        cloud_requests.forget_client()
        storage.write_bytes_atomic("gs://bucket/large", content)
        server.shutdown()
    cloud_requests.forget_client()
    assert bytes(kind.stored) == content
    assert (kind.begun, kind.asked) == (2, 1)


def test_a_download_goes_on_where_it_stopped(
    gcs: Gcs, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Each try brings half of what is left: so many faults in a row are no long time without a
    byte. (The second server knows no ranges without an end, and sends all of it again.)"""
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 0.5)
    content = os.urandom(4 << 20)
    storage.write_bytes_atomic(f"{gcs.url}/large", content)
    reads: tuple[Callable[[str], bytes], ...] = (
        storage.read_bytes,
        lambda path: _downloaded(path, tmp_path / "large"),
    )
    for read in reads:
        gcs.emulator.reset_counts()
        with gcs.emulator.faulty(match="read", truncate_rate=0.9, latency_sec=0.1):
            assert read(f"{gcs.url}/large") == content
        log = [r for r in gcs.emulator.log() if r.kind == "read"]
        assert len(log) > 2
        assert sum(r.sent for r in log) < len(content) + (1 << 20)


def _downloaded(path: str, local: pathlib.Path) -> bytes:
    storage.download(path, str(local))
    return local.read_bytes()


def test_a_slow_request_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time counts from the first failure, not from the start of a request that took longer."""
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 0.2)
    answers: Iterator[Exception | bytes] = iter([ConnectionError("reset"), b"done"])

    def request() -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            time.sleep(0.4)
            raise answer
        return answer

    assert cloud_requests.tried(request) == b"done"


# ---------------------------------------------------------------- one line, and what to do


def _actions(url: str) -> dict[str, Callable[[], Any]]:
    return {
        "read": lambda: storage.read_bytes(f"{url}/x"),
        "open": lambda: storage.open_read(f"{url}/x"),
        "write": lambda: storage.write_text_atomic(f"{url}/x", ""),
        "upload": lambda: storage.upload(__file__, f"{url}/x"),
        "list": lambda: storage.listdir(f"{url}/x"),
        "rename": lambda: storage.rename(f"{url}/x", f"{url}/y"),
        "lease": lambda: storage.read_version(f"{url}/x"),
        "take": lambda: storage.write_version(f"{url}/x", b"", None),
        "append": lambda: storage.AppendedFile(f"{url}/x", b"", None),
    }


def _one_line(action: Callable[[], Any], pattern: str) -> None:
    with pytest.raises(StorageError, match=pattern) as caught:
        action()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("gcs", SERVERS, indirect=True)
def test_requester_pays(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of request, of both clients, names the project that pays."""
    monkeypatch.setattr(cloud_storage, "_LARGE", 1 << 10)
    large = os.urandom(1 << 12)
    with gcs.emulator.faulty(requester_pays=True):
        for name in ("read", "open", "write", "list", "lease"):
            pattern = "requester pays.*the project that pays with GOOGLE_CLOUD_QUOTA_PROJECT"
            _one_line(_actions(gcs.url)[name], pattern)
        monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "mine")
        cloud_requests.forget_client()
        storage.write_bytes_atomic(f"{gcs.url}/a/x", large)
        assert storage.read_bytes(f"{gcs.url}/a/x") == large
        assert storage.read_range(f"{gcs.url}/a/x", 1, 5) == large[1:6]
        with storage.open_read(f"{gcs.url}/a/x") as file:
            assert file.read() == large
        log = storage.AppendedFile(f"{gcs.url}/log", b"1\n", None)
        log.add(b"2\n")
        log.flush()
        storage.rename(f"{gcs.url}/a", f"{gcs.url}/b")
        assert storage.listdir(gcs.url) == ["b", "log"]
        storage.remove_tree(f"{gcs.url}/b")
    assert gcs.emulator.names(gcs.bucket) == ["log"]
    assert {r.kind for r in gcs.emulator.log()} > {"read", "stat", "list", "write", "part"}


def test_names_with_empty_parts(gcs: Gcs) -> None:
    """Each is another object, below another folder. (The second server takes a//b for a/b.)"""
    names = ["/a", "a//b", "a/b", "a//c//d", "a/c/d"]
    for name in names:
        storage.write_bytes_atomic(f"{gcs.url}/{name}", name.encode())
    assert gcs.emulator.names(gcs.bucket) == sorted(names)
    for name, digest in storage.walk(gcs.url).items():
        path = storage.join(gcs.url, name)
        assert storage.read_bytes(path) == name.encode()
        assert storage.digest(path) == digest
    assert set(storage.walk(f"{gcs.url}/a")) == {"/b", "b", "/c//d", "c/d"}
    assert set(storage.walk(f"{gcs.url}/a/")) == {"/b", "b", "/c//d", "c/d"}
    assert set(storage.walk(f"{gcs.url}/a//")) == {"b", "c//d"}
    assert storage.listdir(f"{gcs.url}/a//") == ["b", "c"]
    assert storage.read_bytes(storage.join(f"{gcs.url}/a", "/b")) == b"a//b"
    assert storage.read_bytes(storage.sibling(f"{gcs.url}/a//b", "../b")) == b"a/b"
    storage.remove_tree(f"{gcs.url}/a//c")
    assert gcs.emulator.names(gcs.bucket) == sorted(set(names) - {"a//c//d"})


@pytest.mark.parametrize("name", _actions(""))
def test_missing_bucket(gcs: Gcs, name: str) -> None:
    _one_line(_actions("gs://not-there")[name], "there is no bucket not-there; check its name")


@pytest.mark.parametrize("name", ["read", "write", "list", "lease"])
def test_no_permission(gcs: Gcs, name: str) -> None:
    with gcs.emulator.faulty(forbidden=True):
        _one_line(_actions(gcs.url)[name], "permission denied .*Storage Object Admin")


@pytest.mark.parametrize("name", ["read", "write", "list", "lease"])
def test_expired_credentials(gcs: Gcs, name: str) -> None:
    with gcs.emulator.faulty(expired_token=True):
        _one_line(_actions(gcs.url)[name], "expired credentials .*application-default login")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (403, "The project to be billed is associated with an absent billing account."),
        (400, "Bucket is a requester pays bucket but no user project provided."),
        (403, "Caller does not have required permission to use project other-project."),
    ],
)
def test_wrong_project(code: int, message: str) -> None:
    from google.api_core import exceptions

    error = exceptions.from_http_status(code, message)
    reason = cloud_requests.reason(error, "gs://bucket/x")
    assert reason is not None
    assert reason.startswith(f"wrong project or billing ({message}); choose the project that pays")
    assert reason.endswith("GOOGLE_CLOUD_QUOTA_PROJECT")


def test_path_without_a_bucket_or_name(gcs: Gcs) -> None:
    _one_line(lambda: storage.read_bytes("gs:///x"), "names no bucket; write gs://bucket/name")
    _one_line(lambda: storage.write_text_atomic(gcs.url, ""), "cannot write .* is a bucket")
    _one_line(lambda: storage.remove_tree(gcs.url), "cannot remove .* is a bucket")


def _full(dir: str) -> IO[bytes]:  # noqa: A002
    return open("/dev/full", "wb")


def test_full_disk_for_temporary_files(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", _full)

    def write() -> None:
        with storage.open_write_atomic(f"{gcs.url}/x") as file:
            file.write(bytes(1 << 20))

    _one_line(write, "cannot write gs://.*/x: the disk of temporary files .* is full; .*TMPDIR")
    assert gcs.emulator.names(gcs.bucket) == []


# ---------------------------------------------------------------- requests


def test_what_each_call_costs(gcs: Gcs) -> None:
    path = f"{gcs.url}/a/x"
    costs: dict[str, list[str]] = {
        "write_bytes_atomic": ["write"],
        "read_bytes": ["read"],
        "isfile": ["stat"],
        "size": ["stat"],
        "digest": ["stat"],
        "read_version": ["read"],
        "remove": ["delete"],
    }
    for name, expected in costs.items():
        arguments = (path, b"12") if name == "write_bytes_atomic" else (path,)
        gcs.emulator.reset_counts()
        getattr(storage, name)(*arguments)
        assert _kinds(gcs) == expected, name
    gcs.emulator.reset_counts()
    storage.walk(gcs.url)
    storage.listdir(gcs.url) if gcs.emulator.names(gcs.bucket) else None
    assert _kinds(gcs) == ["list"]


def test_object_is_not_rewritten_more_than_once_a_second(gcs: Gcs) -> None:
    path = f"{gcs.url}/log"
    start = time.monotonic()
    file = storage.AppendedFile(path, b"", None)
    for number in range(40):
        file.add(b"%d\n" % number)
        time.sleep(0.05)
    file.flush()
    assert storage.read_text(path).split() == [str(number) for number in range(40)]
    log = [r for r in gcs.emulator.log() if r.object == f"{gcs.bucket}/log"]
    writes = [r.time for r in log if r.kind in {"write", "compose"}]
    assert all(later - earlier > 0.95 for earlier, later in itertools.pairwise(writes))
    assert len(writes) <= 2 + (time.monotonic() - start)


def test_appending_does_not_send_everything_again(gcs: Gcs) -> None:
    path = f"{gcs.url}/log"
    file = storage.AppendedFile(path, bytes(1 << 20), None)
    gcs.emulator.reset_counts()
    file.add(b"more")
    file.flush()
    counts = gcs.emulator.counts()
    assert counts["bytes", "received"] + counts["bytes", "sent"] < 10_000
    assert storage.read_bytes(path)[-6:] == b"\0\0more"


def test_pending_lines_are_written_when_the_program_ends(gcs: Gcs) -> None:
    code = (
        "from trainer.core import storage\n"
        f"file = storage.AppendedFile('{gcs.url}/log', b'', None)\n"
        "for n in range(3): file.add(b'%d ' % n)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=gcs.environment(), check=True)
    assert gcs.emulator.get(gcs.bucket, "log") == b"0 1 2 "


def test_pending_lines_that_somebody_elses_file_keeps_out_are_named_in_one_line(gcs: Gcs) -> None:
    code = (
        "from trainer.core import storage\n"
        f"path = '{gcs.url}/log'\n"
        "file = storage.AppendedFile(path, b'', None)\n"
        "file.add(b'a '), file.add(b'b ')\n"
        "storage.write_bytes_atomic(path, b'theirs')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=gcs.environment(),
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert f"the end of {gcs.url}/log was not written: " in line
    assert gcs.emulator.get(gcs.bucket, "log") == b"theirs"


# ---------------------------------------------------------------- files


def test_reader_is_a_file(gcs: Gcs) -> None:
    data = random.Random(3).randbytes(1_000_000)
    storage.write_bytes_atomic(f"{gcs.url}/x", data)
    expected, draws = io.BytesIO(data), random.Random(4)
    with storage.open_read(f"{gcs.url}/x") as file:
        for _ in range(30):
            offset, length = draws.randrange(1_000_100), draws.choice([1, 100, 70_000, 900_000])
            whence = draws.choice([io.SEEK_SET, io.SEEK_END])
            at = offset if whence == io.SEEK_SET else -min(offset, 1_000_000)
            assert file.seek(at, whence) == expected.seek(at, whence)
            assert file.read(length) == expected.read(length)
    with storage.open_read(f"{gcs.url}/x") as file:
        assert file.read() == data


def test_reading_on_takes_ever_larger_blocks(gcs: Gcs) -> None:
    storage.write_bytes_atomic(f"{gcs.url}/x", bytes(40 << 20))
    gcs.emulator.reset_counts()
    with storage.open_read(f"{gcs.url}/x") as file:
        while file.read(1 << 16):
            pass
    assert len(_kinds(gcs)) < 10


def test_reader_stays_with_the_generation_that_it_opened(gcs: Gcs) -> None:
    storage.write_bytes_atomic(f"{gcs.url}/x", bytes(12 << 20))
    with storage.open_read(f"{gcs.url}/x") as file:
        file.read(10)
        storage.write_bytes_atomic(f"{gcs.url}/x", b"\1" * (12 << 20))
        with pytest.raises(FileNotFoundError):
            file.read()


def test_sibling_names_are_not_below(gcs: Gcs) -> None:
    for name in ("step-1/x", "step-10/x", "step-1.txt"):
        storage.write_text_atomic(f"{gcs.url}/{name}", "")
    storage.remove_tree(f"{gcs.url}/step-1")
    assert gcs.emulator.names(gcs.bucket) == ["step-1.txt", "step-10/x"]
    assert not storage.exists(f"{gcs.url}/step-1")


def test_gcs_scheme_is_gs() -> None:
    assert storage.resolve("gcs://bucket/x") == "gs://bucket/x"


def test_config_with_a_base_beside_it(gcs: Gcs) -> None:
    storage.write_text_atomic(f"{gcs.url}/configs/base.yaml", "training: {total_kimg: 7}")
    storage.write_text_atomic(f"{gcs.url}/run.yaml", "base: configs/base.yaml")
    assert config.load(f"{gcs.url}/run.yaml", []).training.total_kimg == 7


# ---------------------------------------------------------------- TensorFlow


def test_tensorflow_knows_gs(gcs: Gcs) -> None:
    storage.prepare_tensorflow(gcs.url)
    storage.prepare_tensorflow("local")


def test_tensorflow_without_gs_is_given_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(tf.io.gfile, "get_registered_schemes", lambda: ["", "file"])
    monkeypatch.setitem(sys.modules, "tensorflow_io", None)
    _one_line(lambda: storage.prepare_tensorflow("gs://bucket"), r"stylegan-trainer\[io\]")
    tensorflow_io = type(sys)("tensorflow_io")
    monkeypatch.setitem(sys.modules, "tensorflow_io", tensorflow_io)
    storage.prepare_tensorflow("gs://bucket")
