"""Measures what a config costs: step, data, checkpoint or tpu, --config.

  python -m trainer probe step --config=emoji64 --resolution=64
  python -m trainer probe data --config=smoke --step_sec_per_kimg=20
  python -m trainer probe checkpoint --config=paper256 --resolution=256 \
      --workdir=gs://BUCKET/runs/probe
  python -m trainer probe tpu --config=paper256 --topology=v5e:2x2 --resolution=256

`step` times the training step of a run on random images: the first step, each phase, s/kimg with
the lazy regularisers and the moving average as often as they are due, peak memory without pipeline
and pictures, and the share of a bare 3x3 convolution with 128 channels, forward and backward, in
operations a second. A step's operations are those of plain convolutions, so a step that needs fewer
of them (Winograd) can have more than 100%. Among several workers (TF_CONFIG) it times the step that
they make together.

`data` times the input pipeline and bare decoding, and sets it against what the step takes. It also
times reading alone, from random places, by blocks read at a time and by their size. What is on this
machine already (a local disk's cache, TensorFlow's of gs://) is faster than what must come first.

`checkpoint` saves and restores a run's state in a directory of its own below the workdir, which is
removed: bytes, how long the loop stands still for a save (as a share of a tick, too), MB/s, and how
long a restore takes. What was written a moment ago is read back, on a local disk from memory.

`tpu` compiles each phase of the training step for a slice of TPUs, with the real compiler and with
no TPU (extra `tpu-probe`), and prints what each needs and about how long it will take: a raw time
from the compiler's estimates, and one adjusted by what its estimates of bfloat16 are known to
exceed. Large networks take minutes for each phase. Nothing is trained and no data set is needed.

Stop other programs first: what is timed in turns gives a fair share, but no fair seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.core import flags

if __name__ == "__main__":
    flags.guard_imports()

from absl import flags as absl_flags

from trainer import config as config_lib
from trainer.config import BatchArithmetic, Config, presets
from trainer.core import storage
from trainer.core.errors import ConfigError, UsageError
from trainer.core.text import image_size, parse_image_size, printable
from trainer.distribution import cluster, membership
from trainer.families.protocol import DataShape

# TensorFlow takes seconds to import; mistakes in the call are told before.
if TYPE_CHECKING:
    from trainer.data.manifest import Manifest
    from trainer.probing.checkpoint import CheckpointSpeed
    from trainer.probing.data import Reading
    from trainer.probing.step import Row, StepSpeed
    from trainer.probing.tpu_cost import LargestBatch, Phase
    from trainer.training.run import Run

FLAGS = absl_flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    text, several = absl_flags.DEFINE_string, absl_flags.DEFINE_multi_string
    whole, real = absl_flags.DEFINE_integer, absl_flags.DEFINE_float
    text("config", None, "Preset, or YAML file, local or gs://; list shows the presets.")
    text("data", None, "Directory of the converted data set; overrides data.path.")
    several("set", [], "section.key=value, overrides the config.")
    text("workdir", None, "checkpoint: where to write, local or gs://.")
    size = "step, checkpoint, tpu: needs no data set then; 64, or WIDTHxHEIGHT as 256x128."
    text("resolution", None, size)
    whole("channels", 3, "With --resolution: of the images.", 1, 4)
    whole("num_classes", 0, "With --resolution: of the images.", lower_bound=0)
    text("topology", "v5e:2x2", "tpu: generation and shape of the slice.")
    whole("replicas", None, "tpu: devices that take part; all by default.", lower_bound=1)
    whole("batch", None, "tpu: images per replica; else the config's batch is divided.", 1)
    whole("steps", 8, "step, checkpoint: how often everything is timed.", lower_bound=1)
    real("seconds", 10.0, "data: how long to measure.", lower_bound=0.1)
    purpose = "data, checkpoint: the step's seconds for 1000 images; else by a bare convolution."
    real("step_sec_per_kimg", None, purpose, lower_bound=1e-6)


def main(argv: Sequence[str]) -> None:
    """Measures what the command line names."""
    if FLAGS.config == "list":
        print(presets.listing())
        return
    probes = {
        "step": probe_step,
        "data": probe_data,
        "checkpoint": probe_checkpoint,
        "tpu": probe_tpu,
    }
    name = argv[1] if len(argv) > 1 else ""
    if name not in probes:
        close = difflib.get_close_matches(name, probes, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(probes)}"
        raise UsageError(f"{repr(name) + ' is no probe' if name else 'probe what'}; {hint}")
    if not FLAGS.config:
        raise UsageError("--config is needed; --help lists the flags")
    overrides = list(FLAGS.set)
    if FLAGS.data:
        overrides.append(f"data.path={FLAGS.data}")
    probes[name](config_lib.load(FLAGS.config, overrides))


# ------------------------------------------------------------------------------------- step


def probe_step(config: Config) -> None:
    """Times a training step and prints the table."""
    data = _data_shape(config)
    workers = cluster.find(config.run.strategy)
    with membership.member(workers, config):
        from trainer.probing import step as speed
        from trainer.training.run import Run

        run = Run.create(config, data, workers)
        _print_rows(_run_lines(run))
        measured = speed.measure(run, FLAGS.steps)
        _print_rows([("first step", f"{measured.first_step:.1f} s, compilation included")])
        print(phase_table(measured.rows, run.arithmetic.global_batch))
        _print_rows(verdict_lines(run, measured))


def _data_shape(config: Config) -> DataShape:
    """The resolution of the data set, or of --resolution."""
    size = parse_image_size(FLAGS.resolution, "--resolution") if FLAGS.resolution else None
    if size is None and not config.data.path:
        raise UsageError("no data set: give --data, or --resolution to do without one")
    if size and config.data.use_labels and not FLAGS.num_classes:
        raise ConfigError("data.use_labels is on: give --num_classes, or the data set by --data")

    if size is None:
        return _shape(_manifest(config), config)
    counts = (1,) * FLAGS.num_classes
    return DataShape(size, FLAGS.channels, counts if config.data.use_labels else ())


def _batch_text(a: BatchArithmetic, data: DataShape) -> str:
    size = image_size(data.resolution, data.channels)
    return (
        f"{a.global_batch} images {size} = {a.num_replicas} replicas x {a.rounds} rounds x "
        f"{a.per_replica_batch}"
    )


def _run_lines(run: Run) -> list[tuple[str, str]]:
    costs = run.cost()
    return [
        (
            "run",
            f"{run.placement.description}, {run.config.run.precision}, "
            f"XLA {'on' if run.jit else 'off'}, augmentation {run.config.augment.mode}",
        ),
        ("batch", _batch_text(run.arithmetic, run.data)),
        ("networks", f"G {costs.g_params:,} and D {costs.d_params:,} parameters"),
    ]


def phase_table(rows: Sequence[Row], batch: int) -> str:
    """The parts of a step, which add up to the s/kimg below them."""
    lines = ["", f"{'':<14}{'median s':>10}{'fastest s':>11}{'in steps':>10}{'s/kimg':>9}"]
    for row in rows:
        part = row.seconds.median * row.share * 1000 / batch
        lines.append(
            f"{row.name:<14}{row.seconds.median:>10.4f}{row.seconds.fastest:>11.4f}"
            f"{_one_in(row.share):>10}{part:>9.2f}"
        )
    return "\n".join(lines)


def _one_in(share: float) -> str:
    return "all" if share == 1 else f"1 in {1 / share:g}"


def verdict_lines(run: Run, measured: StepSpeed) -> list[tuple[str, str]]:
    """Speed, share of the bare convolution, and memory, each with its name."""
    gflop, per_kimg = run.cost().gflop_per_image, measured.sec_per_kimg
    step, bare = per_kimg.rate(1000 * gflop), measured.convolution.gflops
    images, height, width, channels = measured.convolution.shape
    memory = f"{measured.host_gb:.2f} GiB of the process"
    if measured.gpu_gb is not None:
        memory += f", {measured.gpu_gb:.2f} GiB on a GPU"
    return [
        ("s/kimg", f"{per_kimg.median:.2f} (fastest {per_kimg.fastest:.2f})"),
        (
            "step",
            f"{step.median:.1f} GFLOP/s (fastest {step.fastest:.1f}), {gflop:.2f} GFLOP per image",
        ),
        (
            "convolution",
            f"{bare.median:.1f} GFLOP/s (fastest {bare.fastest:.1f}), 3x3, {channels} channels, "
            f"{images} x {image_size((height, width))}, by {measured.convolution.formula}",
        ),
        (
            "share",
            f"{step.median / bare.median / run.separate_devices:.0%} of the bare convolution "
            f"(fastest {step.fastest / bare.fastest / run.separate_devices:.0%})",
        ),
        ("peak memory", memory),
    ]


# ------------------------------------------------------------------------------------- data


def probe_data(config: Config) -> None:
    """Times the input pipeline and says whether it keeps up with the step."""
    if not config.data.path:
        raise UsageError(
            "no data set: give --data, the directory that `python -m trainer convert` wrote"
        )
    from trainer.data.pipeline import ImageStream
    from trainer.data.shards import BadRecords
    from trainer.probing import data as data_speed
    from trainer.training.run import Run

    manifest = _manifest(config)
    bad_records = BadRecords(manifest, config.data.max_bad_records)
    run = Run.create(config, _shape(manifest, config))
    stream = ImageStream(
        manifest,
        group_size=run.arithmetic.group_size,
        groups_per_batch=run.arithmetic.groups_per_step,
        seed=run.config.run.seed,
        use_labels=config.data.use_labels,
        mirror=config.data.mirror,
        window=config.data.window,
        bad_records=bad_records,
    )
    found = data_speed.measure(stream, manifest, bad_records, seconds=FLAGS.seconds)
    need, source = _need(run)
    _print_rows(
        [
            ("data", f"{manifest.directory}: {manifest.num_images} images"),
            ("decode alone", f"{found.decode:,.0f} images/s"),
            ("pipeline", f"{found.pipeline:,.0f} images/s, {found.share:.0%} of decoding alone"),
            ("step", f"{need:,.1f} images/s, {source}"),
        ]
    )
    readings = data_speed.measure_reading(manifest, bad_records, seconds=FLAGS.seconds)
    mean = sum(shard.bytes for shard in manifest.shards) / manifest.num_images
    print(f"\n{reading_table(readings, need, need * mean)}\n")
    times = found.pipeline / need
    verdict = "the step never waits" if times >= 1 else "the step waits for its data"
    print(
        f"the step needs {need:,.1f} images/s, the pipeline gives {found.pipeline:,.0f}: "
        f"{times:.3g} times, {verdict}"
    )


def reading_table(found: Sequence[Reading], need: float, need_bytes: float) -> str:
    """MB/s and images/s of reading alone: a line for each size of blocks, their number across."""
    readers = sorted({each.readers for each in found})
    titles = "".join(f"{f'{n} at a time':>22}" for n in readers)
    lines = [f"{'reading':<14}{titles}"]
    for size in sorted({each.block_bytes for each in found}):
        cells = {
            e.readers: f"{e.bytes / 1e6:,.1f} MB/s {e.images:,.0f}/s"
            for e in found
            if e.block_bytes == size
        }
        lines.append(f"{f'{size / 1e6:.2f} MB':<14}" + "".join(f"{cells[n]:>22}" for n in readers))
    return "\n".join([*lines, f"{'needed':<14}{f'{need_bytes / 1e6:,.1f} MB/s {need:,.0f}/s':>22}"])


def _need(run: Run) -> tuple[float, str]:
    """Images per second that the step takes, and where that is from."""
    if FLAGS.step_sec_per_kimg:
        return 1000 / FLAGS.step_sec_per_kimg, "from --step_sec_per_kimg"
    from trainer.probing import step as speed

    bare = speed.measure_convolution(run, FLAGS.steps).gflops.median
    gflop = run.cost().gflop_per_image
    return run.separate_devices * bare / gflop, (
        f"estimated: {gflop:.2f} GFLOP per image at the {bare:.0f} GFLOP/s of a bare convolution"
    )


# ------------------------------------------------------------------------------- checkpoint


def probe_checkpoint(config: Config) -> None:
    """Times saving and restoring, and says how much of the run's time it takes."""
    if not FLAGS.workdir:
        raise UsageError("no place to write to: give --workdir, local or gs://")
    data = _data_shape(config)
    from trainer.probing import checkpoint as checkpoint_speed
    from trainer.training.run import Run

    run = Run.create(config, data)
    found = checkpoint_speed.measure(run, storage.resolve(FLAGS.workdir), FLAGS.steps)
    need, source = _need(run)
    _print_rows(checkpoint_lines(run, found, need, source))


