"""Turns a source of images into a data set: plan, worker processes, journal, manifest.

The plan fixes beforehand which image goes into which shard at which place. So the result depends
on the source, the options and the seed alone: not on the number of workers, nor on how often the
conversion was interrupted. What is complete is kept in the journal, `<dest>/.partial/`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL

from trainer.core import storage
from trainer.core.errors import DataError, TrainerError, UsageError
from trainer.data import images, manifest, records, sources

_SHARD_BYTES = 100 << 20  # a shard has this much or up to twice it
_MIN_SHARDS = 8
_MAX_SHARDS = 1 << 16
_CHUNK_BYTES = 1 << 20  # what goes to a worker and back at a time
_MAX_CHUNK = 32
_SAMPLES = 16


@dataclass(frozen=True)
class Settings:
    """What to convert, and how.

    Attributes:
      source: folder or zip archive.
      dest: directory of the data set.
      options: how each image is made.
      labels: see `sources.read_labels`.
      shards: number of record files; 0 finds a power of two.
      seed: of the shuffle.
      max_images: convert a random part of so many images; 0 takes all.
      skip_bad: leave out images that cannot be used, instead of stopping.
      max_bad: stop when more than so many were left out.
      workers: processes.
      overwrite: replace the data set or the unfinished conversion that is there.
    """

    source: str
    dest: str
    options: images.ImageOptions
    labels: str = "auto"
    shards: int = 0
    seed: int = 0
    max_images: int = 0
    skip_bad: bool = False
    max_bad: int = 100
    workers: int = 1
    overwrite: bool = False


@dataclass
class Report:
    """How it went: images whose bytes were kept, scaled up, stretched; files that are no images."""

    kept: int = 0
    enlarged: int = 0
    stretched: int = 0
    ignored: int = 0


@dataclass(frozen=True)
class _Task:
    name: str
    member: sources.Member | None
    label: int


@dataclass(frozen=True)
class _Done:
    """One task's outcome: a record's payload, or the reason why there is none."""

    payload: bytes | None
    reason: str = ""
    channels: int = 0
    kept: bool = False
    enlarged: bool = False
    stretched: bool = False


@dataclass(frozen=True)
class _Plan:
    source: sources.Source
    labels: sources.Labels
    shards: list[np.ndarray]  # of each shard, the numbers of its images, in order
    reference: str  # the image whose channels all others must have
    channels: int
    chunk: int

    def tasks(self, numbers: np.ndarray) -> list[_Task]:
        members = self.source.members
        return [
            _Task(self.source.names[n], members[n] if members else None, self.labels.numbers[n])
            for n in numbers.tolist()
        ]


def convert(
    settings: Settings, progress: Callable[[int, int, int], None]
) -> tuple[manifest.Manifest, Report]:
    """Makes a data set, or goes on with one that was interrupted.

    Args:
      settings: what to do.
      progress: called with the images of this run done, those done by earlier runs, and all.

    Returns:
      The manifest and what is worth telling the user.

    Raises:
      DataError: the source or an image cannot be used.
      UsageError: the settings do not fit what is at the destination.
    """
    dest = storage.resolve(settings.dest)
    if dest.rstrip("/") == storage.resolve(settings.source).rstrip("/"):
        raise UsageError("--source and --dest are the same; the data set needs its own directory")
    _check_destination(settings, dest)
    source = sources.open_source(settings.source)
    plan = _make_plan(settings, source)
    name = _dataset_name(dest)
    _open_journal(settings, plan, dest, name)
    entries = _write_shards(settings, plan, dest, name, progress)
    result = manifest.save(_summarise(settings, plan, name, entries), dest)
    storage.remove_tree(storage.join(dest, manifest.PARTIAL_NAME))
    report = Report(ignored=source.ignored)
    for key in ("kept", "enlarged", "stretched"):
        setattr(report, key, sum(entry[key] for entry in entries))
    return result, report


# ---- plan ----------------------------------------------------------------------------------------


def _make_plan(settings: Settings, source: sources.Source) -> _Plan:
    labels = sources.read_labels(source, settings.labels)
    # The raw stream of Philox is fixed for good; NumPy's own shuffles are not.
    keys = np.random.Philox(key=settings.seed).random_raw(len(source.names))
    order = np.argsort(keys, kind="stable")
    if settings.max_images:
        order = order[: settings.max_images]
    plan = _Plan(source, labels, [order], "", settings.options.channels, 1)
    reference, channels, mean = _sample(settings, plan)
    shards = settings.shards or _shard_count(len(order), mean * len(order))
    if not 1 <= shards <= min(_MAX_SHARDS, len(order)):
        raise UsageError(
            f"--shards={shards}: {len(order)} images make 1 to "
            f"{min(_MAX_SHARDS, len(order))} shards"
        )
    return dataclasses.replace(
        plan,
        shards=np.array_split(order, shards),
        reference=reference,
        channels=channels,
        chunk=int(np.clip(_CHUNK_BYTES // mean, 1, _MAX_CHUNK)),
    )


def _shard_count(num_images: int, num_bytes: int) -> int:
    """A power of two, so that any usual number of hosts divides it."""
    count = _MIN_SHARDS
    while num_bytes >= 2 * count * _SHARD_BYTES:
        count *= 2
    while count > min(num_images, _MAX_SHARDS):
        count //= 2
    return count


def _sample(settings: Settings, plan: _Plan) -> tuple[str, int, int]:
    """The first usable image, its channels, and the mean bytes of a few records."""
    numbers = np.sort(plan.shards[0])
    reader = sources.Reader(plan.source.path)
    usable = (
        (task, done)
        for task in plan.tasks(numbers)
        if (done := _checked(settings, plan, task, _encode(task, reader, settings.options)))
    )
    task, first = next(usable, (None, None))
    if task is None or first is None:
        raise DataError(f"none of the {len(numbers)} images in {plan.source.path} can be used")
    spread = numbers[np.linspace(0, len(numbers) - 1, _SAMPLES).astype(int)]
    sampled = [_encode(task, reader, settings.options) for task in plan.tasks(spread)]
    sizes = [len(done.payload) for done in [first, *sampled] if done.payload]
    return task.name, first.channels, sum(sizes) // len(sizes)


def _checked(settings: Settings, plan: _Plan, task: _Task, done: _Done) -> _Done | None:
    """The outcome, or None for a bad image that may be left out."""
    if done.payload is None:
        if settings.skip_bad:
            return None
        raise DataError(
            f"{task.name} in {plan.source.path}: {done.reason}; repair or remove it, or leave such "
            "images out with --on_bad=skip"
        )
    if plan.reference and done.channels != plan.channels:
        raise DataError(
            f"{plan.reference} has {plan.channels} channels, {task.name} has {done.channels}; "
            "pass --channels=rgb (or gray, rgba) to make them equal"
        )
    return done


# ---- journal -------------------------------------------------------------------------------------


def _dataset_name(dest: str) -> str:
    name = re.sub(r"\W+", "_", dest.rstrip("/").rsplit("/", 1)[-1], flags=re.ASCII)
    return name.strip("_") or "images"


def _shard_name(name: str, shard: int, shards: int) -> str:
    return f"{name}-{shard:05d}-of-{shards:05d}.tfrecord"


def _check_destination(settings: Settings, dest: str) -> None:
    """Refuses to touch a data set, or removes it and what is left of unfinished ones."""
    where = storage.join(dest, manifest.FILE_NAME)
    if not settings.overwrite:
        if storage.exists(where):
            raise UsageError(
                f"{dest} holds a data set already; choose another --dest, or replace it with "
                "--overwrite"
            )
        return
    if storage.exists(where):
        try:
            old = manifest.load(dest)
        except DataError as error:
            raise UsageError(
                f"{where} is not a manifest to overwrite; move it away or choose another --dest "
                f"({error})"
            ) from error
        storage.remove_tree(where)
        for shard in range(len(old.shards)):
            storage.remove_tree(old.path(shard))
    partial = storage.join(dest, manifest.PARTIAL_NAME)
    if storage.exists(partial):
        for entry in storage.listdir(partial):
            if entry.endswith(".tfrecord.json"):
                storage.remove_tree(storage.join(dest, entry.removesuffix(".json")))
        storage.remove_tree(partial)


def _identity(settings: Settings, plan: _Plan) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    labels = ",".join(map(str, plan.labels.numbers)) + json.dumps(plan.labels.names)
    height, width = settings.options.resolution
    return {
        "format version": manifest.VERSION,
        "Pillow version": PIL.__version__,
        "images in the source": plan.source.fingerprint(),
        "labels": records.checksum(labels.encode()),
        "--resolution": f"{width}x{height}",
        "--crop": settings.options.crop,
        "--filter": settings.options.filter,
        "--channels": images.MODES.get(settings.options.channels, "auto"),
        "--background": settings.options.background,
        "--shards": len(plan.shards),
        "--seed": settings.seed,
        "--max_images": settings.max_images,
    }


def _open_journal(settings: Settings, plan: _Plan, dest: str, name: str) -> None:
    """Starts a journal, or checks that the one there is of this very conversion."""
    partial = storage.join(dest, manifest.PARTIAL_NAME)
    where = storage.join(partial, "plan.json")
    identity = _identity(settings, plan)
    found = _read_json(where) if storage.exists(where) else {}
    changed = [key for key in identity if found.get(key) != identity[key]]
    if changed:
        if not storage.exists(partial) or storage.listdir(partial) in ([], ["plan.json"]):
            storage.makedirs(partial)
            storage.write_text_atomic(where, json.dumps(identity, indent=1))
            return  # nothing was complete that could be lost
        raise UsageError(
            f"{dest} holds an unfinished conversion with other settings (changed: "
            f"{', '.join(changed)}); run it as before, or start anew with --overwrite"
        )
    if not storage.is_remote(dest):
        # A process that was killed leaves the file that it was writing.
        for entry in storage.listdir(dest):
            if re.fullmatch(rf"\.{name}-\d+-of-\d+\.tfrecord\.\w+\.tmp", entry):
                storage.remove_tree(storage.join(dest, entry))


def _read_json(where: str) -> dict[str, Any]:
    try:
        document = json.loads(storage.read_bytes(where))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _finished(dest: str, shard_name: str) -> dict[str, Any] | None:
    """The journal's entry of a shard that is complete."""
    where = storage.join(dest, manifest.PARTIAL_NAME, shard_name + ".json")
    path = storage.join(dest, shard_name)
    if not (storage.exists(where) and storage.exists(path)):
        return None
    entry = _read_json(where)
    return entry if entry.get("bytes") == storage.size(path) else None


