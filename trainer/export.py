"""Makes a SavedModel of a trained network, which needs nothing of this package: --run, --dest.

  python -m trainer export --run=runs/emoji --dest=runs/emoji/export
  python -m trainer export --run=gs://bucket/run --dest=gs://bucket/models/emoji --jit=gpu
  python -m trainer export --checkpoint=runs/emoji/checkpoints/step-000012500 --dest=models/emoji

Each call makes a new version, --dest/1, --dest/2 ..., as TensorFlow Serving expects; Vertex AI takes
one of them as its artifact URI. It holds the SavedModel of the moving average G_ema, and
MODEL_CARD.md and model_card.json, which say what it is and how to call it. Its signatures:

  serving_default  seed or z, label, truncation_psi, noise_mode -> uint8 images
  png              the same -> PNG files, for HTTP clients
  mapping          z, c, truncation_psi -> ws
  synthesis        ws -> float32 images

Before it is published it is loaded by a process that cannot import this package, and its pixels
must be those of `python -m trainer generate` within 1/255. (In bfloat16 they are further away; how
far is printed, and in the card.) The number of images is free in each call. Seeds draw other
latents than there, since NumPy's generator is no TensorFlow op; pass z for the same image.

What a reader of --dest sees while a version is written: locally nothing, then the whole. On gs://
first a directory without saved_model.pb, which no loader takes, for moments; that file comes last.
The same is left of a process that is killed, and removed by the next export. Two exports to one
--dest exclude each other by --dest/lease.json.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from trainer.core import flags

if __name__ == "__main__":
    flags.guard_imports()

from absl import flags as absl_flags

from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.core.text import printable

FLAGS = absl_flags.FLAGS


def define_flags(values: absl_flags.FlagValues = FLAGS) -> None:
    """Makes the command's flags: in a function, so that commands can be imported together."""
    text = functools.partial(absl_flags.DEFINE_string, flag_values=values)
    choice = functools.partial(absl_flags.DEFINE_enum, flag_values=values)
    text("run", None, "Directory of a run; its newest checkpoint is used.")
    text("checkpoint", None, "Directory of one checkpoint, used instead of --run.")
    text("dest", None, "Directory of the model's versions, made if need be; may be a gs:// path.")
    choice(
        "precision",
        "float32",
        ["float32", "bfloat16"],
        "How convolutions are computed; bfloat16 is for machines that are faster at it.",
    )
    choice(
        "jit",
        "off",
        ["off", "cpu", "gpu"],
        "Compile with XLA when it is loaded, for this platform: faster, after a slow first call "
        "for each number of images.",
    )
    text("data_licence", "", "Licence of the training data, for the model card.")


def main(_: Sequence[str]) -> None:
    """Exports what the flags name and prints where it is.

    Raises:
      UsageError: a flag is missing.
      CheckpointError: there is no checkpoint.
      StorageError: --dest can't be written, or another process exports there.
      DivergedError: the network is broken.
      ExportError: what was written is not the network.
    """
    if not FLAGS.dest or bool(FLAGS.run) == bool(FLAGS.checkpoint):
        raise UsageError("--dest and one of --run and --checkpoint are needed")
    # TensorFlow takes seconds to import; mistakes in the call are told before.
    from trainer.serving import saved_model
    from trainer.training import checkpoint

    found = checkpoint.find(storage.resolve(FLAGS.checkpoint or FLAGS.run))
    exported = saved_model.publish(
        checkpoint.read_parameters(found, "G_ema"),
        found.info,
        storage.resolve(FLAGS.dest),
        workdir=storage.sibling(found.path.rstrip("/"), ".."),
        precision=FLAGS.precision,
        jit=FLAGS.jit,
        data_licence=FLAGS.data_licence,
    )
    check = exported.card["export"]["check"]
    print(
        f"checked: loads in {check['load_seconds']:.1f} s, pixels at most "
        f"{check['max_difference']} and on average {check['mean_difference']:.3g} of 255 from "
        "those of `python -m trainer generate`"
    )
    print(f"wrote {printable(exported.path)}")


if __name__ == "__main__":
    from trainer.distribution import host

    host.prepare()
    define_flags()
    flags.run(main, usage=__doc__ or "")