def checkpoint_lines(
    run: Run, found: CheckpointSpeed, need: float, source: str
) -> list[tuple[str, str]]:
    """Names and times of a save and a restore.

    Args:
      run: of which the state was saved.
      found: what was measured.
      need: images per second that the step takes.
      source: where that is from.
    """
    megabytes = found.bytes / 1e6
    step = run.arithmetic.global_batch / need
    tick = max(run.config.telemetry.tick_kimg * 1000 / need, step)
    between = run.config.checkpoint.every_steps * step
    total = found.stall.median + found.write.median
    return [
        ("checkpoint", f"{megabytes:,.1f} MB, {found.variables} variables"),
        ("step", f"{need:,.1f} images/s, {source}"),
        (
            "save",
            f"the loop stands still for {found.stall.median:.4f} s (fastest "
            f"{found.stall.fastest:.4f}): {found.stall.median / tick:.3%} of a tick of "
            f"{tick:,.1f} s, {found.stall.median / step:.3g} steps",
        ),
        (
            "background",
            f"committed {found.write.median:.2f} s later (fastest {found.write.fastest:.2f}), "
            f"{megabytes / total:,.0f} MB/s; the next save comes after {between:,.1f} s"
            + ("" if total < between else " and waits"),
        ),
        (
            "restore",
            f"{found.restore.median:.2f} s (fastest {found.restore.fastest:.2f}), "
            f"{megabytes / found.restore.median:,.0f} MB/s",
        ),
    ]


