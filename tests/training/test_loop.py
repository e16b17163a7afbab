"""A run from start to end: what it writes, how it goes on, and when it refuses to."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import yaml
from PIL import Image

from tests.training.conftest import TINY_MODEL
from trainer import config as config_lib
from trainer.config import Config
from trainer.core import lease
from trainer.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    PreemptedError,
    StorageError,
)
from trainer.core.fencing import Record
from trainer.core.lease import Owner
from trainer.data.manifest import Manifest
from trainer.families import registry
from trainer.families.protocol import DataShape
from trainer.serving import saved_model
from trainer.telemetry.descriptions import describe
from trainer.training import checkpoint, loop, run
from trainer.training.preemption import Preemption
from trainer.training.step import Reports, TrainStep

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")

STEPS = 7
TINY: dict[str, dict[str, Any]] = {
    "run": {"jit": "off"},
    "data": {"window": 8},
    "model": TINY_MODEL,
    "training": {"batch_size": 8, "total_kimg": 0.056},
    "objective": {"g_reg_interval": 2, "d_reg_interval": 3},
    "augment": {"mode": "ada", "pipe": "b", "p": 0.3, "interval": 2, "adjust_kimg": 0.16},
    "checkpoint": {"every_steps": 2, "keep_last": 2},
    "telemetry": {"tick_kimg": 0.016, "snap_ticks": 2, "tensorboard": False},
}


def make(manifest: Manifest, **sections: dict[str, Any]) -> Config:
    settings = {name: {**keys, **sections.get(name, {})} for name, keys in TINY.items()}
    settings["data"] = {"path": manifest.directory, **settings["data"]}
    return config_lib.from_dict(settings)


def stats(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "stats.jsonl").read_text().splitlines()]


def parameters(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All variables of the newest checkpoint."""
    found = checkpoint.find(str(workdir))
    reader = tf.train.load_checkpoint(found.prefix)
    names = [name for name in reader.get_variable_to_shape_map() if name.endswith("_VALUE")]
    return {name: reader.get_tensor(name) for name in names}


def events(workdir: pathlib.Path) -> list[tuple[str, int, bytes]]:
    """Name, step and value of all that TensorBoard shows, but for times and resources."""
    found = []
    for path in (workdir / "tensorboard").iterdir():
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            found += [
                (v.tag, event.step, v.tensor.SerializeToString()) for v in event.summary.value
            ]
    assert {"Loss/G/loss", "Reals", "Fakes", "Config"} <= {tag for tag, *_ in found}
    return sorted(each for each in found if not each[0].startswith(("Timing/", "Resources/")))


