"""The input pipeline: an endless, deterministic stream of groups of images.

The stream is made of lanes, one for each shard: global group g takes its images from lane
g mod lanes, in an order that (seed, lane, epoch) gives (`trainer.data.lanes`). So the images of any group follow from the manifest, the seed and the group's
number: a stream starts anywhere without reading what comes before, and hosts that take
every W-th group see together what one host would see alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from trainer.core.errors import ConfigError, DataError, StorageError, require_tensorflow

require_tensorflow()  # before anything imports it

import tensorflow as tf  # noqa: E402

from trainer.core import output  # noqa: E402
from trainer.data import shards  # noqa: E402
from trainer.data.fetch import Fetcher  # noqa: E402
from trainer.data.lanes import Batch, Graph, blocks_per_window  # noqa: E402
from trainer.data.manifest import Manifest  # noqa: E402
from trainer.data.shards import BadRecords  # noqa: E402

# Errors of the storage that pass away. Refused, broken and cut off requests TensorFlow makes anew
# itself, ten times in 197 s; what comes here at once are names that could not be looked up and
# credentials that were not renewed in time.
_PASSING = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
_EXPIRED = "HTTP response code 401"
# What TensorFlow calls a shard whose content is not what it should be.
_CONTENT = (
    tf.errors.DataLossError,
    tf.errors.InvalidArgumentError,
    tf.errors.OutOfRangeError,
    UnicodeDecodeError,
)
_FIRST_REPORT_SEC = 30.0
_LONGEST_PAUSE_SEC = 30.0


class ImageStream:
    """The groups of images that one worker takes from a data set, from any group on, endlessly.

    Iterating gives `(images, labels, group_index)`: uint8 [groups, size, H, W, C],
    int64 [groups, size] (class number, or -1 without `use_labels`) and int64 [groups], where
    groups is `groups_per_batch // num_workers`.

    A stream that fails starts again at the group that it has come to. What passes away is tried
    until `stall_timeout`; a damaged record is replaced as `shards.BadRecords` says.

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
      bad_records: what is known of damaged records, and how many may be left out; by default none.
      stall_timeout: seconds without a batch, for want of data, after which iterating fails.
      log: gets a line about each new try, and each shard that stands still.

    Raises:
      ConfigError: the numbers do not fit together; says which to change.
      DataError: a shard is missing or has another size, or there are no labels to use. Iterating:
        a shard is missing, damaged or stands still; names it.
      StorageError: the storage cannot be read.
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
        bad_records: BadRecords | None = None,
        stall_timeout: float = 300.0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._manifest = manifest
        self._size = group_size
        self._seed = seed
        self._num_workers = num_workers
        self._use_labels = use_labels
        self._mirror = mirror
        self._window_blocks = blocks_per_window(manifest, window)
        self._bad_records = bad_records or BadRecords(manifest)
        self._stall_timeout = stall_timeout
        self._log = log or output.log
        self._check(groups_per_batch, start_group, worker)
        self._groups = groups_per_batch // num_workers
        self._next_group = start_group + (worker - start_group) % num_workers
        self._failures = 0  # since the last batch
        self._riddles = 0  # of these, complaints about a content that is found sound
        self._waited = 0.0  # seconds since then
        self._next_report = min(_FIRST_REPORT_SEC, stall_timeout / 4)
        own = range(worker, len(manifest.shards), num_workers)
        shards.check_files(manifest, own, content=self._bad_records.limit == 0)
        self._fetcher: Fetcher | None = None
        self._start()

    @property
    def element_spec(self) -> tuple[tf.TensorSpec, tf.TensorSpec, tf.TensorSpec]:
        """Shapes and types of what iterating gives."""
        return self._graph.dataset.element_spec

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> Batch:
        while True:
            try:
                if self._fetcher is None:
                    self._fetcher = Fetcher(iter(self._graph.dataset))
                batch = self._fetcher.next(self._wait)
            except shards.ERRORS as error:
                self._fetcher = None
                self._recover(error)
                self._start()
                continue
            self._next_group += self._groups * self._num_workers
            self._failures, self._riddles, self._waited = 0, 0, 0.0
            self._next_report = min(_FIRST_REPORT_SEC, self._stall_timeout / 4)
            return batch

    # ---- what goes wrong -------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        """Reports a stream that stands still, and ends it at last."""
        self._waited += seconds
        if self._waited >= self._stall_timeout:
            raise DataError(
                f"{self._standing()}; that is data.stall_timeout={self._stall_timeout:g}: check "
                "the storage and the network, and run the same command again"
            )
        if self._waited >= self._next_report:
            self._next_report *= 2
            self._log(self._standing())

    def _standing(self) -> str:
        """The shard whose reads to give up: the one of those being read that was needed first."""
        with tf.device("CPU:0"):
            reading = set(self._graph.reading.export()[0].numpy().tolist())
        manifest = self._manifest
        needed = [shard for shard, _ in self._graph.needed(self._next_group)]
        shard = next((each for each in [*needed, *reading] if each in reading), needed[0])
        others = f" (and {len(reading) - 1} more)" if len(reading) > 1 else ""
        return (
            f"shard {manifest.shards[shard].name}{others} of {manifest.directory} has given "
            f"nothing for {self._waited:.0f} s"
        )

    def _recover(self, error: Exception) -> None:
        """Makes ready for another try, or raises what the failure means."""
        manifest = self._manifest
        self._failures += 1
        needed = self._graph.needed(self._next_group)
        if isinstance(error, _CONTENT):
            if self._replace(needed):
                return
            self._riddles += 1
            if self._riddles < 3:
                self._pause(error)
                return
            raise DataError(
                f"reading {manifest.directory} failed, though its shards are sound now "
                f"({shards.reason(error)}); run the same command again"
            )
        if isinstance(error, tf.errors.NotFoundError):
            for number in dict.fromkeys(shard for shard, _ in needed):
                shards.check_files(manifest, range(number, number + 1))
        elif not isinstance(error, _PASSING) and _EXPIRED not in str(error):
            raise StorageError(f"cannot read {manifest.directory}: {shards.reason(error)}")
        self._pause(error)

    def _pause(self, error: Exception) -> None:
        """Waits before the next try, longer each time and never just as long as other workers."""
        pause = min(_LONGEST_PAUSE_SEC, 2.0**self._failures) * random.uniform(0.5, 1)
        text = f"reading {self._manifest.directory} failed ({shards.reason(error)})"
        if self._waited + pause >= self._stall_timeout:
            raise StorageError(
                f"{text} {self._failures} times in {self._waited:.0f} s; check the storage and the "
                "network, and run the same command again"
            )
        self._log(f"{text}; trying again in {pause:.0f} s")
        time.sleep(pause)
        self._waited += pause

    def _replace(self, blocks: list[tuple[int, int]]) -> bool:
        """Puts other records in the places of damaged ones, as far as that is allowed.

        Returns:
          whether there were any that the dataset does not know yet.
        """
        for number in dict.fromkeys(shard for shard, _ in blocks):
            shards.check_files(self._manifest, range(number, number + 1))
        for shard, block in blocks:
            self._bad_records.records(shard, block)
        return any(each in self._bad_records.replaced.keys() - self._graph.known for each in blocks)

    def _start(self) -> None:
        """Builds the dataset from the next group on."""
        self._graph = Graph(
            self._manifest,
            size=self._size,
            groups=self._groups,
            seed=self._seed,
            num_workers=self._num_workers,
            use_labels=self._use_labels,
            mirror=self._mirror,
            window_blocks=self._window_blocks,
            next_group=self._next_group,
            replaced=self._bad_records.replaced,
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
