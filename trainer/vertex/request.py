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
from trainer.vertex.fit import Shape
from trainer.vertex.targets import Target

MAX_HOURS = 7 * 24  # Vertex AI ends every job after 7 days
SPARE_HOURS = 1.0  # between the trainer's own end and the job's: to start, compile and save
FOLDER = "submitted"  # in the workdir: what jobs were made from

_RESERVED_ENV = re.compile(r"(AIP_|CLOUD_ML_|GOOGLE_|CLUSTER_SPEC$|TF_CONFIG$)")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_REGION = re.compile(r"[a-z]+-[a-z]+\d+")
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
        """The job's config, in a file named by its content, so that no job changes another's."""
        digest = hashlib.sha256(self.config_text.encode()).hexdigest()[:12]
        return storage.join(self.workdir, FOLDER, f"config-{digest}.yaml")

    @property
    def package_path(self) -> str:
        """Where the job finds the package."""
        if not self.package or storage.is_remote(self.package):
            return self.package
        return storage.join(self.workdir, FOLDER, self.package.rpartition("/")[2])


def check(request: Request) -> None:
    """Finds what can't be right, whatever the config.

    Raises:
      UsageError: something can't; says what to give.
    """
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
