"""Adaptive discriminator augmentation (ADA).

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data": the pipeline of
appendix B (pixel blitting, geometry, colour, image-space filtering, noise and cutout) and the
controller of section 3.1. Values equal those of NVIDIA's implementation, draw for draw.

Drawing and applying are apart: `AugmentPipe.draw` makes every random number of a call as plain
tensors, `AugmentPipe.apply` is a deterministic function of images, probability and draws, linear
(affine) in the images.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.augment import warp
from trainer.core.errors import ConfigError

Draws = dict[str, tf.Tensor]

_BLIT = ("xflip", "rotate90", "xint")
_GEOMETRY = ("scale", "rotate", "aniso", "xfrac")
_COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")

# Probability multipliers of the presets: blit, geometry, colour, filter, noise, cutout.
PIPES: dict[str, dict[str, Any]] = {
    name: dict.fromkeys(ops, 1.0)
    for name, ops in {
        "b": _BLIT,
        "bg": _BLIT + _GEOMETRY,
        "bgc": _BLIT + _GEOMETRY + _COLOR,
        "bgcf": (*_BLIT, *_GEOMETRY, *_COLOR, "imgfilter"),
        "bgcfn": (*_BLIT, *_GEOMETRY, *_COLOR, "imgfilter", "noise"),
        "bgcfnc": (*_BLIT, *_GEOMETRY, *_COLOR, "imgfilter", "noise", "cutout"),
        "bgc-cutout": (*_BLIT, *_GEOMETRY, *_COLOR, "cutout"),
    }.items()
}

# Every raw number of an image: name and count. A gate opens where it is below the probability.
# The order is part of a run's identity: append, never reorder.
UNIFORM_FIELDS: dict[str, int] = {
    "xflip": 1,
    "xflip_gate": 1,
    "rotate90": 1,
    "rotate90_gate": 1,
    "xint": 2,
    "xint_gate": 1,
    "scale_gate": 1,
    "rotate_pre": 1,
    "rotate_pre_gate": 1,
    "aniso_gate": 1,
    "rotate_post": 1,
    "rotate_post_gate": 1,
    "xfrac_gate": 1,
    "brightness_gate": 1,
    "contrast_gate": 1,
    "lumaflip": 1,
    "lumaflip_gate": 1,
    "hue": 1,
    "hue_gate": 1,
    "saturation_gate": 1,
    "imgfilter_gate": 4,
    "noise_gate": 1,
    "cutout_gate": 1,
    "cutout": 2,
}
NORMAL_FIELDS: dict[str, int] = {
    "scale": 1,
    "aniso": 1,
    "xfrac": 2,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "imgfilter": 4,
    "noise": 1,
}

# A group's seed gives one stream of uniform numbers; these make two more of it.
_NORMAL_STREAM = 0x3C6EF372
_IMAGE_STREAM = 0x1B873593

# The unit vector along which the colour channels are equal: luma.
_LUMA = np.full([3, 3], 1 / 3)
_LUMA_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)

_SYM2 = np.array(
    [-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025]
)
# Power of natural images in the four bands of the filter bank, falling as 1/f.
_BAND_POWER = np.array([10, 1, 1, 1]) / 13


@dataclasses.dataclass(frozen=True)
class AugmentPipe:
    """The augmentations of one run: for each a probability multiplier, and its strength.

    An operation happens with probability multiplier * p. Scalings, contrast, saturation and filter
    gains are log-normal with a standard deviation in octaves; rotations and hue are uniform within
    `*_max` of a half turn to either side; translations and cutout are relative to the image.

    Channels: 1 (L), 2 (L + alpha), 3 (RGB) or 4 (RGB + alpha). Colour acts on the colour channels
    only. Everything else, alpha included, is treated as NVIDIA treats any channel; NVIDIA has no
    pipeline for alpha, so 2 and 4 channels are this project's extension. Hue and saturation don't
    exist for L, as with NVIDIA.
    """

    xflip: float = 0.0
    rotate90: float = 0.0
    xint: float = 0.0
    xint_max: float = 0.125

    scale: float = 0.0
    rotate: float = 0.0
    aniso: float = 0.0
    xfrac: float = 0.0
    scale_std: float = 0.2
    rotate_max: float = 1.0
    aniso_std: float = 0.2
    xfrac_std: float = 0.125

    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1.0
    saturation_std: float = 1.0

    imgfilter: float = 0.0
    imgfilter_bands: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    imgfilter_std: float = 1.0

    noise: float = 0.0
    cutout: float = 0.0
    noise_std: float = 0.1
    cutout_size: float = 0.5

    @classmethod
    def preset(cls, name: str, color: float = 1.0) -> AugmentPipe:
        """The pipe of that name in `PIPES`.

        Args:
          name: of the pipe.
          color: a factor of the probability multipliers of `_COLOR`.

        Raises:
          ConfigError: there is none.
        """
        if name not in PIPES:
            raise ConfigError(f"augment.pipe: no pipe {name!r}; choose one of {', '.join(PIPES)}")
        multipliers = PIPES[name]
        return cls(
            **multipliers | {op: color * multipliers[op] for op in _COLOR if op in multipliers}
        )

    def draw(self, seeds: tf.Tensor, group_size: int, image_shape: tuple[int, int, int]) -> Draws:
        """Every random number that `apply` needs, in the form in which NVIDIA's code draws it.

        Args:
          seeds: [groups, 2] int32, one for each group (`core.seeds.fold_in_groups`); the number of
            groups is known while tracing. A group's draws depend on its own seed only.
          group_size: images in a group.
          image_shape: (height, width, channels).

        Returns:
          float32 tensors by name: those of `UNIFORM_FIELDS` in [0, 1) and of `NORMAL_FIELDS`
          standard normal, [N] or [N, count], N = groups * group_size; and, if the pipe has noise,
          `noise_image` [N, H, W, C] standard normal.
        """
        shape = [group_size, sum(UNIFORM_FIELDS.values())]
        uniform = [tf.random.stateless_uniform(shape, s) for s in tf.unstack(seeds)]
        shape = [group_size, sum(NORMAL_FIELDS.values())]
        normal = [tf.random.stateless_normal(shape, s) for s in _stream(seeds, _NORMAL_STREAM)]
        draws = _split(tf.concat(uniform, 0), UNIFORM_FIELDS)
        draws |= _split(tf.concat(normal, 0), NORMAL_FIELDS)
        if self.noise > 0:
            shape = [group_size, *image_shape]
            image = [tf.random.stateless_normal(shape, s) for s in _stream(seeds, _IMAGE_STREAM)]
            draws["noise_image"] = tf.concat(image, 0)
        return draws

    def apply(
        self,
        images: tf.Tensor,
        p: tf.Tensor | float,
        draws: Mapping[str, tf.Tensor],
        *,
        group_size: int | None = None,
        static_shapes: bool = False,
        windows: bool = False,
    ) -> tf.Tensor:
        """Augments images, differentiably to any order in them.

        Args:
          images: [N, H, W, C] float32 (or float64), about [-1, 1]; static shape.
          p: overall probability, a scalar; may be a tensor.
          draws: what `draw` returned; only the fields of this pipe's operations are read.
          group_size: consecutive images that share the margin of reflection of the geometric
            step. The default takes the whole call, as NVIDIA does.
          static_shapes: give every intermediate a shape known while tracing, as XLA and TPU need.
            Same result, more work when p is low.
          windows: see `warp.warp`. Same result, for TPUs.

        Returns:
          [N, H, W, C], as `images`, not clipped.

        Raises:
          ValueError: N isn't a multiple of the group size, or C isn't 1 to 4.
        """
        num, height, width, channels = images.shape
        group_size = group_size or num
        if num % group_size:
            raise ValueError(f"{num} images don't divide into groups of {group_size}")
        if not 1 <= channels <= 4:
            raise ValueError(f"images have {channels} channels; augmentation knows 1 to 4")
        p = tf.cast(p, images.dtype)
        draws = {name: tf.cast(value, images.dtype) for name, value in draws.items()}

        if self._any(_BLIT + _GEOMETRY):
            linear, offset = self._geometry(draws, p, images.shape)
            images = warp.warp(
                images,
                linear,
                offset,
                group_size=group_size,
                static_shapes=static_shapes,
                windows=windows,
            )
        if self._any(_COLOR):
            images = _apply_color(images, *self._color(draws, p, gray=channels <= 2))
        if self.imgfilter > 0:
            images = _apply_filter(images, self._band_gains(draws, p))
        if self.noise > 0:
            gate = _gate(draws, "noise", self.noise * p)
            sigma = tf.where(gate, tf.abs(draws["noise"]) * self.noise_std, 0)
            images += draws["noise_image"] * tf.reshape(sigma, [num, 1, 1, 1])
        if self.cutout > 0:
            images *= self._cutout_mask(draws, p, (height, width))
        return images

    def _any(self, ops: tuple[str, ...]) -> bool:
        return any(getattr(self, op) > 0 for op in ops)

    def _geometry(
        self, draws: Draws, p: tf.Tensor, shape: tf.TensorShape
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The map from output to input pixels: [N, 2, 2] linear part, [N, 2] translation.

        Each operation multiplies the inverse of its transform on the right (appendix B.2), so the
        last one is the first to act on an output position.
        """
        num, height, width, _ = shape
        extent = tf.constant([width, height], p.dtype)
        linear = tf.eye(2, batch_shape=[num], dtype=p.dtype)
        offset = tf.zeros([num, 2], p.dtype)
        if self.xflip > 0:
            gate = _gate(draws, "xflip", self.xflip * p)
            i = tf.where(gate, tf.floor(draws["xflip"] * 2), 0)
            linear *= _row(1 - 2 * i, tf.ones_like(i))
        if self.rotate90 > 0:
            gate = _gate(draws, "rotate90", self.rotate90 * p)
            i = tf.where(gate, tf.floor(draws["rotate90"] * 4), 0)
            linear = tf.matmul(linear, _rotation(i * (math.pi / 2)))
        if self.xint > 0:
            gate = _gate(draws, "xint", self.xint * p)
            t = _symmetric(draws["xint"]) * self.xint_max
            t = tf.where(gate[:, tf.newaxis], t, 0)
            offset -= tf.linalg.matvec(linear, tf.round(t * extent))
        if self.scale > 0:
            gate = _gate(draws, "scale", self.scale * p)
            s = tf.where(gate, _exp2(draws["scale"] * self.scale_std), 1)
            linear *= _row(1 / s, 1 / s)
        if self.rotate > 0:
            linear = tf.matmul(linear, self._rotate(draws, "rotate_pre", p))
        if self.aniso > 0:
            gate = _gate(draws, "aniso", self.aniso * p)
            s = tf.where(gate, _exp2(draws["aniso"] * self.aniso_std), 1)
            linear *= _row(1 / s, s)
        if self.rotate > 0:
            linear = tf.matmul(linear, self._rotate(draws, "rotate_post", p))
        if self.xfrac > 0:
            gate = _gate(draws, "xfrac", self.xfrac * p)
            t = tf.where(gate[:, tf.newaxis], draws["xfrac"] * self.xfrac_std, 0)
            offset -= tf.linalg.matvec(linear, t * extent)
        return linear, offset

    def _rotate(self, draws: Draws, name: str, p: tf.Tensor) -> tf.Tensor:
        # Two rotations, before and after the stretch: together they happen with probability p.
        p_rot = 1 - tf.sqrt(tf.clip_by_value(1 - self.rotate * p, 0, 1))
        theta = _symmetric(draws[name]) * (math.pi * self.rotate_max)
        return _rotation(tf.where(_gate(draws, name, p_rot), theta, 0))

    def _color(
        self, draws: Draws, p: tf.Tensor, *, gray: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The colour transform: gain and offset of luma [N], and the RGB matrix [N, 3, 3].

        Brightness and luma flip act along the luma axis v, hue and saturation across it, contrast
        on both: the product of NVIDIA's 4x4 matrices (appendix B.3) is, in closed form,
        c ((1 - 2i) vv' + s (cos (I - vv') + sin [v]x)) with offset c (1 - 2i) b along v.
        """
        one = tf.ones_like(draws["contrast"])
        luma, chroma, brightness, theta = one, one, 0 * one, 0 * one
        if self.brightness > 0:
            gate = _gate(draws, "brightness", self.brightness * p)
            brightness = tf.where(gate, draws["brightness"] * self.brightness_std, 0)
        if self.contrast > 0:
            gate = _gate(draws, "contrast", self.contrast * p)
            luma = chroma = tf.where(gate, _exp2(draws["contrast"] * self.contrast_std), 1)
        if self.lumaflip > 0:
            gate = _gate(draws, "lumaflip", self.lumaflip * p)
            luma *= 1 - 2 * tf.where(gate, tf.floor(draws["lumaflip"] * 2), 0)
        if self.hue > 0 and not gray:
            gate = _gate(draws, "hue", self.hue * p)
            theta = tf.where(gate, _symmetric(draws["hue"]) * (math.pi * self.hue_max), 0)
        if self.saturation > 0 and not gray:
            gate = _gate(draws, "saturation", self.saturation * p)
            chroma *= tf.where(gate, _exp2(draws["saturation"] * self.saturation_std), 1)
        across = np.eye(3) - _LUMA
        terms = tf.stack([luma, chroma * tf.cos(theta), chroma * tf.sin(theta)], axis=-1)
        basis = tf.constant(np.stack([_LUMA, across, _LUMA_CROSS]), p.dtype)
        return luma, luma * brightness, tf.tensordot(terms, basis, 1)

    def _band_gains(self, draws: Draws, p: tf.Tensor) -> tf.Tensor:
        """Amplification of each frequency band (appendix B.4): [N, 4].

        A band's gain is normalised to keep the expected power before it joins the others'.
        """
        probability = tf.constant(self.imgfilter_bands, p.dtype) * (self.imgfilter * p)
        gate = _gate(draws, "imgfilter", probability)
        t = tf.where(gate, _exp2(draws["imgfilter"] * self.imgfilter_std), 1)
        gains = tf.where(tf.eye(4, dtype=tf.bool), t[:, :, tf.newaxis], 1)
        power = tf.constant(_BAND_POWER, p.dtype)
        gains *= tf.math.rsqrt(tf.reduce_sum(power * gains**2, axis=-1, keepdims=True))
        return tf.reduce_prod(gains, axis=1)

    def _cutout_mask(self, draws: Draws, p: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
        """Zero in a rectangle about the drawn centre, one elsewhere: [N, H, W, 1]."""
        height, width = size
        gate = _gate(draws, "cutout", self.cutout * p)
        reach = tf.cast(gate, p.dtype)[:, tf.newaxis] * (self.cutout_size / 2)
        center = draws["cutout"]
        x = (tf.range(width, dtype=p.dtype) + 0.5) / width
        y = (tf.range(height, dtype=p.dtype) + 0.5) / height
        keep_x = tf.abs(x - center[:, :1]) >= reach
        keep_y = tf.abs(y - center[:, 1:]) >= reach
        keep = keep_x[:, tf.newaxis, :] | keep_y[:, :, tf.newaxis]
        return tf.cast(keep, p.dtype)[..., tf.newaxis]


def _stream(seeds: tf.Tensor, stream: int) -> list[tf.Tensor]:
    # Normal and uniform draws from one seed would share their bits.
    return tf.unstack(tf.bitwise.bitwise_xor(seeds, tf.constant([0, stream])))


def _split(values: tf.Tensor, fields: Mapping[str, int]) -> Draws:
    columns = tf.split(values, list(fields.values()), axis=1)
    return {
        name: column[:, 0] if count == 1 else column
        for (name, count), column in zip(fields.items(), columns, strict=True)
    }


def _gate(draws: Draws, name: str, probability: tf.Tensor) -> tf.Tensor:
    return draws[name + "_gate"] < probability


def _symmetric(uniform: tf.Tensor) -> tf.Tensor:
    """[0, 1) -> [-1, 1)."""
    return uniform * 2 - 1


def _exp2(x: tf.Tensor) -> tf.Tensor:
    return tf.exp(x * math.log(2))


def _row(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """[N], [N] -> [N, 1, 2]: scales the columns of a matrix."""
    return tf.stack([x, y], axis=-1)[:, tf.newaxis]


def _rotation(theta: tf.Tensor) -> tf.Tensor:
    """[N] radians -> [N, 2, 2]."""
    cos, sin = tf.cos(theta), tf.sin(theta)
    return tf.reshape(tf.stack([cos, -sin, sin, cos], axis=-1), [-1, 2, 2])


def _apply_color(
    images: tf.Tensor, luma: tf.Tensor, offset: tf.Tensor, matrix: tf.Tensor
) -> tf.Tensor:
    num, height, width, channels = images.shape
    colors, alpha = images, None
    if channels in (2, 4):
        colors, alpha = images[..., : channels - 1], images[..., channels - 1 :]
    offset = tf.reshape(offset, [num, 1, 1, 1])
    if channels <= 2:
        colors = colors * tf.reshape(luma, [num, 1, 1, 1]) + offset
    else:
        flat = tf.reshape(colors, [num, height * width, 3])
        flat = tf.matmul(flat, matrix, transpose_b=True)
        colors = tf.reshape(flat, [num, height, width, 3]) + offset
    return colors if alpha is None else tf.concat([colors, alpha], axis=-1)


def _filter_bank() -> np.ndarray:
    """Four band-pass filters that sum to an impulse, an octave each: [4, 43] (appendix B.4)."""
    high = _SYM2 * [1, -1, 1, -1]
    low2 = np.convolve(_SYM2, _SYM2[::-1]) / 2
    high2 = np.convolve(high, high[::-1]) / 2
    bank = np.eye(4, 1)
    for band in range(1, 4):
        stretched = np.zeros([4, 2 * bank.shape[1] - 1])
        stretched[:, ::2] = bank
        bank = np.stack([np.convolve(row, low2) for row in stretched])
        start = (bank.shape[1] - len(high2)) // 2
        bank[band, start : start + len(high2)] += high2
    return bank


FILTER_BANK = _filter_bank()


@functools.cache
def _band_matrices(size: int) -> np.ndarray:
    """The filter bank with reflection at the edges as matrices along an axis: [4, size * size]."""
    taps = FILTER_BANK.shape[1]
    period = max(2 * (size - 1), 1)
    source = (np.arange(size)[:, np.newaxis] + np.arange(taps) - taps // 2) % period
    source = np.minimum(source, period - source)
    matrices = np.zeros([4, size, size])
    for row, column in enumerate(source):
        for tap, pixel in enumerate(column):
            matrices[:, row, pixel] += FILTER_BANK[:, tap]
    return matrices.reshape(4, size * size)


def _apply_filter(images: tf.Tensor, gains: tf.Tensor) -> tf.Tensor:
    num, height, width, _ = images.shape

    def along(size: int) -> tf.Tensor:
        bands = tf.constant(_band_matrices(size), images.dtype)
        return tf.reshape(tf.matmul(gains, bands), [num, size, size])

    return warp.separable(images, along(height), along(width))
