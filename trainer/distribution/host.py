"""Settings of the host that must be made before TensorFlow starts."""

from __future__ import annotations

import glob
import os
import platform
import sys

from trainer.core import installation, output, tensorflow_log

# XLA's CPU runtime asks for its scratch memory anew at each call. By default glibc takes such
# blocks from the kernel and gives them back, so every step would fault in a gigabyte page by page;
# kept, and on huge pages, they make a 3x3 convolution 1.1 to 1.7 times faster.
_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
}

# XLA's newer emitters compile each loop as a module of its own, in 430 MB more for a phase at 64x64
# than the older ones, and their loops are no faster. XLA aborts on a flag it doesn't know, so the
# flag is set only for the versions that were seen to take it.
_OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
_OLDER_EMITTERS_FOR = ("2.21.",)

# TensorFlow's gs:// file system. The records are read in blocks of a megabyte, wherever they lie:
# without its cache it would fetch 64 MB for each, and without a limit wait an hour for an answer.
_CLOUD_STORAGE = {
    "GCS_READ_CACHE_BLOCK_SIZE_MB": "1",
    "GCS_READ_CACHE_MAX_SIZE_MB": "64",
    "GCS_STAT_CACHE_MAX_AGE": "300",
    "GCS_METADATA_REQUEST_TIMEOUT_SECS": "60",
    "GCS_READ_REQUEST_TIMEOUT_SECS": "60",
    "GCS_WRITE_REQUEST_TIMEOUT_SECS": "600",
    # Google's client would ask for what kind of bucket it is, for traces that nobody collects.
    "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true",
}


def prepare() -> None:
    """Restarts the program once with the allocator settings above.

    Also calls `quieten_tensorflow`, `tune_cloud_storage` and `choose_emitters`, and opens the
    standard descriptors that are closed. Keras, which TensorFlow imports, is kept from reading and
    writing settings in the home directory: nothing here uses them, and for a user without one they
    would be in a directory named `~`. To be called before TensorFlow is imported. Doesn't restart
    where glibc is not used, or where the user has set one of these variables.
    """
    output.reopen_closed()
    quieten_tensorflow()
    os.environ.setdefault("KERAS_HOME", os.devnull)
    tune_cloud_storage()
    choose_emitters()
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ALLOCATOR):
        return
    os.environ.update(_ALLOCATOR)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def quieten_tensorflow() -> None:
    """Lets TensorFlow log errors alone, unless the user chose; before TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tensorflow_log.hide_start_up()


def tune_cloud_storage() -> None:
    """Sets how gs:// is read and written, as far as the user has not; before TensorFlow loads."""
    for name, value in _CLOUD_STORAGE.items():
        os.environ.setdefault(name, value)


def choose_emitters() -> None:
    """Sets how XLA compiles for the CPU, unless the user has; before TensorFlow is imported."""
    flags = os.environ.get("XLA_FLAGS", "")
    name = _OLDER_EMITTERS.partition("=")[0]
    version = installation.tensorflow_version()
    if version.startswith(_OLDER_EMITTERS_FOR) and name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_OLDER_EMITTERS}".strip()


# libtpu looks for TPUs, for the metadata server of a TPU VM and for other users of the same TPU
# when it is loaded. As a mere compiler it is to do none of this, nor is JAX to start on it.
_TPU_COMPILER = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # the topology asked for decides
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def prepare_tpu_compiler() -> None:
    """Lets libtpu serve as a compiler on a machine without a TPU; to be called before JAX loads."""
    for name, value in _TPU_COMPILER.items():
        os.environ.setdefault(name, value)


# By these TensorFlow finds the plugin that drives a TPU.
_TPU_PLUGIN = ("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "NEXT_PLUGGABLE_DEVICE_USE_C_API")


def has_accelerator() -> bool:
    """Whether this machine seems to have a GPU or a TPU; a look that needs no TensorFlow."""
    gpus = any(glob.glob(f"/dev/{name}") for name in ("nvidia[0-9]*", "dxg"))  # dxg: under Windows
    tpu = os.path.exists("/dev/accel0") or {"TPU_NAME", "TPU_WORKER_ID"} & set(os.environ)
    return gpus or bool(tpu)


def without_accelerators() -> dict[str, str]:
    """The environment of a process that must not touch the GPUs or the TPU that this one has."""
    kept = {name: value for name, value in os.environ.items() if name not in _TPU_PLUGIN}
    return kept | {"CUDA_VISIBLE_DEVICES": "-1"}
