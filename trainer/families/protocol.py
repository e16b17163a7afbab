"""The interface of a family to the rest of the package, without TensorFlow.

A family is a folder with `keys.py`, whose `Keys` is the `model:` section of its configs, and
`networks.py` with the tensor code (`families.network`). What can be counted is counted by the keys
alone, so that a command that only plans a run needs no TensorFlow.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from trainer.core.sections import Section


@dataclass(frozen=True)
class DataShape:
    """The facts of a data set that networks need.

    Attributes:
      resolution: (height, width).
      channels: 1 to 4.
      label_counts: images of each class; empty for unconditional training.
    """

    resolution: tuple[int, int]
    channels: int
    label_counts: tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """One parameter: its shape in our layout and how it starts.

    Attributes:
      shape: [kh, kw, in, out], [in, out], [C], [H, W, C] (`const`), [H, W] (`noise_const`) or [].
      init: standard deviation of a normal start if `random`, else the constant it starts from.
      random: whether it starts from normal noise.
      trainable: whether the optimizer changes it; NVIDIA's buffers aren't.
      grid: for a layer that flattens feature maps, the (H, W, C) it flattens.
      pixels: for a convolution, the places of an image at which it multiplies its kernel.
    """

    shape: tuple[int, ...]
    init: float
    random: bool
    trainable: bool = True
    grid: tuple[int, int, int] | None = None
    pixels: int = 0


class Table(dict[str, Spec]):
    """The parameters of a network by name, in the order of creation."""

    def dense(
        self, name: str, inputs: int, outputs: int, *, bias: float = 0.0, lr_multiplier: float = 1.0
    ) -> None:
        """Adds a fully connected layer with equalised learning rate."""
        self[f"{name}.weight"] = Spec((inputs, outputs), 1 / lr_multiplier, True)
        self[f"{name}.bias"] = Spec((outputs,), bias, False)

    def conv(
        self, name: str, inputs: int, outputs: int, kernel: int, pixels: int, *, bias: bool = True
    ) -> None:
        """Adds a convolution with equalised learning rate."""
        shape = kernel, kernel, inputs, outputs
        self[f"{name}.weight"] = Spec(shape, 1.0, True, pixels=pixels)
        if bias:
            self[f"{name}.bias"] = Spec((outputs,), 0.0, False)

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        return sum(math.prod(spec.shape) for spec in self.values() if spec.trainable)

    @property
    def flop(self) -> int:
        """Multiplications and additions of all convolutions in a forward pass of one image."""
        return sum(2 * math.prod(spec.shape) * spec.pixels for spec in self.values())


@dataclass(frozen=True)
class Tables:
    """The two networks for one data set.

    Attributes:
      generator, discriminator: their parameters.
      feature_values: values in the discriminator's feature maps of one image.
    """

    generator: Table
    discriminator: Table
    feature_values: int


_KeysT = TypeVar("_KeysT", bound="Keys")


@dataclasses.dataclass(frozen=True)
class Keys(Section):
    """The `model:` section of a config; each family has its own keys besides.

    Attributes:
      STYLES: whether the generator is a `network.StyleGenerator`.
      SMALLEST_GROUP: images that a group must have: 16 for networks with batch normalisation, whose
        statistics are those of a group.
      family: which pair of networks.
    """

    NAME: ClassVar[str] = "model"
    STYLES: ClassVar[bool] = False
    SMALLEST_GROUP: ClassVar[int] = 1

    family: str

    @classmethod
    def nearest_resolutions(cls, height: int, width: int) -> list[tuple[int, int]]:
        """The closest (height, width) that the networks can make; the size itself if they can."""
        raise _abstract(cls)

    def resolved(self: _KeysT, resolution: tuple[int, int]) -> _KeysT:
        """The keys with every 'auto' replaced by the family's rule for a data set.

        Args:
          resolution: (height, width).

        Raises:
          ConfigError: the networks cannot make this resolution; names the nearest ones.
        """
        raise _abstract(type(self))

    def auto_values(
        self, resolution: tuple[int, int], batch_size: int | None
    ) -> dict[str, dict[str, Any]]:
        """Values of the keys that may be 'auto', by section, for a batch size if one is given.

        Those of `training` and `objective`; `resolved` sees to those of `model`.
        """
        raise _abstract(type(self))

    def tables(self, data: DataShape) -> Tables:
        """The parameters of resolved keys, and what they cost."""
        raise _abstract(type(self))


def _abstract(cls: type) -> TypeError:
    return TypeError(f"{cls.__module__}.{cls.__name__} lacks what families.protocol.Keys asks for")
