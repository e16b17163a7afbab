"""Kills, stops and damages a run again and again, and shows that it ends as if nothing had been.

    python -m tests.training.chaos                          # 20 kills, everything on gs:// with faults
    python -m tests.training.chaos --workers=2 --kills=5    # kills one worker at a time
    python -m tests.training.chaos --local --light --kills=40 --pauses=40 --corruptions=40

The run is a tiny one at 32x32, with everything on (both regularisers, ADA that moves p, ticks,
grids, events), a checkpoint every three steps, and deterministic operations. With --light its steps
are no arithmetic worth the name, so that much more can be done to it in the same time.

- Kills: SIGKILL at any time of its life, and besides while it restores, saves and writes a tick.
- Pauses: SIGSTOP at such a time. Another process takes the lease over and trains on; SIGCONT comes
  at any time after that, and the first process must end with exit code 4.
- Corruptions: a file is damaged after a kill; see `tests.training.damage`.

Then its state, statistics, events, grids and the images that each step saw are compared with those
of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.gcs.emulator import Emulator
from tests.training import damage as damage_lib
from tests.training.damage import Damage
from tests.training.lives import BATCH, CONFIG, DATA, Life, Lives, code_of, events, images
from trainer.core import storage

PREEMPTED, STORAGE = 75, 4
# What the storage does to each request, next to what is done to the processes.
FAULTS = {"error_rate": 0.05, "reset_rate": 0.05}

_LIMIT_SEC = 600.0  # in which what a process is killed at must have come

# Where a process can be killed: at any time after its start, or shortly after it began to do this.
MOMENTS = ("any", "save", "any", "tick", "restore")
# And stopped: at any time after it has the lease.
PAUSES = ("save", "tick", "any")


@dataclass
class Toll:
    """What was done to a run, and what it lost by that.

    Attributes:
      kills: processes killed, by moment.
      pauses: processes stopped from which another one took over, by moment.
      locked: processes stopped that had the lock of the disk, so that nobody could.
      corruptions: damages, by kind.
      faults: requests to the storage that failed, by kind.
      steps_lost: steps made that had to be made again.
      records_lost: groups of images that no step of the final run has seen, or not as they are.
      gave_up: exit codes of processes that ended by themselves while they should have trained.
      slowest_end: seconds from the death of a worker to the end of the last of the others.
      seconds: altogether.
    """

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pauses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    locked: int = 0
    corruptions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    steps_lost: int = 0
    records_lost: int = 0
    gave_up: list[int] = dataclasses.field(default_factory=list)
    slowest_end: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{what} {sum(counts.values())} ({_listed(counts)})"
            for what, counts in (
                ("kills", self.kills),
                ("pauses", self.pauses),
                ("corruptions", self.corruptions),
                ("faults injected", self.faults),
            )
        ]
        return (
            f"{'; '.join(parts)}; stopped with the lock {self.locked}; steps lost "
            f"{self.steps_lost}; records lost {self.records_lost}; gave up {len(self.gave_up)}; "
            f"slowest end of other workers {self.slowest_end:.1f} s; {self.seconds:.0f} s"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


# ------------------------------------------------------------------------------ disturbing


class Chaos:
    """What is done to a run, one thing after the other.

    Args:
      lives: the run.
      workdir: where it is.
      seed: of moments, victims and damages.
      usual: seconds from a start to the first steps.
    """

    def __init__(self, lives: Lives, workdir: str, seed: int, usual: float) -> None:
        self.toll, self.damages = Toll(), list[Damage]()
        self._lives, self._workdir, self._usual = lives, workdir, usual
        self._rng = random.Random(seed)
        first = 5 * seed % len(damage_lib.KINDS)
        self._kinds = damage_lib.KINDS[first:] + damage_lib.KINDS[:first]
        self._last = -1  # life that was started
        self._life = -1  # that trains
        # Of the life that trains; and lives that were stopped or woken since, with their numbers.
        self._running: list[Life] = []
        self._stopped: dict[int, Life] = {}
        self._woken: dict[int, Life] = {}

    def run(self, kills: int, pauses: int, corruptions: int) -> None:
        """Does so much to the run, and then lets it end.

        Each corruption follows a kill; there are as many kills more as are asked for beyond that.
        """
        plan = ["corrupt"] * corruptions + ["pause"] * pauses
        plan += ["kill"] * max(kills - corruptions, 0)
        self._rng.shuffle(plan)
        began = time.monotonic()
        try:
            for what in plan:
                self._wake(some=True)
                getattr(self, what)()
            self._wake()
            if not self._running:
                self._start()
            codes = [code_of(process, 900) for process in self._running]
            self._running = []
            assert not any(codes), (codes, self._lives.log(self._life))
            self._wake()
            self._end_woken()
        finally:
            for process in [*self._running, *self._stopped.values(), *self._woken.values()]:
                process.kill()
                process.join()
        self.toll.seconds = time.monotonic() - began
        _count_losses(self._lives, self._last, self.toll)

    @property
    def starts(self) -> dict[int, int]:
        """Step where each life went on, by number; of those that came so far."""
        starts = {}
        for life in range(self._last + 1):
            noted = events(self._lives.diary(life, 0))
            starts.update((life, int(e[1])) for e in noted if e[0] == "start")
        return starts

    def _start(self) -> None:
        self._life = self._last = self._last + 1
        self._running = self._lives.start(self._life)

    def _next_moment(self, moments: Sequence[str], done: int) -> str:
        if not self._running:
            self._start()
        return moments[done % len(moments)]

    # -------------------------------------------------------------------------- kills

    def kill(self) -> None:
        """Kills one process of the life that trains; the others end by themselves."""
        lives, toll = self._lives, self.toll
        while True:
            moment = self._next_moment(MOMENTS, sum(toll.kills.values()))
            victim = self._rng.randrange(lives.workers)
            # Only the chief saves and writes ticks.
            watched = lives.diary(self._life, 0 if moment in ("save", "tick") else victim)
            if not _wait_for(moment, self._rng, watched, self._running, self._usual):
                raise AssertionError(f"no {moment} in {_LIMIT_SEC:g} s:\n{lives.log(self._life)}")
            if self._running[victim].exitcode is None:
                break
            self._gave_up()
        _signal(self._running[victim], signal.SIGKILL)
        self._running[victim].join()
        toll.kills[moment] += 1
        killed = time.monotonic()
        codes = _end(self._running, victim)
        toll.slowest_end = max(toll.slowest_end, time.monotonic() - killed)
        assert set(codes) <= {PREEMPTED}, (codes, lives.log(self._life))
        self._running = []

    def _gave_up(self) -> None:
        """Takes note of a life that ended by itself; the next one goes on."""
        codes = [code_of(process, 120) for process in self._running]
        assert any(codes), "the run ended before all was done to it: make it longer"
        self.toll.gave_up += codes
        self._running = []

    # -------------------------------------------------------------------------- pauses

    def pause(self) -> None:
        """Stops the process that trains; another one takes over."""
        lives, toll = self._lives, self.toll
        while True:
            moment = self._next_moment(PAUSES, sum(toll.pauses.values()))
            life, (process,) = self._life, self._running
            _wait_for("lease", self._rng, lives.diary(life, 0), [process], 0)
            _wait_for(moment, self._rng, lives.diary(life, 0), [process], self._usual)
            _signal(process, signal.SIGSTOP)
            if process.exitcode is not None:
                self._gave_up()
                continue
            self._stopped[life] = process
            if self._taken_over():
                toll.pauses[moment] += 1
                return
            toll.locked += 1
            _signal(process, signal.SIGCONT)
            self._life, self._running = life, [self._stopped.pop(life)]

    def _taken_over(self) -> bool:
        """Starts the next life; False if the one that was stopped keeps it out with its lock."""
        while True:
            self._start()
            diary, (process,) = self._lives.diary(self._life, 0), self._running
            assert _wait_for("lease", self._rng, diary, [process], 0)
            if process.exitcode is None:
                return True
            log = self._lives.log(self._life)
            assert process.exitcode == STORAGE, (process.exitcode, log)
            if "has its lock for" in log:
                # It counts as the same life, of which the diary goes on.
                return False
            # A request of the one that was stopped was still on its way.
            assert "is in use by" in log, log
            self.toll.gave_up.append(process.exitcode)

    def _wake(self, *, some: bool = False) -> None:
        """Lets all of those that were stopped go on, or some."""
        for life in [*self._stopped]:
            if not some or self._rng.random() < 0.5:
                self._woken[life] = self._stopped.pop(life)
                _signal(self._woken[life], signal.SIGCONT)

    def _end_woken(self) -> None:
        """Waits for those that were woken: they must end by themselves, for the right reason."""
        for life in [*self._woken]:
            code, log = code_of(self._woken[life], 300), self._lives.log(life)
            assert code == STORAGE and "Traceback" not in log, (code, log)
            assert "this job ends" in log or "somebody else" in log, log
            del self._woken[life]

    # -------------------------------------------------------------------------- corruptions

    def corrupt(self) -> None:
        """Kills the process that trains, and damages what it left."""
        kind = self._kinds[sum(self.toll.corruptions.values()) % len(self._kinds)]
        while True:
            self.kill()
            # Somebody who is still there could write what isn't damaged then.
            self._wake()
            self._end_woken()
            done = damage_lib.damage(self._workdir, kind, self._last + 1, self._rng)
            if done is not None:
                break
        self.damages.append(done)
        self.toll.corruptions[done.kind] += 1
        if not done.steps:
            self._last += 1
            (code,) = self._lives.finish(self._last)
            log = self._lives.log(self._last)
            assert code == STORAGE and "is whole, but some were" in log, (code, log)
            left, lease = damage_lib.tree(self._workdir), {damage_lib.LEASE: b""}
            assert left | lease == done.now() | lease, f"{left.keys() ^ done.now().keys()} changed"
            done.restore(self._workdir)

    def check_starts(self) -> None:
        """Each life that followed a damage must have gone on from the newest whole checkpoint."""
        starts = self.starts
        for each in self.damages:
            life = next(life for life in sorted(starts) if life >= each.life)
            # Where lives were killed before they had started, more may have been damaged.
            last = [damage for damage in self.damages if damage.life <= life][-1]
            if each is last and each.steps:
                assert starts[life] in each.steps, (each.kind, starts[life], each.steps)


def _signal(process: Life, number: signal.Signals) -> None:
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, number)


def _wait_for(
    moment: str,
    rng: random.Random,
    diary: pathlib.Path,
    processes: Sequence[Life],
    usual: float,
) -> bool:
    """Returns when a process is to be killed, or one has ended; whether that was in time."""

    def count(what: str) -> int:
        return [event[0] for event in events(diary)].count(what)

    if moment == "any":
        # But for three saves at most, so that it is known how long a run must be.
        ends, saves = time.monotonic() + rng.uniform(0, 1.5 * usual), count("save") + 3
        return _until(lambda: time.monotonic() > ends or count("save") >= saves, processes)
    often = 1 if moment in ("restore", "lease") else count(moment) + rng.randint(1, 2)
    came = _until(lambda: count(moment) >= often, processes)
    time.sleep(0 if moment == "lease" else rng.uniform(0, rng.choice((0.03, 0.3))))
    return came


def _until(condition: Callable[[], bool], processes: Sequence[Life]) -> bool:
    """Waits for a condition or the end of a process; whether it came in time."""
    ends = time.monotonic() + _LIMIT_SEC
    while not condition() and all(process.exitcode is None for process in processes):
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def _end(processes: Sequence[Life], victim: int) -> list[int]:
    """Exit codes of the other workers, which must end by themselves."""
    return [code_of(p, 150) for index, p in enumerate(processes) if index != victim]


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


# ------------------------------------------------------------------------------ all of it


def disturbed(
    folder: pathlib.Path,
    *,
    kills: int,
    pauses: int = 0,
    corruptions: int = 0,
    steps: int,
    light: bool = False,
    workers: int = 1,
    emulator: Emulator | None = None,
    bucket: str = "",
    seed: int = 0,
) -> Toll:
    """Trains twice, once undisturbed, and compares.

    Args:
      folder: empty.
      kills: how often to kill, at least.
      pauses: how often to stop the process and have another one take over.
      corruptions: how often to damage what a killed process has left.
      steps: length of the run.
      light: whether the steps are without arithmetic.
      workers: processes of each life; one if there are pauses or corruptions.
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
        [*flags, f"--data={DATA}", f"--workdir={folder / 'quiet'}"],
        folder / "a",
        workers,
        light=light,
    )
    if emulator is not None:
        data, workdir = f"{bucket}/data", f"{bucket}/run"
        environment |= emulator.environment()
        for name in storage.listdir(storage.resolve(DATA)):
            content = storage.read_bytes(storage.join(storage.resolve(DATA), name))
            storage.write_bytes_atomic(f"{data}/{name}", content)
    lives = Lives(
        [*flags, f"--data={data}", f"--workdir={workdir}"],
        folder / "b",
        workers,
        environment,
        light,
    )
    quiet.folder.mkdir()
    lives.folder.mkdir()
    codes = quiet.finish(0)
    assert not any(codes), quiet.log(0)
    usual = float(next(e[1] for e in events(quiet.diary(0, 0)) if e[0] == "ready"))
    chaos = Chaos(lives, workdir, seed, usual)
    toll = chaos.toll
    with _faults(emulator):
        chaos.run(kills, pauses, corruptions)
        if emulator is not None:
            counts = emulator.counts()
            toll.faults = {key[1]: n for key, n in counts.items() if key[0] == "fault"}
    wanted, found = images(quiet), images(lives)
    toll.records_lost = sum(found.get(number) != checksums for number, checksums in wanted.items())
    toll.records_lost += len(found.keys() - wanted.keys())
    chaos.check_starts()
    positions = {life: step * BATCH for life, step in chaos.starts.items()}
    damage_lib.compare(workdir, str(folder / "quiet"), chaos.damages, positions)
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


def main() -> None:
    """Shows the toll."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pauses", type=int, default=0)
    parser.add_argument("--corruptions", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="steps without arithmetic")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--local", action="store_true", help="not on gs://")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        emulator = None if arguments.local else stack.enter_context(Emulator())
        if emulator is not None:
            os.environ.update(emulator.environment())
        toll = disturbed(
            pathlib.Path(name),
            kills=arguments.kills,
            pauses=arguments.pauses,
            corruptions=arguments.corruptions,
            steps=arguments.steps,
            light=arguments.light,
            workers=arguments.workers,
            emulator=emulator,
            bucket=emulator.url("chaos") if emulator is not None else "",
            seed=arguments.seed,
        )
    print(f"the same in every bit: {toll}")


if __name__ == "__main__":
    main()
