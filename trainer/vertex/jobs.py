"""A custom job for Vertex AI from a config and a target: what fits, what it costs, what is sent.

Vertex AI starts a replica again that ends with another code than 0, whatever the reason, and ends
the job when `timeout` is over. So the trainer is told to stop by itself before (`run.max_hours`,
exit code 75), with a checkpoint that another job goes on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

import trainer
from trainer.core import config as config_lib
from trainer.core import storage
from trainer.core.config import BatchArithmetic, Config
from trainer.core.errors import ConfigError, UsageError
from trainer.vertex import sizes, targets
from trainer.vertex.sizes import Sizes
from trainer.vertex.targets import GPUS, Target

MAX_HOURS = 7 * 24  # Vertex AI ends every job after 7 days
SPARE_HOURS = 1.0  # between the trainer's own end and the job's: to start, compile and save
FOLDER = "submitted"  # in the workdir: what jobs were made from
MODULE = "trainer.task"

# Vertex AI's container that has Python and TensorFlow, by the first part of a region's name.
_PREBUILT = "{}-docker.pkg.dev/vertex-ai/training/tf-{}.2-17.py310:latest"
_CONTINENTS = {"europe": "europe", "asia": "asia", "australia": "asia", "me": "europe"}

# TensorFlow drives a TPU v5e through PJRT, and only if told so.
_V5E_ENV = {
    "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
    "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": "/lib/libtpu.so",
}
_RESERVED_ENV = re.compile(r"(AIP_|CLOUD_ML_|GOOGLE_|CLUSTER_SPEC$|TF_CONFIG$)")

_DISK = {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 200}  # images are several GB
_GIB = 1024
_TIGHT = 0.75  # share of the memory from which an estimate is worth a warning


@dataclass(frozen=True)
class Shape:
    """What must be known of the data set.

    Attributes:
      resolution: (height, width).
      channels: of the images.
      num_classes: of its labels.
      shards: record files; 0 if not known.
    """

    resolution: tuple[int, int]
    channels: int = 3
    num_classes: int = 0
    shards: int = 0


@dataclass(frozen=True)
class Request:
    """What the user asks for; checked by `plan` and `build`.

    Attributes:
      config: as loaded, `data.path` and `run.max_hours` included.
      config_name: of the file, for names and labels.
      shape: of the data set.
      target: where to run.
      workdir: gs:// directory of the run.
      image: container image, or '' for `package`.
      package: source distribution, for Vertex AI's prebuilt container.
      region, project: of Google Cloud; the project may be ''.
      display_name, service_account, network, tensorboard: as Vertex AI has them, '' for none.
      labels, env: more of each.
      spot: take Spot VMs.
    """

    config: Config
    config_name: str
    shape: Shape
    target: Target
    workdir: str
    image: str = ""
    package: str = ""
    region: str = "us-central1"
    project: str = ""
    display_name: str = ""
    service_account: str = ""
    network: str = ""
    tensorboard: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spot: bool = False

    @property
    def max_hours(self) -> float:
        """After which the trainer stops by itself."""
        return self.config.run.max_hours or MAX_HOURS - SPARE_HOURS

    @property
    def timeout_hours(self) -> float:
        """After which Vertex AI ends the job."""
        return min(self.max_hours + SPARE_HOURS, MAX_HOURS)

    @property
    def config_text(self) -> str:
        """The config as the job gets it."""
        return config_lib.to_yaml(self.config)

    @property
    def config_path(self) -> str:
        """Where the job finds it: a name that tells its content, so that no job changes another."""
        digest = hashlib.sha256(self.config_text.encode()).hexdigest()[:12]
        return storage.join(self.workdir, FOLDER, f"config-{digest}.yaml")

    @property
    def package_path(self) -> str:
        """Where the job finds the package."""
        if not self.package or storage.is_remote(self.package):
            return self.package
        return storage.join(self.workdir, FOLDER, self.package.rpartition("/")[2])


@dataclass(frozen=True)
class Plan:
    """How a config runs on a target.

    Attributes:
      config: resolved.
      arithmetic: its batch.
      sizes: its memory.
      warnings: what isn't wrong, but should be known.
    """

    config: Config
    arithmetic: BatchArithmetic
    sizes: Sizes
    warnings: tuple[str, ...]


# ------------------------------------------------------------------------------ what fits


def plan(config: Config, shape: Shape, target: Target) -> Plan:
    """Checks that a config runs on a target.

    Raises:
      ConfigError: it doesn't; says why, and what would.
    """
    resolved = config_lib.resolve(config, resolution=shape.resolution)
    try:
        return _try_plan(resolved, shape, target)
    except ConfigError as error:
        raise ConfigError(
            f"--target={target.name}: {error}; {_what_fits(resolved, shape, target)}"
        ) from None


def _try_plan(config: Config, shape: Shape, target: Target) -> Plan:
    _check_strategy(config, target)
    _check_precision(config, target)
    if shape.shards % target.machines:
        raise ConfigError(
            f"{shape.shards} shards don't divide over {target.machines} machines (trainer.convert "
            "makes another number with --shards)"
        )
    arithmetic = _arithmetic(config, target)
    found = _sizes(config, arithmetic, shape)
    share = found.total_mib / target.memory_mib
    if share > 1:
        raise ConfigError(
            f"{arithmetic.per_replica_batch} images on each device need about "
            f"{found.total_mib / _GIB:.1f} GiB, and one {target.unit} has "
            f"{target.memory_mib / _GIB:.0f}"
        )
    return Plan(config, arithmetic, found, tuple(_warnings(share, target)))


def _sizes(config: Config, arithmetic: BatchArithmetic, shape: Shape) -> Sizes:
    classes = shape.num_classes if config.data.use_labels else 0
    return sizes.estimate(
        config, arithmetic, shape.resolution, channels=shape.channels, num_classes=classes
    )


def _arithmetic(config: Config, target: Target) -> BatchArithmetic:
    """As for a run, in fewer words: what else would divide is told by `_what_fits`."""
    try:
        return config_lib.batch_arithmetic(config, target.devices)
    except ConfigError:
        batch, group = config.training.batch_size, config.model.mbstd_group_size
        shrink = config.training.pl_batch_shrink
        if config.training.pl_weight > 0 and int(group) % shrink:
            raise
        raise ConfigError(
            f"a batch of {batch} doesn't divide into {config.training.rounds} rounds x "
            f"{target.devices} replicas x groups of {group} images"
        ) from None


def _check_strategy(config: Config, target: Target) -> None:
    asked = config.run.strategy
    if asked not in ("auto", target.strategy):
        raise ConfigError(
            f"run.strategy = {asked!r} isn't for {target.name}, which runs {target.strategy!r}"
        )


def _check_precision(config: Config, target: Target) -> None:
    precision = config.run.precision
    if target.platform == "TPU" and precision in ("float16", "float64"):
        raise ConfigError(f"run.precision = {precision!r}: TPUs compute in bfloat16 or float32")
    if target.platform == "CPU" and precision == "float16":
        raise ConfigError("run.precision = 'float16' is far slower than float32 on a CPU")
    if target.platform == "GPU" and precision == "bfloat16" and not GPUS[target.kind].bfloat16:
        raise ConfigError(
            f"run.precision = 'bfloat16': a {target.unit} has float16 only (bfloat16 came with "
            "Ampere)"
        )


def _warnings(share: float, target: Target) -> list[str]:
    found = []
    if share > _TIGHT:
        found.append(
            f"memory is tight: about {share:.0%} by estimate; if it doesn't fit, raise "
            "training.rounds: the numbers stay the same"
        )
    if target.is_pod:
        found.append(
            "a TPU over several hosts needs an image made from Vertex AI's tf-tpu-pod-base, and "
            "was never tried with this trainer"
        )
    return found


def _fits(config: Config, shape: Shape, target: Target) -> bool:
    try:
        _try_plan(config, shape, target)
    except ConfigError:
        return False
    return True


def _what_fits(config: Config, shape: Shape, target: Target) -> str:
    """What to change: flags with which the target would do, or else other targets."""
    keys = _remedy(config, shape, target)
    if keys:
        return "it fits with " + " ".join(f"--set={key}={value}" for key, value in keys.items())
    others = [targets.parse(name) for name in targets.names()]
    others = [t for t in others if not (t.is_pod or t.spot_only) and _fits(config, shape, t)]
    if not others:
        batch = _fitting_batch(config, shape, target)
        return f"it fits with {batch}" if batch else "no target fits: take a smaller network"
    others.sort(key=lambda t: (t.kind != target.kind, t.platform != target.platform, -t.devices))
    return f"it fits on {', '.join(t.name for t in others[:3])}"


def _remedy(config: Config, shape: Shape, target: Target) -> dict[str, Any]:
    """The fewest changes that leave the result alone (up to rounding) and make the target fit."""
    run, batch = config.run, int(config.training.batch_size)
    precisions = [run.precision, "bfloat16", "float16", "float32"]
    strategy = run.strategy if run.strategy == target.strategy else "auto"
    share, rest = divmod(batch, int(config.model.mbstd_group_size) * target.devices)
    divisors = [] if rest else [n for n in range(1, share + 1) if share % n == 0]
    for precision in dict.fromkeys(precisions):
        for rounds in dict.fromkeys([config.training.rounds, *divisors]):
            changed = dataclasses.replace(
                config,
                run=dataclasses.replace(run, precision=precision, strategy=strategy),
                training=dataclasses.replace(config.training, rounds=rounds),
            )
            if _fits(changed, shape, target):
                pairs = {
                    "run.strategy": (run.strategy, strategy),
                    "run.precision": (run.precision, precision),
                    "training.rounds": (config.training.rounds, rounds),
                }
                return {key: new for key, (old, new) in pairs.items() if new != old}
    return {}


def _fitting_batch(config: Config, shape: Shape, target: Target) -> str:
    """The nearest batch size that the target takes; it changes the result."""
    group, batch = int(config.model.mbstd_group_size), int(config.training.batch_size)
    unit = group * target.devices * config.training.rounds
    for size in sorted(range(unit, 2 * batch + unit, unit), key=lambda size: abs(size - batch)):
        training = dataclasses.replace(config.training, batch_size=size)
        if _fits(dataclasses.replace(config, training=training), shape, target):
            return f"--set=training.batch_size={size}"
    return ""


# ------------------------------------------------------------------------------ what is sent


def build(request: Request) -> dict[str, Any]:
    """The CustomJob, as Vertex AI's REST interface takes it.

    Raises:
      UsageError: something in the request can't be right.
    """
    _check(request)
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
    spec: dict[str, Any] = {
        "workerPoolSpecs": pools,
        "scheduling": scheduling,
        "baseOutputDirectory": {"outputUriPrefix": request.workdir},
    }
    for key, value in {
        "serviceAccount": request.service_account,
        "network": request.network,
        "tensorboard": request.tensorboard,
    }.items():
        if value:
            spec[key] = value
    return {
        "displayName": request.display_name or f"{request.config_name}-{target.name}",
        "labels": _labels(request),
        "jobSpec": spec,
    }


def arguments(request: Request) -> list[str]:
    """The trainer's command line."""
    flags = {
        "config": request.config_path,
        "data": request.config.data.path,
        "workdir": request.workdir,
        "strategy": request.target.strategy,
        "max_run_hours": f"{request.max_hours:g}",
    }
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
    environment = dict(request.env)
    if target.kind == "v5e":
        environment = _V5E_ENV | environment
    if request.image:
        environment = {"TRAINER_IMAGE": request.image} | environment
    env = [{"name": name, "value": value} for name, value in environment.items()]
    args = arguments(request)
    pool: dict[str, Any] = {"machineSpec": machine, "replicaCount": str(replicas)}
    if target.machine_type != "cloud-tpu":
        pool["diskSpec"] = dict(_DISK)
    if request.image:
        # The image for TPU pods has an entry point of its own, which runs what it is given.
        command = ["python3", "-m", MODULE] if target.is_pod else []
        pool["containerSpec"] = {"imageUri": request.image, "args": command + args, "env": env}
    else:
        pool["pythonPackageSpec"] = {
            "executorImageUri": prebuilt_image(request.region, target),
            "packageUris": [request.package_path],
            "pythonModule": MODULE,
            "args": args,
            "env": env,
        }
    return pool


