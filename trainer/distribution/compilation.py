"""Compiled programs kept on disk, so that the next start of a run need not compile them again.

XLA looks a program up by its whole text, so a changed network or batch is never mistaken for
another. It does not look at what the program was compiled by and for: that is in the name of the
folder here (TensorFlow's version, processor, settings of XLA). TensorFlow numbers the functions of
a process, and the numbers are part of the text: for a resumed run to find what the first start has
left, both make the step's functions before anything in which they differ (`TrainStep.trace`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat

from trainer.core import installation, storage
from trainer.core.errors import ConfigError, StorageError

_CPUINFO = "/proc/cpuinfo"
# What else decides how XLA compiles.
_SETTINGS = ("XLA_FLAGS", "TF_XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS", "CUDA_VISIBLE_DEVICES")


def keep(directory: str) -> None:
    """Lets XLA keep its programs in a directory; to be called before TensorFlow is imported.

    Nothing is ever dropped from it. A program can be run by anyone's run that finds it, so the
    directory must be the user's own.

    Args:
      directory: local; made if it isn't there. Empty keeps nothing.

    Raises:
      ConfigError: it is remote.
      StorageError: it can't be used here: it can't be made or written, or others may write to it.
    """
    if not directory:
        return
    path = storage.resolve(directory)
    if storage.is_remote(path):
        raise ConfigError(
            f"run.compilation_cache = {directory!r}: what is in it is run as code; give a local "
            "directory of your own"
        )
    folder = os.path.join(os.path.abspath(path), _compiler())
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"run.compilation_cache = {directory!r}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"run.compilation_cache = {directory!r}: {folder} can't be written")
    for owned in (os.path.abspath(path), folder):
        status = os.stat(owned)
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StorageError(
                f"run.compilation_cache: others may write to {owned}, and what is in it is run as "
                f"code; choose a directory of your own, or chmod go-w it"
            )
    flags = os.environ.get("TF_XLA_FLAGS", "")
    os.environ["TF_XLA_FLAGS"] = f"{flags} --tf_xla_persistent_cache_directory={folder}".strip()
    # XLA tries to read each program as text first, and logs as an error that it is none.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") < "3":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _compiler() -> str:
    """A folder's name, different for whatever compiles differently."""
    settings = [f"{name}={os.environ.get(name, '')}" for name in _SETTINGS]
    parts = [installation.tensorflow_version(), platform.machine(), _processor(), *settings]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model, instructions and number of the processors."""
    lines = [platform.processor()]
    if os.path.exists(_CPUINFO):
        lines += [
            line
            for line in storage.read_text(_CPUINFO).splitlines()
            if line.startswith(("model name", "flags", "Features", "CPU "))
        ]
    return "\n".join(lines)
