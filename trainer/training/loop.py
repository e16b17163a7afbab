"""A run from start to end."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import trainer
from trainer import config as config_lib
from trainer.config import Config
from trainer.core import lease as lease_lib
from trainer.core import storage
from trainer.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    PreemptedError,
    StorageError,
)
from trainer.core.schedule import Number, Schedule
from trainer.core.text import image_size, printable, quoted
from trainer.data import manifest as manifest_lib
from trainer.data.manifest import Manifest
from trainer.data.pipeline import ImageStream
from trainer.data.shards import BadRecords
from trainer.distribution.cluster import Cluster
from trainer.telemetry import images as telemetry_images
from trainer.telemetry.statsfile import Stat, constant
from trainer.telemetry.writers import Telemetry
from trainer.training import (
    aside,
    build,
    checkpoint,
    duration,
    loss_scale,
    preemption,
    run_info,
)
from trainer.training.checkpoint import Checkpoints, Inventory
from trainer.training.preemption import Preemption
from trainer.training.run import Run, check_data, shape_of
from trainer.training.snapshot import AtSnapshot, Snapshot, Snapshots
from trainer.training.state import TrainState
from trainer.training.step import agree


def train(
    config: Config,
    workdir: str,
    *,
    dry_run: bool = False,
    sec_per_kimg: float | None = None,
    verbose: bool = False,
    allow_change: Sequence[str] = (),
    start_over: bool = False,
    cluster: Cluster | None = None,
    stop: Preemption | None = None,
    at_snapshot: Sequence[AtSnapshot] = (),
) -> None:
    """Trains until `training.total_kimg`, from where the workdir's newest checkpoint is.

    A run that is there already, or past it, keeps every file as it is.

    Args:
      config: as loaded; 'auto' is resolved here, since that needs the data set.
      workdir: directory of the run, local or gs://.
      dry_run: say what would be done, and do nothing.
      sec_per_kimg: measured seconds for 1000 images, to say at the start how long the run takes.
      verbose: print whole tick lines on a terminal, too.
      allow_change: keys that may differ from those of the checkpoint.
      start_over: where all checkpoints are damaged, move what the run has written aside and start at
        step 0, instead of ending with an error.
      cluster: the workers of the run, if there are several: all of them train, and the chief alone
        writes to the workdir.
      stop: what may end the run early, between two steps; all of its workers have one, or none.
      at_snapshot: is called by the chief with each grid of images, and at the end of the run.

    Raises:
      ConfigError: the config doesn't fit itself, the data or the checkpoint.
      DataError: the data set can't be used.
      StorageError: the workdir can't be written.
      CheckpointError: all of the checkpoints are damaged.
      DivergedError: a loss, a gradient or a variable is not finite.
      PreemptedError: stopped early; the run is saved.
    """
    # ------------------------------------------------------------------ set up
    started = time.monotonic()
    manifest = manifest_lib.load(storage.resolve(config.data.path))
    for path in (manifest.directory, workdir):
        storage.prepare_tensorflow(path)
    run = Run.create(config, shape_of(manifest, config), cluster, stop)
    check_data(run, manifest.num_images)
    config, data, arithmetic = run.config, run.data, run.arithmetic
    strategy, is_chief = run.placement.strategy, run.placement.is_chief
    _print_plan(run, manifest, sec_per_kimg, dry_run=dry_run)
    if dry_run:
        return

    with contextlib.ExitStack() as closing:
        # ------------------------------------------------------------------ state
        lease: lease_lib.Lease | None = None
        fence: storage.Fence = contextlib.nullcontext
        if is_chief:
            lease = closing.enter_context(lease_lib.acquire(workdir, keeps_record=True))
            fence = lease.fenced
        files = storage.walk(workdir)
        inventory = Inventory(workdir, files, lease.record if lease else None)
        through: dict[str, int] = {}
        if lease:
            through = inventory.last_steps(lease.record.pending)
            inventory.record = lease.record.settled(through)
        found, skipped = inventory.newest()
        for line in skipped:
            print(printable(line))
        if found is not None:
            _check_same_run(found, config, manifest, allow_change)
        elif inventory.damaged and not start_over:
            raise _all_damaged(workdir, inventory.damaged)  # what counts may be restored, too
        if lease:
            lease.settle(through)
        if found is None and inventory.damaged and lease:
            moved = aside.move(workdir, _tensorboard_dir(config, workdir), files, lease)
            print(f"starting over: what the run had written is in {moved} now")
            files = storage.walk(workdir)
            inventory = Inventory(workdir, files, lease.record)
        if not agree(strategy, found.step if found else 0):
            raise CheckpointError(
                f"the workers have found different checkpoints in {workdir}; it must be one directory "
                "that all of them see: put it on gs:// or a shared disk"
            )
        total_images = round(config.training.total_kimg * 1000)
        if found is not None and found.info["images"] >= total_images:
            if is_chief:
                _at_the_end(found, config, workdir, at_snapshot)
            return
        # ------------------------------------------------------------------ step function
        state = run.state()
        train_step = run.step(state)
        if run.jit:
            train_step.trace([*data.resolution, data.channels])

        # ------------------------------------------------------------------ checkpoint
        checkpoints = Checkpoints(
            workdir,
            config.checkpoint,
            state.variables(),
            optional=state.optional(),
            writer=is_chief,
            inventory=inventory,
            lease=lease,
        )
        closing.callback(checkpoints.wait)
        tick, tick_start, previous_sec = 0, 0, 0.0
        if found is not None:
            changes = checkpoints.restore(found)
            tick, tick_start = found.info["tick"], found.info["tick_start"]
            previous_sec = found.info["total_sec"]
            where = printable(found.path)
            print(f"resuming from {where}: step {found.step}, kimg {found.info['kimg']:.3f}")
            for change in changes:
                print(printable(f"{where} is of another config; {change}"))
        elif config.training.init_from:
            _start_from(config, state)
        resolved = _versions() + config_lib.to_yaml(config)
        if is_chief:
            storage.makedirs(workdir)
            storage.write_text_atomic(storage.join(workdir, "config.yaml"), resolved, fence)

        # ------------------------------------------------------------------ data
        images, step = int(state.images.numpy()), int(state.step.numpy())
        bad_records = BadRecords(manifest, config.data.max_bad_records)
        stream = _stream(run, manifest, step, bad_records)

        # ------------------------------------------------------------------ pictures
        telemetry = None
        if is_chief:
            telemetry = Telemetry(
                workdir,
                tensorboard=_tensorboard_dir(config, workdir),
                files=files,
                total_kimg=config.training.total_kimg,
                tick_kimg=config.telemetry.tick_kimg,
                resume_kimg=images / 1000,
                resume_tick=tick,
                verbose=verbose,
                fence=fence,
            )
            closing.callback(telemetry.close)
        flush = telemetry.flush if telemetry else lambda: None
        plain, _ = build.networks(config, data, rounded=False)
        snapshots = Snapshots(
            plain,
            manifest,
            use_labels=config.data.use_labels,
            seed=config.run.seed,
            bad_records=bad_records,
        )

        def snapshot(telemetry: Telemetry, name: str, grid: np.ndarray, kimg: float) -> None:
            telemetry_images.save_image(storage.join(workdir, f"{name}.png"), grid, fence)
            telemetry.image("Reals" if name == "reals" else "Fakes", grid, kimg)

        if telemetry and found is None:
            telemetry.config(resolved)
            snapshot(telemetry, "reals", snapshots.reals(), 0)
            snapshot(telemetry, "fakes_init", snapshots.fakes(state.g_ema), 0)
            telemetry.line(f"wrote {storage.join(workdir, 'reals.png')} and fakes_init.png")

        def info(total_sec: float) -> dict[str, Any]:
            return {
                "step": step,
                "images": images,
                "kimg": images / 1000,
                "tick": tick,
                "tick_start": tick_start,
                "total_sec": total_sec,
                "config": config_lib.to_dict(config),
                "config_fingerprint": config_lib.fingerprint(config),
                "data_fingerprint": manifest.fingerprint,
                "resolution": list(manifest.resolution),
                "channels": manifest.channels,
                "label_names": manifest.label_names if config.data.use_labels else [],
                "label_counts": list(data.label_counts),
                "versions": {"trainer": trainer.__version__, "tensorflow": tf.__version__},
            }

        def call_at_snapshot(total_sec: float, *, last: bool) -> None:
            if telemetry:
                made = Snapshot(
                    workdir,
                    info(total_sec),
                    lambda: {name: variable.numpy() for name, variable in state.g_ema.items()},
                    last,
                    telemetry.line,
                )
                for call in at_snapshot:
                    call(made)

        # ------------------------------------------------------------------ run
        if telemetry:
            telemetry.line(
                f"training to {config.training.total_kimg:g} kimg; the first step compiles"
            )
        tick_began, maintenance = time.monotonic(), 0.0
        first, saved, reason = True, found.step if found else 0, None
        while images < total_images:
            if stop and (reason := stop.begin(step + config.run.steps_per_loop)):
                break
            train_step(*next(stream))
            images += arithmetic.global_batch * config.run.steps_per_loop
            step += config.run.steps_per_loop
            if first:
                state.step.numpy()  # waits for the step
                first = False
                if telemetry:
                    telemetry.line(f"first step after {time.monotonic() - started:.0f} s")
            if telemetry:
                telemetry.progress(images)
            done = images >= total_images
            at_tick = done or tick == 0 or images >= tick_start + config.telemetry.tick_kimg * 1000
            at_checkpoint = done or step % config.checkpoint.every_steps == 0
            if not (at_tick or at_checkpoint) and run.placement.accelerated:
                continue
            _check_finite(state, config, checkpoints, workdir, variables=at_checkpoint)
            total_sec = previous_sec + time.monotonic() - started
            if at_tick:
                tick_sec = time.monotonic() - tick_began
                _check_advanced(state, images, step)
                stats, maintenance_began = _take_stats(state), time.monotonic()
                if config.run.precision == "float16":
                    stats |= _take_loss_scales(state)
                for key, number in config_lib.schedules(config).items():
                    stats[f"Schedule/{key}"] = constant(number.at(images / 1000))
                grid = None
                at_snap = done or (tick > 0 and tick % config.telemetry.snap_ticks == 0)
                if telemetry and at_snap:
                    grid = snapshots.fakes(state.g_ema)
                    if math.isfinite(variety := snapshots.variety(grid)):
                        stats["Progress/variety"] = constant(variety)
                if lease:
                    lease.check()
                if telemetry:
                    if text := _skipped(stats):
                        telemetry.line(text)
                    telemetry.tick(
                        stats,
                        tick=tick,
                        nimg=images,
                        augment_p=float(state.augment_p.numpy()),
                        r1_gamma=_r1_gamma(config, images / 1000),
                        total_sec=total_sec,
                        tick_sec=tick_sec,
                        maintenance_sec=maintenance,
                    )
                    if grid is not None:
                        snapshot(telemetry, f"fakes{images // 1000:06d}", grid, images / 1000)
                        if not done:
                            call_at_snapshot(total_sec, last=False)
                tick, tick_start = tick + 1, images
                tick_began = time.monotonic()
                maintenance = tick_began - maintenance_began
            if at_checkpoint:
                saving_began = time.monotonic()
                checkpoints.save(step, info(total_sec), flush)
                saved = step
                saved_in = time.monotonic() - saving_began
                maintenance, tick_began = maintenance + saved_in, tick_began + saved_in
        if reason and step > saved:
            _check_finite(state, config, checkpoints, workdir, variables=True)
            checkpoints.save(step, info(previous_sec + time.monotonic() - started), flush)
        if not reason:
            checkpoints.wait()  # a kill in what is called now loses nothing
            call_at_snapshot(previous_sec + time.monotonic() - started, last=True)
    if reason:
        where = f"step {step} (kimg {images / 1000:.3f}) is saved in {workdir}"
        raise PreemptedError(
            f"{reason}: {where if step else 'no step was made'}; run the same command again to go on",
            preemption.patience(reason),
        )
    print(f"finished: {images / 1000:g} kimg, {step} steps; see {printable(workdir)}")


def _at_the_end(
    found: checkpoint.Found, config: Config, workdir: str, at_snapshot: Sequence[AtSnapshot]
) -> None:
    """Ends a run that has nothing to train: only what is due at the end of a run is made up for.

    Nothing in the workdir changes.

    Args:
      found: its newest checkpoint.
      config: resolved, with a `total_kimg` that the checkpoint has reached.
      workdir: of the run.
      at_snapshot: is called with the checkpoint.
    """
    kimg, total = found.info["images"] / 1000, config.training.total_kimg
    print(
        f"nothing to do: the run is at {kimg:.10g} kimg already ({printable(found.path)}), and "
        f"training.total_kimg is {total:g}; to go on, give a larger --set=training.total_kimg=...",
        flush=True,
    )

    def params() -> dict[str, np.ndarray]:
        return checkpoint.read_parameters(found, "G_ema")

    for call in at_snapshot:
        call(Snapshot(workdir, found.info, params, True, lambda line: print(printable(line))))


def _tensorboard_dir(config: Config, workdir: str) -> str:
    """The directory of events; '' for none."""
    if not config.telemetry.tensorboard:
        return ""
    given = storage.resolve(config.telemetry.tensorboard_dir)
    return given or storage.join(workdir, "tensorboard")


def _description(run: Run, manifest: Manifest) -> list[str]:
    """A summary of the run for the console."""
    config, placement, costs = run.config, run.placement, run.cost()
    size = image_size(manifest.resolution, manifest.channels)
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ""
    ignored = (
        " (not used: data.use_labels is off)" if classes and not config.data.use_labels else ""
    )
    a = run.arithmetic
    groups = a.per_replica_batch // a.group_size
    slow = placement.platform == "CPU" and config.run.precision == "bfloat16" and not run.jit
    return [
        f"data      {manifest.directory}: {manifest.num_images} images {size}{classes}{ignored}",
        f"devices   {placement.description}, precision {config.run.precision}, "
        f"XLA {'on' if run.jit else 'off'}",
        *(["note      without XLA, bfloat16 takes 15 times as long on a CPU"] if slow else []),
        f"batch     {a.global_batch} images = {a.num_replicas} replicas x {a.rounds} rounds x "
        f"{a.per_replica_batch} ({groups} groups of {a.group_size})"
        + (f"; a step reads {a.batches} of them" if a.batches > 1 else ""),
        f"networks  G {costs.g_params:,} and D {costs.d_params:,} parameters, "
        f"{costs.gflop_per_image:.3g} GFLOP of convolutions per image",
        f"memory    {costs.state_mib:.0f} MiB of variables and about {costs.activations_mib:.0f} MiB "
        "of activations on each replica",
    ]


def _versions() -> str:
    return (
        f"# trainer {trainer.__version__}, TensorFlow {tf.__version__}, "
        f"Python {platform.python_version()}\n"
    )


def _all_damaged(workdir: str, damaged: Sequence[str]) -> CheckpointError:
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return CheckpointError(
        f"no checkpoint in {workdir} is whole, but some were: {', '.join(damaged[:3])}{more}; "
        "nothing was changed: restore what was damaged of one of them from a backup, take another "
        "--workdir, or add --start_over to move all that the run has written aside and start at "
        "step 0"
    )


def _print_plan(run: Run, manifest: Manifest, sec_per_kimg: float | None, *, dry_run: bool) -> None:
    """Says what will be trained, and how long it takes; in a dry run with the whole config."""
    is_chief = run.placement.is_chief
    for line in _description(run, manifest):
        if is_chief or line.startswith("devices"):
            print(printable(line), flush=True)
    if is_chief and (dry_run or sec_per_kimg is not None or not run.placement.accelerated):
        for line in duration.lines(run, sec_per_kimg):
            print(line, flush=True)
    if dry_run and is_chief:
        for line in config_lib.to_yaml(run.config).split("\n")[:-1]:
            print(printable(line))


def _stream(run: Run, manifest: Manifest, step: int, bad_records: BadRecords) -> ImageStream:
    """The images of this worker, from a step on."""
    data, arithmetic = run.config.data, run.arithmetic
    return ImageStream(
        manifest,
        group_size=arithmetic.group_size,
        groups_per_batch=arithmetic.groups_per_step * run.config.run.steps_per_loop,
        seed=run.config.run.seed,
        start_group=step * arithmetic.groups_per_step,
        worker=run.placement.worker,
        num_workers=run.placement.num_workers,
        use_labels=data.use_labels,
        mirror=data.mirror,
        window=data.window,
        bad_records=bad_records,
        stall_timeout=data.stall_timeout,
    )


def _check_same_run(
    found: checkpoint.Found, config: Config, manifest: Manifest, allow_change: Sequence[str]
) -> None:
    """Refuses to go on with another config or data set than the checkpoint's."""
    run_info.check_position(found.info, found.path)
    before = config_lib.from_dict(found.info["config"], where=found.path)
    _check_family(found.path, before, config, "use another workdir")
    same_data = found.info["data_fingerprint"] == manifest.fingerprint
    if not same_data and "data.fingerprint" not in allow_change:
        raise DataError(
            f"{manifest.directory} is not the data set that {found.path} was trained on (its "
            "fingerprint differs); use that one, another workdir, or "
            "--allow_change=data.fingerprint"
        )
    changes = [c for c in config_lib.diff(before, config) if c[0] not in allow_change]
    if changes:
        text = ", ".join(f"{key}: {quoted(old)} -> {quoted(new)}" for key, old, new in changes)
        keys = ",".join(key for key, _, _ in changes)
        raise ConfigError(
            f"the config differs from that of {found.path}: {text}; use the old values, another "
            f"workdir, or --allow_change={keys}"
        )


