"""Reads configs: YAML with `base:`, presets, overrides, and the keys of the family that they choose.

YAML is read by the 1.2 core rules: `on`, `yes` and dates are plain text, `1e-3` is a number, a
repeated key is an error. Unknown keys, wrong types and values out of range raise `ConfigError`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainer.config import presets
from trainer.config.schema import SECTIONS, Config
from trainer.core import documents, schedule, sections, storage
from trainer.core.errors import ConfigError, StorageError, UsageError
from trainer.core.schedule import Schedule
from trainer.core.sections import Key, checked, is_clean
from trainer.core.text import quoted, shorten
from trainer.families import registry


@functools.cache
def known_keys(family: str) -> dict[str, Key]:
    """The keys of a config with networks of this family, by 'section.key'."""
    classes = {**SECTIONS, "model": registry.keys(family)}
    return {
        f"{section}.{name}": key
        for section, keys in classes.items()
        for name, key in sections.keys(keys).items()
    }


# What a config of any family may hold.
_KEYS = {key: value for family in registry.NAMES for key, value in known_keys(family).items()}
_NAMES = {"base", *SECTIONS, *(key.partition(".")[2] for key in _KEYS)}


def _wrong(where: str, error: documents.DocumentError) -> ConfigError:
    """The error for what is no YAML; of the text, only keys that a config has are repeated."""
    what = str(error)
    if isinstance(error, documents.RepeatedKeyError) and error.key in _NAMES:
        what = f"{error.key!r} is given twice"
    return ConfigError(f"{where}{_line(error)}: {what}; expected a config in YAML")


def _line(error: documents.DocumentError) -> str:
    return "" if error.line is None else f" line {error.line}"


# ---------------------------------------------------------------- layers


_MOST_BASES = 32  # one on top of the other
_LONGEST_BASE = 1000  # characters


class _Value(NamedTuple):
    value: Any
    where: str


def _unknown(key: str, where: str, family: str = "") -> ConfigError:
    """The error for a key that does not exist, naming the one that was probably meant.

    Args:
      key: 'section.key', or without its section.
      where: it is.
      family: that the config chooses; '' if the key isn't one of `model`.
    """
    known = known_keys(family) if family else _KEYS
    owners = [other for other in registry.NAMES if family and key in known_keys(other)]
    if owners:
        return ConfigError(
            f"{where}: {shorten(key)} is a key of {' and '.join(owners)}, and model.family is "
            f"{family}"
        )
    return ConfigError(f"{where}: unknown key {shorten(key)}; {nearest(key, known)}")


def _unknown_section(name: Any, where: str) -> ConfigError:
    return ConfigError(f"{where}: unknown section {shorten(name)!r}; {nearest(shorten(name))}")


def check_keys(keys: Iterable[str], flag: str, others: Sequence[str] = ()) -> None:
    """Refuses keys that no config has.

    Args:
      keys: as 'section.key'.
      flag: that gave them, for the message.
      others: what else it takes.

    Raises:
      UsageError: there is no such key; names the nearest.
    """
    for key in keys:
        if key not in _KEYS and key not in others:
            raise UsageError(
                f"{flag}={shorten(key)}: unknown key; {nearest(key, [*_KEYS, *others])}"
            )


def nearest(text: str, known: Iterable[str] = _KEYS) -> str:
    """'did you mean training.g_lr?' for a key that no config has, or the names that there are.

    Args:
      text: 'section.key', or a key without its section, or a section.
      known: the keys to choose from.
    """
    section, dot, name = text.partition(".")
    means: dict[str, list[str]] = {}  # what a single word may stand for
    for key in known:
        means.setdefault(key.partition(".")[2], []).append(key)
    neighbours = [key.partition(".")[2] for key in known if key.startswith(f"{section}.")]
    if not dot:
        for each in SECTIONS:
            means[each] = [each]
        close = _closest(text, means)
        found = means[close] if close else []
    elif name in means:
        found = means[name]
    elif section in SECTIONS:
        close = _closest(name, neighbours)
        found = [f"{section}.{close}"] if close else []
    else:
        close = _closest(section, SECTIONS)
        found = [close] if close else []
    if found:
        return f"did you mean {' or '.join(found)}?"
    if section in SECTIONS:
        return f"keys of {section} are {', '.join(neighbours)}"
    return f"sections are {', '.join(SECTIONS)}"


def _closest(name: str, names: Iterable[str]) -> str:
    """The name that is spelt most like another, '' if none is."""
    return next(iter(difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0.5)), "")


def _is_like_a_config(document: Mapping[Any, Any]) -> bool:
    """Whether one of its names is a section's, or nearly."""
    names = [name for name in document if isinstance(name, str) and len(name) < 100]
    return any(
        name in _NAMES or difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.5)
        for name in names
    )


def _flatten(document: Any, where: str) -> Iterator[tuple[str, _Value]]:
    """The keys of a document as ('section.key', value); an empty section is no keys.

    Those of `model` may be unknown: which there are depends on `model.family`.
    """
    if document is None or document == {}:
        return
    if not isinstance(document, Mapping) or not _is_like_a_config(document):
        # It may be any file, with secrets in it: nothing of it is shown.
        raise ConfigError(
            f"{where} line 1: this is no config; expected sections ({', '.join(SECTIONS)})"
        )
    for section, keys in document.items():
        if section not in SECTIONS:
            raise _unknown_section(section, where)
        if not isinstance(keys, Mapping) and keys is not None:
            got = "text" if isinstance(keys, str) else quoted(keys)
            raise ConfigError(f"{where}: section {section} must hold keys, got {got}")
        for name, value in (keys or {}).items():
            key = f"{section}.{name}"
            if section != "model" and key not in _KEYS:
                raise _unknown(key, where)
            yield key, _Value(value, where)