# -------------------------------------------------------------------------------------- tpu


def probe_tpu(config: Config) -> None:
    """Compiles a step for TPUs and prints the table.

    Raises:
      UsageError: a phase doesn't compile, or the compiler is missing.
    """
    data = _data_shape(config)
    from trainer.probing.tpu_cost import TpuRun

    run = TpuRun.create(config, data, FLAGS.topology, FLAGS.replicas, FLAGS.batch)
    a = run.arithmetic
    _print_rows(
        [
            ("slice", f"{run.topology.name}, {a.num_replicas} replicas"),
            ("batch", _batch_text(a, data)),
            ("run", f"{run.config.run.precision}, augmentation {run.config.augment.mode}"),
        ]
    )
    print(f"\n{TPU_TITLES}", flush=True)
    phases = []
    for phase in run.compile_phases():
        phases.append(phase)
        print(tpu_line(phase, run.topology.chip.hbm), flush=True)
    print()
    if not all(phase.estimate for phase in phases):
        raise UsageError("not every phase compiles for a TPU; the errors are in the table")
    _print_rows(unestimated_lines(phases))
    raw, adjusted = run.seconds_per_kimg(phases)
    speed = f"{raw:.3f} raw, {adjusted:.3f} adjusted, of {a.num_replicas} replicas together"
    _print_rows([("s/kimg", speed)])
    _print_rows([("fits", fits_text(run.largest_batch(phases), a.per_replica_batch))])


