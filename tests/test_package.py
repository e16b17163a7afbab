"""What is installed: metadata, the entry point, and the list of commands."""

from __future__ import annotations

import os
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


def trainer(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=ROOT,
        env=environment,
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


# Ends whoever imports it, with a code that no command has.
POISON = "import os; os._exit(99)"
COMMANDS = sorted(main._commands())
SUBMIT = ["submit", "--target=v5e-8", "--workdir=gs://bucket/run", "--resolution=64"]


@pytest.fixture(scope="module")
def no_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which nothing that imports TensorFlow goes on."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "tensorflow.py").write_text(POISON)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        *(([name, "--help"], 0, "flags:") for name in COMMANDS),
        *(([name, "--version"], 0, "stylegan-trainer ") for name in COMMANDS),
        *(([name, "--no_such_flag"], 2, "flag 'no_such_flag'") for name in COMMANDS),
        (["train"], 2, "--config and --workdir are needed"),
        (["convert"], 2, "--source is missing"),
        (["export"], 2, "--dest and one of --run and --checkpoint are needed"),
        (["generate"], 2, "--out and one of --run and --checkpoint are needed"),
        (["probe"], 2, "probe what"),
        (["train", "--config=auto", "--data=nowhere", "--dry_run"], 3, "no data set at nowhere"),
        (["train", "--config=auto"], 2, "error: --workdir is needed"),
        (["probe", "step"], 2, "--config is needed"),
        (["submit"], 2, "--config and --target and --workdir are needed"),
        (["generate", "--run=r", "--out=o", "--seeds=x"], 2, "--seeds=x"),
        (["train", "--config=list"], 0, "paper256 "),
        *(
            ([*command, f"--config={config}"], 2, "did you mean the preset paper256?")
            for command in (["train", "--dry_run"], ["probe", "step"], SUBMIT)
            for config in ("paper265", "configs/paper265.yaml")
        ),
        *(
            ([*command, "--config=smoke", "--set=g_lr=1"], 2, "did you mean training.g_lr?")
            for command in (["train", "--dry_run"], ["probe", "step"], SUBMIT)
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_tensorflow_waits_for_none(
    arguments: list[str], code: int, text: str, no_tensorflow: dict[str, str]
) -> None:
    done = trainer(*arguments, environment=no_tensorflow)
    assert done.returncode == code, done.stderr
    output = done.stderr if code else done.stdout
    assert text in output
    assert output.count("\n") == 1 or not code
    assert "Traceback" not in done.stderr


def test_a_python_without_the_packages_is_told_in_a_line(tmp_path: pathlib.Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "import runpy; runpy.run_module('trainer', run_name='__main__')",
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: absl is not installed for ")
    assert done.stderr.count("\n") == 1


def test_the_poison_would_be_seen(no_tensorflow: dict[str, str]) -> None:
    done = trainer("export", "--run=r", "--dest=d", environment=no_tensorflow)
    assert done.returncode == 99


def test_a_module_may_be_called_by_its_own_name() -> None:
    done = trainer("task", "--help")
    assert (done.returncode, done.stdout) == (0, trainer("train", "--help").stdout)


def test_texts_name_commands_in_one_form() -> None:
    """`python -m trainer convert`, where users read it; what starts jobs may name modules."""
    modules = "|".join(module.partition(".")[2] for module, _ in main._commands().values())
    texts = [ROOT / "README.md", ROOT / "Makefile", ROOT / "cloudbuild.yaml"]
    for folder, pattern in (("trainer", "*.py"), ("configs", "*.yaml"), ("docker", "*.sh")):
        texts += (ROOT / folder).rglob(pattern)
    called = rf"python3? -m trainer\.({modules})\b"
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts
        for match in re.finditer(called, path.read_text())
    ]
    assert found == []


def test_version() -> None:
    for form in ([], ["generate"]):
        done = trainer(*form, "--version")
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
