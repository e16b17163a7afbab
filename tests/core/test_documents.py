"""Documents that others have written: read within limits, or refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from trainer.core import documents
from trainer.core.documents import DocumentError, RepeatedKeyError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)
)


def brief(text: object) -> str:
    """A test's name."""
    return ascii(text)[:40]


def refused(error: DocumentError) -> str:
    """The sentence, which is short, of one line, and steers no terminal."""
    text = str(error)
    assert len(text) < 300
    assert text.isprintable()
    return text


# ------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": 1} x', "not JSON"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 100_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 900 + "]" * 900, "nested more than 64 deep"),
        ("1" * 10_000, "whole number of more than 64 bits"),
        ("-" + "1" * 30, "whole number of more than 64 bits"),
        (str(2**64), "whole number of more than 64 bits"),
        ("1e999", "the number '1e999', which is too large"),
        ("-1e" + "9" * 10_000, "which is too large"),
        ("NaN", "NaN, which is no number"),
        ("[-Infinity]", "-Infinity, which is no number"),
        ('"' + "x" * 100, "not JSON"),
    ],
    ids=brief,
)
def test_json_that_is_refused(text: str, message: str) -> None:
    for document in (text, text.encode()):
        with pytest.raises(DocumentError) as caught:
            documents.parse_json(document)
        assert message in refused(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "b"], "c": {}},
        2**64 - 1,
        -(2**63),
        1e308,
        "\x00\u202e\ud800",  # for the caller to judge
        [[[[]]]],
    ],
)
def test_json_that_is_read(value: Any) -> None:
    assert documents.parse_json(json.dumps(value)) == value
    assert documents.parse_json(json.dumps(value).encode()) == value


def test_sixty_four_levels_are_read() -> None:
    text = "[" * 64 + "]" * 64
    assert json.dumps(documents.parse_json(text)) == text


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(DocumentError, match="not UTF-8 text at byte 3"):
        documents.parse_json(b'["a\xff"]')


def test_an_object_is_asked_for() -> None:
    with pytest.raises(DocumentError, match="no JSON object"):
        documents.parse_object(b"[1]")


def test_no_more_of_a_file_is_read_than_the_limit(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.write(b"{}")
        file.truncate(1 << 40)  # more than any memory
    with pytest.raises(DocumentError, match="larger than 16 MiB"):
        documents.read_object(str(path))


@dataclasses.dataclass
class Record:
    name: str
    count: int
    share: float


def test_an_object_as_a_record() -> None:
    found = documents.as_record(Record, {"name": "a", "count": 1, "share": 2, "more": []})
    assert found == Record("a", 1, 2.0)


@pytest.mark.parametrize(
    "wrong",
    [{"name": 1}, {"name": None}, {"count": True}, {"count": 1.0}, {"count": []}, {"share": "1"}],
)
def test_an_object_that_is_no_record(wrong: dict[str, Any]) -> None:
    with pytest.raises(DocumentError) as caught:
        documents.as_record(Record, {"name": "a", "count": 1, "share": 2.0} | wrong)
    assert f"its {next(iter(wrong))} is" in refused(caught.value)


# ------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "alias stands for a whole section"),
        ("a: &a [*a]", "alias stands for a whole section"),
        ("a: &a {b: *a}", "alias stands for a whole section"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("{a: " * 1000, "nested more than 64 deep"),
        ("? " * 1000, "nested more than 64 deep"),
        ("- " * 1000, "nested more than 64 deep"),
        ("\n".join(" " * i + "a:" for i in range(200)), "nested more than 64 deep"),
        ("[" + "1," * 30_000 + "]", "more than 20000 values"),
        ("a: " + "1" * 10_000, "whole number has more than 64 bits"),
        ("a: 0x" + "f" * 10_000, "whole number has more than 64 bits"),
        ("a: " + "x" * (1 << 19), "larger than 256 KiB"),
        ("a: !!python/object/apply:os.system [ls]", "tag has no meaning"),
        ("a: !!binary aGk=", "tag has no meaning"),
        ("a: !!timestamp x", "tag has no meaning"),
        ("a: !!merge x", "tag has no meaning"),
        ('a: !!int ""', "not of its tag's type"),
        ("a: !!int x", "not of its tag's type"),
        ("a: !!float x", "not of its tag's type"),
        ("a: !!bool maybe", "not of its tag's type"),
        ("a: !!map x", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: \0", "control character"),
        ("a: \x1b[2J", "control character"),
        ("a: *secret", "not valid YAML"),
        ("--- a\n--- b", "not valid YAML"),
        ("a: 'secret", "not valid YAML"),
        ("%YAML 9.9\n--- secret", "not valid YAML"),
    ],
    ids=brief,
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        documents.parse_yaml(text)
    assert "secret" not in refused(caught.value).lower()


def test_a_repeated_key_is_known_to_the_caller_alone() -> None:
    with pytest.raises(RepeatedKeyError) as caught:
        documents.parse_yaml("a: 1\nb: {secret: 1, secret: 2}")
    assert (caught.value.key, caught.value.line) == ("secret", 2)
    assert "secret" not in refused(caught.value)


def test_yaml_that_is_read() -> None:
    text = "a: &x 8\nb: *x\nc: !!str 1\nd: [0x10, -0, +5, .inf, 1e-3, yes, ~]\n"
    expected = {"a": 8, "b": 8, "c": "1", "d": [16, 0, 5, float("inf"), 0.001, "yes", None]}
    assert documents.parse_yaml(text) == expected


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@hypothesis.given(VALUES)
@hypothesis.settings(deadline=None, max_examples=60)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert documents.parse_json(json.dumps(value)) == value
    text = documents.dump_yaml(value)
    assert documents.parse_yaml(text) == value


@hypothesis.given(
    st.lists(
        st.sampled_from(
            [*"[]{},:'\"&*!?|>-#%@\n \t\\", "a", "1", "e9", "<<", "---", "\u202e", "\x07"]
        )
        | st.text(max_size=3),
        max_size=40,
    ).map("".join)
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (documents.parse_json, documents.parse_yaml):
        try:
            parse(text)
        except DocumentError as error:
            refused(error)


@hypothesis.given(st.binary(max_size=60))
@hypothesis.settings(deadline=None, max_examples=100)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        documents.parse_json(data)
    except DocumentError as error:
        refused(error)
