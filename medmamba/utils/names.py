"""Matches names that people spell in several ways, without ever making two different names equal.

Names are compared exactly first, then by keys that forgive more and more: the Unicode form and outer spaces, then case
and separators, then separators altogether, then the spelling of a whole number. A key counts only where a single
candidate has it; where several do, the name is refused rather than guessed. Signs are never dropped: "ER+" and "ER-",
"<5" and ">5", "1.0" and "10" stay different at every step.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹣－"), "-")
_QUOTES = dict.fromkeys(map(ord, "'`´‘’\""), None)


class AmbiguousNameError(ValueError):
    """A name that could be several others; the message names them."""


def canonical(name: str) -> str:
    """Returns the name in Unicode normal form C without outer white space and invisible format characters.

    Archives made on macOS hold decomposed names, which look the same and compare unequal.
    """
    text = unicodedata.normalize("NFC", name)
    return "".join(c for c in text if unicodedata.category(c) != "Cf").strip()


def words(name: str) -> str:
    """Returns a key that forgives case, full-width forms and separators: "Normal_or-benign" is "normal or benign".

    A hyphen between letters or digits separates; at the beginning or end of a word it is a sign and stays.
    """
    text = unicodedata.normalize("NFKC", canonical(name)).casefold()
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).translate(_QUOTES)
    text = re.sub(r"(?<=\w)-(?=\w)", " ", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    return " ".join(re.sub(r"[\s_,;:()\[\]{}/\\]+", " ", text).split())


def letters(name: str) -> str:
    """Returns `words(name)` without its spaces, except between digits: "COVID-19" and "covid19", not "1-2" and "12"."""
    return re.sub(r"(?<!\d) | (?!\d)", "", words(name))


def whole_number(name: str) -> int | None:
    """Returns the integer that "1", "01", "1.0" and "１" all spell; None for other names."""
    text = unicodedata.normalize("NFKC", canonical(name))
    match = re.fullmatch(r"([0-9]{1,18})(\.0*)?", text)
    return int(match[1]) if match else None


_KEYS: tuple[Callable[[str], Hashable], ...] = (str, canonical, words, letters, whole_number)


def find_name(name: str, candidates: Sequence[str | Collection[str]]) -> int | None:
    """Returns the index of the candidate that `name` stands for; None where there is none.

    Args:
        candidates: names, or for each candidate all names that it has.

    Raises:
        AmbiguousNameError: no candidate has exactly this name, and several have one that is spelled alike.
    """
    options = [(option,) if isinstance(option, str) else tuple(option) for option in candidates]
    for key in _KEYS:
        wanted = key(name)
        if wanted is None or (wanted == "" and key is not str):
            continue
        hits = {i: other for i, option in enumerate(options) for other in option if key(other) == wanted}
        if len(hits) == 1:
            return next(iter(hits))
        if hits:
            raise AmbiguousNameError(
                f"{shown(name)} could be any of {shown(*hits.values())}, which differ in case, punctuation or Unicode "
                "form alone; write the name exactly"
            )
    return None


def alike(names: Iterable[str], key: Callable[[str], Hashable] = letters) -> list[tuple[str, ...]]:
    """Returns the groups of different names that have the same key, in order; names without one are left out."""
    groups: dict[Hashable, list[str]] = {}
    for name in dict.fromkeys(names):
        if (found := key(name)) not in (None, ""):
            groups.setdefault(found, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def shown(*names: str, limit: int = 5) -> str:
    """Returns names in quotes for a message, escaped where two of them would look the same or cannot be printed."""
    looks = [canonical(name) for name in names]
    escape = len(set(looks)) < len(set(names)) or any(not name.isprintable() for name in names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(ascii(name) if escape else repr(name) for name in names[:limit]) + more
