"""How a stopped run ends: saved, with its exit code, whatever became of its output and its machine."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trainer.core import lease

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 60.0  # seconds: a test that waits so long has failed

# A run without its arithmetic: prints each step, and saves when it has to stop.
PROGRAM = """
import pathlib, sys, time
from absl import flags as absl_flags
from trainer.core import errors, flags, output
from trainer.config import RunConfig
from trainer.training import preemption

absl_flags.DEFINE_float("grace", 28, "run.grace_time")
absl_flags.DEFINE_float("hours", None, "run.max_hours")
absl_flags.DEFINE_float("patience", None, "How long a job waits.")
absl_flags.DEFINE_bool("hang", False, "In the first step.")
absl_flags.DEFINE_string("fail", None, "End with this error.")

def main(argv):
    here, given = pathlib.Path(argv[1]), absl_flags.FLAGS
    output.outlive_readers()
    if given.patience is not None:
        errors.TrainerError.patience = given.patience
    run = RunConfig(grace_time=given.grace, max_hours=given.hours)
    with preemption.Preemption(run) as stop:
        (here / "ready").touch()
        step = 0
        while (reason := stop.begin(step)) is None:
            print(f"step {step}", flush=True)
            step += 1
            (here / "step").write_text(str(step))
            time.sleep(600 if given.hang else 0.005)
        (here / "saved").write_text(reason)
    raise errors.PreemptedError(f"{reason}: saved", preemption.patience(reason))

flags.run(main, usage="", max_positional=1)
"""


class Run:
    """The program under way, in a folder of its own."""

    def __init__(self, folder: pathlib.Path, *arguments: str, prefix: Any = (), **options: Any):
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        self.command = [sys.executable, str(folder / "program.py"), str(folder), *arguments]
        environ = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "NO_GCE_CHECK": "true"}
        self.process = subprocess.Popen(
            [*prefix, *self.command],
            env=environ | options.pop("env", {}),
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | options,
        )
        self.wait_for(lambda: (folder / "ready").exists())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < ends
            time.sleep(0.01)

    @property
    def saved(self) -> str:
        """Why, once it is."""
        path = self.folder / "saved"
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        path = self.folder / "step"
        return int((path.read_text() if path.exists() else "") or 0)

    def wait_for_steps(self, count: int) -> None:
        begun = self.steps()
        self.wait_for(lambda: self.steps() >= begun + count)

    def end(self) -> tuple[int, str]:
        """Code and stderr."""
        try:
            _, err = self.process.communicate(timeout=LIMIT)
        finally:
            self.process.kill()
        return self.process.returncode, err or ""


@contextlib.contextmanager
def idle_reader() -> Iterator[Any]:
    """A pipe whose reader is there and doesn't read."""
    with subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE) as reader:
        try:
            yield reader.stdin
        finally:
            reader.kill()


# ------------------------------------------------------------------------------ output


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("streams", ["2>&1", "", "2>/dev/null"])
def test_tee_ends_with_the_run(number: str, streams: str, tmp_path: pathlib.Path) -> None:
    """A terminal sends its signals to all that run in it, tee included."""
    codes, log = tmp_path / "codes", tmp_path / "log"
    line = f'"$@" {streams} | tee {log} >/dev/null; echo ${{PIPESTATUS[0]}} >{codes}'
    shell = ("bash", "-c", f"trap : INT TERM HUP; {line}", "bash")
    run = Run(tmp_path, prefix=shell, start_new_session=True)
    run.wait_for(lambda: log.exists() and "step 3" in log.read_text())
    os.killpg(run.process.pid, getattr(signal, number))
    _, err = run.end()
    assert codes.read_text() == "75\n"
    reasons = {"SIGINT": "interrupted"}.get(number, number), "nobody reads"
    assert run.saved.startswith(reasons)
    assert "Traceback" not in err and "Exception" not in err


def test_a_reader_that_leaves_stops_the_run(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, stdout=subprocess.PIPE)
    assert run.process.stdout is not None
    run.process.stdout.readline()
    run.process.stdout.close()
    run.process.stdout = None
    reason = "nobody reads standard output any more"
    assert run.end() == (75, f"stopped: {reason}: saved\n")
    assert run.saved == reason


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_was_never_wanted_stops_nothing(closed: str, tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, prefix=("bash", "-c", f'exec "$@" {closed}', "bash"))
    run.wait_for_steps(20)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 75
    assert run.saved == "SIGTERM"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_log_stops_nothing(tmp_path: pathlib.Path) -> None:
    with open("/dev/full", "w") as full:
        run = Run(tmp_path, stdout=full, stderr=full)
        run.wait_for_steps(20)
        run.process.send_signal(signal.SIGTERM)
        assert run.end()[0] == 75
    assert run.saved == "SIGTERM"


@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_run_that_waits_for_its_reader_is_saved(streams: str, tmp_path: pathlib.Path) -> None:
    with idle_reader() as pipe:
        options = {"stdout": pipe} | ({"stderr": pipe} if streams == "both" else {})
        os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(BlockingIOError):  # until it is full
            while os.write(pipe.fileno(), b"x" * 4096):
                pass
        os.set_blocking(pipe.fileno(), True)
        run = Run(tmp_path, **options)
        run.process.send_signal(signal.SIGTERM)
        code, err = run.end()
    assert (code, run.saved) == (75, "SIGTERM")
    assert err == ("" if streams == "both" else "stopped: SIGTERM: saved\n")