def prebuilt_image(region: str, target: Target) -> str:
    """Vertex AI's container with TensorFlow, near a region."""
    continent = _CONTINENTS.get(region.partition("-")[0], "us")
    return _PREBUILT.format(continent, "gpu" if target.platform == "GPU" else "cpu")


def _labels(request: Request) -> dict[str, str]:
    own = {
        "trainer": trainer.__version__,
        "config": request.config_name,
        "target": request.target.name,
    }
    clean = {key: re.sub(r"[^a-z0-9_-]", "-", value.lower())[:63] for key, value in own.items()}
    return clean | dict(request.labels)


# ------------------------------------------------------------------------------ mistakes

_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_REGION = re.compile(r"[a-z]+-[a-z]+\d+")
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_IMAGE = re.compile(
    r"(?P<name>[a-z0-9.-]+(?::\d+)?(?:/[a-z0-9._-]+)+)"
    r"(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def _check(request: Request) -> None:
    _check_places(request)
    _check_region(request)
    _check_code(request)
    _check_access(request)
    _check_times(request)
    _check_names(request)


def _check_places(request: Request) -> None:
    _check_bucket("workdir", request.workdir, "gs://BUCKET/runs/NAME")
    path = request.config.data.path
    if not path:
        raise UsageError("no data set: give --data, the gs:// directory that trainer.convert wrote")
    if not path.startswith("package:"):
        _check_bucket("data", path, "gs://BUCKET/DATASET")
    start = request.config.training.init_from
    if start:
        _check_bucket("set=training.init_from", start, "gs://BUCKET/runs/OTHER")
    if path.rstrip("/") == request.workdir.rstrip("/"):
        raise UsageError("--data and --workdir are the same; give the run a directory of its own")


def _check_bucket(flag: str, path: str, example: str) -> None:
    if not path.startswith("gs://"):
        raise UsageError(
            f"--{flag}={path}: a job on Vertex AI can't reach it; put it on Cloud Storage, as "
            f"{example}"
        )
    bucket, _, rest = path[len("gs://") :].partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise UsageError(f"--{flag}={path}: {bucket!r} can't be a bucket's name; as {example}")
    if not rest.strip("/"):
        raise UsageError(f"--{flag}={path} is a whole bucket; give a directory in it, as {example}")


def _check_region(request: Request) -> None:
    region = request.region
    if _ZONE.fullmatch(region):
        raise UsageError(f"--region={region} is a zone; give its region, {region[:-2]}")
    if not _REGION.fullmatch(region):
        raise UsageError(f"--region={region} is no region; give one as us-central1")


def _check_code(request: Request) -> None:
    image, package, target = request.image, request.package, request.target
    if bool(image) == bool(package):
        raise UsageError(
            "give --image, the container to run, or --package, the source distribution for Vertex "
            "AI's own container" + (", not both" if image else "")
        )
    if package:
        if target.platform == "TPU":
            raise UsageError(
                f"--package: Vertex AI has no container with this TensorFlow for {target.name}; "
                "build docker/Dockerfile.tpu and give --image"
            )
        if not package.endswith((".tar.gz", ".whl")):
            raise UsageError(
                f"--package={package} is no .tar.gz or .whl; python -m build makes one"
            )
        if not storage.is_remote(package) and not storage.isfile(package):
            raise UsageError(f"--package={package} is not there; python -m build makes it")
        return
    parts = _IMAGE.fullmatch(image)
    if not parts:
        raise UsageError(
            f"--image={image} is no image's name; as REGION-docker.pkg.dev/PROJECT/REPO/NAME@sha256:..."
        )
    if not parts["digest"] and parts["tag"] in (None, "latest"):
        raise UsageError(
            f"--image={image} may be another one when the job starts again; give the digest that "
            "the build printed (@sha256:...), or a tag that isn't latest"
        )


def _check_access(request: Request) -> None:
    account, network, board = request.service_account, request.network, request.tensorboard
    if account and not re.fullmatch(r"[a-z0-9.-]+@[a-z0-9.-]+\.gserviceaccount\.com", account):
        raise UsageError(
            f"--service_account={account} is no service account; as NAME@PROJECT.iam."
            "gserviceaccount.com"
        )
    if network and not re.fullmatch(r"projects/\d+/global/networks/[a-z0-9-]+", network):
        raise UsageError(
            f"--network={network}: Vertex AI wants projects/PROJECT_NUMBER/global/networks/NAME"
        )
    if not board:
        return
    found = re.fullmatch(r"projects/[\w:.-]+/locations/([\w-]+)/tensorboards/\d+", board)
    if not found:
        raise UsageError(
            f"--tensorboard={board}: Vertex AI wants projects/PROJECT/locations/REGION/"
            "tensorboards/NUMBER"
        )
    if found[1] != request.region:
        raise UsageError(f"--tensorboard is in {found[1]}, the job in {request.region}; take one")
    if not account:
        raise UsageError("--tensorboard needs --service_account, in whose name events are uploaded")


def _check_times(request: Request) -> None:
    target, hours, most = request.target, request.max_hours, MAX_HOURS - SPARE_HOURS
    if hours > most:
        raise UsageError(
            f"--max_run_hours={hours:g}: Vertex AI ends a job after {MAX_HOURS} hours, and the "
            f"trainer must stop before; give at most {most:g}, and `resume` it then"
        )
    if request.spot and target.is_pod:
        raise UsageError(
            f"--spot: Vertex AI has no Spot VMs for TPUs over several hosts; take {target.kind}-8, "
            "or leave it out"
        )
    if target.spot_only and not request.spot:
        raise UsageError(
            f"--target={target.name}: Vertex AI gives {target.machine_type} as Spot VM only; add "
            f"--spot, or take {target.kind}x8"
        )


def _check_names(request: Request) -> None:
    if len(request.display_name) > 128:
        raise UsageError("--display_name is longer than the 128 characters that Vertex AI takes")
    for key, value in request.labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            raise UsageError(
                f"--labels={key}={value}: a label's key and value are lower-case letters, digits, "
                "_ and -, 63 at most, the key beginning with a letter"
            )
    for name in request.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env={name}=...: {name!r} can't be the name of a variable")
        if _RESERVED_ENV.match(name):
            raise UsageError(f"--env={name}=...: Vertex AI sets {name} itself; leave it out")


# ------------------------------------------------------------------------------ what is told


def facts(request: Request, found: Plan, sec_per_kimg: float | None) -> list[tuple[str, str]]:
    """What the job will be and cost, each line with its name."""
    target, a = request.target, found.arithmetic
    shape = "x".join(map(str, (*request.shape.resolution, request.shape.channels)))
    rows = [
        ("target", _describe(target, request)),
        (
            "batch",
            f"{a.global_batch} images {shape} = {a.num_replicas} replicas x {a.rounds} rounds x "
            f"{a.per_replica_batch} ({a.groups_per_step} groups of {a.group_size})",
        ),
        (
            "memory",
            f"about {found.sizes.total_mib / _GIB:.1f} GiB of {target.memory_mib / _GIB:.0f} on "
            f"each {target.unit}, by estimate",
        ),
        *_cost(request, found, sec_per_kimg),
        (
            "time",
            f"the trainer saves and ends with 75 after {request.max_hours:g} h, Vertex AI ends the "
            f"job after {request.timeout_hours:g} h; `submit resume {request.workdir}` goes on",
        ),
        ("quota", f"{target.quota_units} of {_quota(request)} in {request.region}"),
    ]
    return rows + [("note", text) for text in found.warnings]


def _quota(request: Request) -> str:
    head, _, tail = request.target.quota.partition("training_")
    return f"{head}training_preemptible_{tail}" if request.spot else request.target.quota


def _describe(target: Target, request: Request) -> str:
    devices = {
        "CPU": "",
        "GPU": f" with {target.devices_per_machine} x {target.accelerator}",
        "TPU": f" with {target.devices_per_machine} {target.unit}s",
    }[target.platform]
    machine = f"{target.machines} x {target.machine_type}{devices}"
    kind = ", Spot" if request.spot else ""
    return f"{target.name}: {machine} in {request.region}{kind}, strategy {target.strategy}"


def _cost(request: Request, found: Plan, sec_per_kimg: float | None) -> list[tuple[str, str]]:
    target, total = request.target, found.config.training.total_kimg
    if sec_per_kimg is None:
        text = (
            f"not known: nobody has measured {request.config_name} on {target.name}; give "
            "--sec_per_kimg, from `trainer.probe step` there"
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


def known_speed(config_text: str, target: Target) -> float | None:
    """Seconds for 1000 images on a target, if the head of a config tells it.

    The head says `# s/kimg     2.1 on a100x8, 4.0 on v5e-8`.
    """
    for line in config_text.splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("# s/kimg"):
            for number, name in re.findall(r"(\d+(?:\.\d+)?) on ([a-z0-9=-]*[a-z0-9])", line):
                if name == target.name:
                    return float(number)
    return None


def to_yaml(job: Mapping[str, Any]) -> str:
    """What `gcloud ai custom-jobs create --config` reads: the job's spec alone."""
    return yaml.safe_dump(job["jobSpec"], sort_keys=False, width=2**20)


def to_json(job: Mapping[str, Any]) -> str:
    """What Vertex AI's REST interface takes."""
    return json.dumps(job, indent=2) + "\n"


def commands(request: Request, job: Mapping[str, Any], folder: str) -> list[str]:
    """What does the same with gcloud.

    Args:
      request: of the job.
      job: from `build`.
      folder: where `job.yaml` and `config.yaml` lie.
    """
    copies: list[Sequence[str]] = [[storage.join(folder, "config.yaml"), request.config_path]]
    if request.package_path != request.package:
        copies.append([request.package, request.package_path])
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
        f"--config={storage.join(folder, 'job.yaml')}",
    ]
    return [shlex.join(["gcloud", "storage", "cp", *pair]) for pair in copies] + [
        shlex.join(create)
    ]
