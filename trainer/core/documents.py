"""JSON and YAML that others may have written or damaged, read within limits.

All that the trainer reads of either kind comes through here. Size, depth, numbers and aliases are
bounded, so a hostile document costs little time and memory and ends in one sentence that repeats
next to nothing of it. What that means, a damaged checkpoint or a wrong config, the caller decides.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml

from trainer.core import storage
from trainer.core.text import quoted

LONGEST = 1 << 24  # bytes of a JSON document, unless its reader expects more
LONGEST_YAML = 1 << 18
DEEPEST = 64  # levels of lists and objects
_NODES = 20_000  # in a YAML document
_LARGEST = 1 << 64  # whole numbers are smaller: the largest of ours are CRCs, seeds and sizes
_DIGITS = 20  # of the largest


class DocumentError(ValueError):
    """The fault of a document, as the end of a sentence.

    Attributes:
      line: where, counted from 1; None if that isn't known.
    """

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


# ------------------------------------------------------------------------------ JSON


def parse_json(data: bytes | str, longest: int = LONGEST) -> Any:
    """The value of a JSON document.

    Args:
      data: UTF-8, if it is bytes.
      longest: bytes or characters that it may have.

    Raises:
      DocumentError: it is no JSON, repeats a key, or is beyond the limits; NaN, infinite numbers
        and whole ones of more than 64 bits are.
    """
    if len(data) > longest:
        raise DocumentError(f"it is larger than {_size(longest)}")
    try:
        value = json.loads(
            data.decode("utf-8") if isinstance(data, bytes) else data,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_object,
        )
    except DocumentError:
        raise
    except UnicodeDecodeError as error:
        raise DocumentError(f"it is not UTF-8 text at byte {error.start}") from None
    except json.JSONDecodeError as error:
        what = f"it is not JSON ({error.msg}, column {error.colno})"
        raise DocumentError(what, error.lineno) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return
        level = [
            child for each in level for child in (each.values() if isinstance(each, dict) else each)
        ]
    raise _too_deep()


def parse_object(data: bytes | str, longest: int = LONGEST) -> dict[str, Any]:
    """As `parse_json`, for a document that must be an object.

    Raises:
      DocumentError: also if it is something else.
    """
    value = parse_json(data, longest)
    if not isinstance(value, dict):
        raise DocumentError("it holds no JSON object")
    return value


def read_object(path: str, longest: int = LONGEST) -> dict[str, Any]:
    """The object in a JSON file, of which no more is read than `longest` bytes.

    Raises:
      DocumentError: as for `parse_object`.
      StorageError: the file cannot be read.
    """
    return parse_object(storage.read_range(path, 0, longest + 1), longest)


_RecordT = TypeVar("_RecordT")


def as_record(kind: type[_RecordT], document: Mapping[str, Any]) -> _RecordT:
    """A dataclass whose fields are texts and numbers, made from an object that has them all.

    Args:
      kind: the dataclass; a whole number passes for a float of it.
      document: may hold more.

    Raises:
      DocumentError: a field is missing, or of another type.
    """
    values = {}
    for name, hint in get_type_hints(kind).items():
        value = document.get(name)
        if type(value) is not hint and not (hint is float and type(value) is int):
            raise DocumentError(f"its {name} is {quoted(value, 40)}, which is no {hint.__name__}")
        values[name] = value
    return kind(**values)


def _size(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count >> power} {unit}"
    return f"{count} bytes"


def _too_deep() -> DocumentError:
    return DocumentError(f"it is nested more than {DEEPEST} deep")


def _refuse_constant(name: str) -> NoReturn:
    raise DocumentError(f"it holds {name}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DocumentError(f"it holds the number {quoted(text, 20)}, which is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > _DIGITS + 1 or not -_LARGEST < int(text) < _LARGEST:
        raise DocumentError("it holds a whole number of more than 64 bits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DocumentError("it gives a key twice")
    return found


# ------------------------------------------------------------------------------ YAML

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+|\.inf)|\.nan",
        "-+.0123456789",
    ),
)
_KNOWN_TAGS = frozenset({tag for tag, _, _ in _SCALARS}) | {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")
}
_PATTERNS = {tag: re.compile(rf"(?:{pattern})\Z") for tag, pattern, _ in _SCALARS}


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars; refuses repeated keys, tags, and aliases of more than a scalar."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML copies it before it adds to it)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._nodes += 1
        self._depth += 1
        if self._depth > DEEPEST:
            raise _error(str(_too_deep()), mark)
        if self._nodes > _NODES:
            raise _error(f"it holds more than {_NODES} values", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise _error("an alias stands for a whole section; write it out", mark)
        assert node is not None
        if node.tag not in _KNOWN_TAGS:
            raise _error("a tag has no meaning here; leave it out", mark)
        pattern = _PATTERNS.get(node.tag)
        if pattern is not None and not pattern.match(node.value):
            raise _error("a value is not of its tag's type", mark)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise _RepeatedKeyError(None, None, key, key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _DIGITS + 1:
            raise _error("a whole number has more than 64 bits", node.start_mark)
        number = int(node.value, 0)
        if not -_LARGEST < number < _LARGEST:
            raise _error("a whole number has more than 64 bits", node.start_mark)
        return number


class _RepeatedKeyError(yaml.MarkedYAMLError):
    """Its `problem` is the key."""


def _error(what: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, what, mark)


# Line breaks for YAML.
_BREAKS = frozenset("\n\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would not read back as text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML copies it before it adds to it)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Unquoted, what Unicode calls a line break would be read back as a space; and one line of a
    # config stays one.
    style = '"' if _BREAKS & set(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _tag, _pattern, _first in _SCALARS:
    for _reader in (_Loader, _Dumper):
        _reader.add_implicit_resolver(
            _tag, _PATTERNS[_tag], ["" if c == "\0" else c for c in _first]
        )


class RepeatedKeyError(DocumentError):
    """A mapping gives a key twice.

    Attributes:
      key: which.
    """

    def __init__(self, key: str, line: int | None) -> None:
        super().__init__("a key is given twice", line)
        self.key = key


_NO_YAML = "it is not valid YAML: look at its indentation, colons and quotes"


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, read by the 1.2 core rules.

    Raises:
      DocumentError: it is no YAML, or beyond the limits. It repeats nothing of the text, which may
        be no config at all but a file with secrets.
    """
    if len(text) > LONGEST_YAML:
        raise DocumentError(f"it is larger than {_size(LONGEST_YAML)}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        if isinstance(error, _RepeatedKeyError):
            raise RepeatedKeyError(error.problem or "", line) from None
        own = type(error) is yaml.MarkedYAMLError
        raise DocumentError(str(error.problem) if own else _NO_YAML, line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentError("it is not text: it holds a control character", line) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise DocumentError(_NO_YAML) from None


def read_yaml(path: str) -> Any:
    """The value of a YAML file, of which no more is read than the limit.

    Raises:
      DocumentError: as for `parse_yaml`.
      StorageError: the file cannot be read.
    """
    data = storage.read_range(path, 0, 4 * LONGEST_YAML + 1)
    try:
        return parse_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        what = "it is not UTF-8 text"
        if len(data) > 4 * LONGEST_YAML:
            what = f"it is larger than {_size(LONGEST_YAML)}"
        raise DocumentError(what, data.count(b"\n", 0, error.start) + 1) from None


def dump_yaml(value: Any) -> str:
    """YAML of plain dictionaries, lists and scalars, which `parse_yaml` reads back as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)
