"""The config: typed sections, YAML presets with `base:`, overrides, and the rules between keys.

    config = load("auto", ["data.mirror=true", "training.batch_size=64"])
    config = resolve(config, resolution=(256, 256))     # no 'auto' is left
    batch = batch_arithmetic(config, num_replicas=8)

Nothing here needs TensorFlow.
"""

from trainer.config.auto import resolve
from trainer.config.batch import BatchArithmetic, batch_arithmetic
from trainer.config.cost import Cost, estimate_cost
from trainer.config.identity import diff, fingerprint
from trainer.config.loading import (
    check_keys,
    from_dict,
    known_keys,
    load,
    schedules,
    to_dict,
    to_yaml,
)
from trainer.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    RunConfig,
    TelemetryConfig,
    TrainingConfig,
)
from trainer.core.schedule import Schedule
from trainer.objectives.keys import ObjectiveConfig

__all__ = [
    "AugmentConfig",
    "BatchArithmetic",
    "CheckpointConfig",
    "Config",
    "Cost",
    "DataConfig",
    "ObjectiveConfig",
    "RunConfig",
    "Schedule",
    "TelemetryConfig",
    "TrainingConfig",
    "batch_arithmetic",
    "check_keys",
    "diff",
    "estimate_cost",
    "fingerprint",
    "from_dict",
    "known_keys",
    "load",
    "resolve",
    "schedules",
    "to_dict",
    "to_yaml",
]
