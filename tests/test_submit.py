"""The command that submits: what it prints, and what it says of a wrong call."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest
import yaml
from absl import flags as absl_flags

from tests.vertex import discovery
from trainer import submit
from trainer.core.errors import TrainerError

ROOT = pathlib.Path(__file__).parents[1]
DIGEST = f"sha256:{'0' * 64}"
GOOD = {
    "config": "configs/auto.yaml",
    "target": "a100x8",
    "image": f"us-docker.pkg.dev/project/repo/trainer-gpu@{DIGEST}",
    "data": "gs://bucket/data",
    "workdir": "gs://bucket/runs/a",
    "resolution": "256",
}


def command(**changes: str | None) -> list[str]:
    """The flags of a good call, some of them changed, or left out with None."""
    given = GOOD | changes
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> object:
    """Runs the command in this process."""

    def run(*arguments: str) -> None:
        values = absl_flags.FlagValues()
        submit.define_flags(values)
        rest = values(["submit", *arguments])
        monkeypatch.setattr(submit, "FLAGS", values)
        submit.main(rest)

    return run


def as_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer.submit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------------ dry run


def test_a_dry_run_is_quick_and_imports_no_tensorflow() -> None:
    code = (
        "import sys, time; start = time.process_time();"
        "from trainer import submit; from trainer.core import flags; submit.define_flags();"
        "flags.flags.FLAGS(['submit', *sys.argv[1:]]); submit.main(['submit']);"
        "heavy = {'tensorflow', 'fsspec', 'google.cloud.aiplatform_v1'} & set(sys.modules);"
        "print(heavy, time.process_time() - start, file=sys.stderr)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command(), "--dry_run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    elapsed = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    heavy, seconds = done.stderr.rsplit(maxsplit=1)
    assert heavy == "set()"
    assert float(seconds) < 1.5, f"{seconds} s of the processor, {elapsed:.1f} s in all"


def test_a_dry_run_prints_a_valid_job(
    call: object, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    call(*command(), "--dry_run", f"--out={tmp_path}", "--sec_per_kimg=10", "--labels=team=faces")
    printed = capsys.readouterr().out
    for name in ("target", "batch", "memory", "cost", "run", "time", "quota"):
        assert f"\n{name}" in f"\n{printed}"
    job = json.loads((tmp_path / "job.json").read_text())
    assert discovery.problems(job) == []
    assert job["labels"]["team"] == "faces"
    assert yaml.safe_load((tmp_path / "job.yaml").read_text()) == job["jobSpec"]
    assert "batch_size: auto" in (tmp_path / "config.yaml").read_text()
    copy, create = printed.splitlines()[-2:]
    (config_flag,) = [
        text
        for text in job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
        if text.startswith("--config=")
    ]
    assert copy == f"gcloud storage cp {tmp_path}/config.yaml {config_flag[len('--config=') :]}"
    assert create.startswith("gcloud ai custom-jobs create --region=us-central1 ")
    assert create.endswith(f" --config={tmp_path}/job.yaml")
    for text in (tmp_path / "job.json", tmp_path / "job.yaml", tmp_path / "config.yaml"):
        assert text.read_text() in printed


def test_the_data_set_is_asked_for_its_resolution(
    call: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """A smoke job: the images ship with the package, and so does their manifest."""
    flags = command(config="configs/smoke.yaml", target="cpux2=2x1", data=None, resolution=None)
    call(*flags, "--dry_run")
    assert "16 images 32x32x3 = 2 replicas x 1 rounds x 8" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["auto", "configs/auto.yaml"])
def test_a_job_is_named_after_its_preset(
    config: str, call: object, capsys: pytest.CaptureFixture[str]
) -> None:
    call(*command(config=config), "--dry_run")
    assert '"displayName": "auto-a100x8"' in capsys.readouterr().out


def test_help() -> None:
    done = as_program("--help")
    assert done.returncode == 0
    assert "resume JOB|WORKDIR" in done.stdout and "--target" in done.stdout


# ------------------------------------------------------------------------------------ mistakes

TENSORBOARD = "projects/p/locations/europe-west4/tensorboards/1"
KMS_KEY = "projects/p/locations/europe-west4/keyRings/ring/cryptoKeys/key"
TPU_IMAGE = f"us-docker.pkg.dev/project/repo/trainer-tpu@{DIGEST}"
ACCOUNT = "trainer@project.iam.gserviceaccount.com"

# What is changed in a good call, further arguments, and what the message says.
MISTAKES: list[tuple[dict[str, str | None], list[str], str]] = [
    ({"config": None}, [], "--config is needed; see --help"),
    ({"config": None, "target": None}, [], "--config and --target are needed"),
    ({"workdir": None}, [], "--workdir is needed"),
    ({"config": "configs/missing.yaml"}, [], "missing.yaml"),
    ({}, ["--set=training.batchsize=8"], "did you mean training.batch_size?"),
    ({}, ["--set=training.batch_size=12"], "doesn't divide into 1 rounds x 8 replicas x groups"),
    ({"target": "a100"}, [], "--target=a100 is no target; did you mean a100x"),
    ({"target": "a100x5"}, [], "no machine has 5 of a100, there is 1, 2, 4, 8, 16; take"),
    ({"target": "a100x16=2x4"}, [], "2 machines of 4 are not 16"),
    ({"target": "v6e-8"}, [], "TensorFlow runs on TPU v2, v3 and v5e only; take v5e-8"),
    ({"target": "v5e-3"}, [], "there is v5e-1, v5e-4, v5e-8"),
    (
        {"target": "v3-32", "image": TPU_IMAGE},
        ["--spot", "--set=training.batch_size=128", "--region=europe-west4"],
        "no Spot VMs for TPUs over",
    ),
    (
        {"target": "t4x1"},
        [],
        "a T4 GPU has float16 only (bfloat16 came with Ampere); it fits with ",
    ),
    ({"target": "v5e-8"}, ["--set=run.precision=float16"], "TPUs compute in bfloat16 or float32"),
    ({"target": "cpux1"}, ["--set=run.precision=float16"], "far slower than float32 on a CPU"),
    (
        {},
        ["--set=run.strategy=tpu"],
        "run.strategy = 'tpu' isn't for a100x8, which runs 'mirrored'",
    ),
    (
        {"config": "configs/stylegan2.yaml", "resolution": "1024", "target": "a100x1"},
        [],
        "need about 109.5 GiB, and one A100 GPU has 40; it fits with --set=training.rounds=4",
    ),
    ({"resolution": "250"}, [], "resolution 250x250 (width x height) is not a grid of 4 to 7"),
    ({"resolution": "big"}, [], "--resolution=big is neither a size, as 256, nor WIDTHxHEIGHT"),
    ({"data": None}, [], "no data set: give --data, the gs:// directory"),
    ({"data": "data/photos"}, [], "--data=data/photos: a job on Vertex AI can't reach it"),
    ({"data": "data/photos", "resolution": None}, [], "python -m trainer convert --source=IMAGES"),
    ({"data": "gs://Bucket/data"}, [], "'Bucket' can't be a bucket's name"),
    ({"workdir": "runs/a"}, [], "--workdir=runs/a: a job on Vertex AI can't reach it"),
    ({"workdir": "gs://bucket"}, [], "--workdir=gs://bucket is a whole bucket"),
    ({"workdir": "gs://bucket/data/"}, [], "--data and --workdir are the same"),
    ({}, ["--set=training.init_from=runs/b"], "training.init_from=runs/b: a job on Vertex AI"),
    ({}, ["--set=checkpoint.export_dir=models/a"], "checkpoint.export_dir=models/a: a job on"),
    ({}, ["--set=telemetry.tensorboard_dir=TB"], "telemetry.tensorboard_dir=TB: a job on"),
    ({"image": None}, [], "give --image, the container to run: cloudbuild.yaml builds it"),
    ({"target": "v5e-8"}, [], "is for GPUs by its name, and --target=v5e-8 has a TPU"),
    ({"image": TPU_IMAGE}, [], "is for TPUs by its name, and --target=a100x8 has none"),
    ({}, ["--set=run.tpu=grpc://x"], "run.tpu = 'grpc://x': a job trains on the machines of its"),
    ({"target": "v5e-8", "image": TPU_IMAGE}, ["--set=run.tpu=other"], "run.tpu = 'other'"),
    ({}, ["--set=run.cpu_replicas=2"], "run.cpu_replicas = 2: --target=a100x8 trains on its A100"),
    ({"image": "gpu"}, [], "--image=gpu is no image's name"),
    ({"image": "us-docker.pkg.dev/p/r/gpu"}, [], "give the digest that the build printed"),
    ({"image": "us-docker.pkg.dev/p/r/gpu:latest"}, [], "or a tag that isn't latest"),
    ({}, ["--region=us-central1-a"], "is a zone; give its region, us-central1"),
    ({}, ["--region=mars"], "--region=mars is no region"),
    ({}, ["--region=us-west1"], "--target=a100x8 isn't in --region=us-west1, it is in us-central1"),
    (
        {"target": "v3-32", "image": TPU_IMAGE},
        ["--set=training.batch_size=128"],
        "--target=v3-32 isn't in --region=us-central1, it is in europe-west4",
    ),
    ({}, ["--queue=fast"], "--queue=fast: there is flex alone"),
    ({}, ["--max_wait=12h"], "--max_wait goes with --queue=flex"),
    ({}, ["--queue=flex", "--max_wait=12"], "--max_wait=12 is no time to wait; as 90m, 12h or 2d"),
    ({}, ["--queue=flex", "--max_wait=0h"], "give 0 to wait for ever"),
    ({}, ["--queue=flex", "--spot"], "--spot and --queue=flex are different ways"),
    ({}, ["--queue=flex", "--max_run_hours=200"], "Vertex AI ends a job after 168 hours"),
    ({"target": "cpux1"}, ["--queue=flex"], "H200 and B200 GPUs, not for cpux1"),
    ({"target": "v5e-8", "image": TPU_IMAGE}, ["--queue=flex"], "GPUs, not for v5e-8"),
    ({}, ["--reservation=mine"], "Vertex AI wants projects/PROJECT/zones/ZONE/reservations/NAME"),
    (
        {},
        ["--reservation=projects/p/zones/us-east1-b/reservations/mine"],
        "--reservation is in us-east1, the job in us-central1",
    ),
    (
        {"target": "cpux1"},
        ["--reservation=projects/p/zones/us-central1-b/reservations/mine"],
        "--reservation is for machines with GPUs, not for cpux1",
    ),
    (
        {},
        ["--spot", "--reservation=projects/p/zones/us-central1-b/reservations/mine"],
        "--spot and --reservation are different ways to get machines",
    ),
    ({}, ["--persistent_resource=a/b"], "Vertex AI wants its ID alone"),
    ({}, ["--kms_key=mine"], "keyRings/RING/cryptoKeys/KEY"),
    ({}, [f"--kms_key={KMS_KEY}"], "--kms_key is in europe-west4, the job in us-central1"),
    ({}, ["--max_run_hours=200"], "Vertex AI ends a job after 168 hours"),
    ({}, ["--max_run_hours=0"], "run.max_hours = 0.0"),
    ({}, ["--service_account=me@example.com"], "is no service account"),
    ({}, ["--network=default"], "projects/PROJECT_NUMBER/global/networks/NAME"),
    ({}, ["--tensorboard=mine"], "projects/PROJECT/locations/REGION/tensorboards/NUMBER"),
    ({}, [f"--tensorboard={TENSORBOARD}"], "is in europe-west4, the job in us-central1"),
    (
        {},
        [f"--tensorboard={TENSORBOARD}", "--region=europe-west4"],
        "--tensorboard needs --service_account",
    ),
    ({}, ["--labels=Team=a"], "--labels=Team=a: a label's key and value are lower-case"),
    ({}, ["--labels=team"], "--labels=team: expected KEY=VALUE"),
    ({}, ["--labels=a=1", "--labels=a=2"], "a is given twice"),
    ({}, ["--env=TF_CONFIG={}"], "TF_CONFIG is set for the job already"),
    (
        {},
        ["--env=GOOGLE_APPLICATION_CREDENTIALS=key.json"],
        "a job has no key file; give --service",
    ),
    ({}, [f"--env=A{i}=1" for i in range(98)], "Vertex AI takes 100 variables at most"),
    ({}, ["--env=1A=b"], "can't be the name of a variable"),
    ({}, [f"--display_name={'a' * 129}"], "longer than the 128 characters"),
    ({}, ["--out=somewhere"], "--out goes with --dry_run"),
    ({}, ["resum"], "'resum' is nothing to do; did you mean resume?"),
    ({}, ["resume"], "resume what? Give a job's name or number"),
    ({}, ["cancel"], "cancel what? Give a job's name or number"),
    ({}, ["cancl", "1"], "did you mean cancel?"),
    ({}, ["resume", "runs/none"], "no workdir that a job was submitted for"),
    ({}, ["watch", "projects/p/jobs/1"], "projects/PROJECT/locations/REGION/customJobs/NUMBER"),
]


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    MISTAKES,
    ids=[" ".join([*(f"{k}={v}" for k, v in c.items()), *m])[:60] for c, m, _ in MISTAKES],
)
def test_a_mistake(
    call: object, changes: dict[str, str | None], more: list[str], expected: str
) -> None:
    with pytest.raises(TrainerError) as caught:
        call(*command(**changes), *more)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert caught.value.exit_code in (2, 3, 4)


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--targt=a100x8"], "error: Unknown command line flag 'targt'"),
        (command(target="a100x5"), "error: --target=a100x5: no machine has 5"),
        (command(), "error: no Google Cloud credentials"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    done = as_program(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(expected)
    assert "Traceback" not in done.stderr
