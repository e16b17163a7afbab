"""Which accelerators are in which region."""

from __future__ import annotations

import pytest

from tests.vertex import discovery
from trainer.core.errors import UsageError
from trainer.vertex import regions, targets


def test_regions_are_those_that_the_api_has() -> None:
    known = {endpoint["location"] for endpoint in discovery.document()["endpoints"]}
    assert known >= regions.ALL
    for name in targets.names():
        assert set(regions.of(targets.parse(name))) <= regions.ALL


@pytest.mark.parametrize(
    ("target", "region", "there"),
    [
        ("a100x8", "us-central1", True),
        ("a100x8", "us-west1", False),
        ("a100-80x8", "us-east5", True),
        ("a100-80x8", "us-west4", False),
        ("v5e-8", "us-west4", True),
        ("v5e-8", "europe-west4", False),
        ("v5e-16", "us-east1", True),
        ("l4x1", "us-west1", True),
        ("l4x1", "europe-west1", False),
        ("v3-8", "us-central1", True),
        ("v3-32", "us-central1", False),
        ("v3-32", "europe-west4", True),
        ("v2-8", "asia-east1", True),
        ("v2-32", "asia-east1", False),
        ("h200x8", "us-south1", True),
        ("b200x8", "us-west2", True),
        ("b200x8", "us-west4", False),
        ("rtx6000x2", "asia-south2", True),
        ("cpux1", "africa-south1", True),
        ("t4x1", "us-west2", True),
    ],
)
def test_where_a_target_is(target: str, region: str, there: bool) -> None:
    place = targets.parse(target)
    if there:
        regions.check(place, region)
        return
    with pytest.raises(UsageError) as caught:
        regions.check(place, region)
    assert str(caught.value).startswith(f"--target={target} isn't in --region={region}, it is in ")
    for name in str(caught.value).partition("it is in ")[2].split(", "):
        regions.check(place, name)


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("us-central1-a", "is a zone; give its region, us-central1"),
        ("us-centrall", "did you mean us-central1?"),
        ("mars", "is no region of Vertex AI; give one as us-central1"),
        ("", "is no region of Vertex AI"),
        ("US-CENTRAL1", "is no region of Vertex AI"),
    ],
)
def test_no_region(region: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected.replace("?", r"\?")):
        regions.check(targets.parse("a100x8"), region)
