"""Network families, one file each, and the ops they share."""

from trainer.core.errors import require_tensorflow

require_tensorflow()
