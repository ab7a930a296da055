"""Escapes untrusted text, such as names of files and classes, for printing and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TextIO

# Control characters, among them those that begin terminal escapes; lone surrogates, which stand for bytes of a file
# name that are no UTF-8; what ends a line or turns the direction of writing; invisible format characters.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
    "\ud800-\udfff]"
)


def printable(text: object) -> str:
    """Returns the text on one line, with everything that cannot be printed, or steers a terminal, as an escape."""
    return _UNPRINTABLE.sub(_escape, str(text))


def for_stream(text: str, stream: TextIO) -> str:
    """Returns text of several lines that `stream` can print: as `printable`, and with escapes for what its encoding
    lacks."""
    text = "\n".join(map(printable, text.split("\n")))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def json_text(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Returns JSON (RFC 8259) of plain data: NaN and infinity, for which it has no numbers, become null.

    Characters that cannot be printed are escaped, so that the text is safe to show in a terminal.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return re.sub(f"(?![\n]){_UNPRINTABLE.pattern}", lambda match: json.dumps(match[0])[1:-1], text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]
