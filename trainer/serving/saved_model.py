"""Export of a generator to a published SavedModel, checked by a process that knows nothing
of this package. What readers see meanwhile: `trainer.serving.versions`.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import trainer
from trainer import config as config_lib
from trainer.config import Config
from trainer.core import documents, storage, tensorflow_log
from trainer.core.errors import DivergedError, StorageError, TrainerError
from trainer.distribution import host
from trainer.families.network import Generator
from trainer.families.protocol import DataShape
from trainer.serving import model_card, versions
from trainer.serving.signatures import Served
from trainer.telemetry import images as grids
from trainer.training import build, checkpoint
from trainer.training.snapshot import AtSnapshot, Snapshot

Precision = Literal["float32", "bfloat16"]
Jit = Literal["off", "cpu", "gpu"]

# How far pixels may be, in steps of 255, from those of `python -m trainer generate`.
_MAX_DIFFERENCE = 1
_MAX_MEAN_BFLOAT16 = 6.0
_CHECK_SECONDS = 900  # that a checking process may take; at 1024x1024 it takes half a minute
_CHECK_PSI = 0.7
_CHECK_SCRIPT = pathlib.Path(__file__).with_name("check.py")


class ExportError(TrainerError):
    """The written model's images differ from the network's: a bug, so nothing is published."""


@dataclass(frozen=True)
class Exported:
    """A published version.

    Attributes:
      path: its directory.
      number: its version.
      card: what `model_card.json` says, the files left out.
    """

    path: str
    number: int
    card: dict[str, Any]


def publish(
    params: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
    dest: str,
    *,
    workdir: str = "",
    precision: Precision = "float32",
    jit: Jit = "off",
    data_licence: str = "",
    log: Callable[[str], object] = print,
) -> Exported:
    """Writes, checks and publishes the next version of a model.

    The training loop can call it with the values of `G_ema` and its `info`, in a thread of its own
    if it has no time: half a minute at 1024x1024, one third of it in another process.

    Args:
      params: of G_ema, by name.
      info: `state.json` of their checkpoint.
      dest: directory of the model, local or gs://.
      workdir: of the run, for what metrics it knows.
      precision: in which convolutions are computed; in bfloat16 those of as many resolutions as
        the config names, and everything else in float32.
      jit: "cpu" or "gpu": compile with XLA, with the backend that is fast there.
      data_licence: for the model card.
      log: is told of a wait.

    Raises:
      LeaseHeldError: another process exports to `dest`.
      StorageError: `dest` can't be written.
      DivergedError: the network renders values that are not finite.
      ExportError: the SavedModel is not the network.
    """
    config, data = _origin(info)
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    trained = build.networks(config, data, rounded=False)[0]
    latents = _latents(trained)
    pixels = _render(trained, params, latents)
    network = _network(config, data, precision, jit)
    with versions.draft(dest, scratch=checkpoint.scratch, log=log) as draft:
        try:
            served = Served(network, params, jit=jit != "off")
            _save(served, draft.folder)
        except (tf.errors.OpError, OSError) as error:
            raise StorageError(
                f"the SavedModel could not be written to {draft.folder} "
                f"({str(error).splitlines()[0]}); free space or choose another --dest"
            ) from error
        check = _check(draft.folder, latents, pixels, precision)
        export = {
            "network": _facts(config.model.family, network, params),
            "signatures": _specs(served),
            "metrics": model_card.metrics(workdir, info.get("step", 0)),
            "data_licence": data_licence,
            "how": {
                "version": draft.number,
                "time": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M:%S UTC}",
                "trainer": trainer.__version__,
                "tensorflow": tf.__version__,
                "precision": precision,
                "jit": jit,
                "check": check,
            },
        }
        card = model_card.describe(info, export)
        model_card.write(draft.folder, card, name=versions.FIRST)
    return Exported(draft.path, draft.number, card)


def exporter(dest: str, *, snapshots: bool) -> AtSnapshot:
    """An exporter of the run's generator at its end, unless that has been exported.

    Args:
      dest: directory of the model.
      snapshots: whether it is exported at each snapshot, too.
    """

    def export(snapshot: Snapshot) -> None:
        if not (snapshot.last or snapshots) or is_published(dest, snapshot.info):
            return
        exported = publish(
            snapshot.params(), snapshot.info, dest, workdir=snapshot.workdir, log=snapshot.log
        )
        snapshot.log(f"exported to {exported.path}")

    return export


def is_published(dest: str, info: Mapping[str, Any]) -> bool:
    """Whether the newest version of a model was made from this state of this run.

    Args:
      dest: directory of the model.
      info: `state.json` of a checkpoint.
    """
    card = versions.newest_card(dest)
    made_from = (card or {}).get("training", {})
    keys = "step", "config_fingerprint"
    return card is not None and all(made_from.get(key) == info[key] for key in keys)


def _origin(info: Mapping[str, Any]) -> tuple[Config, DataShape]:
    """The config from which a checkpoint's networks were built."""
    config = config_lib.from_dict(info["config"], where="state.json")
    height, width = info["resolution"]
    return config, DataShape((height, width), info["channels"], tuple(info["label_counts"]))


