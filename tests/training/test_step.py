"""The training step: the same numbers wherever it runs, and what it does at which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.training.conftest import TINY_MODEL
from trainer import config as config_lib
from trainer.data.manifest import Manifest
from trainer.data.pipeline import ImageStream
from trainer.families.protocol import DataShape
from trainer.layers.ops import Backend
from trainer.objectives.phase import Phase
from trainer.training import build
from trainer.training.step import TrainStep

pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")

BATCH, GROUP = 8, 4

TINY: dict[str, dict[str, Any]] = {
    "run": {},
    "data": {"use_labels": True, "window": 8},
    "model": TINY_MODEL,
    "training": {"batch_size": BATCH, "ema_kimg": 0.05, "ema_rampup": 0.5},
    "objective": {"g_reg_interval": 2, "d_reg_interval": 3},
    # p moves by 0.1 at each adjustment.
    "augment": {"mode": "ada", "p": 0.3, "interval": 2, "adjust_kimg": 0.16},
}
PLAIN: dict[str, dict[str, Any]] = {
    "data": {"use_labels": False},
    "training": {"batch_size": 4},
    "augment": {"mode": "none", "p": 0.0},
}

Reports = list[dict[str, dict[str, np.ndarray]]]


class Run:
    """A run set up as the loop does it, on `replicas` mirrored logical CPUs (0: no strategy)."""

    def __init__(
        self,
        manifest: Manifest,
        *layers: dict[str, dict[str, Any]],
        base: dict[str, dict[str, Any]] = TINY,
        replicas: int = 0,
        jit: bool = False,
    ) -> None:
        settings: dict[str, dict[str, Any]] = {}
        for layer in (base, *layers):
            settings = {k: {**settings.get(k, {}), **layer.get(k, {})} for k in TINY}
        config = config_lib.from_dict(settings)
        self.config = config_lib.resolve(config, resolution=manifest.resolution)
        strategy = tf.distribute.get_strategy()
        if replicas:
            names = [f"CPU:{index}" for index in range(replicas)]
            strategy = tf.distribute.MirroredStrategy(names)
        arithmetic = config_lib.batch_arithmetic(self.config, max(replicas, 1))
        counts = manifest.condition_counts(self.config.data.use_labels)
        shape = DataShape(manifest.resolution, manifest.channels, counts)
        backend = Backend.XLA_CPU if jit else Backend.GENERIC
        recipe = build.recipe(self.config, shape, backend, static_shapes=jit)
        networks, self.objective, sampler = recipe
        with strategy.scope():
            self.state = build.state(self.config, recipe)
        self.traced = 0

        def counted(phase: Phase, group_index: tf.Tensor) -> Any:
            self.traced += 1
            return sampler(phase, group_index)

        self.step = TrainStep(
            self.config,
            arithmetic,
            strategy,
            self.state,
            networks,
            self.objective,
            counted,
            jit=jit,
        )
        self.stream = ImageStream(
            manifest,
            group_size=arithmetic.group_size,
            groups_per_batch=arithmetic.groups_per_step,
            seed=0,
            use_labels=self.config.data.use_labels,
            window=8,
        )

    def steps(self, count: int) -> Reports:
        """Makes steps and returns their reports."""
        reports = []
        for _ in range(count):
            report = self.step(*next(self.stream))
            reports.append(tf.nest.map_structure(lambda value: value.numpy(), report))
        return reports

    def values(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.state.variables().items()}


@pytest.fixture(scope="module", autouse=True)
def _no_graph_optimizer() -> Iterator[None]:
    """Rewriting graphs takes longer than the few steps made with them."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False, **before})


# ------------------------------------------------------------------------------ placement

STEPS = 4


class Outcome:
    """What a few steps of the whole thing gave: ADA, both regularisers, mixing, labels.

    In float64, where what differs by rounding alone differs so little that each tensor can be
    compared by itself.
    """

    def __init__(self, manifest: Manifest, *, replicas: int = 0, rounds: int = 1) -> None:
        settings = {"rounds": rounds, "batch_size": BATCH}
        run = Run(
            manifest,
            {"training": settings, "run": {"precision": "float64"}},
            replicas=replicas,
        )
        self.start = run.values()
        self.reports = run.steps(STEPS)
        self.values = run.values()
        self.config, self.names = run.config, run.objective.reports


