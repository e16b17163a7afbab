"""Checkpoints: a run's whole state, there completely or not at all.

`<workdir>/checkpoints/step-000012345/` holds TensorFlow's checkpoint of `TrainState.variables`
(`state.*`), `state.json` (counters and identity of the run) and, written last, `COMMITTED` with the
size and CRC32C of every other file. Without a marker that fits, a checkpoint doesn't exist.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import tensorflow as tf

from trainer.core import config as config_lib
from trainer.core import storage
from trainer.core.config import CheckpointConfig, Config
from trainer.core.errors import CheckpointError, StorageError
from trainer.networks.stylegan2 import Generator
from trainer.training import build

_MARKER = "COMMITTED"
_INFO = "state.json"
_NAME = re.compile(r"step-(\d{9,})")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Found:
    """A committed checkpoint.

    Attributes:
      path: its directory.
      step: steps made when it was written.
      info: what `state.json` says.
    """

    path: str
    step: int
    info: dict[str, Any]


def _kimg(path: str) -> float:
    """Where a checkpoint was written; 0 if its `state.json` is damaged."""
    try:
        return float(json.loads(storage.read_bytes(storage.join(path, _INFO)))["kimg"])
    except (StorageError, ValueError, KeyError, TypeError):
        return 0.0


def _step_of(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def _digest(path: str) -> dict[str, int]:
    checksum, size = google_crc32c.Checksum(), 0
    with storage.open_read(path) as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
            size += len(chunk)
    return {"bytes": size, "crc32c": int.from_bytes(checksum.digest(), "big")}


def _check(path: str) -> str | None:
    """Why a checkpoint can't be used, or None."""
    marker = storage.join(path, _MARKER)
    if not storage.exists(marker):
        return "it was never completed"
    try:
        files = json.loads(storage.read_bytes(marker))["files"]
        for name, expected in {_INFO: None, **files}.items():
            if "/" in name or not storage.exists(storage.join(path, name)):
                return f"{name} is missing"
            if _digest(storage.join(path, name)) != expected:
                return f"{name} is not what was written (size or CRC32C)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MARKER} is damaged"
    return None


def _numbered(workdir: str) -> list[tuple[int, str]]:
    """(step, path) of everything that looks like a checkpoint, the newest first."""
    folder = storage.join(workdir, "checkpoints")
    if not storage.isdir(folder):
        return []
    steps = ((_step_of(name), name) for name in storage.listdir(folder))
    found = [(step, storage.join(folder, name)) for step, name in steps if step is not None]
    return sorted(found, reverse=True)


def newest(workdir: str) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one on why it isn't."""
    skipped: list[str] = []
    for step, path in _numbered(workdir):
        reason = _check(path)
        if reason is None:
            return _read_info(path, step), skipped
        skipped.append(f"skipped checkpoint {path}: {reason}")
    return None, skipped


def _read_info(path: str, step: int) -> Found:
    try:
        return Found(path, step, json.loads(storage.read_bytes(storage.join(path, _INFO))))
    except ValueError as error:
        raise CheckpointError(f"{path}/{_INFO} is not JSON ({error})") from error


