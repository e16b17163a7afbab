"""Seeds: the host and the graph agree, nothing collides."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core import seeds
from trainer.core.seeds import Purpose

INT64 = st.integers(0, 2**63 - 1)
PURPOSES = st.sampled_from(list(Purpose))
# What run 0 draws for its first group, and a lane's order in an epoch.
FOLDED = (833576254290507114, 12399375237624194214)


def joined(pairs: tf.Tensor) -> np.ndarray:
    """[groups, 2] int32, low half first, as uint64."""
    halves = np.asarray(pairs).view(np.uint32).astype(np.uint64)
    return halves[:, 0] | halves[:, 1] << np.uint64(32)


@settings(max_examples=50)
@given(seed=st.integers(-(2**63), 2**63 - 1), purpose=PURPOSES, groups=st.lists(INT64, min_size=1))
def test_host_and_graph_agree(seed: int, purpose: Purpose, groups: list[int]) -> None:
    pairs = seeds.fold_in_groups(seed, purpose, tf.constant(groups, tf.int64))
    assert pairs.dtype == tf.int32
    assert pairs.shape == [len(groups), 2]
    assert joined(pairs).tolist() == [seeds.fold_in(seed, purpose, group) for group in groups]


def test_compiled_seeds_are_the_same() -> None:
    groups = tf.constant([0, 1, 2**31, 2**40 + 5, 2**63 - 1], tf.int64)
    compiled = tf.function(
        lambda index: seeds.fold_in_groups(7, Purpose.GMAIN, index), jit_compile=True
    )
    np.testing.assert_array_equal(compiled(groups), seeds.fold_in_groups(7, Purpose.GMAIN, groups))


def test_nothing_collides() -> None:
    groups = tf.range(10_000, dtype=tf.int64)
    found = [
        joined(seeds.fold_in_groups(seed, purpose, groups))
        for seed in (0, 1)
        for purpose in Purpose
    ]
    assert len(np.unique(np.concatenate(found))) == 2 * len(Purpose) * 10_000


def test_bits_are_even() -> None:
    """Neighbouring groups differ in about half of their bits, and no bit is stuck."""
    values = joined(seeds.fold_in_groups(0, Purpose.DMAIN, tf.range(4096, dtype=tf.int64)))
    bits = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1)
    assert np.all(np.abs(bits.mean(0) - 0.5) < 0.05)
    assert abs(np.mean(bits[1:] != bits[:-1]) - 0.5) < 0.01


def test_numbers_of_a_run_never_change() -> None:
    """A resumed run must draw what it would have drawn: these are part of its identity."""
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "LANE_ORDER": 1,
        "MIRROR": 2,
        "GMAIN": 3,
        "GREG": 4,
        "DMAIN": 5,
        "AUGMENT_GMAIN": 6,
        "AUGMENT_DMAIN_FAKE": 7,
        "AUGMENT_DMAIN_REAL": 8,
        "AUGMENT_DREG": 9,
        "PL_NOISE": 10,
        "INIT": 11,
        "SNAPSHOT": 12,
        "LABELS": 13,
        "DREG": 14,
        "AUGMENT_GMAIN_REAL": 15,
        "AUGMENT_DREG_FAKE": 16,
        "NOISE_GMAIN": 17,
        "NOISE_DMAIN": 18,
        "NOISE_DREG": 19,
        "BETWEEN": 20,
    }
    assert seeds.fold_in(0, Purpose.GMAIN, 0) == FOLDED[0]
    assert seeds.fold_in(2024, Purpose.LANE_ORDER, 3, 5) == FOLDED[1]


@given(seed=st.integers(0, 2**32), purpose=PURPOSES, first=INT64, second=INT64)
def test_order_and_number_of_indices_matter(
    seed: int, purpose: Purpose, first: int, second: int
) -> None:
    both = seeds.fold_in(seed, purpose, first, second)
    assert 0 <= both < 2**64
    assert both != seeds.fold_in(seed, purpose, first)
    if first != second:
        assert both != seeds.fold_in(seed, purpose, second, first)


def test_host_generators_repeat() -> None:
    draws = [
        seeds.generator(seed, Purpose.MIRROR, index).integers(0, 2**60)
        for seed, index in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