def files(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------ killed runs

# Trains, and sends itself a signal at the n-th write to a path that is so. The run goes on when
# the thread that watches for signals has seen it, which on a busy machine may be steps later. Op by
# op: for seven steps, tracing would take longest.
PROGRAM = """
import os, re, signal, sys, time
import tensorflow as tf
from trainer import config
from trainer.core import errors, storage
from trainer.training import loop, preemption

path, workdir, pattern, count, number = sys.argv[1:]
left = int(count)

def deadly(write):
    def wrapped(path, *args):
        global left
        if pattern and re.search(pattern, getattr(path, "_path", path)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), int(number))
                while stop.begin(0) is None:
                    time.sleep(0.01)
        write(path, *args)
    return wrapped

storage.write_text_atomic = deadly(storage.write_text_atomic)
storage.AppendedFile.add = deadly(storage.AppendedFile.add)
tf.config.run_functions_eagerly(True)
loaded = config.load(path)
try:
    with preemption.Preemption(loaded.run) as stop:
        loop.train(loaded, workdir, stop=stop)
except errors.PreemptedError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def train_in_a_process(
    config: Config,
    workdir: pathlib.Path,
    pattern: str = "",
    count: int = 1,
    number: int = signal.SIGKILL,
) -> str:
    """Trains, to the end or until its signal ends it, and returns what it printed."""
    path = workdir.with_suffix(".yaml")
    path.write_text(config_lib.to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(workdir), pattern, str(count), str(number)],
        cwd=ROOT,
        env={**os.environ, "NO_GCE_CHECK": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    codes = {signal.SIGKILL: -9, signal.SIGTERM: 75}
    assert done.returncode == (codes[signal.Signals(number)] if pattern else 0), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(
    squares: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, str]:
    """A finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    return workdir, train_in_a_process(deterministic(squares), workdir)


def deterministic(manifest: Manifest) -> Config:
    return make(
        manifest,
        run={"jit": "off", "deterministic": True},
        data={"use_labels": True, "window": 8},
        telemetry={**TINY["telemetry"], "tensorboard": True},
    )


def test_the_size_of_images_is_width_x_height(squares: Manifest) -> None:
    manifest = dataclasses.replace(squares, resolution=(8, 16))
    config = config_lib.from_dict({"model": TINY_MODEL, "training": {"batch_size": 8}})
    made = run.Run.create(config, DataShape(manifest.resolution, manifest.channels, ()))
    assert "64 images 16x8x3, 3 classes" in loop._description(made, manifest)[0]


def test_what_a_run_writes(undisturbed: tuple[pathlib.Path, str], squares: Manifest) -> None:
    workdir, printed = undisturbed
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "fakes000000.png",  # named by whole thousands of images
        "fakes_init.png",
        "reals.png",
        "stats.jsonl",
        "tensorboard",
    }
    written = config_lib.load(str(workdir / "config.yaml"))
    assert written == config_lib.resolve(deterministic(squares), resolution=(8, 8))
    assert (workdir / "config.yaml").read_text().startswith("# trainer ")
    sizes = {Image.open(path).size for path in workdir.glob("*.png")}
    assert len(sizes) == 1  # the same tiles
    init, last = (np.array(Image.open(workdir / f"fakes{n}.png")) for n in ("_init", "000000"))
    assert np.any(init != last)
    assert checkpoint.find(str(workdir)).step == STEPS
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [
        "step-000000006",
        "step-000000007",
    ]
    assert "64 images 8x8x3, 3 classes" in printed
    assert f"finished: 0.056 kimg, {STEPS} steps" in printed


def test_ticks(undisturbed: tuple[pathlib.Path, str]) -> None:
    """One after the first step, then every two, and one at the end."""
    lines = stats(undisturbed[0])
    assert [line["nimg"] for line in lines] == [8, 24, 40, 56]
    assert [line["tick"] for line in lines] == [0, 1, 2, 3]
    for line, images, path_lengths in zip(lines, (8, 16, 16, 16), (4, 4, 4, 4), strict=True):
        assert line["Progress/kimg"]["mean"] == line["nimg"] / 1000
        assert line["Loss/G/loss"]["num"] == line["Loss/D/loss"]["num"] == images
        assert line["Loss/pl_penalty"]["num"] == path_lengths
        assert abs(line["Loss/signs/real"]["mean"]) <= 1
    # R1 runs at steps 0, 3 and 6.
    assert ["Loss/r1_penalty" in line for line in lines] == [True, False, True, True]
    # Grids are made every two ticks, and at the end.
    assert ["Progress/variety" in line for line in lines] == [False, False, True, True]
    assert lines[3]["Progress/variety"]["mean"] > 0


def test_events(undisturbed: tuple[pathlib.Path, str]) -> None:
    """The config is there once, ticks have steps of their own, and every scalar is described."""
    shown = events(undisturbed[0])
    (config,) = (value for tag, _, value in shown if tag == "Config")
    assert (undisturbed[0] / "config.yaml").read_bytes() in config
    assert [step for tag, step, _ in shown if tag == "Progress/tick"] == [8, 24, 40, 56]
    names = {tag for tag, *_ in shown} - {"Config", "Reals", "Fakes"}
    assert not [name for name in names if not describe(name)]


