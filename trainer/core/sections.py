"""Sections of a config: frozen dataclasses whose every value is checked when one is made.

    @dataclasses.dataclass(frozen=True)
    class DataConfig(Section):
        NAME = "data"
        window: int = key(256, AT_LEAST_1)

A wrong type or a number out of range raises `ConfigError`, whether the section comes from a file,
from `--set` or from Python. Whole numbers become floats where a float is kept.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union

from trainer.core import schedule
from trainer.core.errors import ConfigError
from trainer.core.schedule import Schedule
from trainer.core.text import quoted

Auto = Literal["auto"]


class Limit(NamedTuple):
    """A condition on a number, in words and as a test."""

    text: str
    holds: Callable[[float], bool]


AT_LEAST_0 = Limit("0 or more", lambda v: v >= 0)
AT_LEAST_1 = Limit("1 or more", lambda v: v >= 1)
POSITIVE = Limit("above 0", lambda v: v > 0)
FRACTION = Limit("between 0 and 1", lambda v: 0 <= v <= 1)
BELOW_1 = Limit("0 or more and below 1", lambda v: 0 <= v < 1)
ABOVE_0_TO_1 = Limit("above 0 and at most 1", lambda v: 0 < v <= 1)
SEED = Limit("0 or more and below 2**63", lambda v: 0 <= v < 2**63)


def key(default: Any, limit: Limit) -> Any:
    """A key whose numbers must satisfy a limit."""
    return dataclasses.field(default=default, metadata={"limit": limit})


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: `float | None` gives (float, NoneType)."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _as_option(option: Any, value: Any) -> tuple[bool, Any]:
    """Whether `value` is of type `option`, and its canonical form."""
    if typing.get_origin(option) is Literal:
        return isinstance(value, str) and value in typing.get_args(option), value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if option is float and is_number:
        try:
            return math.isfinite(value), float(value)
        except OverflowError:
            return False, value
    if option is Schedule:
        if isinstance(value, Mapping):
            value = schedule.from_document(value)
        return isinstance(value, Schedule), value
    if option is int:
        return is_number and isinstance(value, int), value
    if option is str:
        return isinstance(value, str) and is_clean(value), value
    return option is not float and isinstance(value, option), value


def is_clean(text: str) -> bool:
    """Whether a text can be a path, and be written to a file."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def describe(hint: Any, limit: Limit | None = None) -> list[str]:
    """The alternatives of a type in words, with the limit of its numbers if there is one."""
    names: list[str] = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            names += [repr(choice) for choice in typing.get_args(option)]
        elif option is types.NoneType:
            names.append("null")
        elif option is bool:
            names.append("true or false")
        elif option is Schedule:
            names.append(f"a schedule, {schedule.EXAMPLE}")
        elif option in (int, float):
            kind = "a whole number" if option is int else "a number"
            names.append(f"{kind}, {limit.text}" if limit else kind)
        else:
            names.append("text")
    return names


def _expected(hint: Any, limit: Limit | None) -> str:
    names = describe(hint, limit)
    return ", or ".join(names) if len(names) < 3 else "one of " + ", ".join(names)


def checked(key: str, hint: Any, limit: Limit | None, value: Any) -> Any:
    """`value` in its canonical form.

    Raises:
      ConfigError: naming the key, the value and what was expected.
    """
    for option in _options(hint):
        matches, canonical = _as_option(option, value)
        if not matches:
            continue
        numbers: tuple[float, ...] = (canonical,) if option in (int, float) else ()
        if option is Schedule:
            numbers = canonical.start, canonical.end
        if limit is None or all(limit.holds(number) for number in numbers):
            return canonical
    shown = "null" if value is None else f"{quoted(value)} ({type(value).__name__})"
    if isinstance(value, str) and not is_clean(value):
        raise ConfigError(f"{key} = {shown} holds characters that no file can hold; leave them out")
    raise ConfigError(f"{key} = {shown}: expected {_expected(hint, limit)}{_hint(hint, value)}")


def _hint(hint: Any, value: Any) -> str:
    """Names the choice that was probably meant."""
    choices = [
        choice
        for option in _options(hint)
        if typing.get_origin(option) is Literal
        for choice in typing.get_args(option)
    ]
    close = difflib.get_close_matches(str(value)[:100], choices, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close and isinstance(value, str) else ""


class Key(NamedTuple):
    """One key of a section: the type of its values, and what a number among them must satisfy."""

    hint: Any
    limit: Limit | None


@dataclasses.dataclass(frozen=True)
class Section:
    """Checks every value on the way in, whoever makes the section.

    Attributes:
      NAME: of the section in a config.
    """

    NAME: ClassVar[str]

    def __post_init__(self) -> None:
        for name, (hint, limit) in keys(type(self)).items():
            value = checked(f"{self.NAME}.{name}", hint, limit, getattr(self, name))
            object.__setattr__(self, name, value)


def keys(section: type[Section]) -> dict[str, Key]:
    """The keys of a section by name, in their order."""
    hints = typing.get_type_hints(section)
    return {
        field.name: Key(hints[field.name], field.metadata.get("limit"))
        for field in dataclasses.fields(section)
    }


_SectionT = TypeVar("_SectionT", bound=Section)


def fill(section: _SectionT, values: Mapping[str, Any]) -> _SectionT:
    """Puts values in place of 'auto' and leaves what was given."""
    missing = {name: value for name, value in values.items() if getattr(section, name) == "auto"}
    return dataclasses.replace(section, **missing)
