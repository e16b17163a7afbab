"""A generator as others call it: a `tf.Module` with named signatures, for a SavedModel.

What is saved is a graph and its parameters; none of this code is needed to run it. The signatures:

    serving_default   seed or z, label, truncation_psi, noise_mode -> images, uint8 [N, H, W, C]
    png               the same -> image_bytes, [N] PNG files; servers send what is so named as base64
    mapping           z, c, truncation_psi -> ws, float32 [N, num_ws, w_dim]
    synthesis         ws -> images, float32 [N, H, W, C] in about [-1, 1], with constant noise

Their inputs, all but `label`, `z` of `mapping`, `c` and `ws` with defaults:

    seed             [N] int64, 0: of the latent where `z` has no columns, and of random noise
    z                [N, z_dim] float32, standard normal; [1, 0] takes the seeds' latents
    label            [N] int64, the class; only where the network has classes
    truncation_psi   [N] float32, 1: 1 is all it has learned, 0 the average image; a network without
                     styles has no such image, and takes 1 only
    noise_mode       [N] text, const: const, random or none; without effect if it has no noise
    c                [N, c_dim] float32, one-hot; only where the network has classes

N is any number and may differ from call to call. Each input has N rows, or one row for all. (With a
row for each image they fit the row format of TensorFlow Serving and of Vertex AI.)

Seeds are others than those of `python -m trainer generate`: its latents come from NumPy's Mersenne
twister, which is no TensorFlow op. Here seed n is
`tf.random.stateless_normal([z_dim], [n, 0], alg="philox")`, and its random noise, of all layers one
after the other, the same with [n, 1]. Whoever wants the image of generate's seed n passes
`z = np.random.RandomState(n).randn(1, z_dim)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.families.network import Generator

_LATENT, _NOISE = 0, 1  # what a seed is used for
NOISE_MODES = ("const", "random", "none")

_Signature = Any  # a tf.function, whose type TensorFlow does not say


class Served(tf.Module):
    """The functions that the signatures are, with the parameters they need.

    In Python they can be called by the names of the signatures, `generate` for `serving_default`,
    and take the defaults then.

    Args:
      generator: the network.
      params: its parameters by name.
      jit: compile mapping and synthesis with XLA, once for each number of images. Random numbers
        stay outside: there XLA would make others of a seed.
    """

    def __init__(
        self, generator: Generator, params: Mapping[str, np.ndarray], *, jit: bool = False
    ) -> None:
        super().__init__()
        self._generator = generator
        with tf.device("/CPU:0"):  # until they are saved; where they are loaded is not said
            self.params = {
                name: tf.Variable(value, trainable=False, dtype=tf.float32, name=name)
                for name, value in params.items()
            }
        compiled = {"autograph": False, "jit_compile": True if jit else None}
        self._map = tf.function(self._mapping, **compiled)
        self._render = tf.function(self._synthesis, **compiled)
        self.generate = self._with_latents(lambda *inputs: {"images": self._images(*inputs)})
        self.png = self._with_latents(
            lambda *inputs: {"image_bytes": _encoded(self._images(*inputs))}
        )
        self.mapping = self._mapping_signature()
        self.synthesis = tf.function(
            lambda ws: {"images": self._render(ws, self._const_noise())},
            autograph=False,
            input_signature=[
                tf.TensorSpec([None, generator.num_ws, generator.w_dim], tf.float32, "ws")
            ],
        )

    def signatures(self) -> dict[str, _Signature]:
        """The signatures to save."""
        return {
            "serving_default": self.generate,
            "png": self.png,
            "mapping": self.mapping,
            "synthesis": self.synthesis,
        }

    # ---------------------------------------------------------------------------- the network

    def _values(self) -> dict[str, tf.Tensor]:
        return {name: tf.convert_to_tensor(variable) for name, variable in self.params.items()}

    def _mapping(self, z: tf.Tensor, c: tf.Tensor, psi: tf.Tensor) -> tf.Tensor:
        return self._generator.mapping(self._values(), z, c, psi[:, tf.newaxis, tf.newaxis])

    def _checked(self, psi: tf.Tensor) -> tf.Tensor:
        """The truncation, if the network has any."""
        if self._generator.truncates:
            return psi
        message = "this network has no average image: truncation_psi must be 1; it is"
        with tf.control_dependencies(
            [tf.debugging.Assert(tf.reduce_all(psi == 1), [message, psi])]
        ):
            return tf.identity(psi)

    def _synthesis(self, ws: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        params = self._values()
        return self._generator.synthesis(params, ws, self._generator.noise(params, "random", noise))

    def _const_noise(self) -> tf.Tensor:
        """[1, sum of height * width over the layers]: the network's own."""
        layers = self._generator.noise(self._values(), "const")
        if not layers:
            return tf.zeros([1, 0])
        return tf.concat([tf.reshape(layer, [1, -1]) for layer in layers], 1)

    # ---------------------------------------------------------------------------- signatures

    def _with_latents(self, body: Callable[..., dict[str, tf.Tensor]]) -> _Signature:
        """A signature from latents or seeds. TensorFlow saves defaults if they are tensors."""
        seeds, z = tf.zeros([1], tf.int64), tf.zeros([1, 0])
        full, const = tf.ones([1]), tf.constant([NOISE_MODES[0]])
        specs = [
            tf.TensorSpec([None], tf.int64, "seed"),
            tf.TensorSpec([None, None], tf.float32, "z"),
            tf.TensorSpec([None], tf.float32, "truncation_psi"),
            tf.TensorSpec([None], tf.string, "noise_mode"),
        ]

        def labelled(label, seed=seeds, z=z, truncation_psi=full, noise_mode=const):  # type: ignore[no-untyped-def]
            return body(label, seed, z, truncation_psi, noise_mode)

        def unlabelled(seed=seeds, z=z, truncation_psi=full, noise_mode=const):  # type: ignore[no-untyped-def]
            return body(None, seed, z, truncation_psi, noise_mode)

        if self._generator.c_dim:
            label = tf.TensorSpec([None], tf.int64, "label")
            return tf.function(labelled, autograph=False, input_signature=[label, *specs])
        return tf.function(unlabelled, autograph=False, input_signature=specs)

    def _mapping_signature(self) -> _Signature:
        z_dim, c_dim, full = self._generator.z_dim, self._generator.c_dim, tf.ones([1])
        z = tf.TensorSpec([None, z_dim], tf.float32, "z")
        c = tf.TensorSpec([None, c_dim], tf.float32, "c")
        psi = tf.TensorSpec([None], tf.float32, "truncation_psi")

        def labelled(z, c, truncation_psi=full):  # type: ignore[no-untyped-def]
            count = tf.maximum(tf.shape(z)[0], tf.shape(c)[0])
            z, c = _repeated(z, count), _repeated(c, count)
            return {"ws": self._map(z, c, self._checked(truncation_psi))}

        def unlabelled(z, truncation_psi=full):  # type: ignore[no-untyped-def]
            no_class = tf.zeros([tf.shape(z)[0], 0])
            return {"ws": self._map(z, no_class, self._checked(truncation_psi))}

        if c_dim:
            return tf.function(labelled, autograph=False, input_signature=[z, c, psi])
        return tf.function(unlabelled, autograph=False, input_signature=[z, psi])

    # ---------------------------------------------------------------------------- their insides

    def _images(
        self,
        label: tf.Tensor | None,
        seed: tf.Tensor,
        z: tf.Tensor,
        psi: tf.Tensor,
        noise_mode: tf.Tensor,
    ) -> tf.Tensor:
        """[N, H, W, C] uint8, by the rule of `telemetry.images.to_uint8`."""
        z = self._latents(z, seed)
        rows = [tf.shape(x)[0] for x in (seed, z, psi, noise_mode, label) if x is not None]
        count = tf.reduce_max(rows)
        fits = [tf.reduce_all((tf.stack(rows) == 1) | (tf.stack(rows) == count))]
        message = "inputs must have one row for each image, or one for all; they have"
        with tf.control_dependencies([tf.debugging.Assert(fits[0], [message, *rows])]):
            z = _repeated(z, count)
        ws = self._map(z, self._one_hot(label, count), self._checked(psi))
        images = self._render(ws, self._noise(noise_mode, seed, count))
        pixels = tf.clip_by_value(images * 127.5 + 128.0, 0.0, 255.0)
        return tf.cast(pixels, tf.uint8)

    def _latents(self, z: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """z where it has columns, else the latents of the seeds."""
        z_dim, columns = self._generator.z_dim, tf.shape(z)[1]
        fits = tf.reduce_any(columns == [0, z_dim])
        message = f"z must have {z_dim} columns, or none to take the latents of the seeds; it has"
        with tf.control_dependencies([tf.debugging.Assert(fits, [message, columns])]):
            latents = tf.cond(columns > 0, lambda: z, lambda: _normal(seed, z_dim, _LATENT))
        return tf.ensure_shape(latents, [None, z_dim])

    def _one_hot(self, label: tf.Tensor | None, count: tf.Tensor) -> tf.Tensor:
        c_dim = self._generator.c_dim
        if label is None:
            return tf.zeros([count, 0])
        known = tf.reduce_all((label >= 0) & (label < c_dim))
        message = f"label must be a class from 0 to {c_dim - 1}; it is"
        with tf.control_dependencies([tf.debugging.Assert(known, [message, label])]):
            return _repeated(tf.one_hot(label, c_dim), count)

    def _noise(self, mode: tf.Tensor, seed: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """[1 or N, sum of height * width over the layers], by each row's mode."""
        known = tf.reduce_all(tf.reduce_any(mode[:, tf.newaxis] == [*NOISE_MODES], 1))
        message = f"noise_mode must be {', '.join(NOISE_MODES[:-1])} or {NOISE_MODES[-1]}; it is"
        with tf.control_dependencies([tf.debugging.Assert(known, [message, mode])]):
            const, random = (mode[:, tf.newaxis] == name for name in NOISE_MODES[:2])
        size = sum(height * width for height, width in self._generator.noise_shapes)
        sampled = tf.cond(
            tf.reduce_any(random),
            lambda: _repeated(_normal(seed, size, _NOISE), count),
            lambda: tf.zeros([1, size]),
        )
        noise = tf.where(const, self._const_noise(), tf.where(random, sampled, 0.0))
        return tf.ensure_shape(noise, [None, size])


def _normal(seed: tf.Tensor, size: int, purpose: int) -> tf.Tensor:
    """[N, size] standard normal: each seed's own numbers, alone or among others.

    With the algorithm named the numbers are the same on every device.
    """
    return tf.map_fn(
        lambda one: tf.random.stateless_normal(
            [size], tf.stack([one, tf.constant(purpose, tf.int64)]), alg="philox"
        ),
        seed,
        fn_output_signature=tf.TensorSpec([size], tf.float32),
    )


def _repeated(x: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Repeats a single row for all images."""
    return tf.broadcast_to(x, [count, x.shape[1]])


def _encoded(images: tf.Tensor) -> tf.Tensor:
    return tf.map_fn(tf.io.encode_png, images, fn_output_signature=tf.TensorSpec([], tf.string))
