"""Loads a SavedModel as a stranger would, and reports what it renders.

Run by `trainer.serving.saved_model` as a script, in a process of its own that cannot import `trainer`:

    python -I export_check.py SAVED_MODEL < inputs.npz

`inputs.npz` holds `z`, `psi`, `pixels` and perhaps `label`: latents and the images expected of
them. The last line printed is JSON: the largest and the mean difference of pixels in steps of 255,
and the seconds that loading took, TensorFlow's own start left out.
"""

from __future__ import annotations

import io
import json
import sys
import time

import numpy as np


def compare(path: str, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Renders by each signature and compares with `pixels`.

    Args:
      path: of the SavedModel.
      inputs: what `inputs.npz` holds.

    Raises:
      ValueError: the signatures do not agree with each other.
    """
    import tensorflow as tf

    began = time.monotonic()
    signatures = tf.saved_model.load(path).signatures
    seconds = time.monotonic() - began
    serving, pixels = signatures["serving_default"], inputs["pixels"].astype(int)
    label = {"label": tf.constant(inputs["label"])} if "label" in inputs else {}
    common = {
        "seed": tf.constant([0], tf.int64),
        "truncation_psi": tf.constant(inputs["psi"]),
        "noise_mode": tf.constant(["const"]),
    }
    rendered = serving(z=tf.constant(inputs["z"]), **label, **common)["images"].numpy().astype(int)
    if rendered.shape != pixels.shape:
        raise ValueError(f"images of shape {rendered.shape} instead of {pixels.shape}")

    # Other numbers of images, and the other ways to the same.
    one = {name: value[:1] for name, value in label.items()}
    png = signatures["png"](z=tf.constant(inputs["z"][:1]), **one, **common)["image_bytes"]
    _agree("png", tf.io.decode_png(png[0]).numpy(), rendered[0])
    c = {}
    if label:
        width = signatures["mapping"].structured_input_signature[1]["c"].shape[1]
        c["c"] = tf.one_hot(label["label"][1:], width)
    psi = {"truncation_psi": common["truncation_psi"]}
    ws = signatures["mapping"](z=tf.constant(inputs["z"][1:]), **c, **psi)["ws"]
    images = signatures["synthesis"](ws=ws)["images"].numpy()
    _agree("synthesis", np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8), rendered[1:])
    random = common | {"noise_mode": tf.constant(["random"])}
    seeded = serving(z=tf.zeros([1, 0]), **one, **random)["images"]
    if seeded.shape != (1, *pixels.shape[1:]):
        raise ValueError(f"an image of shape {seeded.shape} from a seed")

    difference = np.abs(rendered - pixels)
    return {
        "max_difference": int(difference.max()),
        "mean_difference": float(difference.mean()),
        "load_seconds": seconds,
    }


def _agree(name: str, images: np.ndarray, rendered: np.ndarray) -> None:
    difference = np.abs(images.astype(int) - rendered)
    if difference.max() > 1:
        raise ValueError(f"{name} and serving_default differ by {difference.max()} of 255")


if __name__ == "__main__":
    sys.modules["trainer"] = None  # type: ignore[assignment]  # whoever needs it fails
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as arrays:
        print(json.dumps(compare(sys.argv[1], dict(arrays))))
