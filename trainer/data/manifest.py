"""The manifest: what a data set holds, checked so far that nothing behind it must be guessed.

It is written last, so a directory without it is not a data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer.core import documents, storage
from trainer.core.errors import DataError

FILE_NAME = "dataset.json"
PARTIAL_NAME = ".partial"  # where the converter keeps its place
VERSION = 2
_NAMES_COUNT = 1  # in this version the names of the files enter the fingerprint

_LONGEST = 1 << 28  # bytes; an index of 10 million records has about 2 million
MAX_BLOCK = 64
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One record file.

    Attributes:
      name: file name in the data set's directory.
      count: records.
      bytes: file size.
      crc32c: of the whole file.
      index: where every `Manifest.block`-th record starts, in bytes.
    """

    name: str
    count: int
    bytes: int
    crc32c: int
    index: list[int]


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
      name: what the shards' names begin with.
      num_images: records in all shards.
      resolution: (height, width) in pixels.
      channels: 1 (L), 2 (LA), 3 (RGB) or 4 (RGBA).
      label_names: one for each class; empty when there are no labels.
      label_counts: images of each class.
      crop: how the images were cut.
      filter: how they were scaled (it moves FID, so it belongs to the data).
      background: colour laid under transparent pixels, or ''.
      block: records from one entry of a shard's index to the next.
      shards: the record files, one lane each.
      skipped: unusable source images, {'name', 'reason'}.
      version: of the format; data sets of version 1 are read, too.
      fingerprint: SHA-256 of all the above but `name` and the shards' names, which come from the
        directory. In version 1 they are included.
      directory: where it was loaded from.
    """

    name: str
    num_images: int
    resolution: tuple[int, int]
    channels: int
    label_names: list[str]
    label_counts: list[int]
    crop: str
    filter: str
    background: str
    block: int
    shards: list[Shard]
    skipped: list[dict[str, str]] = field(default_factory=list)
    version: int = VERSION
    fingerprint: str = ""
    directory: str = ""

    @property
    def num_classes(self) -> int:
        """Classes, 0 when there are no labels."""
        return len(self.label_names)

    def condition_counts(self, use_labels: bool) -> tuple[int, ...]:
        """Images of each class for a network conditioned on classes, else nothing.

        Raises:
          DataError: there are no labels to use.
        """
        if use_labels and not self.num_classes:
            raise DataError(
                f"data.use_labels is on, but {self.directory} has no labels; convert it with "
                "--labels=folders or a JSON, or turn data.use_labels off"
            )
        return tuple(self.label_counts) if use_labels else ()

    def path(self, shard: int) -> str:
        """The path of a shard's file."""
        return storage.join(self.directory, self.shards[shard].name)


def block_records(num_images: int, num_bytes: int) -> int:
    """Records to an index entry: a power of two, up to 64 or about a megabyte of them.

    A block is what is read in one go, wherever it lies, so it must be long enough to be worth a
    request to an object store and short enough that one for each lane fits in memory.
    """
    block = MAX_BLOCK
    while block > 1 and block * num_bytes > _BLOCK_BYTES * num_images:
        block //= 2
    return block


def _content(manifest: Manifest) -> dict[str, Any]:
    content = dataclasses.asdict(manifest)
    del content["directory"], content["fingerprint"]
    return content


def _fingerprint(content: dict[str, Any]) -> str:
    if content["version"] != _NAMES_COUNT:
        shards = [{**shard, "name": ""} for shard in content["shards"]]
        content = {**content, "name": "", "shards": shards}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save(
    manifest: Manifest, directory: str, *, check: Callable[[], object] | None = None
) -> Manifest:
    """Writes the manifest, with its fingerprint, and returns it as `load` would.

    Args:
      manifest: of the data set.
      directory: of the data set.
      check: called right before the manifest gets its name, which then no other file may have.

    Raises:
      ConflictError: with `check`: there is another manifest.
    """
    content = _content(manifest)
    fingerprint = _fingerprint(content)
    shards = ",\n".join(f"  {json.dumps(shard)}" for shard in content.pop("shards"))
    lines = [
        f" {json.dumps(key)}: {json.dumps(value)}"
        for key, value in {"fingerprint": fingerprint, **content}.items()
    ]
    text = "{\n" + ",\n".join([*lines, f' "shards": [\n{shards}\n ]']) + "\n}\n"
    where = storage.join(directory, FILE_NAME)
    with storage.open_write_atomic(where, new=check is not None) as file:
        file.write(text.encode())
        if check is not None:
            check()
    return dataclasses.replace(manifest, fingerprint=fingerprint, directory=directory)


def load(path: str) -> Manifest:
    """Reads and checks the manifest of a data set.

    Args:
      path: the data set's directory: local, a URL, or 'package:data/...'.

    Raises:
      DataError: it is missing, or not what the converter writes.
    """
    directory = storage.resolve(path)
    where = storage.join(directory, FILE_NAME)
    if not storage.isfile(where):
        raise DataError(_missing(path, directory))
    try:
        document = documents.read_object(where, _LONGEST)
    except documents.DocumentError as error:
        raise DataError(
            f"{where} is not what the converter wrote, or only a part of it: {error}; copy or "
            "convert the data set again"
        ) from None
    if "labels" in document and "shards" not in document:
        raise DataError(
            f"{where} holds labels of images, not a converted data set; make one: "
            f"{_conversion_of(path)}"
        )
    try:
        return _parse(document, directory)
    except _Wrong as error:
        raise DataError(f"{where}: {error}; convert the data set again") from None


