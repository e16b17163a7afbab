"""Check of a config against a target of Vertex AI, and the changes that would make it fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trainer import config as config_lib
from trainer.config import BatchArithmetic, Config, Cost
from trainer.core.errors import ConfigError
from trainer.families.protocol import DataShape
from trainer.vertex import targets
from trainer.vertex.targets import GIB, GPUS, Target

_TIGHT = 0.75  # share of the memory from which an estimate is worth a warning


@dataclass(frozen=True)
class Shape:
    """Facts of a data set that decide where it can be trained on.

    Attributes:
      resolution: (height, width).
      channels: of the images.
      num_classes: of its labels.
      shards: record files; 0 if not known.
    """

    resolution: tuple[int, int]
    channels: int = 3
    num_classes: int = 0
    shards: int = 0


@dataclass(frozen=True)
class Plan:
    """The placement of a config on a target.

    Attributes:
      config: resolved.
      arithmetic: its batch.
      cost: what it takes.
      warnings: what isn't wrong, but should be known.
    """

    config: Config
    arithmetic: BatchArithmetic
    cost: Cost
    warnings: tuple[str, ...]


def plan(config: Config, shape: Shape, target: Target) -> Plan:
    """Checks that a config runs on a target.

    Raises:
      ConfigError: it doesn't; says why, and what would.
    """
    resolved = config_lib.resolve(config, resolution=shape.resolution)
    try:
        return _try_plan(resolved, shape, target)
    except ConfigError as error:
        raise ConfigError(
            f"--target={target.name}: {error}; {_what_fits(resolved, shape, target)}"
        ) from None


def _try_plan(config: Config, shape: Shape, target: Target) -> Plan:
    _check_strategy(config, target)
    _check_precision(config, target)
    if shape.shards % target.machines:
        raise ConfigError(
            f"{shape.shards} shards don't divide over {target.machines} machines "
            "(`python -m trainer convert` makes another number with --shards)"
        )
    arithmetic = _arithmetic(config, target)
    classes = shape.num_classes if config.data.use_labels else 0
    data = DataShape(shape.resolution, shape.channels, (1,) * classes)
    found = config_lib.estimate_cost(config, arithmetic, data)
    share = found.total_mib / target.memory_mib
    if share > 1:
        raise ConfigError(
            f"{arithmetic.per_replica_batch} images on each device need about "
            f"{found.total_mib / GIB:.1f} GiB, and one {target.unit} has "
            f"{target.memory_mib / GIB:.0f}"
        )
    return Plan(config, arithmetic, found, tuple(_warnings(share, target)))


def _arithmetic(config: Config, target: Target) -> BatchArithmetic:
    """As for a run, in fewer words: what else would divide is told by `_what_fits`."""
    try:
        return config_lib.batch_arithmetic(config, target.devices)
    except ConfigError:
        batch, group = config.training.batch_size, config.training.group_size
        shrink = config.objective.pl_batch_shrink
        if config.objective.pl_weight != 0 and int(group) % shrink:
            raise
        raise ConfigError(
            f"a batch of {batch} doesn't divide into {config.training.rounds} rounds x "
            f"{target.devices} replicas x groups of {group} images"
        ) from None


def _check_strategy(config: Config, target: Target) -> None:
    asked = config.run.strategy
    if asked not in ("auto", target.strategy):
        raise ConfigError(
            f"run.strategy = {asked!r} isn't for {target.name}, which runs {target.strategy!r}"
        )


def _check_precision(config: Config, target: Target) -> None:
    precision = config.run.precision
    if target.platform == "TPU" and precision in ("float16", "float64"):
        raise ConfigError(f"run.precision = {precision!r}: TPUs compute in bfloat16 or float32")
    if target.platform == "CPU" and precision == "float16":
        raise ConfigError("run.precision = 'float16' is far slower than float32 on a CPU")
    if target.platform == "GPU" and precision == "bfloat16" and not GPUS[target.kind].bfloat16:
        raise ConfigError(
            f"run.precision = 'bfloat16': a {target.unit} has float16 only (bfloat16 came with "
            "Ampere)"
        )


def _warnings(share: float, target: Target) -> list[str]:
    found = []
    if share > _TIGHT:
        found.append(
            f"memory is tight: about {share:.0%} by estimate; if it doesn't fit, raise "
            "training.rounds: the numbers stay the same"
        )
    if target.is_pod:
        found.append(
            "a TPU over several hosts needs an image made from Vertex AI's tf-tpu-pod-base, and "
            "was never tried with this trainer"
        )
    if target.network:
        found.append(
            f"{target.machines} machines of this kind reach their network's speed only with "
            f"{target.network}, which the image hasn't"
        )
    return found


def _fits(config: Config, shape: Shape, target: Target) -> bool:
    try:
        _try_plan(config, shape, target)
    except ConfigError:
        return False
    return True


def _what_fits(config: Config, shape: Shape, target: Target) -> str:
    """Changes that would fit: flags for the same target, or else other targets."""
    keys = _remedy(config, shape, target)
    if keys:
        return f"it fits with {_overrides(keys)}"
    others = [targets.parse(name) for name in targets.names()]
    others = [t for t in others if not t.is_pod]
    others.sort(key=lambda t: (t.kind != target.kind, t.platform != target.platform, -t.devices))
    if fitting := [t.name for t in others if _fits(config, shape, t)]:
        return f"it fits on {', '.join(fitting[:3])}"
    if batch := _fitting_batch(config, shape, target):
        return f"it fits with {batch}"
    for other in others:
        if keys := _remedy(config, shape, other):
            return f"it fits on {other.name} with {_overrides(keys)}"
    return "no target fits: take a smaller network"


def _overrides(keys: dict[str, Any]) -> str:
    return " ".join(f"--set={key}={value}" for key, value in keys.items())


def _remedy(config: Config, shape: Shape, target: Target) -> dict[str, Any]:
    """The fewest changes that leave the result alone (up to rounding) and make the target fit."""
    run, batch = config.run, int(config.training.batch_size)
    precisions = [run.precision, "bfloat16", "float16", "float32"]
    strategy = run.strategy if run.strategy == target.strategy else "auto"
    share, rest = divmod(batch, int(config.training.group_size) * target.devices)
    divisors = [] if rest else [n for n in range(1, share + 1) if share % n == 0]
    for precision in dict.fromkeys(precisions):
        for rounds in dict.fromkeys([config.training.rounds, *divisors]):
            changed = dataclasses.replace(
                config,
                run=dataclasses.replace(run, precision=precision, strategy=strategy),
                training=dataclasses.replace(config.training, rounds=rounds),
            )
            if _fits(changed, shape, target):
                pairs = {
                    "run.strategy": (run.strategy, strategy),
                    "run.precision": (run.precision, precision),
                    "training.rounds": (config.training.rounds, rounds),
                }
                return {key: new for key, (old, new) in pairs.items() if new != old}
    return {}


def _fitting_batch(config: Config, shape: Shape, target: Target) -> str:
    """The nearest batch size that the target takes; it changes the result."""
    group, batch = int(config.training.group_size), int(config.training.batch_size)
    unit = group * target.devices * config.training.rounds
    for size in sorted(range(unit, 2 * batch + unit, unit), key=lambda size: abs(size - batch)):
        training = dataclasses.replace(config.training, batch_size=size)
        if _fits(dataclasses.replace(config, training=training), shape, target):
            return f"--set=training.batch_size={size}"
    return ""
