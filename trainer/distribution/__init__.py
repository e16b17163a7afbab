"""Where a step runs: strategies, devices and precision."""

from trainer.core.errors import require_tensorflow

require_tensorflow()
