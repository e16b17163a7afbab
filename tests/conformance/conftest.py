"""The data set and the eager steps of the tests of training."""

from tests.training.conftest import eagerly, squares

__all__ = ["eagerly", "squares"]
