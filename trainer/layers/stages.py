"""Layers on feature maps that lie as their backend likes them.

A stage is the part of a network at one resolution, with the convolution that leads to it or from it.
On a TPU its maps may be in space-to-depth blocks, and in tiles with a halo (`layers.packing` says what
and why); on other backends they are plain [N, H, W, C]. A network enters a stage, applies layers to
maps, leaves it, and knows nothing of that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import tensorflow as tf

from trainer.layers import ops, packing
from trainer.layers.ops import Backend


@dataclass(frozen=True)
class Maps:
    """Feature maps.

    Attributes:
      tensor: [N, H, W, C], or what a backend makes of it.
      block: pixels along each side of a space-to-depth block, 1 if there are none.
      tiles: into how many each image is cut.
      halo: rows of blocks that a tile has of its neighbours, on either side.
      reach: rows of pixels at a tile's edges that convolutions have made wrong, for want of the rows
        beyond: no more than the halo's, or an upper bound of them.
    """

    tensor: tf.Tensor
    block: int = 1
    tiles: int = 1
    halo: int = 0
    reach: int = 0

    def __add__(self, other: Maps) -> Maps:
        """The sum of maps of one layout."""
        layout, others = (self.block, self.tiles, self.halo), (other.block, other.tiles, other.halo)
        assert layout == others, f"maps that lie otherwise: {layout}, {others}"
        total = self._with(self.tensor + other.tensor)
        return dataclasses.replace(total, reach=max(self.reach, other.reach))

    def cast(self, dtype: tf.DType) -> Maps:
        """The same maps in another number format."""
        return self._with(tf.cast(self.tensor, dtype))

    def plain(self) -> tf.Tensor:
        """[N, H, W, C]."""
        return packing.unpack(packing.concatenate(self.tensor, self.tiles, self.halo), self.block)

    def _with(self, tensor: tf.Tensor) -> Maps:
        return dataclasses.replace(self, tensor=tensor)


@dataclass(frozen=True)
class Stage:
    """The layers of one resolution, and how their maps lie.

    Attributes:
      height, width: of the finer maps: those of the stage's resolution.
      block: pixels along each side of their space-to-depth blocks, 1 if they have none.
      backend: what computes the layers.
    """

    height: int
    width: int
    block: int
    backend: Backend

    @classmethod
    def of(cls, height: int, width: int, channels: int, backend: Backend) -> Stage:
        """The stage whose finer maps are [N, height, width, channels]."""
        block = packing.block_size(height, width, channels) if backend is Backend.TPU else 1
        return cls(height, width, block, backend)

    def _coarse_block(self) -> int:
        return max(self.block // 2, 1)

    def _coarse_rows(self) -> int:
        """Rows of blocks in the coarser maps."""
        return self.height // 2 // self._coarse_block()

    def _halo(self, block: int, height: int) -> int:
        """Rows of blocks in the halo of maps of this height: twice as many of maps twice as fine."""
        return packing.TILE_HALO * (height // block) // self._coarse_rows()

    def enter(self, x: Maps | tf.Tensor) -> Maps:
        """Maps as the layers of the stage take them: of its resolution, or of half of it."""
        x = x if isinstance(x, Maps) else Maps(x)
        fine = x.tensor.shape[2] * x.block == self.width
        block = self.block if fine else self._coarse_block()
        tensor = packing.repack(x.tensor, x.block, block)
        on_tpu = self.backend is Backend.TPU
        tiles = packing.num_tiles(tensor.shape[0], self._coarse_rows()) if on_tpu else 1
        halo = self._halo(block, self.height if fine else self.height // 2)
        return Maps(packing.cut(tensor, tiles, halo), block, tiles, halo)

    def leave(self, x: Maps) -> Maps:
        """Maps without tiles.

        Raises:
          ValueError: more layers were applied than the tiles' halo has rows for.
        """
        if x.tiles > 1 and x.reach > x.halo * x.block:
            raise ValueError(
                f"a stage's convolutions reach {x.reach} rows beyond a tile, whose halo has "
                f"{x.halo * x.block}: leave and enter the stage between them, or raise TILE_HALO"
            )
        return Maps(packing.concatenate(x.tensor, x.tiles, x.halo), x.block)

    def conv(self, x: Maps, weight: tf.Tensor, *, up: int = 1, down: int = 1) -> Maps:
        """`ops.conv2d_resample`, of maps."""
        result = self._resampled(x, weight.shape[0], up, down)
        blocks = x.block, result.block
        y = ops.conv2d_resample(
            x.tensor, weight, up=up, down=down, backend=self.backend, blocks=blocks
        )
        return dataclasses.replace(result, tensor=y)

    def modulated_conv(
        self,
        x: Maps,
        weight: tf.Tensor,
        styles: tf.Tensor,
        noise: tf.Tensor | None = None,
        *,
        strength: tf.Tensor | None = None,
        up: int = 1,
        demodulate: bool = True,
    ) -> Maps:
        """`ops.modulated_conv2d`, of maps.

        Args:
          x: the maps.
          weight: [k, k, in, out], float32.
          styles: [N, in], float32.
          noise: [H, W] or [N, H, W], added to the result at `strength`, or None.
          strength: [] of the noise.
          up: 1 or 2.
          demodulate: whether each output channel is scaled to unit expected variance.
        """
        result = self._resampled(x, weight.shape[0], up, 1)
        if noise is not None:
            noise = self._noise(noise, strength, weight.shape[3], result)
        y = ops.modulated_conv2d(
            x.tensor,
            weight,
            styles if x.tiles == 1 else tf.tile(styles, [x.tiles, 1]),
            noise,
            up=up,
            demodulate=demodulate,
            backend=self.backend,
            blocks=(x.block, result.block),
        )
        return dataclasses.replace(result, tensor=y)

    def bias_act(
        self,
        x: Maps,
        bias: tf.Tensor | None,
        activation: str = "linear",
        *,
        gain: float | None = None,
        clamp: float | None = None,
    ) -> Maps:
        """`ops.bias_act`, of maps."""
        y = ops.bias_act(
            x.tensor,
            bias,
            activation,
            gain=gain,
            clamp=clamp,
            backend=self.backend,
            block=x.block,
        )
        return dataclasses.replace(x, tensor=y)

    def _resampled(self, x: Maps, kernel: int, up: int, down: int) -> Maps:
        """The layout of a convolution's result."""
        if up == down:
            return dataclasses.replace(x, reach=x.reach + kernel // 2)
        block = self.block if up == 2 else self._coarse_block()
        halo = self._halo(block, self.height if up == 2 else self.height // 2)
        # The filter of a resampling has four taps on the finer maps, two of them on one side.
        reach = up * x.reach + kernel // 2 + 2
        return dataclasses.replace(x, block=block, halo=halo, reach=-(-reach // down))

    def _noise(
        self, noise: tf.Tensor, strength: tf.Tensor | None, channels: int, like: Maps
    ) -> tf.Tensor:
        """Noise as the maps lie to which it is added."""
        if like.tiles > 1:
            noise = noise if noise.shape.rank == 3 else noise[tf.newaxis]
            pieces = packing.cut(noise, like.tiles, like.halo * like.block)
            # One noise for all images is repeated tile by tile.
            images = like.tensor.shape[0] // like.tiles
            noise = tf.repeat(pieces, images * like.tiles // pieces.shape[0], axis=0)
        noise = noise[..., tf.newaxis]
        noise = noise if noise.shape.rank == 4 else noise[tf.newaxis]
        assert strength is not None
        return packing.pack_noise(noise, strength, channels, like.block, like.tensor.dtype)
