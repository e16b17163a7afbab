"""Division of a step's images into rounds, replicas and groups."""

from __future__ import annotations

import dataclasses

from trainer.config.schema import Config
from trainer.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """The layout of a step's images.

    groups_per_step * group_size = batches * global_batch, since an objective may read several
    batches of reals in a step; global_batch = rounds * num_replicas * per_replica_batch, and
    per_replica_batch, the images of one replica in one round, is whole groups too.
    """

    batches: int
    global_batch: int
    rounds: int
    num_replicas: int
    groups_per_step: int
    group_size: int
    per_replica_batch: int


def batch_arithmetic(config: Config, num_replicas: int) -> BatchArithmetic:
    """Divides a step's batch into rounds, replicas and whole groups.

    Args:
      config: resolved.
      num_replicas: devices over all hosts.

    Raises:
      ConfigError: it does not divide; names the batch sizes that would.
    """
    batch, group = config.training.batch_size, config.training.group_size
    if batch == "auto" or group == "auto":
        raise ConfigError("training.batch_size and training.group_size must be resolved first")
    rounds = config.training.rounds
    shrink = config.objective.pl_batch_shrink
    if config.objective.pl_weight != 0 and group % shrink:
        raise ConfigError(
            f"objective.pl_batch_shrink = {shrink} does not divide a group of {group} images "
            "(training.group_size); change one of them, or set objective.pl_weight to 0"
        )
    unit = rounds * num_replicas * group
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"training.batch_size = {batch} does not divide into {rounds} rounds x {num_replicas} "
            f"replicas x groups of {group} images ({unit}); set it to {nearest}, or change "
            "training.rounds, training.group_size or the number of replicas"
        )
    return BatchArithmetic(
        batches=config.objective.batches,
        global_batch=batch,
        rounds=rounds,
        num_replicas=num_replicas,
        groups_per_step=config.objective.batches * batch // group,
        group_size=group,
        per_replica_batch=batch // (rounds * num_replicas),
    )
