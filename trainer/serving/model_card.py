"""The model card of an exported network: for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer import config as config_lib
from trainer.core import documents, storage
from trainer.core.errors import StorageError
from trainer.core.text import code, code_block, image_size, markdown

FORMAT = 1
TEXT = "MODEL_CARD.md"


def metrics(workdir: str, step: int) -> list[dict[str, Any]]:
    """The results of each `metric-<name>.jsonl` of a run, as of a step: the last until then.

    Lines hold `results` (name to value), `step` and `kimg`; others are passed over.
    """
    if not workdir or not storage.isdir(workdir):
        return []
    found = []
    for name in storage.listdir(workdir):
        if not (name.startswith("metric-") and name.endswith(".jsonl")):
            continue
        path = storage.join(workdir, name)
        data = storage.read_range(path, 0, documents.LONGEST + 1)
        if len(data) > documents.LONGEST:
            raise StorageError(f"{path} is larger than a run's metrics can be; move it elsewhere")
        lines = map(_parsed, data.split(b"\n"))
        until = [line for line in lines if line is not None and line["step"] <= step]
        if until:
            found.append(max(until, key=lambda line: line["step"]))
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = documents.parse_object(line)
        results = {str(name): float(value) for name, value in entry["results"].items()}
        return {"results": results, "step": int(entry["step"]), "kimg": float(entry["kimg"])}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def describe(info: Mapping[str, Any], export: Mapping[str, Any]) -> dict[str, Any]:
    """The card for programs, but for the files, which come when they are written.

    Args:
      info: `state.json` of the checkpoint.
      export: `network`, `signatures`, `metrics`, `data_licence` and how it was exported (`how`).
    """
    data_path = info["config"].get("data", {}).get("path", "")
    return {
        "format": FORMAT,
        "network": export["network"],
        "training": {key: info.get(key) for key in ("step", "kimg", "images", "config_fingerprint")}
        | {"versions": info.get("versions", {}), "config": info["config"]},
        "data": {
            "path": data_path,
            "fingerprint": info.get("data_fingerprint"),
            "label_names": info["label_names"],
            "label_counts": info["label_counts"],
            "licence": export["data_licence"] or None,
        },
        "metrics": export["metrics"],
        "export": export["how"],
        "signatures": export["signatures"],
    }


# What the inputs and outputs of the signatures are; of one that has several, by its type.
_MEANINGS = {
    "seed": "of the latent where `z` has no columns, and of random noise",
    "z": "latents, standard normal",
    "label": "the class",
    "truncation_psi": "1: all it has learned; 0: the average image, if it has one",
    "noise_mode": "`const`, `random` or `none`",
    "c": "the class, one-hot",
    "ws": "styles of all layers",
    "uint8 images": "pixels",
    "float32 images": "pixels, about -1 to 1",
    "image_bytes": "PNG files",
}


def text(card: Mapping[str, Any]) -> str:
    """The card for people, in Markdown."""
    network, training, data = card["network"], card["training"], card["data"]
    resolution, channels = network["resolution"], network["channels"]
    size = image_size(resolution, channels)
    config = config_lib.to_yaml(config_lib.from_dict(training["config"], where="the checkpoint"))
    sections = [
        f"# Generator of the family {network['family']}, {size}\n",
        f"The moving average (G_ema) of a generator after {_kimg(training)}, as a TensorFlow "
        f"SavedModel: {network['parameters']:,} parameters, {_classes(data)}. It needs TensorFlow "
        "and nothing else.\n",
        "## Use\n",
        _USE.format(
            call=_call(card["signatures"]["serving_default"]["inputs"], network),
            shape=str([2, *resolution, channels]),
            label='"label": [0], ' if network["c_dim"] else "",
            c=f"tf.one_hot([0], {network['c_dim']}), " if network["c_dim"] else "",
            z_dim=network["z_dim"],
            psi=_psi(network),
        ),
        "## Signatures\n",
        *_signatures(card["signatures"]),
        _SEEDS.format(z_dim=network["z_dim"]),
        "## Export\n",
        _export(card["export"]),
        "## Data\n",
        _data(data),
        "## Metrics\n",
        _metrics(card["metrics"]),
        "## Limits\n",
        "What it renders resembles its data, faults and gaps of the data included, and may resemble "
        "single images of it. Nobody has examined it for a use; do so before you rely on it. For "
        "what its images may be used, the licence of the data matters too.\n",
        "## Training\n",
        f"Config fingerprint {code(training['config_fingerprint'])}.\n",
        code_block(config, "yaml"),
    ]
    return "\n".join(sections)


_USE = """\
```python
import numpy as np
import tensorflow as tf

model = tf.saved_model.load(".")  # the directory of this file
images = model.signatures["serving_default"](
{call}
)["images"].numpy()  # uint8 {shape}

# The image that `python -m trainer generate` makes of seed 1, by its latent and its styles.
z = np.random.RandomState(1).randn(1, {z_dim})
psi = tf.constant([{psi}])
ws = model.mapping(tf.constant(z, tf.float32), {c}truncation_psi=psi)["ws"]
image = model.synthesis(ws)["images"]  # float32, about -1 to 1, and differentiable
```