# ---- shards --------------------------------------------------------------------------------------


def _write_shards(
    settings: Settings,
    plan: _Plan,
    dest: str,
    name: str,
    progress: Callable[[int, int, int], None],
) -> list[dict[str, Any]]:
    names = [_shard_name(name, shard, len(plan.shards)) for shard in range(len(plan.shards))]
    entries = {shard: _finished(dest, shard_name) for shard, shard_name in enumerate(names)}
    pending = [shard for shard, entry in entries.items() if entry is None]
    total = sum(len(numbers) for numbers in plan.shards)
    earlier = total - sum(len(plan.shards[shard]) for shard in pending)
    bad = sum(len(entry["skipped"]) for entry in entries.values() if entry)
    count = 0
    outcomes = _run(settings, plan, pending)
    try:
        progress(0, earlier, total)
        for shard in pending:
            with storage.open_write_atomic(storage.join(dest, names[shard])) as file:
                writer = records.ShardWriter(file)
                tally = _Tally()
                for task, done in _of_shard(outcomes, len(plan.shards[shard])):
                    if (good := _checked(settings, plan, task, done)) is None:
                        bad += 1
                        _check_bad(settings, bad, task, done)
                        tally.skip(task, done)
                    else:
                        writer.write(good.payload or b"")
                        tally.add(task, good)
                    count += 1
                    progress(count, earlier, total)
                if not writer.offsets:
                    raise DataError(f"no image of shard {names[shard]} can be used; lower --shards")
            entries[shard] = tally.entry(names[shard], writer)
            where = storage.join(dest, manifest.PARTIAL_NAME, names[shard] + ".json")
            storage.write_text_atomic(where, json.dumps(entries[shard]))
    finally:
        outcomes.close()
    return [entry for shard in range(len(names)) if (entry := entries[shard]) is not None]


