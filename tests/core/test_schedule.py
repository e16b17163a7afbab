"""Numbers that follow a schedule: what they are, and what is none."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core import schedule
from trainer.core.schedule import Schedule

ENDS = st.floats(-1e6, 1e6)


@given(ENDS, ENDS, st.floats(1e-3, 1e6), st.sampled_from(schedule.SHAPES))
def test_it_goes_from_one_end_to_the_other_and_stays(
    start: float, end: float, kimg: float, shape: Any
) -> None:
    found = Schedule(shape, start, end, kimg)
    wide = abs(start) + abs(end)
    assert found.at(0) == pytest.approx(start, abs=1e-9 * wide)
    assert found.at(kimg / 2) == pytest.approx((start + end) / 2, abs=1e-9 * wide + 1e-12)
    for later in (kimg, 2 * kimg):
        assert found.at(later) == pytest.approx(end, abs=1e-9 * wide)
    assert schedule.from_document(schedule.to_document(found)) == found


def test_its_way_is_the_published_one() -> None:
    """v0 + (1 - (1 + cos(pi t / T)) / 2) (v1 - v0), as in R3GAN's code."""
    found = Schedule("cosine", 2e-4, 5e-5, 20_000)
    for kimg in (0, 1, 1234.5, 19_999):
        way = 1 - (1 + math.cos(math.pi * kimg / 20_000)) / 2
        assert found.at(kimg) == pytest.approx(2e-4 + way * (5e-5 - 2e-4), rel=1e-12)
    assert Schedule("linear", 1, 3, 10).at(2.5) == 1.5


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"cosine": [1, 2]},
        {"kimg": 3},
        {"cosine": [1], "kimg": 3},
        {"cosine": [1, 2, 3], "kimg": 3},
        {"cosine": 1, "kimg": 3},
        {"cosine": [1, 2], "kimg": 0},
        {"cosine": [1, 2], "kimg": True},
        {"cosine": [1, "a"], "kimg": 3},
        {"cosine": [1, math.nan], "kimg": 3},
        {"cosine": [1, 10**400], "kimg": 3},
        {"cosine": [1, 2], "linear": [1, 2], "kimg": 3},
        {"cosine": [1, 2], "kimg": 3, "steps": 1},
        {"sine": [1, 2], "kimg": 3},
    ],
)
def test_what_is_none(document: Any) -> None:
    assert schedule.from_document(document) is None
