"""State dicts in files of `torch.save`, read without PyTorch and without executing anything.

Such a file holds a pickle, which is a program, and the raw numbers beside it. Here a small machine
runs the pickle: it knows the instructions and the four names that a state dict of tensors needs,
calls nothing, and refuses everything else by name. `pickle.Unpickler` would do more than that: its
memo alone takes as much memory as a file of a few bytes asks for.

Both formats are read: the zip archive of PyTorch 1.6 and later, and the sequence of pickles before.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.core import text
from trainer.core.errors import DataError

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"

# A state dict of 566 tensors has 15,000 instructions and 100 KB of them.
MAX_INSTRUCTIONS = 200_000
MAX_PICKLE_BYTES = 1 << 22
MAX_ENTRIES = 10_000
MAX_RANK = 8

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_CENTRAL_ENTRY = b"PK\x01\x02"
# What `torch.save` puts beside the pickle and the numbers.
_SMALL_ENTRIES = frozenset(
    {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors: which, of what type and how many.

    Attributes:
      key: its name in the file.
      dtype: of the numbers.
      count: how many.
    """

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, within its bounds.

    Attributes:
      storage: that has its numbers.
      offset: of the first one.
      shape: of the tensor.
      strides: numbers from one index to the next, for each axis.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, and the bytes of their storages by key."""

    tensors: dict[str, Tensor]
    contents: dict[str, bytes | memoryview]

    def array(self, name: str) -> np.ndarray:
        """A copy of one tensor's numbers."""
        tensor = self.tensors[name]
        numbers = np.frombuffer(self.contents[tensor.storage.key], tensor.storage.dtype)
        strides = [stride * numbers.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return np.array(view, tensor.storage.dtype.newbyteorder("="), order="C")


# ---- the pickle ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """What a global of the pickle stands for; it can be called only by the machine."""

    name: str


_ORDERED_DICT = _Name("collections.OrderedDict")
_REBUILD = _Name("torch._utils._rebuild_tensor_v2")
_STORAGES: dict[str, np.dtype] = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.LongStorage": np.dtype("<i8"),
}
_NAMES = {
    name.name: name for name in (_ORDERED_DICT, _REBUILD, *(_Name(name) for name in _STORAGES))
}


def _sizes(values: Any) -> bool:
    """Whether it is a tuple of not too many integers of at least 0."""
    return (
        type(values) is tuple
        and len(values) <= MAX_RANK
        and all(type(value) is int and value >= 0 for value in values)
    )


def _storage(identity: tuple[Any, ...]) -> Storage:
    """The storage that a persistent id names: ('storage', type, key, device, count[, None])."""
    if len(identity) in {5, 6}:
        match identity:
            case ("storage", _Name(name=name), str(key), str(), int(count), *view) if (
                name in _STORAGES and type(count) is int and count >= 0 and view in ([], [None])
            ):
                return Storage(key, _STORAGES[name], count)
    raise DataError("its pickle refers to something that is no storage of float32 or int64")


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """The tensor that torch._utils._rebuild_tensor_v2 would make."""
    if len(arguments) not in {6, 7} or not isinstance(arguments[0], Storage):
        raise DataError("its pickle makes a tensor from something else than a storage")
    storage, offset, shape, strides, *_ = arguments
    if not (_sizes((offset,)) and _sizes(shape) and _sizes(strides)) or len(shape) != len(strides):
        raise DataError("its pickle makes a tensor whose offset, shape or strides are impossible")
    empty = 0 in shape
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (not empty and last >= storage.count) or math.prod(shape) > storage.count:
        raise DataError(
            f"a tensor reaches beyond the end of its storage {text.quoted(storage.key)}, "
            f"which has {text.quoted(storage.count)} numbers"
        )
    return Tensor(storage, offset, shape, strides)


