"""Error messages of the command: one line with the cause, and advice in terms of this command's options."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from typing import TextIO

from ..utils.advice import as_option, spelled
from ..utils.extras import EXTRAS, missing_text
from ..utils.text import for_stream

EXPECTED = (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError)
"""Errors caused by the input or the machine; all others are bugs."""

# Advice that only applies in Python, and its equivalent for users of the command.
_PHRASES = {
    "give it one with model.reset_classifier(num_classes)": "train one: medmamba train --from MODEL --data PATH",
    "compute in float32, as model.float() does": "take a model with float32 weights",
    "rename, or leave out dataset= and classes= to take": "rename, or leave out --dataset and --classes to take",
}


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints text to standard output or `stream`, with escapes for characters that it cannot encode."""
    stream = stream or sys.stdout
    print(for_stream(text, stream), file=stream)


def followable(text: str, parser: argparse.ArgumentParser, source: str = "") -> str:
    """Returns a message of the library with its advice phrased as options of a command.

    Args:
        parser: of the command; settings for which it has no option are not changed.
        source: file name that the message may begin with, which is not changed.
    """
    settings = {}
    for action in parser._actions:
        option = next((name for name in action.option_strings if name.startswith("--")), None)
        if option:
            metavar = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
            settings[option[2:].replace("-", "_")] = as_option(option, metavar)
    kept = source if source and text.startswith(source) else ""
    return kept + spelled(text[len(kept) :], settings, _PHRASES)


def message(error: BaseException, parser: argparse.ArgumentParser) -> str:
    """Returns the message to show for an error."""
    if (text := _out_of_memory(error, parser)) is not None:
        return text
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) in EXTRAS:
        return missing_text(name, "this")
    if isinstance(error, OSError) and error.errno is not None and (text := _system(error)) is not None:
        return text
    from ..utils.files import is_disk_full

    if is_disk_full(error) and not isinstance(error, OSError):
        return "no space left to write a file; make room, or use a folder on another disk"
    text = str(error) or type(error).__name__
    if not isinstance(error, EXPECTED):
        return f"unexpected error, {type(error).__name__}: {text}. Run the command with --debug for a traceback"
    return followable(text, parser)


def _out_of_memory(error: BaseException, parser: argparse.ArgumentParser) -> str | None:
    text = str(error)
    names = {cls.__name__ for cls in type(error).__mro__}
    foreign = isinstance(error, RuntimeError) and re.search(
        r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", text
    )
    if not (names & {"MemoryError", "OutOfMemoryError"} or foreign):
        return None
    gpu = "OutOfMemoryError" in names or re.search(r"CUDA|CUBLAS|MPS|HIP", text)
    if isinstance(error, MemoryError) and text and not text.startswith("Unable to allocate"):
        return followable(text, parser)  # of this package, with advice of its own
    wanted = re.search(r"(?:allocate|allocate memory: you tried to allocate) ([\d.]+ ?[KMGT]?i?B(?:ytes)?)", text, re.I)
    have = {option for action in parser._actions for option in action.option_strings}
    ways = [way for option, way in _LESS_MEMORY if option in have and (gpu or option != "--device")]
    where = "not enough GPU memory" if gpu else "not enough memory"
    amount = f" (another {wanted[1]} did not fit)" if wanted else ""
    return f"{where}{amount}: {', or '.join(ways) or 'close other programs'}"


_LESS_MEMORY = (
    ("--batch-size", "lower --batch-size"),
    ("--accumulate", "raise --accumulate"),
    ("--size", "train at a smaller --size"),
    ("--device", "use --device cpu"),
)


def _system(error: OSError) -> str | None:
    """Returns the operating system's message with advice; None for an error with a message of its own."""
    if error.strerror is None or (error.errno in _ADVICE and len(error.strerror) > 60):
        return error.strerror  # a message of this package
    if error.strerror != os.strerror(error.errno or 0):
        return None
    place = "".join(f"{os.fsdecode(name)}: " for name in (error.filename,) if isinstance(name, str | bytes))
    advice = _ADVICE.get(error.errno or 0)
    return f"{place}{error.strerror.lower()}" + (f"; {advice}" if advice else "")


_ADVICE = {
    errno.ENOSPC: "make room, or use a folder on another disk",
    errno.EDQUOT: "your share of the disk is used up; make room, or use a folder elsewhere",
    errno.EACCES: "you may not read or write there; use another folder, or for downloads set HF_HOME to one of yours",
    errno.EPERM: "you may not do that there; use another folder",
    errno.EROFS: "nothing can be written there; use another folder, or for downloads set HF_HOME to one of yours",
    errno.ENOENT: "check the name; a folder to write to may have to be made first",
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENAMETOOLONG: "use a shorter name",
}
