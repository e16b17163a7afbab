"""Turns a source of images into a data set: plan, worker processes, journal, manifest.

The plan fixes beforehand which image goes into which shard at which place. So the result depends
on the source, the options and the seed alone: not on the number of workers, nor on how often the
conversion was interrupted, nor on whether Apache Beam's machines did it (`trainer.data.beam`). What
is complete is kept in the journal, `<dest>/.partial/`.

A shard gets its name when it is complete: on a disk it is renamed, in an object store uploaded
whole. Whoever makes it again, as a machine does whose success was not heard of, makes the same. That
nobody else's shards get in is the business of `trainer.data.journal`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import simplejpeg

from trainer.core import output, storage, tfrecord
from trainer.core.errors import DataError, TrainerError, UsageError
from trainer.core.text import image_size
from trainer.data import images, manifest, records, sources
from trainer.data import journal as journal_lib
from trainer.data.encoding import Done, Task, encode, encode_all, encode_in_processes
from trainer.data.journal import Journal

_SHARD_BYTES = 100 << 20  # a shard has this much or up to twice it
_MIN_SHARDS = 8
_MAX_SHARDS = 1 << 16
_CHUNK_BYTES = 1 << 20  # what goes to a worker and back at a time
_MAX_CHUNK = 32
_SAMPLES = 16


@dataclass(frozen=True)
class Settings:
    """A request for a conversion.

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
    """The result of a conversion.

    Attributes:
      kept: images whose own bytes were taken.
      enlarged: images that were scaled up.
      stretched: images whose proportions changed.
      ignored: a line for each kind of files that were passed over, with their count and some names.
    """

    kept: int = 0
    enlarged: int = 0
    stretched: int = 0
    ignored: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """Settings that all shards of a conversion share, wherever they are made.

    Attributes:
      settings: what was asked for.
      source: path of the images.
      reference: the image whose channels all others must have.
      channels: those.
      num_classes: 0 without labels.
      plan: fingerprint of the plan; '' while that is made.
    """

    settings: Settings
    source: str
    reference: str
    channels: int
    num_classes: int
    plan: str = ""

    def check(self, task: Task, done: Done) -> Done | None:
        """The outcome, or None for a bad image that may be left out.

        Raises:
          DataError: it may not be, or its channels are others.
        """
        if done.payload is None:
            if self.settings.skip_bad:
                return None
            raise DataError(
                f"{task.name} in {self.source}: {done.reason}; repair or remove it, or leave such "
                "images out with --on_bad=skip"
            )
        if self.reference and done.channels != self.channels:
            raise DataError(
                f"{self.reference} has {self.channels} channels, {task.name} has {done.channels}; "
                f"{_alike({self.channels, done.channels})}"
            )
        return done

    def check_bad(self, count: int, name: str, reason: str) -> None:
        """Stops when too many images were left out.

        Raises:
          DataError: `count`, with the last one and its reason, is more than are allowed.
        """
        if count > self.settings.max_bad:
            raise DataError(
                f"{count} images cannot be used, more than --max_bad={self.settings.max_bad}; the "
                f"last one: {name}: {reason}"
            )


def _alike(channels: set[int]) -> str:
    """The flags that make images alike whose channels are these."""
    if channels == {1, 3}:
        return "pass --channels=rgb (or gray) to make them alike, and --overwrite"
    opaque = "gray" if channels == {1, 2} else "rgb"
    return (
        f"pass --channels={opaque} --background=white (or another colour) to lay transparent pixels "
        "over it, or --channels=rgba to keep them, and --overwrite for what is done already"
    )


@dataclass(frozen=True)
class _Plan:
    source: sources.Source
    labels: sources.Labels
    shards: list[np.ndarray]  # of each shard, the numbers of its images, in order
    reference: str  # the image whose channels all others must have
    channels: int
    chunk: int

    def frame(self, settings: Settings, plan: str = "") -> Frame:
        classes = len(self.labels.names)
        return Frame(settings, self.source.path, self.reference, self.channels, classes, plan)

    def tasks(self, numbers: np.ndarray) -> list[Task]:
        members = self.source.members
        return [
            Task(self.source.names[n], members[n] if members else None, self.labels.numbers[n])
            for n in numbers.tolist()
        ]


