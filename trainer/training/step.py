"""One training step, on any number of replicas and in any number of rounds.

This is the only place that knows about replicas. Each phase sums what its rounds return, sums that
over the replicas, and only then uses it; so the same parameters come out whether a batch is
computed in one piece or in many (up to the rounding of float sums).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer.config import BatchArithmetic, Config
from trainer.training import augment, loss_scale
from trainer.training.optimizer import Adam, ema_beta
from trainer.training.phases import Draw, Grads, Phases, Report
from trainer.training.state import PHASES, QUANTITIES, STATS, TrainState

# NVIDIA's decay of the moving average of w.
_W_AVG_BETA = 0.995

# For each phase what it reports: by name, [3] number, sum and sum of squares over the whole batch,
# and "gradients", [] the sum of squares of all gradients. A phase that didn't run reports zeros.
Reports = dict[str, Report]

AllReduce = Callable[[list[tf.Tensor]], list[tf.Tensor]]

_PHASE_REPORTS = {
    "Gmain": ("Loss/scores/fake", "Loss/signs/fake", "Loss/G/loss"),
    "Greg": ("Loss/pl_penalty", "Loss/G/reg"),
    "Dmain": (
        "Loss/scores/fake",
        "Loss/signs/fake",
        "Loss/scores/real",
        "Loss/signs/real",
        "Loss/D/loss",
    ),
    "Dreg": ("Loss/scores/real", "Loss/signs/real", "Loss/r1_penalty", "Loss/D/reg"),
}


@dataclass(frozen=True)
class _Batch:
    """A replica's share of the reals: [groups, size, H, W, C], [groups, size] and [groups]."""

    images: tf.Tensor
    labels: tf.Tensor
    group_index: tf.Tensor


