"""Kills a run again and again, and shows that it ends as if nothing had been.

    python -m tests.training.chaos                          # 20 kills, everything on gs:// with faults
    python -m tests.training.chaos --workers=2 --kills=5    # kills one worker at a time
    python -m tests.training.chaos --local

The run is a tiny one at 32x32, with everything on (both regularisers, ADA that moves p, ticks,
grids, events), a checkpoint every three steps, and deterministic operations. It is killed with
SIGKILL at any time of its life, and besides while it restores, saves and writes a tick. Then its
state, statistics, events, grids and the images that each step saw are compared with those of a run
that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.gcs.emulator import Emulator
from tests.training.placement import environments
from trainer.core import storage

ROOT = pathlib.Path(__file__).parents[2]
DATA = "package:data/fluent_emoji_32"
BATCH, GROUP, EVERY = 8, 4, 3
CONFIG = f"""
run: {{jit: "off", deterministic: true, seed: 3, worker_timeout: 60, join_timeout: 60}}
data: {{use_labels: true, window: 64}}
model: {{z_dim: 8, w_dim: 8, mapping_layers: 1, d_mapping_layers: 1, channel_base: 64,
  channel_max: 8, mbstd_group_size: {GROUP}}}
training: {{batch_size: {BATCH}, g_reg_interval: 2, d_reg_interval: 3}}
augment: {{mode: ada, pipe: b, p: 0.3, interval: 2, adjust_kimg: 0.16}}
checkpoint: {{every_steps: {EVERY}, keep_last: 2}}
telemetry: {{tick_kimg: {4 * BATCH / 1000}, snap_ticks: 10}}
"""
PREEMPTED = 75
# What the storage does to each request, next to what is done to the processes.
FAULTS = {"error_rate": 0.05, "reset_rate": 0.05}

_LIMIT_SEC = 600.0  # in which what a process is killed at must have come

# Where a process can be killed: at any time after its start, or shortly after it began to do this.
MOMENTS = ("any", "save", "any", "tick", "restore")


@dataclass
class Toll:
    """What was done to a run, and what it lost by that.

    Attributes:
      kills: processes killed, by moment.
      faults: requests to the storage that failed, by kind.
      steps_lost: steps made that had to be made again.
      records_lost: groups of images that no step of the final run has seen, or not as they are.
      gave_up: exit codes of processes that ended by themselves while they should have trained.
      slowest_end: seconds from the death of a worker to the end of the last of the others.
      seconds: altogether.
    """

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    steps_lost: int = 0
    records_lost: int = 0
    gave_up: list[int] = dataclasses.field(default_factory=list)
    slowest_end: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        where = ", ".join(f"{count} {moment}" for moment, count in sorted(self.kills.items()))
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return (
            f"kills {sum(self.kills.values())} ({where}); faults injected "
            f"{sum(self.faults.values())} ({faults or 'none'}); steps lost {self.steps_lost}; "
            f"records lost {self.records_lost}; gave up {len(self.gave_up)}; slowest end of other "
            f"workers {self.slowest_end:.1f} s; {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Lives:
    """The processes of a run, one worker's or several workers', from start to death.

    Attributes:
      flags: of the training command.
      folder: for the diaries and logs.
      workers: how many.
      environment: of all.
    """

    flags: Sequence[str]
    folder: pathlib.Path
    workers: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def start(self, life: int) -> list[subprocess.Popen[bytes]]:
        """One process for each worker."""
        started = []
        for index, environment in enumerate(environments(self.workers)):
            command = [sys.executable, "-m", "tests.training.chaos"]
            with open(self.folder / f"log-{life}-{index}", "w") as log:
                process = subprocess.Popen(
                    [*command, f"--diary={self.diary(life, index)}", *self.flags],
                    cwd=ROOT,
                    env=environment | self.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            started.append(process)
        return started

    def finish(self, life: int) -> list[int]:
        """Exit codes of a life that nobody disturbs."""
        processes = self.start(life)
        try:
            return [process.wait(900) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def diary(self, life: int, index: int) -> pathlib.Path:
        """What a process notes of itself."""
        return self.folder / f"diary-{life}-{index}"

    def log(self, life: int) -> str:
        """What the processes of a life printed."""
        return "\n".join(
            (self.folder / f"log-{life}-{index}").read_text() for index in range(self.workers)
        )


def events(diary: pathlib.Path) -> list[list[str]]:
    """The lines of a diary, but for one that a death has torn."""
    if not diary.exists():
        return []
    return [line.split() for line in diary.read_text().split("\n")[:-1]]


# ------------------------------------------------------------------------------ killing


def disturb(lives: Lives, kills: int, seed: int, usual: float) -> Toll:
    """Starts a run and kills it, so often, and then lets it end.

    Args:
      lives: the run.
      kills: how often.
      seed: of moments and victims.
      usual: seconds from a start to the first steps.
    """
    toll, rng, began = Toll(), random.Random(seed), time.monotonic()
    life = 0
    while sum(toll.kills.values()) < kills:
        moment = MOMENTS[sum(toll.kills.values()) % len(MOMENTS)]
        processes = lives.start(life)
        try:
            victim = rng.randrange(lives.workers)
            # Only the chief saves and writes ticks.
            watched = lives.diary(life, 0 if moment in ("save", "tick") else victim)
            if not _wait_for(moment, rng, watched, processes, usual):
                raise AssertionError(f"no {moment} in {_LIMIT_SEC:g} s:\n{lives.log(life)}")
            if processes[victim].poll() is None:
                processes[victim].send_signal(signal.SIGKILL)
                processes[victim].wait()
                toll.kills[moment] += 1
                killed = time.monotonic()
                codes = _end(processes, victim)
                toll.slowest_end = max(toll.slowest_end, time.monotonic() - killed)
                assert set(codes) <= {PREEMPTED}, (codes, lives.log(life))
            else:
                codes = [process.wait(120) for process in processes]
                assert any(codes), "the run ended before all kills were made: make it longer"
                toll.gave_up += codes
        finally:
            for process in processes:
                process.kill()
                process.wait()
        life += 1
    codes = lives.finish(life)
    assert not any(codes), (codes, lives.log(life))
    toll.seconds = time.monotonic() - began
    _count_losses(lives, life, toll)
    return toll


def _wait_for(
    moment: str,
    rng: random.Random,
    diary: pathlib.Path,
    processes: Sequence[subprocess.Popen[bytes]],
    usual: float,
) -> bool:
    """Returns when a process is to be killed, or one has ended; whether that was in time."""
    if moment == "any":
        ends = time.monotonic() + rng.uniform(0, 1.5 * usual)
        return _until(lambda: time.monotonic() > ends, processes)
    often = 1 if moment == "restore" else rng.randint(1, 2)
    came = _until(lambda: [e[0] for e in events(diary)].count(moment) >= often, processes)
    time.sleep(rng.uniform(0, 0.3))
    return came


def _until(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Waits for a condition or the end of a process; whether it came in time."""
    ends = time.monotonic() + _LIMIT_SEC
    while not condition() and all(process.poll() is None for process in processes):
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def _end(processes: Sequence[subprocess.Popen[bytes]], victim: int) -> list[int]:
    """Exit codes of the other workers, which must end by themselves."""
    return [p.wait(timeout=150) for index, p in enumerate(processes) if index != victim]


