"""Images of a trained generator, in Python: `trainer.load`, and what the command generate uses.

Seed n is the latent `np.random.RandomState(n).randn(1, z_dim)`, as in NVIDIA's tools, and makes the
same image alone or among others.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.core.seeds import Purpose, generator
from trainer.core.text import quoted, shorten
from trainer.families.network import Generator, Params
from trainer.serving.signatures import NOISE_MODES
from trainer.telemetry import images as grids
from trainer.training import checkpoint

Numbers = Sequence[int]

_SHOWN = 20  # names of classes in a message


class TrainedGenerator:
    """The moving average (G_ema) of a run's generator, as of one checkpoint.

    Args:
      network: the generator.
      params: its parameters by name.
      found: their checkpoint.
      noise_mode: const, random or none.
      batch: images rendered at a time; changes nothing but memory and speed.

    Attributes:
      resolution: (height, width) of the images.
      labels: names of the classes by index; empty if the network was trained without classes.
      step: training steps made.
      kimg: thousands of real images seen in training.
      checkpoint: directory of the checkpoint.
      renderer: its images without truncation.
    """

    def __init__(
        self,
        network: Generator,
        params: Params,
        found: checkpoint.Found,
        *,
        noise_mode: str = "const",
        batch: int = 8,
    ) -> None:
        self.resolution = network.resolution
        names = found.info["label_names"] or [f"class {i}" for i in range(network.c_dim)]
        self.labels = tuple(names)
        self.step: int = found.step
        self.kimg: float = found.info["kimg"]
        self.checkpoint = found.path
        self.renderer = Renderer(network, params, noise_mode=noise_mode, batch=batch)
        self._shape = (*network.resolution, network.img_channels)

    def sample(
        self,
        seeds: Iterable[int],
        label: str | int | None = None,
        truncation_psi: float = 1.0,
    ) -> npt.NDArray[np.uint8]:
        """The images that `python -m trainer generate` makes of the same seeds.

        Args:
          seeds: 0 to 2**32 - 1, one for each image.
          label: the class of all, by name or index; None for a network without classes.
          truncation_psi: 1 is all that the network has learned, 0 the average image.

        Returns:
          [N, H, W, C], 0 to 255.

        Raises:
          UsageError: there is no such class, or none for a network with classes; or the network
            has no average image to truncate to.
        """
        numbers = list(seeds)
        labels = [choose_class(label, self.labels)] * len(numbers)
        images = list(self.renderer.truncated(truncation_psi).images(numbers, labels))
        return np.asarray(images, np.uint8).reshape(-1, *self._shape)


def load(
    path: str | os.PathLike[str], *, noise_mode: str = "const", batch: int = 8
) -> TrainedGenerator:
    """The trained generator of a run or of one checkpoint.

    Args:
      path: directory of a run, whose newest checkpoint is taken, or of a checkpoint; local or
        gs://.
      noise_mode: const, random or none.
      batch: images rendered at a time; changes nothing but memory and speed.

    Raises:
      CheckpointError: there is no whole checkpoint.
      UsageError: there is no such noise mode.
    """
    found = checkpoint.find(storage.resolve(os.fspath(path)))
    network, params = checkpoint.load_generator(found)
    return TrainedGenerator(network, params, found, noise_mode=noise_mode, batch=batch)


def choose_class(
    wanted: str | int | None, labels: Sequence[str], *, option: str = "label", also: str = ""
) -> int:
    """The index of a class, or -1 for None where there are no classes.

    Args:
      wanted: a name or an index; a text that is both is a name.
      labels: names of the classes by index.
      option: the argument or flag that has `wanted`, for messages.
      also: further values that the option takes, for messages: "all, ".

    Raises:
      UsageError: there is no such class, or one is missing or not applicable.
    """
    if not labels:
        if wanted is not None:
            shown = shorten(str(wanted))
            raise UsageError(f"{option}={shown}: this network was trained without classes")
        return -1
    count = len(labels)
    names = ", ".join(shorten(name, 40) for name in labels[:_SHOWN])
    more = ", ..." if count > _SHOWN else ""
    choice = f"use {also}an index from 0 to {count - 1} or one of: {names}{more}"
    if wanted is None:
        raise UsageError(f"this network was trained with classes and needs {option}: {choice}")
    text = str(wanted)
    if isinstance(wanted, str) and wanted in labels:
        return list(labels).index(wanted)
    if re.fullmatch(r"-?\d+", text, re.ASCII):
        if len(text) < 10 and 0 <= int(text) < count:  # Python reads no thousands of digits
            return int(text)
        raise UsageError(f"{option}={shorten(text)}: there are {count} classes; {choice}")
    near = difflib.get_close_matches(text, labels, n=1)
    hint = f" (did you mean {quoted(near[0])}?)" if near else ""
    raise UsageError(f"{option}={shorten(text)}: no such class{hint}; {choice}")


class Renderer:
    """Renders with one traced graph for each network, whatever the number of images.

    Args:
      network: the generator.
      params: its parameters by name, as a rule those of G_ema.
      noise_mode: const, random or none.
      batch: images rendered at a time; changes nothing but memory and speed.

    Raises:
      UsageError: there is no such noise mode.

    Attributes:
      num_ws: layers that take a style.
    """

    def __init__(
        self, network: Generator, params: Params, *, noise_mode: str = "const", batch: int = 8
    ) -> None:
        if noise_mode not in NOISE_MODES:
            raise UsageError(f"noise_mode={noise_mode}: use one of {', '.join(NOISE_MODES)}")
        self._network, self._batch, self.num_ws = network, batch, network.num_ws
        self._psi, self._cutoff = tf.constant(1.0), tf.constant(network.num_ws)
        sizes = [height * width for height, width in network.noise_shapes]
        self._noise_size = sum(sizes) if noise_mode == "random" else 0
        held = {name: tf.convert_to_tensor(value) for name, value in params.items()}
        self._mapping = tf.function(
            lambda z, c, psi, cutoff: network.mapping(held, z, c, psi, cutoff)
        )

        def synthesis(ws: tf.Tensor, random: tf.Tensor) -> tf.Tensor:
            return network.synthesis(held, ws, network.noise(held, noise_mode, random))

        self._synthesis = tf.function(synthesis)

    def truncated(self, psi: float, cutoff: int | None = None) -> Renderer:
        """The same network with truncation; it shares the graphs.

        Args:
          psi: 1 is the whole distribution, 0 the average image.
          cutoff: how many of the first layers truncation applies to; None means all.

        Raises:
          UsageError: `cutoff` is no number of layers of this network, or it has no average w to
            move others to.
        """
        if cutoff is not None and not 0 <= cutoff <= self.num_ws:
            raise UsageError(f"truncation_cutoff={cutoff}: this network takes 0 to {self.num_ws}")
        if psi != 1 and not self._network.truncates:
            raise UsageError(
                f"truncation_psi={psi}: this network has no average image to move others to; leave "
                "it out"
            )
        other = copy.copy(self)
        other._psi = tf.constant(psi, tf.float32)
        other._cutoff = tf.constant(self.num_ws if cutoff is None else cutoff)
        return other

    def ws(self, seeds: Numbers, labels: Numbers) -> np.ndarray:
        """[N, num_ws, w_dim] float32: the styles of seeds, truncated; label -1 means no class."""
        z = np.stack([np.random.RandomState(seed).randn(self._network.z_dim) for seed in seeds])
        c = np.asarray(labels)[:, np.newaxis] == np.arange(self._network.c_dim)  # one-hot
        return np.concatenate([self._map(z[part], c[part]) for part in self._parts(len(seeds))])

    def render(self, ws: np.ndarray, noise_seeds: Numbers) -> Iterator[np.ndarray]:
        """The [H, W, C] uint8 images of [N, num_ws, w_dim] styles, one after the other.

        With random noise an image takes its own from its noise seed.
        """
        for part in self._parts(len(ws)):
            rngs = [generator(seed, Purpose.SNAPSHOT) for seed in noise_seeds[part]]
            random = np.stack([rng.standard_normal(self._noise_size) for rng in rngs])
            yield from grids.to_uint8(self._run(self._synthesis, ws[part], random))

    def images(self, seeds: Numbers, labels: Numbers) -> Iterator[np.ndarray]:
        """The image of each seed and label; the seed is that of random noise, too."""
        for part in self._parts(len(seeds)):
            yield from self.render(self.ws(seeds[part], labels[part]), seeds[part])

    def _parts(self, count: int) -> list[slice]:
        return [slice(start, start + self._batch) for start in range(0, count, self._batch)]

    def _map(self, z: np.ndarray, c: np.ndarray) -> np.ndarray:
        return self._run(lambda z, c: self._mapping(z, c, self._psi, self._cutoff), z, c)

    def _run(self, function: Callable[..., tf.Tensor], *inputs: np.ndarray) -> np.ndarray:
        """Calls with a full batch, padded if need be, so that nothing is traced twice."""
        full = [np.resize(x, (self._batch, *x.shape[1:])).astype(np.float32) for x in inputs]
        return function(*map(tf.constant, full)).numpy()[: len(inputs[0])]
