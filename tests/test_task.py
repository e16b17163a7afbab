"""The training command: its flags, its exit codes, and one short run from images to a grid."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
run: {jit: "off"}
model: {z_dim: 8, w_dim: 8, mapping_layers: 1, channel_base: 64, channel_max: 8}
training: {batch_size: 8, total_kimg: 0.008}
objective: {pl_weight: 0}
augment: {mode: none}
telemetry: {tensorboard: false}
"""


def _runs(*command: str) -> bool:
    return (
        bool(shutil.which(command[0]))
        and subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode == 0
    )


# A user whom the machine doesn't know; where that can't be had, one whose home can't be written.
_WITHOUT_NAME = ("unshare", "--user", "--map-user=54321")
_WITHOUT_HOME: dict[str, str] = {}
if not _runs(*_WITHOUT_NAME):
    _WITHOUT_NAME, _WITHOUT_HOME = (), {"HOME": os.devnull}  # type: ignore[assignment]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with oneDNN, where TensorFlow has more to say while it is imported."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def failed(code: int, *arguments: str) -> str:
    """The one line on stderr of a command that ends with this code."""
    done = run("trainer.task", *arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Converted from a folder of PNGs."""
    source, dest = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("data") / "set"
    rng = np.random.default_rng(0)
    for number in range(32):
        pixels = rng.integers(0, 256, [8, 8, 3]).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    done = run(
        "trainer.convert", f"--source={source}", f"--dest={dest}", "--resolution=8", "--workers=1"
    )
    assert done.returncode == 0, done.stderr
    return str(dest)


def test_without_a_config() -> None:
    assert "--config and --workdir are needed" in failed(2)


def test_without_a_workdir(config: str) -> None:
    assert "error: --workdir is needed" in failed(2, f"--config={config}", "--data=x")


def test_a_wrong_key_that_may_change(config: str) -> None:
    flags = [f"--config={config}", "--data=x", "--workdir=unused"]
    message = failed(2, *flags, "--allow_change=training.g_lr,training.g_lrr")
    assert "--allow_change=training.g_lrr: unknown key; did you mean training.g_lr?" in message
    message = failed(2, *flags, "--allow_change=data.fingerprin")
    assert "did you mean data.fingerprint?" in message


def test_without_data(config: str) -> None:
    assert "give --data" in failed(2, f"--config={config}", "--workdir=unused")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batchsize=8", "did you mean training.batch_size?"),
        ("trainin.batch_size=8", "did you mean training.batch_size?"),
        ("training.batch_size=many", "training.batch_size = 'many' (str): expected a whole number"),
        ("training.g_lr=-1", "training.g_lr = -1"),
        ("run.strategy", "expected --set section.key=value"),
    ],
)
def test_a_wrong_override(config: str, override: str, expected: str) -> None:
    message = failed(2, f"--config={config}", "--data=x", "--workdir=unused", "--set", override)
    assert expected in message


def test_a_config_that_is_not_there() -> None:
    assert "missing.yaml" in failed(2, "--config=missing.yaml", "--data=x", "--workdir=unused")


def test_an_unknown_flag() -> None:
    assert "worksdir" in failed(2, "--worksdir=x")


def test_no_data_set(config: str, tmp_path: pathlib.Path) -> None:
    message = failed(3, f"--config={config}", f"--data={tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert f"python -m trainer convert --source=IMAGES --dest={tmp_path}" in message
    assert not (tmp_path / "run").exists()


def test_a_dry_run_needs_no_workdir(config: str, dataset: str) -> None:
    done = run("trainer.task", f"--config={config}", f"--data={dataset}", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "32 images 8x8x3" in done.stdout
    assert f"path: {dataset}" in done.stdout


_KEPT = "run: {compilation_cache: ~/.cache/kept}\n"


def test_a_preset_with_a_cache_starts_without_a_home(
    config: str, dataset: str, tmp_path: pathlib.Path
) -> None:
    """Neither there nor in a directory named `~` is anything left, by TensorFlow's Keras either."""
    preset, here = tmp_path / "kept.yaml", tmp_path / "here"
    preset.write_text(f"base: {config}\n{_KEPT}")
    here.mkdir()
    done = subprocess.run(
        [
            *(*_WITHOUT_NAME, sys.executable, "-m", "trainer.task", f"--config={preset}"),
            *(f"--data={dataset}", "--dry_run"),
        ],
        cwd=here,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]} | _WITHOUT_HOME,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (note,) = (line for line in done.stdout.splitlines() if "are not kept" in line)
    assert note.startswith("note      compiled programs are not kept: ")
    assert "~/.cache/kept" in note
    assert list(here.iterdir()) == []


def test_a_cache_that_is_asked_for_must_be_there(config: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    asked = f"--set=run.compilation_cache={tmp_path}/file/kept"
    message = failed(4, f"--config={config}", "--data=x", f"--workdir={tmp_path}/run", asked)
    assert message.startswith("error: run.compilation_cache = ")


def test_images_to_a_grid(config: str, dataset: str, tmp_path: pathlib.Path) -> None:
    """Converted, trained, and refused when the config has changed."""
    workdir = tmp_path / "run"
    flags = (f"--config={config}", f"--data={dataset}", f"--workdir={workdir}")
    done = run("trainer.task", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "finished: 0.008 kimg, 1 steps" in done.stdout
    assert {"config.yaml", "stats.jsonl", "reals.png", "fakes_init.png", "fakes000000.png"} <= {
        path.name for path in workdir.iterdir()
    }
    message = failed(2, *flags, "--set=objective.r1_gamma=1", "--set=training.beta2=0.9")
    assert "objective.r1_gamma: 10.0 -> 1.0, training.beta2: 0.99 -> 0.9" in message
    assert message.endswith("--allow_change=objective.r1_gamma,training.beta2")


@pytest.mark.slow
def test_ticks_on_a_terminal(config: str, dataset: str, tmp_path: pathlib.Path) -> None:
    """Short ones that fit, and whole ones with --verbose."""
    command = [sys.executable, "-m", "trainer.task", f"--config={config}", f"--data={dataset}"]
    starts = {"kimg 0.008": ["0.008"], "tick 1": ["0.016", "--verbose"]}
    for start, (total, *more) in starts.items():
        ours, theirs = pty.openpty()
        arguments = [f"--workdir={tmp_path}/run", f"--set=training.total_kimg={total}", *more]
        # Not the environment as it is: a library that an earlier test loaded may have added to it.
        environment = dict(os.environ)
        with subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stdout=theirs
        ) as process:
            os.close(theirs)
            lines = []
            with contextlib.suppress(OSError), open(ours) as terminal:  # it ends with EIO
                lines.extend(terminal)
        assert process.returncode == 0
        (tick,) = (line.rstrip() for line in lines if line.startswith(start))
        assert (len(tick) <= 120) == (not more)