@pytest.fixture(scope="module")
def killed(
    squares: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[str]]:
    """A run stopped at the worst moments, and what each start printed."""
    workdir = tmp_path_factory.mktemp("runs") / "killed"
    config = deterministic(squares)
    printed = [
        # The tick of step 3 is written, its checkpoint isn't whole.
        train_in_a_process(config, workdir, "step-000000004/COMMITTED-"),
        train_in_a_process(config, workdir, "stats.jsonl", number=signal.SIGTERM),
        train_in_a_process(config, workdir, "stats.jsonl"),
        train_in_a_process(config, workdir),
    ]
    return workdir, printed


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    undisturbed: tuple[pathlib.Path, str], killed: tuple[pathlib.Path, list[str]]
) -> None:
    """Bit for bit, and no tick is written twice or missing."""
    workdir, printed = killed
    assert "resuming" not in printed[0]
    # Nothing but the marker of step 4 was missing.
    assert "step-000000004: it was never completed" in printed[1]
    assert "step-000000002: step 2, kimg 0.016" in printed[1]
    # Told to stop at the tick of step 3, it saved that step and nothing after it.
    assert printed[1].splitlines()[-1] == (
        f"SIGTERM: step 3 (kimg 0.024) is saved in {workdir}; run the same command again to go on"
    )
    assert "step-000000003: step 3, kimg 0.024" in printed[2]
    # Killed before the tick of step 5 was written, after the checkpoint of step 4.
    assert "step-000000004: step 4, kimg 0.032" in printed[3]
    wanted, found = parameters(undisturbed[0]), parameters(workdir)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name

    def measured(workdir: pathlib.Path) -> list[dict[str, Any]]:
        names = ("tick", "nimg", "Progress/kimg", "Progress/augment", "Progress/variety")
        return [
            {k: v for k, v in line.items() if k.startswith("Loss/") or k in names}
            for line in stats(workdir)
        ]

    assert measured(workdir) == measured(undisturbed[0])
    assert events(workdir) == events(undisturbed[0])
    for path in undisturbed[0].glob("*.png"):
        assert (workdir / path.name).read_bytes() == path.read_bytes(), path.name


# ------------------------------------------------------------------------------ in this process


@pytest.fixture
def finished(undisturbed: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(undisturbed[0], tmp_path / "run"))


def labelled(manifest: Manifest, **sections: dict[str, Any]) -> Config:
    return make(manifest, **{"data": {"use_labels": True, "window": 8}, **sections})


def longer(manifest: Manifest, **sections: dict[str, Any]) -> Config:
    """A step more than the finished run has made."""
    return labelled(manifest, training={**TINY["training"], "total_kimg": 0.064}, **sections)


@pytest.mark.parametrize("total_kimg", [0.056, 0.02])
def test_started_again_when_finished(
    finished: pathlib.Path,
    squares: Manifest,
    capsys: pytest.CaptureFixture[str],
    total_kimg: float,
) -> None:
    """Or past what is asked for now: nothing changes, be it another config's."""
    before = files(finished)
    config = labelled(
        squares,
        run={"jit": "off", "deterministic": False},
        training={**TINY["training"], "total_kimg": total_kimg},
        telemetry={**TINY["telemetry"], "tensorboard": True},
    )
    loop.train(config, str(finished))
    assert files(finished) == before
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "nothing to do" in x]
    assert "is at 0.056 kimg already (" in line and "step-000000007)" in line
    assert f"training.total_kimg is {total_kimg:g};" in line


@pytest.mark.parametrize("allowed", [(), ("objective.r1_gamma",)])
def test_a_changed_config_is_refused(
    finished: pathlib.Path, squares: Manifest, allowed: Sequence[str]
) -> None:
    before = files(finished)
    config = labelled(squares, objective={"r1_gamma": 5.0, "pl_weight": 1.0})
    with pytest.raises(ConfigError) as caught:
        loop.train(config, str(finished), allow_change=allowed)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert ("objective.r1_gamma: 10.0 -> 5.0" in message) == (not allowed)
    assert "objective.pl_weight: 2.0 -> 1.0" in message
    keys = "objective.pl_weight" if allowed else "objective.r1_gamma,objective.pl_weight"
    assert message.endswith(f"--allow_change={keys}")
    assert files(finished) == before


