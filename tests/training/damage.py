"""Damages what a run has left, and tells whether the run that went on from it is right.

One file is damaged at a time, or one of each whole checkpoint. What must come of it:

- With a whole checkpoint left the run goes on from the newest one, and ends with the same state.
- With none it ends with exit code 4 and changes nothing, the lease aside; once the damaged files are
  restored, it goes on.
- Lines, events and grids from before the point where it goes on that were whole stay; those that
  were damaged stay as they are or are left out; all later ones are written anew.
"""

from __future__ import annotations

import collections
import json
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.core import storage, tfrecord
from trainer.core.lease import NAME as LEASE

Tree = dict[str, bytes]
KINDS = ("all", "data", "stats", "events", "marker", "lease", "info", "png", "index", "config")
_CHECKPOINT = {"marker": "/COMMITTED-", "info": ".json", "index": ".index", "data": ".data-"}
_PASSING = ("Timing/", "Resources/")


def tree(workdir: str) -> Tree:
    """Every file, by name."""
    return {name: storage.read_bytes(storage.join(workdir, name)) for name in storage.walk(workdir)}


def put(workdir: str, name: str, content: bytes | None) -> None:
    """Writes a file, or removes it."""
    path = storage.join(workdir, name)
    if content is None:
        storage.remove(path)
    else:
        storage.write_bytes_atomic(path, content)


@dataclass(frozen=True)
class Damage:
    """What was done to a run between two of its lives.

    Attributes:
      kind: one of `KINDS`.
      life: number of the next one.
      before: all files.
      after: what has become of those that were damaged; None if they were removed.
      steps: where the run may go on; empty if it must not.
    """

    kind: str
    life: int
    before: Tree
    after: dict[str, bytes | None]
    steps: frozenset[int]

    def now(self) -> Tree:
        """All files after it."""
        changed = self.before | self.after
        return {name: content for name, content in changed.items() if content is not None}

    def restore(self, workdir: str) -> None:
        """Puts the damaged files back."""
        for name in self.after:
            put(workdir, name, self.before[name])


def damage(workdir: str, kind: str, life: int, rng: random.Random) -> Damage | None:
    """Damages a file of a kind; None if there is none of it or no checkpoint is whole.

    Args:
      workdir: of a run of which no process is alive.
      kind: one of `KINDS`; a checkpoint's only one isn't damaged but as 'all'.
      life: number of the next process.
      rng: for the file and what is done to it.
    """
    whole, files = whole_checkpoints(workdir), tree(workdir)
    if not whole:
        return None
    after: dict[str, bytes | None] = {}
    if kind in (*_CHECKPOINT, "all"):
        hit = whole if kind == "all" or len(whole) == 1 else [rng.choice(whole)]
        for step, token in hit:
            each = rng.choice([*_CHECKPOINT]) if kind == "all" else kind
            (name,) = (
                name
                for name in files
                if name.startswith(f"checkpoints/step-{step:09d}/")
                and token in name
                and _CHECKPOINT[each] in name
            )
            # A marker can be changed so that it says the same; and a job's only one that is gone looks
            # as if its first save had been cut off.
            certain = len(hit) == len(whole) and each == "marker"
            after[name] = _damaged(files[name], rng, certain=certain)
        left = [one for one in whole if one not in hit]
        if not left:
            kind, steps = "all", frozenset[int]()
        else:
            newest = max(left)[0]
            steps = frozenset(step for step, _ in whole if step >= newest)
    else:
        start = {"stats": "stats.jsonl", "events": "tensorboard/", "lease": LEASE}
        ending = {"png": ".png"}.get(kind, "")
        start |= {"png": "", "config": "config.yaml"}
        names = [n for n in files if n.startswith(start[kind]) and n.endswith(ending)]
        if not names:
            return None
        name = rng.choice(sorted(names))
        after[name] = _damaged(files[name], rng)
        steps = frozenset({max(whole)[0]})
    for name, content in after.items():
        put(workdir, name, content)
    return Damage(kind, life, files, after, steps)


def _damaged(content: bytes, rng: random.Random, *, certain: bool = False) -> bytes | None:
    """Something else than it was; None if it is to be removed."""
    hows = ["cut", "empty"] if certain else ["add", "flip", "flip", "cut", "empty", "remove"]
    how = rng.choice(hows)
    at = rng.randrange(len(content)) if content else 0
    if how == "remove":
        return None
    if how == "empty":
        return b""
    if how == "cut":
        return content[:at]
    if how == "flip" and content:
        return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]
    return content + bytes([rng.randrange(256)])


def whole_checkpoints(workdir: str) -> list[tuple[int, str]]:
    """Step and token of each checkpoint that counts."""
    from trainer.training.checkpoint import Inventory

    inventory = Inventory(workdir)
    return [
        (stored.step, stored.names.token)
        for stored in inventory._stored.values()
        if stored.marked and not inventory.record.is_void(*stored.mark) and stored.is_whole()
    ]


# ------------------------------------------------------------------------------ what a run left


