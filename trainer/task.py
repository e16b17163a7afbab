"""Trains a network: --config, --data, --workdir.

  python -m trainer train --config=auto --data=data/emoji --workdir=runs/emoji

Run the same command again to go on from the newest checkpoint in the workdir. Exit code 75 asks for
that: the machine was taken away, or the time was up, and the run is saved. In a job on Vertex AI the
workdir is by default the one that the job's base output directory says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from trainer.core import flags

if __name__ == "__main__":
    flags.guard_imports()

from absl import flags as absl_flags

from trainer import config as config_lib
from trainer.config import Config, presets
from trainer.core import output, storage
from trainer.core.errors import StorageError, UsageError
from trainer.core.text import printable
from trainer.data import manifest as manifest_lib
from trainer.distribution import cluster, compilation, membership
from trainer.vertex import environment
from trainer.vertex.environment import Choice

FLAGS = absl_flags.FLAGS

_SHORTHANDS = ("strategy", "precision", "jit")


def define_flags() -> None:
    """The command's flags."""
    text, several = absl_flags.DEFINE_string, absl_flags.DEFINE_multi_string
    text("config", None, "Preset, or YAML file, local or gs://; list shows the presets.")
    text("data", None, "Directory of the converted data set; overrides data.path.")
    text("workdir", None, "Directory of the run, local or gs://; that of AIP_CHECKPOINT_DIR.")
    for name in _SHORTHANDS:
        text(name, None, f"The same as --set run.{name}=...")
    absl_flags.DEFINE_float(
        "max_run_hours", None, "Save, stop and exit with 75 after so many hours; run.max_hours."
    )
    several("set", [], "section.key=value, overrides the config.")
    absl_flags.DEFINE_boolean("dry_run", False, "Print what would be done, and stop.")
    absl_flags.DEFINE_float(
        "sec_per_kimg",
        None,
        "Measured seconds for 1000 images, to be told how long the run takes.",
        lower_bound=1e-6,
    )
    absl_flags.DEFINE_boolean(
        "verbose", False, "On a terminal, print all that a file gets of each tick."
    )
    absl_flags.DEFINE_list(
        "allow_change", [], "Keys that may differ from those of the workdir's checkpoint."
    )
    absl_flags.DEFINE_boolean(
        "start_over",
        False,
        "If all checkpoints in the workdir are damaged, move what the run has written to a directory "
        "before-<time> in it and start at step 0. Where a checkpoint is whole, the run goes on from it.",
    )


def main(_: Sequence[str]) -> None:
    """Trains as the flags say."""
    if FLAGS.config == "list":
        print(presets.listing())
        return
    output.outlive_readers()  # what nobody reads stops the run in time, saved
    workdir = environment.workdir(FLAGS.workdir)
    missing = [] if FLAGS.config else ["--config"]
    missing += [] if workdir.path or FLAGS.dry_run else ["--workdir"]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise UsageError(f"{' and '.join(missing)} {are} needed; --help lists the flags")
    config_lib.check_keys(FLAGS.allow_change, "--allow_change", ["data.fingerprint"])
    overrides = list(FLAGS.set)
    given = {name: FLAGS[name].value for name in _SHORTHANDS} | {"max_hours": FLAGS.max_run_hours}
    overrides += [f"run.{name}={value}" for name, value in given.items() if value is not None]
    if FLAGS.data:
        overrides.append(f"data.path={FLAGS.data}")
    config = config_lib.load(FLAGS.config, overrides)
    if not config.data.path:
        raise UsageError(
            "no data set: give --data, the directory that `python -m trainer convert` wrote"
        )
    events = environment.tensorboard_dir(config.telemetry.tensorboard_dir)
    model = environment.model_dir(config.checkpoint.export_dir)
    for line in _sources(config, workdir, events, model):
        print(printable(line), flush=True)
    config = dataclasses.replace(
        config,
        telemetry=dataclasses.replace(config.telemetry, tensorboard_dir=events.path),
        checkpoint=dataclasses.replace(config.checkpoint, export_dir=model.path),
    )
    try:
        workers = cluster.find(config.run.strategy)
    except cluster.EvaluatorTask as nothing:
        print(f"nothing to do: {nothing}")
        return
    try:
        compilation.keep(config.run.compilation_cache)
    except StorageError as error:
        # A preset's cache is welcome where there is a place for it; one that is asked for must be.
        if any(text.partition("=")[0].strip() == "run.compilation_cache" for text in overrides):
            raise
        print(f"note      compiled programs are not kept: {error}", flush=True)
    data = storage.resolve(config.data.path)
    if not storage.is_remote(data):
        manifest_lib.load(data)
    # TensorFlow takes seconds to import; a mistake above is told before.
    from trainer.training import preemption

    with (
        membership.member(workers, config) as members,
        preemption.Preemption(config.run, members) as stop,
    ):
        from trainer.serving import saved_model
        from trainer.training import loop

        model_dir, snapshots = storage.resolve(model.path), config.checkpoint.export_snapshots
        loop.train(
            config,
            storage.resolve(workdir.path),
            dry_run=FLAGS.dry_run,
            sec_per_kimg=FLAGS.sec_per_kimg,
            verbose=FLAGS.verbose,
            allow_change=FLAGS.allow_change,
            start_over=FLAGS.start_over,
            cluster=workers,
            stop=stop,
            at_snapshot=[saved_model.exporter(model_dir, snapshots=snapshots)] if model_dir else [],
        )


def _sources(config: Config, workdir: Choice, events: Choice, model: Choice) -> list[str]:
    """Logs the source of each path, and the job that this is."""
    paths = [
        ("config", Choice(FLAGS.config, "--config")),
        ("data", Choice(config.data.path, "--data" if FLAGS.data else "data.path")),
        ("workdir", workdir),
        ("tensorboard", events),
        ("export", model),
    ]
    shown = ", ".join(f"{name} {choice}" for name, choice in paths if choice.path)
    job = environment.job()
    return [f"paths     {shown}"] + ([f"vertex    {job}"] if job else [])


if __name__ == "__main__":
    from trainer.distribution import host

    host.prepare()
    define_flags()
    flags.run(main, usage=__doc__ or "")