def _missing(path: str, directory: str) -> str:
    if storage.exists(storage.join(directory, PARTIAL_NAME)):
        return (
            f"{path} is an unfinished conversion: run the same `python -m trainer convert` again, "
            "and it goes on"
        )
    if storage.isfile(directory) or (storage.isdir(directory) and storage.listdir(directory)):
        return (
            f"no data set at {path} (it has no {FILE_NAME}); if your images are there, convert them "
            f"to a directory of their own: {_conversion_of(path)}"
        )
    return (
        f"no data set at {path} (it has no {FILE_NAME}); make one: "
        f"python -m trainer convert --source=IMAGES {shlex.quote(f'--dest={path}')} "
        "--resolution=SIZE"
    )


def _conversion_of(path: str) -> str:
    """The command that converts a folder or archive of images to a directory beside it."""
    if storage.isfile(storage.resolve(path)) and not path.lower().endswith(".zip"):
        path = path.rpartition("/")[0] or "."  # of one image of a folder
    source = path.rstrip("/")
    dest = f"{source.removesuffix('.zip')}-SIZE"
    if source.rpartition("/")[2] in {"", ".", ".."}:  # it has no name to derive one from
        dest = "DATASET"
    return (
        f"python -m trainer convert {shlex.quote(f'--source={path}')} "
        f"{shlex.quote(f'--dest={dest}')} --resolution=SIZE"
    )


class _Wrong(Exception):
    """The fault of a manifest."""


def _get(document: Any, key: str, kind: type, where: str = "") -> Any:
    if not isinstance(document, dict) or key not in document:
        raise _Wrong(f"{where}{key} is missing")
    value = document[key]
    if type(value) is not kind:
        raise _Wrong(f"{where}{key} is {type(value).__name__}, not {kind.__name__}")
    return value


def _list(document: Any, key: str, kind: type, where: str = "") -> list[Any]:
    values = _get(document, key, list, where)
    if any(type(value) is not kind for value in values):
        raise _Wrong(f"{where}{key} holds something that is not {kind.__name__}")
    return values


def _integer(document: Any, key: str, low: int, high: int, where: str = "") -> int:
    value = _get(document, key, int, where)
    if not low <= value <= high:
        raise _Wrong(f"{where}{key} is {value}, not in {low} to {high}")
    return value


def _parse(document: Any, directory: str) -> Manifest:
    version = _get(document, "version", int)
    if version not in (_NAMES_COUNT, VERSION):
        raise _Wrong(f"version {version} is not {_NAMES_COUNT} or {VERSION}, which are read here")
    resolution = _list(document, "resolution", int)
    if len(resolution) != 2 or not all(1 <= side <= 16384 for side in resolution):
        raise _Wrong(f"resolution {resolution} is not a height and a width")
    block = _integer(document, "block", 1, MAX_BLOCK)
    shards = [_parse_shard(entry, block) for entry in _list(document, "shards", dict)]
    if not shards or len({shard.name for shard in shards}) < len(shards):
        raise _Wrong("the shards' names are missing or the same")
    skipped = _list(document, "skipped", dict)
    if any(set(entry) != {"name", "reason"} for entry in skipped):
        raise _Wrong("an entry of skipped is not a name and a reason")
    manifest = Manifest(
        name=_get(document, "name", str),
        num_images=_integer(document, "num_images", 1, 1 << 40),
        resolution=(resolution[0], resolution[1]),
        channels=_integer(document, "channels", 1, 4),
        label_names=_list(document, "label_names", str),
        label_counts=_list(document, "label_counts", int),
        crop=_get(document, "crop", str),
        filter=_get(document, "filter", str),
        background=_get(document, "background", str),
        block=block,
        shards=shards,
        skipped=skipped,
        version=version,
        fingerprint=_get(document, "fingerprint", str),
        directory=directory,
    )
    _check_sums(manifest)
    if _fingerprint(_content(manifest)) != manifest.fingerprint:
        raise _Wrong("its fingerprint does not fit its content: it was changed after conversion")
    return manifest


def _parse_shard(entry: dict[str, Any], block: int) -> Shard:
    name = _get(entry, "name", str, "a shard's ")
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise _Wrong(f"{name!r} is no shard's name")
    where = f"shard {name}: "
    shard = Shard(
        name=name,
        count=_integer(entry, "count", 1, 1 << 40, where),
        bytes=_integer(entry, "bytes", 1, 1 << 50, where),
        crc32c=_integer(entry, "crc32c", 0, 0xFFFFFFFF, where),
        index=_list(entry, "index", int, where),
    )
    ends = [*shard.index, shard.bytes]
    rising = all(low < high for low, high in itertools.pairwise(ends))
    if len(shard.index) != -(-shard.count // block) or shard.index[0] != 0 or not rising:
        raise _Wrong(f"{where}its index does not fit its count and bytes")
    return shard


def _check_sums(manifest: Manifest) -> None:
    total = sum(shard.count for shard in manifest.shards)
    if total != manifest.num_images:
        raise _Wrong(f"the shards hold {total} images, num_images says {manifest.num_images}")
    if len(manifest.label_names) != len(manifest.label_counts):
        raise _Wrong("label_names and label_counts differ in length")
    if len(set(manifest.label_names)) != len(manifest.label_names):
        raise _Wrong("two classes have the same name")
    if manifest.label_counts and (
        min(manifest.label_counts) < 0 or sum(manifest.label_counts) != total
    ):
        raise _Wrong("label_counts do not sum up to num_images")
