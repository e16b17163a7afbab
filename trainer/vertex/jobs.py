"""A custom job as Vertex AI takes it, from a request."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import trainer
from trainer.core import documents, storage
from trainer.vertex import request as request_lib
from trainer.vertex.request import Request

_MODULE = "trainer.task"

# TensorFlow drives a TPU v5e through PJRT, and only if told so.
_V5E_ENV = {
    "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
    "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": "/lib/libtpu.so",
}
_DISK_GB = 200  # images are several GB


def build(request: Request) -> dict[str, Any]:
    """The CustomJob, as Vertex AI's REST interface takes it.

    Raises:
      UsageError: something in the request can't be right.
    """
    request_lib.check(request)
    target = request.target
    first = _pool(request, 1)
    pools = [first]
    if target.machines > 1:
        pools.append(_pool(request, target.machines - 1))
    scheduling: dict[str, Any] = {
        "timeout": f"{round(request.timeout_hours * 3600)}s",
        "restartJobOnWorkerRestart": target.machines > 1,
        "strategy": "SPOT" if request.spot else "STANDARD",
    }
    if request.max_wait_hours is not None:
        scheduling["strategy"] = "FLEX_START"
        scheduling["maxWaitDuration"] = f"{round(request.max_wait_hours * 3600)}s"
    spec: dict[str, Any] = {
        "workerPoolSpecs": pools,
        "scheduling": scheduling,
        "baseOutputDirectory": {"outputUriPrefix": request.workdir},
    }
    for key, value in {
        "serviceAccount": request.service_account,
        "network": request.network,
        "tensorboard": request.tensorboard,
        "persistentResourceId": request.persistent_resource,
        "enableWebAccess": request.web_access,
    }.items():
        if value:
            spec[key] = value
    job = {
        "displayName": request.display_name or f"{request.config_name}-{target.name}",
        "labels": _labels(request),
        "jobSpec": spec,
    }
    if request.kms_key:
        job["encryptionSpec"] = {"kmsKeyName": request.kms_key}
    return job


def arguments(request: Request) -> list[str]:
    """The trainer's command line."""
    flags = {
        "config": request.config_path,
        "data": request.config.data.path,
        "workdir": request.workdir,
        "strategy": request.target.strategy,
        "max_run_hours": f"{request.max_hours:g}",
    }
    if request.target.machines > 1 and request.config.run.join_timeout is None:
        flags["set"] = f"run.join_timeout={request_lib.JOIN_HOURS * 3600:g}"
    return [f"--{name}={value}" for name, value in flags.items()]


def _pool(request: Request, replicas: int) -> dict[str, Any]:
    target = request.target
    machine: dict[str, Any] = {"machineType": target.machine_type}
    if target.accelerator:
        machine |= {
            "acceleratorType": target.accelerator,
            "acceleratorCount": target.devices_per_machine,
        }
    if target.topology:
        machine["tpuTopology"] = target.topology
    if request.reservation:
        machine["reservationAffinity"] = {
            "reservationAffinityType": "SPECIFIC_RESERVATION",
            "key": "compute.googleapis.com/reservation-name",
            "values": [request.reservation],
        }
    environment = {"TRAINER_IMAGE": request.image} | dict(request.env)
    if target.kind == "v5e":
        environment = _V5E_ENV | environment
    # The image for TPU pods has an entry point of its own, which runs what it is given.
    command = ["python3", "-m", _MODULE] if target.is_pod else []
    pool: dict[str, Any] = {
        "machineSpec": machine,
        "replicaCount": str(replicas),
        "containerSpec": {
            "imageUri": request.image,
            "args": command + arguments(request),
            "env": [{"name": name, "value": value} for name, value in environment.items()],
        },
    }
    if target.disk:
        pool["diskSpec"] = {"bootDiskType": target.disk, "bootDiskSizeGb": _DISK_GB}
    return pool


def _labels(request: Request) -> dict[str, str]:
    own = {
        "trainer": trainer.__version__,
        "config": request.config_name,
        "target": request.target.name,
    }
    clean = {key: re.sub(r"[^a-z0-9_-]", "-", value.lower())[:63] for key, value in own.items()}
    return clean | dict(request.labels)


def to_yaml(job: Mapping[str, Any]) -> str:
    """The job's spec alone, as `gcloud ai custom-jobs create --config` reads it."""
    return documents.dump_yaml(job["jobSpec"])


def to_json(job: Mapping[str, Any]) -> str:
    """The body of a request to Vertex AI's REST interface."""
    return json.dumps(job, indent=2) + "\n"


def commands(request: Request, job: Mapping[str, Any], folder: str) -> list[str]:
    """The gcloud command that does the same.

    Args:
      request: of the job.
      job: from `build`.
      folder: where `job.yaml` and `config.yaml` lie.
    """
    copies: list[Sequence[str]] = [[storage.join(folder, "config.yaml"), request.config_path]]
    labels = ",".join(f"{key}={value}" for key, value in job["labels"].items())
    create = [
        "gcloud",
        "ai",
        "custom-jobs",
        "create",
        *([f"--project={request.project}"] if request.project else []),
        f"--region={request.region}",
        f"--display-name={job['displayName']}",
        f"--labels={labels}",
        *([f"--kms-key={request.kms_key}"] if request.kms_key else []),
        f"--config={storage.join(folder, 'job.yaml')}",
    ]
    return [shlex.join(["gcloud", "storage", "cp", *pair]) for pair in copies] + [
        shlex.join(create)
    ]
