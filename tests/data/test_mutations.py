"""Damaged images end in one of two ways: refused by name, or with an independent decoder's pixels.

The pixels are those that the training's reader makes of the record that would be written. JPEG and
WebP are lossy, but every decoder here does the same arithmetic: no pixel may differ at all.
"""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest
import tensorflow as tf

from tests.data import independent
from tests.data.mutations import FORMATS, Mutations
from trainer.core.errors import DataError
from trainer.data import decoding, images, shards

SAMPLE = 120
ALL = 10_000


def outcome(data: bytes) -> str:
    """'refused', 'kept' or 're-encoded'; AssertionError where the record is wrong."""
    try:
        size = decoding.decode(data).image.size
        result = images.encode(data, images.ImageOptions((size[1], size[0])))
    except DataError as error:
        assert 5 < len(str(error)) < 300 and str(error).isprintable(), str(error)
        return "refused"
    got = shards.decode(tf.constant(result.data)).numpy()
    assert got.shape == (result.height, result.width, result.channels)
    expected = independent.pixels(data)
    assert got.shape == expected.shape
    difference = np.abs(got.astype(int) - expected).max()
    assert difference == 0, f"{result.format} differs by {difference}"
    return "kept" if result.kept else "re-encoded"


def tally(indices: range) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """How often each format ended in which way, and what is wrong."""
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in FORMATS}
    mutations, wrong = Mutations(), []
    for index in indices:
        image_format, what, data = mutations.make(index)
        start = time.monotonic()
        try:
            way = outcome(data)
        except Exception as error:
            way = "wrong"
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        counts[image_format][way] += 1
        counts[image_format]["longest ms"] = max(
            counts[image_format]["longest ms"], round(1000 * (time.monotonic() - start))
        )
    return counts, wrong


def test_damaged_images_are_refused_or_right():
    counts, wrong = tally(range(SAMPLE))
    assert not wrong, "\n".join(wrong)
    assert all(each["refused"] and each["kept"] + each["re-encoded"] for each in counts.values())


@pytest.mark.proof
def test_ten_thousand_damaged_images_are_refused_or_right():
    counts, wrong = tally(range(ALL))
    for name, each in counts.items():
        print(name, dict(sorted(each.items())))
    assert not wrong, "\n".join(wrong[:20])
    assert sum(each["refused"] for each in counts.values()) < ALL * 0.9
