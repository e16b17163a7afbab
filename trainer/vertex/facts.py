"""Size and cost of a job on Vertex AI, for the user to read before it is submitted."""

from __future__ import annotations

from trainer.core.text import image_size
from trainer.vertex.fit import Plan
from trainer.vertex.request import Request
from trainer.vertex.targets import GIB, Target


def facts(request: Request, found: Plan, sec_per_kimg: float | None) -> list[tuple[str, str]]:
    """Size and cost of the job, by name."""
    target, a = request.target, found.arithmetic
    shape = image_size(request.shape.resolution, request.shape.channels)
    rows = [
        ("target", _describe(target, request)),
        (
            "batch",
            f"{a.global_batch} images {shape} = {a.num_replicas} replicas x {a.rounds} rounds x "
            f"{a.per_replica_batch} ({a.global_batch // a.group_size} groups of {a.group_size})",
        ),
        (
            "memory",
            f"about {found.cost.total_mib / GIB:.1f} GiB of {target.memory_mib / GIB:.0f} on "
            f"each {target.unit}, by estimate",
        ),
        *_cost(request, found, sec_per_kimg),
        (
            "time",
            f"the trainer saves and ends with 75 after {request.max_hours:g} h, Vertex AI ends the "
            f"job after {request.timeout_hours:g} h; `submit watch --resume {request.workdir}` goes on",
        ),
        ("quota", _quota(request)),
    ]
    return rows + [("note", text) for text in found.warnings]


def _quota(request: Request) -> str:
    """The quota of the project that the job takes; preemptible machines have one of their own."""
    target = request.target
    if request.persistent_resource:
        return f"that of {request.persistent_resource}, whose machines are there already"
    wanted = {target.quota: target.quota_units}
    if target.cpus:
        wanted["custom_model_training_cpus"] = target.cpus
    preemptible = request.spot or request.max_wait_hours is not None
    new = "training_preemptible_" if preemptible else "training_"
    parts = [f"{n} of {name.replace('training_', new, 1)}" for name, n in wanted.items()]
    return f"{' and '.join(parts)} in {request.region}"


def _describe(target: Target, request: Request) -> str:
    devices = {
        "CPU": "",
        "GPU": f" with {target.devices_per_machine} x {target.accelerator}",
        "TPU": f" with {target.devices_per_machine} {target.unit}s",
    }[target.platform]
    machine = f"{target.machines} x {target.machine_type}{devices}"
    return (
        f"{target.name}: {machine} in {request.region}{_kind(request)}, strategy {target.strategy}"
    )


def _kind(request: Request) -> str:
    """The way in which the job gets its machines."""
    if request.spot:
        return ", Spot"
    if request.reservation:
        return f", reserved as {request.reservation.rpartition('/')[2]}"
    if request.persistent_resource:
        return f", of {request.persistent_resource}"
    if request.max_wait_hours is None:
        return ""
    return f", queued for {f'{request.max_wait_hours:g} h at most' if request.max_wait_hours else 'as long as it takes'}"


def _cost(request: Request, found: Plan, sec_per_kimg: float | None) -> list[tuple[str, str]]:
    target, total = request.target, found.config.training.total_kimg
    if sec_per_kimg is None:
        text = (
            "not known; give --sec_per_kimg, from `python -m trainer probe step` on "
            f"{target.name} or from the head of a preset"
        )
        return [("cost", text)]
    hours = sec_per_kimg * total / 3600
    jobs = -(-hours // request.max_hours)
    per_1000 = sec_per_kimg * 1000 / 3600 * target.devices
    return [
        (
            "cost",
            f"{per_1000:,.1f} {target.unit} hours for each 1,000 kimg, at {sec_per_kimg:g} s/kimg",
        ),
        (
            "run",
            f"{total:,g} kimg take {hours:,.1f} h, {hours * target.devices:,.0f} {target.unit} "
            f"hours, in {jobs:.0f} {'job' if jobs == 1 else 'jobs'}",
        ),
    ]