@pytest.fixture(scope="module")
def in_one_piece(squares: Manifest) -> Outcome:
    """Made op by op."""
    tf.config.run_functions_eagerly(True)
    outcome = Outcome(squares)
    tf.config.run_functions_eagerly(False)
    return outcome


def distance(actual: Any, wanted: Any) -> float:
    """Relative L2."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(actual - wanted) / max(np.linalg.norm(wanted), 1e-12))


def assert_same(found: Outcome, wanted: Outcome) -> None:
    """Tensor by tensor: one norm of a table is that of its largest tensors."""
    assert found.values.keys() == wanted.values.keys()
    apart = {name: distance(found.values[name], value) for name, value in wanted.values.items()}
    assert not {name: value for name, value in apart.items() if value > 1e-9}
    for step, (report, expected) in enumerate(zip(found.reports, wanted.reports, strict=True)):
        for phase, stats in expected.items():
            for name, value in stats.items():
                np.testing.assert_allclose(
                    report[phase][name],
                    value,
                    rtol=1e-6,
                    atol=1e-6,
                    err_msg=f"{step} {phase} {name}",
                )


# No other test may train under a mirrored strategy in pytest's own process: TensorFlow remembers the
# shapes of collectives by numbers that each strategy counts anew. See placement.py for the rest.
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(("replicas", "rounds"), [(0, 2), (2, 1)])
def test_two_halves_are_the_whole(
    squares: Manifest, in_one_piece: Outcome, replicas: int, rounds: int
) -> None:
    assert_same(Outcome(squares, replicas=replicas, rounds=rounds), in_one_piece)


def test_all_variables_move(in_one_piece: Outcome) -> None:
    """So that the comparison above is one: nothing stands still but what should."""
    values = in_one_piece.values
    still = {n for n, v in values.items() if np.array_equal(v, in_one_piece.start[n])}
    # First moments are the last gradients, beta1 being 0, and R1 has none for these biases.
    moments = {f"D_opt/first/b4.{layer}.bias" for layer in ("conv", "fc", "out")}
    still = {name for name in still if "noise_const" not in name}
    still = {name for name in still if not name.startswith("loss_scale/")}  # of float16
    assert still <= moments | {"nonfinite", "augment/signs"}


def test_nothing_is_traced_again(squares: Manifest) -> None:
    run = Run(squares, PLAIN, {"objective": {"pl_weight": 0, "r1_gamma": 0}})
    run.steps(1)
    traced = run.traced
    assert traced > 0
    run.steps(2)
    assert run.traced == traced
    functions = [
        function
        for held in vars(run.step).values()
        for function in (held.values() if isinstance(held, dict) else [held])
        if hasattr(function, "experimental_get_tracing_count")
    ]
    assert len(functions) > 5
    assert {function.experimental_get_tracing_count() for function in functions} == {1}


# ------------------------------------------------------------------------------ several steps


def test_steps_in_a_row_are_the_same_steps(squares: Manifest) -> None:
    """With a regulariser that is due in some of them, and statistics that add up."""
    settings = {"objective": {"pl_weight": 0, "d_reg_interval": 2}}
    one, row = Run(squares, PLAIN, settings), Run(squares, PLAIN, settings)
    tf.config.run_functions_eagerly(True)
    reports = one.steps(3)
    tf.config.run_functions_eagerly(False)
    batches = [next(row.stream) for _ in range(3)]
    report = row.step(*(tf.concat(values, 0) for values in zip(*batches, strict=True)))
    assert [float(r["Dreg"]["gradients"]) > 0 for r in reports] == [True, False, True]
    tf.nest.map_structure(
        lambda value, wanted: np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-6),
        report,
        reports[-1],
    )
    values = row.values()
    for name, wanted in one.values().items():
        np.testing.assert_allclose(values[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_host_reads_no_variable_between_programs(
    squares: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for the device: what is due follows from the groups' numbers."""
    run = Run(squares, {"objective": {"g_reg_interval": 2, "d_reg_interval": 3}})
    strategy = run.step._strategy

    def as_a_program(function: Callable[..., Any], args: Any) -> Any:
        return tf.function(lambda *values: function(*values), autograph=False)(*args)

    monkeypatch.setattr(strategy, "run", as_a_program)
    specs = [tf.TensorSpec([3, 1, *value.shape], value.dtype) for value in next(run.stream)]
    first_step = tf.TensorSpec([], tf.int64)
    graph = run.step._steps.get_concrete_function(*specs, first_step).graph
    definition = graph.as_graph_def()
    functions = {f.signature.name: f for f in definition.library.function}
    programs = 0
    pending = [definition.node]
    while pending:
        for node in pending.pop():
            assert node.op not in ("ReadVariableOp", "AssignVariableOp"), node.name
            programs += node.op in ("PartitionedCall", "StatefulPartitionedCall")
            for branch in ("then_branch", "else_branch", "body", "cond"):
                if branch in node.attr:
                    pending.append(functions[node.attr[branch].func.name].node_def)
    assert programs == 5  # four phases, and the end of a step


