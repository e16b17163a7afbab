"""Training in each precision: what float64 proves, and how 16 bits stay near 32 and finite."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.training.conftest import TINY_MODEL
from trainer import config as config_lib
from trainer.core.errors import ConfigError, DivergedError
from trainer.data.manifest import Manifest
from trainer.data.pipeline import ImageStream
from trainer.distribution import precision as precision_lib
from trainer.distribution.precision import full_dtype
from trainer.families.protocol import DataShape
from trainer.layers.ops import Backend
from trainer.objectives.phase import Phase
from trainer.training import build, loop, loss_scale
from trainer.training.checkpoint import Checkpoints
from trainer.training.state import TrainState
from trainer.training.step import TrainStep

pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")

GROUP = 4


class Run:
    """A run as the loop sets it up, without its check of what devices can do."""

    def __init__(
        self,
        manifest: Manifest,
        precision: str,
        *,
        batch: int = GROUP,
        rounds: int = 1,
        jit: bool = False,
        backend: Backend = Backend.GENERIC,
        all_reduce: Any = None,
        num_fp16_res: int | str = 4,
        objective: dict[str, Any] | None = None,
        augment: dict[str, Any] | None = None,
    ) -> None:
        config = config_lib.from_dict(
            {
                "run": {"precision": precision},
                "data": {"use_labels": True, "window": 8},
                "model": {**TINY_MODEL, "num_fp16_res": num_fp16_res},
                "training": {"batch_size": batch, "rounds": rounds},
                "objective": objective or {},
                "augment": augment or {"mode": "none"},
            }
        )
        self.config = config = config_lib.resolve(config, resolution=manifest.resolution)
        shape = DataShape(manifest.resolution, 3, tuple(manifest.label_counts))
        recipe = build.recipe(config, shape, backend, static_shapes=jit)
        self.networks, recipe_objective, self.sampler = recipe
        self.state = TrainState(
            *recipe[:2], seed=0, augment_p=config.augment.p, dtype=full_dtype(precision)
        )
        self.phases: dict[str, Phase] = {phase.name: phase for phase in recipe_objective.phases}
        self.step = TrainStep(
            config,
            config_lib.batch_arithmetic(config, 1),
            tf.distribute.get_strategy(),
            self.state,
            *recipe,
            jit=jit,
            all_reduce=all_reduce,
        )
        self.stream = ImageStream(
            manifest,
            group_size=GROUP,
            groups_per_batch=batch // GROUP,
            seed=0,
            use_labels=True,
            window=8,
        )

    def steps(self, count: int) -> list[dict[str, dict[str, np.ndarray]]]:
        """Makes steps and returns their reports."""
        reports = []
        for _ in range(count):
            report = self.step(*next(self.stream))
            reports.append(tf.nest.map_structure(lambda value: value.numpy(), report))
        return reports

    def scale(self, scales: dict[str, float]) -> None:
        """Sets the loss scales of phases."""
        for phase, value in scales.items():
            self.state.loss_scale[phase].assign(value)

    def scales(self) -> dict[str, float]:
        return {phase: float(value) for phase, value in self.state.loss_scale.items()}

    def counts(self) -> dict[str, list[int]]:
        return {phase: v.numpy().tolist() for phase, v in self.state.loss_scale_counts.items()}

    def values(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.state.variables().items()}


def changed(run: Run, before: dict[str, np.ndarray]) -> set[str]:
    """The variables that are not what they were."""
    return {n for n, v in run.values().items() if not np.array_equal(v, before[n])}


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2; of what is nearly nothing, in thousandths."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-3))


def below(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


# ------------------------------------------------------------------------------ float64


def test_random_numbers_are_those_of_float32(squares: Manifest) -> None:
    augment = {"mode": "ada", "p": 0.5, "interval": 1, "pipe": "bgcfnc"}
    run, other = (
        Run(squares, precision, batch=2 * GROUP, augment=augment)
        for precision in ("float64", "float32")
    )
    exact, plain = run.sampler, other.sampler
    index = tf.range(2, dtype=tf.int64)
    for phase in run.phases.values():
        draws = exact(phase, index)
        tf.nest.map_structure(np.testing.assert_array_equal, draws, plain(phase, index))
        assert not any(draw.dtype == tf.float32 for draw in tf.nest.flatten(draws))


# ------------------------------------------------------------------------------ float16


@pytest.mark.usefixtures("eagerly")
def test_an_overflow_skips_its_phase_and_halves_its_scale(squares: Manifest) -> None:
    run = Run(squares, "float16", augment={"mode": "ada", "p": 0.5, "interval": 1, "pipe": "b"})
    scales = {"Gmain": 2.0**7, "Greg": 2.0**24, "Dmain": 2.0**24, "Dreg": 2.0**7}
    run.scale(scales)
    before = run.values()
    report = run.steps(1)[0]
    moved = changed(run, before)

    # Greg and Dmain overflow. What G and D still learn is from Gmain and Dreg.
    assert run.scales() == {**scales, "Greg": 2.0**23, "Dmain": 2.0**23}
    fine, bad = [1, 0, 0], [0, 1, 1]
    assert run.counts() == {"Gmain": fine, "Greg": bad, "Dmain": bad, "Dreg": fine}
    assert (run.state.g_count.numpy(), run.state.d_count.numpy()) == (1, 1)
    assert not below(moved, "objective/")
    assert below(moved, "G/")
    assert below(moved, "D/")
    for phase in scales:
        reported = any(np.any(value) for value in report[phase].values())
        assert reported == (phase in ("Gmain", "Dreg")), phase
    assert run.state.nonfinite_message() is None
    assert all(np.all(np.isfinite(value)) for value in run.values().values())


@pytest.mark.usefixtures("eagerly")
def test_without_any_signs_p_stays(squares: Manifest) -> None:
    """All that ADA steers by was skipped."""
    run = Run(
        squares,
        "float16",
        objective={"pl_weight": 0, "r1_gamma": 0},
        augment={"mode": "ada", "p": 0.5, "interval": 1, "pipe": "b"},
    )
    run.scale(dict.fromkeys(run.phases, 2.0**24))
    before = run.values()
    run.steps(1)
    moved = changed(run, before)
    assert not below(moved, "G/", "D/", "G_opt/", "D_opt/", "augment/")
    assert run.state.augment_p.numpy() == np.float32(0.5)


@pytest.mark.usefixtures("eagerly")
def test_too_many_in_a_row_are_named(squares: Manifest, tmp_path: pathlib.Path) -> None:
    run = Run(squares, "float16", objective={"pl_weight": 0, "r1_gamma": 0})
    weight = run.state.d["b8.conv0.weight"]
    weight.assign(np.full(weight.shape, np.nan))
    run.state.loss_scale_counts["Gmain"].assign([0, 0, loss_scale.MAX_SKIPPED - 1])
    run.steps(1)
    in_a_row = {name: counts[loss_scale.IN_A_ROW] for name, counts in run.counts().items()}
    assert in_a_row == {"Gmain": 25, "Dmain": 1}
    assert run.state.nonfinite_message() == (
        "gradients of Gmain were not finite in float16 25 times in a row, at last at step 0"
    )
    # Reports start over with the next tick, the count does not.
    loop._take_loss_scales(run.state)
    config = config_lib.from_dict({})
    checkpoints = Checkpoints(str(tmp_path), config.checkpoint, {})
    with pytest.raises(DivergedError, match=r"25 times in a row.*run.precision=float32"):
        loop._check_finite(run.state, config, checkpoints, str(tmp_path), variables=False)


@pytest.mark.usefixtures("eagerly")
def test_a_scale_that_fits_changes_no_number(squares: Manifest) -> None:
    """Scales are powers of two, so only what is lost at float16's lower end can differ."""
    outcomes = []
    for scale in (2.0**4, 2.0**6):
        run = Run(squares, "float16", objective={"g_reg_interval": 1, "d_reg_interval": 1})
        run.scale(dict.fromkeys(run.phases, scale))
        run.steps(1)
        assert not any(counts[loss_scale.SKIPPED] for counts in run.counts().values())
        outcomes.append(run.values())
    for table in ("G_opt/second/", "D_opt/second/"):
        a, b = (
            np.concatenate([v.ravel() for n, v in o.items() if n.startswith(table)])
            for o in outcomes
        )
        assert np.linalg.norm(a - b) / np.linalg.norm(a) < 2e-2


