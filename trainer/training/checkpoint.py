"""Checkpoints: a run's whole state, there completely or not at all.

`<workdir>/checkpoints/step-000012345/` holds TensorFlow's checkpoint of `TrainState.variables`
(`state.*`), `state.json` (counters and identity of the run) and, written last, `COMMITTED` with the
size and CRC32C of every other file. Without a marker that fits, a checkpoint doesn't exist.

A save takes hold of the values and returns; a thread writes them while the next steps are made. In
an object store every file is an object that appears whole: TensorFlow writes to a local disk, what
it wrote is uploaded, and the store's own CRC32Cs are compared before the marker is written. (Its
own file system would upload to temporary objects, copy them and remove them.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import tensorflow as tf

from trainer.core import config as config_lib
from trainer.core import documents, storage
from trainer.core import lease as lease_lib
from trainer.core.config import CheckpointConfig, Config
from trainer.core.errors import CheckpointError, StorageError
from trainer.core.lease import Lease, LeaseLostError
from trainer.core.storage import Digest
from trainer.networks.stylegan2 import Generator
from trainer.training import build, run_info

_MARKER = "COMMITTED"
_INFO = "state.json"
_PREFIX = "state"  # of the files that TensorFlow writes
_VALUES = (f"{_PREFIX}.index", f"{_PREFIX}.data-00000-of-00001")
_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9,})")
_FILE = re.compile(rf"{_FOLDER}/{_NAME.pattern}/(.*)")


@dataclass(frozen=True)
class Found:
    """A committed checkpoint.

    Attributes:
      path: its directory.
      step: steps made when it was written.
      info: what `state.json` says.
      files: what its files are, the marker left out.
    """

    path: str
    step: int
    info: dict[str, Any]
    files: dict[str, Digest] = field(repr=False)


# ------------------------------------------------------------------------------ looking


@dataclass
class _Stored:
    """Something that looks like a checkpoint, as a listing shows it.

    Attributes:
      path: its directory.
      files: what is in it.
      damaged: whether it was found to be.
      kimg: where it was written, once that was asked for.
    """

    path: str
    files: dict[str, Digest]
    damaged: bool = False
    kimg: float | None = None

    @property
    def committed(self) -> bool:
        """Whether it may count as one of those that are kept."""
        return _MARKER in self.files and not self.damaged

    def judge(self, step: int) -> Found | str:
        """The checkpoint, or why it can't be used."""
        if _MARKER not in self.files:
            return "it was never completed"
        try:
            files = {
                name: Digest(int(digest["bytes"]), int(digest["crc32c"]))
                for name, digest in documents.parse_object(self._read(_MARKER))["files"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{_MARKER} is damaged"
        for name in {_INFO: None, **dict.fromkeys(_VALUES), **files}:
            if name not in self.files:
                return f"{name} is missing"
            if not self._holds(name, files.get(name)):
                return f"{name} is not what was written (size or CRC32C)"
        try:
            return Found(self.path, step, run_info.parse(self._read(_INFO)), files)
        except ValueError as error:
            return f"{_INFO} is damaged ({error})"

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
    """What there is of a run's checkpoints, whole or not, by one listing.

    Args:
      workdir: of the run.
      files: what there is in it, by `storage.walk`; looked up if it isn't given.
    """

    def __init__(self, workdir: str, files: Mapping[str, Digest] | None = None) -> None:
        self._workdir = workdir
        self._stored: dict[int, _Stored] = {}
        if files is None:
            below = storage.walk(storage.join(workdir, _FOLDER))
            files = {f"{_FOLDER}/{name}": digest for name, digest in below.items()}
        for name, digest in files.items():
            match = _FILE.fullmatch(name)
            if match:
                self.add(int(match[1]), {match[2]: digest})

    def newest(self) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each newer one on why it isn't."""
        skipped: list[str] = []
        for step, stored in sorted(self._stored.items(), reverse=True):
            found = stored.judge(step)
            if isinstance(found, Found):
                return found, skipped
            stored.damaged = True
            skipped.append(f"skipped checkpoint {stored.path}: {found}")
        return None, skipped

    def add(self, step: int, files: Mapping[str, Digest], kimg: float | None = None) -> None:
        """Takes note of files that were written."""
        stored = self._stored.setdefault(step, _Stored(_path(self._workdir, step), {}))
        stored.files |= files
        stored.kimg = kimg

    def remove(self, step: int) -> None:
        """Removes what there is of a checkpoint, its marker first."""
        stored = self._stored.pop(step, None)
        marker = storage.join(_path(self._workdir, step), _MARKER)
        storage.remove_files([marker])
        if not storage.is_remote(marker):
            storage.remove_tree(_path(self._workdir, step))
        elif stored is not None:
            storage.remove_files(storage.join(stored.path, n) for n in stored.files if n != _MARKER)

    def drop_old(self, written: int, settings: CheckpointConfig) -> None:
        """Removes what need not be kept after the checkpoint of step `written`."""
        # A run goes on from its newest whole checkpoint, so what is newer than the one just written
        # is damaged: it must not take the place of a good one.
        whole = [
            step
            for step, stored in sorted(self._stored.items(), reverse=True)
            if step <= written and stored.committed
        ]
        keep = set(whole[: settings.keep_last])
        period = settings.keep_every_kimg
        if period:
            # The oldest of each period comes last, and stays.
            firsts = {int(self._kimg(step) // period): step for step in whole}
            keep |= {step for mark, step in firsts.items() if mark > 0}
        for step in self._stored.keys() - keep:
            self.remove(step)

    def _kimg(self, step: int) -> float:
        """Where a checkpoint was written; 0 if its `state.json` is damaged."""
        stored = self._stored[step]
        if stored.kimg is None:
            try:
                text = storage.read_bytes(storage.join(stored.path, _INFO))
                stored.kimg = float(documents.parse_object(text)["kimg"])
            except (StorageError, ValueError, KeyError, TypeError):
                stored.kimg = 0.0
        return stored.kimg


def _path(workdir: str, step: int) -> str:
    return storage.join(workdir, _FOLDER, f"step-{step:09d}")


def _step_of(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def newest(workdir: str) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one on why it isn't."""
    return Inventory(workdir).newest()


def find(path: str) -> Found:
    """The checkpoint a user means by a run's directory, or by a checkpoint's own.

    Raises:
      CheckpointError: there is none, or it is not whole.
    """
    name = path.rstrip("/").rsplit("/", 1)[-1]
    step = _step_of(name)
    if step is not None:
        files = storage.walk(path)
        found = _Stored(path, files).judge(step) if files else "there is no such directory"
        if isinstance(found, str):
            raise CheckpointError(f"checkpoint {path} can't be used: {found}")
        return found
    newest_one, skipped = newest(path)
    if newest_one is None:
        why = "; ".join(skipped) or "it holds none"
        raise CheckpointError(f"no checkpoint in {path}: {why}; give the --workdir of a run")
    return newest_one


# ------------------------------------------------------------------------------ writing


class Checkpoints:
    """Writes and keeps the checkpoints of one run.

    Args:
      workdir: of the run.
      settings: how many to keep.
      variables: the run's state, by name.
      writer: whether this process writes; among several workers only the chief does.
      inventory: what there is already; found out by the first save if it isn't given.
      lease: of the workdir, if there is one: without it nothing is committed or removed.
    """

    def __init__(
        self,
        workdir: str,
        settings: CheckpointConfig,
        variables: Mapping[str, tf.Variable],
        *,
        writer: bool = True,
        inventory: Inventory | None = None,
        lease: Lease | None = None,
    ) -> None:
        self._workdir, self._settings, self._variables = workdir, settings, dict(variables)
        self._writer, self._inventory, self._lease = writer, inventory, lease
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, info: Mapping[str, Any]) -> None:
        """Takes hold of the values and returns; they are written in the background.

        If the save before is still being written, waits for it.

        Args:
          step: steps made.
          info: goes into `state.json`; with `kimg`, the position in thousands of images.

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
        self._saving = self._thread.submit(self._write, step, dict(info), values)

    def wait(self) -> None:
        """Returns when the last save is committed and what it replaces is removed.

        Raises:
          CheckpointError, LeaseLostError: as for `save`.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(self, step: int, info: dict[str, Any], values: dict[str, tf.Tensor]) -> None:
        """Makes a checkpoint of what was taken hold of, and drops those no longer to be kept."""
        path = _path(self._workdir, step)
        try:
            if self._inventory is None:
                self._inventory = Inventory(self._workdir)
            self._check_lease()
            self._inventory.remove(step)  # the remains of a save that was cut off
            files = _write_files(path, info, values)
            self._check_lease()
            storage.flush_appended()  # the ticks that a run going on from here counts on
            marker = {"step": step, "files": {n: dataclasses.asdict(d) for n, d in files.items()}}
            text = json.dumps(marker, indent=1)
            storage.write_text_atomic(storage.join(path, _MARKER), text)
        except LeaseLostError:
            raise  # and nothing of this is ours any more
        except (tf.errors.OpError, OSError, StorageError) as error:
            if self._inventory is not None:
                with contextlib.suppress(StorageError):
                    self._inventory.remove(step)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({_first_line(error)}); free "
                "space or fix the path and run the same command again: it goes on from the "
                "checkpoint before"
            ) from error
        self._inventory.add(step, {**files, _MARKER: Digest(len(text), None)}, info.get("kimg"))
        self._inventory.drop_old(step, self._settings)

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def restore(self, found: Found) -> None:
        """Puts a checkpoint's values into the variables.

        They may be in another precision, and on any number of replicas.

        Raises:
          CheckpointError: it is of other networks; names the first variables that differ.
        """
        with _reader(found) as reader:
            _check_shapes(reader, found.path, self._variables)
            for name, variable in self._variables.items():
                variable.assign(reader.get_tensor(_key(name)))  # in the variable's precision


def _write_files(
    path: str, info: Mapping[str, Any], values: Mapping[str, tf.Tensor]
) -> dict[str, Digest]:
    """Writes everything but the marker, and says what it is once it is safely there."""
    remote = storage.is_remote(path)
    with scratch() if remote else contextlib.nullcontext(path) as folder:
        try:
            _write_locally(folder, info, values)
        except (tf.errors.OpError, OSError, StorageError) as error:
            if not remote:
                raise
            raise StorageError(
                f"it must first be written to the disk of temporary files, and that fails: "
                f"{_first_line(error)}; free space there or set TMPDIR"
            ) from error
        files = {}
        for name in (*_VALUES, _INFO):
            here, there = storage.join(folder, name), storage.join(path, name)
            files[name] = storage.digest(here)
            if not remote:
                storage.sync(here)
                continue
            storage.upload(here, there)
            if storage.digest(there) != files[name]:
                raise StorageError(f"{there} is not in the store as it was written")
    return files


def _write_locally(folder: str, info: Mapping[str, Any], values: Mapping[str, tf.Tensor]) -> None:
    storage.makedirs(folder)
    with tf.device("/CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=storage.join(folder, _PREFIX),
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=list(values.values()),
        )
    storage.write_text_atomic(storage.join(folder, _INFO), json.dumps(dict(info), indent=1))


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


@contextlib.contextmanager
def _reader(found: Found) -> Iterator[Any]:
    """TensorFlow's reader of a checkpoint's values; from an object store they are fetched first.

    Raises:
      CheckpointError: they can't be read.
    """
    remote = storage.is_remote(found.path)
    with scratch() if remote else contextlib.nullcontext(found.path) as folder:
        if remote:
            for name in _VALUES:
                storage.download(storage.join(found.path, name), storage.join(folder, name))
                if storage.digest(storage.join(folder, name)) != found.files[name]:
                    raise CheckpointError(
                        f"checkpoint {found.path} can't be read: {name} did not arrive as it was "
                        "written; run the same command again"
                    )
        try:
            yield tf.train.load_checkpoint(storage.join(folder, _PREFIX))
        except (tf.errors.OpError, ValueError) as error:
            raise CheckpointError(f"checkpoint {found.path} can't be read ({error})") from error


def _check_shapes(reader: Any, path: str, variables: Mapping[str, tf.Variable]) -> None:
    stored = reader.get_variable_to_shape_map()
    wrong = []
    for name, variable in variables.items():
        shape = stored.get(_key(name))
        if shape is None:
            wrong.append(f"{name} is not in it")
        elif tuple(shape) != tuple(variable.shape):
            wrong.append(f"{name} is {shape}, not {variable.shape.as_list()}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"checkpoint {path} is of other networks: {'; '.join(wrong[:3])}{more}; use the "
            "config it was made with, or another workdir"
        )


def read_parameters(found: Found, prefix: str) -> dict[str, np.ndarray]:
    """One network's parameters (`G`, `D` or `G_ema`) as stored."""
    start = _key(prefix + "/")[: -len(_SUFFIX)]
    with _reader(found) as reader:
        names = [key for key in reader.get_variable_to_shape_map() if key.startswith(start)]
        return {
            key[len(start) : -len(_SUFFIX)].replace("..", "."): reader.get_tensor(key)
            for key in names
            if key.endswith(_SUFFIX)
        }


def load_generator(
    path: str,
) -> tuple[Generator, dict[str, np.ndarray], Config, dict[str, Any]]:
    """The moving-average generator of a run or a checkpoint.

    Args:
      path: a run's directory (its newest checkpoint is taken), or a checkpoint's.

    Returns:
      The network in full precision, the parameters of G_ema in float32, the run's config, and
      `state.json` with `step`, `kimg`, `resolution`, `channels`, `label_names` and `label_counts`.

    Raises:
      CheckpointError: there is no whole checkpoint.
    """
    found = find(path)
    run_info.check_network(found.info, found.path)
    config = config_lib.from_dict(found.info["config"], where=f"{found.path}/{_INFO}")
    data = build.DataShape(
        tuple(found.info["resolution"]), found.info["channels"], tuple(found.info["label_counts"])
    )
    generator, _ = build.networks(config, data, rounded=False)
    stored = read_parameters(found, "G_ema")
    params = {name: value.astype(np.float32) for name, value in stored.items()}
    return generator, params, config, found.info