def convert(
    settings: Settings,
    progress: Callable[[int, int, int], None],
    beam: Callable[[Frame, str, dict[str, list[Task]]], None] | None = None,
    log: Callable[[str], object] | None = None,
) -> tuple[manifest.Manifest, Report]:
    """Makes a data set, or goes on with one that was interrupted.

    Args:
      settings: what to do.
      progress: called with the images of this run done, those done by earlier runs, and all.
      beam: makes shards elsewhere, instead of this machine's processes: gets the frame, the
        destination and each pending shard's tasks, and leaves the shards and their entries in the
        journal there.
      log: gets a line when there is to be a wait for another conversion; by default stderr.

    Returns:
      The manifest and what is worth telling the user.

    Raises:
      DataError: the source or an image cannot be used.
      UsageError: the settings do not fit what is at the destination.
      LeaseHeldError: another conversion writes to the destination.
      LeaseLostError: another one has taken it over.
      StorageError: the destination cannot be written, or is not what was written there.
    """
    dest = storage.resolve(settings.dest)
    if dest.rstrip("/") == storage.resolve(settings.source).rstrip("/"):
        raise UsageError("--source and --dest are the same; the data set needs its own directory")
    if not settings.overwrite:
        journal_lib.refuse_data_set(dest)  # before anything that takes time
    source = sources.open_source(settings.source)
    _check_lost(settings, source)
    with journal_lib.locked(dest, log or output.log) as journal:
        if not settings.overwrite:
            journal_lib.refuse_data_set(dest)
        plan = _make_plan(settings, source)
        journal.clear(overwrite=settings.overwrite)
        name = _dataset_name(dest)
        journal.start(_identity(settings, plan), name, len(plan.shards))
        entries = _write_shards(settings, plan, journal, name, progress, beam)
        journal.verify(entries)
        summary = _summarise(settings, plan, name, entries)
        result = manifest.save(summary, dest, check=journal.check)
        journal.close()
    report = Report(ignored=source.ignored.lines())
    for key in ("kept", "enlarged", "stretched"):
        setattr(report, key, sum(entry[key] for entry in entries))
    return result, report


def _check_lost(settings: Settings, source: sources.Source) -> None:
    """Refuses a source of which a part cannot be found, as far as that may not be left out."""
    if not source.lost:
        return
    name, reason = next(iter(source.lost.items()))
    if settings.skip_bad:
        Frame(settings, source.path, "", 0, 0).check_bad(len(source.lost), name, reason)
        return
    more = f" ({len(source.lost)} such in all)" if len(source.lost) > 1 else ""
    raise DataError(
        f"{name} in {source.path}: {reason}{more}; images may be missing: repair or remove it, or "
        "leave out what cannot be read with --on_bad=skip"
    )


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
    reader, frame = sources.Reader(plan.source.path), plan.frame(settings)
    usable = (
        (task, done)
        for task in plan.tasks(numbers)
        if (done := frame.check(task, encode(task, reader, settings.options)))
    )
    task, first = next(usable, (None, None))
    if task is None or first is None:
        raise DataError(f"none of the {len(numbers)} images in {plan.source.path} can be used")
    spread = numbers[np.linspace(0, len(numbers) - 1, _SAMPLES).astype(int)]
    sampled = encode_all(plan.tasks(spread), reader, settings.options)
    sizes = [len(done.payload) for done in [first, *sampled] if done.payload]
    return task.name, first.channels, sum(sizes) // len(sizes)


# ---- identity ------------------------------------------------------------------------------------


def _dataset_name(dest: str) -> str:
    name = re.sub(r"\W+", "_", dest.rstrip("/").rsplit("/", 1)[-1], flags=re.ASCII)
    return name.strip("_") or "images"


def _identity(settings: Settings, plan: _Plan) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    labels = ",".join(map(str, plan.labels.numbers)) + json.dumps(plan.labels.names)
    return {
        "format version": manifest.VERSION,
        "Pillow version": PIL.__version__,
        "simplejpeg version": simplejpeg.__version__,
        "images in the source": plan.source.fingerprint(),
        "labels": tfrecord.checksum(labels.encode()),
        "--resolution": image_size(settings.options.resolution),
        "--crop": settings.options.crop,
        "--filter": settings.options.filter,
        "--channels": images.MODES.get(settings.options.channels, "auto"),
        "--background": settings.options.background,
        "--seed": settings.seed,
        "--max_images": settings.max_images,
    }


# ---- shards --------------------------------------------------------------------------------------