class Checkpoints:
    """Writes and keeps the checkpoints of one run.

    Args:
      workdir: of the run.
      settings: how many to keep.
      variables: the run's state, by name.
    """

    def __init__(
        self, workdir: str, settings: CheckpointConfig, variables: Mapping[str, tf.Variable]
    ) -> None:
        self._workdir, self._settings = workdir, settings
        self._variables = dict(variables)
        self._checkpoint = tf.train.Checkpoint(**self._variables)

    def save(self, step: int, info: Mapping[str, Any]) -> str:
        """Writes a checkpoint and drops those no longer to be kept.

        Args:
          step: steps made.
          info: goes into `state.json`; with `kimg`, the position in thousands of images.

        Returns:
          Its directory.

        Raises:
          CheckpointError: it couldn't be written; nothing of it is left, and older ones stay.
        """
        path = storage.join(self._workdir, "checkpoints", f"step-{step:09d}")
        try:
            if storage.exists(path):  # the remains of a save that was cut off
                storage.remove_tree(path)
            storage.makedirs(path)
            self._checkpoint.write(storage.join(path, "state"))
            storage.write_text_atomic(storage.join(path, _INFO), json.dumps(dict(info), indent=1))
            files = {name: _digest(storage.join(path, name)) for name in storage.listdir(path)}
            marker = {"step": step, "files": files}
            storage.write_text_atomic(storage.join(path, _MARKER), json.dumps(marker, indent=1))
        except (tf.errors.OpError, OSError, StorageError) as error:
            reason = str(error).splitlines()[0]
            with contextlib.suppress(StorageError):
                storage.remove_tree(path)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({reason}); free space or fix the path "
                "and run the same command again: it goes on from the checkpoint before"
            ) from error
        self._drop_old(step)
        return path

    def _drop_old(self, written: int) -> None:
        numbered = _numbered(self._workdir)
        # A run goes on from its newest whole checkpoint, so what is newer than the one just written
        # is damaged: it must not take the place of a good one.
        whole = [
            path
            for step, path in numbered
            if step <= written and storage.exists(storage.join(path, _MARKER))
        ]
        keep = set(whole[: self._settings.keep_last])
        period = self._settings.keep_every_kimg
        if period:
            # The oldest of each period comes last, and stays.
            firsts = {int(_kimg(path) // period): path for path in whole}
            keep |= {path for mark, path in firsts.items() if mark > 0}
        for _, path in numbered:
            if path not in keep:
                storage.remove_tree(path)

    def restore(self, found: Found) -> None:
        """Puts a checkpoint's values into the variables.

        Raises:
          CheckpointError: it is of other networks; names the first variables that differ.
        """
        prefix = storage.join(found.path, "state")
        _check_shapes(prefix, found.path, self._variables)
        try:
            self._checkpoint.read(prefix).assert_consumed()
        except (tf.errors.OpError, AssertionError, ValueError) as error:
            raise CheckpointError(f"checkpoint {found.path} can't be read ({error})") from error


# How tf.train.Checkpoint spells a variable's name: '/' as '.S', '.' as '..', and a suffix.
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def _key(name: str) -> str:
    return name.replace(".", "..").replace("/", ".S") + _SUFFIX


def _check_shapes(prefix: str, path: str, variables: Mapping[str, tf.Variable]) -> None:
    try:
        stored = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} can't be read ({error})") from error
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


def find(path: str) -> Found:
    """The checkpoint a user means by a run's directory, or by a checkpoint's own.

    Raises:
      CheckpointError: there is none, or it is not whole.
    """
    name = path.rstrip("/").rsplit("/", 1)[-1]
    step = _step_of(name)
    if step is not None:
        reason = _check(path) if storage.isdir(path) else "there is no such directory"
        if reason is not None:
            raise CheckpointError(f"checkpoint {path} can't be used: {reason}")
        return _read_info(path, step)
    found, skipped = newest(path)
    if found is None:
        why = "; ".join(skipped) or "it holds none"
        raise CheckpointError(f"no checkpoint in {path}: {why}; give the --workdir of a run")
    return found


def read_parameters(found: Found, prefix: str) -> dict[str, np.ndarray]:
    """One network's parameters (`G`, `D` or `G_ema`) as stored."""
    reader = tf.train.load_checkpoint(storage.join(found.path, "state"))
    start = _key(prefix + "/")[: -len(_SUFFIX)]
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
    config = config_lib.from_dict(found.info["config"], where=f"{found.path}/{_INFO}")
    data = build.DataShape(
        tuple(found.info["resolution"]), found.info["channels"], tuple(found.info["label_counts"])
    )
    generator, _ = build.networks(config, data, rounded=False)
    stored = read_parameters(found, "G_ema")
    params = {name: value.astype(np.float32) for name, value in stored.items()}
    return generator, params, config, found.info
