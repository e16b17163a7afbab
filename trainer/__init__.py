"""StyleGAN-family training on TensorFlow 2, for Google Cloud.

import trainer

images = trainer.load("runs/photos").sample([0, 1], label="cat", truncation_psi=0.7)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from trainer.serving.rendering import TrainedGenerator

__all__ = ["load"]
__version__ = "0.1.0"


def load(
    path: str | os.PathLike[str], *, noise_mode: str = "const", batch: int = 8
) -> TrainedGenerator:
    """The trained generator of a run or of one checkpoint, to make images with.

    TensorFlow is imported by the first call, not with this package; unless TF_CPP_MIN_LOG_LEVEL is
    set, it then logs errors alone.

    Args:
      path: directory of a run, whose newest checkpoint is taken, or of a checkpoint; local or
        gs://.
      noise_mode: const, random or none.
      batch: images rendered at a time; changes nothing but memory and speed.

    Raises:
      MissingTensorFlowError: TensorFlow is not installed.
      CheckpointError: there is no whole checkpoint.
      UsageError: there is no such noise mode.
    """
    from trainer.core.errors import require_tensorflow

    require_tensorflow()
    from trainer.distribution import host

    host.quieten_tensorflow()
    from trainer.serving import rendering

    return rendering.load(path, noise_mode=noise_mode, batch=batch)
