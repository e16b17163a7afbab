"""A job from submission to its end: two workers, preempted, and none the worse for it."""

from __future__ import annotations

import pathlib
import random
import time

import numpy as np
import pytest
from absl import flags as absl_flags

from tests.gcs.fixture import Gcs
from tests.vertex.fake import RunningJob, Vertex
from trainer import submit
from trainer.core import storage
from trainer.training import checkpoint

STEPS, EVERY, BATCH = 12, 2, 16
LIMIT = 1200.0
SETTINGS = [
    "run.jit=off",
    "run.deterministic=true",
    "model.channel_max=8",
    "objective.pl_weight=0",
    "objective.r1_gamma=0",
    f"training.total_kimg={STEPS * BATCH / 1000}",
    f"checkpoint.every_steps={EVERY}",
    "telemetry.tick_kimg=0.064",
    f"run.grace_time={LIMIT}",
]
IMAGE = f"us-docker.pkg.dev/project/repo/gpu@sha256:{'0' * 64}"


@pytest.fixture
def submitted(gcs: Gcs, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Submits a job of two workers for a workdir, by the command and the real client."""
    with Vertex(tmp_path, gcs.environment()) as vertex:

        def start(workdir: str, *more: str) -> RunningJob:
            values = absl_flags.FlagValues()
            submit.define_flags(values)
            flags = [
                "--config=configs/smoke.yaml",
                "--target=cpux2=2x1",
                f"--image={IMAGE}",
                f"--workdir={workdir}",
                "--project=pay",
                f"--endpoint={vertex.endpoint}",
                *(f"--set={setting}" for setting in SETTINGS),
                *more,
            ]
            rest = values(["submit", *flags])
            monkeypatch.setattr(submit, "FLAGS", values)
            submit.main(rest)
            return list(vertex.jobs.values())[-1]

        yield start


def logs(job: RunningJob) -> str:
    return "\n".join(f"== {each.name}\n{each.log.read_text()}" for each in job.replicas)


def wait_for_checkpoint(job: RunningJob, workdir: str) -> None:
    """Until there is one besides that of the start."""
    folder, end = storage.join(workdir, "checkpoints"), time.monotonic() + LIMIT
    while time.monotonic() < end:
        assert job.state in ("JOB_STATE_PENDING", "JOB_STATE_RUNNING"), logs(job)
        if storage.isdir(folder):
            found, _ = checkpoint.newest(workdir)
            if found is not None and 0 < found.step < STEPS:
                return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint\n{logs(job)}")


def parameters(workdir: str, steps: int = STEPS) -> dict[str, np.ndarray]:
    found, _ = checkpoint.newest(workdir)
    assert found is not None and found.step == steps
    return {
        f"{network}/{name}": value
        for network in ("G", "D", "G_ema")
        for name, value in checkpoint.read_parameters(found, network).items()
    }


def wait_until_saved(job: RunningJob) -> None:
    """Until every replica waits for the end of its machine."""
    end = time.monotonic() + LIMIT
    while not all(
        "waiting to be ended with the machine" in r.log.read_text() for r in job.replicas
    ):
        assert job.state == "JOB_STATE_RUNNING" and time.monotonic() < end, logs(job)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_preempted_job_ends_like_an_undisturbed_one(submitted: object, gcs: Gcs) -> None:
    preempted, undisturbed = f"{gcs.url}/runs/preempted", f"{gcs.url}/runs/undisturbed"
    job = submitted(preempted)
    wait_for_checkpoint(job, preempted)
    job.preempt(LIMIT)  # a busy machine may need more than 30 seconds
    wait_until_saved(job)
    job.take_away()
    assert job.wait(LIMIT) == "JOB_STATE_SUCCEEDED", logs(job)
    assert job.preemptions == 1
    assert all(each.codes == [] for each in job.replicas), logs(job)
    chief = job.replicas[0].log.read_text()
    assert "resuming from" in chief
    assert f"workdir {preempted} (--workdir)" in chief
    assert f"vertex    job 1, project pay, image {IMAGE}" in chief

    assert f"export {preempted}/model (AIP_MODEL_DIR)" in chief
    assert f"exported to {preempted}/model/1" in chief
    assert "runs/preempted/model/1/saved_model.pb" in gcs.emulator.names(gcs.bucket)

    other = submitted(undisturbed)
    assert other.wait(LIMIT) == "JOB_STATE_SUCCEEDED", logs(other)
    assert all(each.codes == [] for each in other.replicas)
    expected = parameters(undisturbed)
    found = parameters(preempted)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.proof
def test_a_spot_job_finishes_alone_however_often_it_is_taken_away(
    submitted: object, gcs: Gcs
) -> None:
    """Five times, at random, with the 30 seconds that Spot machines have."""
    preempted, undisturbed = f"{gcs.url}/runs/spot", f"{gcs.url}/runs/undisturbed"
    steps = 1000
    more = [
        "--target=cpux1",
        "--spot",
        f"--set=training.total_kimg={steps * BATCH / 1000}",
        "--set=checkpoint.every_steps=20",
        "--set=run.grace_time=28",
    ]
    job, rng = submitted(preempted, *more), random.Random(5)
    for number in range(5):
        time.sleep(rng.uniform(1, 40))
        job.preempt()
        end = time.monotonic() + LIMIT
        while job.preemptions == number:
            assert job.state == "JOB_STATE_RUNNING" and time.monotonic() < end, logs(job)
            time.sleep(0.1)
    assert job.wait(LIMIT) == "JOB_STATE_SUCCEEDED", logs(job)
    assert job.preemptions == 5
    other = submitted(undisturbed, *more)
    assert other.wait(LIMIT) == "JOB_STATE_SUCCEEDED", logs(other)
    expected, found = parameters(undisturbed, steps), parameters(preempted, steps)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