def _write_shards(
    settings: Settings,
    plan: _Plan,
    journal: Journal,
    name: str,
    progress: Callable[[int, int, int], None],
    beam: Callable[[Frame, str, dict[str, list[Task]]], None] | None,
) -> list[dict[str, Any]]:
    count = len(plan.shards)
    names = [journal_lib.shard_name(name, shard, count) for shard in range(count)]
    entries = journal.finished(names, len(plan.labels.names))
    pending = [shard for shard, entry in enumerate(entries) if entry is None]
    journal.remove_incomplete(names[shard] for shard in pending)
    total = sum(len(numbers) for numbers in plan.shards)
    earlier = total - sum(len(plan.shards[shard]) for shard in pending)
    progress(0, earlier, total)
    frame = plan.frame(settings, journal.plan)
    lost = len(plan.source.lost)
    if beam is not None:
        beam(
            frame, journal.dest, {names[shard]: plan.tasks(plan.shards[shard]) for shard in pending}
        )
        entries = journal.finished(names, len(plan.labels.names))
        _check_all(frame, names, entries, lost)
        progress(total - earlier, earlier, total)
        return [entry for entry in entries if entry is not None]
    bad = lost + sum(len(entry["skipped"]) for entry in entries if entry)
    count = 0
    chunks = (
        plan.tasks(numbers)
        for shard in pending
        for numbers in np.array_split(plan.shards[shard], -(-len(plan.shards[shard]) // plan.chunk))
    )
    outcomes = encode_in_processes(chunks, plan.source.path, settings.options, settings.workers)

    def counted(shard: int) -> Iterator[tuple[Task, Done]]:
        nonlocal count
        for outcome in _of_shard(outcomes, len(plan.shards[shard])):
            yield outcome
            count += 1
            progress(count, earlier, total)

    try:
        for shard in pending:
            entries[shard] = entry = write_shard(frame, journal, names[shard], counted(shard), bad)
            bad += len(entry["skipped"])
    finally:
        outcomes.close()
    return [entry for entry in entries if entry is not None]


def _check_all(
    frame: Frame, names: list[str], entries: list[dict[str, Any] | None], lost: int
) -> None:
    """Looks at what other machines made."""
    missing = [name for name, entry in zip(names, entries, strict=True) if entry is None]
    if missing:
        raise TrainerError(
            f"{len(missing)} shards ({missing[0]}, ...) are still missing; run the same command "
            "again, and it goes on"
        )
    skipped = [each for entry in entries if entry for each in entry["skipped"]]
    if skipped:
        frame.check_bad(lost + len(skipped), skipped[-1]["name"], skipped[-1]["reason"])


def write_shard(
    frame: Frame, journal: Journal, name: str, outcomes: Iterable[tuple[Task, Done]], bad: int = 0
) -> dict[str, Any]:
    """Makes one shard and, when it is complete, its entry in the journal.

    Args:
      frame: what all shards share.
      journal: of the destination.
      name: of the shard.
      outcomes: of its images, in order.
      bad: images that were left out of other shards.

    Returns:
      The entry.

    Raises:
      DataError: an image cannot be used, or none can.
      StorageError: it cannot be written, or the destination is another conversion's.
    """
    with storage.open_write_atomic(storage.join(journal.dest, name), new=True) as file:
        writer = records.ShardWriter(file)
        tally = _Tally()
        for task, done in outcomes:
            if (good := frame.check(task, done)) is None:
                bad += 1
                frame.check_bad(bad, task.name, done.reason)
                tally.skip(task, done)
            else:
                writer.write(good.payload or b"")
                tally.add(task, good)
        if not writer.offsets:
            raise DataError(f"no image of shard {name} can be used; lower --shards")
        journal.check()
    return journal.add(name, tally.entry(name, writer))


def _of_shard(outcomes: Iterator[tuple[Task, Done]], count: int) -> Iterator[tuple[Task, Done]]:
    for _ in range(count):
        yield next(outcomes)


class _Tally:
    """The journal's entry about a shard."""

    def __init__(self) -> None:
        self._labels: collections.Counter[int] = collections.Counter()
        self._flags: collections.Counter[str] = collections.Counter()
        self._skipped: list[dict[str, str]] = []

    def skip(self, task: Task, done: Done) -> None:
        self._skipped.append({"name": task.name, "reason": done.reason})

    def add(self, task: Task, done: Done) -> None:
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
        skipped=[
            *({"name": lost, "reason": reason} for lost, reason in plan.source.lost.items()),
            *(skipped for entry in entries for skipped in entry["skipped"]),
        ],
    )
