"""Devices of a run, and the strategy for them.

`run.strategy = auto` takes the first of these that there is:

1. several workers: `TF_CONFIG`, or else `CLUSTER_SPEC` (Vertex AI), names more than one task that
   trains: `multi_worker`, with all GPUs of each worker, or its CPU;
2. a TPU: `run.tpu` or `TPU_NAME` names one, or this is a TPU VM: `tpu`;
3. several GPUs: `mirrored`;
4. one GPU: `one_device`;
5. the CPU: `cpu`, or `mirrored` if `run.cpu_replicas` splits it.

What a step computes doesn't depend on it, nor on which replica computes what.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer.config import RunConfig
from trainer.core import flags
from trainer.core.errors import ConfigError
from trainer.distribution.cluster import Cluster, PeerError, find
from trainer.distribution.membership import heartbeat_timeout, lost_peer, start_timeout


@dataclass(frozen=True)
class Placement:
    """The devices of a run.

    Attributes:
      strategy: TensorFlow's strategy.
      description: what was chosen and why, for the console.
      platform: "CPU", "GPU" or "TPU".
      worker: which of the processes of the run this is; 0 is the chief, the only one that writes
        what users see.
      num_workers: how many there are.
    """

    strategy: tf.distribute.Strategy
    description: str
    platform: str
    worker: int = 0
    num_workers: int = 1

    @property
    def accelerated(self) -> bool:
        """Whether it runs on GPUs or TPUs."""
        return self.platform != "CPU"

    @property
    def is_chief(self) -> bool:
        """Whether this process writes what users see."""
        return self.worker == 0


def choose(run: RunConfig, cluster: Cluster | None = None) -> tuple[Placement, bool]:
    """The devices of a run, and whether its step is compiled.

    Compiled (`run.jit = auto`) is what was measured to be fastest on every platform: gradients and
    updates on CPUs and GPUs. Random numbers are drawn outside, since XLA draws others on CPUs, and
    so are the sums over replicas. On TPUs all of a step is compiled, whatever `run.jit` says.

    Time of Dmain (64x64, channels 8192 / 128, batch 8) and of a 3x3 convolution with both gradients
    (128 channels), relative to float32 compiled, on a CPU with AVX2 and no 16-bit instructions:

                             Dmain        convolution
        float32  uncompiled  -            1.1 to 1.2
        bfloat16 compiled    1.1 to 1.2   0.8 to 1.2
        bfloat16 uncompiled  -            15 to 21

    There bfloat16 saves no time, and uncompiled none can afford it: TensorFlow's oneDNN takes
    bfloat16 on CPUs with AVX-512 or AMX only.

    Args:
      run: the config's section.
      cluster: the workers, if there are several; this process must have met them.

    Raises:
      ConfigError: the strategy doesn't fit the machine.
    """
    compiled = run.jit != "off"
    if cluster is None and find(run.strategy) is not None:
        raise ConfigError("this command runs in one process; unset TF_CONFIG and CLUSTER_SPEC")
    if run.strategy == "cpu":  # before anything starts the GPUs: later they can't be hidden
        tf.config.set_visible_devices([], "GPU")
    _split_cpu(run.cpu_replicas)
    if cluster is not None:
        return _multi_worker(run, cluster), compiled
    tpu, why = _find_tpu(run)
    if run.strategy == "tpu" or (run.strategy == "auto" and tpu):
        return _tpu(tpu or "local", why, run.join_seconds), True
    gpus = tf.config.list_logical_devices("GPU")
    return _one_process(run, gpus), compiled


def _one_process(run: RunConfig, gpus: list[Any]) -> Placement:
    name, why = run.strategy, f"run.strategy = {run.strategy}"
    if name == "auto":
        name = "mirrored" if len(gpus) > 1 or (run.cpu_replicas > 1 and not gpus) else "one_device"
        found = {0: "no GPU", 1: "one GPU"}.get(len(gpus), f"{len(gpus)} GPUs")
        why = f"auto: no other workers, no TPU, {found}"
    if name == "mirrored" or (name == "cpu" and run.cpu_replicas > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        kind = "GPUs" if gpus else "logical CPUs"
        return _placement(strategy, f"{len(devices)} mirrored {kind}", why, gpus)
    if gpus:
        return _placement(tf.distribute.OneDeviceStrategy(gpus[0].name), "one GPU", why, gpus)
    return _placement(tf.distribute.get_strategy(), "one CPU", why, gpus)


def _placement(strategy: Any, what: str, why: str, gpus: list[Any]) -> Placement:
    return Placement(strategy, f"{what} ({why})", "GPU" if gpus else "CPU")


def _split_cpu(parts: int) -> None:
    """Makes several logical devices of the CPU, for tests of many replicas on one machine."""
    if parts == 1:
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or [0]) == parts:
        return
    configurations = [tf.config.LogicalDeviceConfiguration() for _ in range(parts)]
    tf.config.set_logical_device_configuration(cpu, configurations)


# ------------------------------------------------------------------------------ several workers


def _multi_worker(run: RunConfig, cluster: Cluster) -> Placement:
    gpus = tf.config.list_physical_devices("GPU")
    if run.collectives == "nccl" and not gpus:
        raise ConfigError("run.collectives = 'nccl' needs GPUs; set it to auto or ring")
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=run.bytes_per_pack,
        timeout_seconds=run.collective_timeout,
        implementation=implementation[run.collectives.upper()],
    )
    job, number = cluster.task
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(cluster.jobs()),
        task_type=job,
        task_id=number,
        rpc_layer="grpc",
        num_accelerators={"GPU": len(gpus)},
    )
    try:
        with (
            contextlib.nullcontext() if gpus else _logical_cpus(run.cpu_replicas),
            _time_limits(run.worker_timeout),
        ):
            strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    except tf.errors.OpError as error:
        lost = lost_peer(error)
        if lost is not None:
            raise lost from error
        raise ConfigError(
            f"{cluster.peer(cluster.index)} can't start TensorFlow's server ({_reason(error)}); "
            f"check the addresses in {cluster.source}"
        ) from error
    workers, devices = len(cluster.names), len(gpus) or run.cpu_replicas
    kind = f"{devices} GPUs" if gpus else f"{devices} logical CPUs" if devices > 1 else "one CPU"
    chosen = "auto: " if run.strategy == "auto" else "run.strategy = multi_worker, "
    return Placement(
        strategy,
        f"{workers} workers with {kind} each, this is {cluster.peer(cluster.index)} "
        f"({chosen}{cluster.source})",
        "GPU" if gpus else "CPU",
        worker=cluster.index,
        num_workers=workers,
    )


@contextlib.contextmanager
def _logical_cpus(count: int) -> Iterator[None]:
    """Lets TensorFlow's strategy take the logical CPUs of a worker, where it would take the first."""
    from tensorflow.python.distribute import collective_all_reduce_strategy

    def devices(self: Any, resolver: Any, worker: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker}/device:CPU:{index}" for index in range(count)), "CPU"

    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    original = extended._initialize_local_devices
    extended._initialize_local_devices = devices
    try:
        yield
    finally:
        extended._initialize_local_devices = original


