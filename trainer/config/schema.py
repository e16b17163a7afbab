"""The sections of a config, but for `model`, whose keys a family has (`families/*/keys.py`)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from trainer.core.schedule import Number
from trainer.core.sections import (
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    FRACTION,
    POSITIVE,
    SEED,
    Auto,
    Section,
    key,
)
from trainer.families import registry
from trainer.families.protocol import Keys
from trainer.objectives.keys import ObjectiveConfig


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """Where and how a run is executed.

    Attributes:
      seed: every random draw of the run is a function of this and of the draw's place in the run
        (NVIDIA: --seed).
      deterministic: ask TensorFlow for bitwise repeatable kernels; slower on GPUs.
      strategy: which devices take part; 'auto' takes what the environment and the machine offer,
        see distribution/strategy.py.
      tpu: name or grpc:// address of a TPU, or 'local' on a TPU VM; '' takes TPU_NAME, or the
        machine's own.
      cpu_replicas: split the CPU into this many replicas, on each worker; for tests.
      precision: number format of the highest `model.num_fp16_res` resolutions; 'float32' turns
        16-bit blocks and the clamp off (NVIDIA: float16, or --fp32). 'float64' computes everything
        in 64 bits, for proofs: rounding can't hide a mistake there. Random numbers stay the same.
      jit: compile the step with XLA; 'auto' decides by platform, see distribution/strategy.py.
      steps_per_loop: steps made in one call, with no word from the host in between; for TPUs, where
        asking takes time. Ticks, checkpoints and the end of the run come after whole calls, so it
        must divide `checkpoint.every_steps`.
      compilation_cache: local directory in which compiled programs are kept, so that the next
        start of the run compiles nothing; '' keeps none. Must be the user's own.
      join_timeout: seconds in which all workers must have started, or a named TPU have answered; null
        for 600. `submit` gives a job's machines 12 hours, since they start as they become available.
      worker_timeout: seconds without a sign of life after which a worker counts as gone, and all
        others end.
      max_hours: stop in time and ask to be started again (exit code 75) after so many hours of this
        process, for machines that are lent for a time; null for no limit.
      grace_time: seconds from SIGTERM, or from the notice that a Spot machine is taken away (30 s
        before it is), after which the process ends even if the step or the checkpoint isn't done.
      collectives: how workers sum gradients; 'auto' takes NCCL where every worker has GPUs.
      bytes_per_pack: gradients are summed in packs of about this size, so that the first can start
        before the last is computed; 0 for one pack.
      collective_timeout: seconds for one sum over replicas, for the search for a hang; null for no
        limit.
    """

    NAME: ClassVar[str] = "run"

    seed: int = key(0, SEED)
    deterministic: bool = False
    strategy: Literal["auto", "cpu", "one_device", "mirrored", "multi_worker", "tpu"] = "auto"
    tpu: str = ""
    cpu_replicas: int = key(1, AT_LEAST_1)
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    jit: Literal["auto", "on", "off"] = "auto"
    steps_per_loop: int = key(1, AT_LEAST_1)
    compilation_cache: str = ""
    join_timeout: float | None = key(None, POSITIVE)
    worker_timeout: float = key(120.0, POSITIVE)
    max_hours: float | None = key(None, POSITIVE)
    grace_time: float = key(28.0, POSITIVE)
    collectives: Literal["auto", "ring", "nccl"] = "auto"
    bytes_per_pack: int = key(0, AT_LEAST_0)
    collective_timeout: float | None = key(None, POSITIVE)

    @property
    def join_seconds(self) -> float:
        """`join_timeout`, or what null stands for."""
        return self.join_timeout or 600.0


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The training images.

    Attributes:
      path: directory of a converted data set (the one with dataset.json): local, gs://, or
        package:data/... for the one shipped inside the package (NVIDIA: --data).
      mirror: show each image flipped left-right half of the time (NVIDIA: --mirror, which doubles
        the data set instead).
      use_labels: train a class-conditional network on the data set's labels (NVIDIA: --cond).
      window: records read and permuted together; the unit of read-ahead and of resume, and so a
        part of the order of images.
      max_bad_records: damaged records that each worker may meet since its start before the run
        ends; each is reported once, and another record of its shard is shown in its place.
      stall_timeout: seconds that the storage may stand still, or refuse to answer, before the run
        ends; what stands still is reported long before.
    """

    NAME: ClassVar[str] = "data"

    path: str = ""
    mirror: bool = False
    use_labels: bool = False
    window: int = key(256, AT_LEAST_1)
    max_bad_records: int = key(0, AT_LEAST_0)
    stall_timeout: float = key(300.0, POSITIVE)


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Section):
    """Optimizers and the batch.

    Rates, decays and the half-life may follow a schedule, see `core.schedule`.

    Attributes:
      batch_size: images in a step over all replicas and rounds (NVIDIA: --batch, `mb`). 'auto':
        what NVIDIA's rule gives for 8 GPUs, on any number of replicas.
      group_size: images in a group, the atom of randomness and of the batch (see
        `batch_arithmetic`), over which StyleGAN2's minibatch standard deviation is taken (NVIDIA:
        `mbstd`, 4). 'auto': 4, or the batch where that is smaller.
      rounds: gradient accumulation: the batch is computed in this many parts, which changes the
        memory needed and not the result (NVIDIA: batch / (GPUs * batch_gpu)).
      total_kimg: length of the run in thousands of real images shown (NVIDIA: --kimg).
      g_lr: G's learning rate before the correction for lazy regularisation (NVIDIA: `lrate`).
        'auto': 0.002 from 1024 pixels on, else 0.0025.
      d_lr: D's learning rate, likewise.
      beta1: Adam's first moment decay, before the same correction (NVIDIA: 0).
      beta2: Adam's second moment decay, likewise (NVIDIA: 0.99).
      ema_kimg: half-life of G_ema in thousands of images (NVIDIA: `ema`). 'auto': batch * 10 / 32.
      ema_rampup: the half-life is at most this times the images seen so far; null for no ramp
        (NVIDIA: `ramp`, 0.05 in auto and cifar).
      freeze_d: this many of D's highest-resolution layers stay as they are (NVIDIA: --freezed).
      init_from: run or checkpoint whose networks a new run starts from (NVIDIA: --resume).
    """

    NAME: ClassVar[str] = "training"

    batch_size: int | Auto = key(32, AT_LEAST_1)
    group_size: int | Auto = key(4, AT_LEAST_1)
    rounds: int = key(1, AT_LEAST_1)
    total_kimg: float = key(25000.0, POSITIVE)
    g_lr: Number | Auto = key(0.002, POSITIVE)
    d_lr: Number | Auto = key(0.002, POSITIVE)
    beta1: Number = key(0.0, BELOW_1)
    beta2: Number = key(0.99, BELOW_1)
    ema_kimg: Number | Auto = key(10.0, AT_LEAST_0)
    ema_rampup: float | None = key(None, POSITIVE)
    freeze_d: int = key(0, AT_LEAST_0)
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class AugmentConfig(Section):
    """Discriminator augmentation (ADA paper, sections 2 and 3).

    Attributes:
      mode: 'none', 'fixed' strength `p`, or 'ada', which steers p (NVIDIA: --aug).
      pipe: which transformations: b blit, g geometry, c colour, f filter, n noise, c cutout
        (NVIDIA: --augpipe).
      color: how often colours change, compared with the other transformations (R3GAN: 0.5).
      p: the strength of 'fixed', which may follow a schedule, or where 'ada' starts (NVIDIA: --p).
      target: value of E[sign(D(real))] that 'ada' steers to (NVIDIA: --target).
      adjust_kimg: thousands of images in which 'ada' can take p from 0 to 1 (NVIDIA: 500, or 100
        when starting from another network).
      interval: steps between two adjustments of p (NVIDIA: 4).
    """

    NAME: ClassVar[str] = "augment"

    mode: Literal["none", "fixed", "ada"] = "ada"
    pipe: Literal["b", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc", "bgc-cutout"] = "bgc"
    color: float = key(1.0, FRACTION)
    p: Number = key(0.0, FRACTION)
    target: float = key(0.6, FRACTION)
    adjust_kimg: float = key(500.0, POSITIVE)
    interval: int = key(4, AT_LEAST_1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """What is kept to resume from.

    Attributes:
      every_steps: steps between two checkpoints.
      keep_last: the newest this many are kept.
      keep_every_kimg: besides, one for every this many thousand images is kept; 0 for none.
      export_dir: where the trained generator is exported at the end of the run, as by
        `python -m trainer export --dest`; '' for nowhere.
      export_snapshots: export it there with each image grid, too.
    """

    NAME: ClassVar[str] = "checkpoint"

    every_steps: int = key(500, AT_LEAST_1)
    keep_last: int = key(3, AT_LEAST_1)
    keep_every_kimg: int = key(0, AT_LEAST_0)
    export_dir: str = ""
    export_snapshots: bool = False


@dataclasses.dataclass(frozen=True)
class TelemetryConfig(Section):
    """What is shown while training.

    Attributes:
      tick_kimg: thousands of images between two lines of progress (NVIDIA: 4).
      snap_ticks: ticks between two image grids (NVIDIA: --snap, 50).
      tensorboard: also write TensorBoard events.
      tensorboard_dir: where; '' for `tensorboard` in the workdir.
    """

    NAME: ClassVar[str] = "telemetry"

    tick_kimg: float = key(4.0, POSITIVE)
    snap_ticks: int = key(50, AT_LEAST_1)
    tensorboard: bool = True
    tensorboard_dir: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run; the keys of `model` are those of its family."""

    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig())
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig())
    model: Keys = dataclasses.field(default_factory=lambda: registry.default_keys())
    objective: ObjectiveConfig = dataclasses.field(default_factory=lambda: ObjectiveConfig())
    training: TrainingConfig = dataclasses.field(default_factory=lambda: TrainingConfig())
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig())
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=lambda: CheckpointConfig())
    telemetry: TelemetryConfig = dataclasses.field(default_factory=lambda: TelemetryConfig())


SECTIONS: dict[str, type[Section]] = {
    section.NAME: section
    for section in (
        RunConfig,
        DataConfig,
        Keys,
        ObjectiveConfig,
        TrainingConfig,
        AugmentConfig,
        CheckpointConfig,
        TelemetryConfig,
    )
}
