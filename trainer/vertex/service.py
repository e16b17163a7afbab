"""Vertex AI's jobs through google-cloud-aiplatform, which is imported only here and only on use."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import urllib.parse
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
_LOGGING = "https://logging.googleapis.com"


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
    def number(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]

    @property
    def created(self) -> str:
        """The time of its submission, as 2026-11-27 10:00:00, UTC; '' if not known."""
        return str(self.document.get("createTime", ""))[:19].replace("T", " ")

    @property
    def addresses(self) -> dict[str, str]:
        """Pages of Google's console about it, by what they show."""
        parts = Reference.parse(self.name)
        if parts is None:
            return {}
        console = "https://console.cloud.google.com"
        query = urllib.parse.quote(_log_filter(parts.number), safe="")
        return {
            "job": f"{console}/vertex-ai/locations/{parts.region}/training/{parts.number}"
            f"?project={parts.project}",
            "logs": f"{console}/logs/query;query={query}?project={parts.project}",
        }

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
            text += f"; go on with `python -m trainer submit resume {self.workdir or self.name}`"
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


def _log_filter(number: str) -> str:
    """The entries of a job in Cloud Logging."""
    return f'resource.type="ml_job" AND resource.labels.job_id="{number}"'


def login() -> tuple[Any, str]:
    """The user's credentials, and the project that they name, '' if none.

    Raises:
      UsageError: there are none.
    """
    import google.auth
    from google.auth import exceptions

    logging.getLogger("google.auth").setLevel(logging.ERROR)  # it is said below
    try:
        found, project = google.auth.default()
    except exceptions.DefaultCredentialsError:
        raise UsageError(
            "no Google Cloud credentials; run gcloud auth application-default login"
        ) from None
    return found, project or ""


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
            from google.auth import credentials
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
            found, default = login()
            project = project or default
        if not project:
            raise UsageError("no project: give --project, the Google Cloud project that pays")
        self.project = project
        self._credentials = found
        # One address stands for all of Google's services where it is none of theirs.
        self._logging = endpoint if endpoint.startswith("http://") else _LOGGING
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

    def jobs(self) -> list[Job]:
        """The trainer's jobs, the newest first.

        Raises:
          ServiceError, UsageError: Vertex AI doesn't answer, or refuses.
        """
        request = {
            "parent": f"projects/{self.project}/locations/{self.region}",
            "filter": "labels.trainer:*",
            "page_size": 100,
        }
        with _reported(f"list the jobs in {self.region}", busy=True):
            pages = self._client.list_custom_jobs(request=request, timeout=_REQUEST_SEC)
            found = [self._job(message) for message in pages]
        return sorted(found, key=lambda job: job.created, reverse=True)

    def cancel(self, job: Job) -> None:
        """Ends a job.

        Raises:
          ServiceError, UsageError: Vertex AI doesn't answer, or refuses.
        """
        with _reported(f"cancel {job.name}", busy=True):
            self._client.cancel_custom_job(name=job.name, timeout=_REQUEST_SEC)

    def log(self, job: Job) -> list[str]:
        """The newest lines that the machines of a job have logged, 1,000 at most, oldest first.

        Raises:
          ServiceError, UsageError: Cloud Logging doesn't answer, or refuses.
        """
        import requests
        from google.api_core import exceptions
        from google.auth.transport.requests import AuthorizedSession

        parts = Reference.parse(job.name)
        assert parts is not None
        body: dict[str, Any] = {
            "resourceNames": [f"projects/{parts.project}"],
            "filter": _log_filter(parts.number),
            "orderBy": "timestamp desc",
            "pageSize": 1000,
        }
        url = f"{self._logging}/v2/entries:list"
        with _reported(f"read the log of {job.name}", busy=True, role="logging.viewer"):
            try:
                with AuthorizedSession(self._credentials) as session:
                    answer = session.post(url, json=body, timeout=_REQUEST_SEC)
            except requests.RequestException as error:
                raise ServiceError(
                    f"can't read the log of {job.name}: {' '.join(str(error).split())}"
                ) from error
            if not answer.ok:
                raise exceptions.from_http_response(answer)
        try:
            entries = documents.parse_object(answer.text).get("entries", [])
        except documents.DocumentError as error:
            raise ServiceError(f"cannot read what Cloud Logging answers: {error}") from None
        entries = entries if isinstance(entries, list) else []
        return [_log_line(entry) for entry in reversed(entries) if isinstance(entry, dict)]

    def _job(self, message: Any) -> Job:
        text = type(message).to_json(
            message, use_integers_for_enums=False, always_print_fields_with_no_presence=False
        )
        try:
            return Job(message.name, documents.parse_object(text))
        except documents.DocumentError as error:
            raise ServiceError(f"cannot read what Vertex AI answers: {error}") from None


def _log_line(entry: Mapping[str, Any]) -> str:
    """An entry of Cloud Logging: time, machine and text."""
    payload, resource = entry.get("jsonPayload"), entry.get("resource")
    text = entry.get("textPayload") or (isinstance(payload, dict) and payload.get("message")) or ""
    labels = resource.get("labels") if isinstance(resource, dict) else None
    machine = labels.get("task_name", "") if isinstance(labels, dict) else ""
    time = str(entry.get("timestamp", ""))[:19].replace("T", " ")
    return f"{time} {machine} {str(text).rstrip()}"


@contextlib.contextmanager
def _reported(action: str, *, busy: bool = False, role: str = "aiplatform.user") -> Iterator[None]:
    """Turns a failure into one line.

    Args:
      action: that failed.
      busy: too many requests are no matter of quotas, but pass.
      role: that allows the action.
    """
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    hints: dict[type[Exception], str] = {
        exceptions.Forbidden: f"the account needs the role roles/{role}",
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
            f"Google Cloud won't {action}: {reason}" + (f"; {hint}" if hint else "")
        ) from error
    except (exceptions.GoogleAPICallError, GoogleAuthError, OSError) as error:
        raise ServiceError(
            f"can't {action}: {' '.join(str(error).split())}; try again later"
        ) from error
