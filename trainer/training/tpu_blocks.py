"""What a step costs on TPUs where whole phases take the compiler too long: block by block.

Each block of the networks is compiled alone, once for each way in which the phases use it, and the
times are added up:

    forward   the fakes that D is trained on
    first     with the gradients in its inputs and, where they are trained, its parameters
    second    with the gradients of those gradients, for the regularisers

What is left out: random numbers, the losses, and the all-reduce, which has no estimate anyway. What
is counted too often: what one block writes for the next to read, where the compiler would have
fused the two. A whole phase needs less memory than the sum of its blocks, since each is counted with
all that it is given, and more than the largest.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from trainer.families.network import Network
from trainer.families.stylegan2.networks import Discriminator, Generator
from trainer.training import tpu_compiler, tpu_estimate
from trainer.training.optimizer import Adam
from trainer.training.tpu_cost import Phase, TpuRun
from trainer.training.tpu_estimate import Estimate

Params = dict[str, tf.Tensor]
Mode = Literal["forward", "first", "second"]


@dataclass(frozen=True)
class Stage:
    """A part of a network.

    Attributes:
      name: `G b64`, `D b4`, `augment`.
      params: specs of its parameters by name.
      inputs: specs of what it computes with: from the stage before, and w.
      fixed: specs of what has no gradient: noise, numbers of groups.
      function: (params, inputs, fixed) -> outputs.
    """

    name: str
    params: dict[str, tf.TensorSpec]
    inputs: list[tf.TensorSpec]
    fixed: list[tf.TensorSpec]
    function: Callable[[Params, list[tf.Tensor], list[tf.Tensor]], list[tf.Tensor]]

    def outputs(self) -> list[tf.TensorSpec]:
        """Specs of what it gives."""
        traced = tf.function(self.function, autograph=False).get_concrete_function(
            self.params, self.inputs, self.fixed
        )
        return [tf.TensorSpec(x.shape, x.dtype) for x in traced.structured_outputs]


def program(
    stage: Stage, mode: Mode, *, trained: bool
) -> tuple[Callable[..., Any], list[tf.TensorSpec]]:
    """What a phase makes of a stage, and the specs of what it is given, one by one.

    Args:
      stage: the part.
      mode: as in this module's description.
      trained: whether gradients in its parameters are wanted.
    """
    outputs = stage.outputs()
    # What comes back from the stage after: the gradients in the outputs, and for second order
    # those in the outputs and in the gradients that were handed on.
    nested: list[Any] = [stage.params, stage.inputs, stage.fixed]
    if mode != "forward":
        nested.append(outputs)
    if mode == "second":
        nested += [outputs, stage.inputs]

    def first(params: Params, inputs: Any, fixed: Any, back: Any) -> Any:
        sources = [params if trained else {}, inputs]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            found = stage.function(params, inputs, fixed)
        return found, _gradient(tape, found, sources, back)

    def second(params: Params, inputs: Any, fixed: Any, back: Any, *seeds: Any) -> Any:
        sources = [params if trained else {}, inputs, back]
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch(sources)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(inputs)
                found = stage.function(params, inputs, fixed)
            grads = _gradient(inner, found, inputs, back)
        return found, grads, _gradient(outer, [found, grads], sources, list(seeds))

    functions: dict[Mode, Callable[..., Any]] = {
        "forward": stage.function,
        "first": first,
        "second": second,
    }

    def flat(*values: tf.Tensor) -> list[tf.Tensor]:
        found = functions[mode](*tf.nest.pack_sequence_as(nested, values))
        return [tf.convert_to_tensor(value) for value in tf.nest.flatten(found)]

    return flat, tf.nest.flatten(nested)


def _gradient(tape: tf.GradientTape, targets: Any, sources: Any, seeds: Any) -> Any:
    return tape.gradient(
        targets,
        sources,
        output_gradients=seeds,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )


# ------------------------------------------------------------------------------ the networks


def _params_of(network: Network, prefix: str) -> dict[str, tf.TensorSpec]:
    names = [name for name in network.trainable_names() if name.startswith(prefix)]
    return {name: tf.TensorSpec(network.specs[name].shape) for name in names}


def generator_stages(run: TpuRun, images: int) -> list[Stage]:
    """The mapping network and each block, for a number of images."""
    generator, w_dim = run.phases.generator, run.phases.generator.w_dim
    assert isinstance(generator, Generator)

    latents = [tf.TensorSpec([images, generator.z_dim]), tf.TensorSpec([images, generator.c_dim])]
    stages = [
        Stage(
            "G mapping",
            _params_of(generator, "mapping."),
            latents,
            [],
            lambda params, inputs, _: [generator.map(params, *inputs)],
        )
    ]
    handed_on: list[tf.TensorSpec] = []
    for block in generator.blocks:

        def function(
            params: Params, inputs: Any, noise: Any, block: Any = block
        ) -> list[tf.Tensor]:
            full = {"mapping.w_avg": tf.zeros([w_dim])}  # of which the networks ask the type
            *before, w = inputs
            x, img = [*before, None, None][:2]
            styles, noises = itertools.repeat(w), iter(noise)
            x, img, _ = generator._block({**params, **full}, block, x, img, styles, noises)
            return [each for each in (x, img) if each is not None]

        layers = generator._num_convs(block)
        stage = Stage(
            f"G {block.name}",
            _params_of(generator, f"synthesis.{block.name}."),
            [*handed_on, tf.TensorSpec([images, w_dim])],
            [tf.TensorSpec([images, block.height, block.width])] * layers,
            function,
        )
        handed_on = stage.outputs()
        stages.append(stage)
    return stages


def discriminator_stages(run: TpuRun, images: int) -> list[Stage]:
    """Each block and the epilogue, for a number of images."""
    discriminator = run.phases.discriminator
    assert isinstance(discriminator, Discriminator)
    skips = discriminator.architecture == "skip"
    stages = []
    handed_on = [tf.TensorSpec([images, *run.data.resolution, run.data.channels])]
    for block in discriminator.blocks:

        def function(params: Params, inputs: Any, _: Any, block: Any = block) -> list[tf.Tensor]:
            full = {"b4.out.weight": tf.zeros([1, 1])}  # of which the networks ask the type
            x, img = (
                (None, inputs[0]) if block is discriminator.blocks[0] else [*inputs, inputs[0]][:2]
            )
            x, img = discriminator._block({**full, **params}, block, x, img)
            return [x, img] if skips else [x]

        stages.append(
            Stage(
                f"D {block.name}",
                _params_of(discriminator, f"{block.name}."),
                handed_on,
                [],
                function,
            )
        )
        handed_on = stages[-1].outputs()

    def epilogue(params: Params, inputs: Any, _: Any) -> list[tf.Tensor]:
        x = tf.cast(inputs[0], tf.float32)
        if skips:
            image = tf.cast(inputs[1], tf.float32)
            x += discriminator._fromrgb(params, "b4.fromrgb", image)
        return [discriminator._epilogue(params, x)]

    return [*stages, Stage("D b4", _params_of(discriminator, "b4."), handed_on, [], epilogue)]


def augment_stages(run: TpuRun, images: int) -> list[Stage]:
    """The augmentation, if there is any."""
    phases = run.phases
    if phases.pipe is None:
        return []

    def function(_: Params, inputs: Any, fixed: Any) -> list[tf.Tensor]:
        draws = run.draw("Dreg", fixed[0]).augment_real
        assert draws is not None
        return [phases._augment(inputs[0], draws, fixed[1])]

    image = tf.TensorSpec([images, *run.data.resolution, run.data.channels])
    groups = tf.TensorSpec([images // phases.group_size], tf.int64)
    return [Stage("augment", {}, [image], [groups, tf.TensorSpec([])], function)]


def _first_of(stages: list[Stage]) -> list[Stage]:
    """Stages of which the first is given what nobody differentiates by: images, latents."""
    stage, *rest = stages
    count = len(stage.inputs)

    def function(params: Params, _: Any, fixed: Any) -> list[tf.Tensor]:
        return stage.function(params, fixed[:count], fixed[count:])

    first = Stage(stage.name, stage.params, [], stage.inputs + stage.fixed, function)
    return [first, *rest]


def _update_stage(name: str, specs: dict[str, tf.TensorSpec]) -> Stage:
    """Adam, for the parameters of a network."""

    def function(params: Params, _: Any, fixed: Any) -> list[tf.Tensor]:
        count, *values = fixed
        tables = [dict(zip(params, values[i * len(params) :], strict=False)) for i in range(3)]
        return tf.nest.flatten(Adam(lr=0.002, beta1=0.0, beta2=0.99).update(count, params, *tables))

    return Stage(
        name, specs, [], [tf.TensorSpec([], tf.int64), *(list(specs.values()) * 3)], function
    )


def _params(stages: Sequence[Stage]) -> dict[str, tf.TensorSpec]:
    return {name: spec for stage in stages for name, spec in stage.params.items()}


# ------------------------------------------------------------------------------ the phases


def parts(run: TpuRun) -> list[tuple[str, Stage, Mode, bool, int]]:
    """(phase, stage, mode, trained, how often in a step in which the phase runs)."""
    config, a = run.config.training, run.arithmetic
    images, rounds = a.per_replica_batch, a.rounds
    generator, discriminator = generator_stages(run, images), discriminator_stages(run, images)
    augment = augment_stages(run, images)
    update_g = _update_stage("G Adam", _params(generator))
    update_d = _update_stage("D Adam", _params(discriminator))
    found: list[tuple[str, Stage, Mode, bool, int]] = []

    def add(phase: str, stages: Sequence[Stage], mode: Mode, trained: bool, times: int = 1) -> None:
        found.extend((phase, stage, mode, trained, times * rounds) for stage in stages)

    def update(phase: str, stage: Stage) -> None:
        found.append((phase, stage, "forward", False, 1))

    add("Gmain", _first_of(generator), "first", True)
    add("Gmain", augment, "first", False)
    add("Gmain", discriminator, "first", False)
    update("Gmain", update_g)
    if config.pl_weight > 0:
        mapping, *blocks = generator_stages(run, images // config.pl_batch_shrink)
        # The mean length of the whole batch comes first. With one round the compiler sees that its
        # pass is part of the one that is differentiated, and makes it once.
        if rounds > 1:
            add("Greg", blocks, "first", False)
        add("Greg", _first_of([mapping]), "first", True)
        add("Greg", blocks, "second", True)
        update("Greg", update_g)
    add("Dmain", generator, "forward", False)
    add("Dmain", augment, "forward", False, times=2)
    add("Dmain", _first_of(discriminator_stages(run, 2 * images)), "first", True)
    update("Dmain", update_d)
    if config.r1_gamma != "auto" and config.r1_gamma > 0:
        add("Dreg", augment, "second", False)
        add("Dreg", discriminator, "second", True)
        update("Dreg", update_d)
    return found


def compile_parts(run: TpuRun) -> Iterator[Phase]:
    """Compiles one part after the other; `total` adds them up."""
    for phase, stage, mode, trained, times in parts(run):
        start = time.monotonic()
        name = f"{phase} {stage.name}"
        try:
            hlo = tpu_compiler.lower(*program(stage, mode, trained=trained))
            executable = tpu_compiler.compile_hlo(hlo, run.topology, 1)
            estimate = _times(tpu_estimate.estimate(executable, run.topology), times)
        except (RuntimeError, ValueError, tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:200]
            yield Phase(name, run.share(phase), time.monotonic() - start, None, reason)
            continue
        yield Phase(name, run.share(phase), time.monotonic() - start, estimate)
    yield run.compile_phase("finish")


def total(found: Sequence[Phase]) -> list[Phase]:
    """One line for each phase: the sums of its parts."""
    phases = []
    for name, group in itertools.groupby(found, lambda part: part.name.partition(" ")[0]):
        members = list(group)
        estimates = [part.estimate for part in members if part.estimate]
        if len(estimates) < len(members):
            wrong = next(part for part in members if not part.estimate)
            phases.append(Phase(name, wrong.share, 0.0, None, f"{wrong.name}: {wrong.error}"))
            continue
        seconds = sum(part.seconds for part in members)
        phases.append(Phase(name, members[0].share, seconds, _sum(estimates)))
    return phases


def _times(each: Estimate, times: int) -> Estimate:
    return _sum([each] * times, hbm=each.hbm)


def _sum(estimates: Sequence[Estimate], hbm: int | None = None) -> Estimate:
    unestimated: dict[str, int] = {}
    for each in estimates:
        for kind, number in each.unestimated.items():
            unestimated[kind] = unestimated.get(kind, 0) + number
    return Estimate(
        flop=sum(each.flop for each in estimates),
        hbm=sum(each.hbm for each in estimates) if hbm is None else hbm,
        raw=sum(each.raw for each in estimates),
        adjusted=sum(each.adjusted for each in estimates),
        roofline=sum(each.roofline for each in estimates),
        unestimated=unestimated,
        largest=sorted((row for each in estimates for row in each.largest), reverse=True)[:20],
    )
