"""Renders images with a trained network: --run, --seeds, --out.

Single images and a labelled grid, a style-mixing sheet, or a latent walk.

  python -m trainer generate --run=runs/emoji --seeds=0-15 --truncation_psi=0.7 --out=out
  python -m trainer generate --run=runs/emoji --mix_rows=0-3 --mix_cols=8-11 --out=out
  python -m trainer generate --run=runs/emoji --walk=0-5 --video=walk.gif --out=out

Seed n is the latent `np.random.RandomState(n).randn(1, z_dim)`, as in NVIDIA's tools, and makes the
same image alone or among others. Files of the same name in --out are replaced.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.core import flags

if __name__ == "__main__":
    flags.guard_imports()

import numpy as np
from absl import flags as absl_flags

from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.core.text import printable
from trainer.telemetry import images as grids
from trainer.telemetry import video

# TensorFlow takes seconds to import; mistakes in the call are told before.
if TYPE_CHECKING:
    from trainer.serving.rendering import Numbers, Renderer

FLAGS = absl_flags.FLAGS
_MAX_SEEDS = 1_000_000


def parse_seeds(text: str, flag: str = "seeds") -> list[int]:
    """A list such as "0-3,7" as numbers, in the order given.

    Raises:
      UsageError: it is no such list, or no seed NumPy takes (0 to 2**32 - 1).
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**32 or len(numbers) + last - first >= _MAX_SEEDS:
            raise UsageError(
                f"--{flag}={text}: {part.strip()!r} is no number or rising range below 2**32 "
                f"(at most {_MAX_SEEDS:,} in all), as in 0-15,20"
            )
        numbers.extend(range(first, last + 1))
    return numbers


def choose_classes(wanted: str | None, labels: Sequence[str]) -> list[int]:
    """The classes to render: one for a name or an index, all for "all", [-1] without classes.

    Args:
      wanted: what --class says, None when it is absent. A name goes before an index.
      labels: names of the classes by index.

    Raises:
      UsageError: there is no such class, or --class is missing or not applicable.
    """
    if wanted == "all" and labels and wanted not in labels:
        return list(range(len(labels)))
    from trainer.serving import rendering

    return [rendering.choose_class(wanted, labels, option="--class", also="all, ")]


def write_images(
    renderer: Renderer, seeds: Numbers, classes: Numbers, names: Sequence[str], out: str
) -> list[str]:
    """Writes an image for each seed and class, and `grid.png` with captions.

    Files are `seed0000.png`, with several classes `class003-seed0000.png`. The grid has one row
    for each class, or is about square, and shows the first 256. Returns the paths, the grid last.
    """
    cells = [(label, seed) for label in classes for seed in seeds]
    paths: list[str] = []
    tiles: list[np.ndarray] = []
    pictures = renderer.images([seed for _, seed in cells], [label for label, _ in cells])
    for (label, seed), image in zip(cells, pictures, strict=True):
        prefix = f"class{label:03d}-" if len(classes) > 1 else ""
        paths.append(storage.join(out, f"{prefix}seed{seed:04d}.png"))
        grids.save_image(paths[-1], image)
        if len(tiles) < grids.MAX_TILES:
            tiles.append(image)
    lines = ["", *(f"\n{name}" for name in names)]  # label -1 means no class
    captions = [f"seed {seed}{lines[label + 1]}" for label, seed in cells[: len(tiles)]]
    cols = len(seeds) if len(classes) > 1 else math.ceil(math.sqrt(len(tiles)))
    paths.append(storage.join(out, "grid.png"))
    grids.save_image(paths[-1], grids.labelled_sheet(tiles, captions, min(cols, len(tiles))))
    return paths


def coarse_layers(num_ws: int) -> list[int]:
    """The layers that a mixing sheet takes from the column by default.

    The same share of all as in NVIDIA's style_mixing.py, the first 7 of the 18 at 1024x1024.

    Args:
      num_ws: layers that take a style.
    """
    return list(range(max(1, round(num_ws * 7 / 18))))


def write_mixing_sheet(
    renderer: Renderer, rows: Numbers, cols: Numbers, layers: Numbers | None, label: int, out: str
) -> str:
    """Writes `mixing.png`: columns' images on top, rows' at the left, their mixtures between.

    A mixture has the row's styles, but in `layers` the column's (Karras et al. 2019, section 3.1);
    None means `coarse_layers`. Returns the path.

    Raises:
      UsageError: the network has no such layer, or no styles.
    """
    last = renderer.num_ws - 1
    if not last:
        raise UsageError("--mix_rows: this network has no styles to mix; use --seeds or --walk")
    chosen = coarse_layers(renderer.num_ws) if layers is None else layers
    if max(chosen) > last:
        raise UsageError(
            f"--mix_layers: the layers of this network are 0-{last}, not {max(chosen)}"
        )
    ws = renderer.ws([*rows, *cols], [label] * (len(rows) + len(cols)))
    row_ws, col_ws = ws[: len(rows)], ws[len(rows) :]
    mixed = np.repeat(row_ws[:, np.newaxis], len(cols), axis=1)
    mixed[:, :, chosen] = col_ws[np.newaxis][:, :, chosen]
    top = list(renderer.render(col_ws, cols))
    tiles = [np.full_like(top[0], 255), *top]
    captions = ["", *(f"seed {seed}" for seed in cols)]
    for seed, row, mixtures in zip(rows, row_ws, mixed, strict=True):
        tiles += renderer.render(
            np.concatenate([row[np.newaxis], mixtures]), [seed] * (1 + len(cols))
        )
        captions += [f"seed {seed}", *[""] * len(cols)]
    path = storage.join(out, "mixing.png")
    grids.save_image(path, grids.labelled_sheet(tiles, captions, len(cols) + 1))
    return path


