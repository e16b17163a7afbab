"""The order of images and how they are read: lanes, blocks and windows, as one graph of TensorFlow's.

Lane l is shard l. Epoch e of a lane permutes the shard's blocks (runs of records that are read in one
go), takes them together into windows, and permutes the records in a window, all by (seed, lane, e).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.core.errors import ConfigError, require_tensorflow

require_tensorflow()  # before anything imports it

import tensorflow as tf  # noqa: E402

from trainer import data  # noqa: E402
from trainer.core import seeds, storage  # noqa: E402
from trainer.data import shards  # noqa: E402
from trainer.data.manifest import Manifest  # noqa: E402

Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

# All lanes' windows together hold about this much, where a block for each lane allows. It is part
# of the order of images. As much again is read ahead.
_WINDOW_BYTES = 128 << 20
_AHEAD_BYTES = 128 << 20
# Lanes that would hold more all the same, in blocks and groups, are not held at all.
_HELD_BYTES = 256 << 20

_REMOTE_BUFFER = 256 << 10
_MAX_BUFFER = 4 << 20
_BLOCKS_AT_ONCE = 4

# What one call of the decoding function makes at most: whole batches, for a batch put together
# later is copied once more. The images of one call are decoded on all processors.
_CALL_IMAGES = 256
_CALLS = 2
_SMALL_BATCH_BYTES = 64 << 20

_FOREVER = np.iinfo(np.int64).max

_LANE = ("lane", "paths", "count", "blocks", "row")  # the tables with an entry for each lane


def blocks_per_window(manifest: Manifest, window: int) -> int:
    """Blocks that a lane holds in memory and permutes together.

    Args:
      manifest: the data set.
      window: records wanted; fewer are taken where the windows of all lanes would not fit in a
        eighth of a gigabyte, down to one block.

    Raises:
      ConfigError: the window is not positive.
    """
    if window < 1:
        raise ConfigError(f"data.window is {window}; it must be at least 1 record")
    fitting = int(_WINDOW_BYTES / len(manifest.shards) / _mean_bytes(manifest))
    return max(1, min(window, fitting) // manifest.block)


def _mean_bytes(manifest: Manifest) -> float:
    """The mean size of a record in bytes."""
    return sum(shard.bytes for shard in manifest.shards) / manifest.num_images


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


class Graph:
    """The dataset of a stream from one group on.

    It is apart from the stream because its functions keep it alive, and all that it holds: a stream
    that nobody has any more ends at once, with its threads.

    Attributes:
      dataset: of batches.
      reading: table with the numbers of the shards that are being read.
      known: the blocks, as (shard, block), with damaged records that were known at its start.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        size: int,
        groups: int,
        seed: int,
        num_workers: int,
        use_labels: bool,
        mirror: bool,
        window_blocks: int,
        next_group: int,
        replaced: dict[tuple[int, int], list[bytes]],
    ) -> None:
        self._manifest = manifest
        self._size = size
        self._groups = groups
        self._seed = seed
        self._num_workers = num_workers
        self._use_labels = use_labels
        self._mirror = mirror
        self._window_blocks = window_blocks
        self._next_group = next_group
        self._replaced, self.known = dict(replaced), set(replaced)
        self._kept: list[Any] = []
        with tf.device("CPU:0"):
            self.reading = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, -1)
            self.dataset = self._build(self._lanes())

    def needed(self, group: int) -> list[tuple[int, int]]:
        """The blocks that the batch from a group on needs: (shard, block) in the order of need."""
        shards, lanes = self._manifest.shards, len(self._manifest.shards)
        found: dict[tuple[int, int], None] = {}
        for k in range(self._groups):
            number, lane = divmod(group + k * self._num_workers, lanes)
            first, _ = self.place(lane, number * self._size)
            last, _ = self.place(lane, (number + 1) * self._size - 1)
            for step in range(first, last + 1):
                lane_tensor, blocks = tf.constant(lane, tf.int64), len(shards[lane].index)
                chosen = self._blocks(lane_tensor, blocks, step).numpy()
                found.update({(lane, int(block)): None for block in chosen})
        return list(found)

    def _lanes(self) -> _Lanes:
        """The tables that the graph looks up."""
        manifest = self._manifest
        lanes = len(manifest.shards)
        # A lane's first group is the first one from the start on that belongs to it.
        first = self._next_group + self._num_workers * np.arange(lanes // self._num_workers)
        own = [manifest.shards[lane] for lane in first % lanes]
        blocks = np.array([len(shard.index) for shard in own])
        return _Lanes(
            lane=first % lanes,
            paths=[manifest.path(int(lane)) for lane in first % lanes],
            count=np.array([shard.count for shard in own]),
            blocks=blocks,
            row=np.cumsum(blocks) - blocks,
            index=np.concatenate([np.array(shard.index) for shard in own]),
        )

    def place(self, lane: int, position: int) -> tuple[int, int]:
        """The window, counted over all epochs, and the record in it, of a lane's n-th image."""
        shard = self._manifest.shards[lane]
        number = tf.constant(lane, tf.int64)
        step, skip = self._place_tensors(
            {"lane": number, "count": shard.count, "blocks": len(shard.index)}, position
        )
        return int(step), int(skip)

    def _place_tensors(self, row: dict[str, Any], position: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """`place` in a graph."""
        blocks, per_window, block = row["blocks"], self._window_blocks, self._manifest.block
        windows = -(-blocks // per_window)
        epoch, rest = position // row["count"], position % row["count"]
        order = tf.cast(self._block_order(row["lane"], blocks, epoch), tf.int64)
        sizes = tf.where(order == blocks - 1, row["count"] - (blocks - 1) * block, block)
        sizes = tf.math.segment_sum(sizes, tf.range(tf.size(order)) // per_window)
        ends = tf.cumsum(sizes)
        window = tf.reduce_sum(tf.cast(ends <= rest, tf.int64))
        return epoch * windows + window, rest - (ends[window] - sizes[window])

    def _block_order(self, lane: tf.Tensor, blocks: Any, epoch: Any) -> tf.Tensor:
        """All blocks of a lane as an epoch takes them."""
        windows = -(-blocks // self._window_blocks)
        return _order(self._seed, self._shuffle_index(lane, epoch, windows, 0), blocks)

    def _blocks(self, lane: tf.Tensor, blocks: Any, step: Any) -> tf.Tensor:
        """The blocks in a window, int64."""
        per_window = self._window_blocks
        windows = -(-blocks // per_window)
        epoch, number = step // windows, step % windows
        order = self._block_order(lane, blocks, epoch)
        return tf.cast(order[number * per_window : (number + 1) * per_window], tf.int64)

    def _shuffle_index(self, lane: Any, epoch: Any, windows: Any, number: Any) -> Any:
        """The index of a shuffle: number 0 orders the blocks, 1 + k the records of window k."""
        return (epoch * (windows + 1) + number) * len(self._manifest.shards) + lane

    def _build(self, lanes: _Lanes) -> tf.data.Dataset:
        self._table = {name: tf.constant(getattr(lanes, name)) for name in (*_LANE, "index")}
        self._set_replaced(lanes)
        count, mean = len(lanes.paths), _mean_bytes(self._manifest)
        # A window is read as whole blocks, several at once where each waits for an answer.
        remote = storage.is_remote(lanes.paths[0])
        at_once = min(self._window_blocks, _BLOCKS_AT_ONCE, max(1, shards.READERS // count))
        self._at_once = at_once if remote else 1
        self._buffer = buffer_bytes(self._manifest)
        group, block = self._size * mean, self._manifest.block * mean
        large = count * (2 * group + block) > _HELD_BYTES
        if large and self._window_blocks == 1 and self._manifest.block <= self._size:
            groups = self._scattered(group)
        else:
            groups = self._held(count, group)
        numbers = tf.data.Dataset.range(self._next_group, _FOREVER, self._num_workers)
        limit = max(1, _CALL_IMAGES // self._size)
        part = max(n for n in range(1, self._groups + 1) if n <= limit and self._groups % n == 0)
        dataset = tf.data.Dataset.zip((groups, numbers)).batch(part, drop_remainder=True)
        dataset = dataset.map(self._decode_groups, num_parallel_calls=_CALLS)
        if part < self._groups:
            dataset = dataset.rebatch(self._groups, drop_remainder=True)
        # The fetcher holds another one.
        if np.prod(dataset.element_spec[0].shape) <= _SMALL_BATCH_BYTES:
            dataset = dataset.prefetch(1)
        return dataset.with_options(_options(data.processors()))

    def _held(self, count: int, group_bytes: float) -> tf.data.Dataset:
        """The groups, from lanes that each hold a window and have groups ready behind it."""
        window = -(-self._window_blocks * self._manifest.block // self._size)
        ahead = int(_AHEAD_BYTES / count / group_bytes)
        return self._interleave(
            tf.data.Dataset.range(count),
            self._groups_from,
            cycle=count,
            ahead=max(1, min(ahead, window)),
            parallel=min(count, shards.READERS),
        )

    def _scattered(self, group_bytes: float) -> tf.data.Dataset:
        """The groups, each read by itself: nothing is held where a block has no more than a group.

        A block that two groups share is read for both.
        """

        def group(number: tf.Tensor) -> tf.data.Dataset:
            return self._groups_from(number).take(1)

        parallel = int(np.clip(_AHEAD_BYTES / group_bytes, 1, shards.READERS))
        numbers = tf.data.Dataset.range(_FOREVER)
        return self._interleave(numbers, group, cycle=parallel, ahead=1, parallel=parallel)

    def _groups_from(self, number: tf.Tensor) -> tf.data.Dataset:
        """A lane's groups from this worker's n-th on."""
        lanes, own = len(self._manifest.shards), len(self._manifest.shards) // self._num_workers
        row = {name: self._table[name][number % own] for name in _LANE}
        turn = (self._next_group + number * self._num_workers) // lanes
        row["step"], row["skip"] = self._place_tensors(row, turn * self._size)
        windows = tf.data.Dataset.range(row["step"], _FOREVER)
        return windows.flat_map(lambda step: self._window(row, step)).rebatch(self._size)

    def _interleave(
        self,
        numbers: tf.data.Dataset,
        function: Callable[[tf.Tensor], tf.data.Dataset],
        *,
        cycle: int,
        ahead: int,
        parallel: int,
    ) -> tf.data.Dataset:
        """`Dataset.interleave` in order, with a say in how much is ready beforehand.

        Args:
          numbers: what the function takes.
          function: makes a dataset for each number.
          cycle: datasets that take turns.
          ahead: elements of each that are made before their turn.
          parallel: datasets that make elements at a time.
        """
        spec: Any = None

        def variant(number: tf.Tensor) -> tf.Tensor:
            nonlocal spec
            dataset = function(number)
            spec = dataset.element_spec
            return tf.data.experimental.to_variant(dataset)

        traced = tf.function(variant, autograph=False).get_concrete_function(numbers.element_spec)
        self._kept.append(traced)  # the dataset itself doesn't keep it
        interleaved = tf.raw_ops.ParallelInterleaveDatasetV4(
            input_dataset=tf.data.experimental.to_variant(numbers),
            other_arguments=traced.captured_inputs,
            cycle_length=cycle,
            block_length=1,
            buffer_output_elements=ahead,
            prefetch_input_elements=0,
            num_parallel_calls=parallel,
            f=traced,
            deterministic="true",
            output_types=[each.dtype for each in spec],
            output_shapes=[each.shape for each in spec],
        )
        return tf.data.experimental.from_variant(interleaved, spec)

    def _window(self, row: dict[str, tf.Tensor], step: tf.Tensor) -> tf.data.Dataset:
        """One element: the encoded images and labels of a lane's window, in their order."""
        block, per_window, lane = self._manifest.block, self._window_blocks, row["lane"]
        windows = -(-row["blocks"] // per_window)
        epoch, number = step // windows, step % windows
        chosen = self._blocks(lane, row["blocks"], step)
        last = chosen == row["blocks"] - 1
        rest = row["count"] - (row["blocks"] - 1) * block
        expected = tf.reduce_sum(tf.where(last, rest, block))
        begin = tf.where(step == row["step"], row["skip"], 0)

        def shuffled(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            self.reading.remove(lane[tf.newaxis])
            count = tf.size(serialized, tf.int64)
            tf.debugging.assert_equal(count, expected, "records in a window")
            encoded, labels = self._parse(serialized)
            shuffle = self._shuffle_index(lane, epoch, windows, number + 1)
            picked = _order(self._seed, shuffle, count)[begin:]
            return tf.gather(encoded, picked), tf.gather(labels, picked)

        # The last block is read up to the end of the file, so that a surplus shows.
        takes = tf.where(last, tf.constant(-1, tf.int64), block)
        runs = tf.data.Dataset.from_tensor_slices((row["row"] + chosen, takes))

        def read(place: tf.Tensor, take: tf.Tensor) -> tf.data.Dataset:
            return self._read(row, place, take)

        if self._at_once > 1:
            found = runs.interleave(
                read,
                cycle_length=self._at_once,
                block_length=block,
                num_parallel_calls=self._at_once,
                deterministic=True,
            )
        else:
            found = runs.flat_map(read)
        return found.batch(per_window * block + 1).map(shuffled)

    def _read(
        self, row: dict[str, tf.Tensor], place: tf.Tensor, take: tf.Tensor
    ) -> tf.data.Dataset:
        """The serialized examples of a block, given by its place in the tables."""
        # Not with the time: deterministic runs may not know it.
        self.reading.insert(row["lane"][tf.newaxis], row["lane"][tf.newaxis])
        offset = self._table["index"][place]
        if not self._replaced:
            return records_from(row["paths"], offset, self._buffer).take(take)
        row_instead = self._table["replaced"][place]
        take = tf.where(row_instead < 0, take, 0)
        start, end = (self._table["splits"][row_instead + n] for n in (1, 2))
        instead = tf.data.Dataset.from_tensor_slices(self._table["contents"][start:end])
        return records_from(row["paths"], offset, self._buffer).take(take).concatenate(instead)

    def _set_replaced(self, lanes: _Lanes) -> None:
        """Adds to the tables what is shown for blocks with damaged records."""
        rows = dict(zip(lanes.lane.tolist(), lanes.row.tolist(), strict=True))
        # A grid of images may have met damage in the shards of other workers.
        own = {place: each for place, each in self._replaced.items() if place[0] in rows}
        self._replaced = own
        numbers = np.full(len(lanes.index), -1)
        # The first row is for all sound blocks, and empty.
        contents: list[list[bytes]] = [[], *own.values()]
        for number, (shard, block) in enumerate(own):
            numbers[rows[shard] + block] = number
        self._table |= {
            "replaced": tf.constant(numbers),
            "splits": tf.constant(np.cumsum([0, *map(len, contents)])),
            "contents": tf.constant(list(itertools.chain(*contents)), tf.string),
        }

    def _parse(self, serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The encoded images and the labels of serialized examples, checked."""
        parsed = tf.io.parse_example(serialized, shards.FEATURES)
        height, width = self._manifest.resolution
        tf.debugging.assert_equal(parsed["image/height"], tf.constant(height, tf.int64))
        tf.debugging.assert_equal(parsed["image/width"], tf.constant(width, tf.int64))
        labels = parsed["image/class/label"]
        low, high = shards.label_range(self._manifest)
        tf.debugging.assert_greater_equal(labels, tf.constant(low, tf.int64))
        tf.debugging.assert_less_equal(labels, tf.constant(high, tf.int64))
        return parsed["image/encoded"], labels if self._use_labels else -tf.ones_like(labels)

    def _decode_groups(self, groups: tuple[tf.Tensor, tf.Tensor], numbers: tf.Tensor) -> Batch:
        encoded, labels = groups
        count = int(numbers.shape[0])
        names = tf.ensure_shape(encoded, [count, self._size])
        decoded = [shards.decode(each) for each in tf.unstack(tf.reshape(names, [-1]))]
        if self._mirror:
            flips = tf.unstack(self._flips(numbers))
            decoded = [_flip(*pair) for pair in zip(decoded, flips, strict=True)]
        shape = [*self._manifest.resolution, self._manifest.channels]
        images = tf.ensure_shape(tf.stack(decoded), [count * self._size, *shape])
        images = tf.reshape(images, [count, self._size, *shape])
        return images, tf.ensure_shape(labels, [count, self._size]), numbers

    def _flips(self, numbers: tf.Tensor) -> tf.Tensor:
        """The images of the groups that are mirrored: bool [groups * size]."""
        place = numbers[:, tf.newaxis] * self._size + tf.range(self._size, dtype=tf.int64)
        bits = seeds.fold_in_groups(self._seed, seeds.Purpose.MIRROR, tf.reshape(place, [-1]))
        return tf.cast(bits[:, 0] & 1, tf.bool)


def _flip(image: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    """A [H, W, C] image, mirrored if `flip`; only then is it copied."""
    # What `tf.cond` comes down to, without two functions for each of hundreds of images.
    upright, mirrored = tf.raw_ops.Switch(data=image, pred=flip)
    return tf.raw_ops.Merge(inputs=[upright, tf.reverse(mirrored, [1])]).output


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    # A pool of its own: decoding never queues before the training step's operations.
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def buffer_bytes(manifest: Manifest, blocks: int = 1) -> int:
    """Bytes to take from a file at a time.

    A local block comes in one piece. Of a remote file this is taken from what TensorFlow's file
    system got in one request (GCS_READ_CACHE_BLOCK_SIZE_MB, see distribution/host.py).

    Args:
      manifest: the data set.
      blocks: that are read one after the other.
    """
    if storage.is_remote(manifest.directory):
        return _REMOTE_BUFFER
    ends = [np.diff([*shard.index, shard.bytes]).max() for shard in manifest.shards]
    return int(min(blocks * max(ends), _MAX_BUFFER))


def records_from(path: tf.Tensor, offset: tf.Tensor, buffer: int) -> tf.data.Dataset:
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
