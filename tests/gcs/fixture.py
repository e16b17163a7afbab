"""The fixture `gcs`: a Cloud Storage for tests, all clients of this process led to it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.gcs.emulator import SERVERS, Emulator
from trainer.core import cloud_requests

# Read when gcsfs is imported, by whatever test comes first.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@dataclass(frozen=True)
class Gcs:
    """A bucket of the test's own on the local Cloud Storage.

    Attributes:
      emulator: faults, counts, log.
      bucket: its name.
      url: gs://bucket.
    """

    emulator: Emulator
    bucket: str
    url: str

    def environment(self) -> dict[str, str]:
        """The whole environment of a subprocess that is to use it."""
        return os.environ | self.emulator.environment()


@pytest.fixture(scope="session")
def gcs_emulators() -> Iterator[Callable[[str], Emulator]]:
    """The Cloud Storage with a server, which is started when it is first asked for."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda server: stack.enter_context(Emulator(server)))


@pytest.fixture
def gcs(
    gcs_emulators: Callable[[str], Emulator],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Gcs]:
    """An empty bucket; the clients in this process, TensorFlow too, come to it during the test.

    `pytest.mark.parametrize("gcs", SERVERS, indirect=True)` for another server than the first.
    """
    gcs_emulator = gcs_emulators(getattr(request, "param", SERVERS[0]))
    for name, value in gcs_emulator.environment().items():
        monkeypatch.setenv(name, value)
    bucket = f"tests-{uuid.uuid4().hex[:12]}"
    url = gcs_emulator.url(bucket)
    _forget_clients()
    gcs_emulator.faults.clear()
    gcs_emulator.reset_counts()
    yield Gcs(gcs_emulator, bucket, url)
    gcs_emulator.faults.clear()
    _forget_clients()


def _forget_clients() -> None:
    """Clients keep the address that was in force when they were made."""
    cloud_requests.forget_client()
    if "gcsfs" in sys.modules:
        sys.modules["gcsfs"].GCSFileSystem.clear_instance_cache()
