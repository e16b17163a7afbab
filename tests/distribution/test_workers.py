"""The training command among other workers: what it refuses, and what it does when one dies."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.training.conftest import write
from tests.training.placement import CONFIG, environments

ROOT = pathlib.Path(__file__).parents[2]
ADDRESSES = ["localhost:1", "localhost:2"]
RESTART = 75


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A config, and a data set of four shards."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(CONFIG)
    data = write(folder / "squares").directory
    return [f"--config={folder / 'config.yaml'}", f"--data={data}", "--set=training.batch_size=16"]


def start(flags: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TF_CONFIG", "CLUSTER_SPEC")}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.task", *flags],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def has_ticked(workdir: pathlib.Path) -> bool:
    """Whether a run has written statistics; the file itself begins empty."""
    stats = workdir / "stats.jsonl"
    return stats.exists() and stats.stat().st_size > 0


def tf_config(task: Any, workers: Any = ADDRESSES, **jobs: Any) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": workers, **jobs}, "task": task})}


def failed(flags: list[str], environment: dict[str, str], code: int) -> str:
    """The one line that a command which ends with this code prints."""
    process = start(flags, environment)
    _, err = process.communicate(timeout=600)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == code, err
    assert len(lines) == 1, err
    return lines[0]


# ------------------------------------------------------------------------------ before it starts


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TF_CONFIG": "{'cluster'"}, "TF_CONFIG is not JSON"),
        ({"CLUSTER_SPEC": ""}, "CLUSTER_SPEC is not JSON"),
        (tf_config({"type": "worker", "index": 2}), "an index from 0 to 1"),
        (tf_config({"type": "ps", "index": 0}, ps=["localhost:3"]), "parameter servers"),
    ],
)
def test_a_wrong_environment(
    flags: list[str], environment: dict[str, str], message: str, tmp_path: pathlib.Path
) -> None:
    error = failed([*flags, f"--workdir={tmp_path / 'run'}"], environment, 2)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_strategy_needs_its_environment(flags: list[str]) -> None:
    more = ["--workdir=unused", "--strategy=multi_worker"]
    assert "needs TF_CONFIG or CLUSTER_SPEC" in failed([*flags, *more], {}, 2)
    environment = tf_config({"type": "worker", "index": 0})
    more = ["--workdir=unused", "--strategy=mirrored"]
    assert "TF_CONFIG names 2 workers" in failed([*flags, *more], environment, 2)


def test_an_evaluator_ends_well(flags: list[str]) -> None:
    process = start([*flags, "--workdir=unused"], tf_config({"type": "evaluator", "index": 0}))
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    last = out.splitlines()[-1]
    assert last == "nothing to do: this task is an evaluator, which takes no part in training"


def test_unreachable_workers(flags: list[str]) -> None:
    (chief, _) = environments(2)
    more = ["--workdir=unused", "--set=run.join_timeout=1"]
    error = failed([*flags, *more], {"TF_CONFIG": chief["TF_CONFIG"]}, RESTART)
    assert "missing after 1 s: worker:1 (localhost:" in error


def test_a_port_that_is_taken(flags: list[str]) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"localhost:{other.getsockname()[1]}"
        environment = tf_config({"type": "worker", "index": 0}, [address, "localhost:2"])
        assert "Address already in use" in failed([*flags, "--workdir=unused"], environment, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set=run.cpu_replicas=3"], "does not divide into 1 rounds x 3 replicas"),
        (["--strategy=cpu", "--precision=float16"], "use float32 or bfloat16 on this CPU"),
        (["--strategy=tpu"], "no TPU 'local' here"),
    ],
)
def test_what_this_machine_cannot_do(flags: list[str], more: list[str], message: str) -> None:
    assert message in failed([*flags, *more, "--workdir=unused"], {}, 2)


# ------------------------------------------------------------------------------ while it runs

# What is found out here has nothing to do with what the steps do: let them do little.
PLAIN = [
    f"--set={setting}"
    for setting in ("objective.pl_weight=0", "objective.r1_gamma=0", "augment.mode=none")
]


@pytest.mark.slow
def test_shards_that_do_not_divide(flags: list[str], tmp_path: pathlib.Path) -> None:
    more = [f"--workdir={tmp_path / 'run'}", "--set=training.batch_size=24"]
    workers = [start([*flags, *more], environment) for environment in environments(3)]
    errors = [worker.communicate(timeout=600)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 2, 2], errors
    for error in errors:
        assert "3 workers cannot share 4 shards evenly" in error


@pytest.mark.slow
def test_a_worker_that_dies_takes_all_along(flags: list[str], tmp_path: pathlib.Path) -> None:
    """All end soon, in one line that says why, and the next start goes on from the checkpoint."""
    workdir = tmp_path / "run"
    settings = ("training.total_kimg=1000", "checkpoint.every_steps=1", "run.worker_timeout=30")
    more = [f"--workdir={workdir}", *PLAIN, *(f"--set={setting}" for setting in settings)]
    chief, other = (start([*flags, *more], environment) for environment in environments(2))
    try:
        while not list(workdir.glob("checkpoints/*/COMMITTED-*")):
            assert chief.poll() is None, chief.communicate()
            time.sleep(0.2)
        other.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = chief.communicate(timeout=300)
        assert time.monotonic() - killed < 60
    finally:
        for each in (chief, other):
            each.kill()
            each.communicate()
    assert chief.returncode == RESTART
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "worker:1 (localhost:" in errors[0]
    assert "has ended" in errors[0]
    assert "Traceback" not in err

    # From the newest checkpoint to its next step.
    found = max(path.parent.name for path in workdir.glob("checkpoints/*/COMMITTED-*"))
    kimg = (int(found.removeprefix("step-")) + 1) * 0.016
    again = [*more, f"--set=training.total_kimg={kimg}"]
    chief, other = (start([*flags, *again], environment) for environment in environments(2))
    out, err = chief.communicate(timeout=600)
    other_out, other_err = other.communicate(timeout=600)
    assert (chief.returncode, other.returncode) == (0, 0), err + other_err
    assert "resuming from" in out
    # The other worker says who it is and no more; the files are the chief's.
    assert "tick" not in other_out
    assert "tick" in out
    lines = (workdir / "stats.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["Progress/tick"]["mean"] for line in lines]
    assert numbers == sorted(set(numbers))


@pytest.mark.slow
def test_a_worker_that_hangs_is_found_by_our_limit(
    flags: list[str], tmp_path: pathlib.Path
) -> None:
    """Not by TensorFlow, whose own limit would come first, and which ends in a stack dump."""
    workdir = tmp_path / "run"
    settings = ("training.total_kimg=1000", "run.worker_timeout=25")
    more = [f"--workdir={workdir}", *PLAIN, *(f"--set={setting}" for setting in settings)]
    chief, other = (start([*flags, *more], environment) for environment in environments(2))
    try:
        while not has_ticked(workdir):
            assert chief.poll() is None, chief.communicate()
            time.sleep(0.2)
        other.send_signal(signal.SIGSTOP)
        _, err = chief.communicate(timeout=300)
    finally:
        for each in (chief, other):
            each.kill()
            each.communicate()
    assert chief.returncode == RESTART, err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "worker:1 (localhost:" in error
    assert "has been silent for" in error
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_worker_that_is_preempted_has_all_saved(
    flags: list[str], tmp_path: pathlib.Path, told: int
) -> None:
    """The chief or the other: both stop after the same step, which is saved."""
    workdir = tmp_path / "run"
    settings = (
        "training.total_kimg=1000",
        "checkpoint.every_steps=100000",
        "run.grace_time=300",  # a machine that does other things is slow
    )
    more = [f"--workdir={workdir}", *PLAIN, *(f"--set={setting}" for setting in settings)]
    processes = [start([*flags, *more], environment) for environment in environments(2)]
    try:
        while not has_ticked(workdir):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.2)
        processes[told].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [RESTART, RESTART], errors
    lines = [[line for line in err.splitlines() if line.startswith("stopped: ")] for err in errors]
    assert lines[0] == lines[1]
    (line,) = lines[0]
    assert f"stopped: SIGTERM on worker:{told} (localhost:" in line
    saved = max(path.parent.name for path in workdir.glob("checkpoints/*/COMMITTED-*"))
    assert f"step {int(saved.removeprefix('step-'))} (kimg" in line
    assert not (workdir / "lease.json").exists()