@contextlib.contextmanager
def _time_limits(worker_timeout: float) -> Iterator[None]:
    """Sets TensorFlow's own limits for workers that are gone, by `run.worker_timeout`.

    While its server starts, which takes Python's lock, it alone can end the wait: by its own limit
    that takes an hour. Afterwards it has to come later than `membership.Membership`: its 10 s aren't
    ours, and its end is a stack dump. The strategy sets up the service itself, with no way to give
    it these; a TensorFlow without that call keeps its own limits, and its errors are understood,
    too (`membership.lost_peer`).
    """
    from tensorflow.python.eager import context

    here = context.context()
    original = getattr(here, "configure_coordination_service", None)
    if original is None:
        yield
        return

    def configure(*args: Any, **kwargs: Any) -> None:
        limits = {
            "cluster_register_timeout_in_ms": start_timeout(worker_timeout),
            "heartbeat_timeout_in_ms": heartbeat_timeout(worker_timeout),
        }
        original(*args, **kwargs, **{key: round(1000 * sec) for key, sec in limits.items()})
        settings = here.coordination_service
        if "cluster_register_with_barrier" in settings.DESCRIPTOR.fields_by_name:
            # The limit counts until all have registered, not this one alone.
            settings.cluster_register_with_barrier = True

    here.configure_coordination_service = configure
    try:
        yield
    finally:
        del here.configure_coordination_service


# ------------------------------------------------------------------------------ TPU


def _find_tpu(run: RunConfig) -> tuple[str, str]:
    """The name of the TPU to use, '' if there is none, and how it was found."""
    if run.tpu:
        return run.tpu, f"run.tpu = {run.tpu}"
    name = flags.env("TPU_NAME")
    if name:
        return name, f"TPU_NAME={name}"
    if os.path.exists("/dev/accel0") or flags.env("TPU_WORKER_ID"):
        return "local", "this is a TPU VM"
    return "", "run.strategy = tpu"


def _tpu(name: str, why: str, limit: float) -> Placement:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            _connect(name, resolver, limit)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"no TPU {name!r} here ({_reason(error)}); give its name in run.tpu or TPU_NAME, "
            "start on a TPU VM with tpu=local, or take another run.strategy"
        ) from error
    count = strategy.num_replicas_in_sync
    return Placement(strategy, f"TPU {name} with {count} cores ({why})", "TPU")


def _connect(name: str, resolver: Any, limit: float) -> None:
    """Connects to a TPU on another machine; TensorFlow alone would wait for it without end."""
    failed: list[Exception] = []

    def connect() -> None:
        try:
            tf.config.experimental_connect_to_cluster(resolver)
        except Exception as error:  # for the thread that waits
            failed.append(error)

    thread = threading.Thread(target=connect, name="connect to TPU", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        raise PeerError(
            f"TPU {name} hasn't answered for {limit:g} s; see whether it runs and this machine "
            "reaches it, or raise run.join_timeout"
        )
    if failed:
        raise failed[0]


def _reason(error: Exception) -> str:
    """TensorFlow's message in one line, without the names of its nodes."""
    if "No OpKernel was registered" in str(error):
        return "the installed TensorFlow has no support for TPUs"
    lines = re.sub(r"\{\{.*?\}\}|\[Op:\w+\].*", "", str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
