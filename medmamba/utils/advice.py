"""Rewrites the advice in messages for the entry point in use: Python, command line or app.

The library writes settings as Python arguments, such as "choose one with frame=0". An entry point with other spellings
passes messages through `spelled`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

_VALUE = r"""\([^()]*\)|\[[^\[\]]*\]|"[^"]*"|'[^']*'|\.\.\.|[\w.+\-]*\w|"""
_SETTING = re.compile(rf"(?<![\w./\\=\-])([a-z][a-z_]*)=({_VALUE})(?: \((--[^()]*)\))?(?![\w(=])")


def spelled(text: str, settings: Mapping[str, Callable[[str], str]], phrases: Mapping[str, str] | None = None) -> str:
    """Returns a message with its settings as an entry of the program spells them.

    Args:
        text: with settings such as `frame=0`, `window=(40, 400)` or `restart=True (--restart)`.
        settings: by name, what to say for a value; settings of other names are left as they are.
        phrases: whole phrases and what to say instead, replaced first.
    """
    for phrase, instead in (phrases or {}).items():
        text = text.replace(phrase, instead)

    def replace(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        return settings[name](value) if name in settings else match[0]

    return _SETTING.sub(replace, text)


def as_option(option: str, metavar: str = "") -> Callable[[str], str]:
    """Returns a function that spells a value for a command line: `frame=0` as `--frame 0`, `window=(-600, 1500)` as
    `--window=-600,1500`.

    Args:
        option: such as "--frame".
        metavar: for a setting without a value, as in "name the dataset (dataset=...)"; "" for switches.
    """

    def spell(value: str) -> str:
        if value == "True":
            return option
        if value in ("", "..."):
            return f"{option} {metavar}".rstrip()
        parts = [part.strip() for part in value.strip("()[]").split(",")]
        if value[0] == "(":  # window=(center, width) names the numbers
            parts = [part.upper() if part.isalpha() else part for part in parts]
        text = ",".join(part.strip("'\"") for part in parts if part)
        return f"{option}={text}" if text.startswith("-") else f"{option} {shlex.quote(text)}"

    return spell
