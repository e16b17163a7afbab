"""A Vertex AI of our own: takes custom jobs over REST, and runs their replicas as processes here.

Requests are checked against Google's description of the interface. A replica gets the environment
that Vertex AI sets and the image's entry point. What its end means is as documented ("Understand the
custom training service", "Use Spot VMs"); where the documents leave it open, the worse is done:

- 0: the replica is finished; the job, when all are.
- 134 and 139 (SIGABRT, SIGSEGV): perhaps a fault of the machine. Started again, up to three times in
  a job, together with all others if the job asks for it, and not at all if it wants no retries.
- Any other code: the job has failed for good, also while its machines are being taken away.
- Spot VMs that are taken away: SIGTERM, and after 30 seconds SIGKILL. Then the whole job is started
  again, up to six times.
- `timeout` ends the job, as somebody may who cancels it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from tests.vertex import discovery

ROOT = pathlib.Path(__file__).parents[2]
RETRIES = 3  # after codes that may be a fault of the machine
PREEMPTIONS = 6  # after which the job is started again
GRACE_SEC = 30.0  # from SIGTERM to the end of a Spot VM
_TRANSIENT = {128 + signal.SIGABRT, 128 + signal.SIGSEGV}
_POLL_SEC = 0.05
_ENTRY_POINT = [sys.executable, "-m", "trainer.task"]
_JOBS = re.compile(r"/v1/(projects/([\w-]+)/locations/[\w-]+/customJobs)(?:/(\d+))?(:cancel)?")


class Replica:
    """One process of a job.

    Attributes:
      name: workerpool0-0.
      restarts: how often it was started again.
      codes: with which it ended.
    """

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], log: pathlib.Path):
        self.name, self.restarts = name, 0
        self.codes: list[int] = []
        self._command, self._env, self.log = command, dict(env), log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._env, stdout=log, stderr=subprocess.STDOUT
            )

    def poll(self) -> int | None:
        """Its code once it has ended, as a container's: 128 and the number of a signal."""
        assert self.process is not None
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def end(self, number: int = signal.SIGTERM, patience: float = 40) -> None:
        """Ends it as Vertex AI does: with a signal, and after a while with force."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RunningJob:
    """A job and what runs for it."""

    def __init__(
        self, document: dict[str, Any], environment: Mapping[str, str], folder: pathlib.Path
    ):
        self.document = document
        scheduling = document["jobSpec"].get("scheduling", {})
        self._retries = 0 if scheduling.get("disableRetries") else RETRIES
        self._together = scheduling.get("restartJobOnWorkerRestart", False)
        self._timeout = float(scheduling.get("timeout", "604800s").rstrip("s"))
        self.replicas = list(_replicas(document, environment, folder))
        self.preemptions = 0
        self._gone_at: float | None = None  # when machines that are being taken away will be gone
        self._stop = threading.Event()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        return str(self.document["state"])

    def wait(self, seconds: float) -> str:
        """Its state when it has ended."""
        self._thread.join(seconds)
        return self.state

    def preempt(self, grace_sec: float = GRACE_SEC) -> None:
        """Takes all machines away, as Spot VMs are: SIGTERM, and 30 seconds."""
        with self.lock:
            self._gone_at = time.monotonic() + grace_sec
            for replica in self.replicas:
                if replica.process and replica.process.poll() is None:
                    replica.process.send_signal(signal.SIGTERM)

    def take_away(self) -> None:
        """The rest of `preempt`, without waiting for the time of grace to end."""
        with self.lock:
            self._gone_at = time.monotonic()

    def cancel(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for replica in self.replicas:
            replica.start()
        self.document["state"] = "JOB_STATE_RUNNING"
        try:
            self.document["state"] = self._watch()
        finally:
            for replica in self.replicas:
                replica.end()

    def _watch(self) -> str:
        end = time.monotonic() + self._timeout
        while not self._stop.is_set():
            time.sleep(_POLL_SEC)
            if time.monotonic() > end:
                return "JOB_STATE_EXPIRED"
            with self.lock:
                state = self._look()
            if state:
                return state
        return "JOB_STATE_CANCELLED"

    def _look(self) -> str:
        """The state that the job has ended in, '' if it goes on."""
        if self._gone_at is not None and time.monotonic() >= self._gone_at:
            return self._after_preemption()
        codes = [replica.poll() for replica in self.replicas]
        if all(code == 0 for code in codes):
            return "JOB_STATE_SUCCEEDED"
        for replica, code in zip(self.replicas, codes, strict=True):
            if not code:
                continue
            replica.codes.append(code)
            if code not in _TRANSIENT or self._retries == 0:
                return self._failed(
                    3,
                    f"The replica {replica.name} exited with a non-zero status of {code}. To find "
                    "out more about why your job exited please check the logs.",
                )
            self._retries -= 1
            self._restart(self.replicas if self._together else [replica])
            break
        return ""

    def _after_preemption(self) -> str:
        self._gone_at = None
        self.preemptions += 1
        for replica in self.replicas:
            replica.end(signal.SIGKILL)
        if self.preemptions > PREEMPTIONS:
            return self._failed(8, "The job was preempted, and could not be restarted: STOCKOUT.")
        self._restart(self.replicas)
        return ""

    def _failed(self, code: int, message: str) -> str:
        self.document["error"] = {"code": code, "message": message}
        return "JOB_STATE_FAILED"

    @staticmethod
    def _restart(replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            replica.end()
        for replica in replicas:
            replica.restarts += 1
            replica.start()


def _replicas(
    document: dict[str, Any], environment: Mapping[str, str], folder: pathlib.Path
) -> list[Replica]:
    """The processes of a job with their environments."""
    spec = document["jobSpec"]
    pools = spec["workerPoolSpecs"]
    counts = [int(pool.get("replicaCount", 1)) for pool in pools]
    ports = iter(_free_ports(sum(counts)))
    hosts = [[f"localhost:{next(ports)}" for _ in range(count)] for count in counts]
    base = spec["baseOutputDirectory"]["outputUriPrefix"].rstrip("/")
    number = document["name"].rpartition("/")[2]
    common = {
        "AIP_CHECKPOINT_DIR": f"{base}/checkpoints/",
        "AIP_MODEL_DIR": f"{base}/model/",
        "AIP_TENSORBOARD_LOG_DIR": f"{base}/logs/",
        "CLOUD_ML_JOB_ID": number,
        "CLOUD_ML_PROJECT_ID": document["name"].split("/")[1],
    }
    found = []
    for pool_number, pool in enumerate(pools):
        for index in range(counts[pool_number]):
            task = {"type": f"workerpool{pool_number}", "index": index, "trial": ""}
            cluster = {f"workerpool{i}": each for i, each in enumerate(hosts)}
            variables = common | {
                "CLUSTER_SPEC": json.dumps(
                    {"cluster": cluster, "environment": "cloud", "task": task, "job": "{}"}
                )
            }
            if len(pools) > 1:
                jobs = dict(zip(("chief", "worker"), hosts, strict=False))
                kind = ("chief", "worker")[pool_number]
                variables["TF_CONFIG"] = json.dumps(
                    {"cluster": jobs, "task": {"type": kind, "index": index}}
                )
            container = pool["containerSpec"]
            variables |= {pair["name"]: pair["value"] for pair in container.get("env", [])}
            name = f"workerpool{pool_number}-{index}"
            log = folder / f"{number}-{name}.log"
            command = [*_ENTRY_POINT, *container.get("args", [])]
            found.append(Replica(name, command, dict(environment) | variables, log))
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


class Vertex:
    """The service, while the context is open.

    Args:
      folder: for the replicas' logs.
      environment: of the replicas, beside what Vertex AI sets.
      run: whether jobs run; else they stay as they are put.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        environment: Mapping[str, str] | None = None,
        *,
        run: bool = True,
    ) -> None:
        self.folder, self.environment = folder, dict(environment or os.environ)
        self.runs = run
        self.documents: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, RunningJob] = {}
        self.requests: list[dict[str, Any]] = []
        self.entries: dict[str, list[Any]] = {}  # of Cloud Logging, by a job's number
        self.refuse: tuple[int, str] | None = None
        self.silent = 0  # so many of the next requests get no answer but 503
        vertex = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*(vertex.busy() or vertex.get(self.path)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(*(vertex.busy() or vertex.post(self.path, json.loads(body or b"{}"))))

            def _answer(self, code: int, document: dict[str, Any]) -> None:
                data = json.dumps(document).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
        self.endpoint = f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> Vertex:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs.values():
            job.cancel()
        self._server.shutdown()
        self._server.server_close()

    def busy(self) -> tuple[int, dict[str, Any]] | None:
        """The answer of a service that has none."""
        if not self.silent:
            return None
        self.silent -= 1
        return _error(503, "The service is currently unavailable.", "UNAVAILABLE")

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """A job, or a page of two of those that have a label."""
        path, _, query = path.partition("?")
        name = path.removeprefix("/v1/")
        if name.endswith("/customJobs"):
            options = urllib.parse.parse_qs(query)
            (label,) = re.findall(r"^labels\.(\w+):\*$", options["filter"][0])
            found = [
                document
                for job, document in self.documents.items()
                if job.startswith(f"{name}/") and label in document.get("labels", {})
            ]
            start = int(options.get("pageToken", ["0"])[0])
            more = {"nextPageToken": str(start + 2)} if found[start + 2 :] else {}
            return 200, {"customJobs": found[start : start + 2]} | more
        if name in self.documents:
            return 200, self.documents[name]
        return _error(404, f"{name} was not found", "NOT_FOUND")

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A new job, or the end of one; or entries of Cloud Logging, the newest first."""
        if path == "/v2/entries:list":
            if self.refuse:
                return _error(*self.refuse, "REFUSED")
            job = re.fullmatch(
                r'resource\.type="ml_job" AND resource\.labels\.job_id="(\d+)"', body["filter"]
            )
            assert job and body["orderBy"] == "timestamp desc"
            return 200, {"entries": self.entries.get(job[1], [])[::-1][: body["pageSize"]]}
        found = _JOBS.fullmatch(path.partition("?")[0])
        if not found:
            return _error(404, f"no such method: {path}", "NOT_FOUND")
        if found[4]:
            name = f"{found[1]}/{found[3]}"
            if self.runs:
                self.jobs[name].cancel()
            else:
                self.documents[name]["state"] = "JOB_STATE_CANCELLED"
            return 200, {}
        if self.refuse:
            return _error(*self.refuse, "REFUSED")
        body = _with_names(body)
        problems = discovery.problems(body)
        if problems:
            return _error(400, "; ".join(problems), "INVALID_ARGUMENT")
        self.requests.append(body)
        name = f"{found[1]}/{len(self.requests)}"
        document = json.loads(json.dumps(body)) | {
            "name": name,
            "state": "JOB_STATE_PENDING",
            "createTime": f"2026-11-27T10:00:{len(self.requests):02d}.123456Z",
        }
        self.documents[name] = document
        if self.runs:
            self.jobs[name] = RunningJob(document, self.environment, self.folder)
        return 200, document


def _with_names(body: dict[str, Any]) -> dict[str, Any]:
    """A request with names where Google's Python client sends the numbers of an enumeration."""
    from google.cloud import aiplatform_v1

    for pool in body.get("jobSpec", {}).get("workerPoolSpecs", []):
        machine = pool.get("machineSpec", {})
        kind = machine.get("acceleratorType")
        if isinstance(kind, int):
            machine["acceleratorType"] = aiplatform_v1.AcceleratorType(kind).name
        reserved = machine.get("reservationAffinity", {})
        if isinstance(reserved.get("reservationAffinityType"), int):
            number = reserved["reservationAffinityType"]
            reserved["reservationAffinityType"] = aiplatform_v1.ReservationAffinity.Type(
                number
            ).name
    scheduling = body.get("jobSpec", {}).get("scheduling", {})
    if isinstance(scheduling.get("strategy"), int):
        scheduling["strategy"] = aiplatform_v1.Scheduling.Strategy(scheduling["strategy"]).name
    return body


def _error(code: int, message: str, status: str) -> tuple[int, dict[str, Any]]:
    return code, {"error": {"code": code, "message": message, "status": status}}
