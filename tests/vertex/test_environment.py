"""What a training process takes from Vertex AI's environment, and that flags win."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from trainer.vertex import environment

ROOT = pathlib.Path(__file__).parents[2]
AIP = {
    "AIP_CHECKPOINT_DIR": "gs://bucket/runs/a/checkpoints/",
    "AIP_MODEL_DIR": "gs://bucket/runs/a/model/",
    "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/runs/a/logs/",
}


@pytest.fixture
def vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AIP.items():
        monkeypatch.setenv(name, value)


def test_defaults(vertex: None) -> None:
    assert str(environment.workdir(None)) == "gs://bucket/runs/a (AIP_CHECKPOINT_DIR)"
    assert str(environment.model_dir("")) == "gs://bucket/runs/a/model (AIP_MODEL_DIR)"
    events = environment.tensorboard_dir("")
    assert str(events) == "gs://bucket/runs/a/logs (AIP_TENSORBOARD_LOG_DIR)"


def test_flags_win(vertex: None) -> None:
    assert str(environment.workdir("runs/b")) == "runs/b (--workdir)"
    assert str(environment.model_dir("out")) == "out (checkpoint.export_dir)"
    assert environment.tensorboard_dir("events").path == "events"


def test_outside_of_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*AIP, "CLOUD_ML_JOB_ID", "CLOUD_ML_PROJECT_ID", "TRAINER_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.workdir(None).path == ""
    assert environment.model_dir("").path == ""
    assert environment.job() == ""


def test_a_checkpoint_directory_of_another_name_is_the_workdir(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://bucket/elsewhere/")
    assert environment.workdir(None).path == "gs://bucket/elsewhere"


def test_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "12")
    monkeypatch.setenv("CLOUD_ML_PROJECT_ID", "pay")
    monkeypatch.setenv("TRAINER_IMAGE", "repo/gpu@sha256:0")
    assert environment.job() == "job 12, project pay, image repo/gpu@sha256:0"


# ------------------------------------------------------------------------------------ the trainer


def task(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Until it needs its data set, which isn't there: before TensorFlow is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AIP_", "CLOUD_ML_"))}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "trainer.task",
            "--config=configs/smoke.yaml",
            "--set=run.strategy=multi_worker",  # and no workers: it ends there
            *arguments,
        ],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_console_says_where_each_path_came_from() -> None:
    done = task(AIP_CHECKPOINT_DIR="gs://bucket/runs/a/checkpoints/", CLOUD_ML_JOB_ID="12")
    assert done.stdout.splitlines() == [
        "paths     config configs/smoke.yaml (--config), data package:data/fluent_emoji_32 "
        "(data.path), workdir gs://bucket/runs/a (AIP_CHECKPOINT_DIR)",
        "vertex    job 12",
    ]
    assert "multi_worker" in done.stderr


def test_the_consoles_word_on_flags() -> None:
    done = task("--workdir=runs/b", "--data=elsewhere", **AIP)
    (line,) = done.stdout.splitlines()
    assert "data elsewhere (--data), workdir runs/b (--workdir)" in line


def test_without_a_workdir_from_anywhere() -> None:
    done = task()
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: --workdir is needed" in done.stderr


def test_vertex_variables_name_the_workers() -> None:
    """CLUSTER_SPEC in Vertex AI's own form, with what it adds to TF_CONFIG's."""
    spec = (
        '{"cluster": {"workerpool0": ["host-0:2222"], "workerpool1": ["host-1:2222"]}, '
        '"environment": "cloud", "task": {"type": "workerpool3", "index": 0, "trial": ""}}'
    )
    done = task("--workdir=runs/b", CLUSTER_SPEC=spec)
    assert done.returncode == 0, done.stderr
    assert "nothing to do: this task is an evaluator" in done.stdout
