"""Losses, augmentation, optimizer, state, step, checkpoint and the loop."""

from trainer.core.errors import require_tensorflow

require_tensorflow()
