"""A conversion's destination: who may write there, what is complete, and what else lies there.

Of any number of conversions one has the directory's lease (`trainer.core.lease`). `<dest>/.partial/`
holds its plan and, for each complete shard, an entry that names the plan: what another plan made
never counts. A conversion that lost its lease, because its machine stood still, changes nothing any
more. Before anything gets its name the lease is asked; what was asked before it was lost finds its
temporary file removed or, in an object store, the name taken.

Files that no data set and no conversion lists are left alone, and their names are not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from trainer.core import documents, lease, storage
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.data import manifest
from trainer.data.journal_entry import read_entry

_PLAN = "plan.json"
_REPLACED = "replaced.json"  # what a data set had that is being replaced
_READERS = 8
_NAME, _SHARDS = "name of the shards", "--shards"

# What `storage.open_write_atomic` leaves of a process that was killed.
_UNFINISHED = re.compile(
    r"\.(\w+-\d+-of-\d+\.tfrecord|" + re.escape(manifest.FILE_NAME) + r")\.[0-9a-f]{8}\.tmp"
)


def shard_name(name: str, shard: int, shards: int) -> str:
    """The name of a record file."""
    return f"{name}-{shard:05d}-of-{shards:05d}.tfrecord"


def fingerprint(plan: dict[str, Any]) -> str:
    """The hash of everything that the bytes of the result depend on."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(dest: str, log: Callable[[str], object]) -> Iterator[Journal]:
    """The journal of a destination that nobody else writes meanwhile.

    Args:
      dest: directory of the data set.
      log: gets a line when there is to be a wait, and when the lease was another's.

    Raises:
      LeaseHeldError: another conversion writes there; names it.
      StorageError: the lease cannot be read or written.
    """
    try:
        held = lease.acquire(dest, log=log)
    except lease.LeaseHeldError as error:
        raise lease.LeaseHeldError(str(error).replace("--workdir", "--dest")) from error
    with held:
        journal = Journal(dest, held.check)
        journal.remove_unfinished()
        yield journal


def of_machine(dest: str, plan: str) -> Journal:
    """The journal for a machine that makes shards for the one that has the lease.

    Args:
      dest: directory of the data set.
      plan: fingerprint of the plan; without it at the destination nothing is written.
    """

    def check() -> None:
        if fingerprint(_read_json(storage.join(dest, manifest.PARTIAL_NAME, _PLAN))) != plan:
            raise StorageError(f"{dest} is another conversion's by now; nothing more is written")

    return Journal(dest, check, plan)


def refuse_data_set(dest: str) -> None:
    """Refuses to touch a data set.

    Raises:
      UsageError: there is one.
    """
    if storage.isfile(storage.join(dest, manifest.FILE_NAME)):
        raise UsageError(
            f"{dest} holds a data set already; choose another --dest, or replace it with --overwrite"
        )