def _of_shard(outcomes: Iterator[tuple[_Task, _Done]], count: int) -> Iterator[tuple[_Task, _Done]]:
    for _ in range(count):
        yield next(outcomes)


def _check_bad(settings: Settings, bad: int, task: _Task, done: _Done) -> None:
    if bad > settings.max_bad:
        raise DataError(
            f"{bad} images cannot be used, more than --max_bad={settings.max_bad}; the last one: "
            f"{task.name}: {done.reason}"
        )


class _Tally:
    """What the journal tells about a shard."""

    def __init__(self) -> None:
        self._labels: collections.Counter[int] = collections.Counter()
        self._flags: collections.Counter[str] = collections.Counter()
        self._skipped: list[dict[str, str]] = []

    def skip(self, task: _Task, done: _Done) -> None:
        self._skipped.append({"name": task.name, "reason": done.reason})

    def add(self, task: _Task, done: _Done) -> None:
        self._labels[task.label] += 1
        for key in ("kept", "enlarged", "stretched"):
            self._flags[key] += getattr(done, key)

    def entry(self, name: str, writer: records.ShardWriter) -> dict[str, Any]:
        return {
            "name": name,
            "bytes": writer.bytes,
            "crc32c": writer.crc32c,
            "offsets": writer.offsets,
            "labels": sorted(self._labels.items()),
            "skipped": self._skipped,
            **{key: self._flags[key] for key in ("kept", "enlarged", "stretched")},
        }