def write_walk(
    renderer: Renderer, seeds: Numbers, label: int, path: str, *, frames: int, fps: float
) -> None:
    """Writes a closed walk through the images of some seeds, `frames` from one to the next."""
    walk = np.stack(list(video.closed_spline(renderer.ws(seeds, [label] * len(seeds)), frames)))
    video.save_video(path, renderer.render(walk, range(len(walk))), fps)


def define_flags(values: absl_flags.FlagValues = FLAGS) -> None:
    """Makes the command's flags: in a function, so that commands can be imported together."""
    text = functools.partial(absl_flags.DEFINE_string, flag_values=values)
    number = functools.partial(absl_flags.DEFINE_integer, flag_values=values)
    real = functools.partial(absl_flags.DEFINE_float, flag_values=values)
    text("run", None, "Directory of a run; its newest checkpoint is used.")
    text("checkpoint", None, "Directory of one checkpoint, used instead of --run.")
    text("out", None, "Directory to write to, made if need be; may be a gs:// path.")
    text("seeds", "0-15", "Images to render, as in 0-15,20.")
    real("truncation_psi", 1.0, "1: all it has learned; 0: the average image.")
    number("truncation_cutoff", None, "Truncate only so many of the first layers.")
    text("class", None, "Name or index of a class, or all: one row for each.")
    absl_flags.DEFINE_enum(
        "noise_mode", "const", ["const", "random", "none"], "Noise inputs.", flag_values=values
    )
    number("batch", 8, "Images at a time; fewer need less memory.", lower_bound=1)
    text("mix_rows", None, "Style mixing: seeds of the rows.")
    text("mix_cols", None, "Style mixing: seeds of the columns.")
    text(
        "mix_layers",
        None,
        "Style mixing: layers taken from the column, as 0-3; else the first, 7 of 18 at 1024x1024 "
        "and 3 of 8 at 32x32.",
    )
    text("walk", None, "Latent walk: seeds to pass, closed to a loop.")
    text("video", "walk.mp4", "Latent walk: a name in --out, *.mp4, *.gif or *.webp.")
    number("frames", 60, "Latent walk: frames from one seed to the next.", lower_bound=1)
    real("fps", 30.0, "Latent walk: frames per second.", lower_bound=1.0, upper_bound=120.0)


def main(_: Sequence[str]) -> None:
    """Renders what the flags ask for and prints of which checkpoint, and where it is.

    Raises:
      UsageError: the flags do not fit together, or not the network.
      CheckpointError: there is no checkpoint.
    """
    seeds = _check_flags()
    from trainer.serving import rendering

    trained = rendering.load(
        FLAGS.checkpoint or FLAGS.run, noise_mode=FLAGS.noise_mode, batch=FLAGS.batch
    )
    print(f"G_ema of step {trained.step}, {trained.kimg:g} kimg ({printable(trained.checkpoint)})")
    label, *more = classes = choose_classes(FLAGS["class"].value, trained.labels)
    if more and ("mix_rows" in seeds or "walk" in seeds):
        raise UsageError("--class=all is for single images; a sheet or a walk has one class")
    renderer = trained.renderer.truncated(FLAGS.truncation_psi, FLAGS.truncation_cutoff)
    out = storage.resolve(FLAGS.out)
    storage.makedirs(out)
    if "mix_rows" in seeds:
        rows, cols, layers = seeds["mix_rows"], seeds["mix_cols"], seeds.get("mix_layers")
        written = write_mixing_sheet(renderer, rows, cols, layers, label, out)
    elif "walk" in seeds:
        written = storage.join(out, FLAGS.video)
        write_walk(renderer, seeds["walk"], label, written, frames=FLAGS.frames, fps=FLAGS.fps)
    else:
        *images, grid = write_images(renderer, seeds["seeds"], classes, trained.labels, out)
        written = f"{len(images)} images and {grid}"
    print(f"wrote {printable(written)}")


_LIST_FLAGS = ("seeds", "mix_rows", "mix_cols", "mix_layers", "walk")


def _check_flags() -> dict[str, list[int]]:
    """The lists that were given, once the flags fit together: before anything is loaded."""
    if not FLAGS.out or not (FLAGS.run or FLAGS.checkpoint):
        raise UsageError("--out and one of --run and --checkpoint are needed")
    given = {name: FLAGS[name].value for name in _LIST_FLAGS if FLAGS[name].value is not None}
    lists = {name: parse_seeds(text, name) for name, text in given.items()}
    if ("mix_rows" in lists) != ("mix_cols" in lists):
        raise UsageError("style mixing needs both --mix_rows and --mix_cols")
    if "mix_rows" in lists and "walk" in lists:
        raise UsageError("--mix_rows and --walk make different things: ask for one of them")
    if "walk" in lists:
        video.format_of(FLAGS.video)
        if len(lists["walk"]) < 2:
            raise UsageError(f"--walk={FLAGS.walk}: a walk needs two seeds or more")
    return lists


if __name__ == "__main__":
    from trainer.distribution import host

    host.prepare()
    define_flags()
    flags.run(main, usage=__doc__ or "")
