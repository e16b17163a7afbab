"""The versions of what is installed: of this package, of TensorFlow and of Python."""

from __future__ import annotations

import platform
from importlib import metadata

import trainer


def tensorflow_version() -> str:
    """The version of the installed TensorFlow, without importing it; empty if there is none."""
    for name in ("tensorflow", "tensorflow-cpu", "tensorflow-tpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def describe() -> str:
    """A line that names all of them."""
    tensorflow = tensorflow_version()
    return (
        f"stylegan-trainer {trainer.__version__} "
        f"({f'TensorFlow {tensorflow}' if tensorflow else 'without TensorFlow'}, "
        f"Python {platform.python_version()})"
    )
