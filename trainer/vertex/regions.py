"""Regions of Vertex AI, and the accelerators that training jobs find in each.

From the page "Locations", section "Using accelerators", in November 2026. What is there for serving
only is left out.
"""

from __future__ import annotations

import difflib
import re

from trainer.core.errors import UsageError
from trainer.vertex.targets import Target

_NAMES = (
    "africa-south1 asia-east1 asia-east2 asia-northeast1 asia-northeast2 asia-northeast3 asia-south1 "
    "asia-south2 asia-southeast1 asia-southeast2 australia-southeast1 australia-southeast2 "
    "europe-central2 europe-north1 europe-southwest1 europe-west1 europe-west12 europe-west2 "
    "europe-west3 europe-west4 europe-west6 europe-west8 europe-west9 me-central1 me-central2 "
    "me-west1 northamerica-northeast1 northamerica-northeast2 southamerica-east1 southamerica-west1 "
    "us-central1 us-east1 us-east4 us-east5 us-south1 us-west1 us-west2 us-west3 us-west4"
)
ALL = frozenset(_NAMES.split())

# By the kind of a target; those that aren't here are in most regions, and Vertex AI says where not.
_BY_KIND = {
    kind: tuple(names.split())
    for kind, names in {
        "a100": "us-central1 us-east1 us-west3 us-west4 europe-west4 me-west1 asia-northeast3 "
        "asia-southeast1",
        "a100-80": "us-central1 us-east4 us-east5 europe-west4 asia-southeast1",
        "h100": "us-central1 us-east4 us-east5 us-west1 us-west4 northamerica-northeast2 "
        "europe-west1 europe-west2 europe-west3 europe-west4 asia-northeast1 asia-northeast3 "
        "asia-south1 asia-southeast1",
        "h200": "us-central1 us-east4 us-east5 us-south1 us-west1 europe-west1 europe-west4 "
        "asia-south1 asia-south2",
        "b200": "us-central1 us-east1 us-east4 us-south1 us-west2 us-west3 europe-west4 "
        "asia-northeast1 asia-southeast1",
        "rtx6000": "us-central1 us-east1 us-east4 europe-west4 asia-south2 asia-southeast1",
        "l4": "us-central1 us-east1 us-east4 us-west1 northamerica-northeast2 europe-west2 "
        "europe-west4 me-central2 asia-northeast3 asia-south1 asia-southeast1",
        "v100": "us-central1 us-east1 us-west1 europe-west4 asia-east1",
        "v2": "us-central1 europe-west4 asia-east1",
        "v2 pod": "us-central1 europe-west4",
        "v3": "us-central1 europe-west4",
        "v3 pod": "europe-west4",
        "v5e": "us-central1 us-east1 us-west1 us-west4",
    }.items()
}
# The page names H100s without a word about the machines with A3 Mega's network.
_BY_KIND["h100-mega"] = _BY_KIND["h100"]


def of(target: Target) -> tuple[str, ...]:
    """The regions that have a target, the most usual ones first; all if there is no list of them."""
    pod = f"{target.kind} pod"
    kind = pod if target.is_pod and pod in _BY_KIND else target.kind
    return _BY_KIND.get(kind) or tuple(sorted(ALL))


def check(target: Target, region: str) -> None:
    """Finds out that a target isn't in a region.

    Raises:
      UsageError: it isn't, or there is no such region; names the regions that have it.
    """
    if re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", region):
        raise UsageError(f"--region={region} is a zone; give its region, {region[:-2]}")
    if region not in ALL:
        close = difflib.get_close_matches(region, ALL, n=1)
        hint = f"did you mean {close[0]}?" if close else "give one as us-central1"
        raise UsageError(f"--region={region} is no region of Vertex AI; {hint}")
    if region not in of(target):
        raise UsageError(
            f"--target={target.name} isn't in --region={region}, it is in {', '.join(of(target))}"
        )
