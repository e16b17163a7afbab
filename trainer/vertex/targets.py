"""Targets of a training job on Vertex AI: machine types, accelerators, and their names here.

a100x8        one machine with 8 GPUs
a100x16=2x8   two machines with 8 each
v5e-8, v3-8   a TPU on one host, by its number of chips (v5e) or cores (v2, v3)
v3-32         a TPU slice over several hosts
cpux1         a machine without accelerator, to try a job out
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from trainer.core.errors import UsageError

GIB = 1024  # MiB


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, or none.

    Attributes:
      api_name: Vertex AI's accelerator type; empty for a machine without.
      memory_mib: of one GPU.
      machines: machine type by number of GPUs.
      quota: what follows `custom_model_training_` in the quota's name.
      bfloat16: whether it computes in bfloat16 (from Ampere on).
      flex_start: whether jobs can wait for it in the queue of the Dynamic Workload Scheduler.
      disk: type of its machines' boot disk.
      network: what several of its machines need to reach their network's speed, '' for nothing.
    """

    api_name: str
    memory_mib: int
    machines: dict[int, str]
    quota: str
    bfloat16: bool = True
    flex_start: bool = True
    disk: str = "pd-ssd"
    network: str = ""


@dataclass(frozen=True)
class Tpu:
    """A generation of TPUs that TensorFlow can use (v6e and later can't).

    Attributes:
      api_name: Vertex AI's accelerator type; empty where the machine type says it.
      memory_mib: of the HBM of one core (of one chip for v5e, whose cores are one device).
      machines: machine type by number of devices.
      topologies: shape of the slice by number of devices, where Vertex AI asks for it.
      quota: as for GPUs.
    """

    api_name: str
    memory_mib: int
    machines: dict[int, str]
    topologies: dict[int, str]
    quota: str


_CLOUD_TPU = "cloud-tpu"


def _cloud_tpu(*sizes: int) -> dict[int, str]:
    return dict.fromkeys(sizes, _CLOUD_TPU)


def _a2(kind: str, *sizes: int) -> dict[int, str]:
    return {size: f"a2-{kind}-{size}g" for size in sizes}


_HYPERDISK = "hyperdisk-balanced"
_GIB = "Google's NCCL plugin (gIB or GPUDirect-TCPXO)"

