"""Generated weights of the Inception network, made once for all tests."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from trainer.metrics import inception


def generated(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter as the golden's weights were made: drawn with a seed from its name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("conv.weight"):
        values = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    elif name == "fc.weight":
        values = rng.standard_normal(shape) / math.sqrt(shape[1])
    elif name.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("bn.weight"):
        values = 1 + 0.1 * rng.standard_normal(shape)
    else:
        values = 0.1 * rng.standard_normal(shape)
    return values.astype(np.float32)


@pytest.fixture(scope="session")
def params() -> inception.Params:
    """All parameters by name; tests that change one copy the dictionary first."""
    return {name: generated(name, shape) for name, shape in inception.SHAPES.items()}