def _count_losses(lives: Lives, last: int, toll: Toll) -> None:
    """Adds up from the diaries of the chief what was done twice, and of all what wasn't done."""
    made = 0
    for life in range(last + 1):
        noted = events(lives.diary(life, 0))
        start = next((int(e[1]) for e in noted if e[0] == "start"), None)
        if start is None:
            continue  # killed before it knew
        toll.steps_lost += made - start
        made = start + sum(e[0] == "images" for e in noted)


def images(lives: Lives) -> dict[int, set[int]]:
    """Checksums of each group of images, by its number, over all lives."""
    seen: dict[int, set[int]] = collections.defaultdict(set)
    for diary in lives.folder.glob("diary-*"):
        for event in events(diary):
            if event[0] == "images":
                for pair in event[1:]:
                    number, _, checksum = pair.partition(":")
                    seen[int(number)].add(int(checksum))
    return seen


# ------------------------------------------------------------------------------ comparing


def state(workdir: str) -> dict[str, bytes]:
    """All variables of a run's newest checkpoint."""
    from trainer.training import checkpoint

    with checkpoint._reader(checkpoint.find(workdir)) as reader:
        names = reader.get_variable_to_shape_map()
        return {name: reader.get_tensor(name).tobytes() for name in names}


def statistics(workdir: str) -> list[dict[str, Any]]:
    """The lines of stats.jsonl, without what differs from run to run."""
    passing = ("Timing/", "Resources/", "timestamp")
    lines = storage.read_text(storage.join(workdir, "stats.jsonl")).splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(passing)}
        for line in lines
    ]


