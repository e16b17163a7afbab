"""Seeds: every random draw of a run is a pure function of (seed, purpose, group index).

A group (`training.group_size` consecutive images) is the atom of randomness. Because its number is
counted from the start of the run, a draw does not depend on which replica, host or accumulation
round it is made for, nor on where a run was interrupted.
"""

from __future__ import annotations

import enum

import numpy as np
import tensorflow as tf


class Purpose(enum.IntEnum):
    """Purposes of random draws. The values are part of a run's identity: never renumber them."""

    LANE_ORDER = 1
    MIRROR = 2
    GMAIN = 3
    GREG = 4
    DMAIN = 5
    AUGMENT_GMAIN = 6
    AUGMENT_DMAIN_FAKE = 7
    AUGMENT_DMAIN_REAL = 8
    AUGMENT_DREG = 9
    PL_NOISE = 10
    INIT = 11
    SNAPSHOT = 12
    LABELS = 13
    DREG = 14
    AUGMENT_GMAIN_REAL = 15
    AUGMENT_DREG_FAKE = 16
    NOISE_GMAIN = 17
    NOISE_DMAIN = 18
    NOISE_DREG = 19
    BETWEEN = 20


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The 64-bit finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_tensor(x: tf.Tensor) -> tf.Tensor:
    """`_mix` on a uint64 tensor; integer products wrap on every platform."""
    shift = tf.bitwise.right_shift
    x = (x ^ shift(x, tf.constant(30, tf.uint64))) * tf.constant(0xBF58476D1CE4E5B9, tf.uint64)
    x = (x ^ shift(x, tf.constant(27, tf.uint64))) * tf.constant(0x94D049BB133111EB, tf.uint64)
    return x ^ shift(x, tf.constant(31, tf.uint64))


_GOLDEN = 0x9E3779B97F4A7C15


def _base(seed: int, purpose: Purpose) -> int:
    return _mix((_mix((seed + _GOLDEN) & _MASK) + int(purpose) * _GOLDEN) & _MASK)


def fold_in(seed: int, purpose: Purpose, *indices: int) -> int:
    """The 64-bit seed of one draw; the host's twin of `fold_in_groups`."""
    value = _base(seed, purpose)
    for index in indices:
        value = _mix((value + (index + 1) * _GOLDEN) & _MASK)
    return value


def generator(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """A NumPy generator for draws made on the host."""
    return np.random.Generator(np.random.Philox(fold_in(seed, purpose, *indices)))


def fold_in_groups(seed: int, purpose: Purpose, group_index: tf.Tensor) -> tf.Tensor:
    """Seeds for `tf.random.stateless_*`, one for each group.

    Args:
      seed: the run's seed.
      purpose: what the draw is for.
      group_index: [groups] int64, numbered from the start of the run.

    Returns:
      [groups, 2] int32.
    """
    index = tf.cast(group_index, tf.uint64) + tf.constant(1, tf.uint64)
    value = _mix_tensor(
        tf.constant(_base(seed, purpose), tf.uint64) + index * tf.constant(_GOLDEN, tf.uint64)
    )
    low = tf.bitcast(
        tf.cast(tf.bitwise.bitwise_and(value, tf.constant(0xFFFFFFFF, tf.uint64)), tf.uint32),
        tf.int32,
    )
    high = tf.bitcast(
        tf.cast(tf.bitwise.right_shift(value, tf.constant(32, tf.uint64)), tf.uint32), tf.int32
    )
    return tf.stack([low, high], axis=-1)
