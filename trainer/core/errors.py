"""The errors a user can meet, each with the exit code that scripts and schedulers act on.

A message is one line: what went wrong, where (file, shard, record, key) and what to do next.
"""

from __future__ import annotations

import importlib.util


class TrainerError(Exception):
    """Anything the trainer reports on purpose; the commands turn it into one line and an exit.

    Attributes:
      exit_code: of the process.
      heading: what its line begins with; a stop that was asked for is no error.
      patience: with code 75: seconds within which whoever takes the machine away also ends this
        process; 0 if nobody does, since the user has stopped it or its time is up.
    """

    exit_code = 1
    heading = "error"
    patience = 300.0


class UsageError(TrainerError):
    """A command was called in a way that cannot work."""

    exit_code = 2


class ConfigError(UsageError):
    """A config key, type or value is wrong, or the values do not fit together."""


class MissingTensorFlowError(UsageError, ImportError):
    """TensorFlow is not installed; its wheels differ by platform, so it comes as an extra."""


class DataError(TrainerError):
    """The data set or a source image cannot be used."""

    exit_code = 3


class StorageError(TrainerError):
    """A path could not be read or written."""

    exit_code = 4


class CheckpointError(StorageError):
    """A checkpoint is missing, damaged, or of another run."""


class DivergedError(TrainerError):
    """Training produced a non-finite value."""

    exit_code = 5


class PreemptedError(TrainerError):
    """The machine is going away or the time is up: state is saved, run the same command again."""

    exit_code = 75
    heading = "stopped"

    def __init__(self, message: str, patience: float = TrainerError.patience) -> None:
        super().__init__(message)
        self.patience = patience


def require_tensorflow() -> None:
    """Checks, without importing it, that some TensorFlow wheel is installed.

    Raises:
      MissingTensorFlowError: naming the extras, one of which brings it.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise MissingTensorFlowError(
            "TensorFlow is not installed; install one of the extras that bring it: "
            "pip install 'stylegan-trainer[cpu]', '[gpu]' or '[tpu]'"
        )
