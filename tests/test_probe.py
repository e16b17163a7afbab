"""What the probes measure and print, and what they say to a wrong call."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from trainer import config as config_lib
from trainer import probe
from trainer.config import Config
from trainer.core.errors import ConfigError, UsageError
from trainer.families.protocol import DataShape
from trainer.objectives import objective as objectives
from trainer.objectives.phase import Objective
from trainer.probing import step as speed
from trainer.probing import tpu_compiler, tpu_estimate
from trainer.probing.data import Reading
from trainer.probing.step import Convolution, Row, Timing
from trainer.probing.tpu_cost import LargestBatch, Phase
from trainer.probing.tpu_estimate import Estimate
from trainer.training.run import Run

TINY = """
data: {path: "package:data/fluent_emoji_32"}
model: {z_dim: 8, w_dim: 8, mapping_layers: 1, channel_base: 64, channel_max: 8}
training: {batch_size: 8}
objective: {r1_gamma: 1}
augment: {mode: none}
"""
GREG, DREG = frozenset({"Greg"}), frozenset({"Dreg"})


@pytest.fixture(scope="session", autouse=True)
def _parsed() -> None:
    probe.define_flags()
    absl_flags.FLAGS(["probe"])


@pytest.fixture
def _restored() -> Iterator[None]:
    with flagsaver.flagsaver():
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def config(batch_size: int = 32, **objective: float) -> Config:
    training = {"batch_size": batch_size}
    return config_lib.from_dict({"training": training, "objective": {"r1_gamma": 1.0} | objective})


def objective(**keys: float) -> Objective:
    return objectives.objective(config(**keys).objective, 4)


# The schedule -------------------------------------------------------------------------------


def test_schedule_of_the_usual_intervals() -> None:
    assert speed.schedule(objective()) == {
        GREG | DREG: (0, 1 / 16),
        frozenset(): (1, 12 / 16),
        GREG: (4, 3 / 16),
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"pl_weight": 0}, {DREG: (0, 1 / 16), frozenset(): (1, 15 / 16)}),
        ({"pl_weight": 0, "r1_gamma": 0}, {frozenset(): (0, 1.0)}),
        ({"g_reg_interval": 1, "d_reg_interval": 2}, {DREG: (0, 0.5), frozenset(): (1, 0.5)}),
    ],
)
def test_schedule_without_a_regulariser(
    keys: dict[str, float], expected: dict[frozenset[str], tuple[int, float]]
) -> None:
    assert speed.schedule(objective(**keys)) == expected


@pytest.mark.parametrize(
    ("g_interval", "d_interval", "names"),
    [
        (4, 16, ["rest", "Greg", "Dreg"]),
        (2, 3, ["rest", "Greg", "Dreg"]),
        (4, 4, ["rest", "Dreg + Greg"]),
        (1, 4, ["rest", "Dreg"]),
        (1, 1, ["rest"]),
    ],
)
def test_parts_give_back_the_seconds_they_were_made_of(
    g_interval: int, d_interval: int, names: list[str]
) -> None:
    """With known costs of each phase, every row and their weighted sum are known, too."""
    costs = {"Greg": 3.0, "Dreg": 5.0}
    plan = speed.schedule(objective(g_reg_interval=g_interval, d_reg_interval=d_interval))
    totals = {due: 10.0 + sum(costs[name] for name in due) for due in plan}
    steps = {due: Timing(total, total / 2) for due, total in totals.items()}
    rows = speed.parts(plan, steps, Timing(8.0, 4.0))
    assert [row.name for row in rows] == names
    for row in rows:
        expected = sum({"rest": 2.0, **costs}[name] for name in row.name.split(" + "))
        assert row.seconds.median == pytest.approx(expected)
        assert row.seconds.fastest == pytest.approx(expected / 2)
    average = sum(share * totals[due] for due, (_, share) in plan.items())
    assert 8 + sum(row.share * row.seconds.median for row in rows) == pytest.approx(average)


def test_timings() -> None:
    timing = Timing.of([4.0, 1.0, 2.0])
    assert timing == Timing(2.0, 1.0)
    assert timing.rate(8.0) == Timing(4.0, 8.0)


def test_speed_of_a_convolution_counts_the_result_and_both_gradients() -> None:
    convolution = Convolution((2, 4, 8, 128), "XLA", Timing(2e-3, 1e-3))
    flop = 3 * 2 * (2 * 4 * 8) * (3 * 3 * 128 * 128)
    assert convolution.gflops.median == pytest.approx(flop / 2e-3 / 1e9)
    assert convolution.gflops.fastest == pytest.approx(flop / 1e-3 / 1e9)


# The probes ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("_restored")
@pytest.mark.slow
def test_step_prints_a_table_that_adds_up(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    absl_flags.FLAGS.config, absl_flags.FLAGS.resolution = tiny, "16x8"
    absl_flags.FLAGS.set = ["run.jit=off", "training.rounds=2"]
    absl_flags.FLAGS.steps, absl_flags.FLAGS.channels = 2, 1
    probe.main(["probe", "step"])
    out = capsys.readouterr().out
    assert "8 images 16x8x1 = 1 replicas x 2 rounds x 4" in out
    rows = re.findall(r"^(\w+) +(-?[\d.]+) +(-?[\d.]+) +(all|1 in \d+) +(-?[\d.]+)$", out, re.M)
    assert [(row[0], row[3]) for row in rows] == [
        ("Gmain", "all"),
        ("Dmain", "all"),
        ("rest", "all"),
        ("Greg", "1 in 4"),
        ("Dreg", "1 in 16"),
    ]
    total = re.search(r"^s/kimg +([\d.]+) \(fastest ([\d.]+)\)$", out, re.M)
    assert total
    assert sum(float(row[4]) for row in rows) == pytest.approx(float(total[1]), abs=0.05)
    assert 0 < float(total[2]) <= float(total[1])
    assert re.search(r"^share +\d+% of the bare convolution", out, re.M)
    assert re.search(r"^convolution +[\d.]+ GFLOP/s .* 4 x 16x8, by (XLA|TensorFlow)$", out, re.M)


def test_the_share_is_of_operations_per_second() -> None:
    """A step of 10 GFLOP per image at 0.5 s/image runs at 20 GFLOP/s."""

    run = Run.create(config(batch_size=8), DataShape((8, 8), 3, ()))
    gflop = run.cost().gflop_per_image
    convolution = Convolution((1, 8, 8, 128), "XLA", Timing(1e-3, 1e-3))
    per_kimg = Timing(2 * 1000 * gflop / convolution.gflops.median, 1.0)
    measured = speed.StepSpeed(1.0, [], per_kimg, 0.5, None, convolution)
    lines = dict(probe.verdict_lines(run, measured))
    assert lines["share"].startswith("50% of the bare convolution")
    assert lines["peak memory"] == "0.50 GiB of the process"


def test_the_table_weighs_rows_by_how_often_they_are_due() -> None:
    text = probe.phase_table([Row("Greg", Timing(0.8, 0.4), 0.25)], batch=8)
    assert text.splitlines()[-1].split() == ["Greg", "0.8000", "0.4000", "1", "in", "4", "25.00"]


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("need", "verdict"), [(1e6, "the step never waits"), (1e-6, "the step waits for its data")]
)
def test_data_sets_the_pipeline_against_the_step(
    tiny: str, capsys: pytest.CaptureFixture[str], need: float, verdict: str
) -> None:
    absl_flags.FLAGS.config, absl_flags.FLAGS.seconds = tiny, 0.3
    absl_flags.FLAGS.step_sec_per_kimg = need
    probe.main(["probe", "data"])
    out = capsys.readouterr().out
    cells = r"( +[\d,.]+ MB/s [\d,]+/s)"
    assert re.search(rf"^[\d.]+ MB {cells}{{4}}$", out, re.M)
    assert re.search(rf"^needed {cells}$", out, re.M)
    last = out.splitlines()[-1]
    assert last.endswith(verdict)
    numbers = re.search(r"needs ([\d,.]+) images/s, the pipeline gives ([\d,]+): (\S+) times", last)
    assert numbers
    assert float(numbers[1].replace(",", "")) == pytest.approx(1000 / need, abs=0.05)


def test_reading_is_shown_by_size_and_number() -> None:
    readings = [
        Reading(readers, size * 1e6, readers * size * 1e6, readers * size * 100.0)
        for size in (1.0, 4.0)
        for readers in (1, 4)
    ]
    assert probe.reading_table(readings, 50.0, 2.5e6).splitlines() == [
        "reading                  1 at a time           4 at a time",
        "1.00 MB               1.0 MB/s 100/s        4.0 MB/s 400/s",
        "4.00 MB               4.0 MB/s 400/s     16.0 MB/s 1,600/s",
        "needed                 2.5 MB/s 50/s",
    ]


@pytest.mark.usefixtures("_restored")
def test_checkpoint_leaves_nothing_behind(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    absl_flags.FLAGS.config, absl_flags.FLAGS.workdir = tiny, str(tmp_path / "run")
    absl_flags.FLAGS.steps, absl_flags.FLAGS.step_sec_per_kimg = 2, 20.0
    probe.main(["probe", "checkpoint"])
    out = capsys.readouterr().out
    assert re.search(r"^checkpoint +[\d.]+ MB, \d+ variables$", out, re.M)
    assert re.search(r"^save +the loop .* of a tick of 80\.0 s, [\d.e-]+ steps$", out, re.M)
    background = r"^background +committed .* MB/s; the next save comes after 80\.0 s$"
    assert re.search(background, out, re.M)
    assert re.search(r"^restore +[\d.]+ s .* MB/s$", out, re.M)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_the_stall_is_a_share_of_a_tick() -> None:
    """A tick of 4 kimg at 100 images/s is 40 s; a step of 8 images 80 ms."""
    from trainer.probing.checkpoint import CheckpointSpeed

    run = Run.create(config(batch_size=8), DataShape((8, 8), 3, ()))
    found = CheckpointSpeed(5, 400_000_000, Timing(2.0, 1.0), Timing(38.0, 30.0), Timing(4.0, 2.0))
    lines = dict(probe.checkpoint_lines(run, found, 100.0, "given"))
    assert lines["checkpoint"] == "400.0 MB, 5 variables"
    assert "5.000% of a tick of 40.0 s, 25 steps" in lines["save"]
    assert "38.00 s later (fastest 30.00), 10 MB/s" in lines["background"]
    assert "after 40.0 s and waits" in lines["background"]
    assert lines["restore"] == "4.00 s (fastest 2.00), 100 MB/s"


def compiled(seconds: float, hbm: float, missing: dict[str, int]) -> Estimate:
    return Estimate(2e12, int(hbm * 2**30), seconds, seconds / 2, seconds / 4, missing, [])


@pytest.mark.usefixtures("_restored")
def test_tpu_prints_a_table_that_adds_up(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that always says the same: 20 ms raw, and a GiB for each image."""
    chip = tpu_compiler.CHIPS["v5e"]
    slice_ = tpu_compiler.Topology("v5e:2x2", chip, (None,) * 4)
    monkeypatch.setattr(tpu_compiler, "topology", lambda name: slice_)
    monkeypatch.setattr(tpu_compiler, "lower", lambda _, specs: specs[0].shape if specs else None)
    monkeypatch.setattr(tpu_compiler, "compile_hlo", lambda shape, topology, replicas: shape)
    monkeypatch.setattr(
        tpu_estimate,
        "estimate",
        lambda shape, topology: compiled(
            0.02, shape[0] * 4 if len(shape) > 1 else 0, {"gather": 3}
        ),
    )
    absl_flags.FLAGS.config, absl_flags.FLAGS.resolution = tiny, "16x8"
    absl_flags.FLAGS.replicas, absl_flags.FLAGS.batch = 2, 8
    probe.main(["probe", "tpu"])
    out = capsys.readouterr().out
    assert "16 images 16x8x3 = 2 replicas x 1 rounds x 8" in out
    row = r"^(\w+) +\d+ s +2000\.0 +(\S+ of 16) +20\.00 +10\.00 +25% +(all|1 in \d+)$"
    assert re.findall(row, out, re.M) == [
        ("Gmain", "8.00 of 16", "all"),
        ("Greg", "8.00 of 16", "1 in 4"),
        ("Dmain", "8.00 of 16", "all"),
        ("Dreg", "8.00 of 16", "1 in 16"),
        ("finish", "0.00 of 16", "all"),
    ]
    assert out.count(": 3 gather") == 5
    speed_line = re.search(r"^s/kimg +([\d.]+) raw, ([\d.]+) adjusted, of 2 replicas", out, re.M)
    assert speed_line
    assert float(speed_line[1]) == pytest.approx(0.02 * (3 + 1 / 4 + 1 / 16) * 1000 / 16, abs=1e-3)
    assert "at most 16 images per replica (Gmain, by a line through 8 and 4 images)" in out