GPUS = {
    "a100": Gpu(
        "NVIDIA_TESLA_A100",
        40 * GIB,
        _a2("highgpu", 1, 2, 4, 8) | _a2("megagpu", 16),
        "nvidia_a100_gpus",
    ),
    "a100-80": Gpu(
        "NVIDIA_A100_80GB", 80 * GIB, _a2("ultragpu", 1, 2, 4, 8), "nvidia_a100_80gb_gpus"
    ),
    "h100": Gpu(
        "NVIDIA_H100_80GB",
        80 * GIB,
        {size: f"a3-highgpu-{size}g" for size in (1, 2, 4, 8)},
        "nvidia_h100_gpus",
    ),
    "h100-mega": Gpu(
        "NVIDIA_H100_MEGA_80GB",
        80 * GIB,
        {8: "a3-megagpu-8g"},
        "nvidia_h100_mega_gpus",
        disk=_HYPERDISK,
        network=_GIB,
    ),
    "h200": Gpu(
        "NVIDIA_H200_141GB",
        141 * GIB,
        {8: "a3-ultragpu-8g"},
        "nvidia_h200_gpus",
        disk=_HYPERDISK,
        network=_GIB,
    ),
    "b200": Gpu(
        "NVIDIA_B200",
        180 * GIB,
        {8: "a4-highgpu-8g"},
        "nvidia_b200_gpus",
        disk=_HYPERDISK,
        network=_GIB,
    ),
    "rtx6000": Gpu(
        "NVIDIA_RTX_PRO_6000",
        96 * GIB,
        {1: "g4-standard-48", 2: "g4-standard-96", 4: "g4-standard-192", 8: "g4-standard-384"},
        "nvidia_rtx_pro_6000_gpus",
        flex_start=False,
        disk=_HYPERDISK,
    ),
    "l4": Gpu(
        "NVIDIA_L4",
        24 * GIB,
        {1: "g2-standard-16", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"},
        "nvidia_l4_gpus",
    ),
    "v100": Gpu(
        "NVIDIA_TESLA_V100",
        16 * GIB,
        {1: "n1-standard-8", 2: "n1-standard-16", 4: "n1-standard-32", 8: "n1-standard-64"},
        "nvidia_v100_gpus",
        bfloat16=False,
        flex_start=False,
    ),
    "t4": Gpu(
        "NVIDIA_TESLA_T4",
        16 * GIB,
        {1: "n1-standard-8", 2: "n1-standard-16", 4: "n1-standard-32"},
        "nvidia_t4_gpus",
        bfloat16=False,
        flex_start=False,
    ),
    "cpu": Gpu("", 60 * GIB, {1: "n1-standard-16"}, "cpus", flex_start=False),
}

TPUS = {
    "v2": Tpu("TPU_V2", 8 * GIB, _cloud_tpu(8, 32, 128, 256, 512), {}, "tpu_v2"),
    "v3": Tpu("TPU_V3", 16 * GIB, _cloud_tpu(8, 32, 64, 128, 256, 512), {}, "tpu_v3"),
    "v5e": Tpu(
        "",
        16 * GIB,
        {1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"}
        | dict.fromkeys((16, 32, 64, 128, 256), "ct5lp-hightpu-4t"),
        {
            1: "1x1",
            4: "2x2",
            8: "2x4",
            16: "4x4",
            32: "4x8",
            64: "8x8",
            128: "8x16",
            256: "16x16",
        },
        "tpu_v5e",
    ),
}

_LARGEST_HOST = 8  # TPU devices on one host


@dataclass(frozen=True)
class Target:
    """Machines and accelerators of a job.

    Attributes:
      name: as given, `a100x16=2x8`.
      platform: "CPU", "GPU" or "TPU".
      kind: the accelerator's entry in `GPUS` or `TPUS`.
      machines: how many of the machine type (one for a TPU slice, whatever its hosts).
      devices_per_machine: accelerators of each; 1 for a CPU.
      machine_type: Vertex AI's name.
      accelerator: Vertex AI's name, '' if the machine type says it or there is none.
      topology: of a TPU slice, '' where Vertex AI doesn't ask for it.
      memory_mib: of one device.
      quota: name of the quota that it takes `quota_units` of: devices, or a CPU's processors.
      flex_start: whether jobs can wait for it in the queue of the Dynamic Workload Scheduler.
      disk: type of the boot disks, '' where the job has no say in it.
      network: what its machines need to reach their network's speed, '' for nothing.
    """

    name: str
    platform: str
    kind: str
    machines: int
    devices_per_machine: int
    machine_type: str
    accelerator: str
    topology: str
    memory_mib: int
    quota: str
    flex_start: bool = False
    disk: str = ""
    network: str = ""

    @property
    def devices(self) -> int:
        """Replicas of the training step."""
        return self.machines * self.devices_per_machine

    @property
    def is_pod(self) -> bool:
        """Whether it is a TPU over several hosts."""
        return self.platform == "TPU" and self.devices > _LARGEST_HOST

    @property
    def strategy(self) -> str:
        """The `run.strategy` that uses all of it."""
        if self.platform == "TPU":
            return "tpu"
        if self.machines > 1:
            return "multi_worker"
        return "mirrored" if self.devices > 1 else "one_device" if self.platform == "GPU" else "cpu"

    @property
    def quota_units(self) -> int:
        """The amount of quota that it takes."""
        return self.cpus if self.platform == "CPU" else self.devices

    @property
    def cpus(self) -> int:
        """Processors of machines that take quota of their own for them, as N1's do; else 0."""
        if not self.machine_type.startswith("n1-"):
            return 0
        return self.machines * int(self.machine_type.rpartition("-")[2])

    @property
    def unit(self) -> str:
        """The name of one of its devices."""
        if self.platform == "TPU":
            return "TPU chip" if self.kind == "v5e" else "TPU core"
        return "machine" if self.platform == "CPU" else f"{self.kind.upper()} GPU"


def names() -> list[str]:
    """Every target on one machine or slice, from small to large within its kind."""
    gpus = [f"{kind}x{count}" for kind, gpu in GPUS.items() for count in sorted(gpu.machines)]
    return gpus + [f"{kind}-{size}" for kind, tpu in TPUS.items() for size in sorted(tpu.machines)]


def parse(text: str) -> Target:
    """The target of a name.

    Raises:
      UsageError: there is none of that name; says what there is.
    """
    gpu = re.fullmatch(r"([a-z0-9]+(?:-80|-mega)?)x(\d+)(?:=(\d+)x(\d+))?", text)
    if gpu and gpu[1] in GPUS:
        return _gpu_target(text, gpu[1], int(gpu[2]), gpu[3], gpu[4])
    tpu = re.fullmatch(r"(v\d+[a-z]?)-(\d+)", text)
    if tpu and tpu[1] in TPUS:
        return _tpu_target(text, tpu[1], int(tpu[2]))
    if tpu and tpu[1] in {"v4", "v5p"}:
        raise UsageError(f"--target={text}: Vertex AI has no TPU {tpu[1]} for training; take v5e")
    if tpu:
        raise UsageError(f"--target={text}: TensorFlow runs on TPU v2, v3 and v5e only; take v5e-8")
    close = difflib.get_close_matches(text.lower(), names(), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "give one as a100x8, l4x1, v5e-8 or cpux1"
    raise UsageError(f"--target={text} is no target; {hint}")


def _gpu_target(
    text: str, kind: str, total: int, machines: str | None, per_machine: str | None
) -> Target:
    gpu = GPUS[kind]
    sizes = sorted(gpu.machines)
    count, each = int(machines or 1), int(per_machine or total)
    if count * each != total or not total:
        raise UsageError(f"--target={text}: {count} machines of {each} are not {total}")
    if each not in gpu.machines:
        fitting = [size for size in sizes if total % size == 0]
        split = [f"{kind}x{total}={total // size}x{size}" for size in reversed(fitting)]
        exact = f"; take {' or '.join(split[:2])}" if split and total > 1 else ""
        raise UsageError(
            f"--target={text}: no machine has {each} of {kind}, there is "
            f"{', '.join(map(str, sizes))}{exact}"
        )
    return Target(
        name=text,
        platform="GPU" if gpu.api_name else "CPU",
        kind=kind,
        machines=count,
        devices_per_machine=each,
        machine_type=gpu.machines[each],
        accelerator=gpu.api_name,
        topology="",
        memory_mib=gpu.memory_mib,
        quota=f"custom_model_training_{gpu.quota}",
        flex_start=gpu.flex_start,
        disk=gpu.disk,
        network=gpu.network if count > 1 else "",
    )


def _tpu_target(text: str, kind: str, size: int) -> Target:
    tpu = TPUS[kind]
    if size not in tpu.machines:
        sizes = ", ".join(f"{kind}-{known}" for known in sorted(tpu.machines))
        raise UsageError(f"--target={text}: there is {sizes}")
    return Target(
        name=text,
        platform="TPU",
        kind=kind,
        machines=1,
        devices_per_machine=size,
        machine_type=tpu.machines[size],
        accelerator=tpu.api_name,
        topology=tpu.topologies.get(size, ""),
        memory_mib=tpu.memory_mib,
        quota=f"custom_model_training_{tpu.quota}",
        disk="" if tpu.machines[size] == _CLOUD_TPU else "pd-ssd",
    )
