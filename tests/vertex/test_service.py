"""Submitting, resuming and watching through the real client, against a Vertex AI of our own."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tests.gcs.fixture import Gcs
from tests.vertex.fake import Vertex
from trainer import submit
from trainer.core import cloud_requests, storage
from trainer.core.errors import DataError, TrainerError, UsageError

IMAGE = f"us-docker.pkg.dev/project/repo/trainer@sha256:{'0' * 64}"
Call = Callable[..., None]


def flags(gcs: Gcs, target: str = "cpux2=2x1") -> list[str]:
    return [
        "--config=configs/smoke.yaml",
        f"--target={target}",
        f"--image={IMAGE}",
        f"--workdir={gcs.url}/runs/a",
    ]


def test_submit(call: Call, vertex: Vertex, gcs: Gcs, capsys: pytest.CaptureFixture[str]) -> None:
    call(*flags(gcs))
    name = "projects/pay/locations/us-central1/customJobs/1"
    assert f"started {name}\n" in capsys.readouterr().out
    (job,) = vertex.requests
    workdir = f"{gcs.url}/runs/a"
    assert job["jobSpec"]["baseOutputDirectory"] == {"outputUriPrefix": workdir}
    (path,) = (
        text.partition("=")[2]
        for text in job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
        if text.startswith("--config=")
    )
    assert "package:data/fluent_emoji_32" in storage.read_text(path)
    assert json.loads(storage.read_text(f"{workdir}/submitted/job.json"))["name"] == name


def test_the_real_client_sends_what_a_dry_run_prints(
    call: Call, vertex: Vertex, gcs: Gcs, tmp_path: pathlib.Path
) -> None:
    call(*flags(gcs), "--dry_run", f"--out={tmp_path}")
    call(*flags(gcs))
    assert vertex.requests == [json.loads((tmp_path / "job.json").read_text())]


@pytest.mark.parametrize(
    "more",
    [
        ["--target=h200x8", "--queue=flex", "--max_wait=2d"],
        ["--target=b200x8", "--reservation=projects/p/zones/us-central1-b/reservations/mine"],
        ["--target=rtx6000x8", "--persistent_resource=mine", "--web_access"],
        [
            "--target=h100-megax8",
            "--kms_key=projects/p/locations/us-central1/keyRings/ring/cryptoKeys/key",
        ],
    ],
)
def test_the_real_client_knows_every_field(
    call: Call, vertex: Vertex, gcs: Gcs, tmp_path: pathlib.Path, more: list[str]
) -> None:
    """And another job that goes on has them, too."""
    call(*flags(gcs), *more, "--set=training.batch_size=32", "--dry_run", f"--out={tmp_path}")
    call(*flags(gcs), *more, "--set=training.batch_size=32")
    end(vertex, "JOB_STATE_FAILED", 75)
    call("resume", "1")
    printed = json.loads((tmp_path / "job.json").read_text())
    assert printed["jobSpec"]["scheduling"].pop("restartJobOnWorkerRestart") is False  # isn't sent
    # The first is sent by the flags, the second is made from what the service has.
    assert vertex.requests == [printed, printed]


def test_where_to_look_is_said(call: Call, gcs: Gcs, capsys: pytest.CaptureFixture[str]) -> None:
    call(*flags(gcs))
    printed = capsys.readouterr().out
    console = "https://console.cloud.google.com"
    assert f"{console}/vertex-ai/locations/us-central1/training/1?project=pay\n" in printed
    assert f"{console}/logs/query;query=" in printed
    assert "%22ml_job%22" in printed and "job_id%3D%221%22?project=pay\n" in printed


def test_a_bucket_elsewhere_is_said(
    call: Call, gcs: Gcs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (location, expected) in enumerate(
        (("us-central1", ""), ("eu", "is in eu, the job in us-central1"))
    ):
        monkeypatch.setattr(storage, "bucket_location", lambda path, found=location: found)
        call(*flags(gcs), f"--workdir={gcs.url}/runs/{number}")
        printed = capsys.readouterr().out
        assert ("note" in printed) == bool(expected)
        assert expected in printed
    # A dry run asks nobody if it knows the images.
    monkeypatch.setattr(storage, "bucket_location", lambda path: pytest.fail("asked"))
    call(*flags(gcs), "--dry_run")
    call(*flags(gcs), f"--data={gcs.url}/data", "--dry_run", "--resolution=32")


def test_a_bucket_whose_place_is_secret(
    call: Call, gcs: Gcs, capsys: pytest.CaptureFixture[str]
) -> None:
    with gcs.emulator.faulty(match="bucket", forbidden=True):
        call(*flags(gcs))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(lines) == 1 and "permission denied" in lines[0]


def test_a_bucket_that_does_not_answer(
    call: Call, gcs: Gcs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way out is said long before the patience with it ends."""
    monkeypatch.setattr(submit, "_SLOW_SEC", 0.2)
    monkeypatch.setattr(cloud_requests, "RETRY_SECONDS", 1.5)
    monkeypatch.setattr(cloud_requests, "_LONGEST_WAIT_SECONDS", 0.1)
    with gcs.emulator.faulty(error_rate=1.0), pytest.raises(DataError, match="give --resolution"):
        call(*flags(gcs), f"--data={gcs.url}/data", "--dry_run")
    said = capsys.readouterr().err
    assert (
        said
        == f"{gcs.url}/data doesn't answer yet; with --resolution=WIDTHxHEIGHT it isn't asked\n"
    )


