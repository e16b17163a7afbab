"""Explanations of the keys of a config, made of the dataclasses that define them.

What a key is for stands in the docstring of its section, under `Attributes:`; its type, limit and
default are those of its field.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import identity, loading
from trainer.config.schema import SECTIONS
from trainer.core import documents, sections
from trainer.core.errors import UsageError
from trainer.core.schedule import Schedule
from trainer.core.sections import Auto, Limit, Section
from trainer.core.text import shorten
from trainer.families import registry
from trainer.families.protocol import Keys

_WIDTH = 100
_MORE = "All about a key: python -m trainer config KEY"
# Sides of the square images for which the rule of an 'auto' is shown.
_SIDES = (64, 256, 1024)


@dataclass(frozen=True)
class Entry:
    """All that is known of a key.

    Attributes:
      section, name: the two halves of 'section.name'.
      family: whose key it is, for those of `model`; else ''.
      text: what it is for.
      values: which it may have, in words.
      limit: of its numbers, in words; '' for none.
      default: as a config has it.
      auto: what 'auto' stands for, by family.
    """

    section: str
    name: str
    family: str
    text: str
    values: tuple[str, ...]
    limit: str
    default: str
    auto: dict[str, str]

    @property
    def key(self) -> str:
        """'section.name'."""
        return f"{self.section}.{self.name}"


def entries() -> list[Entry]:
    """Every key of every section, those of each family among them, in the order of a config."""
    found: list[Entry] = []
    for name, section in SECTIONS.items():
        if name != Keys.NAME:
            found += _entries(section, "")
            continue
        text = _attributes(Keys)["family"]
        values = tuple(map(repr, registry.NAMES))
        found.append(Entry(name, "family", "", text, values, "", registry.DEFAULT, {}))
        for family in registry.NAMES:
            of_family = _entries(registry.keys(family), family)
            found += [entry for entry in of_family if entry.name != "family"]
    return found


def _entries(section: type[Section], family: str) -> Iterator[Entry]:
    texts, defaults = _attributes(section), section()
    families = (family,) if family else registry.NAMES
    for name, (hint, limit) in sections.keys(section).items():
        yield Entry(
            section.NAME,
            name,
            family,
            texts[name],
            tuple(sections.describe(hint)),
            _limit(hint, limit),
            _as_yaml(getattr(defaults, name)),
            _auto(section.NAME, name, families) if Auto in typing.get_args(hint) else {},
        )


def _attributes(section: type[Section]) -> dict[str, str]:
    """What the docstring of a section says of each key."""
    _, _, text = inspect.cleandoc(section.__doc__ or "").partition("\nAttributes:\n")
    found = re.findall(r"^  (\w+): (.*(?:\n(?:    .*)?)*)", text, re.MULTILINE)
    return {name: " ".join(lines.split()) for name, lines in found}


def _limit(hint: Any, limit: Limit | None) -> str:
    if limit is None:
        return ""
    return f"{limit.text}{', at both ends' if Schedule in typing.get_args(hint) else ''}"


def _as_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return documents.dump_yaml(value).partition("\n")[0]


def _auto(section: str, name: str, families: Sequence[str]) -> dict[str, str]:
    """What each family puts in place of 'auto', in a config that leaves all else to its rules."""
    found = {}
    for family in families:
        sides: dict[str, list[str]] = {}
        for side in _SIDES:
            value = _as_yaml(_auto_value(family, section, name, (side, side)))
            sides.setdefault(value, []).append(str(side))
        texts = [f"{value} at {' and '.join(at)}" for value, at in sides.items()]
        found[family] = f"{', '.join(texts)} pixels" if len(sides) > 1 else next(iter(sides))
    return found


def _auto_value(family: str, section: str, name: str, resolution: tuple[int, int]) -> Any:
    keys: Any = registry.keys(family)
    if section != Keys.NAME:
        return keys().auto_values(resolution, None)[section][name]
    return getattr(dataclasses.replace(keys(), **{name: "auto"}).resolved(resolution), name)


# ------------------------------------------------------------------------------------- text


def explain(text: str = "") -> str:
    """The sections with a line for each key, one section, or all that is known of a key.

    Args:
      text: '' for all; a section; 'section.key', or a key without its section.

    Raises:
      UsageError: there is no such key; names the nearest.
    """
    every = entries()
    if not text:
        return "\n\n".join([*(_section(name, every) for name in SECTIONS), _MORE])
    if text in SECTIONS:
        return _section(text, every)
    found = [entry for entry in every if text in (entry.key, entry.name)]
    if not found:
        raise UsageError(f"unknown key {shorten(text)}; {loading.nearest(text)}")
    return "\n\n".join(map(_details, found))


def _section(name: str, every: Sequence[Entry]) -> str:
    """A section's title, and a line for each of its keys."""
    families: tuple[str, ...] = ("",)
    if name == Keys.NAME:
        families += registry.NAMES
    blocks = []
    for family in families:
        section = registry.keys(family) if family else SECTIONS[name]
        title = inspect.cleandoc(section.__doc__ or "").partition("\n")[0]
        head = f"{name} ({family})" if family else name
        lines = [textwrap.shorten(f"{head}: {title}", _WIDTH, placeholder=" ...")]
        lines += [_line(e) for e in every if (e.section, e.family) == (name, family)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _line(entry: Entry) -> str:
    head = f"  {entry.name:<19}{entry.default:<14}"
    return head + textwrap.shorten(entry.text, _WIDTH - len(head), placeholder=" ...")


def _details(entry: Entry) -> str:
    rows = {
        "values": _alternatives(entry.values),
        "limit": entry.limit,
        "default": entry.default,
        "'auto'": "; ".join(f"{family}: {value}" for family, value in entry.auto.items()),
        "resume": f"a resumed run {'may change' if identity.may_change(entry.key) else 'keeps'} it",
    }
    return "\n".join(
        [
            entry.key + (f" ({entry.family})" if entry.family else ""),
            *_wrapped(entry.text, "  "),
            *(line for name, row in rows.items() if row for line in _wrapped(row, f"  {name:<10}")),
        ]
    )


def _alternatives(values: Sequence[str]) -> str:
    *others, last = values
    if any("," in value for value in values):
        return f"{'; '.join(others)}; or {last}"
    return f"{', '.join(others)} or {last}" if others else last


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
