"""A Vertex AI that takes jobs and runs none, and the command that submits to it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from absl import flags as absl_flags

from tests.vertex.fake import Vertex
from trainer import submit


@pytest.fixture
def vertex(tmp_path: pathlib.Path) -> Iterator[Vertex]:
    with Vertex(tmp_path, run=False) as service:
        yield service


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, vertex: Vertex) -> Callable[..., None]:
    """Runs the command in this process, against the service."""

    def run(*arguments: str) -> None:
        values = absl_flags.FlagValues()
        submit.define_flags(values)
        fixed = [f"--endpoint={vertex.endpoint}", "--project=pay", "--poll_sec=0.1"]
        rest = values(["submit", *fixed, *arguments])
        monkeypatch.setattr(submit, "FLAGS", values)
        submit.main(rest)

    return run