def test_ctrl_c_twice_ends_one_that_waits_for_its_reader(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, "--hang")
    run.process.send_signal(signal.SIGINT)
    assert run.process.stderr is not None
    assert "ctrl-C again" in run.process.stderr.readline()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (130, "interrupted; run the same command again to go on\n")
    assert run.saved == ""


# ------------------------------------------------------------------------------ signals


def test_nohup_outlives_the_terminal(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, prefix=("nohup",))
    run.process.send_signal(signal.SIGHUP)
    run.wait_for_steps(20)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == (75, "stopped: SIGTERM: saved\n")


def test_a_hangup_leaves_a_save_its_time(tmp_path: pathlib.Path) -> None:
    """Nobody takes the machine away; after SIGTERM somebody may."""
    run = Run(tmp_path, "--hang", "--grace=0.2")
    run.process.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 75
    assert err.startswith("stopped: SIGHUP: nothing saved within run.grace_time = 0.2 s")


# ------------------------------------------------------------------------------ jobs

JOB = {"env": {"CLOUD_ML_JOB_ID": "123"}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_in_a_job_a_saved_run_waits_until_it_is_killed(
    number: signal.Signals, tmp_path: pathlib.Path
) -> None:
    """Code 75 would end the job for good. Nor does the grace time end it, nor another signal."""
    run = Run(tmp_path, "--grace=0.5", **JOB)
    run.process.send_signal(number)
    assert run.process.stderr is not None
    assert run.process.stderr.readline() == f"stopped: {number.name}: saved\n"
    line = run.process.stderr.readline()
    assert line.startswith("job 123: waiting to be ended with the machine")
    assert line.endswith("otherwise this process ends with 134 in 300 s\n")
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert run.process.poll() is None
    assert run.saved == number.name
    run.process.kill()
    assert run.end() == (-signal.SIGKILL, "")


def test_in_a_job_that_goes_on_a_run_ends_with_a_code_that_is_tried_again(
    tmp_path: pathlib.Path,
) -> None:
    run = Run(tmp_path, "--patience=0.2", **JOB)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 134
    assert run.saved == "SIGTERM"


def test_in_a_job_one_that_hangs_does_so_too(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, "--hang", "--grace=0.2", "--patience=0.2", **JOB)
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code == 134
    assert "SIGTERM: nothing saved within run.grace_time" in err.splitlines()[0]


def test_in_a_job_the_time_that_is_over_ends_the_run_at_once(tmp_path: pathlib.Path) -> None:
    code, err = Run(tmp_path, f"--hours={0.2 / 3600}", **JOB).end()
    assert code == 75
    assert err.startswith("stopped: run.max_hours = ") and err.count("\n") == 1


def test_in_a_job_ctrl_c_ends_the_run_at_once(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, **JOB)
    run.process.send_signal(signal.SIGINT)
    code, err = run.end()
    assert code == 75
    assert err.endswith("stopped: interrupted: saved\n")


# ------------------------------------------------------------------------------ real runs

CONFIG = """
run: {jit: "off"}
data: {path: package:data/fluent_emoji_32}
model: {z_dim: 8, w_dim: 8, mapping_layers: 1, d_mapping_layers: 1, channel_base: 64, channel_max: 8}
training: {batch_size: 8, total_kimg: 1000}
objective: {pl_weight: 0, r1_gamma: 0}
augment: {mode: none}
checkpoint: {every_steps: 1000000}
telemetry: {tick_kimg: 0.008, tensorboard: false}
"""


@pytest.mark.slow
def test_a_real_run_loses_tee_then_its_machine_and_is_whole(tmp_path: pathlib.Path) -> None:
    workdir, log, codes = (tmp_path / name for name in ("run", "log", "codes"))
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "trainer.task", f"--config={tmp_path}/config.yaml"]
    command.append(f"--workdir={workdir}")
    environ = {**os.environ, "NO_GCE_CHECK": "true"}

    def wait_for(text: str, process: subprocess.Popen[Any]) -> None:
        while not log.exists() or text not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)

    # ctrl-C ends tee, too.
    line = f'"$@" 2>&1 | tee {log} >/dev/null; echo ${{PIPESTATUS[0]}} >{codes}'
    shell = ["bash", "-c", f"trap : INT; {line}", "bash", *command]
    with subprocess.Popen(
        shell,
        cwd=ROOT,
        env=environ,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        wait_for("tick 1 ", process)
        os.killpg(process.pid, signal.SIGINT)
    assert codes.read_text() == "75\n"
    first = {path.parent.name for path in workdir.glob("checkpoints/*/COMMITTED-*")}
    assert len(first) == 1

    # In a job it saves, gives the lease back, and waits; the next one goes on at once.
    log.unlink()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ | {"CLOUD_ML_JOB_ID": "7"},
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        wait_for("first step after", process)
        process.send_signal(signal.SIGTERM)
        wait_for("job 7: waiting to be ended with the machine", process)
        assert "resuming from" in log.read_text()
        with lease.acquire(str(workdir)):  # or it is held
            second = {path.parent.name for path in workdir.glob("checkpoints/*/COMMITTED-*")}
            assert second > first
        assert process.poll() is None
        process.kill()
