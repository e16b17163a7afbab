"""The restart with another allocator: once, and with the same command."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from trainer.core import installation
from trainer.distribution import host

ROOT = pathlib.Path(__file__).parents[2]
EMITTERS = "--xla_cpu_use_fusion_emitters"
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")

PROGRAM = """
import json, os, sys
print("started", flush=True)
from trainer.distribution import host
host.prepare()
print(json.dumps({"argv": sys.argv, "flags": sys.flags.optimize, "environ": dict(os.environ)}))
"""

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)


def run(*command: str, **environ: str) -> tuple[int, dict]:
    """How often the program started, and what it saw at last."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines.count("started"), json.loads(lines[-1])


@glibc
def test_a_script_restarts_once_with_its_arguments(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    arguments = ["--set", "a.b=c d", "", "--", "*"]
    starts, seen = run("-O", str(script), *arguments)
    assert starts == 2
    assert seen["argv"] == [str(script), *arguments]
    assert seen["flags"] == 1  # the interpreter's own options too
    assert set(SETTINGS) <= set(seen["environ"])
    assert seen["environ"]["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert seen["environ"]["KERAS_HOME"] == os.devnull


def test_closed_descriptors_are_taken_before_anything_is_opened(tmp_path: pathlib.Path) -> None:
    script, found = tmp_path / "program.py", tmp_path / "found"
    script.write_text(
        "import os, sys\n"
        "from trainer.distribution import host\n"
        "host.prepare()\n"
        "opened = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "os.write(opened, str(opened).encode())\n"
    )
    command = [sys.executable, str(script), str(found)]
    shell = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    done = subprocess.run(shell, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0
    assert int(found.read_text()) > 2


@glibc
def test_a_module_restarts_as_a_module(tmp_path: pathlib.Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    starts, seen = run("-m", "program", "--x=1", PYTHONPATH=path)
    assert starts == 2
    assert seen["argv"] == [str(tmp_path / "program.py"), "--x=1"]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(tmp_path: pathlib.Path, name: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    value = "glibc.malloc.check=0" if name == "GLIBC_TUNABLES" else "65536"
    starts, seen = run(str(script), TF_CPP_MIN_LOG_LEVEL="0", **{name: value})
    assert starts == 1
    assert seen["environ"][name] == value
    assert not (set(SETTINGS) - {name}) & set(seen["environ"])
    assert seen["environ"]["TF_CPP_MIN_LOG_LEVEL"] == "0"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", f"{EMITTERS}=false"),
        ("--xla_dump_to=x", f"--xla_dump_to=x {EMITTERS}=false"),
        (f"{EMITTERS}=true", f"{EMITTERS}=true"),
    ],
)
def test_the_emitters_are_chosen_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, given: str, wanted: str
) -> None:
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(installation, "tensorflow_version", lambda: "2.21.3")
    host.choose_emitters()
    assert os.environ["XLA_FLAGS"] == wanted


def test_an_older_tensorflow_gets_no_flag_it_would_abort_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(installation, "tensorflow_version", lambda: "2.17.1")
    host.choose_emitters()
    assert "XLA_FLAGS" not in os.environ


def test_cloud_storage_is_tuned_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in host._CLOUD_STORAGE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCS_READ_CACHE_MAX_SIZE_MB", "1024")
    host.tune_cloud_storage()
    assert os.environ["GCS_READ_CACHE_MAX_SIZE_MB"] == "1024"
    assert os.environ["GCS_READ_CACHE_BLOCK_SIZE_MB"] == "1"
    for name in host._CLOUD_STORAGE:
        monkeypatch.delenv(name)


def test_a_process_without_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/lib/libtpu.so")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    environment = host.without_accelerators()
    assert "TF_PLUGGABLE_DEVICE_LIBRARY_PATH" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "-1"
    assert environment["PATH"] == os.environ["PATH"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("devices", "environ", "found"),
    [
        ([], {}, False),
        (["/dev/nvidia3"], {}, True),
        (["/dev/nvidiactl"], {}, False),  # the driver is there, and no device
        (["/dev/accel0"], {}, True),
        ([], {"TPU_NAME": "v3-8"}, True),
    ],
)
def test_accelerators_are_seen_without_tensorflow(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], environ: dict[str, str], found: bool
) -> None:
    monkeypatch.setattr(host.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setattr(host.os.path, "exists", devices.__contains__)
    for name in ("TPU_NAME", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert host.has_accelerator() == found
