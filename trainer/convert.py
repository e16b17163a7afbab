"""Makes a data set of a folder or archive of images: --source, --dest, --resolution.

The command behind `python -m trainer convert`; the work is done in `trainer.data.conversion`.
"""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Sequence

from trainer.core import flags as command

if __name__ == "__main__":
    command.guard_imports()

from absl import flags
from tqdm import tqdm

from trainer import data
from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.core.text import image_size, parse_image_size, printable
from trainer.data import beam, conversion, images, manifest
from trainer.distribution import host
from trainer.families import registry

USAGE = """Convert a folder or zip archive of images into sharded TFRecords with a manifest.

  python -m trainer convert --source=photos/ --dest=data/photos256 --resolution=256
  python -m trainer convert --source=gs://bucket/photos.zip --dest=gs://bucket/photos \\
      --resolution=256x128 --labels=folders --channels=rgb --background=white
  python -m trainer convert --source=gs://bucket/photos --dest=gs://bucket/photos256 \\
      --resolution=256 --runner=DataflowRunner --beam=project=mine --beam=region=europe-west4 \\
      --beam=temp_location=gs://bucket/beam --beam=setup_file=./setup.py

PNG, JPEG, WebP, BMP and TIFF files are found by their names, in folders of any depth; what is passed
over, as hidden files are, is counted and named at the end. Images that already are what is asked for
keep their coded pixels, without metadata; all others become PNGs. Damaged images, animations, kinds
whose pixels are not certain, links to nothing and folders that cannot be listed stop the conversion
by name, or are left out with --on_bad=skip. Run the same command again after an interruption, and it
goes on."""

_CHANNELS = {"auto": 0, "gray": 1, "rgb": 3, "rgba": 4}
_LINE_SECONDS = 30
_SHOWN = 3
_MOST_FOR_SMALL = 1024  # pixels a side: above, the small network has no channels left

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("source", None, "Folder or zip archive of images; local or a URL.")
    flags.DEFINE_string("dest", None, "Directory of the data set to make; local or a URL.")
    flags.DEFINE_string("resolution", None, "Size of the images: 64, or WIDTHxHEIGHT as 256x128.")
    flags.DEFINE_enum(
        "crop",
        "center",
        images.CROPS,
        "'center' cuts the largest centred part of the right shape (an image smaller than "
        "--resolution is an error); 'none' scales the whole image, up or down, and stretches it "
        "where the shapes differ.",
    )
    flags.DEFINE_enum("filter", "lanczos", list(images.FILTERS), "How images are scaled.")
    flags.DEFINE_enum(
        "channels",
        "auto",
        list(_CHANNELS),
        "What the images become. 'auto' takes them as they are; they must all be alike.",
    )
    flags.DEFINE_string(
        "background", "", "Colour to lay under transparent pixels: a name as white, or '#rrggbb'."
    )
    flags.DEFINE_string(
        "labels",
        "auto",
        "Classes: 'folders' (the folder an image lies in), 'none', or the path of a JSON, "
        '{"labels": [["a/b.png", 3], ...]}. \'auto\' takes the source\'s dataset.json if there is one.',
    )
    flags.DEFINE_integer(
        "shards",
        0,
        "Record files to make; the number of hosts must divide it. 0: a power of two, at least 8, for "
        "100 to 200 MB each.",
        lower_bound=0,
    )
    flags.DEFINE_integer("seed", 0, "Of the shuffle.", 0, 2**63 - 1)
    flags.DEFINE_integer(
        "max_images", 0, "Convert a random part of so many images; 0: all.", lower_bound=0
    )
    flags.DEFINE_enum(
        "on_bad",
        "stop",
        ["stop", "skip"],
        "What to do about an image that cannot be used, a link to nothing or a folder that cannot be "
        "listed. The manifest lists those skipped.",
    )
    flags.DEFINE_integer(
        "max_bad", 100, "With --on_bad=skip: stop when more than so many are bad.", lower_bound=0
    )
    flags.DEFINE_integer("workers", 0, "Processes; 0: one for each processor.", lower_bound=0)
    flags.DEFINE_enum(
        "runner",
        None,
        list(beam.RUNNERS),
        "Let Apache Beam do it, on Dataflow by many machines; the result is the same. By default "
        "--workers processes of this machine do it.",
    )
    flags.DEFINE_multi_string("beam", [], "An option for Beam, as region=europe-west4.")
    flags.DEFINE_bool("overwrite", False, "Replace the data set at --dest.")