def test_list(call: Call, vertex: Vertex, gcs: Gcs, capsys: pytest.CaptureFixture[str]) -> None:
    call("list")
    assert capsys.readouterr().out == "no job of the trainer's in us-central1 of pay\n"
    for name in ("a", "b", "c"):
        call(*flags(gcs), f"--workdir={gcs.url}/runs/{name}", f"--display_name=run-{name}")
    stranger = "projects/pay/locations/us-central1/customJobs/9"
    vertex.documents[stranger] = {"name": stranger, "labels": {}, "state": "JOB_STATE_RUNNING"}
    vertex.documents["projects/pay/locations/us-central1/customJobs/2"]["state"] = (
        "JOB_STATE_RUNNING"
    )
    capsys.readouterr()
    call("list")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    time = ["2026-11-27", "10:00:03"]
    assert lines[0] == ["3", "pending", *time, "run-c", f"{gcs.url}/runs/c"]
    assert [line[0] for line in lines] == ["3", "2", "1"]
    assert lines[1][1] == "running"


def test_cancel(call: Call, vertex: Vertex, gcs: Gcs, capsys: pytest.CaptureFixture[str]) -> None:
    call(*flags(gcs))
    call("cancel", f"{gcs.url}/runs/a")
    assert "`resume` goes on from what it has saved" in capsys.readouterr().out
    (document,) = vertex.documents.values()
    assert document["state"] == "JOB_STATE_CANCELLED"
    with pytest.raises(UsageError, match="is JOB_STATE_CANCELLED: there is nothing to cancel"):
        call("cancel", "1")


def test_logs(call: Call, vertex: Vertex, gcs: Gcs, capsys: pytest.CaptureFixture[str]) -> None:
    call(*flags(gcs))
    capsys.readouterr()
    call("logs", "1")
    assert "has logged nothing yet" in capsys.readouterr().out
    labels = {"labels": {"job_id": "1", "task_name": "workerpool0-0"}}
    time = "2026-11-27T10:00:00.5Z"
    vertex.entries["1"] = [
        {"timestamp": time, "resource": labels, "textPayload": "first\n"},
        {"timestamp": time, "resource": labels, "jsonPayload": {"message": "\x1b[2Jsecond"}},
        {"timestamp": time, "resource": 5, "jsonPayload": [1], "textPayload": None},
        "no entry",
    ]
    call("logs", f"{gcs.url}/runs/a")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2026-11-27 10:00:00 workerpool0-0 first"
    assert lines[1].startswith("2026-11-27 10:00:00 workerpool0-0 ")
    assert "second" in lines[1] and "\x1b" not in lines[1]
    assert len(lines) == 4 and lines[3].startswith("all of it")


@pytest.mark.parametrize(
    ("code", "expected"), [(403, "roles/logging.viewer"), (503, "try again later")]
)
def test_no_logs(call: Call, vertex: Vertex, gcs: Gcs, code: int, expected: str) -> None:
    call(*flags(gcs))
    vertex.refuse = (code, "no")
    with pytest.raises(TrainerError, match=expected) as caught:
        call("logs", "1")
    assert "\n" not in str(caught.value)


def test_one_job_at_a_time_in_a_workdir(call: Call, vertex: Vertex, gcs: Gcs) -> None:
    call(*flags(gcs))
    with pytest.raises(
        UsageError, match=r"customJobs/1 is JOB_STATE_PENDING in .*`watch` or cancel"
    ):
        call(*flags(gcs))
    end(vertex, "JOB_STATE_FAILED", 75)
    call(*flags(gcs))
    assert len(vertex.requests) == 2


def end(vertex: Vertex, state: str, code: int | None = None) -> None:
    (document,) = vertex.documents.values()
    document["state"] = state
    if code is not None:
        message = (
            f"The replica workerpool0-0 exited with a non-zero status of {code}. See the logs."
        )
        document["error"] = {"code": 3, "message": message}