# ------------------------------------------------------------------------------ reports


def test_reports_are_sums_over_the_batch(in_one_piece: Outcome) -> None:
    for index, report in enumerate(in_one_piece.reports):
        for phase, due, images in (
            ("Gmain", True, BATCH),
            ("Greg", index % 2 == 0, BATCH // 2),
            ("Dmain", True, BATCH),
            ("Dreg", index % 3 == 0, BATCH),
        ):
            for name, value in report[phase].items():
                if name == "gradients":
                    assert (value > 0) == due, (index, phase)
                    continue
                number, total, squares = value
                assert number == (images if due else 0), (index, phase, name)
                # Cauchy-Schwarz: of the right number, sum and sum of squares.
                assert total**2 <= number * squares * (1 + 1e-5), (index, phase, name)
                if "signs" in name and due:
                    assert squares == number
    total = {
        name: sum(
            values[name]
            for report in in_one_piece.reports
            for values in report.values()
            if name in values
        )
        for name in in_one_piece.names
    }
    for name, wanted in total.items():
        found = in_one_piece.values[f"stats/{name}"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_p_follows_the_signs_of_both_phases_of_d(in_one_piece: Outcome) -> None:
    config, p = in_one_piece.config.augment, 0.3
    signs = np.zeros(2)
    for index, report in enumerate(in_one_piece.reports):
        signs += report["Dmain"]["Loss/signs/real"][:2] + report["Dreg"]["Loss/signs/real"][:2]
        if (index + 1) % 2 == 0:
            p = max(p + 0.1 * np.sign(signs[1] / signs[0] - config.target), 0)
            signs[:] = 0
    np.testing.assert_allclose(in_one_piece.values["augment/p"], p, rtol=1e-5)
    np.testing.assert_array_equal(in_one_piece.values["augment/signs"], signs)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(("dreg_signs", "moved"), [(-40.0, -0.1), (40.0, 0.1)])
def test_signs_of_dreg_can_turn_p(squares: Manifest, dreg_signs: float, moved: float) -> None:
    """What was collected before this step, Dreg's included, outweighs the step's own signs."""
    run = Run(squares, {"training": {"batch_size": 4}, "augment": {"adjust_kimg": 0.08}})
    run.state.augment_signs.assign([40.0, dreg_signs])
    run.state.step.assign(1)
    run.steps(1)
    assert run.state.augment_p.numpy() == pytest.approx(0.3 + moved)
    assert run.state.augment_signs.numpy().tolist() == [0, 0]


@pytest.mark.usefixtures("eagerly")
def test_a_weight_of_zero_leaves_its_phase_out(squares: Manifest) -> None:
    run = Run(squares, PLAIN, {"objective": {"pl_weight": 0, "r1_gamma": 0}})
    report = run.steps(1)[0]
    assert report.keys() == {"Gmain", "Dmain"}
    assert run.state.g_count.numpy() == run.state.d_count.numpy() == 1
    assert not run.state.buffers


@pytest.mark.usefixtures("eagerly")
def test_regularisers_count_as_steps_of_adam(squares: Manifest) -> None:
    run = Run(squares, PLAIN)
    counts = []
    for _ in range(4):
        run.steps(1)
        counts.append((int(run.state.g_count), int(run.state.d_count)))
    assert counts == [(2, 2), (3, 3), (5, 4), (6, 6)]  # Greg at 0 and 2, Dreg at 0 and 3


# ------------------------------------------------------------------------------ averages, freezing


@pytest.mark.usefixtures("eagerly")
def test_the_moving_average_ramps_up(squares: Manifest) -> None:
    """beta = 0.5 ** (batch / half-life), the half-life growing with the images before the step."""
    run = Run(squares, PLAIN, {"training": {"ema_kimg": 0.01, "ema_rampup": 2.0}})
    name = "synthesis.b4.const"
    for seen, half_life in ((0, 0), (4, 8), (8, 10)):
        average = run.state.g_ema[name].numpy()
        run.steps(1)
        weight = run.state.g[name].numpy()
        beta = math.pow(0.5, 4 / half_life) if half_life else 0
        wanted = weight + beta * (average - weight)
        np.testing.assert_allclose(
            run.state.g_ema[name].numpy(), wanted, rtol=1e-5, err_msg=str(seen)
        )
        # Buffers are copied.
        w_avg = run.state.g["mapping.w_avg"].numpy()
        np.testing.assert_array_equal(run.state.g_ema["mapping.w_avg"].numpy(), w_avg)
        assert np.any(w_avg)


@pytest.mark.usefixtures("eagerly")
def test_frozen_layers_of_d_stay(squares: Manifest) -> None:
    run = Run(squares, PLAIN, {"training": {"freeze_d": 2}})
    before = {name: variable.numpy() for name, variable in run.state.d.items()}
    run.steps(1)
    still = {n for n, v in run.state.d.items() if np.array_equal(v.numpy(), before[n])}
    assert still == {
        f"b8.{layer}.{kind}" for layer in ("fromrgb", "conv0") for kind in ("weight", "bias")
    }
    assert not still & set(run.state.d_first)


# ------------------------------------------------------------------------------ non-finite values


@pytest.mark.usefixtures("eagerly")
def test_the_first_nonfinite_quantity_is_remembered(squares: Manifest) -> None:
    run = Run(squares, PLAIN)
    run.steps(1)
    assert run.state.nonfinite_message() is None
    weight = run.state.d["b4.out.bias"]
    weight.assign(np.full(weight.shape, np.nan))
    run.steps(1)
    assert run.state.nonfinite_message() == "Loss/G/loss of Gmain is not finite at step 1"
    # It stays, whatever comes later.
    run.steps(1)
    assert run.state.nonfinite_message() == "Loss/G/loss of Gmain is not finite at step 1"


@pytest.mark.usefixtures("eagerly")
def test_what_diverges_within_a_step_is_named(squares: Manifest) -> None:
    """G's update takes it to infinity, so path length sees it first."""
    run = Run(squares, PLAIN, {"training": {"g_lr": 1e30}})
    run.steps(1)
    message = run.state.nonfinite_message()
    assert message is not None
    assert message.endswith("at step 0")
    assert "Greg" in message


# ------------------------------------------------------------------------------ input, compilation


@pytest.mark.usefixtures("eagerly")
def test_bytes_become_minus_one_to_one(squares: Manifest) -> None:
    from_bytes, from_floats = Run(squares, PLAIN), Run(squares, PLAIN)
    images, labels, index = next(from_bytes.stream)
    assert images.dtype == tf.uint8
    assert images.shape == [1, GROUP, 8, 8, 3]
    wanted = from_floats.step(tf.cast(images, tf.float32) / 127.5 - 1, labels, index)
    found = from_bytes.step(images, labels, index)
    tf.nest.map_structure(np.testing.assert_array_equal, found, wanted)
    other = Run(squares, PLAIN).step(tf.cast(images, tf.float32) / 255, labels, index)
    assert np.any(other["Dmain"]["Loss/scores/real"] != wanted["Dmain"]["Loss/scores/real"])


@pytest.mark.slow
def test_compiled_or_not(squares: Manifest) -> None:
    exact = {"run": {"precision": "float64"}}
    plain, compiled = Run(squares, exact), Run(squares, exact, jit=True)
    plain.steps(2)
    compiled.steps(2)
    found = compiled.values()
    for name, wanted in plain.values().items():
        assert distance(found[name], wanted) < 1e-9, name