def state(workdir: str) -> dict[str, bytes]:
    """All variables of a run's newest checkpoint."""
    from trainer.training import checkpoint

    with checkpoint._reader(checkpoint.find(workdir)) as reader:
        names = reader.get_variable_to_shape_map()
        return {name: reader.get_tensor(name).tobytes() for name in names}


def statistics(lines: Sequence[bytes]) -> dict[int, dict[str, Any]]:
    """The lines of stats.jsonl by tick, without what differs from run to run."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        document = json.loads(line)
        assert document["tick"] not in found, f"tick {document['tick']} is there twice"
        found[document["tick"]] = {
            key: value
            for key, value in document.items()
            if not key.startswith((*_PASSING, "timestamp"))
        }
    return found


Event = tuple[int, str, bytes]


def events(content: bytes, tick: int = -1) -> Iterator[tuple[bytes, int, list[Event]]]:
    """The whole records of an event file: each as it lies there, its tick, and what it says.

    What differs from run to run is left out. A damaged record is passed over.
    """
    import tensorflow as tf

    place = 0
    while place + tfrecord.OVERHEAD <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        frame = content[place : place + length + tfrecord.OVERHEAD]
        payload = frame[12:-4]
        if len(payload) != length or tfrecord.frame(payload) != frame:
            place += 1
            continue
        place += len(frame)
        event = tf.compat.v1.Event.FromString(payload)
        for value in event.summary.value:
            if value.tag == "Progress/tick":
                tick = int(tf.make_ndarray(value.tensor))
        # A run's config is there once; that of another run may say other paths and times.
        values = [
            (
                event.step,
                value.tag,
                b"" if value.tag == "Config" else value.tensor.SerializeToString(),
            )
            for value in event.summary.value
            if not value.tag.startswith(_PASSING)
        ]
        yield frame, tick, values


def all_events(files: Tree) -> list[Event]:
    """What all event files say, in order."""
    return sorted(
        value
        for name, content in files.items()
        if name.startswith("tensorboard/")
        for _, _, values in events(content)
        for value in values
    )


# ------------------------------------------------------------------------------ comparing


def compare(
    found: str, wanted: str, damages: Sequence[Damage] = (), starts: Mapping[int, int] = {}
) -> None:
    """Fails if two runs differ in a bit of what they left, but for what was damaged.

    Args:
      found: the workdir of the one that was disturbed.
      wanted: that of the other.
      damages: what was done to the files of the first.
      starts: position in images where each of its lives went on, by number.
    """
    assert state(found) == state(wanted), "state differs"
    ours, theirs = tree(found), tree(wanted)
    ticks = statistics(theirs["stats.jsonl"].splitlines())
    ends = {tick: document["nimg"] for tick, document in ticks.items()} | {-1: 0}

    def lost(of: Damage, tick: int) -> bool:
        """Whether what a damage destroyed of a tick was never written again."""
        later = [start for life, start in starts.items() if life >= of.life]
        return ends[tick] <= min(later)

    # ---------------------------------------------------------------- statistics
    torn, missing = set[bytes](), set[int]()
    for each in damages:
        if "stats.jsonl" in each.after and each.kind == "stats":
            before, after = (
                (files["stats.jsonl"] or b"").split(b"\n") for files in (each.before, each.after)
            )
            torn |= set(after) - set(before)
            for line in set(before) - set(after) - torn - {b""}:
                tick = json.loads(line)["tick"]
                missing |= {tick} if lost(each, tick) else set()
    there = ours.get("stats.jsonl", b"").split(b"\n")
    lines = [line for line in there if line and line not in torn]
    stats = statistics(lines)
    expected = {tick: document for tick, document in ticks.items() if tick not in missing}
    assert stats.keys() == expected.keys(), (sorted(stats), sorted(expected), sorted(missing))
    assert stats == expected, "statistics differ"

    # ---------------------------------------------------------------- events
    left = collections.Counter(all_events(theirs))
    for each in damages:
        for name in each.after if each.kind == "events" else ():
            after_damage = each.after[name] or b""
            for frame, tick, values in events(each.before[name]):
                if frame not in after_damage and lost(each, tick):
                    left.subtract(values)
    assert min(left.values()) >= 0
    seen = collections.Counter(all_events(ours))
    gone = {(step, tag): n for (step, tag, _), n in (+left - seen).items()}
    extra = {(step, tag): n for (step, tag, _), n in (seen - +left).items()}
    assert not gone and not extra, f"events: {gone} are gone, and {extra} should not be there"

    # ---------------------------------------------------------------- grids and config
    broken: dict[str, list[bytes | None]] = collections.defaultdict(list)
    for each in damages:
        if each.kind in ("png", "config"):
            for name, content in each.after.items():
                broken[name].append(content)
    for name, content in theirs.items():
        if name.endswith(".png"):
            assert ours.get(name) in (content, *broken[name]), f"{name} differs"
    assert {n for n in ours if n.endswith(".png")} <= {n for n in theirs if n.endswith(".png")}
    configs = {each.before["config.yaml"] for each in damages if "config.yaml" in each.before}
    assert not damages or ours["config.yaml"] in configs, "config.yaml differs"
