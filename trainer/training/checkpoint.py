"""Checkpoints: a run's whole state, there completely or not at all.

`<workdir>/checkpoints/step-000012345/` holds TensorFlow's checkpoint of `TrainState.variables`
(`state-<token>.*`), `state-<token>.json` (counters and identity of the run) and, written last,
`COMMITTED-<token>` with the size and CRC32C of every other file. The token is that of the lease under
which they were written, so no job ever writes a file of another's. Without a marker that fits, a
checkpoint doesn't exist; and one that a job commits after it has lost the lease is void (see
`trainer.core.fencing`).

A save takes hold of the values and returns; a thread writes them while the next steps are made. In
an object store every file is an object that appears whole: TensorFlow writes to a local disk, what
it wrote is uploaded, and the store's own CRC32Cs are compared before the marker is written. (Its
own file system would upload to temporary objects, copy them and remove them.)

What is removed: whole checkpoints that need not be kept, once newer ones are known to be whole, and
what jobs that lost the lease had not completed. Whatever else is there stays: damaged checkpoints,
those whose marker is lost, and files of others.

Finding, writing and reading are one file, longer than others, since all three must agree on names and
markers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import secrets
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import tensorflow as tf

from trainer import config as config_lib
from trainer.config import CheckpointConfig
from trainer.core import documents, storage
from trainer.core import lease as lease_lib
from trainer.core.errors import CheckpointError, StorageError
from trainer.core.fencing import Mark, Record
from trainer.core.lease import Lease, LeaseLostError
from trainer.core.storage import Digest
from trainer.families.network import Generator
from trainer.families.protocol import DataShape
from trainer.training import build, run_info

FORMAT = 4
"""The format of markers, file names and `state.json`."""

_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9,})")
_FILE = re.compile(rf"{_FOLDER}/{_NAME.pattern}/([^/]+)")
# With what writing them leaves if it is cut off.
_OURS = re.compile(r"\.?(?:state|COMMITTED)-([0-9a-f]{16})(?:\..*)?")
_FORMAT_1 = re.compile(r"COMMITTED|state\.json|state\.index|state\.data-00000-of-00001")


@dataclass(frozen=True)
class _Names:
    """The files of a checkpoint.

    Attributes:
      token: of the lease under which they were written.
    """

    token: str

    @property
    def prefix(self) -> str:
        """The prefix of the files that TensorFlow writes."""
        return f"state-{self.token}"

    @property
    def values(self) -> tuple[str, str]:
        """The directory of TensorFlow's own files."""
        return f"{self.prefix}.index", f"{self.prefix}.data-00000-of-00001"

    @property
    def info(self) -> str:
        """The counters."""
        return f"{self.prefix}.json"

    @property
    def marker(self) -> str:
        """The marker, which is written last."""
        return f"COMMITTED-{self.token}"


@dataclass(frozen=True)
class Found:
    """A committed checkpoint.

    Attributes:
      path: its directory.
      step: steps made when it was written.
      info: what `state.json` says.
      token: in the names of its files.
      files: what its files are, the marker left out.
    """

    path: str
    step: int
    info: dict[str, Any]
    token: str
    files: dict[str, Digest] = field(repr=False)

    @property
    def prefix(self) -> str:
        """TensorFlow's name for its values."""
        return storage.join(self.path, _Names(self.token).prefix)


# ------------------------------------------------------------------------------ looking