@dataclass
class _Machine:
    """Runs one pickle. `stacks` has one list for each open mark, and one below."""

    stacks: list[list[Any]] = field(default_factory=lambda: [[]])
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: io.BytesIO) -> Any:
        """Reads up to the end of the pickle; returns its object.

        Raises:
          DataError: it is damaged, too long, or does what no state dict needs.
        """
        start = file.tell()
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count >= MAX_INSTRUCTIONS or file.tell() - start > MAX_PICKLE_BYTES:
                    raise DataError("its pickle is longer than that of any state dict")
                if opcode.name == "STOP":
                    return self.pop(object)
                if opcode.name not in _INSTRUCTIONS:
                    raise DataError(
                        f"its pickle has the instruction {opcode.name}, which no state dict needs; "
                        "get the file anew from where it was published"
                    )
                _INSTRUCTIONS[opcode.name](self, argument)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise DataError("its pickle is damaged or ends too early") from error
        raise DataError("its pickle ends too early")

    def push(self, value: Any) -> None:
        self.stacks[-1].append(value)

    def pop(self, kind: Any) -> Any:
        value = self.stacks[-1].pop()
        if not isinstance(value, kind):
            raise ValueError
        return value

    def pop_mark(self) -> list[Any]:
        if len(self.stacks) == 1:
            raise ValueError
        return self.stacks.pop()

    def top(self, kind: Any) -> Any:
        value = self.stacks[-1][-1]
        if not isinstance(value, kind):
            raise ValueError
        return value

    def push_global(self, name: str) -> None:
        if name not in _NAMES:
            raise DataError(
                f"its pickle would use {text.shorten(name)}, which no state dict needs and which "
                "may execute something; get the file anew from where it was published"
            )
        self.push(_NAMES[name])

    def stack_global(self) -> None:
        name, module = self.pop(str), self.pop(str)
        self.push_global(f"{module}.{name}")

    def tuple_of(self, count: int) -> None:
        values = [self.stacks[-1].pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # others could take exponential time to hash
                raise DataError("its pickle has a dictionary whose keys are not all text")
            if key in target:
                raise DataError(f"its pickle has {text.quoted(key)} twice")
            target[key] = value

    def append_items(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def reduce(self) -> None:
        arguments, function = self.pop(tuple), self.pop(object)
        if function is _ORDERED_DICT and not arguments:
            self.push({})
        elif function is _REBUILD:
            self.push(_tensor(arguments))
        else:
            called = function.name if isinstance(function, _Name) else "something without a name"
            raise DataError(f"its pickle calls {called} in a way that no state dict needs")

    def build(self) -> None:
        self.pop(dict)  # the attribute _metadata: versions of modules
        self.top(dict)


_Instruction = Callable[[_Machine, Any], None]
_INSTRUCTIONS: dict[str, _Instruction] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"),
        _Machine.push,
    ),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": lambda m, _: m.stacks.append([]),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "SETITEM": lambda m, _: m.set_items([m.stacks[-1].pop(-2), m.stacks[-1].pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "APPEND": lambda m, _: m.append_items([m.stacks[-1].pop()]),
    "APPENDS": lambda m, _: m.append_items(m.pop_mark()),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.top(object)),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"), lambda m, index: m.memo.__setitem__(index, m.top(object))
    ),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": lambda m, name: m.push_global(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "BINPERSID": lambda m, _: m.push(_storage(m.pop(tuple))),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
}


# ---- the two formats -----------------------------------------------------------------------------


