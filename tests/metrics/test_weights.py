"""Readers of weights: what others write is read exactly, and what is hostile is refused."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pathlib
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from tests.metrics import files
from trainer.core.errors import DataError, StorageError
from trainer.metrics import frozen_graph, inception, torch_file, weights

SMALL = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7, np.int64),
    "c": np.zeros([0, 2], np.float32),
}
PICKLE, CONTENTS = files.state(SMALL)
OLD_PICKLE, OLD_CONTENTS = files.state(SMALL, old=True)
FORMATS: dict[str, bytes] = {
    "zip": files.archive(PICKLE, CONTENTS),
    "sequence": files.sequence(OLD_PICKLE, OLD_CONTENTS, {"1": 8}),
}


def refused(data: bytes) -> str:
    """The message with which the content of a PyTorch file is refused."""
    with pytest.raises(DataError) as caught:
        torch_file.read(data)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


def hostile(pickle: bytes) -> list[bytes]:
    """A pickle in both formats, with one storage of six numbers."""
    contents = {"0": bytes(24)}
    return [files.archive(pickle, contents), files.sequence(pickle, contents)]


def write(path: pathlib.Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


# ---- whole files ---------------------------------------------------------------------------------


def with_steps(params: inception.Params) -> dict[str, np.ndarray]:
    """What PyTorch saves: batch norms have also counted their steps."""
    steps = {f"{name}.bn.num_batches_tracked": np.array(3, np.int64) for name in inception.KERNELS}
    return params | steps


def as_zip(params: inception.Params) -> bytes:
    return files.archive(*files.state(with_steps(params)))


def as_sequence(params: inception.Params) -> bytes:
    arrays = with_steps(params)
    itemsizes = {str(i): array.itemsize for i, array in enumerate(arrays.values())}
    return files.sequence(*files.state(arrays, old=True), itemsizes)


def as_graph(params: inception.Params) -> bytes:
    return files.graph(params).SerializeToString()


@pytest.mark.parametrize("make", [as_zip, as_sequence, as_graph])
def test_reads_every_parameter(
    make: Callable[[inception.Params], bytes], params: inception.Params, tmp_path: pathlib.Path
) -> None:
    data = make(params)
    path = write(tmp_path / "weights", data)
    read = weights.read(path, hashlib.sha256(data).hexdigest().upper())
    assert list(read) == list(inception.SHAPES)
    for name, array in read.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, params[name])
    with pytest.raises(DataError, match="its SHA-256 is [0-9a-f]{64} and not 00ff; get it anew"):
        weights.read(path, "00ff")
    write(tmp_path / "weights", data[:-1000])
    with pytest.raises(DataError, match="ends too early"):
        weights.read(path)


def changed(name: str, value: Any) -> Callable[[inception.Params], inception.Params]:
    return lambda params: params | {name: value}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed("AuxLogits.fc.bias", np.zeros(3, np.float32)), "has no parameter 'AuxLogits.fc"),
        (changed("fc.bias", np.zeros(1000, np.float32)), r"shape \[1000\] instead of \[1008\]"),
        (changed("fc.bias", np.zeros(1008, np.int64)), "fc.bias is not float32"),
        (changed("fc.bias", np.full(1008, np.nan, np.float32)), "fc.bias has values that are not"),
        (
            changed("Conv2d_1a_3x3.bn.running_var", np.full(32, -1, np.float32)),
            "Conv2d_1a_3x3.bn.running_var has a variance below 0",
        ),
        (
            lambda p: {n: a for n, a in p.items() if "6b" not in n},
            r"'Mixed_6b.branch1x1.bn.bias' \(and 49",
        ),
    ],
)
def test_other_parameters_are_refused(
    change: Callable[[inception.Params], inception.Params],
    expected: str,
    params: inception.Params,
    tmp_path: pathlib.Path,
) -> None:
    data = files.archive(*files.state(change(params)))
    path = write(tmp_path / "weights.pth", data)
    with pytest.raises(DataError, match=expected) as caught:
        weights.read(path)
    assert str(caught.value).startswith(f"cannot read weights from {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"<!doctype html>", b"version https://git-lfs", b"\x1f\x8b"])
def test_other_files_are_refused(data: bytes, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="it is neither a file of torch.save nor a TensorFlow"):
        weights.read(write(tmp_path / "weights", data))


def test_a_missing_file_is_reported(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StorageError):
        weights.read(str(tmp_path / "weights"))


def test_a_huge_file_is_not_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(DataError, match="it has 1099511627776 bytes, more than any"):
        weights.read(str(path))


# ---- PyTorch's files -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS)
def test_reads_a_state_dict(data: bytes) -> None:
    state = torch_file.read(data)
    assert list(state.tensors) == list(SMALL)
    for name, expected in SMALL.items():
        array = state.array(name)
        assert array.dtype == expected.dtype and array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected)


def test_reads_views() -> None:
    reference = files.storage("0", 6)
    items = {
        "transposed": files.tensor(reference, [3, 2], [1, 3]),
        "last": files.tensor(reference, [1], [1], offset=5),
        "all the same": files.tensor(reference, [6], [0], offset=2),
    }
    numbers = np.arange(6, dtype=np.float32)
    state = torch_file.read(files.archive(files.pickled(items), {"0": numbers.tobytes()}))
    np.testing.assert_array_equal(state.array("transposed"), numbers.reshape(2, 3).T)
    np.testing.assert_array_equal(state.array("last"), [5])
    np.testing.assert_array_equal(state.array("all the same"), [2] * 6)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_pytorch_writes(is_zip: bool, protocol: int, tmp_path: pathlib.Path) -> None:
    torch = importlib.import_module("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (1, 7)), torch.nn.BatchNorm2d(4))
    path = tmp_path / "state.pth"
    torch.save(
        module.state_dict(),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
    )
    state = torch_file.read(path.read_bytes())
    assert list(state.tensors) == list(module.state_dict())
    for name, expected in module.state_dict().items():
        np.testing.assert_array_equal(state.array(name), expected.numpy())


@pytest.mark.parametrize(
    ("pickle", "expected"),
    [
        (b"cos\nsystem\n(" + files.string("touch pwned") + b"tR.", "would use os.system"),
        (b"cposix\nsystem\n(" + files.string("touch pwned") + b"tR.", "would use posix.system"),
        (b"cbuiltins\neval\n(" + files.string("1") + b"tR.", "would use builtins.eval"),
        (files.string("os") + files.string("system") + b"\x93.", "would use os.system"),
        (b"cos\nsystem\nb.", "would use os.system"),
        (b"ctorch\nFloatStorage.x\n.", "would use torch.FloatStorage.x"),
        (b"c\x1b[2J\n" + b"x" * 500 + b"\n.", r"would use \\x1b\[2J.x+\.\.\."),
        (b"(S'touch pwned'\nios\nsystem\n.", "has the instruction STRING"),
        (b"(ios\nsystem\n.", "has the instruction INST"),
        (b"(cos\nsystem\no.", "would use os.system"),
        (b"\x82\x01.", "has the instruction EXT1"),
        (b"ccollections\nOrderedDict\n)\x81.", "has the instruction NEWOBJ"),
        (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage in a way"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "calls collections.OrderedDict in a way"),
        (b"K\x01)R.", "calls something without a name"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "from something else than a storage"),
    ],
)
def test_pickles_that_would_execute_something_are_refused(
    pickle: bytes, expected: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for data in hostile(files.PROTO + pickle):
        with pytest.raises(DataError, match=expected):
            torch_file.read(data)
    assert list(tmp_path.iterdir()) == []


HUGE = (1 << 2000) - 1


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (files.tensor(files.storage("0", 6), [7]), "beyond the end of its storage '0'"),
        (files.tensor(files.storage("0", 6), [1], [1], offset=6), "beyond the end"),
        (files.tensor(files.storage("0", 6), [2], [6]), "beyond the end"),
        (files.tensor(files.storage("0", 6), [1 << 40], [0]), "beyond the end"),
        (files.tensor(files.storage("0", 6), [HUGE], [HUGE], offset=HUGE), "beyond the end"),
        (files.tensor(files.storage("0", 6), [1], [1], offset=-1), "impossible"),
        (files.tensor(files.storage("0", 6), [-1], [1]), "impossible"),
        (files.tensor(files.storage("0", 6), [2], [-1], offset=5), "impossible"),
        (files.tensor(files.storage("0", 6), [2, 3], [1]), "impossible"),
        (files.tensor(files.storage("0", 6), [1] * 9), "impossible"),
        (files.tensor(files.storage("0", -6), [1]), "no storage of float32 or int64"),
        (files.tensor(files.storage("0", 6, "HalfStorage"), [6]), "use torch.HalfStorage"),
        (files.storage("0", 6), "entry 'x' is no tensor"),
        (files.string("6"), "entry 'x' is no tensor"),
        (files.tuple_of(files.string("storage")) + b"Q", "no storage of float32"),
        (b"K\x06Q", "damaged"),
    ],
)
def test_impossible_tensors_are_refused(made: bytes, expected: str) -> None:
    for data in hostile(files.pickled({"x": made})):
        assert expected in refused(data)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, "storage '0' is missing"),
        ({"0": bytes(20)}, "20 bytes instead of 24"),
        ({"0": bytes(24), "1": b""}, "no tensor uses the storage '1'"),
    ],
)
def test_storages_must_be_those_of_the_tensors(contents: dict[str, bytes], expected: str) -> None:
    pickle = files.pickled({"x": files.tensor(files.storage("0", 6), [6])})
    assert expected in refused(files.archive(pickle, contents))


def test_one_storage_has_one_description() -> None:
    items = {
        "x": files.tensor(files.storage("0", 6), [6]),
        "y": files.tensor(files.storage("0", 60), [60]),
    }
    for data in hostile(files.pickled(items)):
        assert "storage '0'" in refused(data)


# 24 bytes of numbers in the file; what the pickle asks for is more than any machine has.
BOMBS = {
    "memo": files.PROTO + b"]r\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "tuples": files.PROTO + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00Ns.",
    "lists": files.PROTO + b"]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b".",
    "storage": files.pickled({"x": files.tensor(files.storage("0", 1 << 60), [1 << 60])}),
    "expanded": files.pickled({"x": files.tensor(files.storage("0", 6), [1 << 60], [0])}),
    "depth": files.PROTO + b"]" * 100_000 + b"a" * 99_999 + b".",
    "marks": files.PROTO + b"(" * 150_000 + b".",
    "length": files.PROTO + b"N0" * 300_000 + b".",
    "text": files.PROTO + files.string("x" * (1 << 23)) + b".",
}


@pytest.mark.parametrize("pickle", BOMBS.values(), ids=BOMBS)
def test_nothing_takes_more_memory_than_the_file_is_worth(pickle: bytes) -> None:
    for data in hostile(pickle):
        tracemalloc.start()
        try:
            refused(data)
            assert tracemalloc.get_traced_memory()[1] < 5e7
        finally:
            tracemalloc.stop()


def test_damaged_pickles_are_refused() -> None:
    for pickle in (
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02h\x05.",
        b"\x80\x02t.",
        b"\x80\x02\xff.",
    ):
        assert "damaged" in refused(files.archive(pickle, {}))
    assert "keys are not all text" in refused(files.archive(b"\x80\x02}K\x01Ns.", {}))
    assert "'x' twice" in refused(files.archive(files.PROTO + b"}(X\1\0\0\0xNX\1\0\0\0xNu.", {}))
    assert "no dictionary of tensors" in refused(files.archive(b"\x80\x02].", {}))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"code/__torch__.py": b""}, "it is a TorchScript program"),
        ({"setup.py": b""}, "has 'archive/setup.py'"),
        ({"data/../../x": b""}, "has 'archive/data/../../x'"),
        ({"byteorder": b"big"}, "big-endian"),
    ],
)
def test_zip_archives_with_something_else_are_refused(
    more: dict[str, bytes], expected: str
) -> None:
    assert expected in refused(files.archive(PICKLE, CONTENTS, more))


def test_zip_bombs_are_refused() -> None:
    bomb = files.archive(PICKLE, {"0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(bomb)
    many = {f"data/{n}": b"" for n in range(torch_file.MAX_ENTRIES)}
    assert "more entries" in refused(files.archive(PICKLE, {}, many))


def test_zip_entries_that_overlap_or_lie_about_their_length_are_refused() -> None:
    data = files.archive(PICKLE, {"0": bytes(24), "1": bytes(24)})
    first, second = (data.rindex(f"archive/data/{key}".encode()) - 46 for key in "01")
    assert data[first : first + 4] == data[second : second + 4] == b"PK\x01\x02"
    overlapping = bytearray(data)
    overlapping[second + 42 : second + 46] = data[first + 42 : first + 46]
    assert "damaged" in refused(bytes(overlapping))
    longer = bytearray(data)
    longer[first + 20 : first + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    assert "overlap" in refused(bytes(longer))


def test_zip_archives_without_a_pickle_are_refused() -> None:
    data = files.archive(PICKLE, CONTENTS).replace(b"data.pkl", b"version2")
    assert "torch.save would not write" in refused(data)
    data = files.archive(PICKLE, CONTENTS).replace(b"archive/data.pkl", b"archive/data/pkl")
    assert "data.pkl is missing" in refused(data)


def test_old_files_with_something_else_are_refused() -> None:
    data = FORMATS["sequence"]
    assert "1 bytes follow" in refused(data + b"x")
    assert "magic number is missing" in refused(b"\x80\x02K\x01." + data)
    assert "another version" in refused(data.replace(files.integer(1001), files.integer(1002)))
    assert "not little-endian" in refused(data.replace(b"\x88s.", b"\x89s."))
    keys = files.sequence(OLD_PICKLE, OLD_CONTENTS | {"9": b""}, {"1": 8})
    assert "not those of its tensors" in refused(keys)
    assert "is said to have 12 numbers and 6" in refused(
        files.sequence(OLD_PICKLE, OLD_CONTENTS, {"0": 2, "1": 8})
    )


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_damaged_files_are_read_or_refused(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data[: draw.draw(st.integers(0, len(data)))])
    for _ in range(draw.draw(st.integers(0, 3))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    try:
        state = torch_file.read(bytes(damaged))
        for name in state.tensors:
            state.array(name)
    except DataError as error:
        assert str(error).isprintable()


# ---- TensorFlow's graph --------------------------------------------------------------------------


def test_every_parameter_has_one_node() -> None:
    assert sorted(frozen_graph.NODES.values()) == sorted(inception.SHAPES)
    assert frozen_graph.NODES["mixed/tower/conv/conv2d_params"] == (
        "Mixed_5b.branch5x5_1.conv.weight"
    )
    assert frozen_graph.NODES["mixed_10/tower_1/mixed/conv_1/batchnorm/moving_variance"] == (
        "Mixed_7c.branch3x3dbl_3b.bn.running_var"
    )
    assert frozen_graph.node_shape("Mixed_6b.branch7x7_2.conv.weight") == (1, 7, 128, 128)
    assert frozen_graph.node_shape("fc.weight") == (2048, 1008)


def one_node(name: str = "conv/batchnorm/beta", op: str = "Const") -> tf.compat.v1.GraphDef:
    graph = tf.compat.v1.GraphDef()
    value = tf.make_tensor_proto(np.arange(32, dtype=np.float32))
    graph.node.add(name=name, op=op).attr["value"].tensor.CopyFrom(value)
    return graph


def test_reads_a_number_that_stands_for_all() -> None:
    graph = one_node()
    tensor = graph.node[0].attr["value"].tensor
    tensor.ClearField("tensor_content")
    tensor.float_val.append(1.5)
    params = frozen_graph.read(graph.SerializeToString())
    np.testing.assert_array_equal(params["Conv2d_1a_3x3.bn.bias"], np.full(32, 1.5))


def test_other_graphs_are_refused(tmp_path: pathlib.Path) -> None:
    def refused_graph(graph: tf.compat.v1.GraphDef) -> str:
        path = write(tmp_path / "graph.pb", graph.SerializeToString())
        with pytest.raises(DataError) as caught:
            weights.read(path)
        return str(caught.value)

    assert "lacks the parameter 'Conv2d_1a_3x3.bn.running_mean' (and 470 more)" in refused_graph(
        one_node()
    )
    assert "beta is a VariableV2 and no Const" in refused_graph(one_node(op="VariableV2"))
    assert "no parameter 'conv_9/batchnorm/beta'" in refused_graph(
        one_node("conv_9/batchnorm/beta")
    )
    assert "[32] instead of [3, 3, 3, 32]" in refused_graph(one_node("conv/conv2d_params"))
    twice = one_node()
    twice.node.add().CopyFrom(twice.node[0])
    assert "conv/batchnorm/beta twice" in refused_graph(twice)
    short = one_node()
    short.node[0].attr["value"].tensor.tensor_content = bytes(4)
    assert "not as many numbers" in refused_graph(short)
    short.node[0].attr["value"].tensor.ClearField("tensor_content")
    assert "not as many numbers" in refused_graph(short)
    huge = one_node()
    huge.node[0].attr["value"].tensor.tensor_shape.dim[0].size = 1 << 50
    assert "[1125899906842624] instead of [32]" in refused_graph(huge)
    other = one_node()
    other.node[0].attr["value"].tensor.dtype = tf.int32.as_datatype_enum
    assert "not float32" in refused_graph(other)
    path = write(tmp_path / "graph.pb", one_node().SerializeToString()[:-1])
    with pytest.raises(DataError, match="no TensorFlow graph, is damaged, or ends too early"):
        weights.read(path)
