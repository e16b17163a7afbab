"""Vertex AI's jobs through google-cloud-aiplatform, which is imported only here and only on use."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core import documents
from trainer.core.errors import PreemptedError, TrainerError, UsageError

ENDED = {
    "JOB_STATE_SUCCEEDED",
    "JOB_STATE_FAILED",
    "JOB_STATE_CANCELLED",
    "JOB_STATE_EXPIRED",
    "JOB_STATE_PARTIALLY_SUCCEEDED",
}

# What the trainer's exit codes mean for somebody who would start the job again.
HOPELESS = {
    2: "its command or config was wrong",
    3: "its data set could not be used",
    5: "it diverged",
}
# 134: SIGABRT's, with which a run ends that was to be preempted; Vertex AI itself starts it again,
# but no more than three times.
_GOES_ON = {PreemptedError.exit_code, 134}
# How it is told that there were no machines, or not any more.
_NO_MACHINES = re.compile(r"STOCKOUT|preempt|RESOURCE_EXHAUSTED|insufficient", re.IGNORECASE)


_REQUEST_SEC = 60.0


class ServiceError(TrainerError):
    """Vertex AI can't be reached, or refuses."""

    exit_code = 4


class JobFailedError(TrainerError):
    """A job ended without finishing its run; ends the process with the trainer's own code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class Job:
    """A job as Vertex AI has it.

    Attributes:
      name: projects/.../locations/.../customJobs/NUMBER.
      document: all of it, as the REST interface gives it.
    """

    name: str
    document: dict[str, Any]

    @property
    def state(self) -> str:
        """JOB_STATE_..."""
        return str(self.document.get("state", "JOB_STATE_UNSPECIFIED"))

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self.state in ENDED

    @property
    def error(self) -> str:
        """The error that Vertex AI reports, '' if none."""
        return str((self.document.get("error") or {}).get("message", ""))

    @property
    def exit_code(self) -> int | None:
        """The exit code of the replica that ended the job, if the error names one."""
        found = re.search(r"non-zero status of (\d{1,3})\b", self.error)
        return int(found[1]) if found else None

    @property
    def workdir(self) -> str:
        """The workdir of the job's run."""
        base = self.document.get("jobSpec", {}).get("baseOutputDirectory", {})
        return str(base.get("outputUriPrefix", "")).rstrip("/")

    @property
    def goes_on(self) -> bool:
        """Whether it ended so that another job would go on: its time was over, or its machines
        were gone. Not after a fault of its own, nor if somebody cancelled it."""
        if self.exit_code is not None:
            return self.exit_code in _GOES_ON
        expired = self.state == "JOB_STATE_EXPIRED"
        return expired or (
            self.state == "JOB_STATE_FAILED" and bool(_NO_MACHINES.search(self.error))
        )

    @property
    def why(self) -> str:
        """It ended, in a few words."""
        code = self.exit_code
        return f"code {code}" if code is not None else " ".join((self.error or self.state).split())

    def ended_how(self) -> JobFailedError | None:
        """The error that its end is, None if it finished."""
        if self.state == "JOB_STATE_SUCCEEDED":
            return None
        code = self.exit_code
        how = f"ended with code {code}" if code is not None else self.state
        text = f"{self.name} {how}" + (f": {self.error}" if self.error else "")
        if code is None or code in _GOES_ON:
            code = PreemptedError.exit_code
            text += f"; go on with `python -m trainer.submit resume {self.workdir or self.name}`"
        return JobFailedError(text, code)


@dataclass(frozen=True)
class Reference:
    """A job's full name in its parts."""

    project: str
    region: str
    number: str

    @classmethod
    def parse(cls, name: str) -> Reference | None:
        """The reference that a full name is, or None if it isn't one."""
        found = re.fullmatch(r"projects/([\w:.-]+)/locations/([\w-]+)/customJobs/(\d+)", name)
        return cls(*found.groups()) if found else None


class Service:
    """The jobs of a region.

    Args:
      project: of Google Cloud; '' for that of the user's credentials.
      region: as us-central1.
      endpoint: address of the service, '' for the region's own.

    Raises:
      UsageError: the extra is missing, or there are no credentials.
    """

    def __init__(self, project: str, region: str, endpoint: str = "") -> None:
        try:
            import google.auth
            from google.auth import credentials, exceptions
            from google.cloud import aiplatform_v1
        except ImportError:
            raise UsageError(
                "google-cloud-aiplatform is not installed; pip install 'stylegan-trainer[vertex]', "
                "or add --dry_run and take the gcloud command that it prints"
            ) from None
        self._types = aiplatform_v1
        self.region = region
        found: Any = credentials.AnonymousCredentials()  # never a token over plain HTTP
        if not endpoint.startswith("http://"):
            logging.getLogger("google.auth").setLevel(logging.ERROR)  # it is said below
            try:
                found, default = google.auth.default()
            except exceptions.DefaultCredentialsError:
                raise UsageError(
                    "no Google Cloud credentials; run gcloud auth application-default login"
                ) from None
            project = project or default or ""
        if not project:
            raise UsageError("no project: give --project, the Google Cloud project that pays")
        self.project = project
        self._client = aiplatform_v1.JobServiceClient(
            credentials=found,
            transport="rest",
            client_options={"api_endpoint": endpoint or f"{region}-aiplatform.googleapis.com"},
        )

    def create(self, job: Mapping[str, Any]) -> Job:
        """Starts a job.

        Raises:
          ServiceError, UsageError: Vertex AI doesn't take it.
        """
        message = self._types.CustomJob.from_json(json.dumps(job))
        parent = f"projects/{self.project}/locations/{self.region}"
        with _reported("start the job"):
            return self._job(self._client.create_custom_job(parent=parent, custom_job=message))

    def get(self, name: str) -> Job:
        """A job by its full name.

        Raises:
          ServiceError, UsageError: there is none, or Vertex AI doesn't answer.
        """
        with _reported(f"look at {name}", busy=True):
            return self._job(self._client.get_custom_job(name=name, timeout=_REQUEST_SEC))

    def _job(self, message: Any) -> Job:
        text = type(message).to_json(
            message, use_integers_for_enums=False, always_print_fields_with_no_presence=False
        )
        try:
            return Job(message.name, documents.parse_object(text))
        except documents.DocumentError as error:
            raise ServiceError(f"cannot read what Vertex AI answers: {error}") from None


@contextlib.contextmanager
def _reported(action: str, *, busy: bool = False) -> Iterator[None]:
    """Turns a failure into one line; `busy`: too many requests are no matter of quotas, but pass."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    hints: dict[type[Exception], str] = {
        exceptions.Forbidden: "the account needs the role Vertex AI User (roles/aiplatform.user)",
        exceptions.NotFound: "check the name, --project and --region",
        exceptions.TooManyRequests: "ask for more quota, or take another --region or --target",
        exceptions.Unauthenticated: "run gcloud auth application-default login",
    }
    try:
        yield
    except exceptions.ClientError as error:
        if busy and isinstance(error, exceptions.TooManyRequests):
            raise ServiceError(f"can't {action}: too many requests; try again later") from error
        hint = next((text for kind, text in hints.items() if isinstance(error, kind)), "")
        reason = re.sub(r"^[A-Z]+ http\S+: ", "", " ".join(str(error.message).split()))
        raise UsageError(
            f"Vertex AI won't {action}: {reason}" + (f"; {hint}" if hint else "")
        ) from error
    except (exceptions.GoogleAPICallError, GoogleAuthError, OSError) as error:
        raise ServiceError(
            f"can't {action}: {' '.join(str(error).split())}; try again later"
        ) from error