def read(data: bytes) -> StateDict:
    """Reads the content of a file that `torch.save` wrote of a state dict.

    Args:
      data: the whole file; it begins with ZIP_MAGIC or PICKLE_MAGIC.

    Returns:
      The tensors, and views or copies of their numbers; no more bytes than the file has.

    Raises:
      DataError: without the file's name: it is damaged, holds something else than a state dict of
        float32 and int64 tensors, or would execute something.
    """
    return _read_zip(data) if data.startswith(ZIP_MAGIC) else _read_sequence(data)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The object of a pickle, which must be a dictionary of tensors."""
    if not isinstance(value, dict):
        raise DataError("it holds no dictionary of tensors; save module.state_dict()")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise DataError(
                f"its entry {text.quoted(name)} is no tensor; save module.state_dict() alone"
            )
    return value


def _checked(tensors: dict[str, Tensor], contents: dict[str, bytes | memoryview]) -> StateDict:
    """A state dict whose storages are all there, as long as they should be, and used."""
    for storage in {tensor.storage for tensor in tensors.values()}:
        if storage.key not in contents:
            raise DataError(f"the storage {text.quoted(storage.key)} is missing")
        actual, expected = len(contents[storage.key]), storage.count * storage.dtype.itemsize
        if actual != expected:
            raise DataError(
                f"the storage {text.quoted(storage.key)} has {actual} bytes instead of {expected}"
            )
    superfluous = contents.keys() - {tensor.storage.key for tensor in tensors.values()}
    if superfluous:
        raise DataError(f"no tensor uses the storage {text.quoted(min(superfluous))}")
    return StateDict(tensors, contents)


def _read_zip(data: bytes) -> StateDict:
    # Python keeps a record of each entry, ten times as long as the file's.
    if data.count(_CENTRAL_ENTRY) > MAX_ENTRIES:
        raise DataError("it has more entries than any state dict")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = _entries(archive, len(data))
            contents = {name: archive.read(entry) for name, entry in entries.items()}
    except (
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise DataError("its zip archive is damaged or ends too early") from error
    if contents.get("byteorder", b"little") != b"little":
        raise DataError("its numbers are big-endian; save it on another machine")
    if "data.pkl" not in contents:
        raise DataError("it is a zip archive, but not one of torch.save: data.pkl is missing")
    tensors = _tensors(_Machine().run(io.BytesIO(contents["data.pkl"])))
    return _checked(
        tensors,
        {
            name.removeprefix("data/"): content
            for name, content in contents.items()
            if name.startswith("data/")
        },
    )


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names below the one folder at the top, not yet read."""
    entries: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for entry in archive.infolist():
        folder, _, name = entry.filename.partition("/")
        folders.add(folder)
        if name == "constants.pkl" or name.startswith("code/"):
            raise DataError("it is a TorchScript program; a state dict of torch.save is needed")
        key = name.removeprefix("data/")
        known = name == "data.pkl" or name in _SMALL_ENTRIES or (key != name and key.isalnum())
        if not known or name in entries or len(folders) > 1:
            raise DataError(
                f"its zip archive has {text.quoted(entry.filename)}, which torch.save would not "
                "write"
            )
        # torch.save compresses nothing: no entry is longer than what the file has of it.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise DataError(f"{text.quoted(entry.filename)} in its zip archive is compressed")
        entries[name] = entry
    if sum(entry.file_size for entry in entries.values()) > size:
        raise DataError("the entries of its zip archive overlap")
    return entries


def _read_sequence(data: bytes) -> StateDict:
    """The format before PyTorch 1.6: five pickles, then the count and the numbers of storages."""
    file = io.BytesIO(data)
    if _Machine().run(file) != _MAGIC_NUMBER:
        raise DataError("it is a pickle, but not one of torch.save: its magic number is missing")
    if _Machine().run(file) != _PROTOCOL_VERSION:
        raise DataError("it is of another version of the format than 1001")
    system = _Machine().run(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DataError("its numbers are not little-endian; save it on another machine")
    tensors, keys = _tensors(_Machine().run(file)), _Machine().run(file)
    if not isinstance(keys, list):
        raise DataError("it has no list of its storages")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    contents: dict[str, bytes | memoryview] = {}
    position = file.tell()
    for key in keys:
        if not isinstance(key, str) or key not in storages or key in contents:
            raise DataError("its storages are not those of its tensors")
        storage = storages[key]
        count = int.from_bytes(data[position : position + 8], "little")
        if count != storage.count:
            raise DataError(
                f"the storage {text.quoted(key)} is said to have {count} numbers and "
                f"{text.quoted(storage.count)}, or the file ends too early"
            )
        start, position = position + 8, position + 8 + count * storage.dtype.itemsize
        if position > len(data):
            raise DataError("it ends too early")
        contents[key] = memoryview(data)[start:position]
    if position != len(data):
        raise DataError(f"{len(data) - position} bytes follow where it should end")
    return _checked(tensors, contents)