def _check_family(path: str, theirs: Config, config: Config, remedy: str) -> None:
    """Refuses a checkpoint whose networks are of another family."""
    if theirs.model.family != config.model.family:
        raise ConfigError(
            f"{path} is of networks of the family {theirs.model.family}, and model.family is "
            f"{config.model.family}; {remedy}"
        )


def _start_from(config: Config, state: TrainState) -> None:
    """Starts a new run from the networks of another one (transfer learning)."""
    found = checkpoint.find(storage.resolve(config.training.init_from))
    theirs = config_lib.from_dict(found.info["config"], where=found.path)
    remedy = "training.init_from takes a run of the same networks"
    _check_family(found.path, theirs, config, remedy)
    tables = {"G": state.g, "D": state.d, "G_ema": state.g_ema}
    wrong = []
    for prefix, table in tables.items():
        stored = checkpoint.read_parameters(found, prefix)
        for name, variable in table.items():
            if name not in stored or stored[name].shape != tuple(variable.shape):
                wrong.append(f"{prefix}/{name}")
            else:
                variable.assign(tf.cast(stored[name], variable.dtype))
        print(f"init_from {printable(found.path)}: {prefix}, {len(table)} parameters")
    if wrong:
        raise ConfigError(
            f"training.init_from: {found.path} has no fitting {', '.join(wrong[:3])} "
            f"({len(wrong)} in all); it must be a run with the same networks"
        )


