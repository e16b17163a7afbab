"""Weights of the Inception network, read from the files in which others publish them.

Nothing in a file is executed. What it holds must be exactly the network's parameters.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from trainer.core import storage, text
from trainer.core.errors import DataError
from trainer.metrics import frozen_graph, inception, torch_file

# Both published files have 96 MB.
MAX_BYTES = 1 << 27

_STEPS = re.compile(r"(.+)\.bn\.num_batches_tracked")


def read(path: str, sha256: str | None = None) -> inception.Params:
    """Reads the Inception network's parameters.

    Args:
      path: a state dict that `torch.save` wrote, as pytorch-fid's
        pt_inception-2015-12-05-6726825d.pth, or the frozen graph classify_image_graph_def.pb of
        inception-2015-12-05.tgz, unpacked.
      sha256: what the file's SHA-256 must be, in hexadecimal; None: anything.

    Returns:
      The parameters of `inception.SHAPES`, float32 and finite.

    Raises:
      DataError: the checksum is wrong, or the file is damaged, is of another kind, would execute
        something, or has not exactly these parameters.
      StorageError: it cannot be read.
    """
    size = storage.size(path)
    if size > MAX_BYTES:
        raise DataError(
            f"cannot read weights from {path}: it has {size} bytes, more than any file of this "
            "network"
        )
    data = storage.read_bytes(path)
    try:
        _check_digest(data, sha256)
        if data.startswith((torch_file.ZIP_MAGIC, torch_file.PICKLE_MAGIC)):
            params = _torch_params(data)
        elif data.startswith(frozen_graph.MAGIC):
            params = frozen_graph.read(data)
        else:
            raise DataError(
                "it is neither a file of torch.save nor a TensorFlow graph; unpack it if it is "
                "compressed, or get it anew"
            )
        _check_names(set(params))
        _check_values(params)
    except DataError as error:
        raise DataError(f"cannot read weights from {path}: {error}") from error
    return {name: params[name] for name in inception.SHAPES}


def _check_digest(data: bytes, sha256: str | None) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if sha256 is not None and actual != sha256.lower():
        raise DataError(
            f"its SHA-256 is {actual} and not {text.shorten(sha256)}; get it anew, or correct the "
            "checksum"
        )


def _torch_params(data: bytes) -> inception.Params:
    """The parameters in a state dict; copied only if names and shapes are right."""
    state = torch_file.read(data)
    shapes = {}
    for name, tensor in state.tensors.items():
        steps = _STEPS.fullmatch(name)
        if steps and steps[1] in inception.KERNELS:
            continue  # training counted these; the network has no use for them
        shapes[name] = tensor.shape
    _check_names(set(shapes))
    for name, shape in shapes.items():
        if shape != inception.SHAPES[name]:
            raise DataError(
                f"{name} has the shape {text.shorten(str(list(shape)))} instead of {list(inception.SHAPES[name])}"
            )
        if state.tensors[name].storage.dtype != np.float32:
            raise DataError(f"{name} is not float32")
    return {name: state.array(name) for name in shapes}


def _check_names(names: set[str]) -> None:
    superfluous, missing = names - inception.SHAPES.keys(), inception.SHAPES.keys() - names
    if superfluous:
        raise DataError(f"the network has no parameter {_first(superfluous)}")
    if missing:
        raise DataError(f"it lacks the parameter {_first(missing)}")


def _first(names: set[str]) -> str:
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return text.quoted(min(names)) + others


def _check_values(params: inception.Params) -> None:
    for name, array in params.items():
        if not np.isfinite(array).all():
            raise DataError(f"{name} has values that are not finite")
        if name.endswith("running_var") and array.min() < 0:
            raise DataError(f"{name} has a variance below 0")
