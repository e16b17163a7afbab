"""The line that names what is installed."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest

import trainer
from trainer.core import installation


@pytest.mark.parametrize("name", ["tensorflow", "tensorflow-cpu", "tensorflow-tpu", ""])
def test_versions_are_those_of_the_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise metadata.PackageNotFoundError(asked)
        return "2.99.1"

    monkeypatch.setattr(metadata, "version", version)
    found = "TensorFlow 2.99.1" if name else "without TensorFlow"
    assert installation.describe() == (
        f"stylegan-trainer {trainer.__version__} ({found}, Python {platform.python_version()})"
    )


def test_the_version_of_the_tensorflow_that_is_imported() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    assert installation.tensorflow_version() == tensorflow.__version__
