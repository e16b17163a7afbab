"""Memory of this process, on the host and on its GPUs."""

from __future__ import annotations

import resource
import sys

import psutil
import tensorflow as tf

_GIB = float(2**30)


def host_memory_gb() -> float:
    """Resident memory now, in GiB."""
    return psutil.Process().memory_info().rss / _GIB


def peak_host_memory_gb() -> float:
    """The largest resident memory so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def peak_gpu_memory_gb() -> float | None:
    """The largest memory in use on any GPU since the last call, in GiB; None without a GPU.

    Per call, hence per tick, as NVIDIA's `Resources/peak_gpu_mem_gb`.
    """
    peaks = []
    for device in tf.config.list_logical_devices("GPU"):
        name = ":".join(device.name.split(":")[-2:])  # GPU:0
        try:
            peaks.append(tf.config.experimental.get_memory_info(name)["peak"] / _GIB)
            tf.config.experimental.reset_memory_stats(name)
        except ValueError:  # this allocator keeps no statistics
            continue
    return max(peaks, default=None)
