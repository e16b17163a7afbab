"""Runs a config as a job on Vertex AI: --config, --target, --image.

    python -m trainer submit --config=C --target=T --image=I --data=gs://D --workdir=gs://W
    python -m trainer submit ... --dry_run        prints the job, and starts nothing
    python -m trainer submit resume JOB|WORKDIR   starts a job that ended with 75 again
    python -m trainer submit watch JOB|WORKDIR    follows a job and its run
    python -m trainer submit watch --resume ...   and starts it again as often as it takes
    python -m trainer submit logs JOB|WORKDIR     prints what its machines have logged
    python -m trainer submit cancel JOB|WORKDIR   ends a job; its run saves before
    python -m trainer submit list                 lists the trainer's jobs of a region

Targets: a100x1 a100x8 a100x16=2x8 a100-80x8 h100x8 h100-megax8 h200x8 b200x8 rtx6000x1 l4x1 v100x8
t4x1, v5e-8 v3-8 v2-8 v3-32, cpux1.
JOB is a job's full name or its number, WORKDIR the run's gs:// directory.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from trainer.core import flags

if __name__ == "__main__":
    flags.guard_imports()

from absl import flags as absl_flags

from trainer import config as config_lib
from trainer.config import Config, presets
from trainer.core import documents, storage
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.core.text import parse_image_size, printable, shorten
from trainer.data import manifest as manifest_lib
from trainer.vertex import facts, fit, jobs, service, targets
from trainer.vertex import watch as watching
from trainer.vertex.fit import Shape
from trainer.vertex.request import FOLDER, Request

FLAGS = absl_flags.FLAGS

_RECORD = "job.json"
_SLOW_SEC = 5.0  # after which a bucket that doesn't answer is worth a word


def define_flags(values: absl_flags.FlagValues = FLAGS) -> None:
    """The command's flags."""
    text = functools.partial(absl_flags.DEFINE_string, flag_values=values)
    several = functools.partial(absl_flags.DEFINE_multi_string, flag_values=values)
    real = functools.partial(absl_flags.DEFINE_float, flag_values=values)
    yes = functools.partial(absl_flags.DEFINE_boolean, flag_values=values)
    text("config", None, "Preset, or YAML file, local or gs://; list shows the presets.")
    several("set", [], "section.key=value, overrides the config.")
    text("target", None, "Where to run: a100x8, a100x16=2x8, v5e-8, ...")
    text("image", None, "Container image, with its digest.")
    text("data", None, "gs:// directory of the converted data set; overrides data.path.")
    text("workdir", None, "gs:// directory of the run.")
    text("resolution", None, "Of the images, 256 or WIDTHxHEIGHT, instead of asking --data.")
    yes("spot", False, "Take Spot VMs: far cheaper, and taken away at any time.")
    text("queue", None, "'flex' waits until all machines are there; GPUs only.")
    text("max_wait", None, "With --queue=flex: how long, as 90m, 12h or 2d (1d); 0 for ever.")
    text("reservation", "", "projects/PROJECT/zones/ZONE/reservations/NAME to take machines from.")
    text("persistent_resource", "", "ID of the persistent resource to run on.")
    real("max_run_hours", None, "Save and stop with 75 after so many hours; at most 167.")
    real("sec_per_kimg", None, "Measured seconds for 1000 images, for the cost.", 1e-6)
    text("project", "", "Google Cloud project; that of your credentials by default.")
    text("region", "us-central1", "Where to run; best where the data are.")
    text("display_name", "", "Of the job; CONFIG-TARGET by default.")
    text("service_account", "", "In whose name the job runs.")
    text("network", "", "projects/NUMBER/global/networks/NAME to peer with.")
    text("tensorboard", "", "Vertex AI TensorBoard instance that gets the events.")
    text("kms_key", "", "projects/.../cryptoKeys/KEY that encrypts what the job keeps.")
    yes("web_access", False, "Let those who may open a shell in the job's containers.")
    several("labels", [], "KEY=VALUE for bills and searches.")
    several("env", [], "NAME=VALUE for the container.")
    text("endpoint", "", "Address of Vertex AI, for private networks.")
    yes("dry_run", False, "Print the job as JSON, YAML and gcloud command, and start nothing.")
    text("out", None, "With --dry_run: directory for job.json, job.yaml and config.yaml.")
    real("poll_sec", 30.0, "watch: seconds between two looks.", 0.1)
    yes("resume", False, "watch: submit again if the time was over or machines were taken away.")
    absl_flags.DEFINE_integer(
        "max_resumes", 20, "watch --resume: how often at most.", 1, flag_values=values
    )


