"""Time of a training step, phase by phase, against a bare convolution on the same machine.

What counts is whole steps: the compiled step of a real run, with its draws, updates and moving
averages, is called at step numbers at which each of the combinations of phases that its schedule
has is due. The regularisers are differences of such steps. Gmain and Dmain are also timed alone, as
the step's own compiled functions, and what a step takes beyond the two is its rest.

Everything is timed in turns, so that other load on the machine hits all of it alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from trainer.distribution.precision import full_dtype, half_dtype
from trainer.objectives.phase import Objective
from trainer.telemetry import resources
from trainer.training.run import Run
from trainer.training.step import Batch, TrainStep

_CHANNELS = 128
_MAX_SIDE, _MAX_IMAGES = 64, 16  # of the bare convolution: enough to fill a machine, not its memory

_COMPILERS = {"TensorFlow": False, "XLA": True}  # of the bare convolution: whether it is compiled

Due = frozenset[str]  # the regularisers of one step
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of something done several times."""

    median: float
    fastest: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Sums up single times."""
        values = list(seconds)
        return cls(statistics.median(values), min(values))

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.median + other.median, self.fastest + other.fastest)

    def __sub__(self, other: Timing) -> Timing:
        return Timing(self.median - other.median, self.fastest - other.fastest)

    def __mul__(self, factor: float) -> Timing:
        return Timing(self.median * factor, self.fastest * factor)

    def rate(self, work: float) -> Timing:
        """`work` a second; what was fastest has the highest rate."""
        return Timing(work / self.median, work / self.fastest)


@dataclass(frozen=True)
class Row:
    """One part of a step: its name, its seconds when due, and in which share of steps it is."""

    name: str
    seconds: Timing
    share: float


@dataclass(frozen=True)
class Convolution:
    """The bare convolution.

    Attributes:
      shape: [N, H, W, C] of its input and output.
      formula: "XLA" or "TensorFlow", whichever was faster.
      seconds: of the result and both gradients.
    """

    shape: tuple[int, int, int, int]
    formula: str
    seconds: Timing

    @property
    def gflops(self) -> Timing:
        """1e9 multiplications and additions a second."""
        images, height, width, channels = self.shape
        return self.seconds.rate(3 * 2 * 9 * channels**2 * images * height * width / 1e9)


@dataclass(frozen=True)
class StepSpeed:
    """Measurements of one config.

    Attributes:
      first_step: seconds of the first step, which compiles.
      rows: the parts of a step.
      sec_per_kimg: over one period of the schedule.
      host_gb, gpu_gb: peak memory after the steps and before the bare convolution.
      convolution: on one device.
    """

    first_step: float
    rows: list[Row]
    sec_per_kimg: Timing
    host_gb: float
    gpu_gb: float | None
    convolution: Convolution


def schedule(objective: Objective) -> dict[Due, tuple[int, float]]:
    """Which lazy phases are due together: the first such step, and the share of such steps."""
    intervals = {phase.name: phase.interval for phase in objective.phases if phase.interval > 1}
    period = math.lcm(*intervals.values())
    due = [
        frozenset(name for name, interval in intervals.items() if step % interval == 0)
        for step in range(period)
    ]
    return {each: (due.index(each), count / period) for each, count in Counter(due).items()}


def parts(
    plan: dict[Due, tuple[int, float]], steps: Mapping[Due, Timing], main: Timing
) -> list[Row]:
    """Tells from whole steps what the parts of one take.

    Args:
      plan: from `schedule`.
      steps: seconds of each combination's step.
      main: seconds of the phases of every step together.

    Returns:
      The rest of the step with the fewest phases (named with what is due in every step), and what
      each larger combination adds.
    """
    ordered = sorted(plan, key=len)
    least = ordered[0]
    rows = [Row(" + ".join(["rest", *sorted(least)]), steps[least] - main, 1.0)]
    for place, due in enumerate(ordered[1:], 1):
        smaller = [each for each in ordered[:place] if each < due][-1]
        name = " + ".join(sorted(due - smaller))
        if name not in [row.name for row in rows]:
            share = sum(plan[each][1] for each in plan if each >= due - smaller)
            rows.append(Row(name, steps[due] - steps[smaller], share))
    return rows


def measure(run: Run, repeats: int) -> StepSpeed:
    """Times the training step on random images.

    Args:
      run: from `Run.create`.
      repeats: how often everything is timed.
    """
    arithmetic = run.arithmetic
    objective = run.recipe.objective
    train_step = run.step(run.state())
    images, labels, numbers = _random_batch(run)
    plan = schedule(objective)
    # A GPU is given several steps at a time, as in a run, where nothing waits for each of them.
    burst = 8 if run.placement.accelerated else 1

    def at(step: int) -> Callable[[], None]:
        def call() -> None:
            train_step(images, labels, numbers + step * arithmetic.groups_per_step)

        return call

    whole: dict[Due, Callable[[], None]] = {due: at(step) for due, (step, _) in plan.items()}
    first_step = _seconds(at(0))
    for call in whole.values():
        _seconds(call)
    host, gpu = resources.peak_host_memory_gb(), resources.peak_gpu_memory_gb()
    main = _main_phases(run, train_step, objective, Batch(images, labels, numbers))
    timings = _in_turns({**whole, **main, **_convolutions(run)}, repeats, burst)
    runs = {phase.name: len(phase.batches) * arithmetic.rounds for phase in objective.phases}
    alone = {name: timings[name] * runs[name] for name in main}
    steps = {due: timings[due] for due in plan}
    total = sum((steps[due] * share for due, (_, share) in plan.items()), Timing(0.0, 0.0))
    return StepSpeed(
        first_step=first_step,
        rows=[
            *(Row(name, seconds, 1.0) for name, seconds in alone.items()),
            *parts(plan, steps, sum(alone.values(), Timing(0.0, 0.0))),
        ],
        sec_per_kimg=total * (1000 / arithmetic.global_batch),
        host_gb=host,
        gpu_gb=gpu,
        convolution=_faster(run, timings),
    )


def measure_convolution(run: Run, repeats: int) -> Convolution:
    """Times the bare convolution alone."""
    return _faster(run, _in_turns(_convolutions(run), repeats))


def _in_turns(
    calls: Mapping[_Key, Callable[[], None]], repeats: int, burst: int = 1
) -> dict[_Key, Timing]:
    """Times each call `repeats` times, `burst` at once, after one that doesn't count."""
    for call in calls.values():
        _seconds(call)
    times: dict[_Key, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            times[key].append(_seconds(call, burst))
    return {key: Timing.of(seconds) for key, seconds in times.items()}


def _seconds(call: Callable[[], None], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    tf.test.experimental.sync_devices()
    return (time.perf_counter() - start) / times


def _random_batch(run: Run) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, labels and group numbers as a worker's pipeline gives them."""
    random = np.random.default_rng(run.config.run.seed)
    workers = run.placement.num_workers
    groups = [run.arithmetic.groups_per_step // workers, run.arithmetic.group_size]
    images = random.integers(0, 256, [*groups, *run.data.resolution, run.data.channels], np.uint8)
    classes = len(run.data.label_counts)
    labels = random.integers(0, classes, groups) if classes else np.full(groups, -1, np.int64)
    numbers = run.placement.worker + workers * tf.range(groups[0], dtype=tf.int64)
    return tf.constant(images), tf.constant(labels), numbers


def _main_phases(
    run: Run, train_step: TrainStep, objective: Objective, batch: Batch
) -> dict[str, Callable[[], None]]:
    """The phases of every step, each alone: one round on one replica."""
    count = run.arithmetic.per_replica_batch // run.arithmetic.group_size
    groups = Batch(batch.images[:count], batch.labels[:count], batch.group_index[:count])

    def again(name: str, inputs: Any) -> Callable[[], None]:
        # Called from a graph, as the step does, the step's own function isn't compiled once more.
        call = tf.function(train_step.gradients[name], autograph=False)
        return lambda: call(inputs)

    return {
        phase.name: again(phase.name, train_step.inputs(phase, groups))
        for phase in objective.phases
        if phase.interval == 1
    }


def _convolution_shape(run: Run) -> tuple[int, int, int, int]:
    height, width = (min(side, _MAX_SIDE) for side in run.data.resolution)
    return min(run.arithmetic.per_replica_batch, _MAX_IMAGES), height, width, _CHANNELS


def _convolutions(run: Run) -> dict[str, Callable[[], None]]:
    """A 3x3 convolution with the gradients in its input and weights, by who compiles it."""
    precision = run.config.run.precision
    shape, dtype = _convolution_shape(run), half_dtype(precision) or full_dtype(precision)
    kernel = [3, 3, _CHANNELS, _CHANNELS]
    x, dy, weight = (
        tf.random.stateless_normal(size, [0, seed], dtype=dtype)
        for seed, size in enumerate((shape, shape, kernel))
    )

    def forward_and_backward(x: tf.Tensor, dy: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, weight])
            y = tf.nn.conv2d(x, weight, strides=1, padding="SAME")
        return [y, *tape.gradient(y, [x, weight], dy)]

    def timed(jit: bool) -> Callable[[], None]:
        function = tf.function(forward_and_backward, autograph=False, jit_compile=jit)
        return lambda: function(x, dy, weight)

    return {name: timed(jit) for name, jit in _COMPILERS.items()}


def _faster(run: Run, timings: Mapping[Any, Timing]) -> Convolution:
    formula = min(_COMPILERS, key=lambda name: timings[name].median)
    return Convolution(_convolution_shape(run), formula, timings[formula])
