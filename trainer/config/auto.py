"""Values of the keys that are 'auto'."""

from __future__ import annotations

import dataclasses

from trainer.config.schema import Config
from trainer.core.errors import ConfigError
from trainer.core.sections import fill


def resolve(config: Config, *, resolution: tuple[int, int]) -> Config:
    """The config with every 'auto' replaced by what the rules of its family give.

    `run.strategy` and `run.jit` keep their 'auto': they are about the machine, not about the run.

    Args:
      config: as loaded.
      resolution: (height, width) of the data set.

    Raises:
      ConfigError: the networks cannot make this resolution, or keys don't fit each other.
    """
    given = config.training.batch_size
    values = config.model.auto_values(resolution, None if given == "auto" else given)
    resolved = dataclasses.replace(
        config,
        model=config.model.resolved(resolution),
        objective=fill(config.objective, values["objective"]),
        training=fill(config.training, values["training"]),
    )
    group, smallest = resolved.training.group_size, config.model.SMALLEST_GROUP
    if isinstance(group, int) and group < smallest:
        raise ConfigError(
            f"training.group_size = {group}: {config.model.family} normalises by the statistics of a "
            f"group, which needs {smallest} images or more"
        )
    resolved.objective.check(
        styles=config.model.STYLES,
        family=config.model.family,
        ada=config.augment.mode == "ada",
    )
    every, in_a_row = config.checkpoint.every_steps, config.run.steps_per_loop
    if every % in_a_row:
        raise ConfigError(
            f"checkpoint.every_steps = {every} is no multiple of run.steps_per_loop = {in_a_row}; "
            f"set it to {-(-every // in_a_row) * in_a_row}"
        )
    return resolved
