"""The interface of a family's networks to training, rendering and serving.

A network is a description: it knows the names and shapes of its parameters and how to apply them,
and holds none. Parameters come as a mapping from name to tensor, so the same network serves the
weights in training, their moving average and a loaded checkpoint.

`networks.py` of a family has a function `build` that makes both networks from the family's keys.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.core import seeds
from trainer.core.errors import ConfigError
from trainer.families.protocol import Spec, Table
from trainer.layers.ops import Backend

Params = Mapping[str, tf.Tensor]
# What a network's buffers follow: sums over the samples of a forward pass, by the buffers' names.
Sums = dict[str, tf.Tensor]

_W_AVG = "mapping.w_avg"
# NVIDIA's decay of this moving average.
_W_AVG_BETA = 0.995


class Output(NamedTuple):
    """The result of a forward pass: a network never moves state.

    Attributes:
      values: [N, H, W, img_channels] images in about [-1, 1], or [N, 1] logits.
      sums: what buffers follow.
    """

    values: tf.Tensor
    sums: Sums


class Latents(NamedTuple):
    """The inputs of a batch of fakes; a field that the generator doesn't use is empty.

    Attributes:
      z: [N, z_dim], standard normal.
      c: [N, c_dim], one-hot labels.
      mix_z: [N, z_dim], the second latent of style mixing.
      mix_cutoff: [N] int32, the first layer that takes the second latent; num_ws mixes none.
      noise: [N, sum of layers' H * W] standard normal, or [N, 0] where noise isn't random.
    """

    z: tf.Tensor
    c: tf.Tensor
    mix_z: tf.Tensor = ()
    mix_cutoff: tf.Tensor = ()
    noise: tf.Tensor = ()


class Network(abc.ABC):
    """Base of generator and discriminator: named parameters and their layouts.

    Attributes:
      specs: the parameters by name.
      c_dim: number of classes, 0 if unconditional.
      resolution: (height, width) of the images.
      img_channels: 1 to 4.
      backend: how layers are computed.
    """

    c_dim: int
    resolution: tuple[int, int]
    img_channels: int
    backend: Backend

    def __init__(self, specs: Table) -> None:
        self.specs = specs

    def init(self, seed: int) -> dict[str, np.ndarray]:
        """Fresh float32 parameters; a parameter's start depends on the seed and its name only."""
        values = {}
        for name, spec in self.specs.items():
            if spec.random:
                rng = seeds.generator(seed, seeds.Purpose.INIT, *name.encode())
                value = rng.standard_normal(spec.shape) * spec.init
            else:
                value = np.full(spec.shape, spec.init)
            values[name] = value.astype(np.float32)
        return values

    def trainable_names(self) -> list[str]:
        """The parameters an optimizer changes, in the order of creation."""
        return [name for name, spec in self.specs.items() if spec.trainable]

    def follow(self, buffers: Mapping[str, tf.Tensor], means: Sums) -> Sums:
        """The buffers after a step, from means over its batch of what they follow."""
        if means:
            raise TypeError(f"{type(self).__name__} has no rule for {', '.join(means)}")
        return {}

    def from_nvidia(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Takes parameters over from NVIDIA's layouts (OIHW, [out, in], CHW).

        Args:
          arrays: NVIDIA's parameters and buffers by name; filters among them are passed over.

        Raises:
          ValueError: naming parameters that are missing or have another shape.
        """
        values = {}
        for name, spec in self.specs.items():
            if name not in arrays:
                raise ValueError(f"parameter {name!r} is missing")
            value = _from_nvidia_layout(np.asarray(arrays[name]), spec)
            if value.shape != spec.shape:
                raise ValueError(f"parameter {name!r} has shape {value.shape}, not {spec.shape}")
            values[name] = value
        return values

    def to_nvidia(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of `from_nvidia`."""
        return {
            name: _to_nvidia_layout(np.asarray(params[name]), spec)
            for name, spec in self.specs.items()
        }


class Generator(Network):
    """z, c -> ws -> images: a mapping, and a synthesis network that takes a w for each layer.

    Networks without styles have one w, which is all that their first layer takes.

    Attributes:
      z_dim, w_dim: lengths of z and w.
      num_ws: how many w the synthesis network takes.
      noise_shapes: (height, width) of each layer's noise image; empty for networks without noise.
    """

    z_dim: int
    w_dim: int
    num_ws: int
    noise_shapes: list[tuple[int, int]]

    @abc.abstractmethod
    def map(self, params: Params, z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        """The mapping alone.

        Args:
          params: the parameters by name.
          z: [N, z_dim], standard normal.
          c: [N, c_dim], one-hot labels; c_dim may be 0.

        Returns:
          w: [N, w_dim].
        """

    @abc.abstractmethod
    def synthesis(
        self, params: Params, ws: tf.Tensor, noise: list[tf.Tensor] | None = None
    ) -> tf.Tensor:
        """Renders images.

        Args:
          params: the parameters by name.
          ws: [N, num_ws, w_dim].
          noise: from `noise`; None is the network's own constant noise.

        Returns:
          [N, H, W, img_channels] in about [-1, 1], in the dtype of `ws`.
        """

    def noise(self, params: Params, mode: str, random: tf.Tensor | None = None) -> list[tf.Tensor]:
        """The noise image of every layer, before its strength.

        Args:
          params: the parameters by name.
          mode: "const" (the network's own), "random" or "none".
          random: [N, sum of height * width over the layers], standard normal, for "random".

        Returns:
          One [H, W] or [N, H, W] for each layer; empty for "none".
        """
        del params, mode, random
        return []

    def sample(self, seed: tf.Tensor, c: tf.Tensor) -> Latents:
        """The latents of a group of fakes in training.

        Args:
          seed: [2] int32; all is a function of it.
          c: [N, c_dim], one-hot labels.
        """
        return Latents(tf.random.stateless_normal([c.shape[0], self.z_dim], seed), c)

    def apply(self, params: Params, latents: Latents) -> Output:
        """The images of latents in training.

        Args:
          params: the parameters by name.
          latents: from `sample`.
        """
        w = self.map(params, latents.z, latents.c)
        return Output(self.synthesis(params, self.broadcast(w)), {})

    def broadcast(self, w: tf.Tensor) -> tf.Tensor:
        """The same w for every layer: [N, w_dim] -> [N, num_ws, w_dim]."""
        return tf.tile(w[:, tf.newaxis], [1, self.num_ws, 1])

    @property
    def truncates(self) -> bool:
        """Whether there is an average w to move latents to."""
        return _W_AVG in self.specs

    def mapping(
        self,
        params: Params,
        z: tf.Tensor,
        c: tf.Tensor,
        truncation_psi: float | tf.Tensor = 1.0,
        truncation_cutoff: int | None = None,
    ) -> tf.Tensor:
        """Latents to the ws of all layers, with truncation (StyleGAN, appendix B).

        Args:
          params: the parameters by name.
          z: [N, z_dim].
          c: [N, c_dim].
          truncation_psi: 1 leaves w, 0 gives the average w; of no effect unless `truncates`.
          truncation_cutoff: only this many of the first layers are truncated; None is all.

        Returns:
          ws: [N, num_ws, w_dim].
        """
        ws = self.broadcast(self.map(params, z, c))
        if not self.truncates:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        average = params[_W_AVG]
        truncated = average + (ws - average) * tf.convert_to_tensor(truncation_psi, ws.dtype)
        layer = tf.range(self.num_ws)[tf.newaxis, :, tf.newaxis]
        return tf.where(layer < cutoff, truncated, ws)


class StyleGenerator(Generator):
    """A generator whose layers take styles, which training mixes and whose average it follows.

    Attributes:
      noise_mode: in training: "random", "const" or "none".
      style_mixing_prob: how often the fakes of a group mix two latents.
    """

    noise_mode: str
    style_mixing_prob: float

    def sample(self, seed: tf.Tensor, c: tf.Tensor) -> Latents:
        """See `Generator.sample`."""
        size = c.shape[0]
        noises = sum(height * width for height, width in self.noise_shapes)
        sizes = [self.z_dim, self.z_dim, noises if self.noise_mode == "random" else 0]
        z, mix_z, noise = tf.split(tf.random.stateless_normal([size, sum(sizes)], seed), sizes, 1)
        # Flipping bits gives a second stream of the same seed. One pair of numbers decides for
        # the whole group whether and where styles mix.
        uniform = tf.random.stateless_uniform([2], tf.bitwise.invert(seed))
        cutoff = 1 + tf.cast(uniform[1] * (self.num_ws - 1), tf.int32)
        cutoff = tf.where(
            uniform[0] < self.style_mixing_prob, tf.minimum(cutoff, self.num_ws - 1), self.num_ws
        )
        return Latents(z, c, mix_z, tf.repeat(cutoff, size), noise)

    def apply(self, params: Params, latents: Latents) -> Output:
        """See `Generator.apply`."""
        ws, sums = self.ws(params, latents)
        return Output(self.render(params, ws, latents), sums)

    def follow(self, buffers: Mapping[str, tf.Tensor], means: Sums) -> Sums:
        """See `Network.follow`."""
        return {name: mean + _W_AVG_BETA * (buffers[name] - mean) for name, mean in means.items()}

    def ws(self, params: Params, latents: Latents) -> tuple[tf.Tensor, Sums]:
        """[N, num_ws, w_dim] with style mixing (StyleGAN, section 3.1), and what w_avg follows."""
        w = self.map(params, latents.z, latents.c)
        mixed = self.map(params, latents.mix_z, latents.c)
        layer = tf.range(self.num_ws)[tf.newaxis, :, tf.newaxis]
        first = layer < latents.mix_cutoff[:, tf.newaxis, tf.newaxis]
        ws = tf.where(first, self.broadcast(w), self.broadcast(mixed))
        return ws, {_W_AVG: tf.reduce_sum(w, 0)}

    def render(self, params: Params, ws: tf.Tensor, latents: Latents) -> tf.Tensor:
        """The images of ws, with the noise that the latents hold; see `synthesis`."""
        return self.synthesis(params, ws, self.noise(params, self.noise_mode, latents.noise))


class Discriminator(Network):
    """Images, c -> logits.

    Attributes:
      freezable_layers: layers that Freeze-D can leave as they are, from the image inwards; the names
        of their parameters start with theirs.
    """

    freezable_layers: list[str]

    def trainable_names(self, freeze_layers: int = 0) -> list[str]:
        """The parameters an optimizer changes, without the first `freeze_layers` layers (Freeze-D).

        Mo et al. 2020, "Freeze the discriminator".

        Raises:
          ConfigError: there are fewer layers that can be frozen.
        """
        if freeze_layers > len(self.freezable_layers):
            raise ConfigError(
                f"training.freeze_d: {freeze_layers} layers, but this discriminator has "
                f"{len(self.freezable_layers)} that can be frozen"
            )
        frozen = tuple(f"{layer}." for layer in self.freezable_layers[:freeze_layers])
        return [name for name in super().trainable_names() if not name.startswith(frozen)]

    def __call__(self, params: Params, images: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        """[N, 1], the logits of images; see `apply`."""
        return self.apply(params, images, c).values

    @abc.abstractmethod
    def apply(self, params: Params, images: tf.Tensor, c: tf.Tensor) -> Output:
        """Scores images.

        Args:
          params: the parameters by name.
          images: [N, H, W, img_channels] in [-1, 1].
          c: [N, c_dim], one-hot labels; c_dim may be 0.

        Returns:
          Logits [N, 1], positive for real, in the dtype of the parameters.
        """


def _from_nvidia_layout(value: np.ndarray, spec: Spec) -> np.ndarray:
    if spec.grid is not None:
        height, width, channels = spec.grid
        value = value.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
        return np.ascontiguousarray(value.reshape(height * width * channels, -1))
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(2, 3, 1, 0))
    if value.ndim == 3:
        return np.ascontiguousarray(value.transpose(1, 2, 0))
    # The noise of a layer is an image in both layouts.
    return np.ascontiguousarray(value.T) if value.ndim == 2 and spec.trainable else value


def _to_nvidia_layout(value: np.ndarray, spec: Spec) -> np.ndarray:
    if spec.grid is not None:
        height, width, channels = spec.grid
        value = value.reshape(height, width, channels, -1).transpose(3, 2, 0, 1)
        return np.ascontiguousarray(value.reshape(-1, channels * height * width))
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    if value.ndim == 3:
        return np.ascontiguousarray(value.transpose(2, 0, 1))
    return np.ascontiguousarray(value.T) if value.ndim == 2 and spec.trainable else value
