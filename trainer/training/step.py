"""One training step, on any number of replicas and in any number of rounds.

This is the only place that knows about replicas. Each phase sums what its rounds return, sums that
over the replicas, and only then uses it; so the same parameters come out whether a batch is
computed in one piece or in many (up to the rounding of float sums).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer.augment import controller
from trainer.config import BatchArithmetic, Config
from trainer.core.schedule import Number, Schedule
from trainer.objectives.phase import Grads, Networks, Objective, Phase, Report, Trained
from trainer.objectives.sampler import Draws
from trainer.training import loss_scale, scheduling
from trainer.training.optimizer import Adam, ema_beta
from trainer.training.state import TrainState

# For each phase what it reports: by name, [3] number, sum and sum of squares over the whole batch,
# and "gradients", [] the sum of squares of all gradients. A phase that didn't run reports zeros.
Reports = dict[str, Report]

AllReduce = Callable[[list[tf.Tensor]], list[tf.Tensor]]

# (phase, group_index [groups] int64) -> the draws of these groups.
Draw = Callable[[Phase, tf.Tensor], Draws]

# The statistic by which ADA steers.
_SIGNS = "Loss/signs/real"


@dataclass(frozen=True)
class Batch:
    """A replica's share of the reals.

    Attributes:
      images: [groups, size, H, W, C] uint8, or floats in [-1, 1].
      labels: [groups, size] int64.
      group_index: [groups] int64.
    """

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
      networks: to train.
      objective: what they are trained to do.
      draw: every random number, a `Sampler` except in tests.
      jit: compile the gradients and updates with XLA.
      all_reduce: sums tensors over replicas; by default with the strategy's replica context.
    """

    def __init__(
        self,
        config: Config,
        arithmetic: BatchArithmetic,
        strategy: tf.distribute.Strategy,
        state: TrainState,
        networks: Networks,
        objective: Objective,
        draw: Draw,
        *,
        jit: bool,
        all_reduce: AllReduce | None = None,
    ) -> None:
        self._config, self._arithmetic, self._strategy = config, arithmetic, strategy
        self._all_reduce = all_reduce or _all_reduce
        self._state, self._draw = state, draw
        self._networks, self._objective = networks, objective
        self._scaled = config.run.precision == "float16"

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return tf.function(function, jit_compile=jit, autograph=False)

        # (the inputs of a phase) -> its gradients, report and sums; by the phase's name.
        self.gradients: dict[str, Callable[..., Any]] = {}
        self._whole_batch_sums: dict[str, Callable[..., Any]] = {}
        for phase in objective.phases:
            function = functools.partial(phase.gradients, networks, self._samples(phase))
            self.gradients[phase.name] = compiled(function)
            if phase.whole_batch:
                function = functools.partial(phase.whole_batch_sum, networks)
                self._whole_batch_sums[phase.name] = compiled(function)
        self._updates = {network: compiled(Adam.update) for network in ("G", "D")}
        self._lerp = compiled(_lerp)
        self._steps = tf.function(self._run, autograph=False)

    def __call__(self, images: tf.Tensor, labels: tf.Tensor, group_index: tf.Tensor) -> Reports:
        """Makes a step, or several in a row without the host in between.

        Whether a regulariser is due follows from the groups' numbers, which the host knows: reading
        `state.step` would have it wait for the step before.

        Args:
          images: [groups, size, H, W, C] uint8, or floats in [-1, 1]: the reals of this process, of
            as many steps as that is whole ones of.
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
        """A call's values by step, batch and replica, and the number of its first step."""
        values, batches = (images, labels, group_index), self._arithmetic.batches
        groups = self._local_groups // batches
        by_step = (tf.reshape(v, [-1, batches, groups, *v.shape[1:]]) for v in values)
        first_step = group_index[0] // self._arithmetic.groups_per_step
        return [*(self._split(value) for value in by_step), first_step]

    @property
    def programs(self) -> dict[str, Callable[..., Any]]:
        """The functions of each phase that run on a replica: on TPUs each is a program of its own.

        The phases take a replica's share of what a step takes, "finish" the `Reports` of them all.
        """
        programs: dict[str, Callable[..., Any]] = {
            phase.name: functools.partial(self._run_phase, phase)
            for phase in self._objective.phases
        }
        return programs | {"finish": self._finish}

    def no_reports(self) -> Reports:
        """The `Reports` of a step in which no phase ran."""
        return {phase.name: self._empty(phase) for phase in self._objective.phases}

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
        """Shares out a process's [steps, batches, groups, ...] to its replicas."""
        if self._strategy.num_replicas_in_sync == 1:
            return value
        parts = tf.split(value, self._local_replicas, axis=2)
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

        def run_on(phase: Phase, batch: int) -> Report:
            def of_this_step(index: tf.Tensor, *values: tf.Tensor) -> Report:
                return self._run_phase(phase, *(value[index, batch] for value in values))

            report = self._strategy.run(of_this_step, args=(index, *values))
            return tf.nest.map_structure(
                lambda value: self._strategy.experimental_local_results(value)[0], report
            )

        def run(phase: Phase) -> Report:
            first, *others = [run_on(phase, batch) for batch in phase.batches]
            for other in others:
                first = tf.nest.map_structure(tf.add, first, other)
            return first

        def when_due(phase: Phase) -> Report:
            if phase.interval == 1:
                return run(phase)
            # A conditional around the replicas, not in them: collectives can't be conditional.
            due = tf.equal(step % phase.interval, 0)
            return tf.cond(due, lambda: run(phase), lambda: self._empty(phase))

        reports = {phase.name: when_due(phase) for phase in self._objective.phases}
        self._strategy.run(self._finish, args=(reports,))
        return reports

    def _empty(self, phase: Phase) -> Report:
        report = {name: tf.zeros([3], self._state.dtype) for name in phase.reports}
        return report | {"gradients": tf.zeros([], self._state.dtype)}

    def _samples(self, phase: Phase) -> int:
        """Images of the whole batch that a phase takes."""
        return self._arithmetic.global_batch // phase.shrink

    def inputs(self, phase: Phase, groups: Batch, mean: tf.Tensor | None = None) -> dict[str, Any]:
        """The inputs of a phase's loss for a round's groups; see `phase.Batch`."""
        state = self._state
        reals, c = self._reals(groups) if phase.reads_reals else (None, None)
        return {
            "g": _read(state.g) if "G" in phase.applies else {},
            "d": _read(state.d) if "D" in phase.applies else {},
            "draws": self._draw(phase, groups.group_index),
            "p": tf.convert_to_tensor(self._scheduled_p(state.images, state.augment_p)),
            "reals": reals,
            "c": c,
            "buffers": _read(state.buffers),
            "numbers": {
                name: self._number(number) for name, number in self._objective.numbers.items()
            },
            "mean": mean,
            "scale": tf.convert_to_tensor(state.loss_scale[phase.name]) if self._scaled else None,
        }

    def _number(self, number: Number) -> float | tf.Tensor:
        """The value of a scheduled number at this step."""
        return scheduling.value(number, self._state.images, self._state.dtype)

    def _scheduled_p(self, images: tf.Tensor, otherwise: tf.Tensor) -> tf.Tensor:
        """The probability of augmentation after so many images, if the config schedules it."""
        p = self._config.augment.p
        if not isinstance(p, Schedule) or self._config.augment.mode != "fixed":
            return otherwise
        return scheduling.value(p, images, self._state.dtype)

    def _run_phase(self, phase: Phase, *args: tf.Tensor) -> Report:
        batch, mean = Batch(*args), None
        if phase.whole_batch and self._arithmetic.rounds * self._arithmetic.num_replicas > 1:
            # One cheap pass of first derivatives for what any gradient needs of the whole batch.
            def values(groups: Batch) -> tf.Tensor:
                return self._whole_batch_sums[phase.name](self.inputs(phase, groups))

            total = self._sum_over_replicas(self._sum_over_rounds(values, batch))
            mean = total / self._samples(phase)

        def part(groups: Batch) -> tuple[Grads, Report, Any]:
            return self.gradients[phase.name](self.inputs(phase, groups, mean))

        grads, report, sums = self._sum_over_replicas(self._sum_over_rounds(part, batch))
        report, keep = self._judge(phase, grads, report)
        self._update(phase.trains, grads, report["gradients"], keep)
        self._follow(phase, sums, keep)
        return report

    def _judge(self, phase: Phase, grads: Grads, report: Report) -> tuple[Report, tf.Tensor | None]:
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
        scale, counts = (
            table[phase.name] for table in (self._state.loss_scale, self._state.loss_scale_counts)
        )
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(value)) for value in report.values()]
        )
        *updated, exhausted = loss_scale.update(
            tf.convert_to_tensor(scale), tf.convert_to_tensor(counts), finite
        )
        _assign([scale, counts], updated)
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
        assert training.ema_kimg != "auto"
        half_life = self._number(training.ema_kimg)
        beta = ema_beta(batch, images, half_life, training.ema_rampup, state.dtype)
        trained = state.g_first  # no set: the order of names is part of a compiled program
        averages = {name: state.g_ema[name] for name in trained}
        averaged = self._lerp(_read(state.g), _read(averages), beta)
        _assign([state.g_ema[name] for name in averaged], list(averaged.values()))
        buffers = [name for name in state.g if name not in trained]
        _assign([state.g_ema[name] for name in buffers], [state.g[name] for name in buffers])

        stats = [
            sum((r[name] for r in reports.values() if name in r), tf.convert_to_tensor(total))
            for name, total in state.stats.items()
        ]
        _assign([*state.stats.values()], stats)
        self._adjust_augmentation(reports)
        self._watch(reports)
        _assign([state.images, state.step], [images + batch, state.step + 1])

    def _adjust_augmentation(self, reports: Reports) -> None:
        """Steers p by the signs of real logits since the last time (ADA, section 3.1)."""
        config, state = self._config.augment, self._state
        if isinstance(config.p, Schedule):
            images = state.images + self._arithmetic.global_batch
            _assign([state.augment_p], [self._scheduled_p(images, state.augment_p)])
        if config.mode != "ada":
            return
        signs = state.augment_signs + sum(
            report[_SIGNS][:2] for report in reports.values() if _SIGNS in report
        )
        # In float16 it can be that no update counted since.
        due = tf.logical_and(tf.equal((state.step + 1) % config.interval, 0), signs[0] > 0)
        adjusted = controller.adjust(
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
        watched = self._objective.watched
        sums = [tf.reshape(reports[phase][name], [-1])[:2] for phase, name in watched]
        bad = tf.stack([tf.reduce_any(~tf.math.is_finite(value)) for value in sums])
        first = tf.stack([tf.cast(state.step, tf.int64), tf.argmax(tf.cast(bad, tf.int32))])
        found = tf.logical_and(tf.reduce_any(bad), state.nonfinite[0] < 0)
        _assign([state.nonfinite], [tf.where(found, first, state.nonfinite)])

    # ---------------------------------------------------------------------------------- pieces

    def _sum_over_replicas(self, values: Any) -> Any:
        return tf.nest.pack_sequence_as(values, self._all_reduce(tf.nest.flatten(values)))

    def _sum_over_rounds(self, part: Callable[[Batch], Any], batch: Batch) -> Any:
        """Adds what `part` returns for each round's groups; one round's memory is in use at a time."""
        rounds = self._arithmetic.rounds
        if rounds == 1:
            return part(batch)
        size = batch.group_index.shape[0] // rounds

        def groups(index: tf.Tensor) -> Batch:
            values = (batch.images, batch.labels, batch.group_index)
            cut = [value[index * size : (index + 1) * size] for value in values]
            for value, whole in zip(cut, values, strict=True):
                value.set_shape([size, *whole.shape[1:]])
            return Batch(*cut)

        total = part(groups(tf.constant(0)))

        def body(index: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
            flat = tf.nest.flatten(part(groups(index)))
            return (index + 1, *(a + b for a, b in zip(sums, flat, strict=True)))

        _, *sums = tf.while_loop(
            lambda index, *_: index < rounds, body, [tf.constant(1), *tf.nest.flatten(total)]
        )
        return tf.nest.pack_sequence_as(total, sums)

    def _reals(self, groups: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        """[N, H, W, C] in [-1, 1] and [N, c_dim] of a round's groups."""
        dtype = self._state.dtype
        images = tf.reshape(groups.images, [-1, *groups.images.shape[2:]])
        labels = tf.reshape(groups.labels, [-1])
        depth = self._networks.discriminator.c_dim
        from_bytes = images.dtype == tf.uint8
        images = tf.cast(images, dtype)
        if from_bytes:
            images = images / 127.5 - 1
        # Without classes the label is -1 and the depth 0: [N, 0].
        return images, tf.one_hot(labels, depth, dtype=dtype)

    def _update(
        self, network: Trained, grads: Grads, squares: tf.Tensor, keep: tf.Tensor | None
    ) -> None:
        """Moves the parameters of a network; `squares` is the sum of those of all gradients."""
        training, clip = self._config.training, self._config.objective.gradient_clip
        if clip is not None:
            factor = clip / tf.maximum(tf.sqrt(squares), clip)
            grads = {name: grad * factor for name, grad in grads.items()}
        rate = training.g_lr if network == "G" else training.d_lr
        assert rate != "auto"
        adam = Adam(*(self._number(each) for each in (rate, training.beta1, training.beta2)))
        adam = adam.lazy(self._objective.lazy.get(network))
        *tables, steps = self._state.optimized(network)
        count, values = steps + 1, (_read(table, grads) for table in tables)
        values = self._updates[network](adam, count, *values, grads)
        _store(tables, values, keep)
        _assign([steps], [count], keep)

    def _follow(self, phase: Phase, sums: Mapping[str, Any], keep: tf.Tensor | None) -> None:
        """Moves the buffers that follow something of a phase."""
        state, networks = self._state, self._networks
        for owner, follow, table in (
            ("G", networks.generator.follow, state.g),
            ("D", networks.discriminator.follow, state.d),
            ("objective", self._objective.follow, state.buffers),
        ):
            if sums.get(owner):
                means = {n: total / self._samples(phase) for n, total in sums[owner].items()}
                new = follow(_read(table, means), means)
                _assign([table[name] for name in new], list(new.values()), keep)


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
    tables: Sequence[Mapping[str, tf.Variable]],
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
