"""Which devices a run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

from trainer.config import RunConfig
from trainer.core.errors import ConfigError
from trainer.distribution.cluster import Cluster, PeerError
from trainer.distribution.strategy import choose


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the tests says nothing of workers or TPUs."""
    for name in ("TF_CONFIG", "CLUSTER_SPEC", "TPU_NAME", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("auto", "auto: no other workers, no TPU, no GPU"),
        ("cpu", "run.strategy = cpu"),
        ("one_device", "run.strategy = one_device"),
    ],
)
def test_one_cpu(name: Any, why: str) -> None:
    placement, jit = choose(RunConfig(strategy=name))
    assert placement.strategy.num_replicas_in_sync == 1
    assert placement.description == f"one CPU ({why})"
    assert (placement.platform, placement.accelerated, jit) == ("CPU", False, True)
    assert (placement.worker, placement.num_workers, placement.is_chief) == (0, 1, True)


@pytest.mark.parametrize(("jit", "compiled"), [("auto", True), ("on", True), ("off", False)])
def test_jit(jit: Any, compiled: bool) -> None:
    assert choose(RunConfig(strategy="cpu", jit=jit))[1] == compiled


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match="run.strategy = 'gpu'.*'mirrored'"):
        RunConfig(strategy="gpu")


class Machine:
    """A machine with GPUs, which can be hidden only before they are asked for."""

    def __init__(self, gpus: int, cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = [f"/gpu:{index}" for index in range(gpus)]
        self.cpus, self.started = cpus, False
        monkeypatch.setattr(tf.config, "list_logical_devices", self._list)
        monkeypatch.setattr(tf.config, "set_visible_devices", self._set)
        monkeypatch.setattr(tf.config, "set_logical_device_configuration", self._split)
        monkeypatch.setattr(tf.config, "get_logical_device_configuration", lambda _: None)
        for kind in ("MirroredStrategy", "OneDeviceStrategy"):
            monkeypatch.setattr(tf.distribute, kind, lambda names, kind=kind: (kind, names))

    def _list(self, kind: str) -> list[Any]:
        self.started = True
        names = self.names if kind == "GPU" else [f"/cpu:{index}" for index in range(self.cpus)]
        return [type("Device", (), {"name": name}) for name in names]

    def _set(self, devices: list[Any], kind: str) -> None:
        assert kind == "GPU"
        if self.started:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.names = devices

    def _split(self, cpu: Any, parts: list[Any]) -> None:
        if self.started:
            raise RuntimeError("Virtual devices cannot be modified after being initialized")
        self.cpus = len(parts)


@pytest.mark.parametrize(
    ("gpus", "run", "wanted", "description"),
    [
        (1, {}, ("OneDeviceStrategy", "/gpu:0"), "one GPU (auto: no other workers, no TPU, one"),
        (2, {}, ("MirroredStrategy", ["/gpu:0", "/gpu:1"]), "2 mirrored GPUs (auto: "),
        (2, {"strategy": "one_device"}, ("OneDeviceStrategy", "/gpu:0"), "one GPU (run.strategy"),
        (1, {"strategy": "mirrored"}, ("MirroredStrategy", ["/gpu:0"]), "1 mirrored GPUs"),
        (1, {"cpu_replicas": 2}, ("OneDeviceStrategy", "/gpu:0"), "one GPU (auto"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, run: Any, wanted: object, description: str
) -> None:
    Machine(gpus, 1, monkeypatch)
    placement, _ = choose(RunConfig(**run))
    assert placement.strategy == wanted
    assert placement.description.startswith(description)
    assert placement.accelerated


@pytest.mark.parametrize("name", ["auto", "cpu", "mirrored"])
def test_a_cpu_in_parts(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    Machine(0, 1, monkeypatch)
    placement, _ = choose(RunConfig(strategy=name, cpu_replicas=3))
    assert placement.strategy == ("MirroredStrategy", ["/cpu:0", "/cpu:1", "/cpu:2"])
    assert placement.description.startswith("3 mirrored logical CPUs (")
    assert not placement.accelerated


def test_cpu_hides_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2, 1, monkeypatch)
    placement, _ = choose(RunConfig(strategy="cpu"))
    assert machine.names == []
    assert placement.description == "one CPU (run.strategy = cpu)"


def test_other_workers_must_have_been_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that knows nothing of workers doesn't train a run of its own on each."""
    cluster = {"worker": ["a:1", "b:1"]}
    task = {"type": "worker", "index": 1}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    with pytest.raises(ConfigError, match="unset TF_CONFIG"):
        choose(RunConfig())


# ------------------------------------------------------------------------------ workers

TWO = Cluster("TF_CONFIG", ("chief:0", "worker:0"), ("a:1", "b:1"), 1)


@pytest.mark.parametrize(
    ("gpus", "run", "implementation", "description"),
    [
        (2, {"collectives": "nccl"}, "NCCL", "2 workers with 2 GPUs each"),
        (0, {"collectives": "ring"}, "RING", "2 workers with one CPU each"),
        (0, {"strategy": "multi_worker"}, "AUTO", "2 workers with one CPU each"),
    ],
)
def test_several_workers(
    monkeypatch: pytest.MonkeyPatch, gpus: int, run: Any, implementation: str, description: str
) -> None:
    def make(resolver: Any, options: Any) -> Any:
        return resolver, options

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", make)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one"] * gpus)
    settings = RunConfig(**run, bytes_per_pack=1 << 20, collective_timeout=30)
    placement, _ = choose(settings, TWO)
    resolver, options = placement.strategy
    assert resolver.cluster_spec().as_dict() == {"chief": ["a:1"], "worker": ["b:1"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", 0)
    assert resolver.num_accelerators() == {"GPU": gpus}
    assert (options.bytes_per_pack, options.timeout_seconds) == (1 << 20, 30)
    assert options.implementation.name == implementation
    assert (placement.worker, placement.num_workers, placement.is_chief) == (1, 2, False)
    assert placement.description.startswith(f"{description}, this is worker:0 (b:1) (")
    assert placement.accelerated == (gpus > 0)


@pytest.fixture
def coordination() -> Iterator[Any]:
    """TensorFlow's context, whose settings for workers are as they were afterwards."""
    from tensorflow.python.eager import context

    here = context.context()
    before = here._coordination_service_config
    yield here
    here._coordination_service_config = before


def test_tensorflow_finds_lost_workers_by_our_limits(
    monkeypatch: pytest.MonkeyPatch, coordination: Any
) -> None:
    def make(resolver: Any, options: Any) -> Any:  # as the strategy does
        coordination.configure_coordination_service(
            service_type="standalone", service_leader="/job:chief/replica:0/task:0"
        )

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", make)
    choose(RunConfig(worker_timeout=120), TWO)
    settings = coordination.coordination_service
    assert settings.service_type == "standalone"
    assert settings.heartbeat_timeout_in_ms == 540_000
    assert settings.cluster_register_timeout_in_ms == 120_000
    assert "configure_coordination_service" not in vars(coordination)


def test_a_worker_lost_while_the_servers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no mistake in the config."""

    def make(resolver: Any, options: Any) -> Any:
        raise tf.errors.DeadlineExceededError(None, None, "Barrier timed out.\nmore")

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", make)
    with pytest.raises(PeerError, match=r"has lost a worker \(Barrier timed out\.\)"):
        choose(RunConfig(), TWO)


def test_nccl_needs_gpus() -> None:
    with pytest.raises(ConfigError, match="run.collectives = 'nccl' needs GPUs"):
        choose(RunConfig(collectives="nccl"), TWO)


# ------------------------------------------------------------------------------ TPU


class Tpu:
    """TensorFlow's calls for a TPU, and what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: Exception | None = None) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(
            tf.distribute.cluster_resolver,
            "TPUClusterResolver",
            lambda tpu: self._call("find", tpu),
        )
        monkeypatch.setattr(
            tf.config, "experimental_connect_to_cluster", lambda r: self._call("connect", r)
        )
        monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda r: self._start(r))
        strategy = type("Strategy", (), {"num_replicas_in_sync": 8})
        monkeypatch.setattr(tf.distribute, "TPUStrategy", lambda resolver: strategy)
        self.problem = problem

    def _call(self, what: str, value: Any) -> Any:
        self.calls.append((what, value))
        return value

    def _start(self, resolver: Any) -> None:
        if self.problem is not None:
            raise self.problem


@pytest.mark.parametrize(
    ("run", "name", "description"),
    [
        ({"strategy": "tpu"}, "local", "TPU local with 8 cores (run.strategy = tpu)"),
        ({"tpu": "mine"}, "mine", "TPU mine with 8 cores (run.tpu = mine)"),
        ({"tpu": "local"}, "local", "TPU local with 8 cores (run.tpu = local)"),
    ],
)
def test_a_tpu(monkeypatch: pytest.MonkeyPatch, run: Any, name: str, description: str) -> None:
    tpu = Tpu(monkeypatch)
    placement, jit = choose(RunConfig(**run, jit="off"))
    assert placement.description == description
    assert (placement.platform, placement.accelerated) == ("TPU", True)
    assert jit  # there is nothing else on a TPU
    # On a TPU VM there is no other host to connect to.
    assert tpu.calls == [("find", name)] + ([("connect", name)] if name != "local" else [])


@pytest.mark.parametrize(
    ("variable", "value", "name", "why"),
    [
        ("TPU_NAME", "grpc://10.0.0.2:8470", "grpc://10.0.0.2:8470", "TPU_NAME=grpc://10.0.0.2"),
        ("TPU_WORKER_ID", "0", "local", "this is a TPU VM"),
    ],
)
def test_auto_takes_a_tpu_before_gpus(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str, why: str
) -> None:
    Machine(2, 1, monkeypatch)
    tpu = Tpu(monkeypatch)
    monkeypatch.setenv(variable, value)
    placement, _ = choose(RunConfig())
    assert tpu.calls[0] == ("find", name)
    assert why in placement.description


def test_no_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Tpu(monkeypatch, tf.errors.NotFoundError(None, None, "TPUs not found in the cluster.\nmore"))
    with pytest.raises(ConfigError, match="no TPU 'local' here .TPUs not found.*or take another"):
        choose(RunConfig(strategy="tpu"))


_SILENT_TPU = """
import socket
from trainer.config import RunConfig
from trainer.core.errors import TrainerError
from trainer.distribution.strategy import choose

with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
    try:
        choose(RunConfig(strategy="tpu", tpu=address, join_timeout=1.0))
    except TrainerError as error:
        print(error.exit_code, str(error).replace(address, "it"))
"""


def test_a_tpu_that_does_not_answer_ends_the_wait() -> None:
    """In a process of its own: TensorFlow goes on waiting in a thread."""
    done = subprocess.run(
        [sys.executable, "-c", _SILENT_TPU], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("75 TPU it hasn't answered for 1 s; "), done.stderr


# ------------------------------------------------------------------------------ parts of a CPU

_TWO_CPUS = """
import tensorflow as tf
from trainer.config import RunConfig
from trainer.distribution.strategy import choose
from trainer.training.step import agree

placement, _ = choose(RunConfig(cpu_replicas=2))
print(placement.description, agree(placement.strategy, 7))
"""


def test_logical_cpus_add_up() -> None:
    """In a process of its own: TensorFlow allows one size of mirrored strategies in each."""
    done = subprocess.run(
        [sys.executable, "-c", _TWO_CPUS], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "2 mirrored logical CPUs (auto: no other workers, no TPU, no GPU) True\n"
