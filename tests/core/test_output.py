"""Output that nobody reads: what a command does, each in a process of its own with real descriptors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import IO, Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 60.0  # seconds: a test that waits so long has failed

COMMAND = """
    import os, pathlib, signal, sys, threading, time
    from trainer.core import errors, flags, output

    HERE = pathlib.Path(sys.argv[1])

    def lines():
        for number in range(20_000):
            print(f"line {number}")

    def main(argv):
    BODY

    if __name__ == "__main__":
        flags.run(main, usage="Prints.", max_positional=1)
"""


def start(
    tmp_path: pathlib.Path, body: str, *arguments: str, prefix: tuple[str, ...] = (), **options: Any
) -> subprocess.Popen[bytes]:
    lines = textwrap.indent(textwrap.dedent(body), " " * 4)
    path = tmp_path / "command.py"
    path.write_text(textwrap.dedent(COMMAND).replace("BODY", lines))
    environ = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]} | options.pop("env", {})
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*prefix, sys.executable, str(path), *(arguments or (str(tmp_path),))]
    return subprocess.Popen(command, cwd=ROOT, env=environ, **(streams | options))


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, (out or b"").decode(), (err or b"").decode()


@contextlib.contextmanager
def unread_pipe() -> Iterator[int]:
    """The end to write of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextlib.contextmanager
def idle_reader() -> Iterator[IO[bytes]]:
    """The end to write of a pipe whose reader reads nothing."""
    with subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE) as reader:
        try:
            assert reader.stdin is not None
            yield reader.stdin
        finally:
            reader.kill()


# ------------------------------------------------------------------------------ no reader any more


def test_head_ends_a_command_quietly(tmp_path: pathlib.Path) -> None:
    process = start(tmp_path, "lines(); (HERE / 'done').touch()")
    assert process.stdout is not None
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    process.stdout = None
    assert finish(process) == (141, "", "")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_command_without_readers(closed: str, tmp_path: pathlib.Path) -> None:
    body = "print('out'); print('err', file=sys.stderr)"
    with unread_pipe() as pipe:
        streams = ("stdout", "stderr") if closed == "both" else (closed,)
        code, out, err = finish(start(tmp_path, body, **dict.fromkeys(streams, pipe)))
    assert (code, err) == (141, "")
    assert out == ("out\n" if closed == "stderr" else "")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",)])
def test_help_without_a_reader(arguments: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    with unread_pipe() as pipe:
        assert finish(start(tmp_path, "pass", *arguments, stdout=pipe)) == (141, "", "")


@pytest.mark.parametrize("arguments", [(), ("help",), ("convert", "--help")])
def test_the_listing_of_commands_without_a_reader(arguments: tuple[str, ...]) -> None:
    with unread_pipe() as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
            timeout=LIMIT,
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise errors.DataError('odd')", 3),
        ("raise KeyboardInterrupt", 130),
        ("return 1 / 0", 1),
        ("signal.raise_signal(signal.SIGTERM); time.sleep(60)", 75),
    ],
)
def test_an_error_keeps_its_code_though_nobody_reads_it(
    body: str, code: int, tmp_path: pathlib.Path
) -> None:
    with unread_pipe() as pipe:
        assert finish(start(tmp_path, body, stdout=pipe, stderr=pipe)) == (code, "", "")


@pytest.mark.parametrize("where", ["print('x', end='')", "sys.stdout.write('x')"])
def test_what_is_left_for_the_end_keeps_the_code_too(where: str, tmp_path: pathlib.Path) -> None:
    """The interpreter would flush it, fail, and end with 120."""
    with unread_pipe() as pipe:
        assert finish(start(tmp_path, where, stdout=pipe)) == (141, "", "")
        body = f"output.outlive_readers(); {where}; print('x', file=sys.stderr, end='')"
        assert finish(start(tmp_path, body, stdout=pipe, stderr=pipe)) == (0, "", "")


def test_one_that_outlives_its_readers_knows_it(tmp_path: pathlib.Path) -> None:
    body = """
    output.outlive_readers()
    assert output.closed() == ""
    lines()
    (HERE / "closed").write_text(output.closed())
    """
    with unread_pipe() as pipe:
        assert finish(start(tmp_path, body, stdout=pipe)) == (0, "", "")
    assert (tmp_path / "closed").read_text() == "standard output"


def test_a_terminal_that_hung_up(tmp_path: pathlib.Path) -> None:
    body = """
    output.outlive_readers()
    print(sys.stdout.isatty(), os.get_terminal_size(sys.stdout.fileno()) is not None)
    while not output.closed():
        print("on")
    (HERE / "closed").write_text(output.closed())
    """
    ours, theirs = pty.openpty()
    process = start(tmp_path, body, stdout=theirs, start_new_session=True)
    os.close(theirs)
    assert os.read(ours, 9) == b"True True"
    os.close(ours)
    assert finish(process)[0] == 0
    assert (tmp_path / "closed").read_text() == "standard output"


# ------------------------------------------------------------------------------ closed at the start

