"""Shards as such, outside the stream: whether they are sound, single images, damaged records.

A damaged record is never read around in silence. Where some may be left out
(`data.max_bad_records`), `mend` puts another record of the shard in the place of each: the first
sound one behind it in its block, going round, or else the first sound one in the blocks behind.
So what is shown follows from the data set alone, whenever and wherever a run meets the damage, and
no other image moves.
"""

from __future__ import annotations

import concurrent.futures
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.core.errors import DataError, StorageError, require_tensorflow

require_tensorflow()  # before anything imports it

import tensorflow as tf  # noqa: E402

from trainer.core import storage, tfrecord  # noqa: E402
from trainer.data.manifest import Manifest  # noqa: E402

# What reading can raise. TensorFlow quotes a broken record in its message, which need not be text.
ERRORS = (tf.errors.OpError, UnicodeDecodeError)

# Requests under way at a time.
READERS = 32

FEATURES = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/height": tf.io.FixedLenFeature([], tf.int64),
    "image/width": tf.io.FixedLenFeature([], tf.int64),
    "image/class/label": tf.io.FixedLenFeature([], tf.int64),
}

_AGAIN = "copy or convert the data set again"


@dataclass(frozen=True)
class Damaged:
    """A record that cannot be used.

    Attributes:
      shard: number of the shard.
      record: number in the shard.
      text: the record, its shard and what is wrong with it.
    """

    shard: int
    record: int
    text: str


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, C] of a PNG or a JPEG, exactly as Pillow reads it."""
    # The operation goes by the content, not by its name, but only under this name can it be told
    # to use the inverse DCT that all others use. It converts no channels, so a wrong count shows.
    return tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE")


def label_range(manifest: Manifest) -> tuple[int, int]:
    """The lowest and the highest label that a record may have."""
    return (0, manifest.num_classes - 1) if manifest.num_classes else (-1, -1)


def reason(error: Exception) -> str:
    """TensorFlow's message in one line, without the names of its nodes and what a server sent."""
    unsaid = r"\{\{.*?\}\}|\[Op:\w+\].*| with body '.*'"
    lines = re.sub(unsaid, "", str(error), flags=re.DOTALL).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


# ---- soundness -----------------------------------------------------------------------------------


def check_files(manifest: Manifest, shards: range, *, content: bool = False) -> None:
    """Finds missing and cut shards, by one request for each.

    Args:
      manifest: the data set.
      shards: numbers of those to look at.
      content: object stores know a file's checksum: find changed shards as well.

    Raises:
      DataError: a shard is not there, or is another than the manifest says.
      StorageError: the storage cannot tell.
    """

    def check(number: int) -> None:
        shard, path = manifest.shards[number], manifest.path(number)
        where = f"shard {shard.name} of {manifest.directory}"
        try:
            if content and storage.is_remote(path):
                found = storage.digest(path)
            else:
                found = storage.Digest(storage.size(path), None)
        except StorageError as error:
            # Only of the shard itself: a missing bucket is a matter of the storage.
            if type(error.__cause__) is not FileNotFoundError:
                raise
            raise DataError(
                f"{where} is missing (the manifest says {shard.bytes} bytes); {_AGAIN}"
            ) from error
        if found.bytes != shard.bytes:
            raise DataError(
                f"{where} has {found.bytes} bytes, the manifest says {shard.bytes}; {_AGAIN}"
            )
        if found.crc32c not in (None, shard.crc32c):
            raise DataError(f"{where} has another content than the manifest says; {_AGAIN}")

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        list(pool.map(check, shards))


def check_shard(manifest: Manifest, number: int) -> None:
    """Reads all of a shard, images too.

    Raises:
      DataError: names the shard, and the record (counted from 0) that is wrong.
    """
    shard = manifest.shards[number]
    check_files(manifest, range(number, number + 1))
    count = 0
    try:
        with storage.open_read(manifest.path(number)) as file:
            for payload in tfrecord.read_records(file):
                _check_record(manifest, payload)
                count += 1
    except DataError as error:
        raise DataError(f"{_record(manifest, number, count)}: {error}; {_AGAIN}") from error
    if count != shard.count:
        raise DataError(
            f"shard {shard.name} in {manifest.directory} holds {count} records, the manifest says "
            f"{shard.count}; {_AGAIN}"
        )


def _record(manifest: Manifest, shard: int, record: int) -> str:
    return f"record {record} of shard {manifest.shards[shard].name} in {manifest.directory}"


def _check_record(manifest: Manifest, payload: bytes) -> tuple[np.ndarray, int]:
    """A record's image and label; DataError with the reason alone."""
    try:
        parsed = tf.io.parse_single_example(payload, FEATURES)
    except ERRORS:
        raise DataError("it is not an example with image, size and label") from None
    size = (int(parsed["image/height"]), int(parsed["image/width"]))
    if size != manifest.resolution:
        raise DataError(f"it says {size[1]}x{size[0]} pixels, {_wanted(manifest)}")
    label = int(parsed["image/class/label"])
    low, high = label_range(manifest)
    if not low <= label <= high:
        raise DataError(f"its label is {label}, the manifest says {low} to {high}")
    try:
        image = decode(parsed["image/encoded"]).numpy()
    except ERRORS as error:
        raise DataError(f"its image cannot be decoded ({reason(error)})") from None
    if image.shape != (*manifest.resolution, manifest.channels):
        height, width, channels = image.shape
        raise DataError(
            f"its image has {width}x{height} pixels and {channels} channels, {_wanted(manifest)}"
        )
    return image, label


