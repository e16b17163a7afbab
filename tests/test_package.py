"""What is installed: metadata, the entry point, and the list of commands."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from trainer import __main__ as main
from trainer.config import presets
from trainer.core import installation

ROOT = pathlib.Path(__file__).parents[1]


def trainer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_lists_the_commands(arguments: list[str]) -> None:
    done = trainer(*arguments)
    assert done.returncode == 0
    listed = dict(re.findall(r"^  (\w+) +(\w.*)$", done.stdout, re.MULTILINE))
    modules = {path.stem for path in (ROOT / "trainer").glob("[!_]*.py")}
    packages = {path.parent.name for path in (ROOT / "trainer").glob("*/__main__.py")}
    assert listed.keys() == modules - {"task"} | packages | {"train"}
    assert listed["submit"] == "Runs a config as a job on Vertex AI: --config, --target, --image."
    # Each begins with what the command does, and names its flags or arguments.
    assert all(
        re.fullmatch(r"[A-Z][a-z]+s \S.*: (.*--\w+|[A-Z]+)\.|.*, --\w+\.", text)
        for text in listed.values()
    )


def test_unknown_command_names_the_nearest() -> None:
    done = trainer("convrt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'convrt'; did you mean convert?\n"


def test_command_gets_its_own_command_line() -> None:
    done = trainer("generate", "--no_such_flag")
    assert done.returncode == 2
    assert "error: Unknown command line flag 'no_such_flag'" in done.stderr
    assert "Traceback" not in done.stderr


COMMANDS = sorted(command for command in main._commands())


@pytest.mark.parametrize("arguments", [["--version"], *([name, "--version"] for name in COMMANDS)])
def test_version(arguments: list[str]) -> None:
    done = trainer(*arguments)
    assert (done.returncode, done.stdout) == (0, f"{installation.describe()}\n"), done.stderr


@pytest.mark.parametrize("command", ["train", "probe", "submit"])
def test_lists_the_presets(command: str) -> None:
    done = trainer(command, "--config=list")
    assert (done.returncode, done.stdout) == (0, f"{presets.listing()}\n"), done.stderr


def test_wheel_and_source_distribution_hold_the_presets(tmp_path: pathlib.Path) -> None:
    """Built as by pip, but for the metadata, which takes seconds."""
    source, built = tmp_path / "source", tmp_path / "built"
    for part in ("trainer", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.tfrecord")
        shutil.copytree(ROOT / part, source / part, ignore=ignored)
    for file in ("setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={built}", "sdist"],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = {path.name: path.read_text() for path in (ROOT / "configs").glob("*.yaml")}
    folder = built / "trainer" / "presets"
    assert {path.name: path.read_text() for path in folder.iterdir()} == expected
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"configs/{name}" for name in expected} <= names
    # The package as it was built, with no checkout beside it.
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "--config=list"],
        cwd=built,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, f"{presets.listing()}\n"), done.stderr


def test_metadata() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version", "--license"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    import trainer as package

    assert done.stdout.split()[-3:] == ["stylegan-trainer", package.__version__, "Apache-2.0"]


def test_types_are_for_others_too() -> None:
    assert (ROOT / "trainer" / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "setup.py").read_text()


def test_licence_and_notices() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "Copyright (c) Microsoft Corporation." in (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