def tensorboard(workdir: str) -> list[tuple[int, str, bytes]]:
    """Step, name and value of all events, in order, without what differs from run to run."""
    import tensorflow as tf

    folder, found = storage.join(workdir, "tensorboard"), []
    for name in storage.listdir(folder):
        for record in tf.data.TFRecordDataset(storage.join(folder, name)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            found += [
                (event.step, value.tag, value.tensor.SerializeToString())
                for value in event.summary.value
                if not value.tag.startswith(("Timing/", "Resources/"))
            ]
    return sorted(found)


def pictures(workdir: str) -> dict[str, bytes]:
    """The grids, by name."""
    names = [name for name in storage.listdir(workdir) if name.endswith(".png")]
    return {name: storage.read_bytes(storage.join(workdir, name)) for name in names}


def compare(found: str, wanted: str) -> None:
    """Fails if two runs differ in a bit of what they left."""
    for part in (state, statistics, tensorboard, pictures):
        ours, theirs = part(found), part(wanted)
        assert len(ours) == len(theirs) > 0, f"{part.__name__}: {len(ours)}, not {len(theirs)}"
        assert ours == theirs, f"{part.__name__} differ"


# ------------------------------------------------------------------------------ all of it


def chaos(
    folder: pathlib.Path,
    *,
    kills: int,
    steps: int,
    workers: int = 1,
    emulator: Emulator | None = None,
    bucket: str = "",
    seed: int = 0,
) -> Toll:
    """Trains twice, once undisturbed, and compares.

    Args:
      folder: empty.
      kills: how often to kill.
      steps: length of the run.
      workers: processes of each life.
      emulator: where data and run are, with faults; None for the local disk.
      bucket: an empty one on it, as gs://bucket.
      seed: of everything that is done to the run.
    """
    (folder / "config.yaml").write_text(CONFIG)
    flags = [f"--config={folder / 'config.yaml'}"]
    flags.append(f"--set=training.total_kimg={steps * BATCH / 1000}")
    environment: dict[str, str] = {"NO_GCE_CHECK": "true"}
    data, workdir = DATA, str(folder / "disturbed")
    quiet = Lives(
        [*flags, f"--data={DATA}", f"--workdir={folder / 'quiet'}"], folder / "a", workers
    )
    if emulator is not None:
        data, workdir = f"{bucket}/data", f"{bucket}/run"
        environment |= emulator.environment()
        for name in storage.listdir(storage.resolve(DATA)):
            content = storage.read_bytes(storage.join(storage.resolve(DATA), name))
            storage.write_bytes_atomic(f"{data}/{name}", content)
    lives = Lives(
        [*flags, f"--data={data}", f"--workdir={workdir}"], folder / "b", workers, environment
    )
    quiet.folder.mkdir()
    lives.folder.mkdir()
    codes = quiet.finish(0)
    assert not any(codes), quiet.log(0)
    usual = float(next(e[1] for e in events(quiet.diary(0, 0)) if e[0] == "ready"))
    with _faults(emulator):
        toll = disturb(lives, kills, seed, usual)
        if emulator is not None:
            counts = emulator.counts()
            toll.faults = {key[1]: n for key, n in counts.items() if key[0] == "fault"}
    wanted, found = images(quiet), images(lives)
    toll.records_lost = sum(found.get(number) != checksums for number, checksums in wanted.items())
    toll.records_lost += len(found.keys() - wanted.keys())
    compare(workdir, str(folder / "quiet"))
    return toll


@contextlib.contextmanager
def _faults(emulator: Emulator | None) -> Iterator[None]:
    if emulator is None:
        yield
        return
    emulator.reset_counts()
    emulator.faults.update(**FAULTS)
    yield
    emulator.faults.clear()


# ------------------------------------------------------------------------------ one process


def _train(diary: str, flags: list[str]) -> None:
    """The training command, which notes in a diary what it does."""
    began = time.monotonic()
    import tensorflow as tf

    from trainer import task
    from trainer.core import flags as flags_lib
    from trainer.data.pipeline import ImageStream
    from trainer.telemetry.writers import Telemetry
    from trainer.training.checkpoint import Checkpoints

    def note(*words: object) -> None:
        with open(diary, "a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    # Rewriting graphs takes longer than the few steps made with them.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    if "TF_CONFIG" not in os.environ:
        tf.config.run_functions_eagerly(True)  # and so does tracing them

    def noted(owner: Any, method: str, event: str) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            note(event)
            return original(*args, **kwargs)

        setattr(owner, method, wrapped)

    noted(Checkpoints, "_write", "save")
    noted(Checkpoints, "restore", "restore")
    noted(Telemetry, "tick", "tick")
    following, create = ImageStream.__next__, ImageStream.__init__

    def created(self: ImageStream, *args: Any, **kwargs: Any) -> None:
        note("start", kwargs["start_group"] * GROUP // BATCH)
        create(self, *args, **kwargs)

    def recorded(self: ImageStream) -> Any:
        pictures, labels, numbers = batch = following(self)
        words = [
            f"{number}:{zlib.crc32(b''.join(part.tobytes() for part in content))}"
            for number, *content in zip(
                numbers.numpy(), pictures.numpy(), labels.numpy(), strict=True
            )
        ]
        if not ready:
            ready.append(time.monotonic() - began)
            note("ready", ready[0])
        note("images", *words)
        return batch

    ready: list[float] = []
    ImageStream.__init__ = created  # type: ignore[method-assign]
    ImageStream.__next__ = recorded  # type: ignore[method-assign]
    sys.argv[1:] = flags
    task.define_flags()
    flags_lib.run(task.main, usage="")


def main() -> None:
    """Shows the toll, or is one process of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--local", action="store_true", help="not on gs://")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--diary", default="", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.diary:
        _train(arguments.diary, flags)
        return
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        emulator = None if arguments.local else stack.enter_context(Emulator())
        if emulator is not None:
            os.environ.update(emulator.environment())
        toll = chaos(
            pathlib.Path(name),
            kills=arguments.kills,
            steps=arguments.steps,
            workers=arguments.workers,
            emulator=emulator,
            bucket=emulator.url("chaos") if emulator is not None else "",
            seed=arguments.seed,
        )
    print(f"the same in every bit: {toll}")


if __name__ == "__main__":
    main()
