"""The input pipeline: an endless, deterministic stream of groups of images.

The stream is made of lanes, one for each shard: global group g takes its images from lane
g mod lanes. Epoch e of a lane permutes the shard's blocks (runs of records that are read in one
go), takes them together into windows, and permutes the records in a window, all by
(seed, lane, e). So the images of any group follow from the manifest, the seed and the group's
number: a stream starts anywhere without reading what comes before, and hosts that take
every W-th group see together what one host would see alone.
"""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.core.errors import ConfigError, DataError, StorageError, require_tensorflow

require_tensorflow()  # before anything imports it

import tensorflow as tf  # noqa: E402

from trainer import data  # noqa: E402
from trainer.core import seeds, storage  # noqa: E402
from trainer.data import records  # noqa: E402
from trainer.data.manifest import Manifest  # noqa: E402

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

# What reading can raise. TensorFlow quotes a broken record in its message, which need not be text.
ERRORS = (tf.errors.OpError, UnicodeDecodeError)

# All lanes' windows together hold about this much, where a block for each lane allows.
_WINDOW_BYTES = 1 << 30
_READERS = 16
_MAX_READ = 4 << 20

# What one call of the decoding function makes at most: whole batches, for a batch put together
# later is copied once more. The images of one call are decoded on all processors.
_CALL_IMAGES = 256
_CALLS = 2

_FOREVER = np.iinfo(np.int64).max

_FEATURES = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/height": tf.io.FixedLenFeature([], tf.int64),
    "image/width": tf.io.FixedLenFeature([], tf.int64),
    "image/class/label": tf.io.FixedLenFeature([], tf.int64),
}


