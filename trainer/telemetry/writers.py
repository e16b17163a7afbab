"""Writers of a tick: a console line, a line of `stats.jsonl`, scalars in TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np

from trainer.core import storage
from trainer.core.text import code_block
from trainer.telemetry import resources, statsfile
from trainer.telemetry.advice import Advice
from trainer.telemetry.console import Console
from trainer.telemetry.statsfile import Stat, constant
from trainer.telemetry.tensorboard import TensorBoard

_STATS = "stats.jsonl"


class Telemetry:
    """Reports one run. Only one process of a run may hold one: the chief.

    What an earlier process wrote about ticks after the point of resumption is taken back when this
    is made, so that neither `stats.jsonl` nor TensorBoard holds a tick twice.

    Args:
      workdir: directory of the run; gets `stats.jsonl`.
      tensorboard: directory for TensorBoard's events, '' for none.
      files: what there is in the workdir, by `storage.walk`; looked up if it isn't given.
      total_kimg: length of the run, for the ETA and the bar.
      tick_kimg: length of a tick; TensorBoard's steps are kimg, and images where it is below 1.
      resume_kimg: where this process goes on, 0 for a new run.
      resume_tick: the first tick it reports.
      verbose: print whole tick lines on a terminal, too.
      fence: around every change of a file.

    Raises:
      StorageError: `stats.jsonl` cannot be read or written.
    """

    def __init__(
        self,
        workdir: str,
        *,
        tensorboard: str,
        files: Mapping[str, storage.Digest] | None = None,
        total_kimg: float,
        tick_kimg: float = 4.0,
        resume_kimg: float = 0.0,
        resume_tick: int = 0,
        verbose: bool = False,
        fence: storage.Fence = contextlib.nullcontext,
    ):
        self._nimg = round(resume_kimg * 1000)
        stats = storage.join(workdir, _STATS)
        if files is None or _STATS in files:
            self._stats = statsfile.open_after(stats, self._nimg, fence)
        else:
            self._stats = storage.AppendedFile(stats, b"", None, fence)
        if tails := list(filter(storage.TAIL.fullmatch, files or ())):
            storage.remove_files(storage.join(workdir, name) for name in tails)
        self._tensorboard = None
        if tensorboard:
            sizes, below = _sizes_in(tensorboard, workdir, files)
            self._tensorboard = TensorBoard(
                tensorboard,
                resume_tick,
                sizes,
                run="" if below else workdir,
                images_per_step=1000 if tick_kimg >= 1 else 1,
                fence=fence,
            )
        self._console = Console(total_kimg, self._nimg, verbose=verbose)
        self._advice = Advice()

    def tick(
        self,
        stats: Mapping[str, Stat],
        *,
        tick: int,
        nimg: int,
        augment_p: float,
        r1_gamma: float,
        total_sec: float,
        tick_sec: float,
        maintenance_sec: float,
    ) -> None:
        """Reports one tick.

        Args:
          stats: what training measured in it, by NVIDIA's names: `Loss/scores/real`,
            `Loss/signs/real`, `Loss/G/loss`, `Loss/r1_penalty`, ... A tick with a snapshot has
            `Progress/variety`, too, see `Snapshots.variety`.
          tick: number of the tick, counted from the start of the run.
          nimg: position of the run in images.
          augment_p: augmentation probability now.
          r1_gamma: weight of the R1 penalty now, 0 for none.
          total_sec: wall time of the whole run, earlier processes included.
          tick_sec: wall time of this tick.
          maintenance_sec: wall time between the last tick and this: snapshots, checkpoints.

        Raises:
          StorageError: `stats.jsonl` cannot be written.
        """
        images, self._nimg = nimg - self._nimg, nimg
        values = {
            "Progress/tick": tick,
            "Progress/kimg": nimg / 1000,
            "Progress/augment": augment_p,
            "Timing/total_sec": total_sec,
            "Timing/sec_per_tick": tick_sec,
            "Timing/sec_per_kimg": tick_sec / images * 1000 if images > 0 else float("nan"),
            "Timing/maintenance_sec": maintenance_sec,
            "Resources/cpu_mem_gb": resources.host_memory_gb(),
            "Resources/peak_mem_gb": resources.peak_host_memory_gb(),
        }
        gpu = resources.peak_gpu_memory_gb()
        if gpu is not None:
            values["Resources/peak_gpu_mem_gb"] = gpu
        merged = {**stats, **{name: constant(value) for name, value in values.items()}}
        self._console.tick(merged)
        for text in self._advice.update(nimg / 1000, stats, augment_p=augment_p, r1_gamma=r1_gamma):
            self._console.line(text)
        self._stats.add(statsfile.line(merged, tick=tick, nimg=nimg))
        if self._tensorboard is not None:
            self._tensorboard.scalars(merged, nimg)

    def image(self, name: str, image: np.ndarray, kimg: float) -> None:
        """Shows a [H, W, C] uint8 image, such as `images.tile` makes, in TensorBoard, with the last tick."""
        if self._tensorboard is not None:
            self._tensorboard.image(name, image, round(kimg * 1000))

    def config(self, yaml: str) -> None:
        """Shows the config of a new run in TensorBoard, as text."""
        if self._tensorboard is not None:
            self._tensorboard.text("Config", code_block(yaml, "yaml"), 0)

    def line(self, text: str) -> None:
        """Prints a line that does not run into the progress bar."""
        self._console.line(text)

    def progress(self, nimg: int) -> None:
        """Moves the progress bar, if there is a terminal to show it."""
        self._console.progress(nimg)

    def flush(self) -> None:
        """Writes what is held back; to be called before a checkpoint counts on it."""
        self._stats.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Takes the bar away and writes what is held back."""
        self._console.close()
        self._stats.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _sizes_in(
    folder: str, workdir: str, files: Mapping[str, storage.Digest] | None
) -> tuple[dict[str, int] | None, bool]:
    """Bytes of what there is in a folder, None if they aren't known; whether it is in the workdir."""
    root, start = storage.join(workdir, ""), storage.join(folder, "")
    below = start.startswith(root)
    if files is None or not below:
        return None, below
    start = start[len(root) :]
    return {n[len(start) :]: d.bytes for n, d in files.items() if n.startswith(start)}, below