def main(argv: Sequence[str]) -> None:
    """Does what the first word names; without one, submits."""
    if FLAGS.config == "list":
        print(presets.listing())
        return
    words = list(argv[1:])
    if not words:
        submit()
        return
    actions: dict[str, Callable[[str], None]] = {
        "resume": resume,
        "watch": watch,
        "logs": logs,
        "cancel": cancel,
    }
    if words == ["list"]:
        list_jobs()
        return
    if words[0] not in actions:
        names = [*actions, "list"]
        close = difflib.get_close_matches(words[0], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give {', '.join(names)}, or only flags"
        raise UsageError(f"{words[0]!r} is nothing to do; {hint}")
    if len(words) != 2:
        raise UsageError(f"{words[0]} what? Give a job's name or number, or its run's workdir")
    actions[words[0]](words[1])


# ------------------------------------------------------------------------------------ submit


def submit() -> None:
    """Starts the job that the flags describe, or prints it."""
    request, speed = _request()
    found = fit.plan(request.config, request.shape, request.target)
    job = jobs.build(request)
    _print_rows(facts.facts(request, found, speed))
    if FLAGS.dry_run:
        if storage.is_remote(request.config.data.path) and not FLAGS.resolution:
            _print_rows(_distant_buckets(request))
        _print_job(request, job)
        return
    client = service.Service(request.project, request.region, FLAGS.endpoint)
    _print_rows(_distant_buckets(request))
    _check_free(request.workdir, client)
    storage.write_text_atomic(request.config_path, request.config_text)
    _start(client, job, request.workdir)


def _request() -> tuple[Request, float | None]:
    """The requested job, and the target's speed if it is known."""
    missing = [name for name in ("config", "target", "workdir") if not FLAGS[name].value]
    if missing:
        flags_text = " and ".join(f"--{name}" for name in missing)
        raise UsageError(f"{flags_text} {'is' if len(missing) == 1 else 'are'} needed; see --help")
    if FLAGS.out and not FLAGS.dry_run:
        raise UsageError("--out goes with --dry_run, which starts nothing")
    target = targets.parse(FLAGS.target)
    config = _config()
    request = Request(
        config=config,
        config_name=_stem(FLAGS.config),
        shape=_shape(config),
        target=target,
        workdir=storage.resolve(FLAGS.workdir).rstrip("/"),
        image=FLAGS.image or "",
        region=FLAGS.region,
        project=FLAGS.project,
        display_name=FLAGS.display_name,
        service_account=FLAGS.service_account,
        network=FLAGS.network,
        tensorboard=FLAGS.tensorboard,
        labels=_pairs("labels"),
        env=_pairs("env"),
        spot=FLAGS.spot,
        kms_key=FLAGS.kms_key,
        reservation=FLAGS.reservation,
        persistent_resource=FLAGS.persistent_resource,
        max_wait_hours=_max_wait_hours(),
        web_access=FLAGS.web_access,
    )
    return request, FLAGS.sec_per_kimg


def _config() -> Config:
    overrides = list(FLAGS.set)
    if FLAGS.data:
        overrides.append(f"data.path={FLAGS.data}")
    if FLAGS.max_run_hours is not None:
        overrides.append(f"run.max_hours={FLAGS.max_run_hours}")
    return config_lib.load(FLAGS.config, overrides)


def _max_wait_hours() -> float | None:
    """The wait in the queue that the flags ask for, None if they ask for none."""
    queue, wait = FLAGS.queue, FLAGS.max_wait
    if queue not in (None, "flex"):
        raise UsageError(f"--queue={queue}: there is flex alone; leave it out to start at once")
    if wait is None:
        return 24.0 if queue else None
    if not queue:
        raise UsageError("--max_wait goes with --queue=flex")
    found = re.fullmatch(r"(\d{1,6})([mhd])|0", wait)
    if not found:
        raise UsageError(f"--max_wait={wait} is no time to wait; as 90m, 12h or 2d, or 0 for ever")
    hours = {"m": 1 / 60, "h": 1.0, "d": 24.0}
    if not found[2]:
        return 0.0
    if not int(found[1]):
        raise UsageError(f"--max_wait={wait}: give 0 to wait for ever")
    return int(found[1]) * hours[found[2]]


def _stem(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name or "run"


def _shape(config: Config) -> Shape:
    """The shape of the images: from --resolution, or from the data set's manifest."""
    if FLAGS.resolution:
        return Shape(parse_image_size(FLAGS.resolution, "--resolution"))
    if not config.data.path:
        raise UsageError(
            "no data set: give --data, the gs:// directory that `python -m trainer convert` wrote"
        )
    impatience = threading.Timer(_SLOW_SEC, _say_slow, [config.data.path])
    impatience.daemon = True
    impatience.start()
    try:
        manifest = manifest_lib.load(storage.resolve(config.data.path))
    except StorageError as error:
        raise DataError(f"{error}; or give --resolution, and the data set isn't asked") from None
    finally:
        impatience.cancel()
    return Shape(
        manifest.resolution,
        manifest.channels,
        len(manifest.condition_counts(config.data.use_labels)),
        len(manifest.shards),
    )


def _say_slow(path: str) -> None:
    print(
        f"{printable(path)} doesn't answer yet; with --resolution=WIDTHxHEIGHT it isn't asked",
        file=sys.stderr,
        flush=True,
    )


def _pairs(flag: str) -> dict[str, str]:
    found = {}
    for text in FLAGS[flag].value:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--{flag}={text}: expected KEY=VALUE")
        if key in found:
            raise UsageError(f"--{flag}={text}: {key} is given twice")
        found[key] = value
    return found


def _distant_buckets(request: Request) -> list[tuple[str, str]]:
    """Notes on buckets that are not in the job's region."""
    rows = []
    paths = (request.workdir, request.config.data.path)
    buckets = (path.split("/")[2] for path in paths if path.startswith("gs://"))
    for bucket in dict.fromkeys(buckets):
        try:
            location = storage.bucket_location(f"gs://{bucket}")
        except StorageError as error:
            rows.append(("note", f"whether gs://{bucket} is in {request.region}: {error}"))
            continue
        if location not in ("", request.region):
            rows.append(
                (
                    "note",
                    f"gs://{bucket} is in {location}, the job in {request.region}: reading from "
                    "there is slower, may cost, and Vertex AI wants a bucket of the job's region",
                )
            )
    return rows


def _print_job(request: Request, job: dict[str, Any]) -> None:
    files = {
        "job.json": jobs.to_json(job),
        "job.yaml": jobs.to_yaml(job),
        "config.yaml": request.config_text,
    }
    folder = storage.resolve(FLAGS.out or ".")
    if FLAGS.out:
        storage.makedirs(folder)
        for name, content in files.items():
            storage.write_text_atomic(storage.join(folder, name), content)
    for name, content in files.items():
        print(f"\n# {name}")
        for line in content.split("\n")[:-1]:
            print(printable(line))
    print("\n# The same with gcloud, from these files:")
    print("\n".join(map(printable, jobs.commands(request, job, folder))))


def _check_free(workdir: str, client: service.Service) -> None:
    """Refuses a second job on a workdir: they would wait for each other's lease, and cost."""
    record = _record(workdir)
    if record is None:
        return
    running = client.get(record["name"])
    if not running.has_ended:
        raise UsageError(
            f"{running.name} is {running.state} in {workdir}; `watch` or cancel it, or take "
            "another --workdir"
        )


def _start(client: service.Service, job: dict[str, Any], workdir: str) -> None:
    started = _create(client, job, workdir)
    print(f"started {printable(started.name)}")
    for name, address in started.addresses.items():
        print(f"{name:<14}{printable(address)}")
    print(f"follow it with: python -m trainer submit watch {printable(workdir)}", flush=True)


def _create(client: service.Service, job: dict[str, Any], workdir: str) -> service.Job:
    """Starts a job, and records it in the workdir."""
    started = client.create(job)
    record = {"name": started.name, "endpoint": FLAGS.endpoint, "job": job}
    storage.write_text_atomic(
        storage.join(workdir, FOLDER, _RECORD), json.dumps(record, indent=2) + "\n"
    )
    return started


# ------------------------------------------------------------------------------------ resume


def resume(name: str) -> None:
    """Starts a job again whose run isn't finished."""
    client, job = _find(name)
    if not job.has_ended:
        raise UsageError(f"{job.name} is {job.state}: there is nothing to resume; `watch` it")
    if job.state == "JOB_STATE_SUCCEEDED":
        raise UsageError(f"{job.name} has finished its run: there is nothing to resume")
    if job.exit_code in service.HOPELESS:
        raise UsageError(
            f"{job.name} ended with code {job.exit_code}: {service.HOPELESS[job.exit_code]}; put "
            "that right and submit anew with the same --workdir, which goes on from its checkpoint"
        )
    _print_rows([("resume", f"{job.name} ({job.state}): {job.error or 'no error is told'}")])
    _start(client, _again(job), job.workdir)


def _again(job: service.Job) -> dict[str, Any]:
    """The request that makes the same job again."""
    fields = {"displayName", "labels", "jobSpec", "encryptionSpec"}
    return {key: value for key, value in job.document.items() if key in fields}


def _record(workdir: str) -> dict[str, Any] | None:
    """The request of the workdir's newest job, if there is any."""
    path = storage.join(workdir, FOLDER, _RECORD)
    if not storage.exists(path):
        return None
    try:
        record = documents.read_object(path)
    except documents.DocumentError:
        record = {}
    if not all(isinstance(record.get(key, ""), str) for key in ("name", "endpoint")):
        record = {}
    if not record.get("name"):
        raise UsageError(f"{path} is no record of a job; give the job's name") from None
    return record


def _find(name: str) -> tuple[service.Service, service.Job]:
    """The job of a name, of a number, or the newest of a workdir."""
    endpoint, project = FLAGS.endpoint, FLAGS.project
    if not endpoint and storage.is_remote(name):
        service.login()  # before a bucket is asked, for a minute or two where nobody is logged in
    if not name.startswith("projects/") and not name.isdecimal():
        workdir = storage.resolve(name).rstrip("/")
        record = _record(workdir)
        if record is None:
            raise UsageError(
                f"{name} is no job's name or number, and no workdir that a job was submitted for"
            )
        name, endpoint = record["name"], endpoint or record.get("endpoint", "")
    reference = service.Reference.parse(name)
    if reference is None and not name.isdecimal():
        raise UsageError(
            f"{name} is no job; as projects/PROJECT/locations/REGION/customJobs/NUMBER"
        )
    region = reference.region if reference else FLAGS.region
    client = service.Service(project or (reference.project if reference else ""), region, endpoint)
    full = name if reference else f"projects/{client.project}/locations/{region}/customJobs/{name}"
    return client, client.get(full)


# ------------------------------------------------------------------------------------- watch


def watch(name: str) -> None:
    """Prints what a job and its run do, until it ends; ends with the code of the run."""
    client, job = watching.patiently(lambda: _find(name), FLAGS.poll_sec)

    def submit_again(ended: service.Job) -> service.Job:
        record = _record(ended.workdir)
        if record is not None and record["name"] != ended.name:
            return client.get(record["name"])  # somebody else was faster
        return _create(client, _again(ended), ended.workdir)

    resumes = watching.Resumes(FLAGS.max_resumes) if FLAGS.resume else None
    error = watching.follow(
        job, lambda now: client.get(now.name), submit_again, resumes, FLAGS.poll_sec
    )
    if error is not None:
        raise error


# ------------------------------------------------------------------------ list, logs, cancel


def list_jobs() -> None:
    """Prints the trainer's jobs of a region, the newest first."""
    client = service.Service(FLAGS.project, FLAGS.region, FLAGS.endpoint)
    found = client.jobs()
    if not found:
        print(f"no job of the trainer's in {client.region} of {client.project}", flush=True)
    for job in found:
        state = job.state.removeprefix("JOB_STATE_").lower()
        texts = (job.number, state, job.created, job.document.get("displayName", ""), job.workdir)
        number, state, created, name, workdir = (printable(str(text)) for text in texts)
        print(f"{number:<20} {state:<10} {created:<20} {name:<24} {workdir}", flush=True)


def logs(name: str) -> None:
    """Prints the newest lines that a job's machines have logged."""
    client, job = _find(name)
    lines = client.log(job)
    for line in lines:
        print(printable(line), flush=True)
    if not lines:
        print(f"{job.name} has logged nothing yet", flush=True)
    _print_rows([("all of it", job.addresses["logs"])])


def cancel(name: str) -> None:
    """Ends a job. Its run gets SIGTERM, and saves."""
    client, job = _find(name)
    if job.has_ended:
        raise UsageError(f"{job.name} is {job.state}: there is nothing to cancel")
    client.cancel(job)
    _print_rows([("cancelled", f"{job.name}; `resume` goes on from what it has saved")])


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<14}{shorten(text, 1000)}", flush=True)


if __name__ == "__main__":
    define_flags()
    flags.run(main, usage=__doc__ or "", max_positional=2)
