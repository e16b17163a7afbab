"""Files of weights made by hand: pickles instruction by instruction, zip archives, graphs."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

from trainer.metrics import frozen_graph

PROTO = b"\x80\x02"
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
TYPES = {"float32": "FloatStorage", "int64": "LongStorage"}


def string(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    if abs(value) < 1 << 31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(key: str, count: int, kind: str = "FloatStorage", *, old: bool = False) -> bytes:
    """The instructions that refer to a storage."""
    identity = [string("storage"), f"ctorch\n{kind}\n".encode(), string(key), string("cpu")]
    return tuple_of(*identity, integer(count), *([b"N"] if old else [])) + b"Q"


def tensor(
    reference: bytes, shape: Iterable[int], strides: Iterable[int] | None = None, offset: int = 0
) -> bytes:
    """The instructions that make a tensor, C-contiguous unless strides are given."""
    shape = list(shape)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if strides is None else strides
    sizes = (tuple_of(*map(integer, values)) for values in (shape, strides))
    call = tuple_of(reference, integer(offset), *sizes, b"\x89", ORDERED_DICT)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"R"


def pickled(items: Mapping[str, bytes]) -> bytes:
    """The pickle of a state dict, which has versions of modules as an attribute."""
    pairs = b"".join(string(name) + made for name, made in items.items())
    versions = b"}" + string("") + b"}" + string("version") + integer(2) + b"ss"
    attributes = b"}" + string("_metadata") + versions + b"s"
    return PROTO + ORDERED_DICT + b"(" + pairs + b"u" + attributes + b"b."


def state(arrays: Mapping[str, np.ndarray], *, old: bool = False) -> tuple[bytes, dict[str, bytes]]:
    """The pickle of arrays, and their numbers by the keys of their storages."""
    items, contents = {}, {}
    for index, (name, array) in enumerate(arrays.items()):
        reference = storage(str(index), array.size, TYPES[array.dtype.name], old=old)
        items[name], contents[str(index)] = tensor(reference, array.shape), array.tobytes()
    return pickled(items), contents


def archive(
    pickle: bytes,
    contents: Mapping[str, bytes],
    more: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The zip archive of PyTorch 1.6 and later."""
    entries = {"data.pkl": pickle, "byteorder": b"little"}
    entries |= {f"data/{key}": content for key, content in contents.items()}
    entries |= {"version": b"3\n", ".data/serialization_id": b"1234"} | dict(more or {})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in entries.items():
            target.writestr(f"archive/{name}", content)
    return file.getvalue()


def sequence(
    pickle: bytes, contents: Mapping[str, bytes], itemsizes: Mapping[str, int] | None = None
) -> bytes:
    """The pickles and numbers of PyTorch before 1.6."""
    system = b"}" + string("little_endian") + b"\x88s."
    keys = b"](" + b"".join(map(string, contents)) + b"e."
    head = (integer(0x1950A86A20F9469CFC6C) + b".", integer(1001) + b".", system)
    parts = [PROTO + part for part in head] + [pickle, PROTO + keys]
    for key, content in contents.items():
        parts += [struct.pack("<q", len(content) // (itemsizes or {}).get(key, 4)), content]
    return b"".join(parts)


def graph(params: Mapping[str, np.ndarray]) -> tf.compat.v1.GraphDef:
    """A frozen graph with the published names, and nodes besides its parameters."""
    made = tf.compat.v1.GraphDef()
    made.node.add(name="ExpandDims/dim", op="Const").attr["value"].tensor.CopyFrom(
        tf.make_tensor_proto(0)
    )
    for node, name in frozen_graph.NODES.items():
        array = params[name]
        array = np.transpose(array, [2, 3, 1, 0] if array.ndim == 4 else None)
        value = tf.make_tensor_proto(np.ascontiguousarray(array))
        made.node.add(name=node, op="Const").attr["value"].tensor.CopyFrom(value)
    made.node.add(name="softmax", op="Softmax", input=["softmax/weights"])
    return made