@pytest.mark.usefixtures("eagerly")
def test_an_allowed_change_goes_on(
    finished: pathlib.Path, squares: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """A phase that is gone leaves its values behind, and the console says so."""
    config = longer(squares, objective={"r1_gamma": 5.0, "pl_weight": 0})
    allowed = ["objective.r1_gamma", "objective.pl_weight"]
    loop.train(config, str(finished), allow_change=allowed)
    printed = capsys.readouterr().out
    assert "resuming from" in printed
    assert "is of another config; left behind: loss_scale/counts/Greg" in printed
    assert yaml.safe_load((finished / "config.yaml").read_text())["objective"]["r1_gamma"] == 5.0


def test_a_checkpoint_of_another_family_is_refused(
    finished: pathlib.Path, squares: Manifest, tmp_path: pathlib.Path
) -> None:
    before = files(finished)
    other = next(name for name in registry.NAMES if name != registry.DEFAULT)
    message = rf"is of networks of the family {registry.DEFAULT}, and model\.family is {other}; "
    sections: dict[str, Any] = {
        "run": {"jit": "off"},
        "data": {"path": squares.directory},
        "model": {"family": other, "channel_max": 8, "channel_base": 64},
        "objective": {"pl_weight": 0},
        "augment": {"mode": "none"},
    }
    with pytest.raises(ConfigError, match=message + "use another workdir"):
        loop.train(config_lib.from_dict(sections), str(finished))
    assert files(finished) == before
    sections["training"] = {"batch_size": 8, "init_from": str(finished)}
    with pytest.raises(ConfigError, match=message + "training.init_from takes a run"):
        loop.train(config_lib.from_dict(sections), str(tmp_path / "new"))


def test_other_networks_are_refused_even_if_allowed(
    finished: pathlib.Path, squares: Manifest
) -> None:
    before = files(finished)
    config = longer(squares, model={**TINY["model"], "channel_max": 4})
    with pytest.raises(CheckpointError, match="G/.*is \\[.*more") as caught:
        loop.train(config, str(finished), allow_change=["model.channel_max"])
    assert caught.value.exit_code == 4
    assert files(finished) == before


@pytest.mark.usefixtures("eagerly")
def test_another_data_set_is_refused(
    finished: pathlib.Path,
    other_squares: Manifest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Before what only follows from other images, such as the weight of R1 at their resolution.
    with pytest.raises(DataError, match="fingerprint differs.*--allow_change=data.fingerprint"):
        loop.train(longer(other_squares, objective={"r1_gamma": 3}), str(finished))
    with pytest.raises(DataError, match="fingerprint differs.*--allow_change=data.fingerprint"):
        loop.train(labelled(other_squares), str(finished))
    loop.train(longer(other_squares), str(finished), allow_change=["data.fingerprint"])
    assert "resuming from" in capsys.readouterr().out


def test_a_step_that_reads_more_than_there_is(tmp_path: pathlib.Path, squares: Manifest) -> None:
    config = labelled(squares, training={"batch_size": 32}, objective={"d_steps": 3})
    with pytest.raises(ConfigError, match=r"3 batches of 32 .*d_steps = 3.* the data set has 64"):
        loop.train(config, str(tmp_path / "run"), dry_run=True)
    config = labelled(squares, training={"batch_size": 32}, objective={"d_steps": 2})
    loop.train(config, str(tmp_path / "run"), dry_run=True)


def test_a_dry_run_starts_nothing(
    tmp_path: pathlib.Path, squares: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    config = labelled(
        squares, training={"batch_size": 16, "rounds": 2}, objective={"r1_gamma": "auto"}
    )
    loop.train(config, str(tmp_path / "run"), dry_run=True)
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert "16 images = 1 replicas x 2 rounds x 8 (2 groups of 4)" in out
    assert "parameters" in out
    assert "MiB of variables" in out
    assert "time      0.056 kimg take about 0 s to 0 s, by estimate: " in out
    (tmp_path / "printed.yaml").write_text(out[out.index("run:\n") :])
    printed = config_lib.load(str(tmp_path / "printed.yaml"))
    assert printed == config_lib.resolve(config, resolution=(8, 8))


@pytest.mark.parametrize(
    ("precision", "jit", "told"),
    [("bfloat16", "off", True), ("bfloat16", "on", False), ("float32", "off", False)],
)
def test_what_is_slow_is_told(
    precision: str,
    jit: str,
    told: bool,
    tmp_path: pathlib.Path,
    squares: Manifest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = labelled(squares, run={"precision": precision, "jit": jit})
    loop.train(config, str(tmp_path), dry_run=True)
    assert ("note      without XLA, bfloat16" in capsys.readouterr().out) == told


def test_labels_wanted_but_absent(unlabelled: Manifest, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="data.use_labels is on, but .* has no labels"):
        loop.train(labelled(unlabelled), str(tmp_path / "run"))


def test_a_batch_that_does_not_divide(squares: Manifest, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="set it to 8 or 16"):
        loop.train(make(squares, training={"batch_size": 12, "rounds": 2}), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be(squares: Manifest, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        loop.train(make(squares), str(tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("eagerly")
def test_a_diverged_run_keeps_its_last_good_checkpoint(
    finished: pathlib.Path, squares: Manifest
) -> None:
    """Resumed with a rate that explodes: the step and the quantity are named."""
    training = {**TINY["training"], "g_lr": 1e30, "total_kimg": 1}
    with pytest.raises(DivergedError) as caught:
        loop.train(
            labelled(squares, training=training), str(finished), allow_change=["training.g_lr"]
        )
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert "is not finite at step 7" in message
    assert "the last good checkpoint is" in message
    assert "step-000000007" in message
    assert "run the same command with --set=training.g_lr=5e+29 --set=training.d_lr=" in message
    assert "--allow_change=training.g_lr,training.d_lr" in message
    assert checkpoint.find(str(finished)).step == STEPS


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("stopped", [False, True])
def test_a_state_that_is_not_finite_is_never_saved(
    finished: pathlib.Path,
    squares: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    """Not even if losses and gradients were: an update can overflow, too."""

    def step_and_overflow(self: TrainStep, *batch: tf.Tensor) -> Reports:
        reports = original(self, *batch)
        # As if in this step, which ends as all others; there is no other one to notice it.
        self._state.g_second["mapping.fc0.weight"].assign_add(
            tf.fill(self._state.g_second["mapping.fc0.weight"].shape, np.inf)
        )
        return reports

    original = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", step_and_overflow)
    every = 100 if stopped else 8
    config = labelled(
        squares,
        training={**TINY["training"], "total_kimg": 1},
        checkpoint={"every_steps": every, "keep_last": 2},
    )
    with pytest.raises(DivergedError) as caught:
        loop.train(config, str(finished), stop=StopsAt(8) if stopped else None)
    message = str(caught.value)
    assert "G_opt/second/mapping.fc0.weight is not finite after step 8; the last good" in message
    assert checkpoint.find(str(finished)).step == STEPS
    assert not (finished / "checkpoints" / "step-000000008").exists()


class StopsAt(Preemption):
    """Stops a run before it makes more steps than this."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def meet(self) -> None:
        """There is nobody to meet."""

    def listen(self) -> None:
        """There is nothing to listen to."""

    def begin(self, steps: int) -> str | None:
        return "enough" if steps > self._steps else None


@pytest.mark.usefixtures("eagerly")
def test_a_run_that_is_to_stop_at_once_saves_nothing_new(
    finished: pathlib.Path, squares: Manifest
) -> None:
    config = labelled(squares, training={**TINY["training"], "total_kimg": 1})
    before = files(finished)
    with pytest.raises(PreemptedError, match=r"^enough: step 7 \(kimg 0.056\) is saved in"):
        loop.train(config, str(finished), stop=StopsAt(STEPS))
    changed = {name for name, content in files(finished).items() if before.get(name) != content}
    assert changed <= {"config.yaml"}


@pytest.mark.usefixtures("eagerly")
def test_a_second_job_on_the_same_workdir_is_refused(
    finished: pathlib.Path, squares: Manifest
) -> None:
    before = files(finished)
    with lease.acquire(str(finished)), pytest.raises(StorageError, match="is in use by process"):
        loop.train(labelled(squares), str(finished))
    assert files(finished) == before


@pytest.mark.usefixtures("eagerly")
def test_a_run_starts_from_the_networks_of_another(
    finished: pathlib.Path, squares: Manifest, tmp_path: pathlib.Path
) -> None:
    """With moments and counters of its own."""
    training = {
        **TINY["training"],
        "init_from": str(finished),
        "g_lr": 1e-30,
        "d_lr": 1e-30,
        "total_kimg": 0.008,
    }
    loop.train(labelled(squares, training=training), str(tmp_path / "new"))
    old, new = parameters(finished), parameters(tmp_path / "new")
    for name, value in new.items():
        if name.startswith(("G.S", "D.S")) and "w_avg" not in name:
            np.testing.assert_array_equal(value, old[name], err_msg=name)
    assert checkpoint.find(str(tmp_path / "new")).step == 1
    misfit = labelled(squares, training=training, model={**TINY["model"], "channel_max": 4})
    with pytest.raises(ConfigError, match="has no fitting .* in all"):
        loop.train(misfit, str(tmp_path / "misfit"))


# ------------------------------------------------------------------------------ all damaged


DAMAGES = {
    "a byte too many": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "garbage": lambda p: p.write_bytes(b"\0" * 100),
    "a thousand deep": lambda p: p.write_bytes(b"[" * 100_000),
    "gone": pathlib.Path.unlink,
}


def damage(workdir: pathlib.Path, kind: str, pattern: str) -> None:
    paths = list(workdir.glob(f"checkpoints/*/{pattern}"))
    assert len(paths) == 2
    for path in paths:
        DAMAGES[kind](path)


def with_strangers(workdir: pathlib.Path) -> None:
    for name in (
        "notes.txt",
        "checkpoints/step-000000007/mine",
        "tensorboard/events.out.tfevents.1",
    ):
        (workdir / name).write_text("theirs")
    with (workdir / "stats.jsonl").open("a") as file:
        file.write("# my remark\n")


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("pattern", ["state-*.json", "COMMITTED-*", "state-*.data*"])
def test_a_run_whose_checkpoints_are_all_damaged_stops(
    finished: pathlib.Path, squares: Manifest, kind: str, pattern: str
) -> None:
    with_strangers(finished)
    damage(finished, kind, pattern)
    before = files(finished)
    with pytest.raises(CheckpointError) as caught:
        loop.train(labelled(squares), str(finished))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "step-000000006" in message and "step-000000007" in message and "\n" not in message
    for way in ("from a backup", "another --workdir", "--start_over"):
        assert way in message
    assert files(finished) == before


@pytest.mark.usefixtures("eagerly")
def test_lost_markers_of_a_killed_job_can_be_restored(
    finished: pathlib.Path, squares: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last save may have been cut off; the one before that had been completed."""
    markers = {path: path.read_bytes() for path in finished.glob("checkpoints/*/COMMITTED-*")}
    token = next(iter(markers)).name.removeprefix("COMMITTED-")
    killed = dataclasses.replace(Owner.this_process(), token=token, pid=2**22 + 1)
    (finished / "lease.json").write_bytes(lease._document(killed, 1, Record()))
    for path in markers:
        path.unlink()
    before = files(finished)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"is whole, but some were: .*step-000000006;"):
            loop.train(labelled(squares), str(finished))
        assert {**files(finished), "lease.json": before["lease.json"]} == before
    for path, content in markers.items():
        path.write_bytes(content)
    loop.train(labelled(squares), str(finished))
    assert "step-000000007), and" in capsys.readouterr().out


@pytest.mark.usefixtures("eagerly")
def test_starting_over_moves_everything_aside(
    finished: pathlib.Path, squares: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    with_strangers(finished)
    damage(finished, "a byte too many", "state-*.json")
    before = files(finished)
    config = labelled(squares, telemetry={**TINY["telemetry"], "tensorboard": True})
    loop.train(config, str(finished), start_over=True)
    assert "starting over: what the run had written is in" in capsys.readouterr().out
    (moved,) = finished.glob("before-*")
    kept = {"notes.txt", "tensorboard/events.out.tfevents.1"}
    for name, content in before.items():
        if name in kept:
            assert (finished / name).read_bytes() == content
        elif name.startswith("tensorboard/"):
            there = finished / "tensorboard" / moved.name / name.removeprefix("tensorboard/")
            assert there.read_bytes() == content
        else:
            assert (moved / name).read_bytes() == content, name
    assert len(stats(finished)) == 4
    after = files(finished)
    # The same command again, as after exit code 75, doesn't start over once more.
    loop.train(config, str(finished), start_over=True)
    assert "nothing to do" in capsys.readouterr().out
    assert files(finished) == after


@pytest.mark.usefixtures("eagerly")
def test_of_a_damaged_one_nothing_is_lost(finished: pathlib.Path, squares: Manifest) -> None:
    """The run goes on from the one before, and past it; what strangers have put there stays."""
    with_strangers(finished)
    (broken,) = finished.glob("checkpoints/step-000000007/state-*.json")
    broken.write_bytes(broken.read_bytes() + b" ")
    before = files(finished)
    training = {**TINY["training"], "total_kimg": 0.08}
    for _ in range(2):
        loop.train(labelled(squares, training=training), str(finished))
        after = files(finished)
        damaged = {n for n in before if "step-000000007/" in n}
        assert all(after[name] == before[name] for name in damaged | {"notes.txt"})
        assert checkpoint.find(str(finished)).step == 10
        text = (finished / "stats.jsonl").read_text()
        assert [json.loads(line)["tick"] for line in text.splitlines() if line[0] == "{"] == [
            *range(6)
        ]
        assert "# my remark\n" in text


# ------------------------------------------------------------------------------ export


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is exported, by steps; a version is only as much as tells that it is there."""
    calls: list[dict[str, Any]] = []

    def publish(
        params: dict[str, np.ndarray], info: dict[str, Any], dest: str, **_: Any
    ) -> saved_model.Exported:
        calls.append({"step": info["step"], "params": params})
        folder = pathlib.Path(dest) / str(len(calls))
        folder.mkdir(parents=True)
        made_from = {key: info[key] for key in ("step", "config_fingerprint")}
        (folder / "model_card.json").write_text(json.dumps({"training": made_from}))
        (folder / "saved_model.pb").touch()
        return saved_model.Exported(str(folder), len(calls), {})

    monkeypatch.setattr(saved_model, "publish", publish)
    return calls


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("snapshots", [False, True])
def test_a_run_exports_its_generator_once(
    squares: Manifest, tmp_path: pathlib.Path, published: list[dict[str, Any]], snapshots: bool
) -> None:
    config = make(squares)
    exporter = saved_model.exporter(str(tmp_path / "models"), snapshots=snapshots)
    for _ in range(2):  # the second start finds it all done
        loop.train(config, str(tmp_path / "run"), at_snapshot=[exporter])
        # Snapshots are at every second tick, and at the end.
        assert [call["step"] for call in published] == ([5, STEPS] if snapshots else [STEPS])
    found = checkpoint.find(str(tmp_path / "run"))
    stored = checkpoint.read_parameters(found, "G_ema")
    assert stored.keys() == published[-1]["params"].keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(published[-1]["params"][name], value)


def test_a_finished_run_is_exported_when_that_is_asked_for_later(
    finished: pathlib.Path,
    squares: Manifest,
    tmp_path: pathlib.Path,
    published: list[dict[str, Any]],
) -> None:
    before = files(finished)
    exporter = saved_model.exporter(str(tmp_path / "models"), snapshots=False)
    for _ in range(2):
        loop.train(labelled(squares), str(finished), at_snapshot=[exporter])
        assert [call["step"] for call in published] == [STEPS]
    stored = checkpoint.read_parameters(checkpoint.find(str(finished)), "G_ema")
    assert published[0]["params"].keys() == stored.keys()
    assert files(finished) == before


@pytest.mark.usefixtures("eagerly")
def test_a_run_that_goes_on_exports_anew(
    squares: Manifest, tmp_path: pathlib.Path, published: list[dict[str, Any]]
) -> None:
    exporter = saved_model.exporter(str(tmp_path / "models"), snapshots=False)
    loop.train(make(squares), str(tmp_path / "run"), at_snapshot=[exporter])
    longer = {**TINY["training"], "total_kimg": 0.064}
    config = make(squares, training=longer)
    loop.train(config, str(tmp_path / "run"), at_snapshot=[exporter])
    assert [call["step"] for call in published] == [STEPS, STEPS + 1]