def blocks_per_window(manifest: Manifest, window: int) -> int:
    """Blocks that a lane holds in memory and permutes together.

    Args:
      manifest: the data set.
      window: records wanted; fewer are taken where the windows of all lanes would not fit in a
        gigabyte, down to one block.

    Raises:
      ConfigError: the window is not positive.
    """
    if window < 1:
        raise ConfigError(f"data.window is {window}; it must be at least 1 record")
    mean_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.num_images
    fitting = int(_WINDOW_BYTES / len(manifest.shards) / mean_bytes)
    return max(1, min(window, fitting) // manifest.block)


def _order(seed: int, index: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """A permutation of `count` numbers drawn by (seed, index)."""
    pair = seeds.fold_in_groups(seed, seeds.Purpose.LANE_ORDER, index[tf.newaxis])[0]
    keys = tf.random.stateless_uniform([count], pair, None, None, tf.int64)
    return tf.argsort(keys, stable=True)


@dataclass(frozen=True)
class _Lanes:
    """The lanes that one worker reads, in the order in which it first needs them.

    All are int64 arrays of [lanes] unless said otherwise.
    """

    lane: np.ndarray
    paths: list[str]
    count: np.ndarray  # records
    blocks: np.ndarray
    row: np.ndarray  # where the lane's part of `index` starts
    index: np.ndarray  # [blocks of all lanes] bytes
    step: np.ndarray  # the first window wanted, counted over all epochs
    skip: np.ndarray  # records of that window that lie before the start


class ImageStream:
    """The groups of images that one worker takes from a data set, from any group on, endlessly.

    Iterating gives `(images, labels, group_index)`: uint8 [groups, size, H, W, C],
    int64 [groups, size] (class number, or -1 without `use_labels`) and int64 [groups], where
    groups is `groups_per_batch // num_workers`. `dataset` gives the same as a tf.data.Dataset.

    Args:
      manifest: the data set.
      group_size: images in a group.
      groups_per_batch: groups in a batch of all workers together.
      seed: of the run.
      start_group: number of the first group of the first batch, counted over all workers.
      worker: this worker's number; it takes the groups g with g mod num_workers == worker.
      num_workers: how many share the stream.
      use_labels: give class numbers.
      mirror: flip each image with probability 1/2, drawn by (seed, place in the stream).
      window: records that are held and permuted together; see `blocks_per_window`.

    Raises:
      ConfigError: the numbers do not fit together; says which to change.
      DataError: a shard is missing or has another size, or there are no labels to use.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        group_size: int,
        groups_per_batch: int,
        seed: int,
        start_group: int = 0,
        worker: int = 0,
        num_workers: int = 1,
        use_labels: bool = False,
        mirror: bool = False,
        window: int = 256,
    ) -> None:
        self._manifest = manifest
        self._size = group_size
        self._seed = seed
        self._num_workers = num_workers
        self._use_labels = use_labels
        self._mirror = mirror
        self._window_blocks = blocks_per_window(manifest, window)
        self._check(groups_per_batch, start_group, worker)
        self._groups = groups_per_batch // num_workers
        self._next_group = start_group + (worker - start_group) % num_workers
        _check_files(manifest, range(worker, len(manifest.shards), num_workers))
        with tf.device("CPU:0"):
            self._dataset = self._build(self._lanes())
        self._iterator: Iterator[Batch] | None = None

    @property
    def dataset(self) -> tf.data.Dataset:
        """The batches as a dataset; pass those `ERRORS` that it raises to `explain`."""
        return self._dataset

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._dataset)
        try:
            batch = next(self._iterator)
        except ERRORS as error:
            raise self.explain(error, self._next_group) from error
        self._next_group += self._groups * self._num_workers
        return batch

    def explain(self, error: Exception, group: int | None = None) -> DataError:
        """What a failure of `dataset` means, found by reading the shards concerned again.

        Args:
          error: what TensorFlow raised.
          group: the first group of the batch that failed; all the worker's shards are read if it
            is not known.
        """
        lanes = len(self._manifest.shards)
        first = self._next_group if group is None else group
        count = lanes if group is None else self._groups
        upcoming = [(first + k * self._num_workers) % lanes for k in range(count)]
        for shard in dict.fromkeys(upcoming):
            try:
                check_shard(self._manifest, shard)
            except DataError as found:
                return found
        return DataError(
            f"reading {self._manifest.directory} failed, though its shards are sound now "
            f"({_reason(error)}); run the same command again"
        )

    def _check(self, groups_per_batch: int, start_group: int, worker: int) -> None:
        lanes = len(self._manifest.shards)
        workers = self._num_workers
        if self._size < 1 or groups_per_batch < 1 or start_group < 0:
            raise ConfigError("group size and groups must be positive, and the first group too")
        if not 0 <= worker < workers:
            raise ConfigError(f"worker {worker} is not one of {workers}")
        if lanes % workers:
            raise ConfigError(
                f"{workers} workers cannot share {lanes} shards evenly; use a number of hosts "
                f"that divides {lanes}, or convert with --shards of a multiple of {workers}"
            )
        if groups_per_batch % workers:
            raise ConfigError(
                f"{workers} workers cannot share {groups_per_batch} groups evenly; make "
                f"training.batch_size a multiple of {workers} x {self._size}"
            )
        self._manifest.condition_counts(self._use_labels)

    def _lanes(self) -> _Lanes:
        """The tables that the graph looks up, with each lane at its place."""
        manifest = self._manifest
        lanes = len(manifest.shards)
        # A lane's first group is the first one from the start on that belongs to it.
        first = self._next_group + self._num_workers * np.arange(lanes // self._num_workers)
        shards = [manifest.shards[lane] for lane in first % lanes]
        blocks = np.array([len(shard.index) for shard in shards])
        places = [
            self._place(int(lane), int(group) // lanes * self._size)
            for lane, group in zip(first % lanes, first, strict=True)
        ]
        return _Lanes(
            lane=first % lanes,
            paths=[manifest.path(int(lane)) for lane in first % lanes],
            count=np.array([shard.count for shard in shards]),
            blocks=blocks,
            row=np.cumsum(blocks) - blocks,
            index=np.concatenate([np.array(shard.index) for shard in shards]),
            step=np.array([step for step, _ in places]),
            skip=np.array([skip for _, skip in places]),
        )

    def _place(self, lane: int, position: int) -> tuple[int, int]:
        """The window, counted over all epochs, and the record in it, of a lane's n-th image."""
        shard = self._manifest.shards[lane]
        blocks, per_window = len(shard.index), self._window_blocks
        windows = -(-blocks // per_window)
        epoch, rest = divmod(position, shard.count)
        index = tf.constant(self._draw(lane, epoch, windows, 0), tf.int64)
        sizes = np.full(blocks, self._manifest.block)
        sizes[-1] = shard.count - (blocks - 1) * self._manifest.block
        starts = np.arange(0, blocks, per_window)
        sizes = np.add.reduceat(sizes[_order(self._seed, index, blocks).numpy()], starts)
        window = int(np.searchsorted(np.cumsum(sizes), rest, side="right"))
        return epoch * windows + window, int(rest - sizes[:window].sum())

    def _draw(self, lane: Any, epoch: Any, windows: Any, number: Any) -> Any:
        """The index of a draw: number 0 orders the blocks, 1 + k the records of window k."""
        return (epoch * (windows + 1) + number) * len(self._manifest.shards) + lane

    def _build(self, lanes: _Lanes) -> tf.data.Dataset:
        count = len(lanes.paths)
        prefetch = 1 if count <= 64 else 0
        table = {
            name: tf.constant(getattr(lanes, name))
            for name in ("lane", "paths", "count", "blocks", "row", "index", "step", "skip")
        }

        def lane(number: tf.Tensor) -> tf.data.Dataset:
            row = {name: value[number] for name, value in table.items() if name != "index"}
            windows = tf.data.Dataset.range(row["step"], _FOREVER).flat_map(
                lambda step: self._window(row, table["index"], step)
            )
            # A lane that waits for its next window holds up all others, unless it is there already.
            if prefetch:
                windows = windows.prefetch(prefetch)
            return windows.rebatch(self._size)

        groups = tf.data.Dataset.range(count).interleave(
            lane,
            cycle_length=count,
            block_length=1,
            num_parallel_calls=min(count, _READERS),
            deterministic=True,
        )
        numbers = tf.data.Dataset.range(self._next_group, _FOREVER, self._num_workers)
        threads = data.processors()
        limit = max(1, _CALL_IMAGES // self._size)
        part = max(n for n in range(1, self._groups + 1) if n <= limit and self._groups % n == 0)
        dataset = tf.data.Dataset.zip((groups, numbers)).batch(part, drop_remainder=True)
        dataset = dataset.map(self._decode_groups, num_parallel_calls=_CALLS)
        if part < self._groups:
            dataset = dataset.rebatch(self._groups, drop_remainder=True)
        return dataset.prefetch(2).with_options(_options(threads))

    def _window(
        self, row: dict[str, tf.Tensor], index: tf.Tensor, step: tf.Tensor
    ) -> tf.data.Dataset:
        """One element: the encoded images and labels of a lane's window, in their order."""
        block, per_window = self._manifest.block, self._window_blocks
        windows = -(-row["blocks"] // per_window)
        epoch, number = step // windows, step % windows
        order = _order(
            self._seed, self._draw(row["lane"], epoch, windows, tf.zeros_like(epoch)), row["blocks"]
        )
        chosen = tf.cast(order[number * per_window : (number + 1) * per_window], tf.int64)
        last = chosen == row["blocks"] - 1
        rest = row["count"] - (row["blocks"] - 1) * block
        expected = tf.reduce_sum(tf.where(last, rest, block))
        # The last block is read up to the end of the file, so that a surplus shows.
        takes = tf.where(last, tf.constant(-1, tf.int64), block)
        offsets = tf.gather(index, row["row"] + chosen)
        begin = tf.where(step == row["step"], row["skip"], 0)

        def shuffled(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            count = tf.size(serialized, tf.int64)
            tf.debugging.assert_equal(count, expected, "records in a window")
            encoded, labels = self._parse(serialized)
            draw = self._draw(row["lane"], epoch, windows, number + 1)
            picked = _order(self._seed, draw, count)[begin:]
            return tf.gather(encoded, picked), tf.gather(labels, picked)

        buffer = _longest_block(self._manifest)
        runs = tf.data.Dataset.from_tensor_slices((offsets, takes))
        found = runs.flat_map(
            lambda offset, take: _records(row["paths"], offset, buffer).take(take)
        )
        return found.batch(per_window * block + 1).map(shuffled)

    def _parse(self, serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The encoded images and the labels of serialized examples, checked."""
        parsed = tf.io.parse_example(serialized, _FEATURES)
        height, width = self._manifest.resolution
        tf.debugging.assert_equal(parsed["image/height"], tf.constant(height, tf.int64))
        tf.debugging.assert_equal(parsed["image/width"], tf.constant(width, tf.int64))
        labels = parsed["image/class/label"]
        low, high = _label_range(self._manifest)
        tf.debugging.assert_greater_equal(labels, tf.constant(low, tf.int64))
        tf.debugging.assert_less_equal(labels, tf.constant(high, tf.int64))
        return parsed["image/encoded"], labels if self._use_labels else -tf.ones_like(labels)

    def _decode_groups(self, groups: tuple[tf.Tensor, tf.Tensor], numbers: tf.Tensor) -> Batch:
        encoded, labels = groups
        count = int(numbers.shape[0])
        names = tf.ensure_shape(encoded, [count, self._size])
        decoded = [decode(each) for each in tf.unstack(tf.reshape(names, [-1]))]
        if self._mirror:
            flips = tf.unstack(self._flips(numbers))
            decoded = [_flip(*pair) for pair in zip(decoded, flips, strict=True)]
        shape = [*self._manifest.resolution, self._manifest.channels]
        images = tf.ensure_shape(tf.stack(decoded), [count * self._size, *shape])
        images = tf.reshape(images, [count, self._size, *shape])
        return images, tf.ensure_shape(labels, [count, self._size]), numbers

    def _flips(self, numbers: tf.Tensor) -> tf.Tensor:
        """Which images of the groups are mirrored: bool [groups * size]."""
        place = numbers[:, tf.newaxis] * self._size + tf.range(self._size, dtype=tf.int64)
        drawn = seeds.fold_in_groups(self._seed, seeds.Purpose.MIRROR, tf.reshape(place, [-1]))
        return tf.cast(drawn[:, 0] & 1, tf.bool)


def _flip(image: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    """A [H, W, C] image, mirrored if `flip`; only then is it copied."""
    # What `tf.cond` comes down to, without two functions for each of hundreds of images.
    upright, mirrored = tf.raw_ops.Switch(data=image, pred=flip)
    return tf.raw_ops.Merge(inputs=[upright, tf.reverse(mirrored, [1])]).output


def _reason(error: Exception) -> str:
    """TensorFlow's message in one line, without the names of its nodes."""
    lines = re.sub(r"\{\{.*?\}\}|\[Op:\w+\].*", "", str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    # A pool of its own: decoding never queues before the training step's operations.
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def _longest_block(manifest: Manifest) -> int:
    """Bytes to read at a time: a block comes in one request, and little behind it with it."""
    ends = [np.diff([*shard.index, shard.bytes]).max() for shard in manifest.shards]
    return int(min(max(ends), _MAX_READ))


def _records(path: tf.Tensor, offset: tf.Tensor, buffer: int) -> tf.data.Dataset:
    """The serialized examples of a file from a record's start on.

    `tf.data.TFRecordDataset` is this operation without the offset.
    """
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=path[tf.newaxis],
        compression_type="",
        buffer_size=buffer,
        byte_offsets=offset[tf.newaxis],
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, C] of a PNG or a JPEG, exactly as Pillow reads it."""
    # The operation goes by the content, not by its name, but only under this name can it be told
    # to use the inverse DCT that all others use. It converts no channels, so a wrong count shows.
    return tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE")


def _label_range(manifest: Manifest) -> tuple[int, int]:
    return (0, manifest.num_classes - 1) if manifest.num_classes else (-1, -1)


def _check_files(manifest: Manifest, shards: range) -> None:
    """Finds missing and cut shards before the training starts."""

    def check(number: int) -> None:
        shard = manifest.shards[number]
        try:
            size = storage.size(manifest.path(number))
        except StorageError as error:
            raise DataError(
                f"shard {shard.name} of {manifest.directory} cannot be read ({error}); copy or "
                "convert the data set again"
            ) from error
        if size != shard.bytes:
            raise DataError(
                f"shard {shard.name} of {manifest.directory} has {size} bytes, the manifest says "
                f"{shard.bytes}; copy or convert the data set again"
            )

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(check, shards))


def check_shard(manifest: Manifest, number: int) -> None:
    """Reads all of a shard, images too.

    Raises:
      DataError: names the shard, and the record (counted from 0) that is wrong.
    """
    shard = manifest.shards[number]
    _check_files(manifest, range(number, number + 1))
    count = 0
    try:
        with storage.open_read(manifest.path(number)) as file:
            for payload in records.read_records(file):
                _check_record(manifest, payload)
                count += 1
    except DataError as error:
        raise DataError(
            f"record {count} of shard {shard.name} in {manifest.directory}: {error}; copy or "
            "convert the data set again"
        ) from error
    if count != shard.count:
        raise DataError(
            f"shard {shard.name} in {manifest.directory} holds {count} records, the manifest says "
            f"{shard.count}; copy or convert the data set again"
        )


def _check_record(manifest: Manifest, payload: bytes) -> tuple[np.ndarray, int]:
    """A record's image and label; DataError with the reason alone."""
    try:
        parsed = tf.io.parse_single_example(payload, _FEATURES)
    except ERRORS:
        raise DataError("it is not an example with image, size and label") from None
    size = (int(parsed["image/height"]), int(parsed["image/width"]))
    if size != manifest.resolution:
        raise DataError(f"it says {size[1]}x{size[0]} pixels, {_wanted(manifest)}")
    label = int(parsed["image/class/label"])
    low, high = _label_range(manifest)
    if not low <= label <= high:
        raise DataError(f"its label is {label}, the manifest says {low} to {high}")
    try:
        image = decode(parsed["image/encoded"]).numpy()
    except ERRORS as error:
        raise DataError(f"its image cannot be decoded ({_reason(error)})") from None
    if image.shape != (*manifest.resolution, manifest.channels):
        height, width, channels = image.shape
        raise DataError(
            f"its image has {width}x{height} pixels and {channels} channels, {_wanted(manifest)}"
        )
    return image, label


def _wanted(manifest: Manifest) -> str:
    height, width = manifest.resolution
    return f"the manifest says {width}x{height} and {manifest.channels} channels"


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
    for place in np.argsort(wanted, kind="stable"):
        shard = int(np.searchsorted(ends, wanted[place], side="right"))
        record = int(wanted[place] - ends[shard] + manifest.shards[shard].count)
        images[place], labels[place] = _read_image(manifest, shard, record)
    return images, labels


def _read_image(manifest: Manifest, shard: int, record: int) -> tuple[np.ndarray, int]:
    block, skip = divmod(record, manifest.block)
    offset = manifest.shards[shard].index[block]
    with storage.open_read(manifest.path(shard)) as file:
        try:
            for number, payload in enumerate(records.read_records(file, offset)):
                if number == skip:
                    return _check_record(manifest, payload)
            raise DataError("the file ends before it")
        except DataError as error:
            raise DataError(
                f"record {record} of shard {manifest.shards[shard].name} in "
                f"{manifest.directory}: {error}; copy or convert the data set again"
            ) from error