def test_a_phase_that_does_not_compile_has_its_error_in_the_table() -> None:
    line = probe.tpu_line(Phase("Dreg", 1 / 16, 3.0, None, "Ran out of memory"), 1 << 34)
    assert line.split() == ["Dreg", "no", "Ran", "out", "of", "memory"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (LargestBatch(28, "Greg", 8), "at most 28 images per replica (Greg, by a line through 4 "),
        (LargestBatch(0, "Greg", 8), "not a single group of images (Greg, by a line through 4 and"),
        (LargestBatch(4, "Greg", 8, "no"), "at least 4 images per replica (Greg doesn't compile f"),
        (LargestBatch(0, "Greg", 8, "no"), "fewer than 4 images per replica (Greg doesn't compile"),
    ],
)
def test_what_fits(found: LargestBatch, text: str) -> None:
    assert probe.fits_text(found, 4).startswith(text)


# Wrong calls --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (["stpe"], {}, UsageError, "'stpe' is no probe; did you mean step?"),
        ([], {}, UsageError, "give one of step, data, checkpoint, tpu"),
        (["step"], {"config": None}, UsageError, "--config is needed"),
        (["step"], {"set": ["data.path="]}, UsageError, "--resolution to do without"),
        (["data"], {"set": ["data.path="]}, UsageError, "give --data"),
        (["checkpoint"], {}, UsageError, "give --workdir"),
        (["tpu"], {"topology": "v9:2x2"}, ConfigError, "--topology=v9:2x2 names no TPU"),
        (["step"], {"resolution": "64x"}, UsageError, "--resolution=64x is neither"),
        (
            ["step"],
            {"resolution": "8", "set": ["data.use_labels=true"]},
            ConfigError,
            "--num_classes",
        ),
        (
            ["step"],
            {"resolution": "8", "set": ["training.batch_size=6"]},
            ConfigError,
            "training.batch_size = 6",
        ),
    ],
)
def test_wrong_calls(
    tiny: str,
    arguments: list[str],
    settings: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    for name, value in ({"config": tiny} | settings).items():
        setattr(absl_flags.FLAGS, name, value)
    with pytest.raises(error, match=re.escape(message)):
        probe.main(["probe", *arguments])


def test_ends_in_one_line_and_the_exit_code_of_usage_errors() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.probe", "memory", "--config=x.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'memory' is no probe; give one of step, data, checkpoint, tpu\n"
