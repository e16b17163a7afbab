"""Shards as such, outside the stream: whether they are sound, single images, damaged records.

A damaged record is never read around in silence. Where some may be left out
(`data.max_bad_records`), `BadRecords` puts another record in the place of each: the first sound one
behind it in its block, going round, or else the first sound one in the blocks behind, then in the
shards behind. So what is shown follows from the data set alone, whenever and wherever a run meets
the damage, and no other image moves.
"""

from __future__ import annotations

import concurrent.futures
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.core.errors import DataError, StorageError, require_tensorflow

require_tensorflow()  # before anything imports it

import tensorflow as tf  # noqa: E402

from trainer.core import output, storage, tfrecord  # noqa: E402
from trainer.core.text import image_size  # noqa: E402
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
            raise DataError(
                f"{where} has another content than the manifest says; {_AGAIN}, or let damaged "
                "records be left out (data.max_bad_records)"
            )

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
        raise DataError(f"it says {image_size(size)} pixels, {_wanted(manifest)}")
    label = int(parsed["image/class/label"])
    low, high = label_range(manifest)
    if not low <= label <= high:
        raise DataError(f"its label is {label}, the manifest says {low} to {high}")
    try:
        image = decode(parsed["image/encoded"]).numpy()
    except ERRORS as error:
        raise DataError(f"its image cannot be decoded ({reason(error)})") from None
    if image.shape != (*manifest.resolution, manifest.channels):
        *size, channels = image.shape
        raise DataError(
            f"its image has {image_size(size)} pixels and {channels} channels, {_wanted(manifest)}"
        )
    return image, label


def _wanted(manifest: Manifest) -> str:
    size = image_size(manifest.resolution)
    return f"the manifest says {size} and {manifest.channels} channels"


# ---- single images -------------------------------------------------------------------------------


