"""The environment in which Vertex AI starts a training process.

`baseOutputDirectory` of a job becomes AIP_CHECKPOINT_DIR (`.../checkpoints/`), AIP_MODEL_DIR
(`.../model/`) and AIP_TENSORBOARD_LOG_DIR (`.../logs/`, from which a TensorBoard instance takes
events). Flags and config win over them. Who the workers are, CLUSTER_SPEC and TF_CONFIG tell; see
`distribution.cluster`.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core import flags

CHECKPOINT_DIR = "AIP_CHECKPOINT_DIR"
MODEL_DIR = "AIP_MODEL_DIR"
TENSORBOARD_DIR = "AIP_TENSORBOARD_LOG_DIR"
_CHECKPOINTS = "checkpoints"  # the directory in the workdir that this trainer takes, too


@dataclass(frozen=True)
class Choice:
    """A path and where it is from.

    Attributes:
      path: '' if nothing gives one.
      source: a flag, a config's key or a variable.
    """

    path: str
    source: str

    def __str__(self) -> str:
        return f"{self.path} ({self.source})"


def workdir(given: str | None) -> Choice:
    """The directory of the run.

    Args:
      given: --workdir.
    """
    if given:
        return Choice(given, "--workdir")
    path = (flags.env(CHECKPOINT_DIR) or "").rstrip("/")
    parent, _, last = path.rpartition("/")
    return Choice(parent if last == _CHECKPOINTS else path, CHECKPOINT_DIR)


def tensorboard_dir(given: str) -> Choice:
    """The directory of events; '' for the workdir of the run.

    Args:
      given: `telemetry.tensorboard_dir`.
    """
    if given:
        return Choice(given, "telemetry.tensorboard_dir")
    return Choice((flags.env(TENSORBOARD_DIR) or "").rstrip("/"), TENSORBOARD_DIR)


def model_dir(given: str) -> Choice:
    """The directory to which the trained generator is exported; '' for none.

    Args:
      given: `checkpoint.export_dir`.
    """
    if given:
        return Choice(given, "checkpoint.export_dir")
    return Choice((flags.env(MODEL_DIR) or "").rstrip("/"), MODEL_DIR)


def job() -> str:
    """The job that this process is part of, '' outside of Vertex AI."""
    number, project = flags.env("CLOUD_ML_JOB_ID"), flags.env("CLOUD_ML_PROJECT_ID")
    image = flags.env("TRAINER_IMAGE")
    parts = [
        f"job {number}" if number else "",
        f"project {project}" if project else "",
        f"image {image}" if image else "",
    ]
    return ", ".join(filter(None, parts))
