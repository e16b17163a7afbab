"""Comparison of configs: which differences make another run.

A resumed run may change what says where and how it is computed, stored and shown, and leaves its
numbers alone up to float rounding; `diff` and `fingerprint` pass over these keys. All others define
the result.

    run.*, but for seed and precision           where and how a step is executed
    data.path                                   the data set's own fingerprint identifies it
    data.max_bad_records, data.stall_timeout    when to give up; what is shown in a damaged record's
                                                place depends on the data set alone
    training.rounds                             splits a step, does not change it
    training.total_kimg                         no schedule depends on the end
    checkpoint.*, telemetry.*                   what is written, and when
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from trainer.config.loading import to_dict
from trainer.config.schema import Config

_FREE_SECTIONS = frozenset({"checkpoint", "telemetry"})
_FREE_KEYS = frozenset(
    {
        "run.deterministic",
        "run.strategy",
        "run.tpu",
        "run.cpu_replicas",
        "run.jit",
        "run.steps_per_loop",
        "run.compilation_cache",
        "run.join_timeout",
        "run.worker_timeout",
        "run.max_hours",
        "run.grace_time",
        "run.collectives",
        "run.bytes_per_pack",
        "run.collective_timeout",
        "data.path",
        "data.max_bad_records",
        "data.stall_timeout",
        "training.rounds",
        "training.total_kimg",
    }
)


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of 'section.key'."""
    return key.partition(".")[0] in _FREE_SECTIONS or key in _FREE_KEYS


def _defining(config: Config) -> dict[str, Any]:
    """The values that define the numbers of a run."""
    return {
        f"{section}.{name}": value
        for section, keys in to_dict(config).items()
        for name, value in keys.items()
        if not may_change(f"{section}.{name}")
    }


def fingerprint(config: Config) -> str:
    """16 hex digits that are equal exactly for configs whose runs give the same numbers.

    Take it of a resolved config: 'auto' and what it stands for differ.
    """
    text = json.dumps(_defining(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each key that differs and changes the result of a run.

    Keys that networks of one family alone have are not compared with anything.
    """
    after = _defining(new)
    return [
        (key, value, after[key])
        for key, value in _defining(old).items()
        if key in after and value != after[key]
    ]