@pytest.mark.usefixtures("eagerly")
def test_what_overflows_on_another_replica_counts(squares: Manifest) -> None:
    """It is decided by the sum over replicas: all of them take an update, or none does."""
    calls = []

    def all_reduce(values: list[tf.Tensor]) -> list[tf.Tensor]:
        calls.append(len(values))
        return [value + np.inf for value in values] if len(calls) == 1 else values

    run = Run(squares, "float16", objective={"pl_weight": 0, "r1_gamma": 0}, all_reduce=all_reduce)
    run.scale(dict.fromkeys(run.phases, 2.0**4))
    before = run.values()
    run.steps(1)
    moved = changed(run, before)
    assert below(moved, "G/", "G_opt/", "G_ema/") <= {"G/mapping.w_avg", "G_ema/mapping.w_avg"}
    assert below(moved, "D/")
    assert run.scales() == {"Gmain": 2.0**3, "Dmain": 2.0**4}


# ------------------------------------------------------------------------------ second derivatives


def regularised(manifest: Manifest, precision: str, backend: Backend) -> dict[str, np.ndarray]:
    """The gradients of path length and R1 in all parameters, each network's as one vector."""
    run = Run(manifest, precision, backend=backend)
    # What starts at zero or one is moved, so that nothing is trivially right.
    rng = np.random.default_rng(5)
    g, d = (
        {n: tf.constant(v.numpy() + 0.1 * rng.standard_normal(v.shape), tf.float32) for n, v in t}
        for t in (run.state.g.items(), run.state.d.items())
    )
    index = tf.constant([0], tf.int64)
    images = tf.constant(rng.uniform(-1, 1, [GROUP, 8, 8, 3]), tf.float32)
    c = tf.one_hot([0, 1, 2, 0], 3)
    jit = backend is Backend.XLA_CPU
    inputs: dict[str, Any] = {
        "g": g,
        "d": d,
        "p": tf.constant(0.0),
        "reals": images,
        "c": c,
        "buffers": {"pl_mean": tf.constant(0.0)},
        "numbers": {"r1_gamma": 10.0, "pl_weight": 2.0},
        "mean": None,
        "scale": None,
    }

    def gradients(name: str) -> np.ndarray:
        phase = run.phases[name]
        function = functools.partial(phase.gradients, run.networks, GROUP // phase.shrink)
        compiled = tf.function(function, jit_compile=jit, autograph=False)
        grads, *_ = compiled({**inputs, "draws": run.sampler(phase, index)})
        return np.concatenate([grads[key].numpy().ravel() for key in sorted(grads)])

    return {name: gradients(name) for name in ("Greg", "Dreg")}


@pytest.mark.usefixtures("eagerly")
def test_regularisers_in_bfloat16(squares: Manifest) -> None:
    exact = regularised(squares, "float32", Backend.GENERIC)
    found = regularised(squares, "bfloat16", Backend.GENERIC)
    for name, wanted in exact.items():
        assert 1e-4 < distance(found[name], wanted) < 0.1, name


@pytest.mark.slow
def test_regularisers_in_bfloat16_under_xla(squares: Manifest) -> None:
    exact = regularised(squares, "float32", Backend.GENERIC)
    found = regularised(squares, "bfloat16", Backend.XLA_CPU)
    for name, wanted in exact.items():
        assert 1e-4 < distance(found[name], wanted) < 0.1, name


# ------------------------------------------------------------------------------ in the loop


def test_float16_on_a_cpu_is_refused(squares: Manifest, tmp_path: Any) -> None:
    config = config_lib.from_dict(
        {
            "run": {"precision": "float16"},
            "data": {"path": squares.directory},
            "model": TINY_MODEL,
            "training": {"batch_size": GROUP},
        }
    )
    with pytest.raises(ConfigError, match="run.precision = 'float16'"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("eagerly")
def test_skipped_updates_are_shown(
    squares: Manifest,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision_lib, "prepare", lambda precision, platform: None)
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**24)
    config = config_lib.from_dict(
        {
            "run": {"precision": "float16", "jit": "off"},
            "data": {"path": squares.directory, "window": 8},
            "model": TINY_MODEL,
            "training": {"batch_size": GROUP, "total_kimg": 0.008},
            "objective": {"pl_weight": 0, "r1_gamma": 0},
            "augment": {"mode": "none"},
            "telemetry": {"tick_kimg": 0.004, "tensorboard": False},
        }
    )
    loop.train(config, str(tmp_path))
    line = "float16: updates skipped as not finite: Gmain 1 (loss scale now "
    assert capsys.readouterr().out.count(line) == 2  # one in each tick
    ticks = [json.loads(text) for text in (tmp_path / "stats.jsonl").read_text().splitlines()]
    for tick, scale in zip(ticks, (2.0**23, 2.0**22), strict=True):
        assert tick["Precision/skipped/Gmain"]["mean"] == 1
        assert tick["Precision/loss_scale/Gmain"]["mean"] == scale
        assert "Precision/skipped/Dreg" not in tick  # its weight is 0


# ------------------------------------------------------------------------------ 100 steps

# Largest allowed mean difference of the losses of 100 steps from those in float32, relative to
# their mean.
_CLOSE = {"bfloat16": 0.02, "float16": 0.02, "float64": 0.01}


def losses_of(run: Run, steps: int) -> np.ndarray:
    """[steps, 2]: the mean losses of G and D."""
    rows = [
        [
            report[phase][name]
            for phase, name in (("Gmain", "Loss/G/loss"), ("Dmain", "Loss/D/loss"))
        ]
        for report in run.steps(steps)
    ]
    values = np.asarray(rows, np.float64)
    return values[..., 1] / np.maximum(values[..., 0], 1)


@pytest.fixture(scope="module")
def float32_losses(squares: Manifest) -> np.ndarray:
    return losses_of(Run(squares, "float32"), 100)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("precision", "num_fp16_res"),
    [("bfloat16", 4), ("bfloat16", "all"), ("float16", 4), ("float64", 4)],
)
def test_losses_of_100_steps_track_float32(
    squares: Manifest, float32_losses: np.ndarray, precision: str, num_fp16_res: int | str
) -> None:
    run = Run(squares, precision, num_fp16_res=num_fp16_res)
    found = losses_of(run, 100)
    shown = found[:, 0] > 0  # a skipped phase reports nothing
    shown &= found[:, 1] > 0
    assert np.mean(shown) > 0.95
    difference = np.abs(found - float32_losses)[shown].mean(0) / float32_losses.mean(0)
    print(f"{precision} {num_fp16_res}: mean relative difference of G, D loss {difference}")
    assert run.state.nonfinite_message() is None
    assert np.all(np.isfinite(found))
    assert np.all(difference < _CLOSE[precision])