def check_resolution(text: str, resolution: tuple[int, int]) -> None:
    """Refuses what no network can be made for, before hours of work.

    Args:
      text: the resolution as it was given.
      resolution: (height, width).

    Raises:
      UsageError: names the nearest sizes that work.
    """
    sizes = registry.nearest_resolutions(*resolution)
    if resolution not in sizes:
        nearest = ", ".join(map(image_size, sizes))
        raise UsageError(
            f"--resolution={text}: no network can be trained on it; the nearest are {nearest}"
        )


class _Progress:
    """A bar on a terminal, else a line every half minute."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, earlier: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, initial=earlier, unit="img", smoothing=0.05)
            self._bar.update(done + earlier - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= _LINE_SECONDS or (done == 0 and earlier):
            self._last = now
            self._line(done, earlier, total, now - self._start)

    def _line(self, done: int, earlier: int, total: int, seconds: float) -> None:
        line = f"{done + earlier} of {total} images"
        if done:
            left = (total - earlier - done) * seconds / done
            line += f", {done / seconds:.0f} images/s, {left:.0f} s left"
        else:
            line += " were done before; going on"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _settings() -> conversion.Settings:
    for name in ("source", "dest", "resolution"):
        if not FLAGS[name].value:
            raise UsageError(f"--{name} is missing; --help shows how to call this")
    resolution = parse_image_size(FLAGS.resolution, "--resolution")
    check_resolution(FLAGS.resolution, resolution)
    return conversion.Settings(
        source=FLAGS.source,
        dest=FLAGS.dest,
        options=images.ImageOptions(
            resolution=resolution,
            channels=_CHANNELS[FLAGS.channels],
            crop=FLAGS.crop,
            filter=FLAGS.filter,
            background=FLAGS.background,
        ),
        labels=FLAGS.labels,
        shards=FLAGS.shards,
        seed=FLAGS.seed,
        max_images=FLAGS.max_images,
        skip_bad=FLAGS.on_bad == "skip",
        max_bad=FLAGS.max_bad,
        workers=FLAGS.workers or data.processors(),
        overwrite=FLAGS.overwrite,
    )


def _print_result(result: manifest.Manifest, report: conversion.Report) -> None:
    print(
        f"{printable(result.directory)}: {result.num_images} images "
        f"{image_size(result.resolution, result.channels)}, {result.num_classes or 'no'} classes, "
        f"{len(result.shards)} shards, "
        f"{sum(shard.bytes for shard in result.shards) / 1e6:.1f} MB"
    )
    notes = {
        "kept their own bytes": report.kept,
        "were scaled up": report.enlarged,
        "were stretched": report.stretched,
        "could not be used and were left out (the manifest lists them)": len(result.skipped),
    }
    for note, count in notes.items():
        if count:
            print(f"images that {note}: {count}")
    for each in result.skipped[:_SHOWN]:
        print(f"left out: {printable(each['name'])}: {printable(each['reason'])}")
    for line in report.ignored:
        print(f"passed over: {printable(line)}")
    small = not host.has_accelerator() and max(result.resolution) <= _MOST_FOR_SMALL
    print(f"train on it: {printable(training_command(result, small=small))}")
    if small:
        print(
            "there is no GPU or TPU here, so that is a small network; with one take --config=auto"
        )
    if result.num_classes:
        print("it is conditioned on the classes; leave out data.use_labels for one that is not")


def training_command(result: manifest.Manifest, *, small: bool) -> str:
    """The training command for a data set, with a workdir that is free.

    Args:
      result: the data set.
      small: train a network that a CPU can, as README's samples were; else by NVIDIA's rules.
    """
    workdir, count = f"runs/{result.name}", 1
    while storage.exists(workdir):  # another run's
        count += 1
        workdir = f"runs/{result.name}-{count}"
    command_line = ["python", "-m", "trainer", "train", f"--config={'smoke' if small else 'auto'}"]
    command_line += [f"--data={result.directory}", f"--workdir={workdir}"]
    settings = ["data.use_labels=true"] if result.num_classes else []
    settings += ["augment.mode=ada", "training.total_kimg=200"] if small else []
    return shlex.join([*command_line, *(f"--set={setting}" for setting in settings)])


def main(argv: Sequence[str]) -> None:
    """Runs the command; `argv` is the program's name."""
    del argv
    progress = _Progress()
    runner = None
    if FLAGS.runner:
        runner = functools.partial(beam.convert, runner=FLAGS.runner, options=FLAGS.beam)
    try:
        result, report = conversion.convert(_settings(), progress, runner)
    finally:
        progress.close()
    _print_result(result, report)


def entry() -> None:
    """The console script."""
    host.quieten_tensorflow()
    define_flags()
    command.run(main, usage=USAGE)


if __name__ == "__main__":
    entry()