def fits_text(found: LargestBatch, tried: int) -> str:
    """The largest batch in words.

    Args:
      found: it.
      tried: images of a replica for which all phases were compiled.
    """
    if found.error:
        fits = f"{'at least' if found.images else 'fewer than'} {tried} images per replica"
        return f"{fits} ({found.phase} doesn't compile for {found.other}: {found.error})"
    most = f"at most {found.images} images per replica"
    return (
        f"{most if found.images else 'not a single group of images'} ({found.phase}, by a line "
        f"through {tried} and {found.other} images)"
    )


TPU_TITLES = (
    f"{'':<14}{'compiled':>10}{'GFLOP':>10}{'HBM GiB':>13}"
    f"{'raw ms':>10}{'adjusted':>10}{'of MXU':>8}{'in steps':>10}"
)


def tpu_line(phase: Phase, hbm: int) -> str:
    """A phase's line of the table: the share of the matrix units is that at the raw time."""
    found = phase.estimate
    if found is None:
        return f"{phase.name:<14}{'no':>10}  {phase.error}"
    memory = f"{found.hbm / 2**30:.2f} of {hbm / 2**30:.0f}"
    return (
        f"{phase.name:<14}{f'{phase.seconds:.0f} s':>10}{found.flop / 1e9:>10.1f}{memory:>13}"
        f"{found.raw * 1e3:>10.2f}{found.adjusted * 1e3:>10.2f}"
        f"{found.roofline / found.raw:>8.0%}{_one_in(phase.share):>10}"
    )


def unestimated_lines(phases: Sequence[Phase]) -> list[tuple[str, str]]:
    """For each phase the parts that the compiler doesn't estimate."""
    title, lines = "no estimate", []
    for phase in phases:
        if phase.estimate and phase.estimate.unestimated:
            kinds = ", ".join(f"{n} {kind}" for kind, n in phase.estimate.unestimated.items())
            lines.append((title, f"{phase.name}: {kinds}"))
            title = ""
    return lines


def _manifest(config: Config) -> Manifest:
    from trainer.data import manifest

    return manifest.load(storage.resolve(config.data.path))


def _shape(manifest: Manifest, config: Config) -> DataShape:
    from trainer.training.run import shape_of

    return shape_of(manifest, config)


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<14}{printable(text)}", flush=True)


if __name__ == "__main__":
    from trainer.distribution import host

    host.prepare()
    define_flags()
    flags.run(main, usage=__doc__ or "", max_positional=1)
