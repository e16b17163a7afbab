"""A Cloud Storage on this machine, for TensorFlow, gcsfs and google-cloud-storage alike.

By hand, any command with its gs:// paths on it (its buckets are made on first use, and gone with
the command):

  python -m tests.gcs.emulator -- python -m trainer convert --dest=gs://bucket/photos ...

The servers behind it are written by others, independently of each other: what holds on one only
must not be relied upon.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tests.gcs import certificates
from tests.gcs.faults import Faults, Request

ROOT = pathlib.Path(__file__).parents[2]
SERVERS = ("fake-gcs-server", "gcp-storage-emulator")
_HOST = "127.0.0.1"


class _Set:
    """`Faults` whose every change reaches the emulator at once."""

    def __init__(self, emulator: Emulator):
        object.__setattr__(self, "_emulator", emulator)
        object.__setattr__(self, "_values", Faults())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._values, name)

    def __setattr__(self, name: str, value: object) -> None:
        self.update(**{name: value})

    def update(self, **changes: Any) -> None:
        """Changes several at once; the others stay."""
        self._replace(dataclasses.replace(self._values, **changes))

    def clear(self) -> None:
        """No faults any more."""
        self._replace(Faults())

    def _replace(self, values: Faults) -> None:
        object.__setattr__(self, "_values", values)
        self._emulator.control("POST", "faults", dataclasses.asdict(values))


class Emulator:
    """The Cloud Storage: one process, which ends with this one whatever happens.

    Args:
      server: one of `SERVERS`.

    Attributes:
      faults: what is done to requests; see `tests.gcs.faults.Faults`. Assign its attributes, or
        `update` several.
      port: of 127.0.0.1, for everything.
    """

    def __init__(self, server: str = SERVERS[0]) -> None:
        self.server = server
        self.port = 0
        self.faults: Any = _Set(self)
        self._process: subprocess.Popen[str] | None = None
        self._folder = pathlib.Path()

    def start(self) -> Emulator:
        """Starts it on a free port; a second or less."""
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="gcs-"))
        certificates.make(self._folder)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gcs.shim", str(self._folder), self.server],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline() or 0)
        assert self.port, "the local Cloud Storage did not start"
        return self

    def stop(self) -> None:
        """Ends it; what was stored is gone."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Emulator:
        return self.start()

    def __exit__(self, *unused: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Of its plain HTTP."""
        return f"http://{_HOST}:{self.port}"

    def url(self, bucket: str) -> str:
        """gs://bucket; the bucket is made if it is not there."""
        self._request("POST", "/storage/v1/b?project=tests", {"name": bucket})
        return f"gs://{bucket}"

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment for all three clients to come here."""
        proxy, trusted = self.address, str(self._folder / "authority.pem")
        return {
            "https_proxy": proxy,
            "HTTPS_PROXY": proxy,
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
            "CURL_CA_BUNDLE": trusted,
            "REQUESTS_CA_BUNDLE": trusted,
            "NO_GCE_CHECK": "true",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "tests",
            "GOOGLE_CLOUD_PROJECT": "tests",
            "STORAGE_EMULATOR_HOST": self.address,
            # gcsfs would first ask for the kind of the bucket by gRPC, for a minute.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def log(self) -> list[Request]:
        """All requests since the last `reset_counts`, in the order of their ends."""
        return [Request(*entry) for entry in self.control("GET", "log")["log"]]

    def counts(self) -> collections.Counter[tuple[str, str]]:
        """How many requests by (method, kind), `kind` as in `Request`.

        Besides, under ('bytes', 'received') and ('bytes', 'sent') the bytes of all bodies, and
        under ('fault', ...) how many faults of each sort were committed.
        """
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for request in self.log():
            counts[request.method, request.kind] += 1
            counts["bytes", "received"] += request.received
            counts["bytes", "sent"] += request.sent
            if request.fault:
                counts["fault", request.fault] += 1
        return counts

    def reset_counts(self) -> None:
        """Starts the log anew."""
        self.control("DELETE", "log")

    @contextlib.contextmanager
    def faulty(self, **faults: Any) -> Iterator[None]:
        """These faults within the block, none after it."""
        self.faults.update(**faults)
        try:
            yield
        finally:
            self.faults.clear()

    # The next three go past faults and log: they are the tests' own.

    def names(self, bucket: str) -> list[str]:
        """All objects in a bucket."""
        return sorted(
            item["name"]
            for item in self._request("GET", f"/storage/v1/b/{bucket}/o").get("items", ())
        )

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Writes an object."""
        quoted = urllib.parse.quote(name, safe="")
        self._request(
            "POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quoted}", data
        )

    def get(self, bucket: str, name: str) -> bytes:
        """Reads an object."""
        quoted = urllib.parse.quote(name, safe="")
        return self._raw("GET", f"/storage/v1/b/{bucket}/o/{quoted}?alt=media")

    def control(self, method: str, what: str, document: object = None) -> dict[str, Any]:
        """Talks to the process; see `shim`."""
        return json.loads(self._raw(method, f"/__shim__/{what}", document))

    def _request(self, method: str, target: str, document: object = None) -> dict[str, Any]:
        return json.loads(self._raw(method, target, document))

    def _raw(self, method: str, target: str, document: object = None) -> bytes:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=60)
        try:
            kind = "octet-stream" if isinstance(document, bytes) else "json"
            headers = {"Content-Type": f"application/{kind}", "X-Tests": "own"}
            connection.request(method, target, None if document is None else body, headers)
            answer = connection.getresponse()
            data = answer.read()
            exists = answer.status == http.client.CONFLICT  # a bucket that was made before
            assert answer.status < 300 or exists, f"{method} {target}: {answer.status} {data!r}"
            return data
        finally:
            connection.close()


def main(argv: list[str]) -> int:
    command = argv[argv.index("--") + 1 :] if "--" in argv else []
    if not command:
        print("usage: python -m tests.gcs.emulator -- COMMAND...", file=sys.stderr)
        return 2
    with Emulator() as emulator:
        for bucket in sorted({part[5:].split("/")[0] for text in command for part in _urls(text)}):
            emulator.url(bucket)
        return subprocess.run(
            command, env=os.environ | emulator.environment(), check=False
        ).returncode


def _urls(text: str) -> list[str]:
    return [part for part in text.replace("=", " ").split() if part.startswith("gs://")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