@pytest.mark.parametrize("how", ["workdir", "name", "number"])
def test_resume(call: Call, vertex: Vertex, gcs: Gcs, how: str) -> None:
    call(*flags(gcs))
    end(vertex, "JOB_STATE_FAILED", 75)
    names = {"workdir": f"{gcs.url}/runs/a/", "name": next(iter(vertex.documents)), "number": "1"}
    call("resume", names[how])
    first, second = vertex.requests
    assert second == first
    record = json.loads(storage.read_text(f"{gcs.url}/runs/a/submitted/job.json"))
    assert record["name"].endswith("/2")


@pytest.mark.parametrize("state", ["JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED", "JOB_STATE_FAILED"])
def test_resume_after_an_end_without_a_code(
    call: Call, vertex: Vertex, gcs: Gcs, state: str
) -> None:
    call(*flags(gcs))
    end(vertex, state)
    call("resume", f"{gcs.url}/runs/a")
    assert len(vertex.requests) == 2


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("JOB_STATE_RUNNING", None, "nothing to resume; `watch` it"),
        ("JOB_STATE_SUCCEEDED", None, "has finished its run"),
        ("JOB_STATE_FAILED", 2, "ended with code 2: its command or config was wrong"),
        ("JOB_STATE_FAILED", 3, "ended with code 3: its data set could not be used"),
        ("JOB_STATE_FAILED", 5, "ended with code 5: it diverged"),
    ],
)
def test_nothing_to_resume(
    call: Call, vertex: Vertex, gcs: Gcs, state: str, code: int | None, expected: str
) -> None:
    call(*flags(gcs))
    end(vertex, state, code)
    with pytest.raises(UsageError) as caught:
        call("resume", f"{gcs.url}/runs/a")
    assert expected in str(caught.value)
    assert len(vertex.requests) == 1


def tick(number: int) -> str:
    speed = {"num": 1, "mean": 2.5, "std": 0.0}
    line = {"Timing/sec_per_kimg": speed, "tick": number, "nimg": 1000 * number}
    return json.dumps(line) + "\n"


def test_watch(call: Call, vertex: Vertex, gcs: Gcs, capsys: pytest.CaptureFixture[str]) -> None:
    call(*flags(gcs))
    storage.write_text_atomic(f"{gcs.url}/runs/a/stats.jsonl", tick(1) + tick(2) + '{"torn')
    end(vertex, "JOB_STATE_SUCCEEDED")
    capsys.readouterr()
    call("watch", f"{gcs.url}/runs/a")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "JOB_STATE_SUCCEEDED"
    assert [line.split() for line in lines[2:]] == [
        ["tick", "1", "kimg", "1.0", "sec/kimg", "2.5"],
        ["tick", "2", "kimg", "2.0", "sec/kimg", "2.5"],
    ]


@pytest.mark.parametrize(("code", "ends_with"), [(75, 75), (5, 5), (None, 75)])
def test_watch_ends_as_the_run(
    call: Call, vertex: Vertex, gcs: Gcs, code: int | None, ends_with: int
) -> None:
    call(*flags(gcs))
    end(vertex, "JOB_STATE_FAILED", code)
    with pytest.raises(TrainerError) as caught:
        call("watch", "1")
    assert caught.value.exit_code == ends_with
    assert (f"resume {gcs.url}/runs/a" in str(caught.value)) == (ends_with == 75)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (403, "roles/aiplatform.user"),
        (429, "ask for more quota, or take another --region or --target"),
        (400, "Google Cloud won't start the job: no"),
    ],
)
def test_refusals(call: Call, vertex: Vertex, gcs: Gcs, code: int, expected: str) -> None:
    vertex.refuse = (code, "no")
    with pytest.raises(UsageError) as caught:
        call(*flags(gcs))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not storage.exists(f"{gcs.url}/runs/a/submitted/job.json")


def test_no_service(call: Call, vertex: Vertex, gcs: Gcs) -> None:
    vertex.endpoint = "http://localhost:1"
    with pytest.raises(TrainerError) as caught:
        call(*flags(gcs))
    assert caught.value.exit_code == 4
    assert "can't start the job" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a100x16=2x8", "v5e-4", "v2-8"])
def test_gcloud_takes_the_yaml(
    call: Call, vertex: Vertex, tmp_path: pathlib.Path, target: str
) -> None:
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    call(
        "--config=configs/paper256.yaml",
        f"--target={target}",
        f"--image={IMAGE}",
        "--data=gs://bucket/data",
        "--workdir=gs://bucket/runs/a",
        "--resolution=256",
        *(["--set=training.batch_size=128"] if target.startswith("a100") else []),
        "--dry_run",
        f"--out={tmp_path}",
    )
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_PROJECT": "pay",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{vertex.endpoint}/",
    }
    command = ["gcloud", "ai", "custom-jobs", "create", "--region=us-central1"]
    done = subprocess.run(
        [*command, "--display-name=a", f"--config={tmp_path / 'job.yaml'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads((tmp_path / "job.json").read_text())["jobSpec"]
    assert vertex.requests[0]["jobSpec"] == printed