class TrainStep:
    """Trains `state` by one step for each call.

    Args:
      config: resolved.
      arithmetic: how a batch divides; its replicas are those of `strategy`.
      strategy: where to run.
      state: the variables, made in the strategy's scope.
      phases: the gradients.
      draw: every random number, a `phases.Sampler` except in tests.
      jit: compile the gradients and updates with XLA.
      all_reduce: sums tensors over replicas; by default with the strategy's replica context.
    """

    def __init__(
        self,
        config: Config,
        arithmetic: BatchArithmetic,
        strategy: tf.distribute.Strategy,
        state: TrainState,
        phases: Phases,
        draw: Draw,
        *,
        jit: bool,
        all_reduce: AllReduce | None = None,
    ) -> None:
        self._config, self._arithmetic, self._strategy = config, arithmetic, strategy
        self._all_reduce = all_reduce or _all_reduce
        self._state, self._phases, self._draw = state, phases, draw
        training = config.training
        self._r1 = training.r1_gamma != "auto" and training.r1_gamma > 0
        self._scaled = config.run.precision == "float16"
        # The interval corrects rate and decay also where a weight of 0 leaves the phase out.
        self._g_adam = Adam.lazy(
            float(training.g_lr), training.beta1, training.beta2, training.g_reg_interval
        )
        self._d_adam = Adam.lazy(
            float(training.d_lr), training.beta1, training.beta2, training.d_reg_interval
        )

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return tf.function(function, jit_compile=jit, autograph=False)

        self._gmain = compiled(phases.gmain)
        self._greg = compiled(phases.greg)
        self._path_lengths = compiled(phases.path_lengths)
        self._dmain = compiled(phases.dmain)
        self._dreg = compiled(phases.dreg)
        self._g_update = compiled(self._g_adam.update)
        self._d_update = compiled(self._d_adam.update)
        self._lerp = compiled(_lerp)
        self._steps = tf.function(self._run, autograph=False)

    def __call__(self, images: tf.Tensor, labels: tf.Tensor, group_index: tf.Tensor) -> Reports:
        """Makes a step, or several in a row without the host in between.

        Whether a regulariser is due follows from the groups' numbers, which the host knows: reading
        `state.step` would have it wait for the step before.

        Args:
          images: [groups, size, H, W, C] uint8, or floats in [-1, 1]: the reals of this process, of
            as many steps as there are whole batches of them.
          labels: [groups, size] int64, their classes, or -1.
          group_index: [groups] int64, the groups' numbers from the start of the run.

        Returns:
          What each phase reported in the last of the steps.
        """
        return self._steps(*self._arranged(images, labels, group_index))

    def trace(self, image_shape: Sequence[int]) -> None:
        """Makes the graphs of all that a call runs, and runs none.

        TensorFlow numbers what a process makes, and the numbers are part of the programs that the
        compilation cache looks for. So this comes before all in which a start and a resumed run
        differ.

        Args:
          image_shape: (height, width, channels) of the images.
        """
        a, steps = self._arithmetic, self._config.run.steps_per_loop
        groups = steps * self._local_groups
        images = tf.zeros([groups, a.group_size, *image_shape], tf.uint8)
        labels = tf.zeros([groups, a.group_size], tf.int64)
        index = tf.zeros([groups], tf.int64)
        self._steps.get_concrete_function(*self._arranged(images, labels, index))

    def _arranged(self, images: tf.Tensor, labels: tf.Tensor, group_index: tf.Tensor) -> list[Any]:
        """A call's values by step and replica, and the number of its first step."""
        values = images, labels, group_index
        by_step = (tf.reshape(v, [-1, self._local_groups, *v.shape[1:]]) for v in values)
        first_step = group_index[0] // self._arithmetic.groups_per_step
        return [*(self._split(value) for value in by_step), first_step]

    @property
    def programs(self) -> dict[str, Callable[..., Any]]:
        """What runs on each replica, by phase: on TPUs every one is a program of its own.

        The phases take a replica's share of what a step takes, "finish" the `Reports` of them all.
        """
        programs: dict[str, Callable[..., Any]] = {"Gmain": self._run_gmain}
        if self._config.training.pl_weight > 0:
            programs["Greg"] = self._run_greg
        programs["Dmain"] = self._run_dmain
        if self._r1:
            programs["Dreg"] = self._run_dreg
        return programs | {"finish": self._finish}

    def no_reports(self) -> Reports:
        """The `Reports` of a step in which no phase ran."""
        return {phase: self._empty(phase) for phase in _PHASE_REPORTS}

    @property
    def _local_groups(self) -> int:
        """Groups of one step in this process."""
        a = self._arithmetic
        return a.groups_per_step // a.num_replicas * self._local_replicas

    @property
    def _local_replicas(self) -> int:
        """Replicas of this process."""
        if self._strategy.num_replicas_in_sync == 1:
            return 1
        return len(self._strategy.extended.worker_devices)

    def _split(self, value: tf.Tensor) -> Any:
        """Shares out a process's [steps, groups, ...] to its replicas."""
        if self._strategy.num_replicas_in_sync == 1:
            return value
        parts = tf.split(value, self._local_replicas, axis=1)
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group % len(parts)]
        )

    # ---------------------------------------------------------------------------------- phases

    def _run(self, images: Any, labels: Any, group_index: Any, first_step: tf.Tensor) -> Reports:
        steps = self._strategy.experimental_local_results(images)[0].shape[0]
        values = images, labels, group_index
        if steps == 1:
            return self._run_one(values, tf.constant(0, tf.int64), first_step)

        def body(index: tf.Tensor, _: Reports) -> tuple[tf.Tensor, Reports]:
            return index + 1, self._run_one(values, index, first_step + index)

        start = tf.constant(0, tf.int64), self.no_reports()
        # One iteration at a time: each changes what the next one reads.
        return tf.while_loop(lambda i, _: i < steps, body, start, parallel_iterations=1)[1]

    def _run_one(self, values: tuple[Any, ...], index: tf.Tensor, step: tf.Tensor) -> Reports:
        """Makes the step of which the values are at `index`."""
        training = self._config.training

        def run(function: Callable[..., Report]) -> Report:
            def of_this_step(index: tf.Tensor, *values: tf.Tensor) -> Report:
                return function(*(value[index] for value in values))

            report = self._strategy.run(of_this_step, args=(index, *values))
            return tf.nest.map_structure(
                lambda value: self._strategy.experimental_local_results(value)[0], report
            )

        def every(interval: int, phase: str, function: Callable[..., Report]) -> Report:
            # A conditional around the replicas, not in them: collectives can't be conditional.
            due = tf.equal(step % interval, 0)
            return tf.cond(due, lambda: run(function), lambda: self._empty(phase))

        reports = {"Gmain": run(self._run_gmain), "Greg": self._empty("Greg")}
        if training.pl_weight > 0:
            reports["Greg"] = every(training.g_reg_interval, "Greg", self._run_greg)
        reports |= {"Dmain": run(self._run_dmain), "Dreg": self._empty("Dreg")}
        if self._r1:
            reports["Dreg"] = every(training.d_reg_interval, "Dreg", self._run_dreg)
        self._strategy.run(self._finish, args=(reports,))
        return reports

    def _empty(self, phase: str) -> Report:
        dtype = self._state.stats.dtype
        report = {name: tf.zeros([3], dtype) for name in _PHASE_REPORTS[phase]}
        return report | {"gradients": tf.zeros([], dtype)}

    def _arguments(self, phase: str, groups: _Batch) -> dict[str, Any]:
        """What a phase's gradients take for a round's groups."""
        state = self._state
        arguments: dict[str, Any] = {"draws": self._draw(phase, groups.group_index)}
        arguments |= self._scale(phase)
        batch = self._arithmetic.global_batch
        if phase == "Greg":
            moving_mean = tf.convert_to_tensor(state.pl_mean)
            batch //= self._config.training.pl_batch_shrink
            return arguments | {"g": _read(state.g), "moving_mean": moving_mean, "batch": batch}
        arguments |= {"d": _read(state.d), "p": tf.convert_to_tensor(state.augment_p)}
        if phase != "Dreg":
            arguments["g"] = _read(state.g)
        if phase != "Gmain":
            arguments["images"], arguments["c"] = self._reals(groups)
        return arguments | {"batch": batch}

    def _scale(self, phase: str) -> dict[str, tf.Tensor]:
        """The argument `scale` of a phase in float16, nothing in other precisions."""
        return {"scale": self._state.loss_scale[PHASES.index(phase)]} if self._scaled else {}

    def _run_gmain(self, *args: tf.Tensor) -> Report:
        def part(groups: _Batch) -> tuple[Grads, Report, tf.Tensor]:
            return self._gmain(**self._arguments("Gmain", groups))

        grads, report, w_sum = self._sum_over_replicas(self._sum_over_rounds(part, _Batch(*args)))
        report, keep = self._judge("Gmain", grads, report)
        self._update_g(grads, keep)
        self._move_w_avg(w_sum / self._arithmetic.global_batch, keep)
        return report

    def _run_greg(self, *args: tf.Tensor) -> Report:
        batch, state = _Batch(*args), self._state
        images = self._arithmetic.global_batch // self._config.training.pl_batch_shrink
        batch_mean, scale = None, self._scale("Greg")
        if self._arithmetic.rounds * self._arithmetic.num_replicas > 1:
            # The penalty needs the mean length of the whole batch before any gradient: one cheap
            # pass of first derivatives for it.
            def lengths(groups: _Batch) -> tf.Tensor:
                draws = self._draw("Greg", groups.group_index)
                return tf.reduce_sum(self._path_lengths(_read(state.g), draws, **scale))

            batch_mean = self._sum_over_replicas(self._sum_over_rounds(lengths, batch)) / images

        def part(groups: _Batch) -> tuple[Grads, Report, tf.Tensor, tf.Tensor]:
            return self._greg(**self._arguments("Greg", groups), batch_mean=batch_mean)

        *sums, moving_mean = self._sum_over_rounds(part, batch)
        grads, report, w_sum = self._sum_over_replicas(sums)
        if batch_mean is not None:
            # Every round found the same new mean, and they were added up.
            moving_mean /= self._arithmetic.rounds
        report, keep = self._judge("Greg", grads, report)
        self._update_g(grads, keep)
        self._move_w_avg(w_sum / images, keep)
        _assign([state.pl_mean], [moving_mean], keep)
        return report

    def _run_dmain(self, *args: tf.Tensor) -> Report:
        def part(groups: _Batch) -> tuple[Grads, Report, tf.Tensor]:
            return self._dmain(**self._arguments("Dmain", groups))

        grads, report, w_sum = self._sum_over_replicas(self._sum_over_rounds(part, _Batch(*args)))
        report, keep = self._judge("Dmain", grads, report)
        self._update_d(grads, keep)
        self._move_w_avg(w_sum / self._arithmetic.global_batch, keep)
        return report

    def _run_dreg(self, *args: tf.Tensor) -> Report:
        def part(groups: _Batch) -> tuple[Grads, Report]:
            return self._dreg(**self._arguments("Dreg", groups))

        grads, report = self._sum_over_replicas(self._sum_over_rounds(part, _Batch(*args)))
        report, keep = self._judge("Dreg", grads, report)
        self._update_d(grads, keep)
        return report

    def _judge(self, phase: str, grads: Grads, report: Report) -> tuple[Report, tf.Tensor | None]:
        """Adds the size of the gradients to a phase's report, and says whether to use them.

        In float16 a phase whose numbers are not all finite changes nothing and reports nothing:
        its loss scale falls. It is decided by the sums over all replicas, so by all alike. Only if
        that happens too often in a row is it reported as non-finite.

        Returns:
          The report, and whether the phase counts: [] bool, or None where it always does.
        """
        report = report | {"gradients": _sum_of_squares(grads)}
        if not self._scaled:
            return report, None
        state = self._state
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(value)) for value in report.values()]
        )
        scale, counts, exhausted = loss_scale.update(
            tf.convert_to_tensor(state.loss_scale),
            tf.convert_to_tensor(state.loss_scale_counts),
            PHASES.index(phase),
            finite,
        )
        _assign([state.loss_scale, state.loss_scale_counts], [scale, counts])
        report = {
            name: tf.where(finite, value, tf.zeros_like(value)) for name, value in report.items()
        }
        gradients = report["gradients"]
        report["gradients"] = tf.where(exhausted, tf.constant(math.nan, gradients.dtype), gradients)
        return report, finite

    def _finish(self, reports: Reports) -> None:
        """Moving average, augmentation strength, statistics and counters."""
        state, training = self._state, self._config.training
        images = tf.convert_to_tensor(state.images)
        batch = self._arithmetic.global_batch
        dtype = state.stats.dtype
        beta = ema_beta(batch, images, float(training.ema_kimg), training.ema_rampup, dtype)
        trained = state.g_first  # no set: the order of names is part of a compiled program
        averages = {name: state.g_ema[name] for name in trained}
        averaged = self._lerp(_read(state.g), _read(averages), beta)
        _assign([state.g_ema[name] for name in averaged], list(averaged.values()))
        buffers = [name for name in state.g if name not in trained]
        _assign([state.g_ema[name] for name in buffers], [state.g[name] for name in buffers])

        zero = tf.zeros([3], state.stats.dtype)
        rows = [sum((r[name] for r in reports.values() if name in r), zero) for name in STATS]
        _assign([state.stats], [state.stats + tf.stack(rows)])
        self._adjust_augmentation(reports)
        self._watch(reports)
        _assign([state.images, state.step], [images + batch, state.step + 1])

    def _adjust_augmentation(self, reports: Reports) -> None:
        """Steers p by the signs of real logits since the last time (ADA, section 3.1)."""
        config, state = self._config.augment, self._state
        if config.mode != "ada":
            return
        signs = state.augment_signs + sum(
            reports[phase]["Loss/signs/real"][:2] for phase in ("Dmain", "Dreg")
        )
        # In float16 it can be that no update counted since.
        due = tf.logical_and(tf.equal((state.step + 1) % config.interval, 0), signs[0] > 0)
        adjusted = augment.adjust(
            tf.convert_to_tensor(state.augment_p),
            signs[1] / signs[0],
            self._arithmetic.global_batch * config.interval,
            config.target,
            config.adjust_kimg,
        )
        p = tf.where(due, adjusted, state.augment_p)
        _assign(
            [state.augment_p, state.augment_signs], [p, tf.where(due, tf.zeros_like(signs), signs)]
        )

    def _watch(self, reports: Reports) -> None:
        """Remembers the first quantity that isn't finite."""
        state = self._state
        sums = [tf.reshape(reports[phase][name], [-1])[:2] for phase, name in QUANTITIES]
        bad = tf.stack([tf.reduce_any(~tf.math.is_finite(value)) for value in sums])
        first = tf.stack([tf.cast(state.step, tf.int64), tf.argmax(tf.cast(bad, tf.int32))])
        found = tf.logical_and(tf.reduce_any(bad), state.nonfinite[0] < 0)
        _assign([state.nonfinite], [tf.where(found, first, state.nonfinite)])

    # ---------------------------------------------------------------------------------- pieces

    def _sum_over_replicas(self, values: Any) -> Any:
        return tf.nest.pack_sequence_as(values, self._all_reduce(tf.nest.flatten(values)))

    def _sum_over_rounds(self, part: Callable[[_Batch], Any], batch: _Batch) -> Any:
        """Adds what `part` returns for each round's groups; one round's memory is in use at a time."""
        rounds = self._arithmetic.rounds
        if rounds == 1:
            return part(batch)
        size = batch.group_index.shape[0] // rounds

        def groups(index: tf.Tensor) -> _Batch:
            values = (batch.images, batch.labels, batch.group_index)
            cut = [value[index * size : (index + 1) * size] for value in values]
            for value, whole in zip(cut, values, strict=True):
                value.set_shape([size, *whole.shape[1:]])
            return _Batch(*cut)

        total = part(groups(tf.constant(0)))

        def body(index: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
            flat = tf.nest.flatten(part(groups(index)))
            return (index + 1, *(a + b for a, b in zip(sums, flat, strict=True)))

        _, *sums = tf.while_loop(
            lambda index, *_: index < rounds, body, [tf.constant(1), *tf.nest.flatten(total)]
        )
        return tf.nest.pack_sequence_as(total, sums)

    def _reals(self, groups: _Batch) -> tuple[tf.Tensor, tf.Tensor]:
        """[N, H, W, C] in [-1, 1] and [N, c_dim] of a round's groups."""
        dtype = self._state.stats.dtype
        images = tf.reshape(groups.images, [-1, *groups.images.shape[2:]])
        labels = tf.reshape(groups.labels, [-1])
        depth = self._phases.discriminator.c_dim
        from_bytes = images.dtype == tf.uint8
        images = tf.cast(images, dtype)
        if from_bytes:
            images = images / 127.5 - 1
        # Without classes the label is -1 and the depth 0: [N, 0].
        return images, tf.one_hot(labels, depth, dtype=dtype)

    def _update_g(self, grads: Grads, keep: tf.Tensor | None) -> None:
        state = self._state
        count = state.g_count + 1
        tables = (state.g, state.g_first, state.g_second)
        _store(tables, self._g_update(count, *(_read(t, grads) for t in tables), grads), keep)
        _assign([state.g_count], [count], keep)

    def _update_d(self, grads: Grads, keep: tf.Tensor | None) -> None:
        state = self._state
        count = state.d_count + 1
        tables = (state.d, state.d_first, state.d_second)
        _store(tables, self._d_update(count, *(_read(t, grads) for t in tables), grads), keep)
        _assign([state.d_count], [count], keep)

    def _move_w_avg(self, mean: tf.Tensor, keep: tf.Tensor | None) -> None:
        w_avg = self._state.g["mapping.w_avg"]
        _assign([w_avg], [mean + _W_AVG_BETA * (w_avg - mean)], keep)


def _lerp(
    targets: Mapping[str, tf.Tensor], averages: Mapping[str, tf.Tensor], beta: tf.Tensor
) -> dict[str, tf.Tensor]:
    return {name: targets[name] + (old - targets[name]) * beta for name, old in averages.items()}


def _read(
    table: Mapping[str, tf.Variable], names: Mapping[str, Any] | None = None
) -> dict[str, tf.Tensor]:
    """This replica's values; compiled functions take tensors, since they can't hold variables of
    several devices."""
    return {name: tf.convert_to_tensor(table[name]) for name in (names or table)}


def _store(
    tables: tuple[Mapping[str, tf.Variable], ...],
    values: tuple[Mapping[str, tf.Tensor], ...],
    keep: tf.Tensor | None,
) -> None:
    for table, new in zip(tables, values, strict=True):
        _assign([table[name] for name in new], list(new.values()), keep)


def _assign(variables: list[tf.Variable], values: list[Any], keep: tf.Tensor | None = None) -> None:
    """Stores in each replica's copy that replica's value, which all replicas have computed alike.

    If `keep` is given and false, everything stays as it is.
    """

    def update(strategy: tf.distribute.Strategy, values: list[Any]) -> None:
        for variable, value in zip(variables, values, strict=True):
            strategy.extended.update(variable, _assign_one, args=(value,), group=False)

    values = [tf.convert_to_tensor(value) for value in values]
    if keep is not None:
        pairs = zip(values, variables, strict=True)
        values = [tf.where(keep, value, tf.convert_to_tensor(old)) for value, old in pairs]
    tf.distribute.get_replica_context().merge_call(update, args=(values,))


def _assign_one(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(value)


def agree(strategy: tf.distribute.Strategy, number: int) -> bool:
    """Whether all workers have been given the same number."""

    def total() -> tf.Tensor:
        return _all_reduce([tf.constant([number, number**2], tf.float64)])[0]

    @tf.function(autograph=False)
    def over_all() -> Any:
        return strategy.run(total)

    found = strategy.experimental_local_results(over_all())[0].numpy()
    return tuple(found) == tuple(strategy.num_replicas_in_sync * n for n in (number, number**2))


def _all_reduce(values: list[tf.Tensor]) -> list[tf.Tensor]:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def _sum_of_squares(grads: Grads) -> tf.Tensor:
    return tf.add_n([tf.reduce_sum(tf.square(grad)) for grad in grads.values()])