@dataclass
class _Stored:
    """Something that looks like a checkpoint, as a listing shows it.

    Attributes:
      path: its directory.
      step: in the directory's name.
      names: of the files of a checkpoint; those of format 1 have no token.
      files: what is there.
      whole: whether it is; None if that isn't known yet.
      kimg: where it was written, once that was asked for.
    """

    path: str
    step: int
    names: _Names
    files: dict[str, Digest]
    whole: bool | None = None
    kimg: float | None = None

    @property
    def mark(self) -> Mark:
        """The job that wrote it, and the time."""
        return self.names.token, self.step

    @property
    def marked(self) -> bool:
        """Whether it was completed, even if it has been damaged since."""
        return self.names.marker in self.files

    def judge(self) -> Found | str:
        """The checkpoint, or why it can't be used."""
        found = self._look()
        self.whole = isinstance(found, Found)
        return found

    def is_whole(self) -> bool:
        """The same, but not looked at twice."""
        if self.whole is None:
            self.judge()
        return bool(self.whole)

    def _look(self) -> Found | str:
        names = self.names
        if not names.token:
            return f"it is of format 1, and this trainer reads format {FORMAT}"
        if not self.marked:
            return f"it was never completed, or its {names.marker} is lost"
        try:
            marker = documents.parse_object(self._read(names.marker))
            version = marker.get("format")
            files = {
                name: Digest(int(digest["bytes"]), int(digest["crc32c"]))
                for name, digest in marker["files"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{names.marker} is damaged"
        if type(version) is not int:
            return f"{names.marker} is damaged"
        if version != FORMAT:
            return f"it is of format {version}, and this trainer reads format {FORMAT}"
        for name in {names.info: None, **dict.fromkeys(names.values), **files}:
            if name not in self.files:
                return f"{name} is missing"
            if not self._holds(name, files.get(name)):
                return f"{name} is not what was written (size or CRC32C)"
        try:
            info = run_info.parse(self._read(names.info))
        except ValueError as error:
            return f"{names.info} is damaged ({error})"
        return Found(self.path, self.step, info, names.token, files)

    def _read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.path, name))

    def _holds(self, name: str, expected: Digest | None) -> bool:
        listed = self.files[name]
        if expected is None or listed.bytes != expected.bytes:
            return False
        if listed.crc32c is None:
            listed = storage.digest(storage.join(self.path, name))
        return listed == expected


