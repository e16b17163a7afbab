"""What a healthy command writes to stderr: nothing, on processors of either kind."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

from tests.distribution.test_workers import start
from tests.training.conftest import write
from tests.training.placement import environments
from trainer.core import tensorflow_log

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
run: {jit: "off"}
model: {z_dim: 8, w_dim: 8, mapping_layers: 1, channel_base: 64, channel_max: 8}
training: {batch_size: 8, total_kimg: 0.008}
objective: {pl_weight: 0, r1_gamma: 0}
augment: {mode: none}
telemetry: {tensorboard: false}
"""

# A worker process of a conversion that imports TensorFlow, as a decoder may.
WORKER = """
import multiprocessing, os, sys
from concurrent import futures
sys.path.insert(0, os.getcwd())
from trainer.data import encoding

def version():
    import tensorflow
    return tensorflow.__version__

if __name__ == "__main__":
    from trainer.distribution import host
    host.quieten_tensorflow()
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, spawn, encoding._start_worker, (".", None)) as pool:
        print(pool.submit(version).result())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A config and a data set."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "config.yaml").write_text(CONFIG)
    return {
        "config": str(folder / "config.yaml"),
        "data": write(folder / "squares").directory,
        "cache": str(folder / "cache"),
        "run": str(folder / "run"),
    }


def stderr(command: list[str], onednn: str | None = "1") -> str:
    """What a command that succeeds writes to stderr."""
    unset = ("TF_ENABLE_ONEDNN_OPTS", "TF_CPP_MIN_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    if onednn is not None:
        environment["TF_ENABLE_ONEDNN_OPTS"] = onednn
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


# The training command is watched in test_task.
LIGHT = {
    "train": ["-m", "trainer.task", "--config={config}", "--data={data}", "--dry_run"],
    "generate": ["-m", "trainer", "generate", "--help"],
    "export": ["-m", "trainer.export", "--help"],
    "data": [
        *("-m", "trainer.probe", "data", "--config={config}", "--data={data}", "--seconds=0.1"),
        "--step_sec_per_kimg=1",
    ],
}
HEAVY = {
    "cached": [
        *("-m", "trainer.task", "--config={config}", "--data={data}", "--workdir={run}"),
        *("--set=run.compilation_cache={cache}", "--jit=on"),
    ],
    "step": ["-m", "trainer.probe", "step", "--config={config}", "--data={data}", "--steps=1"],
    "checkpoint": [
        *("-m", "trainer.probe", "checkpoint", "--config={config}", "--data={data}"),
        *("--workdir={run}-probe", "--steps=1", "--step_sec_per_kimg=1"),
    ],
}
STARTS = [
    pytest.param(
        name, onednn, marks=() if (name, onednn) == ("generate", "1") else pytest.mark.slow
    )
    for name, onednn in [*itertools.product(LIGHT, ("1", "0")), ("data", None)]
    if (name, onednn) != ("train", "1")
]


@pytest.mark.parametrize(("name", "onednn"), STARTS)
def test_a_command_starts_in_silence(files: dict[str, str], name: str, onednn: str | None) -> None:
    assert stderr([part.format(**files) for part in LIGHT[name]], onednn) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_a_command_works_in_silence(files: dict[str, str], name: str) -> None:
    assert stderr([part.format(**files) for part in HEAVY[name]]) == ""


@pytest.mark.slow
def test_the_tpu_compiler_starts_in_silence(files: dict[str, str]) -> None:
    pytest.importorskip("libtpu")
    command = ["-m", "trainer.probe", "tpu", "--config={config}", "--data={data}", "--batch=8"]
    assert stderr([part.format(**files) for part in command]) == ""


def test_converting_processes_start_in_silence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "convert.py").write_text(WORKER)
    assert stderr([str(tmp_path / "convert.py")]) == ""


@pytest.mark.slow
def test_workers_start_in_silence(files: dict[str, str], tmp_path: pathlib.Path) -> None:
    """What TensorFlow reports of a worker that a busy machine held up is not of the start."""
    flags = [f"--config={files['config']}", f"--data={files['data']}", f"--workdir={tmp_path}/run"]
    onednn = {"TF_ENABLE_ONEDNN_OPTS": "1"}
    workers = [start(flags, environment | onednn) for environment in environments(2)]
    errors = [worker.communicate(timeout=600)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    lines = [line for error in errors for line in error.encode().splitlines()]
    assert not [line for line in lines if tensorflow_log.harmless(line)]
