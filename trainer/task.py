"""Trains a network: `python -m trainer.task --config=... --data=... --workdir=...`.

Run the same command again to go on from the newest checkpoint in the workdir.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags as absl_flags

from trainer.core import config as config_lib
from trainer.core import flags, storage
from trainer.core.errors import UsageError
from trainer.distribution import cluster, compilation

FLAGS = absl_flags.FLAGS

_SHORTHANDS = ("strategy", "precision", "jit")


def define_flags() -> None:
    """The command's flags."""
    text, several = absl_flags.DEFINE_string, absl_flags.DEFINE_multi_string
    text("config", None, "YAML preset or config, local or gs://.")
    text("data", None, "Directory of the converted data set; overrides data.path.")
    text("workdir", None, "Directory of the run, local or gs://.")
    for name in _SHORTHANDS:
        text(name, None, f"The same as --set run.{name}=...")
    several("set", [], "section.key=value, overrides the config; may be repeated.")
    absl_flags.DEFINE_boolean("dry_run", False, "Print what would be done, and stop.")
    absl_flags.DEFINE_list(
        "allow_change", [], "Keys that may differ from those of the workdir's checkpoint."
    )


def main(_: Sequence[str]) -> None:
    """Trains as the flags say."""
    if not FLAGS.config or not (FLAGS.workdir or FLAGS.dry_run):
        raise UsageError("--config and --workdir are needed; --help lists the flags")
    overrides = list(FLAGS.set)
    given = {name: FLAGS[name].value for name in _SHORTHANDS}
    overrides += [f"run.{name}={value}" for name, value in given.items() if value is not None]
    if FLAGS.data:
        overrides.append(f"data.path={FLAGS.data}")
    config = config_lib.load(FLAGS.config, overrides)
    if not config.data.path:
        raise UsageError("no data set: give --data, the directory that trainer.convert wrote")
    try:
        workers = cluster.find(config.run.strategy)
    except cluster.EvaluatorTask as nothing:
        print(f"nothing to do: {nothing}")
        return
    compilation.keep(config.run.compilation_cache)
    with cluster.member(workers, config):
        # TensorFlow takes seconds to import; a mistake above is told before.
        from trainer.training import loop

        loop.train(
            config,
            storage.resolve(FLAGS.workdir or ""),
            dry_run=FLAGS.dry_run,
            allow_change=FLAGS.allow_change,
            cluster=workers,
        )


if __name__ == "__main__":
    from trainer.distribution import host

    host.prepare()
    define_flags()
    flags.run(main, usage=__doc__ or "")
