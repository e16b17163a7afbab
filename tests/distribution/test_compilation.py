"""Compiled programs on disk: found again by the same program on the same machine, and by no other."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from trainer.core import installation
from trainer.core.errors import ConfigError, StorageError
from trainer.distribution import compilation

ROOT = pathlib.Path(__file__).parents[2]

# Compiles a step of a network, prints what it gave, and how many programs it found.
PROGRAM = """
import sys
from trainer.distribution import compilation
compilation.keep(sys.argv[1])
from trainer.distribution import host
host.quieten_tensorflow()
import tensorflow as tf

@tf.function(jit_compile=True, autograph=False)
def step(x, w):
    with tf.GradientTape() as tape:
        tape.watch(w)
        y = tf.reduce_sum(tf.square(tf.nn.conv2d(x, w, 1, "SAME")))
    return y, tape.gradient(y, w)

x = tf.random.stateless_normal([4, 16, 16, 8], [0, 1])
y, grad = step(x, tf.random.stateless_normal([3, 3, 8, int(sys.argv[2])], [0, 2]))
print(repr(float(y)), repr(float(tf.reduce_sum(grad))))
"""


def run(directory: pathlib.Path, channels: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), str(channels)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # TensorFlow takes a kept program for text first, and older ones say that it is none.
    lines = [line for line in done.stderr.splitlines() if "parsing text-format" not in line]
    assert not [line for line in lines if "rror" in line]
    return done.stdout


def programs(directory: pathlib.Path) -> dict[str, int]:
    """The inode of each: writing a program anew makes a new one."""
    return {path.name: path.stat().st_ino for path in directory.glob("*/*.pb")}


def test_the_next_start_compiles_nothing(tmp_path: pathlib.Path) -> None:
    first = run(tmp_path, 8)
    kept = programs(tmp_path)
    assert len(kept) == 1
    assert run(tmp_path, 8) == first
    assert programs(tmp_path) == kept
    # Another network is another program, with the first one still there.
    assert run(tmp_path, 16) != first
    assert programs(tmp_path).items() > kept.items()


@pytest.mark.slow
def test_a_resumed_run_compiles_nothing(tmp_path: pathlib.Path) -> None:
    """Though the first start has drawn its images before it trained, and this one hasn't."""
    settings = [
        "model.channel_max=8",
        "objective.pl_weight=0",
        "objective.r1_gamma=0",
        f"run.compilation_cache={tmp_path}/kept",
    ]
    found = []
    for total_kimg in (0.016, 0.032):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "trainer.task", "--config=configs/smoke.yaml"),
                *(f"--workdir={tmp_path}/run", f"--set=training.total_kimg={total_kimg}"),
                *(f"--set={setting}" for setting in settings),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        found.append(programs(tmp_path / "kept"))
    assert "resuming from" in done.stdout
    assert found[0]
    assert found[1] == found[0]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets is taken back."""
    for name in ("TF_XLA_FLAGS", "XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def folder_of(directory: pathlib.Path) -> str:
    """The folder that XLA is told of."""
    compilation.keep(str(directory))
    flags = os.environ["TF_XLA_FLAGS"].split()
    return flags[-1].removeprefix("--tf_xla_persistent_cache_directory=")


def test_a_folder_for_each_compiler(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", "")
    first = folder_of(tmp_path)
    monkeypatch.setenv("TF_XLA_FLAGS", "")
    assert folder_of(tmp_path) == first
    assert pathlib.Path(first).parent == tmp_path
    assert pathlib.Path(first).stat().st_mode & 0o077 == 0
    found = {first}
    for change in (
        lambda: monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
        lambda: monkeypatch.setattr(installation, "tensorflow_version", lambda: "0.1"),
        lambda: monkeypatch.setattr(compilation, "_processor", lambda: "flags: amx"),
    ):
        change()
        monkeypatch.setenv("TF_XLA_FLAGS", "")
        found.add(folder_of(tmp_path))
    assert len(found) == 4


def test_the_users_own_flags_stay(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_clustering_debug")
    folder_of(tmp_path)
    assert os.environ["TF_XLA_FLAGS"].startswith("--tf_xla_clustering_debug --tf_xla_persistent")


def test_none_is_kept_by_default() -> None:
    before = dict(os.environ)
    compilation.keep("")
    assert dict(os.environ) == before


def test_what_others_may_write_to_is_refused(tmp_path: pathlib.Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    before = os.environ["TF_XLA_FLAGS"]
    with pytest.raises(StorageError, match="others may write to .*shared.*chmod go-w"):
        compilation.keep(str(shared))
    assert os.environ["TF_XLA_FLAGS"] == before


@pytest.mark.parametrize("directory", ["gs://bucket/cache", "memory://cache"])
def test_remote_directories_are_refused(directory: str) -> None:
    with pytest.raises(ConfigError, match="give a local directory"):
        compilation.keep(directory)


def test_a_directory_that_cannot_be_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is mounted read-only: XLA would find out in the first step."""
    before = os.environ["TF_XLA_FLAGS"]
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(StorageError, match="run.compilation_cache = .*can't be written"):
        compilation.keep(str(tmp_path))
    assert os.environ["TF_XLA_FLAGS"] == before


def test_a_directory_that_cannot_be(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="run.compilation_cache"):
        compilation.keep(str(tmp_path / "file" / "cache"))
