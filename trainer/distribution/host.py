"""What the process needs from its host before TensorFlow starts."""

from __future__ import annotations

import os
import platform
import sys

# XLA's CPU runtime asks for its scratch memory anew at each call. By default glibc takes such
# blocks from the kernel and gives them back, so every step would fault in a gigabyte page by page;
# kept, and on huge pages, they make a 3x3 convolution 1.1 to 1.7 times faster.
_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
}


def prepare() -> None:
    """Restarts the program once with the allocator settings above, and quietens TensorFlow's log.

    To be called before TensorFlow is imported; does nothing where glibc is not used, or where the
    user has set one of these variables.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ALLOCATOR):
        return
    os.environ.update(_ALLOCATOR)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
