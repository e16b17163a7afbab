"""What is installed: metadata, the entry point, and the list of commands."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

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
