"""What all tests share: a quiet, repeatable TensorFlow with four CPUs, and repeatable examples."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from tests.gcs.fixture import gcs, gcs_emulators  # noqa: F401
from trainer.distribution import host

# Before any test module imports TensorFlow. Parity is a matter of float32 on the CPU: a GPU that
# happens to be there must not take part.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
host.tune_cloud_storage()  # these two as the commands do
host.choose_emitters()

# A shell starts what is to run in the background with ctrl-C switched off, and the processes that
# tests start and stop would inherit that.
for number, handler in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

VIRTUAL_CPUS = 4

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A command that ends within a test ignores what would end it twice; processes that later tests
    start would begin with that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests go first: one that came last would leave the other processors idle for minutes."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Splits the CPU for the tests of several replicas; TensorFlow allows it only at first."""
    if "tensorflow" not in sys.modules or session.config.option.collectonly:
        return
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration() for _ in range(VIRTUAL_CPUS)]
    tf.config.set_logical_device_configuration(cpu, parts)


@pytest.fixture(autouse=True)
def _no_traces_of_libtpu() -> Iterator[None]:
    """The TPU compiler says in the environment that this is a TPU VM, past `os.environ`: a process
    that a later test starts would look for its TPU."""
    yield
    if "TPU_WORKER_ID" not in os.environ:
        os.unsetenv("TPU_WORKER_ID")
