"""Records, manifest and the tf.data pipeline.

Only `pipeline`, `shards` and `speed` need TensorFlow; what the converter's worker processes import does not.
"""

from __future__ import annotations

import os


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
