"""What is left out of stderr while TensorFlow is imported, and that nothing else is."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from trainer.core import tensorflow_log

ROOT = pathlib.Path(__file__).parents[2]

HARMLESS = [
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    b"I0000 00:00:1795728545.080837   31883 port.cc:153] oneDNN custom operations are on. You may",
    b"W0000 00:00:1795728545.080837   31883 computation_placer.cc:177] computation placer already",
    b"2026-11-26 21:30:00.123456: I tensorflow/core/util/port.cc:153] oneDNN custom operations are",
    b"I0000 00:00:1795728545.1 3 cudart_stub.cc:31] Could not find cuda drivers on your machine",
    b"To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with "
    b"the appropriate compiler flags.",
    b"E0000 00:00:1795728545.0 1 cuda_dnn.cc:8579] Unable to register cuDNN factory: Attempting to "
    b"register factory for plugin cuDNN when one has already been registered",
]
TELLING = [
    b"E0000 00:00:1795728545.080837   31883 cuda_executor.cc:1] failed call to cuInit: broken",
    b"F0000 00:00:1795728545.080837   31883 tensor.cc:9] Check failed: dtype() == 1 (2 vs. 1)",
    b"2026-11-26 21:30:00.123456: F tensorflow/core/x.cc:1] Check failed: 1 == 2",
    b"*** SIGABRT received at time=1795728545 ***",
    b"terminate called after throwing an instance of 'std::bad_alloc'",
    b"Fatal Python error: Segmentation fault",
    b"Illegal instruction",
    b"error: the config is odd",
    b"I0000 is what the file is called",
    b"",
]
# A package in TensorFlow's place: its lines, in parts, from threads of its own or not, then an end.
PACKAGE = """
import os, sys
for line in {lines!r}:
    os.write(2, line[:7]); os.write(2, line[7:] + b"\\n")
print("by Python", file=sys.stderr)
{end}
"""
PROGRAM = """
import importlib.util, sys
from trainer.core import tensorflow_log
tensorflow_log.hide_start_up()
assert importlib.util.find_spec("tensorflow")  # a look is no import
import tensorflow
print("after", file=sys.stderr)
"""


@pytest.mark.parametrize("line", HARMLESS)
def test_lines_of_a_healthy_start(line: bytes) -> None:
    assert tensorflow_log.harmless(line)
    assert tensorflow_log.harmless(line, 3)
    assert not tensorflow_log.harmless(line, 0)  # the user asked for all


@pytest.mark.parametrize("line", TELLING)
def test_lines_that_stay(line: bytes) -> None:
    assert not any(tensorflow_log.harmless(line, level) for level in range(4))


def test_warnings_stay_where_they_are_asked_for() -> None:
    assert not tensorflow_log.harmless(HARMLESS[2], 1)


def run(folder: pathlib.Path, end: str, level: str = "2") -> tuple[int, list[bytes]]:
    """The exit code and the lines on stderr of a program that imports `PACKAGE`."""
    (folder / "tensorflow").mkdir()
    source = PACKAGE.format(
        lines=[line for pair in zip(HARMLESS, TELLING[:7], strict=True) for line in pair], end=end
    )
    (folder / "tensorflow" / "__init__.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": level,
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        },
        capture_output=True,
        timeout=300,
    )
    return done.returncode, done.stderr.splitlines()


KEPT = TELLING[:7]


def test_only_the_harmless_lines_are_left_out(tmp_path: pathlib.Path) -> None:
    assert run(tmp_path, "") == (0, [*KEPT, b"by Python", b"after"])


def test_all_is_shown_to_who_asks_for_it(tmp_path: pathlib.Path) -> None:
    _, lines = run(tmp_path, "", level="0")
    assert [line for line in lines if line in HARMLESS] == HARMLESS


@pytest.mark.parametrize(
    ("end", "last"),
    [
        ("os.write(2, b'the last words'); os.abort()", b"the last words"),
        ("os.kill(os.getpid(), 9)", b"by Python"),
    ],
)
def test_what_a_crash_says_comes_out(tmp_path: pathlib.Path, end: str, last: bytes) -> None:
    code, lines = run(tmp_path, end)
    assert code in (-signal.SIGABRT, -signal.SIGKILL)
    assert lines == [*KEPT, *dict.fromkeys([b"by Python", last])]


def test_an_import_that_fails_says_so(tmp_path: pathlib.Path) -> None:
    code, lines = run(tmp_path, "raise ImportError('libcuda.so is broken')")
    assert code == 1
    assert lines[-1] == b"ImportError: libcuda.so is broken"


def test_an_interrupted_import_loses_nothing(tmp_path: pathlib.Path) -> None:
    """ctrl-C goes to all processes of a terminal, the one that reads stderr, too."""
    end = "import signal; os.setpgid(0, 0); signal.signal(2, signal.SIG_DFL); os.killpg(0, 2)"
    code, lines = run(tmp_path, end)
    assert code == -signal.SIGINT
    assert lines == [*KEPT, b"by Python"]


def test_a_closed_stderr_is_no_reason_to_fail(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tensorflow.py").write_text("value = 1")
    script = f"exec 2>&-; {sys.executable} -c '{PROGRAM.replace(chr(39), chr(34))}'"
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(["bash", "-c", script], env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0