def _wanted(manifest: Manifest) -> str:
    height, width = manifest.resolution
    return f"the manifest says {width}x{height} and {manifest.channels} channels"


# ---- single images -------------------------------------------------------------------------------


def read_images(manifest: Manifest, indices: Any) -> tuple[np.ndarray, np.ndarray]:
    """Single images of a data set, by their numbers over all shards in order.

    Args:
      manifest: the data set.
      indices: n numbers from 0 to num_images - 1.

    Returns:
      uint8 [n, H, W, C] and int64 [n] class numbers, -1 without labels.

    Raises:
      DataError: a record is wrong; names shard and record.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < manifest.num_images:
        raise IndexError(f"images are numbered 0 to {manifest.num_images - 1}")
    ends = np.cumsum([shard.count for shard in manifest.shards])
    images = np.empty([len(wanted), *manifest.resolution, manifest.channels], np.uint8)
    labels = np.empty([len(wanted)], np.int64)
    # Places in the result by record, and records by block: each block is opened once.
    blocks: dict[tuple[int, int], dict[int, list[int]]] = {}
    for place in range(len(wanted)):
        shard = int(np.searchsorted(ends, wanted[place], side="right"))
        record = int(wanted[place] - ends[shard] + manifest.shards[shard].count)
        records = blocks.setdefault((shard, record // manifest.block), {})
        records.setdefault(record, []).append(place)

    def read(item: tuple[tuple[int, int], dict[int, list[int]]]) -> None:
        (shard, block), places = item
        for record, (image, label) in _read_records(manifest, shard, block, set(places)):
            images[places[record]], labels[places[record]] = image, label

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, sorted(blocks.items())))
    return images, labels


def _read_records(
    manifest: Manifest, shard: int, block: int, wanted: set[int]
) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
    """Some records of a block, in order, with their numbers in the shard."""
    record = block * manifest.block
    try:
        for payload in tfrecord.read_records(io.BytesIO(_read_block(manifest, shard, block))):
            if record in wanted:
                yield record, _check_record(manifest, payload)
            record += 1
        if record <= max(wanted):
            raise DataError("the file ends before it")
    except DataError as error:
        raise DataError(f"{_record(manifest, shard, record)}: {error}; {_AGAIN}") from error


def _read_block(manifest: Manifest, shard: int, block: int) -> bytes:
    """By one request; less than it should be where the file is shorter."""
    start, length = _extent(manifest, shard, block)
    return storage.read_range(manifest.path(shard), start, length)


def _extent(manifest: Manifest, shard: int, block: int) -> tuple[int, int]:
    """Where a block starts in its shard, and its bytes."""
    entry = manifest.shards[shard]
    start, end = [*entry.index, entry.bytes][block : block + 2]
    return start, end - start


# ---- damaged records -----------------------------------------------------------------------------


def mend(manifest: Manifest, shard: int, block: int) -> tuple[list[bytes], list[Damaged]]:
    """A block's records with others in the places of damaged ones, and those.

    Args:
      manifest: the data set.
      shard: number of the shard.
      block: number of the block in the shard.

    Returns:
      as many payloads as the block has records, and the damaged records in order. Both are empty
      where what is wrong is no single record, but the shard: it ends early or is another.

    Raises:
      StorageError: the shard cannot be read.
    """
    found = _examine(manifest, shard, block)
    first = block * manifest.block
    damaged = [
        Damaged(shard, first + n, f"{_record(manifest, shard, first + n)}: {each}")
        for n, each in enumerate(found)
        if isinstance(each, str)
    ]
    if len(damaged) == len(found):
        other = _first_sound(manifest, shard, block)
        return ([other] * len(found), damaged) if other is not None else ([], damaged)
    mended = []
    for n in range(len(found)):
        behind = (found[(n + k) % len(found)] for k in range(len(found)))
        mended.append(next(each for each in behind if isinstance(each, bytes)))
    return mended, damaged


def _first_sound(manifest: Manifest, shard: int, block: int) -> bytes | None:
    """The first sound record in the blocks behind one, going round."""
    blocks = len(manifest.shards[shard].index)
    for k in range(1, blocks):
        for each in _examine(manifest, shard, (block + k) % blocks):
            if isinstance(each, bytes):
                return each
    return None


def _examine(manifest: Manifest, shard: int, block: int) -> list[bytes | str]:
    """For each record of a block its payload, or what is wrong with it; [] as for `mend`."""
    entry, content = manifest.shards[shard], _read_block(manifest, shard, block)
    count = min(manifest.block, entry.count - block * manifest.block)
    found = tfrecord.scan_records(content)
    if found and isinstance(found[-1], str) and len(found) < count:
        found += ["a damaged length before it hides where it starts"] * (count - len(found))
    if len(found) != count or len(content) != _extent(manifest, shard, block)[1]:
        return []
    return [_sound(manifest, each) for each in found]


def _sound(manifest: Manifest, found: bytes | str) -> bytes | str:
    if isinstance(found, bytes):
        try:
            _check_record(manifest, found)
        except DataError as error:
            return str(error)
    return found