def _take_stats(state: TrainState) -> dict[str, Stat]:
    """The statistics since the last tick, which start anew."""
    stats = {}
    for name, variable in state.stats.items():
        number, total, squares = variable.numpy().astype(np.float64)
        variable.assign(tf.zeros_like(variable))
        if number > 0:
            mean = total / number
            variance = max(squares / number - mean**2, 0.0)
            stats[name] = Stat(int(number), float(mean), float(np.sqrt(variance)))
    return stats


def _r1_gamma(config: Config, kimg: float) -> float:
    """The weight of R1 at a position of the run."""
    gamma = config.objective.r1_gamma
    assert gamma != "auto"
    return gamma.at(kimg) if isinstance(gamma, Schedule) else gamma


def _take_loss_scales(state: TrainState) -> dict[str, Stat]:
    """The loss scale of each phase, and how many of its updates were skipped since the last tick."""
    stats = {}
    for phase, variable in state.loss_scale_counts.items():
        counts = variable.numpy()
        stats[f"Precision/loss_scale/{phase}"] = constant(state.loss_scale[phase].numpy())
        stats[f"Precision/skipped/{phase}"] = constant(counts[loss_scale.SKIPPED])
        counts[loss_scale.SKIPPED] = 0
        variable.assign(counts)
    return stats


