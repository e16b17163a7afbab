"""A user's request for a job on Vertex AI, and the mistakes that can be in it.

Vertex AI ends a job when `timeout` is over, and for good after most exit codes; see `vertex.watch`.
So the trainer is told to stop by itself before (`run.max_hours`, exit code 75), with a checkpoint
that another job goes on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer import config as config_lib
from trainer.config import Config
from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.vertex import regions
from trainer.vertex.fit import Shape
from trainer.vertex.targets import Target

MAX_HOURS = 7 * 24  # Vertex AI ends every job after 7 days
SPARE_HOURS = 1.0  # between the trainer's own end and the job's: to start, compile and save
FOLDER = "submitted"  # in the workdir: what jobs were made from

JOIN_HOURS = 12.0  # machines of a job start as they become available

_MAX_ENV = 100
_RESERVED_ENV = re.compile(r"(AIP_|CLOUD_ML_|CLUSTER_SPEC$|TF_CONFIG$|TRAINER_IMAGE$)")
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_IMAGE = re.compile(
    r"(?P<name>[a-z0-9.-]+(?::\d+)?(?:/[a-z0-9._-]+)+)"
    r"(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Request:
    """A request for a job; see `check`.

    Attributes:
      config: as loaded, `data.path` and `run.max_hours` included.
      config_name: of the file, for names and labels.
      shape: of the data set.
      target: where to run.
      workdir: gs:// directory of the run.
      image: container image.
      region, project: of Google Cloud; the project may be ''.
      display_name, service_account, network, tensorboard: as Vertex AI has them, '' for none.
      kms_key: key of Cloud KMS that encrypts what the job keeps, '' for Google's own.
      reservation: machines that were reserved, by their full name, '' for none.
      persistent_resource: ID of machines that stay between jobs, '' for none.
      labels, env: more of each.
      spot: take Spot VMs.
      max_wait_hours: how long the job waits in the queue of the Dynamic Workload Scheduler, 0 for
        ever; None: it doesn't wait there.
      web_access: open a shell into the containers to those who may use it.
    """

    config: Config
    config_name: str
    shape: Shape
    target: Target
    workdir: str
    image: str = ""
    region: str = "us-central1"
    project: str = ""
    display_name: str = ""
    service_account: str = ""
    network: str = ""
    tensorboard: str = ""
    kms_key: str = ""
    reservation: str = ""
    persistent_resource: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spot: bool = False
    max_wait_hours: float | None = None
    web_access: bool = False

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
        """The job's config, in a file named by its content, so that no job changes another's."""
        digest = hashlib.sha256(self.config_text.encode()).hexdigest()[:12]
        return storage.join(self.workdir, FOLDER, f"config-{digest}.yaml")


def check(request: Request) -> None:
    """Finds what can't be right, whatever the config.

    Raises:
      UsageError: something can't; says what to give.
    """
    _check_places(request)
    regions.check(request.target, request.region)
    _check_image(request)
    _check_config(request)
    _check_access(request)
    _check_machines(request)
    _check_names(request)


def _check_places(request: Request) -> None:
    _check_bucket("workdir", request.workdir, "gs://BUCKET/runs/NAME")
    path = request.config.data.path
    if not path:
        raise UsageError(
            "no data set: give --data, the gs:// directory that `python -m trainer convert` wrote"
        )
    if not path.startswith("package:"):
        _check_bucket("data", path, "gs://BUCKET/DATASET")
    config = request.config
    for key, value, example in (
        ("training.init_from", config.training.init_from, "gs://BUCKET/runs/OTHER"),
        ("checkpoint.export_dir", config.checkpoint.export_dir, "gs://BUCKET/models/NAME"),
        ("telemetry.tensorboard_dir", config.telemetry.tensorboard_dir, "gs://BUCKET/events/NAME"),
    ):
        if value:
            _check_bucket(f"set={key}", value, example)
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


def _check_image(request: Request) -> None:
    image, target = request.image, request.target
    if not image:
        raise UsageError("give --image, the container to run: cloudbuild.yaml builds it")
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
    # The names that cloudbuild.yaml gives.
    made_for = re.search(r"(?:^|[-_/])(gpu|tpu)(?:[-_]pod)?$", parts["name"])
    if made_for and (made_for[1] == "tpu") != (target.platform == "TPU"):
        raise UsageError(
            f"--image={image} is for {made_for[1].upper()}s by its name, and --target={target.name} "
            f"has {'a TPU' if target.platform == 'TPU' else 'none'}; give the image for it"
        )


def _check_config(request: Request) -> None:
    run, target = request.config.run, request.target
    if run.tpu and (target.platform != "TPU" or run.tpu != "local"):
        raise UsageError(
            f"run.tpu = {run.tpu!r}: a job trains on the machines of its --target; leave it out"
        )
    if run.cpu_replicas > 1 and target.platform != "CPU":
        raise UsageError(
            f"run.cpu_replicas = {run.cpu_replicas}: --target={target.name} trains on its "
            f"{target.unit}s; leave it out"
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
    key = request.kms_key
    found = re.fullmatch(
        r"projects/[\w:.-]+/locations/([\w-]+)/keyRings/[\w-]+/cryptoKeys/[\w-]+", key
    )
    if key and not found:
        raise UsageError(
            f"--kms_key={key}: Vertex AI wants projects/PROJECT/locations/REGION/keyRings/RING/"
            "cryptoKeys/KEY"
        )
    if found and found[1] != request.region:
        raise UsageError(f"--kms_key is in {found[1]}, the job in {request.region}; take one")
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


def _check_machines(request: Request) -> None:
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
    if request.max_wait_hours is not None and not target.flex_start:
        raise UsageError(
            f"--queue=flex: Vertex AI has it for L4, A100, H100, H200 and B200 GPUs, not for "
            f"{target.name}; leave it out, or take another target"
        )
    chosen = {
        "--spot": request.spot,
        "--queue=flex": request.max_wait_hours is not None,
        "--reservation": bool(request.reservation),
        "--persistent_resource": bool(request.persistent_resource),
    }
    names = [name for name, given in chosen.items() if given]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} are different ways to get machines; give one")
    _check_reservation(request)
    resource = request.persistent_resource
    if resource and not re.fullmatch(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", resource):
        raise UsageError(
            f"--persistent_resource={resource}: Vertex AI wants its ID alone: lower-case letters, "
            "digits and -, 63 at most"
        )
    if resource and target.platform == "TPU":
        raise UsageError("--persistent_resource: Vertex AI has none with TPUs; leave it out")


def _check_reservation(request: Request) -> None:
    name, target = request.reservation, request.target
    if not name:
        return
    if target.platform != "GPU":
        raise UsageError(f"--reservation is for machines with GPUs, not for {target.name}")
    found = re.fullmatch(
        r"projects/[\w:.-]+/zones/([a-z]+-[a-z]+\d+)-[a-z]/reservations/[a-z][a-z0-9-]*"
        r"(?:/reservationBlocks/[\w-]+(?:/reservationSubBlocks/[\w-]+)?)?",
        name,
    )
    if not found:
        raise UsageError(
            f"--reservation={name}: Vertex AI wants projects/PROJECT/zones/ZONE/reservations/NAME"
        )
    if found[1] != request.region:
        raise UsageError(f"--reservation is in {found[1]}, the job in {request.region}; take one")


def _check_names(request: Request) -> None:
    if len(request.display_name) > 128:
        raise UsageError("--display_name is longer than the 128 characters that Vertex AI takes")
    for key, value in request.labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            raise UsageError(
                f"--labels={key}={value}: a label's key and value are lower-case letters, digits, "
                "_ and -, 63 at most, the key beginning with a letter"
            )
    if len(request.env) > _MAX_ENV - 3:  # the trainer adds up to three
        raise UsageError(f"--env: Vertex AI takes {_MAX_ENV} variables at most; give fewer")
    for name in request.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env={name}=...: {name!r} can't be the name of a variable")
        if _RESERVED_ENV.match(name):
            raise UsageError(f"--env={name}=...: {name} is set for the job already; leave it out")
        if name == "GOOGLE_APPLICATION_CREDENTIALS":
            raise UsageError(
                f"--env={name}=...: a job has no key file; give --service_account, whose rights it "
                "then has"
            )
