"""Image grids of a run: reals, and fakes of latents that stay the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.seeds import Purpose
from trainer.core.seeds import generator as random_generator
from trainer.data import shards
from trainer.data.manifest import Manifest
from trainer.data.shards import BadRecords
from trainer.families.network import Generator
from trainer.telemetry import images
from trainer.telemetry.images import GridLayout

_BATCH = 16
# Records are in random order, so this many show which classes there are.
_LABELLED = 1024


@dataclass(frozen=True)
class Snapshot:
    """A state of a run, for what looks at it from outside the loop.

    Attributes:
      workdir: of the run.
      info: as `state.json` of a checkpoint of this state has it.
      params: gives the parameters of G_ema by name.
      last: whether it is the end of the run.
      log: takes a line for the console.
    """

    workdir: str
    info: Mapping[str, Any]
    params: Callable[[], dict[str, np.ndarray]]
    last: bool
    log: Callable[[str], object]


# What is done at a snapshot; the run waits for it.
AtSnapshot = Callable[[Snapshot], None]


class Snapshots:
    """The grids of one run; the same tiles and latents from its start to its end.

    Args:
      generator: the network; applied uncompiled, so it should use the generic backend.
      manifest: the data set.
      use_labels: give each row a class.
      seed: of the run.
      bad_records: what is known of damaged records, and how many may be left out; by default none.
        What is shown in their places follows from the data set alone, as in training.
    """

    def __init__(
        self,
        generator: Generator,
        manifest: Manifest,
        *,
        use_labels: bool,
        seed: int,
        bad_records: BadRecords | None = None,
    ) -> None:
        self._generator, self._manifest, self._bad_records = generator, manifest, bad_records
        labels = None
        if use_labels:
            count = min(manifest.num_images, _LABELLED)
            labels = shards.read_images(manifest, np.arange(count), bad_records)[1]
        self.layout: GridLayout = images.grid_layout(
            manifest.resolution, manifest.num_images, labels, seed=seed
        )
        rng = random_generator(seed, Purpose.SNAPSHOT)
        tiles = len(self.layout.indices)
        self._z = rng.standard_normal([tiles, generator.z_dim]).astype(np.float32)
        classes = np.arange(generator.c_dim)
        self._c = (self.layout.labels[:, np.newaxis] == classes).astype(np.float32)
        self._draw = tf.function(self._images, autograph=False)
        self._spread_of_reals: float | None = None

    def _images(self, params: dict[str, tf.Tensor], z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        (dtype,) = {value.dtype for value in params.values()}
        ws = self._generator.mapping(params, tf.cast(z, dtype), tf.cast(c, dtype))
        return self._generator.synthesis(params, ws)

    def reals(self) -> np.ndarray:
        """The grid of reals: [rows * H, columns * W, C] uint8."""
        tiles, _ = shards.read_images(self._manifest, self.layout.indices, self._bad_records)
        self._spread_of_reals = images.spread(tiles, self.layout.labels)
        return images.tile(tiles, self.layout.size)

    def fakes(self, params: dict[str, tf.Variable]) -> np.ndarray:
        """The grid of fakes, with constant noise: [rows * H, columns * W, C] uint8."""
        values = {name: tf.convert_to_tensor(value) for name, value in params.items()}
        tiles = []
        for start in range(0, len(self._z), _BATCH):
            # The last batch is filled up, so that one graph serves all.
            rows = np.resize(np.arange(start, min(start + _BATCH, len(self._z))), _BATCH)
            drawn = self._draw(values, tf.constant(self._z[rows]), tf.constant(self._c[rows]))
            tiles.append(images.to_uint8(drawn.numpy()))
        return images.tile(np.concatenate(tiles)[: len(self._z)], self.layout.size)

    def variety(self, fakes: np.ndarray) -> float:
        """How far apart a grid's fakes are, compared with the reals.

        The root mean square distance of pixels between fakes of different latents, divided by that
        between reals. A conditional run compares images of the same class only: one glyph for all
        classes then gives 0, and so does one glyph for each class, which between classes would look
        varied. What it cannot see is a generator that ignores its classes, but not its latents.

        Args:
          fakes: [rows * H, columns * W, C] uint8, as `fakes` gives them.

        Returns:
          0 for one and the same image, about 1 for the variety of the reals; NaN where the reals
          have none.
        """
        if self._spread_of_reals is None:  # a resumed run has not drawn them
            self.reals()
        tiles = images.split(fakes, self.layout.size)
        of_reals = self._spread_of_reals
        return images.spread(tiles, self.layout.labels) / of_reals if of_reals else math.nan
