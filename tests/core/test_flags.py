"""How a command ends: exit codes and what stands on stderr, each in a process of its own."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap

import pytest

from trainer.core import errors, flags, installation

ROOT = pathlib.Path(__file__).parents[2]

COMMAND = """
    import sys
    from absl import flags as absl_flags
    from trainer.core import errors, flags

    _COLOUR = absl_flags.DEFINE_enum("colour", "red", ["red", "blue"], "What to paint with.")
    absl_flags.DEFINE_integer("count", 1, "How many.")

    def main(argv):
        BODY

    if __name__ == "__main__":
        flags.run(main, usage="Paints things.", max_positional=POSITIONAL)
"""


def command(
    tmp_path: pathlib.Path, body: str, *arguments: str, positional: int = 0
) -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(COMMAND).replace("POSITIONAL", str(positional)).replace("BODY", body)
    path = tmp_path / "command.py"
    path.write_text(source)
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("TrainerError", 1),
        ("UsageError", 2),
        ("ConfigError", 2),
        ("MissingTensorFlowError", 2),
        ("DataError", 3),
        ("StorageError", 4),
        ("CheckpointError", 4),
        ("DivergedError", 5),
        ("PreemptedError", 75),
    ],
)
def test_error_is_one_line_and_its_exit_code(error: str, code: int, tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, f'raise errors.{error}("the file is odd")')
    assert (done.returncode, done.stdout) == (code, "")
    heading = "stopped" if error == "PreemptedError" else "error"
    assert done.stderr == f"{heading}: the file is odd\n"


def test_debug_shows_the_traceback_too(tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, 'raise errors.DataError("odd")', "--debug")
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: odd\n")


def test_success_and_returned_codes(tmp_path: pathlib.Path) -> None:
    assert command(tmp_path, "print(_COLOUR.value)", "--colour=blue").stdout == "blue\n"
    assert command(tmp_path, "return None").returncode == 0
    assert command(tmp_path, "return 7").returncode == 7


def test_bug_has_a_traceback_and_code_1(tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, "return 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


def test_interrupt_says_how_to_go_on(tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, "raise KeyboardInterrupt")
    assert done.returncode == 130
    assert done.stderr == "interrupted; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--color=red"], "'color'"),
        (["--colour=green"], "green"),
        (["--count=many"], "many"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_bad_command_line_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    done = command(tmp_path, "pass", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_positional_arguments_where_they_are_wanted(tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, "print(argv[1:])", "step", positional=1)
    assert done.stdout == "['step']\n"
    done = command(tmp_path, "print(argv[1:])", "step", "data", positional=1)
    assert "'data'" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_shows_usage_and_own_flags(flag: str, tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, "pass", flag)
    assert done.returncode == 0
    assert done.stdout.startswith("Paints things.\n")
    assert "--colour: <red|blue>: What to paint with." in done.stdout
    assert "--[no]debug" in done.stdout
    assert "verbosity" not in done.stdout


def test_version_is_told_before_anything_is_done(tmp_path: pathlib.Path) -> None:
    done = command(tmp_path, "print('done')", "--version", "--no_such_flag")
    assert (done.returncode, done.stdout) == (0, f"{installation.describe()}\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise errors.ConfigError('odd')", "error: odd\n"),
        ("import sys; sys.modules['tensorflow'] = None; import tensorflow", "[cpu]"),
    ],
)
def test_error_while_importing_is_one_line(line: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(f"from trainer.core import errors, flags\nflags.guard_imports()\n{line}\n")
    done = subprocess.run(
        [sys.executable, str(path)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_NAME", "value")
    assert flags.env("A_NAME") == "value"
    monkeypatch.delenv("A_NAME")
    assert flags.env("A_NAME") is None
    assert flags.env("A_NAME", "other") == "other"


def test_an_error_is_one_line_that_steers_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in the message: names of files, values of a config, answers of a service."""
    for text in ("a\x1b[2J\x9b1A\r\nerror: fine\u202e\u2028b\udcff", "x" * 100_000):
        with pytest.raises(SystemExit) as ended:
            flags.fail(errors.DataError(text))
        assert ended.value.code == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert line.isprintable()
        assert len(line) < 5000
