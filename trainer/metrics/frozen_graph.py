"""Parameters of the Inception network in its TensorFlow graph, classify_image_graph_def.pb.

The graph is neither imported nor run: of its nodes only the constants that hold parameters are
read. Which constant is which parameter was written from the node names that are published for
inception-2015-12-05.tgz; the tests make a graph with those names.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import message

from trainer.core import text
from trainer.core.errors import DataError
from trainer.metrics import inception

MAGIC = b"\n"  # the tag of the first node

_STEM = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_2a_3x3": "conv_1",
    "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}
_BLOCK_5 = {
    "branch1x1": "conv",
    "branch5x5_1": "tower/conv",
    "branch5x5_2": "tower/conv_1",
    "branch3x3dbl_1": "tower_1/conv",
    "branch3x3dbl_2": "tower_1/conv_1",
    "branch3x3dbl_3": "tower_1/conv_2",
    "branch_pool": "tower_2/conv",
}
_BLOCK_6A = {
    "branch3x3": "conv",
    "branch3x3dbl_1": "tower/conv",
    "branch3x3dbl_2": "tower/conv_1",
    "branch3x3dbl_3": "tower/conv_2",
}
_BLOCK_6 = {
    "branch1x1": "conv",
    "branch7x7_1": "tower/conv",
    "branch7x7_2": "tower/conv_1",
    "branch7x7_3": "tower/conv_2",
    "branch7x7dbl_1": "tower_1/conv",
    "branch7x7dbl_2": "tower_1/conv_1",
    "branch7x7dbl_3": "tower_1/conv_2",
    "branch7x7dbl_4": "tower_1/conv_3",
    "branch7x7dbl_5": "tower_1/conv_4",
    "branch_pool": "tower_2/conv",
}
_BLOCK_7A = {
    "branch3x3_1": "tower/conv",
    "branch3x3_2": "tower/conv_1",
    "branch7x7x3_1": "tower_1/conv",
    "branch7x7x3_2": "tower_1/conv_1",
    "branch7x7x3_3": "tower_1/conv_2",
    "branch7x7x3_4": "tower_1/conv_3",
}
_BLOCK_7 = {
    "branch1x1": "conv",
    "branch3x3_1": "tower/conv",
    "branch3x3_2a": "tower/mixed/conv",
    "branch3x3_2b": "tower/mixed/conv_1",
    "branch3x3dbl_1": "tower_1/conv",
    "branch3x3dbl_2": "tower_1/conv_1",
    "branch3x3dbl_3a": "tower_1/mixed/conv",
    "branch3x3dbl_3b": "tower_1/mixed/conv_1",
    "branch_pool": "tower_2/conv",
}
_BLOCKS = {
    "Mixed_5b": ("mixed", _BLOCK_5),
    "Mixed_5c": ("mixed_1", _BLOCK_5),
    "Mixed_5d": ("mixed_2", _BLOCK_5),
    "Mixed_6a": ("mixed_3", _BLOCK_6A),
    "Mixed_6b": ("mixed_4", _BLOCK_6),
    "Mixed_6c": ("mixed_5", _BLOCK_6),
    "Mixed_6d": ("mixed_6", _BLOCK_6),
    "Mixed_6e": ("mixed_7", _BLOCK_6),
    "Mixed_7a": ("mixed_8", _BLOCK_7A),
    "Mixed_7b": ("mixed_9", _BLOCK_7),
    "Mixed_7c": ("mixed_10", _BLOCK_7),
}
_PARTS = {
    "conv.weight": "conv2d_params",
    "bn.weight": "batchnorm/gamma",
    "bn.bias": "batchnorm/beta",
    "bn.running_mean": "batchnorm/moving_mean",
    "bn.running_var": "batchnorm/moving_variance",
}
_CONVS = _STEM | {
    f"{block}.{branch}": f"{scope}/{node}"
    for block, (scope, branches) in _BLOCKS.items()
    for branch, node in branches.items()
}

NODES: dict[str, str] = {
    **{
        f"{node}/{suffix}": f"{conv}.{part}"
        for conv, node in _CONVS.items()
        for part, suffix in _PARTS.items()
    },
    "softmax/weights": "fc.weight",
    "softmax/biases": "fc.bias",
}
"""Names of parameters by those of the nodes that hold them."""

_PARAMETER = re.compile(rf".*/({'|'.join(_PARTS.values())}|weights|biases)")


def node_shape(name: str) -> tuple[int, ...]:
    """The shape that a parameter has in the graph: kernels are [height, width, in, out] there."""
    shape = inception.SHAPES[name]
    if name.endswith("conv.weight"):
        out, into, height, width = shape
        return height, width, into, out
    return shape[::-1]


def read(data: bytes) -> inception.Params:
    """Reads the parameters of a frozen graph.

    Args:
      data: the whole file.

    Returns:
      Those parameters of the network that the graph has, by their names, float32.

    Raises:
      DataError: without the file's name: it is no graph, or has parameters of another network.
    """
    try:
        graph = tf.compat.v1.GraphDef.FromString(data)
    except message.DecodeError as error:
        raise DataError("it is no TensorFlow graph, is damaged, or ends too early") from error
    params: inception.Params = {}
    for node in graph.node:
        if node.name not in NODES:
            if node.op == "Const" and _PARAMETER.fullmatch(node.name):
                raise DataError(f"the network has no parameter {text.quoted(node.name)}")
            continue
        name = NODES[node.name]
        if name in params:
            raise DataError(f"its graph has {node.name} twice")
        if node.op != "Const":
            raise DataError(
                f"its {node.name} is a {text.shorten(node.op)} and no Const; freeze the graph first"
            )
        params[name] = _array(node, node_shape(name))
    return params


def _array(node: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a constant, with axes as in the state dict."""
    tensor = node.attr["value"].tensor
    actual = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if actual != shape:
        raise DataError(
            f"its {node.name} has the shape {list(actual[:8])} instead of {list(shape)}"
        )
    if tensor.dtype != tf.float32.as_datatype_enum:
        raise DataError(f"its {node.name} is not float32")
    count = math.prod(shape)
    if tensor.tensor_content:
        if len(tensor.tensor_content) != 4 * count:
            raise DataError(f"its {node.name} has not as many numbers as its shape says")
        array = np.frombuffer(tensor.tensor_content, "<f4").astype(np.float32)
    else:  # one number may stand for all
        if len(tensor.float_val) not in {1, count}:
            raise DataError(f"its {node.name} has not as many numbers as its shape says")
        array = np.broadcast_to(np.array(tensor.float_val, np.float32), [count])
    axes = [3, 2, 0, 1] if len(shape) == 4 else None  # None reverses
    return np.ascontiguousarray(np.transpose(array.reshape(shape), axes))