class Inventory:
    """All checkpoints of a run, whole or not, from one listing.

    Args:
      workdir: of the run.
      files: what there is in it, by `storage.walk`; looked up if it isn't given.
      record: what counts, as the lease says; looked up if it isn't given.
      at: where the checkpoints are, if there is one directory of them only.

    Attributes:
      record: the same; to be replaced when the lease's is.
      damaged: checkpoints that `newest` passed over although they had been completed, or may have
        been.
    """

    def __init__(
        self,
        workdir: str,
        files: Mapping[str, Digest] | None = None,
        record: Record | None = None,
        *,
        at: str = "",
    ) -> None:
        self._at = at
        self.damaged: list[str] = []
        self._workdir = workdir
        self._stored: dict[Mark, _Stored] = {}
        if files is None:
            below = storage.walk(storage.join(workdir, _FOLDER))
            files = {f"{_FOLDER}/{name}": digest for name, digest in below.items()}
        for name, digest in files.items():
            match = _FILE.fullmatch(name)
            ours = match and _OURS.fullmatch(match[2])
            if match and (ours or _FORMAT_1.fullmatch(match[2])):
                self.add(int(match[1]), ours[1] if ours else "", {match[2]: digest})
        if record is None:
            record = lease_lib.read_record(workdir) if self._stored else Record()
        self.record = record

    def newest(self) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each newer one on why it isn't."""
        skipped: list[str] = []
        self.damaged = []
        for stored in sorted(self._stored.values(), key=lambda one: one.step, reverse=True):
            if self.record.is_void(*stored.mark):
                late = "it was written after its job had lost the lease"
                why = late if stored.marked else "it was never completed"
            else:
                found = stored.judge()
                if isinstance(found, Found):
                    return found, skipped
                why = found
                self.damaged.append(stored.path)
            skipped.append(f"skipped checkpoint {stored.path}: {why}")
        return None, skipped

    def last_steps(self, tokens: Collection[str]) -> dict[str, int]:
        """The last step that each of some jobs has completed.

        A job's saves follow each other: one that another followed had been completed, though its
        marker may be lost.
        """
        last: dict[str, int] = {}
        for token in tokens:
            *completed, newest = sorted(step for its, step in self._stored if its == token) or [-1]
            if newest >= 0 and self._stored[token, newest].marked:
                completed.append(newest)
            if completed:
                last[token] = completed[-1]
        return last

    def add(
        self,
        step: int,
        token: str,
        files: Mapping[str, Digest],
        *,
        whole: bool | None = None,
        kimg: float | None = None,
    ) -> None:
        """Takes note of files that were written."""
        fresh = _Stored(self._at or _path(self._workdir, step), step, _Names(token), {})
        stored = self._stored.setdefault((token, step), fresh)
        stored.files |= files
        stored.whole, stored.kimg = whole, kimg

    def __contains__(self, mark: Mark) -> bool:
        return mark in self._stored

    def discard(self, marks: Collection[Mark], fence: storage.Fence) -> None:
        """Removes checkpoints that don't count any more, each one's marker first."""
        for mark in marks:
            stored = self._stored.pop(mark)
            names = sorted(stored.files, key=lambda name: name != stored.names.marker)
            paths = [storage.join(stored.path, name) for name in names]
            with fence():
                storage.remove_files(paths[:1])
                storage.remove_files(paths[1:])
                storage.remove_empty(stored.path)

    def left_over(self) -> list[Mark]:
        """What jobs that lost the lease have left, and what counts for nobody."""
        return [mark for mark in self._stored if self.record.is_void(*mark)]

    def dispensable(self, written: int, settings: CheckpointConfig) -> list[Mark]:
        """Checkpoints that need not be kept after that of step `written`; all of them are whole.

        Nothing damaged takes the place of a whole one, and what is damaged stays: it may be restored
        from elsewhere.
        """
        # A run goes on from its newest whole checkpoint: what is newer than the one just written is
        # damaged.
        counting = [
            stored
            for stored in sorted(self._stored.values(), key=lambda one: one.step, reverse=True)
            if stored.step <= written and stored.marked and not self.record.is_void(*stored.mark)
        ]
        keep = list(itertools.islice(filter(_Stored.is_whole, counting), settings.keep_last))
        kept = {stored.mark for stored in keep}
        period = settings.keep_every_kimg
        if period:
            periods: dict[int, list[_Stored]] = {}
            for stored in counting:
                periods.setdefault(int(_kimg(stored) // period), []).insert(0, stored)
            for number, members in periods.items():
                # The oldest one stays. One that is alone isn't even looked at.
                first = members if len(members) == 1 else filter(_Stored.is_whole, members)
                kept |= {stored.mark for stored in itertools.islice(first, int(number > 0))}
        return [one.mark for one in counting if one.mark not in kept and one.is_whole()]


def _kimg(stored: _Stored) -> float:
    """The time at which a checkpoint was written; 0 if its `state.json` is damaged."""
    if stored.kimg is None:
        try:
            text = storage.read_bytes(storage.join(stored.path, stored.names.info))
            stored.kimg = float(documents.parse_object(text)["kimg"])
        except (StorageError, ValueError, KeyError, TypeError):
            stored.kimg = 0.0
    return stored.kimg


def _path(workdir: str, step: int) -> str:
    return storage.join(workdir, _FOLDER, f"step-{step:09d}")


def newest(workdir: str) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one on why it isn't."""
    return Inventory(workdir).newest()


def find(path: str) -> Found:
    """The checkpoint a user means by a run's directory, or by a checkpoint's own.

    Raises:
      CheckpointError: there is none, or it is not whole.
    """
    path = path.rstrip("/")
    folder, _, name = path.rpartition("/")
    if _NAME.fullmatch(name):
        files = {f"{_FOLDER}/{name}/{file}": digest for file, digest in storage.walk(path).items()}
        workdir, _, last = folder.rpartition("/")
        record = None if last == _FOLDER else Record()  # one that lies elsewhere was copied
        found, skipped = Inventory(workdir or ".", files, record, at=path).newest()
        if found is None:
            why = "there is no such directory" if not files else "it holds none"
            if skipped:
                why = "; ".join(line.partition(": ")[2] for line in skipped)
            raise CheckpointError(f"checkpoint {path} can't be used: {why}")
        return found
    newest_one, skipped = newest(path)
    if newest_one is None:
        gone = not storage.isdir(path)
        why = "; ".join(skipped) or ("there is no such directory" if gone else "it holds none")
        raise CheckpointError(f"no checkpoint in {path}: {why}; give the --workdir of a run")
    return newest_one


# ------------------------------------------------------------------------------ writing


class Checkpoints:
    """Writes and keeps the checkpoints of one run.

    Args:
      workdir: of the run.
      settings: how many to keep.
      variables: the run's state, by name.
      optional: those of them that may be missing in a checkpoint: they start where they are.
      writer: whether this process writes; among several workers only the chief does.
      inventory: what there is already; found out by the first save if it isn't given.
      lease: of the workdir, where others may want to write it.
    """

    def __init__(
        self,
        workdir: str,
        settings: CheckpointConfig,
        variables: Mapping[str, tf.Variable],
        *,
        optional: Collection[str] = (),
        writer: bool = True,
        inventory: Inventory | None = None,
        lease: Lease | None = None,
    ) -> None:
        self._workdir, self._settings, self._variables = workdir, settings, dict(variables)
        self._optional = frozenset(optional)
        self._writer, self._inventory, self._lease = writer, inventory, lease
        self._names = _Names(lease.token if lease else secrets.token_hex(8))
        self._fence: storage.Fence = lease.fenced if lease else contextlib.nullcontext
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(
        self, step: int, info: Mapping[str, Any], flush: Callable[[], None] = lambda: None
    ) -> None:
        """Takes hold of the values and returns; they are written in the background.

        If the save before is still being written, waits for it.

        Args:
          step: steps made.
          info: goes into `state.json`; with `kimg`, the position in thousands of images.
          flush: writes the statistics on which a run counts that goes on from here.

        Raises:
          CheckpointError: the save before couldn't be written; nothing of it is left, and older
            ones stay.
          LeaseLostError: the workdir is another job's now.
        """
        self.wait()
        if not self._writer:
            return
        # Tensors on the host are values for good: where variables are there, too, they share the
        # memory until a step assigns anew, and nothing is copied.
        with tf.device("/CPU:0"):
            values = {_key(name): tf.identity(value) for name, value in self._variables.items()}
        self._saving = self._thread.submit(self._write, step, dict(info), values, flush)

    def wait(self) -> None:
        """Returns when the last save is committed and what it replaces is removed.

        Raises:
          CheckpointError, LeaseLostError: as for `save`.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(
        self,
        step: int,
        info: dict[str, Any],
        values: dict[str, tf.Tensor],
        flush: Callable[[], None],
    ) -> None:
        """Makes a checkpoint of what was taken hold of, and drops those no longer to be kept."""
        path, names = _path(self._workdir, step), self._names
        try:
            if self._inventory is None:
                self._inventory = Inventory(self._workdir)
            if self._lease:
                self._lease.check()
            files = _write_files(path, names, info, values)
            flush()
            marker = {
                "format": FORMAT,
                "step": step,
                "files": {name: dataclasses.asdict(digest) for name, digest in files.items()},
            }
            text = json.dumps(marker, indent=1)
            storage.write_text_atomic(storage.join(path, names.marker), text, self._fence)
        except LeaseLostError:
            raise  # and nothing of this counts
        except (tf.errors.OpError, OSError, StorageError) as error:
            self._check_lost()  # whoever has the lease now removes what this job had begun
            with contextlib.suppress(StorageError):
                self._withdraw(step)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({_first_line(error)}); free "
                "space or fix the path and run the same command again: it goes on from the "
                "checkpoint before"
            ) from error
        files[names.marker] = Digest(len(text), None)
        inventory = self._inventory
        inventory.add(step, names.token, files, whole=True, kimg=info.get("kimg"))
        self._discard(inventory.dispensable(step, self._settings))
        inventory.discard(inventory.left_over(), self._fence)

    def _check_lost(self) -> None:
        """Raises a LeaseLostError if another job is known to write the workdir now."""
        try:
            if self._lease:
                self._lease.check()
        except LeaseLostError:
            raise
        except StorageError:
            return  # it isn't known

    def _discard(self, marks: Collection[Mark]) -> None:
        """Removes checkpoints that count, once it is recorded that they don't any more."""
        assert self._inventory is not None
        if not marks:
            return
        with contextlib.ExitStack() as recorded:
            if self._lease:
                recorded.enter_context(self._lease.removing(frozenset(marks)))
            self._inventory.discard(marks, self._fence)

    def _withdraw(self, step: int) -> None:
        """Removes what there is of a save that failed, the marker included if it did get there."""
        if self._inventory is None:
            return
        for name, digest in storage.walk(_path(self._workdir, step)).items():
            match = _OURS.fullmatch(name)
            if match and match[1] == self._names.token:
                self._inventory.add(step, match[1], {name: digest})
        if (mark := (self._names.token, step)) in self._inventory:
            self._discard([mark])
        with self._fence():
            storage.remove_empty(_path(self._workdir, step))

    def restore(self, found: Found) -> list[str]:
        """Puts a checkpoint's values into the variables.

        They may be in another precision, and on any number of replicas.

        Returns:
          What starts afresh and what is left behind, if anything, in a sentence each.

        Raises:
          CheckpointError: it is of other networks; names the first variables that differ.
        """
        with _reader(found) as reader:
            stored = {
                _name(key): tuple(shape)
                for key, shape in reader.get_variable_to_shape_map().items()
                if key.endswith(_SUFFIX) and not key.startswith("save_counter")
            }
            missing = [name for name in self._variables if name not in stored]
            dropped = [name for name in stored if name not in self._variables]
            wrong = [f"{name} is not in it" for name in missing if name not in self._optional]
            wrong += [
                f"{name} is {list(stored[name])}, not {variable.shape.as_list()}"
                for name, variable in self._variables.items()
                if name in stored and stored[name] != tuple(variable.shape)
            ]
            wrong += [f"{name} is only in it" for name in dropped if _has_moments(name, stored)]
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise CheckpointError(
                    f"checkpoint {found.path} is of other networks: {'; '.join(wrong[:3])}{more}; "
                    "use the config it was made with, or another workdir"
                )
            for name, variable in self._variables.items():
                if name in stored:
                    variable.assign(reader.get_tensor(_key(name)))  # in the variable's precision
        lists = {"starting afresh": missing, "left behind": sorted(dropped)}
        return [f"{what}: {_listed(names)}" for what, names in lists.items() if names]


def _write_files(
    path: str, names: _Names, info: Mapping[str, Any], values: Mapping[str, tf.Tensor]
) -> dict[str, Digest]:
    """Writes everything but the marker, and says what it is once it is safely there."""
    remote = storage.is_remote(path)
    with scratch() if remote else contextlib.nullcontext(path) as folder:
        try:
            _write_locally(folder, names, info, values)
        except (tf.errors.OpError, OSError, StorageError) as error:
            if not remote:
                raise
            raise StorageError(
                f"it must first be written to the disk of temporary files, and that fails: "
                f"{_first_line(error)}; free space there or set TMPDIR"
            ) from error
        files = {}
        for name in (*names.values, names.info):
            here, there = storage.join(folder, name), storage.join(path, name)
            files[name] = storage.digest(here)
            if not remote:
                storage.sync(here)
                continue
            storage.upload(here, there)
            if storage.digest(there) != files[name]:
                raise StorageError(f"{there} is not in the store as it was written")
    return files


def _write_locally(
    folder: str, names: _Names, info: Mapping[str, Any], values: Mapping[str, tf.Tensor]
) -> None:
    # First, so that from here on the directory isn't empty, and nobody removes it.
    text = json.dumps(dict(info), indent=1)
    storage.write_text_atomic(storage.join(folder, names.info), text)
    with tf.device("/CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=storage.join(folder, names.prefix),
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=list(values.values()),
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A local directory for as long as it is needed; those that killed processes left go, too."""
    place, here = storage.temporary_directory(), zlib.crc32(lease_lib.machine().encode())
    start = f"stylegan-checkpoint-{here:08x}-"
    for name in storage.listdir(place):
        pid = name.removeprefix(start).partition("-")[0]
        if name.startswith(start) and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(StorageError):
                storage.remove_tree(storage.join(place, name))
    with tempfile.TemporaryDirectory(prefix=f"{start}{os.getpid()}-") as folder:
        yield folder


# ------------------------------------------------------------------------------ reading

# How tf.train.Checkpoint spells a variable's name: '/' as '.S', '.' as '..', and a suffix.
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def _key(name: str) -> str:
    return name.replace(".", "..").replace("/", ".S") + _SUFFIX


def _name(key: str) -> str:
    plain = key.removesuffix(_SUFFIX)
    return re.sub(r"\.([.S])", lambda match: "/" if match[1] == "S" else ".", plain)


@contextlib.contextmanager
def _reader(found: Found) -> Iterator[Any]:
    """TensorFlow's reader of a checkpoint's values; from an object store they are fetched first.

    Raises:
      CheckpointError: they can't be read.
    """
    remote = storage.is_remote(found.path)
    with scratch() if remote else contextlib.nullcontext(found.path) as folder:
        if remote:
            for name in _Names(found.token).values:
                storage.download(storage.join(found.path, name), storage.join(folder, name))
                if storage.digest(storage.join(folder, name)) != found.files[name]:
                    raise CheckpointError(
                        f"checkpoint {found.path} can't be read: {name} did not arrive as it was "
                        "written; run the same command again"
                    )
        try:
            yield tf.train.load_checkpoint(storage.join(folder, _Names(found.token).prefix))
        except (tf.errors.OpError, ValueError) as error:
            raise CheckpointError(f"checkpoint {found.path} can't be read ({error})") from error


def _has_moments(name: str, stored: Collection[str]) -> bool:
    """Whether a parameter of a network was trained."""
    network, _, parameter = name.partition("/")
    return f"{network.removesuffix('_ema')}_opt/first/{parameter}" in stored


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def read_parameters(found: Found, prefix: str) -> dict[str, np.ndarray]:
    """One network's parameters (`G`, `D` or `G_ema`) as stored."""
    start = _key(prefix + "/")[: -len(_SUFFIX)]
    with _reader(found) as reader:
        names = [key for key in reader.get_variable_to_shape_map() if key.startswith(start)]
        return {
            _name(key).removeprefix(f"{prefix}/"): reader.get_tensor(key)
            for key in names
            if key.endswith(_SUFFIX)
        }


def load_generator(found: Found) -> tuple[Generator, dict[str, np.ndarray]]:
    """The moving-average generator of a checkpoint.

    Returns:
      The network in full precision, and the parameters of G_ema in float32.

    Raises:
      CheckpointError: its `state.json` doesn't say what network it is.
    """
    run_info.check_network(found.info, found.path)
    config = config_lib.from_dict(found.info["config"], where=found.path)
    data = DataShape(
        tuple(found.info["resolution"]), found.info["channels"], tuple(found.info["label_counts"])
    )
    generator, _ = build.networks(config, data, rounded=False)
    stored = read_parameters(found, "G_ema")
    return generator, {name: value.astype(np.float32) for name, value in stored.items()}
