"""A conversion's shards made by Apache Beam: by many machines at once on Google Cloud's Dataflow.

An element is a shard, whose tasks the machine that takes it finds in the journal, so that neither
the pipeline nor its shuffles hold more than names. What it makes is what `trainer.data.conversion`
makes, by the same functions. A machine that takes a shard that is complete leaves it as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator

from trainer.core import documents, storage
from trainer.core.errors import DataError, TrainerError, UsageError
from trainer.data import journal as journal_lib
from trainer.data import manifest, sources
from trainer.data.conversion import Frame, write_shard
from trainer.data.encoding import Done, Task, encode_all

RUNNERS = ("DirectRunner", "DataflowRunner")
_CHUNK = 32


def convert(
    frame: Frame, dest: str, shards: dict[str, list[Task]], *, runner: str, options: list[str]
) -> None:
    """Makes the shards; returns when they are there.

    Args:
      frame: of the conversion.
      dest: directory of the data set.
      shards: of each that is to be made, by name, its tasks.
      runner: one of `RUNNERS`.
      options: Beam's own, as 'region=europe-west4'.

    Raises:
      UsageError: Beam is not installed, an option is wrong, or the machines cannot see a path.
      DataError: an image cannot be used.
      TrainerError: the pipeline failed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UsageError(
            f"--runner={runner} needs Apache Beam ({error}); pip install 'stylegan-trainer[beam]'"
        ) from error
    if runner == "DataflowRunner":
        for flag, path in (("source", frame.source), ("dest", dest)):
            if not storage.is_remote(path):
                raise UsageError(f"--{flag}={path}: other machines cannot see it; use a gs:// path")
    flags = [f"--runner={runner}", *(f"--{option.lstrip('-')}" for option in options)]
    for name, tasks in shards.items():
        storage.write_text_atomic(_tasks_path(dest, name), _dump(tasks))
    try:
        with apache_beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            _ = (
                pipeline
                | "Shards" >> apache_beam.Create(list(shards))
                | "Spread" >> apache_beam.Reshuffle()
                | "Convert" >> apache_beam.Map(functools.partial(make_shard, frame, dest))
            )
    except Exception as error:  # Beam's runners raise whatever the machines did, as text
        _raise_first(dest, list(shards))
        said = " ".join(str(error).split())
        raise TrainerError(
            f"the Beam pipeline failed ({said[:300]}); run the same command again, and it goes on"
        ) from error
    _raise_first(dest, list(shards))


def make_shard(frame: Frame, dest: str, name: str) -> str:
    """The work of a machine on one element: makes a shard that is not there yet.

    An image that cannot be used is no failure of the machine, which would be tried again: it is
    noted for the caller.
    """
    journal = journal_lib.of_machine(dest, frame.plan)
    if journal.finished([name], frame.num_classes)[0]:
        return name
    journal.check()
    tasks = _load(storage.read_bytes(_tasks_path(dest, name)))
    try:
        write_shard(frame, journal, name, _outcomes(frame, tasks))
    except DataError as error:
        journal.check()
        storage.write_text_atomic(_error_path(dest, name), str(error))
        logging.getLogger(__name__).error("%s", error)
    return name


def _outcomes(frame: Frame, tasks: list[Task]) -> Iterator[tuple[Task, Done]]:
    reader = sources.Reader(frame.source)
    for start in range(0, len(tasks), _CHUNK):
        chunk = tasks[start : start + _CHUNK]
        yield from zip(chunk, encode_all(chunk, reader, frame.settings.options), strict=True)


def _raise_first(dest: str, names: list[str]) -> None:
    """Raises the first error that was noted, and forgets them all."""
    there = storage.walk(storage.join(dest, manifest.PARTIAL_NAME))
    noted = [name for name in names if f"{name}.error" in there]
    if noted:
        text = storage.read_text(_error_path(dest, noted[0]))
        storage.remove_files(_error_path(dest, name) for name in noted)
        raise DataError(text)


def _tasks_path(dest: str, name: str) -> str:
    return storage.join(dest, manifest.PARTIAL_NAME, f"{name}.tasks")


def _error_path(dest: str, name: str) -> str:
    return storage.join(dest, manifest.PARTIAL_NAME, f"{name}.error")


def _dump(tasks: list[Task]) -> str:
    return json.dumps(
        [
            [task.name, task.label, dataclasses.astuple(task.member) if task.member else None]
            for task in tasks
        ]
    )


def _load(data: bytes) -> list[Task]:
    return [
        Task(name, sources.Member(*member) if member else None, label)
        for name, label, member in documents.parse_json(data, len(data))
    ]