def read_images(
    manifest: Manifest, indices: Any, bad_records: BadRecords | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Single images of a data set, by their numbers over all shards in order.

    Args:
      manifest: the data set.
      indices: n numbers from 0 to num_images - 1.
      bad_records: what is known of damaged records, and how many may be left out; by default none.

    Returns:
      uint8 [n, H, W, C] and int64 [n] class numbers, -1 without labels.

    Raises:
      DataError: more records are damaged than may be left out; names shard and record.
    """
    bad_records = bad_records or BadRecords(manifest)
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

    def read(item: tuple[tuple[int, int], dict[int, list[int]]]) -> bool:
        (shard, block), places = item
        try:
            for record, (image, label) in _read_records(manifest, shard, block, set(places)):
                images[places[record]], labels[places[record]] = image, label
        except DataError:
            return False
        return True

    items = sorted(blocks.items())
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        sound = list(pool.map(read, items))
    # One after the other, so that it is always the same record that is one too many.
    for ((shard, block), places), whole in zip(items, sound, strict=True):
        if not whole:
            payloads = bad_records.records(shard, block)
            for record, each in places.items():
                image, label = _check_record(manifest, payloads[record - block * manifest.block])
                images[each], labels[each] = image, label
    return images, labels


def _read_records(
    manifest: Manifest, shard: int, block: int, wanted: set[int]
) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
    """Some records of a block, in order, with their numbers in the shard.

    Raises:
      DataError: there is something wrong, in these records or before them.
    """
    record = block * manifest.block
    for payload in tfrecord.read_records(io.BytesIO(_read_block(manifest, shard, block))):
        if record in wanted:
            yield record, _check_record(manifest, payload)
        record += 1
    if record <= max(wanted):
        raise DataError("the file ends early")


def _read_block(manifest: Manifest, shard: int, block: int) -> bytes:
    """Reads by one request; gives fewer bytes where the file is shorter."""
    start, length = _extent(manifest, shard, block)
    return storage.read_range(manifest.path(shard), start, length)


def _extent(manifest: Manifest, shard: int, block: int) -> tuple[int, int]:
    """Offset of a block in its shard, and its length in bytes."""
    entry = manifest.shards[shard]
    start, end = [*entry.index, entry.bytes][block : block + 2]
    return start, end - start


# ---- damaged records -----------------------------------------------------------------------------


class BadRecords:
    """The damaged records of a data set that a process has met, and what is shown instead.

    All that reads the data set in a process shares one, so that a record that is read twice is
    counted and named once.

    Args:
      manifest: the data set.
      limit: damaged records that may be left out (`data.max_bad_records`).
      log: gets a line about what is left out.

    Attributes:
      limit: likewise.
      replaced: of the blocks, as (shard, block), with damaged records the payloads shown instead.
    """

    def __init__(
        self, manifest: Manifest, limit: int = 0, log: Callable[[str], object] | None = None
    ) -> None:
        self.limit = limit
        self.replaced: dict[tuple[int, int], list[bytes]] = {}
        self._manifest, self._log = manifest, log or output.log
        self._damaged: set[tuple[int, int]] = set()  # shard, record

    def records(self, shard: int, block: int) -> list[bytes]:
        """A block's payloads, with others in the places of damaged ones.

        Args:
          shard: number of the shard.
          block: number of the block in the shard.

        Raises:
          DataError: more records are damaged than may be left out; or what is wrong is no single
            record, but the shard: it ends early or is another.
          StorageError: the shard cannot be read.
        """
        if (shard, block) in self.replaced:
            return self.replaced[shard, block]
        manifest = self._manifest
        found = _examine(manifest, shard, block)
        self._leave_out(shard, block, found)
        sound = [each for _, each in found if isinstance(each, bytes)]
        if sound and len(sound) == len(found):
            return sound
        other = None if sound or not found else _first_sound(manifest, shard, block)
        if not sound and other is None:
            check_shard(manifest, shard)
            raise DataError(
                f"shard {manifest.shards[shard].name} of {manifest.directory} changes while it is "
                "read; run the same command again"
            )
        shown = []
        for n in range(len(found)):
            behind = (found[(n + k) % len(found)][1] for k in range(len(found)))
            shown.append(next((each for each in behind if isinstance(each, bytes)), other or b""))
        self.replaced[shard, block] = shown
        return shown

    def _leave_out(self, shard: int, block: int, found: list[tuple[int, bytes | str]]) -> None:
        """Counts and names a block's damaged records."""
        first = block * self._manifest.block
        for n, (place, each) in enumerate(found):
            if not isinstance(each, str) or (shard, first + n) in self._damaged:
                continue
            # Those behind a damaged length have its place: they are lost together.
            lost = [k for k in range(n, len(found)) if found[k][0] == place]
            self._damaged |= {(shard, first + k) for k in lost}
            self._report(self._text(shard, first + n, first + lost[-1], place, each))

    def _text(self, shard: int, first: int, last: int, place: int, problem: str) -> str:
        text = f"{_record(self._manifest, shard, first)}, at byte {place}: {problem}"
        if first == last:
            return text
        entry = self._manifest.shards[shard]
        known = [*entry.index, entry.bytes][first // self._manifest.block + 1]
        return f"{text}, which hides those behind it up to record {last}, before byte {known}"

    def _report(self, text: str) -> None:
        count = len(self._damaged)
        if count > self.limit:
            so_far = f"; {count} records are damaged so far" if self.limit else ""
            raise DataError(
                f"{text}{so_far}; {_AGAIN}, or let more than {self.limit} records be left out "
                f"(--set=data.max_bad_records={max(10, 2 * count)})"
            )
        self._log(f"left out: {text} ({count} of data.max_bad_records={self.limit})")


def _first_sound(manifest: Manifest, shard: int, block: int) -> bytes | None:
    """The first sound record in the blocks behind one, then in the shards behind, going round."""
    for k in range(len(manifest.shards)):
        other = (shard + k) % len(manifest.shards)
        blocks = len(manifest.shards[other].index)
        first, count = (block + 1, blocks - 1) if other == shard else (0, blocks)
        for n in range(count):
            for _, each in _examine(manifest, other, (first + n) % blocks):
                if isinstance(each, bytes):
                    return each
    return None


def _examine(manifest: Manifest, shard: int, block: int) -> list[tuple[int, bytes | str]]:
    """For each record of a block its offset, and its payload or its fault.

    Records that are hidden by a damaged length have the place and the problem of that one. [] where
    what is wrong is no single record: the shard ends early or is another.
    """
    entry, content = manifest.shards[shard], _read_block(manifest, shard, block)
    count = min(manifest.block, entry.count - block * manifest.block)
    start, length = _extent(manifest, shard, block)
    found = [(start + n, each) for n, each in tfrecord.scan_records(content)]
    if found and isinstance(found[-1][1], str) and len(found) < count:
        found += [found[-1]] * (count - len(found))
    if len(found) != count or len(content) != length:
        return []
    return [(place, _sound(manifest, each)) for place, each in found]


def _sound(manifest: Manifest, found: bytes | str) -> bytes | str:
    if isinstance(found, bytes):
        try:
            _check_record(manifest, found)
        except DataError as error:
            return str(error)
    return found