def _summarise(
    settings: Settings, plan: _Plan, name: str, entries: list[dict[str, Any]]
) -> manifest.Manifest:
    num_images = sum(len(entry["offsets"]) for entry in entries)
    block = manifest.block_records(num_images, sum(entry["bytes"] for entry in entries))
    counts = [0] * len(plan.labels.names)
    for entry in entries:
        for label, count in entry["labels"]:
            if label >= 0:
                counts[label] += count
    return manifest.Manifest(
        name=name,
        num_images=num_images,
        resolution=settings.options.resolution,
        channels=plan.channels,
        label_names=plan.labels.names,
        label_counts=counts,
        crop=settings.options.crop,
        filter=settings.options.filter,
        background=settings.options.background,
        block=block,
        shards=[
            manifest.Shard(
                name=entry["name"],
                count=len(entry["offsets"]),
                bytes=entry["bytes"],
                crc32c=entry["crc32c"],
                index=entry["offsets"][::block],
            )
            for entry in entries
        ],
        skipped=[skipped for entry in entries for skipped in entry["skipped"]],
    )


# ---- workers -------------------------------------------------------------------------------------


def _run(
    settings: Settings, plan: _Plan, pending: list[int]
) -> Generator[tuple[_Task, _Done], None, None]:
    """The outcomes of the pending shards' images, in order, a bounded number under way."""
    chunks = (
        plan.tasks(numbers)
        for shard in pending
        for numbers in np.array_split(plan.shards[shard], -(-len(plan.shards[shard]) // plan.chunk))
    )
    if settings.workers == 1:
        reader = sources.Reader(plan.source.path)
        for chunk in chunks:
            yield from ((task, _encode(task, reader, settings.options)) for task in chunk)
        return
    with futures.ProcessPoolExecutor(
        settings.workers,
        # A fork of a process that has threads (fsspec's, a test runner's) can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan.source.path, settings.options),
    ) as pool:
        under_way: collections.deque[tuple[list[_Task], futures.Future[list[_Done]]]]
        under_way = collections.deque()
        try:
            for chunk in chunks:
                under_way.append((chunk, pool.submit(_encode_chunk, chunk)))
                if len(under_way) > 2 * settings.workers + 2:
                    yield from _take(under_way.popleft())
            while under_way:
                yield from _take(under_way.popleft())
        except BrokenProcessPool as error:
            raise TrainerError(
                "a worker process died, perhaps for want of memory; run the same command with "
                "fewer --workers, and it goes on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _take(
    item: tuple[list[_Task], futures.Future[list[_Done]]],
) -> Iterator[tuple[_Task, _Done]]:
    chunk, future = item
    return zip(chunk, future.result(), strict=True)


_worker: tuple[sources.Reader, images.ImageOptions]


def _set_up_worker(path: str, options: images.ImageOptions) -> None:
    global _worker
    _worker = sources.Reader(path), options


def _start_worker(path: str, options: images.ImageOptions) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which stops the pool
    _set_up_worker(path, options)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_chunk(chunk: list[_Task]) -> list[_Done]:
    reader, options = _worker
    return [_encode(task, reader, options) for task in chunk]


def _encode(task: _Task, reader: sources.Reader, options: images.ImageOptions) -> _Done:
    try:
        image = images.encode(reader.read(task.name, task.member), options)
    except DataError as error:
        return _Done(None, reason=str(error))
    return _Done(
        payload=records.encode_record(image, task.label, task.name),
        channels=image.channels,
        kept=image.kept,
        enlarged=image.enlarged,
        stretched=image.stretched,
    )
