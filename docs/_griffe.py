"""Teaches the parser of docstrings two conventions of this project.

`>>>` examples may stand anywhere in the text, and one entry of a section may describe several names: `a, b: ...`.
"""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)(?:>>>|\.\.\.).*)*", re.MULTILINE)
SECTION = re.compile(
    r"^(?P<indent> *)(?:Args|Attributes|Raises):\n(?:(?P=indent) +\S.*\n?|\n(?=(?P=indent) ))+", re.MULTILINE
)
SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<text>: .*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)


class Conventions(Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Puts fences around examples and splits entries with several names."""
        if obj.docstring:
            text = EXAMPLE.sub(r"\n\g<indent>```pycon\n\g<0>\n\g<indent>```\n", obj.docstring.value)
            obj.docstring.value = SECTION.sub(lambda section: SEVERAL.sub(_split, section[0]), text)


def _split(entry: re.Match[str]) -> str:
    return "\n".join(f"{entry['indent']}{name}{entry['text']}" for name in entry["names"].split(", "))
