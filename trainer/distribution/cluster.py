"""The processes of a run on several hosts: who they are, by what the environment says.

Needs no TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core import documents, flags
from trainer.core.errors import ConfigError, TrainerError
from trainer.core.text import quoted, shorten

SOURCES = ("TF_CONFIG", "CLUSTER_SPEC")  # the first that is set counts

# Vertex AI's names of the pools, which CLUSTER_SPEC uses.
_POOLS = {
    "workerpool0": "chief",
    "workerpool1": "worker",
    "workerpool2": "ps",
    "workerpool3": "evaluator",
}
_TRAINING = ("chief", "master", "worker")  # the jobs that train, in TensorFlow's order

_LONGEST_DESCRIPTION = 1 << 20  # characters: 10,000 workers have half of it


class PeerError(TrainerError):
    """A worker is missing or gone; started again together, the workers go on."""

    exit_code = 75


@dataclass(frozen=True)
class Cluster:
    """The workers of a run, this one among them.

    Attributes:
      source: the environment variable that describes it.
      names: as 'worker:0', the chief first.
      addresses: 'host:port' of each.
      index: of this process.
    """

    source: str
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes what users see."""
        return self.index == 0

    def peer(self, index: int) -> str:
        """A worker as messages call it."""
        return f"{self.names[index]} ({self.addresses[index]})"

    def jobs(self) -> dict[str, list[str]]:
        """The addresses by job, as TensorFlow takes them."""
        found: dict[str, list[str]] = {}
        for name, address in zip(self.names, self.addresses, strict=True):
            found.setdefault(name.partition(":")[0], []).append(address)
        return found

    @property
    def task(self) -> tuple[str, int]:
        """Job and number of this process in it."""
        job, _, number = self.names[self.index].partition(":")
        return job, int(number)


# ------------------------------------------------------------------------------ environment


def find(strategy: str) -> Cluster | None:
    """Facts of the environment about other workers.

    Args:
      strategy: `run.strategy`.

    Returns:
      The cluster if several workers train, or one under 'multi_worker'; None if this process is
      alone.

    Raises:
      ConfigError: the description is wrong, or doesn't fit the strategy.
      EvaluatorTask: this process is to evaluate.
    """
    source = next((name for name in SOURCES if flags.env(name) is not None), "")
    cluster = parse(source, flags.env(source) or "") if source else None
    if cluster is None and strategy == "multi_worker":
        raise ConfigError(
            f"run.strategy = 'multi_worker' needs {' or '.join(SOURCES)} in the environment, "
            "which says who the workers are; set it, or take another strategy"
        )
    if cluster is None or (len(cluster.names) == 1 and strategy != "multi_worker"):
        return None
    if strategy not in ("auto", "multi_worker"):
        raise ConfigError(
            f"run.strategy = {strategy!r}, but {source} names {len(cluster.names)} workers, which "
            f"would all train the same run; take multi_worker or auto, or unset {source}"
        )
    return cluster


class EvaluatorTask(TrainerError):
    """This process is the evaluator of a run: it has nothing to do here."""

    exit_code = 0


def parse(source: str, text: str) -> Cluster | None:
    """The cluster that a TF_CONFIG or a CLUSTER_SPEC describes, None if it names no workers.

    Raises:
      ConfigError, EvaluatorTask: as for `find`.
    """
    try:
        document = documents.parse_json(text, _LONGEST_DESCRIPTION)
    except documents.DocumentError as error:
        what = str(error).removeprefix("it ")
        raise ConfigError(f"{source} {what}; put it right or unset it") from None
    if not isinstance(document, dict):
        raise _wrong(source, "it is no object", '{"cluster": ..., "task": ...}')
    jobs = document.get("cluster") or {}
    if not jobs:
        return None
    jobs = _checked_jobs(source, jobs)
    job, number = _checked_task(source, document.get("task"), jobs)
    if job == "evaluator":
        raise EvaluatorTask("this task is an evaluator, which takes no part in training")
    if jobs.get("ps"):
        raise ConfigError(
            f"{source} names parameter servers, which this trainer doesn't use; leave them out "
            "(Vertex AI: worker pool 2)"
        )
    names = [(name, index) for name in _TRAINING for index in range(len(jobs.get(name, ())))]
    addresses = tuple(jobs[name][index] for name, index in names)
    return Cluster(
        source,
        tuple(f"{name}:{index}" for name, index in names),
        addresses,
        names.index((job, number)),
    )


def _wrong(source: str, what: str, expected: str) -> ConfigError:
    return ConfigError(f"{source} is wrong: {what}; expected {expected}")


def _checked_jobs(source: str, jobs: Any) -> dict[str, list[str]]:
    expected = '"cluster": {"chief": ["host:port"], "worker": ["host:port", ...]}'
    if not isinstance(jobs, dict):
        raise _wrong(source, f"its cluster is {quoted(jobs)}", expected)
    checked: dict[str, list[str]] = {}
    for name, addresses in jobs.items():
        job = _POOLS.get(name, name)
        if job not in (*_TRAINING, "ps", "evaluator"):
            raise _wrong(source, f"there is no job {quoted(name)}", "chief, worker or evaluator")
        if not isinstance(addresses, list) or not all(map(_is_address, addresses)):
            raise _wrong(source, f"the addresses of {name} are {_shown(addresses)}", expected)
        checked[job] = addresses
    everyone = [address for job in _TRAINING for address in checked.get(job, ())]
    twice = sorted({address for address in everyone if everyone.count(address) > 1})
    if twice:
        raise _wrong(
            source, f"{shorten(twice[0])} is there twice", "an address of its own for each worker"
        )
    if len(checked.get("chief", ())) + len(checked.get("master", ())) > 1:
        raise _wrong(source, "it names several chiefs", "one chief, the others as worker")
    return checked


def _is_address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    host, _, port = value.rpartition(":")
    return (
        bool(re.fullmatch(r"[\w.:\[\]%-]{1,255}", host, re.ASCII))
        and bool(re.fullmatch(r"\d{1,5}", port, re.ASCII))
        and 0 < int(port) < 65536
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(quoted(each, 60) for each in value[:3])}{', ...' * (len(value) > 3)}]"
    return quoted(value)


def _checked_task(source: str, task: Any, jobs: Mapping[str, list[str]]) -> tuple[str, int]:
    expected = '"task": {"type": "worker", "index": 0}'
    if not isinstance(task, dict) or not {"type", "index"} <= set(task):
        raise _wrong(source, f"its task is {quoted(task)}", expected)
    kind, index = task["type"], task["index"]
    if isinstance(index, str) and re.fullmatch(r"\d{1,9}", index, re.ASCII):
        index = int(index)
    if not isinstance(kind, str) or type(index) is not int:
        what = f"its task is of type {quoted(kind)} with index {quoted(index)}"
        raise _wrong(source, what, f"{expected}, one of the cluster")
    job = _POOLS.get(kind, kind)
    # Evaluators are no part of the cluster in TensorFlow's own description of it.
    members = jobs.get(job, [""] if job == "evaluator" else [])
    if not members:
        what = f"its task is of type {quoted(kind)}"
        raise _wrong(source, what, f"{expected}, one of the cluster")
    if job != "evaluator" and not 0 <= index < len(members):
        raise _wrong(
            source,
            f"task {kind}:{index} is not one of the {len(members)} of the cluster",
            f"an index from 0 to {len(members) - 1}",
        )
    return job, index