@dataclass
class Journal:
    """The known state of a destination.

    Attributes:
      dest: directory of the data set.
      check: raises if somebody else may write there by now; called before anything gets its name.
      plan: fingerprint of what is being made.
    """

    dest: str
    check: Callable[[], object]
    plan: str = ""

    def _path(self, *parts: str) -> str:
        return storage.join(self.dest, manifest.PARTIAL_NAME, *parts)

    def _write(self, path: str, document: dict[str, Any]) -> None:
        with storage.open_write_atomic(path) as file:
            file.write(json.dumps(document, indent=1).encode())
            self.check()

    def remove_unfinished(self) -> None:
        """Removes what was being written by a process that was killed, or that lost the lease."""
        if storage.is_remote(self.dest):
            return  # object stores keep no halves
        for folder in (self.dest, self._path()):
            for entry in storage.listdir(folder) if storage.isdir(folder) else []:
                inside = folder != self.dest and re.search(r"\.[0-9a-f]{8}\.tmp$", entry)
                if inside or _UNFINISHED.fullmatch(entry):
                    storage.remove(storage.join(folder, entry))

    # ---- what was there before -------------------------------------------------------------------

    def clear(self, *, overwrite: bool) -> None:
        """Makes sure that there is no data set; with `overwrite` it goes, and all unfinished ones.

        Raises:
          UsageError: there is one that may not be removed.
        """
        where = storage.join(self.dest, manifest.FILE_NAME)
        if not overwrite:
            refuse_data_set(self.dest)
        elif storage.isfile(where):
            try:
                old = manifest.load(self.dest)
            except DataError as error:
                raise UsageError(
                    f"{where} is not a manifest to overwrite; move it away or choose another "
                    f"--dest ({error})"
                ) from error
            # A conversion that is killed now leaves no shards that nobody knows.
            self._write(self._path(_REPLACED), {"shards": [shard.name for shard in old.shards]})
            storage.remove(where)
        if storage.isfile(self._path(_REPLACED)):
            self._remove_shards(_names(_read_json(self._path(_REPLACED)).get("shards")))
            storage.remove(self._path(_REPLACED))
        if overwrite:
            there = storage.walk(self._path())
            self._remove_shards(name.removesuffix(".json") for name in there if _is_entry(name))
            self._remove_shards(_planned(self._read_plan()))
            self.check()
            storage.remove_tree(self._path())

    def _remove_shards(self, names: Iterable[str]) -> None:
        self.check()
        storage.remove_files(storage.join(self.dest, name) for name in names)

    def _read_plan(self) -> dict[str, Any]:
        where = self._path(_PLAN)
        return _read_json(where) if storage.isfile(where) else {}

    def start(self, plan: dict[str, Any], name: str, shards: int) -> None:
        """Starts a journal, or checks that the one there is of this very conversion.

        Args:
          plan: everything that the bytes of the result depend on, by what the user knows it as.
          name: what the shards' names begin with.
          shards: how many there will be.

        Raises:
          UsageError: it is of another conversion, or names are taken by files of others.
        """
        plan = {**plan, _NAME: name, _SHARDS: shards}
        self.plan = fingerprint(plan)
        found = self._read_plan()
        if fingerprint(found) == self.plan:
            return
        there = storage.walk(self.dest)
        complete = any(_is_entry(each.partition("/")[2]) for each in _below_partial(there))
        if complete:
            changed = [key for key in plan if found.get(key) != plan[key]]
            # The number of shards follows from the images, unless it is all that has changed.
            changed = [key for key in changed if key != _SHARDS] or changed or ["its plan is lost"]
            raise UsageError(
                f"{self.dest} holds an unfinished conversion with other settings (changed: "
                f"{', '.join(changed)}); run it as before, or start anew with --overwrite"
            )
        # Nothing was complete that could be lost; half of a shard without its entry may be there.
        left = [each for each in _planned(found) if each in there]
        self._remove_shards(left)
        strange = [each for each in _planned(plan) if each in there.keys() - set(left)]
        if strange:
            raise UsageError(
                f"{self.dest} holds {strange[0]}{' and others' if strange[1:] else ''}, of no data "
                "set or conversion that is known here; move it away or choose another --dest"
            )
        self._write(self._path(_PLAN), plan)

    # ---- shards ----------------------------------------------------------------------------------

    def finished(self, names: list[str], num_classes: int) -> list[dict[str, Any] | None]:
        """The entries of shards, None for those that are not complete or are another plan's."""
        there = storage.walk(self.dest)

        def entry(name: str) -> dict[str, Any] | None:
            where = f"{manifest.PARTIAL_NAME}/{name}.json"
            if name not in there or where not in there:
                return None
            digest = there[name]
            path = storage.join(self.dest, where)
            found = read_entry(path, name, digest.bytes, num_classes)
            if found is None or found.get("plan") != self.plan:
                return None
            return found if digest.crc32c in (None, found["crc32c"]) else None

        with futures.ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(entry, names))

    def remove_incomplete(self, names: Iterable[str]) -> None:
        """Removes shards without an entry of this plan, so that their names are free."""
        there = storage.walk(self.dest)
        self._remove_shards(name for name in names if name in there)

    def add(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Notes that a shard is complete; returns the entry with the plan."""
        entry = {**entry, "plan": self.plan}
        self._write(self._path(f"{name}.json"), entry)
        return entry

    def verify(self, entries: list[dict[str, Any]]) -> None:
        """Makes sure that the shards are those of the entries, by their content.

        Raises:
          StorageError: one is not; it will be made again.
        """
        there = storage.walk(self.dest)

        def is_wrong(entry: dict[str, Any]) -> bool:
            found = there.get(entry["name"])
            if found is not None and found.crc32c is None:
                found = storage.digest(storage.join(self.dest, entry["name"]))
            return (
                entry["plan"] != self.plan
                or found is None
                or found.bytes != entry["bytes"]
                or found.crc32c not in (None, entry["crc32c"])
            )

        with futures.ThreadPoolExecutor(_READERS) as pool:
            results = list(pool.map(is_wrong, entries))
        wrong = [entry["name"] for entry, bad in zip(entries, results, strict=True) if bad]
        if wrong:
            self.check()
            storage.remove_files(self._path(f"{name}.json") for name in wrong)
            raise StorageError(
                f"{wrong[0]} in {self.dest} is not what was written there ({len(wrong)} shards); "
                "make sure that nobody else writes there, and run the same command again"
            )

    def close(self) -> None:
        """Removes the journal of a complete data set."""
        self.check()
        storage.remove_tree(self._path())


def _is_entry(name: str) -> bool:
    return name.endswith(".tfrecord.json")


def _below_partial(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{manifest.PARTIAL_NAME}/")]


def _planned(plan: dict[str, Any]) -> list[str]:
    """The names of the shards of a plan that was read."""
    name, shards = plan.get(_NAME), plan.get(_SHARDS)
    if not isinstance(shards, int) or not isinstance(name, str) or shards > 1 << 20:
        return []
    return _names([shard_name(name, shard, shards) for shard in range(shards)])


def _names(found: object) -> list[str]:
    """Those of a list that are names of files in the directory itself."""
    names = found if isinstance(found, list) else []
    return [n for n in names if isinstance(n, str) and re.fullmatch(r"\w[\w.-]*", n, re.ASCII)]


def _read_json(where: str) -> dict[str, Any]:
    try:
        return documents.read_object(where)
    except documents.DocumentError:
        return {}