def _network(config: Config, data: DataShape, precision: Precision, jit: Jit) -> Generator:
    """The generator as it is to be served."""
    backend = build.backend(jit.upper(), jit != "off")
    if precision == "float32":
        return build.networks(config, data, backend, rounded=False)[0]
    # bfloat16 has float32's range: a network that was trained without a clamp needs none.
    trained_with_clamp = config.run.precision in ("bfloat16", "float16")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
    return build.networks(config, data, backend, clamped=trained_with_clamp)[0]


def _save(served: Served, folder: str) -> None:
    """Writes the SavedModel, with the gradients that TensorFlow's own ops have.

    Our layers have some of their own, Python functions that make them fast. They can be saved only
    for the first order, and each load would warn of the second.
    """
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(served, folder, signatures=served.signatures(), options=options)
    path = storage.join(folder, versions.LAST)
    model = saved_model_pb2.SavedModel.FromString(storage.read_bytes(path))
    graph = model.meta_graphs[0].graph_def
    for nodes in [graph.node, *(function.node_def for function in graph.library.function)]:
        for node in nodes:
            node.attr.pop("_gradient_op_type", None)
    storage.write_bytes_atomic(path, model.SerializeToString())
    storage.remove(storage.join(folder, "fingerprint.pb"))  # of the file as it was


# ---------------------------------------------------------------------------- the check


def _latents(network: Generator) -> dict[str, np.ndarray]:
    """The images that the check renders: two, of the first and the last class."""
    z = [np.random.RandomState(seed).randn(network.z_dim) for seed in range(2)]
    psi = _CHECK_PSI if network.truncates else 1.0
    inputs = {"z": np.asarray(z, np.float32), "psi": np.asarray([psi], np.float32)}
    if network.c_dim:
        inputs["label"] = np.asarray([0, network.c_dim - 1], np.int64)
    return inputs


def _render(
    network: Generator, params: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The images of latents, [N, H, W, C] uint8, as `python -m trainer generate` makes them."""
    with tf.device("/CPU:0"):  # GPUs may round convolutions to ten bits
        values = {name: tf.constant(value) for name, value in params.items()}
        label = inputs.get("label", np.full([2], -1))
        c = (label[:, np.newaxis] == np.arange(network.c_dim)).astype(np.float32)
        ws = network.mapping(values, tf.constant(inputs["z"]), tf.constant(c), inputs["psi"][0])
        images = network.synthesis(values, ws).numpy()
    if not np.isfinite(images).all():
        raise DivergedError(
            "the network renders values that are not finite, so it is not exported; take an older "
            "checkpoint with --checkpoint"
        )
    return grids.to_uint8(images)


def _check(
    folder: str, inputs: Mapping[str, np.ndarray], pixels: np.ndarray, precision: Precision
) -> dict[str, float]:
    """Loads what was written in a new process, and compares.

    Raises:
      ExportError: it can't be loaded, or renders something else.
    """
    buffer, arrays = io.BytesIO(), dict[str, Any](inputs, pixels=pixels)
    np.savez(buffer, **arrays)
    command = [sys.executable, "-I", str(_CHECK_SCRIPT), folder]
    failed = f"the SavedModel in {folder} was not published:"
    try:
        done = subprocess.run(
            command,
            env=host.without_accelerators(),
            input=buffer.getvalue(),
            capture_output=True,
            timeout=_CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"{failed} a new process could not load it and render two images in "
            f"{_CHECK_SECONDS} s; run the same command on a machine that does less"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        lines = [line for line in lines if not tensorflow_log.harmless(line)] or [b"nothing said"]
        said = lines[-1].decode(errors="replace")
        raise ExportError(
            f"{failed} a new process could not load it and render with it (exit code "
            f"{done.returncode}: {said[:300]}); if there is memory enough, please report this"
        )
    try:
        check = documents.parse_object((done.stdout.splitlines() or [b""])[-1])
        difference, mean = float(check["max_difference"]), float(check["mean_difference"])
    except (documents.DocumentError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{failed} a new process that rendered with it reported no difference; please report this"
        ) from error
    if precision == "bfloat16" and mean > _MAX_MEAN_BFLOAT16:
        raise ExportError(
            f"{failed} in bfloat16 its pixels differ by {mean:.1f} of 255 on average; this network "
            "needs --precision=float32"
        )
    if precision == "float32" and difference > _MAX_DIFFERENCE:
        raise ExportError(
            f"{failed} its pixels differ by up to {difference} of 255 from the network's; please "
            "report this"
        )
    return check


# ---------------------------------------------------------------------------- the card


def _facts(family: str, network: Generator, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "family": family,
        "resolution": list(network.resolution),
        "channels": network.img_channels,
        "z_dim": network.z_dim,
        "w_dim": network.w_dim,
        "c_dim": network.c_dim,
        "num_ws": network.num_ws,
        "truncates": network.truncates,
        "parameters": sum(params[name].size for name in network.trainable_names()),
    }


def _specs(served: Served) -> dict[str, Any]:
    """Types and shapes of all signatures' inputs and outputs."""
    found = {}
    for name, function in served.signatures().items():
        concrete = function.get_concrete_function()
        inputs = {spec.name: spec for spec in tf.nest.flatten(concrete.structured_input_signature)}
        found[name] = {
            "inputs": {key: _spec(spec) for key, spec in inputs.items()},
            "outputs": {key: _spec(spec) for key, spec in concrete.structured_outputs.items()},
        }
    return found


def _spec(spec: Any) -> dict[str, Any]:
    return {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}