def _skipped(stats: Mapping[str, Stat]) -> str | None:
    """A line on the updates that were skipped in a tick, if any."""
    parts = []
    for name, number in stats.items():
        phase = name.removeprefix("Precision/skipped/")
        if phase != name and number.mean:
            scale = stats[f"Precision/loss_scale/{phase}"].mean
            parts.append(f"{phase} {number.mean:.0f} (loss scale now {scale:g})")
    return f"float16: updates skipped as not finite: {', '.join(parts)}" if parts else None


def _check_finite(
    state: TrainState, config: Config, checkpoints: Checkpoints, workdir: str, *, variables: bool
) -> None:
    """Stops a run that has diverged.

    Args:
      state: where it is.
      config: of the run.
      checkpoints: of the run; one on its way is waited for.
      workdir: of the run.
      variables: look at them all, too, not only at the losses and gradients they came from: what
        is saved must be fit to go on from.
    """
    message = state.nonfinite_message()
    if message is None and variables:
        message = state.nonfinite_variables()
    if message is None:
        return
    with contextlib.suppress(StorageError):  # this is not what the user must hear of
        checkpoints.wait()
    found, _ = checkpoint.newest(workdir)
    if found is None:
        last, allow = "there is no checkpoint yet", ""
    else:
        last = f"the last good checkpoint is {found.path}"
        allow = " --allow_change=training.g_lr,training.d_lr"
    rates = {name: getattr(config.training, name) for name in ("g_lr", "d_lr")}
    flags = " ".join(f"--set=training.{name}={_halved(rate)}" for name, rate in rates.items())
    raise DivergedError(
        f"{message}; {last}: to go on from there with half the rates, run the same command with "
        f"{flags}{allow}; a higher objective.r1_gamma or run.precision=float32 can help, too"
    )


def _halved(rate: Number) -> str:
    """Half a rate, as --set takes it."""
    if not isinstance(rate, Schedule):
        return f"{rate / 2:g}"
    ends = f"[{rate.start / 2:g}, {rate.end / 2:g}]"
    return f"'{{{rate.shape}: {ends}, kimg: {rate.kimg:g}}}'"


def _check_advanced(state: TrainState, images: int, step: int) -> None:
    """The step must have counted as the loop has."""
    counted = int(state.images.numpy()), int(state.step.numpy())
    if counted != (images, step):
        raise AssertionError(f"the state is at {counted} images and steps, not {(images, step)}")