def _read_layers(path: str, children: tuple[str, ...] = ()) -> dict[str, _Value]:
    """The values of a file on top of those of the files it is based on."""
    if path in children:
        chain = " -> ".join([*children[children.index(path) :], path])
        raise ConfigError(f"{children[-1]}: base files form a cycle: {shorten(chain, 1000)}")
    if len(children) >= _MOST_BASES:
        raise ConfigError(
            f"{children[0]}: there are more than {_MOST_BASES} base files below it; expected a few"
        )
    document = _read_document(path)
    values: dict[str, _Value] = {}
    if isinstance(document, dict) and not isinstance(document.pop("description", ""), str):
        raise ConfigError(f"{path}: description: expected a line of text")
    if isinstance(document, dict) and "base" in document:
        base = document.pop("base")
        if not isinstance(base, str) or not 0 < len(base) <= _LONGEST_BASE or not is_clean(base):
            raise ConfigError(f"{path}: base = {quoted(base)}: expected the path of another config")
        try:
            below = presets.find(base, storage.sibling(path, base))
        except ConfigError as error:
            raise ConfigError(f"{path}: base: {error}") from None
        values = _read_layers(below, (*children, path))
    values.update(_flatten(document, path))
    return values


def _read_document(path: str) -> Any:
    """The value of a config file.

    Raises:
      ConfigError: it is no YAML, or does not exist.
      StorageError: it cannot be read.
    """
    try:
        return documents.read_yaml(path)
    except documents.DocumentError as error:
        raise _wrong(path, error) from None
    except StorageError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
        raise ConfigError(f"{error}; {presets.nearest(path)}") from error


def _read_override(text: str) -> tuple[str, _Value]:
    where = f"--set {shorten(text)}"
    key, equals, raw = text.partition("=")
    key = key.strip()
    if equals and key and "." not in key and key not in SECTIONS:
        raise _unknown(key, where)
    if not equals or "." not in key:
        raise ConfigError(f"{where}: expected --set section.key=value")
    section = key.partition(".")[0]
    if section not in SECTIONS:
        raise ConfigError(f"{where}: unknown section {shorten(section)!r}; {nearest(key)}")
    if section != "model" and key not in _KEYS:
        raise _unknown(key, where)
    raw = raw.strip()
    is_quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'"
    if key in _KEYS and _KEYS[key].hint is str and not is_quoted:
        return key, _Value(raw, where)  # a path stays as typed, whatever YAML would make of it
    try:
        return key, _Value(documents.parse_yaml(raw), where)
    except documents.DocumentError as error:
        raise ConfigError(f"{where}: {error}; expected --set section.key=value") from None


def _build(values: Mapping[str, _Value]) -> Config:
    chosen = values.get("model.family", _Value(registry.DEFAULT, ""))
    family = chosen.value
    try:
        model = registry.keys(family)
    except ConfigError as error:
        raise ConfigError(f"{chosen.where}: {error}") from None
    known = known_keys(family)
    arguments: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, (value, where) in values.items():
        section, _, name = key.partition(".")
        if key not in known:
            raise _unknown(key, where, family)
        try:
            arguments[section][name] = checked(key, *known[key], value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    classes = {**SECTIONS, "model": model}
    made: dict[str, Any] = {name: classes[name](**keys) for name, keys in arguments.items()}
    config = Config(**made)
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    """Rules between keys that hold whatever the data set and the machine are."""
    if config.augment.mode == "fixed" and config.augment.p == 0:
        raise ConfigError("augment.mode = 'fixed' needs its strength: set augment.p above 0")
    if config.augment.mode == "ada" and isinstance(config.augment.p, Schedule):
        raise ConfigError("augment.p follows a schedule, and augment.mode = 'ada' steers it, too")


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, those it is based on, and overrides on top.

    Args:
      path: the name of a preset, or a YAML file, local or gs://. Its top level holds sections, and
        optionally `description`, a line of text, and `base`: another config, by its path relative
        to this file or by a preset's name, whose values hold where this one is silent.
      overrides: texts of the form 'section.key=value', the last one wins.

    Raises:
      ConfigError: there is no such config, or naming the file, key, value and what was expected.
      StorageError: a file cannot be read.
    """
    values = _read_layers(presets.find(path, storage.resolve(path)))
    values.update(_read_override(text) for text in overrides)
    return _build(values)


def from_dict(document: Mapping[str, Any], where: str = "config") -> Config:
    """The config of nested dictionaries; absent keys have their defaults.

    Raises:
      ConfigError: starting with `where`, naming key, value and what was expected.
    """
    return _build(dict(_flatten(document, where)))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionaries, in the order of the sections."""
    return {
        name: {
            key: schedule.to_document(value) if isinstance(value, Schedule) else value
            for key, value in vars(getattr(config, name)).items()
        }
        for name in SECTIONS
    }


def schedules(config: Config) -> dict[str, Schedule]:
    """The numbers that follow a schedule, by their keys without the section."""
    return {
        key: value
        for name in SECTIONS
        for key, value in vars(getattr(config, name)).items()
        if isinstance(value, Schedule)
    }


def to_yaml(config: Config) -> str:
    """YAML that `load` reads back as an equal config."""
    return documents.dump_yaml(to_dict(config))
