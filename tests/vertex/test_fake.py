"""The local Vertex AI does with jobs what Google's documents say, of which the tests of runs make use."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.vertex import fake
from tests.vertex.fake import RunningJob, Vertex

Start = Callable[..., RunningJob]
LIMIT = 60.0


@pytest.fixture
def start(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a job whose replicas run a script of the shell; `$LOG` gets a line at each start."""
    log = tmp_path / "starts"
    with Vertex(tmp_path, {"LOG": str(log), "PATH": "/usr/bin:/bin"}) as vertex:

        def run(script: str, machines: int = 1, **scheduling: Any) -> RunningJob:
            text = f'echo "$CLUSTER_SPEC" >> "$LOG"; {script}'
            monkeypatch.setattr(fake, "_ENTRY_POINT", ["/bin/sh", "-c", text, "sh"])
            pool = {
                "machineSpec": {"machineType": "n1-standard-4"},
                "replicaCount": "1",
                "containerSpec": {"imageUri": "image"},
            }
            spec = {
                "workerPoolSpecs": [pool] * machines,
                "scheduling": scheduling,
                "baseOutputDirectory": {"outputUriPrefix": "gs://bucket/run"},
            }
            code, document = vertex.post(
                "/v1/projects/p/locations/r/customJobs", {"displayName": "a", "jobSpec": spec}
            )
            assert code == 200, document
            return vertex.jobs[document["name"]]

        yield run


def starts(tmp_path: pathlib.Path) -> int:
    log = tmp_path / "starts"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_starts(tmp_path: pathlib.Path, count: int) -> None:
    end = time.monotonic() + LIMIT
    while starts(tmp_path) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_that_finishes(start: Start, tmp_path: pathlib.Path) -> None:
    assert start("exit 0", machines=2).wait(LIMIT) == "JOB_STATE_SUCCEEDED"
    assert starts(tmp_path) == 2


@pytest.mark.parametrize("code", [1, 2, 4, 75, 127])
def test_most_codes_end_a_job_for_good(start: Start, tmp_path: pathlib.Path, code: int) -> None:
    job = start(f"exit {code}")
    assert job.wait(LIMIT) == "JOB_STATE_FAILED"
    assert f"non-zero status of {code}" in job.document["error"]["message"]
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("script", "code"), [("kill -ABRT $$", 134), ("exit 134", 134), ("kill -SEGV $$", 139)]
)
def test_faults_of_a_machine_are_tried_three_times_again(
    start: Start, tmp_path: pathlib.Path, script: str, code: int
) -> None:
    job = start(script)
    assert job.wait(LIMIT) == "JOB_STATE_FAILED"
    assert job.replicas[0].codes == [code] * 4
    assert starts(tmp_path) == 4


def test_no_retries(start: Start, tmp_path: pathlib.Path) -> None:
    assert start("exit 134", disableRetries=True).wait(LIMIT) == "JOB_STATE_FAILED"
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("together", [False, True])
def test_others_are_started_again_if_the_job_asks_for_it(
    start: Start, tmp_path: pathlib.Path, together: bool
) -> None:
    once = 'case "$CLUSTER_SPEC" in *workerpool0*index*) ;; esac; mkdir "$LOG.$$" 2>/dev/null; '
    script = (
        once + 'if mkdir "$LOG.first" 2>/dev/null; then sleep 0.3; exit 139; fi; exec sleep 100'
    )
    job = start(script, machines=2, restartJobOnWorkerRestart=together)
    wait_for_starts(tmp_path, 4 if together else 3)
    assert sorted(replica.restarts for replica in job.replicas) == ([1, 1] if together else [0, 1])
    assert job.state == "JOB_STATE_RUNNING"


def test_machines_that_are_taken_away(start: Start, tmp_path: pathlib.Path) -> None:
    """A job that holds out until its machines are gone is started again, six times."""
    job = start('trap "" TERM; while :; do sleep 0.05; done')
    for count in range(1, fake.PREEMPTIONS + 2):
        wait_for_starts(tmp_path, count)
        assert job.state in ("JOB_STATE_PENDING", "JOB_STATE_RUNNING")
        job.preempt()
        job.take_away()
    assert job.wait(LIMIT) == "JOB_STATE_FAILED"
    assert "STOCKOUT" in job.document["error"]["message"]
    assert starts(tmp_path) == fake.PREEMPTIONS + 1


def test_a_code_while_machines_are_taken_away_ends_the_job(
    start: Start, tmp_path: pathlib.Path
) -> None:
    job = start('trap "exit 75" TERM; echo >> "$LOG"; while :; do sleep 0.05; done')
    wait_for_starts(tmp_path, 2)
    job.preempt()
    assert job.wait(LIMIT) == "JOB_STATE_FAILED"
    assert job.replicas[0].codes == [75]


def test_time_and_cancelling(start: Start) -> None:
    assert start("exec sleep 100", timeout="0.2s").wait(LIMIT) == "JOB_STATE_EXPIRED"
    job = start("exec sleep 100")
    job.cancel()
    assert job.state == "JOB_STATE_CANCELLED"