```sh
tensorflow_model_server --model_name=gan --rest_api_port=8501 --model_base_path=THE_DIRECTORY_ABOVE
curl localhost:8501/v1/models/gan:predict -d '{{"signature_name": "png", "inputs": {{{label}\
"seed": [1, 2], "z": [[]], "truncation_psi": [{psi}], "noise_mode": ["const"]}}}}'
```

Servers that know a signature's defaults do without what has one. In the row format
(`"instances"`), and with a server that makes batches, give every input a row for each image.
"""


def _psi(network: Mapping[str, Any]) -> float:
    """A usual truncation, if the network has any."""
    return 0.7 if network["truncates"] else 1.0


def _call(inputs: Mapping[str, Any], network: Mapping[str, Any]) -> str:
    """The arguments of a call for two images, each input of the signature on a line."""
    values = {
        "seed": "[1, 2]",
        "label": "[0]",
        "truncation_psi": f"[{_psi(network)}]",
        "noise_mode": '["const"]',
        "z": "[[]]",
    }
    comments = {
        "seed": "one for each image",
        "label": f"one for each image, or one for all: 0 to {network['c_dim'] - 1}",
        "noise_mode": "or random, none",
        "z": f"the latents of the seeds; or give them: [N, {network['z_dim']}]",
    }
    lines = []
    for name, spec in inputs.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        lines.append(f"    {name}=tf.constant({values[name]}, tf.{spec['dtype']}),{comment}")
    return "\n".join(lines)


_SEEDS = """\
Inputs have one row for each image, or one for all; the number of images is free.

Seed n stands for another latent than in `python -m trainer generate`, where it is NumPy's
`np.random.RandomState(n).randn(1, {z_dim})`: for the same image, pass that as `z`.
"""


def _kimg(training: Mapping[str, Any]) -> str:
    return f"{training['kimg']:g} thousand images (step {training['step']})"


def _classes(data: Mapping[str, Any]) -> str:
    names, count = data["label_names"], len(data["label_counts"])
    if not count:
        return "no classes"
    shown = ", ".join(markdown(name, 100) for name in names[:20]) + (
        ", ..." if len(names) > 20 else ""
    )
    return f"{count} classes" + (f" ({shown})" if shown else "")


def _signatures(signatures: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, signature in signatures.items():
        lines += [f"### {name}\n", "| | type | shape | |", "|---|---|---|---|"]
        for way, sign in (("inputs", ""), ("outputs", "-> ")):
            for key, spec in signature[way].items():
                dtype, shape = spec["dtype"], _shape(spec["shape"])
                meaning = _MEANINGS.get(key) or _MEANINGS[f"{dtype} {key}"]
                lines.append(f"| {sign}`{key}` | {dtype} | {shape} | {meaning} |")
        lines.append("")
    return lines


def _shape(sizes: Sequence[int | None]) -> str:
    """The first is the number of images; another that is free is that of latents, or 0."""
    free = ["N"] + ["z_dim or 0"] * (len(sizes) - 1)
    named = [name if size is None else str(size) for name, size in zip(free, sizes, strict=True)]
    return f"[{', '.join(named)}]"


def _export(how: Mapping[str, Any]) -> str:
    check = how["check"]
    compiled = "" if how["jit"] == "off" else f", compiled by XLA with the backend for {how['jit']}"
    return (
        f"Exported {how['time']} by trainer {how['trainer']} with TensorFlow {how['tensorflow']}, "
        f"computing in {how['precision']}{compiled}. Loaded in a process without the trainer, its "
        f"pixels were at most {check['max_difference']} and on average "
        f"{check['mean_difference']:.3g} of 255 from those of `python -m trainer generate`.\n"
    )


def _data(data: Mapping[str, Any]) -> str:
    lines = [
        f"- path: {code(data['path'])}",
        f"- fingerprint: {code(data['fingerprint'])}",
        f"- licence: {markdown(data['licence'] or 'not given')}",
    ]
    return "\n".join(lines) + "\n"


def _metrics(found: list[dict[str, Any]]) -> str:
    if not found:
        return "None is known.\n"
    lines = ["| | | at kimg |", "|---|---|---|"]
    for entry in found:
        lines += [
            f"| {markdown(k, 100)} | {v:g} | {entry['kimg']:g} |"
            for k, v in entry["results"].items()
        ]
    return "\n".join(lines) + "\n"


def write(folder: str, card: Mapping[str, Any], *, name: str) -> None:
    """Writes both cards into a SavedModel; the one for programs, `name`, lists all other files."""
    storage.write_text_atomic(storage.join(folder, TEXT), text(card))
    files = {file: storage.digest(storage.join(folder, file)) for file in storage.walk(folder)}
    listed = {file: {"bytes": d.bytes, "crc32c": d.crc32c} for file, d in sorted(files.items())}
    document = json.dumps({**card, "files": listed}, indent=1)
    for char in "<>&":  # pages that show it may not escape it
        document = document.replace(char, f"\\u{ord(char):04x}")
    storage.write_text_atomic(storage.join(folder, name), document)
