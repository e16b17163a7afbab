"""The processes of a small run that is disturbed: see `tests.training.chaos`.

Each is the training command, which notes in a diary what it does. All are forked from one process
that has imported TensorFlow, since that takes most of the time of a short life.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import multiprocessing
import multiprocessing.context
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.training.placement import environments
from trainer.core import storage

ROOT = pathlib.Path(__file__).parents[2]
DATA = "package:data/fluent_emoji_32"
BATCH, GROUP, EVERY = 8, 4, 3
CONFIG = f"""
run: {{jit: "off", deterministic: true, seed: 3, worker_timeout: 60, join_timeout: 60}}
data: {{use_labels: true, window: 64}}
model: {{z_dim: 8, w_dim: 8, mapping_layers: 1, d_mapping_layers: 1, channel_base: 64,
  channel_max: 8}}
training: {{batch_size: {BATCH}, group_size: {GROUP}}}
objective: {{g_reg_interval: 2, d_reg_interval: 3}}
augment: {{mode: ada, pipe: b, p: 0.3, interval: 2, adjust_kimg: 0.16}}
checkpoint: {{every_steps: {EVERY}, keep_last: 2}}
telemetry: {{tick_kimg: {4 * BATCH / 1000}, snap_ticks: 10}}
"""
# Seconds: others take a lease over so long after its last sign of life, and wait so long for a lock.
RENEW, STALE, LOCK = 0.5, 2.0, 2.0
# Of a step without arithmetic: so that it takes some time to get from one save to the next.
LIGHT_STEP = 0.05


Life = multiprocessing.context.ForkServerProcess


@dataclass(frozen=True)
class Lives:
    """The processes of a run, one worker's or several workers', from start to death.

    Attributes:
      flags: of the training command.
      folder: for the diaries and logs.
      workers: how many.
      environment: of all.
      light: whether their steps are without arithmetic.
    """

    flags: Sequence[str]
    folder: pathlib.Path
    workers: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    light: bool = False

    def start(self, life: int) -> list[Life]:
        """One process for each worker."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.training.lives", "trainer.training.loop"])
        started = []
        for index, environment in enumerate(environments(self.workers)):
            diary, log = str(self.diary(life, index)), str(self.folder / f"log-{life}-{index}")
            process = context.Process(
                target=_live,
                args=(log, {**environment, **self.environment}, diary, [*self.flags], self.light),
            )
            process.start()
            started.append(process)
        return started

    def finish(self, life: int) -> list[int]:
        """Exit codes of a life that nobody disturbs."""
        processes = self.start(life)
        try:
            return [code_of(process, 900) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()

    def diary(self, life: int, index: int) -> pathlib.Path:
        """What a process notes of itself."""
        return self.folder / f"diary-{life}-{index}"

    def log(self, life: int) -> str:
        """What the processes of a life printed."""
        return "\n".join(
            (self.folder / f"log-{life}-{index}").read_text() for index in range(self.workers)
        )


def code_of(process: Life, seconds: float) -> int:
    """The exit code of a process that must end in time."""
    process.join(seconds)
    assert process.exitcode is not None, f"process {process.pid} has not ended in {seconds:g} s"
    return process.exitcode


def events(diary: pathlib.Path) -> list[list[str]]:
    """The lines of a diary, but for one that a death has torn."""
    if not diary.exists():
        return []
    return [line.split() for line in diary.read_text().split("\n")[:-1]]


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


# ------------------------------------------------------------------------------ one of them


def _train(diary: str, flags: list[str], *, light: bool) -> None:
    """The training command, which notes in a diary what it does."""
    began = time.monotonic()
    import tensorflow as tf

    from trainer import task
    from trainer.core import flags as flags_lib
    from trainer.core import lease as lease_lib
    from trainer.data.pipeline import ImageStream
    from trainer.telemetry.writers import Telemetry
    from trainer.training.checkpoint import Checkpoints
    from trainer.training.step import TrainStep

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

    def acquired(*args: Any, **kwargs: Any) -> Any:
        lease = acquire(*args, **kwargs, renew_sec=RENEW, stale_sec=STALE)
        note("lease")
        return lease

    acquire, lease_lib.acquire = lease_lib.acquire, acquired
    storage._LOCK_SECONDS = LOCK
    if light:
        TrainStep.__call__ = _light_step  # type: ignore[method-assign]
    ready: list[float] = []
    ImageStream.__init__ = created  # type: ignore[method-assign]
    ImageStream.__next__ = recorded  # type: ignore[method-assign]
    sys.argv[1:] = flags
    task.define_flags()
    flags_lib.run(task.main, usage="")


def _light_step(self: Any, images: Any, labels: Any, group_index: Any) -> dict[str, Any]:
    """Changes a variable of each kind by what it sees, and by the order in which it sees it."""
    time.sleep(LIGHT_STEP)
    seen = b"".join(each.numpy().tobytes() for each in (images, labels, group_index))
    change = zlib.crc32(seen) / 2**32
    state = self._state
    for table in (state.g, state.d, state.g_ema, state.g_first, state.d_second):
        variable = next(reversed(table.values()))
        variable.assign(variable * 0.75 + change / 8)
    state.augment_p.assign(change)
    for total in state.stats.values():
        total.assign_add([1.0, change, change**2])
    state.images.assign_add(BATCH)
    state.step.assign_add(1)
    return {}


def _live(
    log: str, environment: Mapping[str, str], diary: str, flags: list[str], light: bool
) -> None:
    """One process, from its start to its end."""
    for number in (1, 2):
        with open(log, "a") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    try:
        _train(diary, flags, light=light)
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
