"""Text from outside is fit to be shown."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from trainer.core import text as text_lib
from trainer.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 100%", "plain text, 100%"),
        ("Käse 猫 🐈", "Käse 猫 🐈"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\udcff\0", r"\udcff\x00"),
        ("\ufeff\u200b\xad", r"\ufeff\u200b\xad"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert text_lib.printable(text) == shown


@hypothesis.given(st.text(st.characters(), max_size=300))
@hypothesis.settings(deadline=None, max_examples=100)
def test_any_text_becomes_one_short_line(text: str) -> None:
    line = text_lib.shorten(text)
    line.encode()
    assert len(line) <= text_lib.SHOWN + 3
    assert len(line.splitlines()) <= 1
    assert "\x1b" not in line
    for inline in (text_lib.markdown(text), text_lib.code(text)):
        assert len(inline.splitlines()) <= 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 300, "'" + "x" * 200 + "'..."),
        pytest.param(10**10_000, "a number of more than 60 digits", id="huge"),
        ([1, "secret"], "a list"),
        ({"secret": 1}, "an object"),
        ([], "[]"),
        (None, "None"),
        (1.5, "1.5"),
    ],
)
def test_values_in_messages(value: object, shown: str) -> None:
    assert text_lib.quoted(value) == shown


def test_sizes_are_width_x_height() -> None:
    assert text_lib.image_size((128, 256)) == "256x128"
    assert text_lib.image_size([128, 256], 3) == "256x128x3"


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("256x128", (128, 256)), ("1x2", (2, 1))]
)
def test_sizes_that_people_type(text: str, size: tuple[int, int]) -> None:
    assert text_lib.parse_image_size(text, "--resolution") == size


@pytest.mark.parametrize("text", ["", "x", "64x", "-64", "64X64", "6.4", "999999", "\u0664"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--resolution=.* is neither a size, as 256, nor WIDTHx"):
        text_lib.parse_image_size(text, "--resolution")


def test_markdown_and_html_are_text() -> None:
    hostile = "a|b <img src=x onerror=alert(1)> [x](javascript:y) `c` **d** ![e](f)\n# G"
    shown = text_lib.markdown(hostile)
    assert "<" not in shown
    assert "\n" not in shown
    for char in "|[]()`*":
        assert all(shown[i - 1] == "\\" for i, found in enumerate(shown) if found == char)
    assert text_lib.markdown("fid50k_full, CC-BY 4.0") == "fid50k_full, CC-BY 4.0"
    assert text_lib.markdown("_a_") == r"\_a\_"


def test_code_cannot_be_left() -> None:
    assert text_lib.code("a") == "`a`"
    assert text_lib.code("a`b") == "``a`b``"
    assert text_lib.code("`") == "`` ` ``"
    assert text_lib.code("") == "`  `"
    block = text_lib.code_block("a: 1\n```\n<script>\n\x1b[2J\n", "yaml")
    assert block == "````yaml\na: 1\n```\n<script>\n\\x1b[2J\n````\n"