OPENED = """
found = os.open(HERE / "file", os.O_RDWR | os.O_CREAT)
print("out")
print("err", file=sys.stderr)
sys.stdout.flush(), sys.stderr.flush(), sys.stderr.isatty()
(HERE / "number").write_text(str(found))
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_are_closed_at_the_start(closed: str, tmp_path: pathlib.Path) -> None:
    shell = ("bash", "-c", f'exec "$@" {closed}', "bash")
    code, out, err = finish(start(tmp_path, OPENED, prefix=shell))
    assert code == 0
    assert out == ("" if ">&- " in f" {closed} ".replace("2>&-", "") else "out\n")
    assert err == ("" if "2>&-" in closed else "err\n")
    assert int((tmp_path / "number").read_text()) > 2
    assert (tmp_path / "file").read_text() == ""


# ------------------------------------------------------------------------------ full disks

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@needs_full
def test_a_full_disk_under_the_output_is_an_error_once_all_is_done(tmp_path: pathlib.Path) -> None:
    with open("/dev/full", "wb") as full:
        code, _, err = finish(start(tmp_path, "lines(); (HERE / 'done').touch()", stdout=full))
        assert finish(start(tmp_path, "pass", "--help", stdout=full))[0] == 4
    assert code == 4
    assert err.startswith("error: standard output could not be written (No space left on device)")
    assert err.count("\n") == 1
    assert (tmp_path / "done").exists()


@needs_full
def test_a_full_disk_under_the_log_of_a_run_costs_lines_only(tmp_path: pathlib.Path) -> None:
    with open("/dev/full", "wb") as full:
        body = "output.outlive_readers(); lines(); assert not output.closed()"
        code, _, err = finish(start(tmp_path, body, stdout=full))
        assert finish(start(tmp_path, body, stdout=full, stderr=full))[0] == 0
    assert code == 0
    assert err == "note: standard output can't be written (No space left on device)\n"


def test_where_writing_works_again_the_log_names_what_is_lost(tmp_path: pathlib.Path) -> None:
    """As the disk of a log is, the file is full for a while."""
    body = """
    import resource
    output.outlive_readers()
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    print("one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, no_limit[1]))
    print("two"), print("three")
    resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    print("four")
    """
    with open(tmp_path / "log", "wb") as log:
        code, _, err = finish(start(tmp_path, body, stdout=log))
    assert code == 0
    assert err == f"note: standard output can't be written ({os.strerror(errno.EFBIG)})\n"
    assert (tmp_path / "log").read_text() == (
        f"one\nnote: 2 lines are lost here ({os.strerror(errno.EFBIG)})\nfour\n"
    )


# ------------------------------------------------------------------------------ readers that stop


def fill(process: subprocess.Popen[bytes], path: pathlib.Path) -> None:
    """Waits until the command says by a file that it is about to print more than a pipe holds."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_signal_ends_a_command_that_waits_for_its_reader(
    number: str, code: int, tmp_path: pathlib.Path
) -> None:
    """The line on stderr comes though stdout stands still."""
    body = "(HERE / 'begun').touch(); lines()"
    with idle_reader() as pipe:
        process = start(tmp_path, body, stdout=pipe)
        fill(process, tmp_path / "begun")
        process.send_signal(getattr(signal, number))
        found, _, err = finish(process)
    assert found == code
    assert err.count("\n") == 1 and "run the same command again" in err


def test_other_threads_dont_wait_for_a_reader(tmp_path: pathlib.Path) -> None:
    body = """
    threading.Thread(target=lines, daemon=True).start()
    ended = threading.Thread(target=print, args=("late",), daemon=True)
    time.sleep(0.2)
    ended.start()
    ended.join(30)
    (HERE / "ended").write_text(str(not ended.is_alive()))
    os._exit(7)
    """
    with idle_reader() as pipe:
        process = start(tmp_path, body, stdout=pipe)
        assert finish(process)[0] == 7
    assert (tmp_path / "ended").read_text() == "True"


def test_hurry_lets_the_main_thread_go_on(tmp_path: pathlib.Path) -> None:
    body = """
    threading.Timer(0.3, output.hurry).start()
    lines()
    """
    with idle_reader() as pipe:
        assert finish(start(tmp_path, body, stdout=pipe))[0] == 0


# ------------------------------------------------------------------------------ readers that read


def test_all_arrives_in_order_and_the_end_too(tmp_path: pathlib.Path) -> None:
    body = """
    for number in range(300):
        print(f"out {number}", flush=number % 3 == 0)
        print(f"err {number}", file=sys.stderr)
    print("x" * 1_000_000)
    print("the end", end="")
    """
    code, out, _ = finish(start(tmp_path, body, stderr=subprocess.STDOUT))
    expected = [f"{name} {number}" for number in range(300) for name in ("out", "err")]
    assert (code, out.split("\n")) == (0, [*expected, "x" * 1_000_000, "the end"])


def test_a_pipe_that_never_waits(tmp_path: pathlib.Path) -> None:
    """As some programs set up what they share with those that they start."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETFL, fcntl.fcntl(writing, fcntl.F_GETFL) | os.O_NONBLOCK)
    process = start(tmp_path, "lines()", stdout=writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read().count(b"\n") == 20_000
    assert finish(process) == (0, "", "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show(encoding: str, tmp_path: pathlib.Path) -> None:
    body = "print('a\\u00e9\\udcff')"
    code, out, err = finish(start(tmp_path, body, env={"PYTHONIOENCODING": encoding}))
    assert (code, err) == (0, "")
    assert out in ("a\\xe9\\udcff\n", "a\u00e9\\udcff\n")


def test_a_forked_process_prints_too(tmp_path: pathlib.Path) -> None:
    body = """
    print("parent")
    if os.fork() == 0:
        print("child")
        os._exit(0)
    os.wait()
    """
    assert finish(start(tmp_path, body)) == (0, "parent\nchild\n", "")


def test_the_end_waits_for_no_thread_that_ended_with_a_lock(tmp_path: pathlib.Path) -> None:
    """The interpreter flushes the streams after it has stopped all threads, wherever they were."""
    body = """
    held = threading.Event()
    def hold():
        with sys.stdout.buffer.changed:
            held.set()
            time.sleep(600)
    import atexit
    atexit.register(lambda: (threading.Thread(target=hold, daemon=True).start(), held.wait()))
    atexit.register(output._end)
    """
    assert finish(start(tmp_path, body)) == (0, "", "")
