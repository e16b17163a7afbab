"""What is sent to Vertex AI: valid by its own description, for every preset on every target."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import yaml

from tests.vertex import discovery
from trainer import config as config_lib
from trainer.config import Config
from trainer.core.errors import ConfigError, UsageError
from trainer.vertex import facts, fit, jobs, regions, targets
from trainer.vertex.fit import Shape
from trainer.vertex.request import Request

IMAGE = f"us-docker.pkg.dev/project/repo/trainer-gpu@sha256:{'0' * 64}"
TPU_IMAGE = f"us-docker.pkg.dev/project/repo/trainer-tpu@sha256:{'0' * 64}"
PRESETS = {
    "auto": 256,
    "cifar": 32,
    "digits32": 32,
    "emoji64": 64,
    "paper256": 256,
    "paper512": 512,
    "paper1024": 1024,
    "r3gan-cifar10": 32,
    "r3gan-ffhq64": 64,
    "r3gan-ffhq256": 256,
    "r3gan-imagenet32": 32,
    "r3gan-imagenet64": 64,
    "r3gan-smoke": 32,
    "smoke": 32,
    "smoke-relativistic": 32,
    "stylegan2": 1024,
}
SPLIT = ("a100x16=2x8", "a100x32=4x8", "t4x8=2x4", "l4x16=2x8", "cpux2=2x1", "cpux4=4x1")


@functools.cache
def preset(name: str) -> Config:
    return config_lib.load(f"configs/{name}.yaml", ["data.path=gs://bucket/data"])


def request(name: str, target: str, **others: object) -> Request:
    size, place = PRESETS[name], targets.parse(target)
    fields = {
        "config": preset(name),
        "config_name": name,
        "shape": Shape((size, size)),
        "target": place,
        "workdir": "gs://bucket/runs/a",
        "image": TPU_IMAGE if place.platform == "TPU" else IMAGE,
        "region": regions.of(place)[0],
    }
    return Request(**(fields | others))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_on_every_target(name: str) -> None:
    """A valid job, or one line that says why not and what would fit, which then does."""
    fitted = 0
    for target in (*targets.names(), *SPLIT):
        asked = request(name, target)
        try:
            found = fit.plan(asked.config, asked.shape, asked.target)
        except ConfigError as error:
            _check_refusal(asked, str(error))
            continue
        fitted += 1
        assert found.arithmetic.num_replicas == asked.target.devices
        assert discovery.problems(jobs.build(asked)) == []
        rows = dict(facts.facts(asked, found, None))
        assert {"target", "batch", "memory", "cost", "time", "quota"} <= set(rows)
    assert fitted >= 3


def _check_refusal(asked: Request, message: str) -> None:
    assert message.startswith(f"--target={asked.target.name}: ")
    assert "\n" not in message and len(message) < 400
    why, _, remedy = message.rpartition("; it fits ")
    assert why, message
    overrides = re.findall(r"--set=(\S+)", remedy)
    names = re.match(r"on ([^;]*)", remedy)
    if overrides:
        changed = config_lib.load(f"configs/{asked.config_name}.yaml", overrides)
        elsewhere = targets.parse(names[1].split()[0]) if names else asked.target
        fit.plan(changed, asked.shape, elsewhere)
    else:
        assert names, message
        for target in names[1].split(", "):
            fit.plan(asked.config, asked.shape, targets.parse(target))


def test_every_preset_there_is_was_tried() -> None:
    import pathlib

    assert set(PRESETS) == {path.stem for path in pathlib.Path("configs").glob("*.yaml")}


def test_one_machine() -> None:
    job = jobs.build(request("stylegan2", "a100x8", service_account="a@b.iam.gserviceaccount.com"))
    spec = job["jobSpec"]
    (pool,) = spec["workerPoolSpecs"]
    assert pool["replicaCount"] == "1"
    assert pool["machineSpec"] == {
        "machineType": "a2-highgpu-8g",
        "acceleratorType": "NVIDIA_TESLA_A100",
        "acceleratorCount": 8,
    }
    assert spec["scheduling"] == {
        "timeout": "604800s",
        "restartJobOnWorkerRestart": False,
        "strategy": "STANDARD",
    }
    assert spec["baseOutputDirectory"] == {"outputUriPrefix": "gs://bucket/runs/a"}
    assert spec["serviceAccount"] == "a@b.iam.gserviceaccount.com"
    assert "network" not in spec and "tensorboard" not in spec
    assert "--strategy=mirrored" in pool["containerSpec"]["args"]
    assert "--max_run_hours=167" in pool["containerSpec"]["args"]
    assert job["displayName"] == "stylegan2-a100x8"
    assert job["labels"]["config"] == "stylegan2"


def test_several_machines() -> None:
    """One chief and the others as workers, all with the same code, restarted together."""
    job = jobs.build(request("auto", "a100x16=2x8"))
    chief, workers = job["jobSpec"]["workerPoolSpecs"]
    assert (chief["replicaCount"], workers["replicaCount"]) == ("1", "1")
    assert chief["containerSpec"] == workers["containerSpec"]
    assert job["jobSpec"]["scheduling"]["restartJobOnWorkerRestart"] is True
    assert "--strategy=multi_worker" in chief["containerSpec"]["args"]
    four = jobs.build(request("auto", "cpux4=4x1"))["jobSpec"]["workerPoolSpecs"]
    assert [pool["replicaCount"] for pool in four] == ["1", "3"]


@pytest.mark.parametrize(
    ("target", "machine", "runtime"),
    [
        ("v5e-8", {"machineType": "ct5lp-hightpu-8t", "tpuTopology": "2x4"}, True),
        (
            "v3-8",
            {"machineType": "cloud-tpu", "acceleratorType": "TPU_V3", "acceleratorCount": 8},
            False,
        ),
    ],
)
def test_a_tpu(target: str, machine: dict[str, object], runtime: bool) -> None:
    (pool,) = jobs.build(request("auto", target))["jobSpec"]["workerPoolSpecs"]
    assert pool["machineSpec"] == machine
    environment = {pair["name"]: pair["value"] for pair in pool["containerSpec"]["env"]}
    assert environment["TRAINER_IMAGE"] == TPU_IMAGE
    assert ("TF_PLUGGABLE_DEVICE_LIBRARY_PATH" in environment) == runtime
    assert "--strategy=tpu" in pool["containerSpec"]["args"]
    assert pool["containerSpec"]["args"][0].startswith("--config=")


def test_a_pod_runs_what_it_is_given_and_is_warned_of() -> None:
    """The image for pods has an entry point that takes a command, not flags."""
    config = config_lib.load(
        "configs/auto.yaml", ["data.path=gs://bucket/data", "training.batch_size=128"]
    )
    asked = request("auto", "v3-32", config=config)
    args = jobs.build(asked)["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert args[:4] == ["python3", "-m", "trainer.task", f"--config={asked.config_path}"]
    plan = fit.plan(asked.config, asked.shape, asked.target)
    assert any("never tried" in text for text in plan.warnings)


def test_every_target_in_every_region() -> None:
    """A valid job, or the regions in which it is one."""
    taken = 0
    for target in (*targets.names(), *SPLIT):
        accepted = set()
        for region in sorted(regions.ALL):
            asked = request("auto", target, region=region)
            try:
                job = jobs.build(asked)
            except UsageError as error:
                named = str(error).partition("it is in ")[2].split(", ")
                assert str(error).startswith(f"--target={target} isn't in --region={region}, ")
                assert tuple(named) == regions.of(asked.target)
                continue
            accepted.add(region)
            taken += 1
            assert discovery.problems(job) == []
        assert accepted == set(regions.of(asked.target))
    assert 500 < taken < 1500


@pytest.mark.parametrize("target", ["a100x16=2x8", "cpux2=2x1"])
def test_machines_wait_for_each_other_as_long_as_a_job_may_have_to(target: str) -> None:
    args = jobs.arguments(request("auto", target))
    assert "--set=run.join_timeout=43200" in args
    config = config_lib.load("configs/auto.yaml", ["run.join_timeout=60"])
    asked = dataclasses.replace(request("auto", target), config=config)
    assert not [text for text in jobs.arguments(asked) if "join_timeout" in text]


def test_a_single_machine_waits_for_none() -> None:
    assert not [a for a in jobs.arguments(request("auto", "a100x8")) if "join_timeout" in a]


@pytest.mark.parametrize(("hours", "seconds"), [(24.0, "86400s"), (1.5, "5400s"), (0.0, "0s")])
def test_a_queue(hours: float, seconds: str) -> None:
    asked = request("auto", "h100x8", max_wait_hours=hours)
    job = jobs.build(asked)
    assert discovery.problems(job) == []
    scheduling = job["jobSpec"]["scheduling"]
    assert (scheduling["strategy"], scheduling["maxWaitDuration"]) == ("FLEX_START", seconds)
    rows = dict(facts.facts(asked, fit.plan(asked.config, asked.shape, asked.target), None))
    assert "8 of custom_model_training_preemptible_nvidia_h100_gpus" in rows["quota"]
    assert "queued for " in rows["target"]


def test_reserved_machines() -> None:
    name = "projects/pay/zones/us-central1-a/reservations/mine"
    asked = request("auto", "a100x16=2x8", reservation=name)
    job = jobs.build(asked)
    assert discovery.problems(job) == []
    for pool in job["jobSpec"]["workerPoolSpecs"]:
        assert pool["machineSpec"]["reservationAffinity"] == {
            "reservationAffinityType": "SPECIFIC_RESERVATION",
            "key": "compute.googleapis.com/reservation-name",
            "values": [name],
        }


def test_machines_that_stay_a_key_and_a_shell() -> None:
    key = "projects/pay/locations/us-central1/keyRings/ring/cryptoKeys/key"
    asked = request("auto", "a100x8", persistent_resource="mine", kms_key=key, web_access=True)
    job = jobs.build(asked)
    assert discovery.problems(job) == []
    spec = job["jobSpec"]
    assert (spec["persistentResourceId"], spec["enableWebAccess"]) == ("mine", True)
    assert job["encryptionSpec"] == {"kmsKeyName": key}
    (_, create) = jobs.commands(asked, job, ".")
    assert f"--kms-key={key}" in create


@pytest.mark.parametrize(
    ("target", "disk"),
    [
        *[
            (name, "hyperdisk-balanced")
            for name in ("h200x8", "h100-megax8", "b200x8", "rtx6000x1")
        ],
        *[(name, "pd-ssd") for name in ("a100x8", "h100x8", "l4x1", "v5e-8", "cpux1")],
        ("v3-8", None),
    ],
)
def test_boot_disks(target: str, disk: str | None) -> None:
    (pool,) = jobs.build(request("auto", target))["jobSpec"]["workerPoolSpecs"]
    assert pool.get("diskSpec", {}).get("bootDiskType") == disk


def test_quota_of_processors() -> None:
    """N1 machines take some beside that of their GPUs."""
    asked = request(
        "auto", "t4x4", config=config_lib.load("configs/auto.yaml", ["run.precision=float16"])
    )
    rows = dict(facts.facts(asked, fit.plan(asked.config, asked.shape, asked.target), None))
    expected = "4 of custom_model_training_nvidia_t4_gpus and 32 of custom_model_training_cpus"
    assert rows["quota"].startswith(expected)


def test_machines_whose_network_wants_a_plugin() -> None:
    for target, warned in (("h200x8", False), ("h200x16=2x8", True), ("a100x16=2x8", False)):
        asked = request("auto", target)
        plan = fit.plan(asked.config, asked.shape, asked.target)
        assert any("NCCL" in text for text in plan.warnings) == warned


def test_the_trainer_stops_before_vertex_does() -> None:
    config = config_lib.load(
        "configs/auto.yaml", ["data.path=gs://bucket/data", "run.max_hours=10"]
    )
    asked = request("auto", "a100x8", config=config)
    spec = jobs.build(asked)["jobSpec"]
    assert spec["scheduling"]["timeout"] == "39600s"
    assert "--max_run_hours=10" in spec["workerPoolSpecs"][0]["containerSpec"]["args"]


def test_spot() -> None:
    asked = request("auto", "a100x8", spot=True)
    assert jobs.build(asked)["jobSpec"]["scheduling"]["strategy"] == "SPOT"
    rows = dict(facts.facts(asked, fit.plan(asked.config, asked.shape, asked.target), None))
    assert "custom_model_training_preemptible_nvidia_a100_gpus" in rows["quota"]


def test_sizes_are_width_x_height() -> None:
    asked = request("auto", "a100x1", shape=Shape((128, 256)))
    rows = dict(facts.facts(asked, fit.plan(asked.config, asked.shape, asked.target), None))
    assert " images 256x128x3 = " in rows["batch"]


def test_shards_must_divide_over_machines() -> None:
    asked = request("auto", "a100x16=2x8", shape=Shape((256, 256), shards=7))
    with pytest.raises(ConfigError, match="7 shards don't divide over 2 machines"):
        fit.plan(asked.config, asked.shape, asked.target)


def test_cost() -> None:
    """10 s/kimg on 8 GPUs: 1,000 kimg take 10,000 s on each, 25,000 kimg 69.4 hours."""
    asked = request("stylegan2", "a100x8")
    plan = fit.plan(asked.config, asked.shape, asked.target)
    rows = dict(facts.facts(asked, plan, 10.0))
    assert rows["cost"] == "22.2 A100 GPU hours for each 1,000 kimg, at 10 s/kimg"
    assert rows["run"] == "25,000 kimg take 69.4 h, 556 A100 GPU hours, in 1 job"
    assert dict(facts.facts(asked, plan, 50.0))["run"].endswith("in 3 jobs")
    assert dict(facts.facts(asked, plan, None))["cost"].startswith("not known")


def test_the_jobs_config_is_the_one_that_was_checked() -> None:
    asked = request("paper256", "a100x8")
    document = yaml.safe_load(asked.config_text)
    assert config_lib.from_dict(document) == asked.config
    other = dataclasses.replace(asked, config=preset("auto"))
    assert asked.config_path != other.config_path
    assert asked.config_path in " ".join(jobs.arguments(asked))


def test_yaml_and_json_say_the_same() -> None:
    job = jobs.build(request("auto", "v5e-8"))
    assert yaml.safe_load(jobs.to_yaml(job)) == job["jobSpec"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"displayName": ""}, "CustomJob.displayName is missing"),
        ({"jobSpecs": {}}, "CustomJob has no field jobSpecs"),
        ({"state": "JOB_STATE_RUNNING"}, "CustomJob.state is for output only"),
        ({"jobSpec": {"workerPoolSpecs": [{"replicaCount": 1}]}}, "replicaCount = 1 is no string"),
        (
            {"jobSpec": {"workerPoolSpecs": [{}], "scheduling": {"timeout": "7d"}}},
            "timeout = '7d' is no google-duration",
        ),
        (
            {"jobSpec": {"workerPoolSpecs": [{}], "scheduling": {"strategy": "CHEAP"}}},
            "strategy = 'CHEAP' is none of",
        ),
    ],
)
def test_a_planted_mistake_is_found(change: dict[str, object], expected: str) -> None:
    found = discovery.problems(jobs.build(request("auto", "a100x8")) | change)
    assert any(expected in text for text in found), found
