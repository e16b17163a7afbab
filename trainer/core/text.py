"""Text of messages: what comes from outside, made fit for a terminal, a log and Markdown; sizes.

Names, paths, labels, licences, config values, and what peers and services answer are written by
others. Unescaped they could move a terminal's cursor, hide or forge lines, or reverse what is read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from trainer.core.errors import UsageError

# Characters of a foreign text that a message repeats.
SHOWN = 200

# Control characters and line breaks (Cc, Zl, Zp), invisible ones that steer the direction or join
# (Cf), and halves of surrogate pairs (Cs), which no stream can encode. Tests hold this to Unicode.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_MARKDOWN = re.compile(r"([\\`*{}\[\]()|~$]|(?<![^\W_])_|_(?![^\W_]))")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}


def printable(text: str) -> str:
    r"""The text as one line that steers no terminal: hidden characters are written as `\x1b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in _HIDDEN
        else char
        for char in text
    )


def shorten(value: object, limit: int = SHOWN) -> str:
    """A foreign value for a message: printable, at most `limit` characters and an ellipsis.

    Args:
      value: a text is taken as it is, everything else as Python shows it.
      limit: characters.
    """
    text = value if isinstance(value, str) else quoted(value, limit)
    short = printable(text[: limit + 1])
    return short if len(short) <= limit else f"{short[:limit]}..."


def quoted(value: object, limit: int = SHOWN) -> str:
    """As `shorten`, and a text in quotes, as Python shows it."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}..."
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):  # Python refuses to show thousands of digits
        return repr(value) if value.bit_length() < 200 else "a number of more than 60 digits"
    if isinstance(value, (dict, list, tuple, set)) and not value:
        return repr(value)
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return type(value).__name__


def image_size(resolution: Sequence[int], channels: int | None = None) -> str:
    """WIDTHxHEIGHT, as everywhere where people read or type a size; with channels 256x128x3.

    Args:
      resolution: (height, width) in pixels, the order of arrays.
      channels: of the images.
    """
    height, width = resolution
    return f"{width}x{height}" if channels is None else f"{width}x{height}x{channels}"


def parse_image_size(text: str, where: str) -> tuple[int, int]:
    """(height, width) in pixels of a size as people type it: '256' or 'WIDTHxHEIGHT'.

    Args:
      text: as it was typed.
      where: the flag it was given with, for the message.

    Raises:
      UsageError: it is neither.
    """
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if not match:
        raise UsageError(f"{where}={shorten(text)} is neither a size, as 256, nor WIDTHxHEIGHT")
    return int(match[2] or match[1]), int(match[1])


def markdown(text: object, limit: int | None = None) -> str:
    """A foreign text as plain words of a line of Markdown: no markup, no HTML, no table's end."""
    line = printable(str(text)) if limit is None else shorten(str(text), limit)
    escaped = _MARKDOWN.sub(r"\\\1", line)
    return "".join(_HTML.get(char, char) for char in escaped)


def code(text: object) -> str:
    """A foreign text as code in a line of Markdown, in more backticks than it holds in a row."""
    line = printable(str(text)).replace("|", "\\|")
    fence = "`" * (_longest_ticks(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """A foreign text of several lines as a block of code in Markdown."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    lines = [printable(line) for line in text.rstrip("\n").split("\n")]
    return "\n".join([f"{fence}{language}", *lines, fence]) + "\n"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
