"""What the page "Use via API" says of an endpoint: its docstring, and an example file for each upload."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

_SECTION = re.compile(r"\n\n(Args|Returns):\n")
_ARGUMENT = re.compile(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", re.MULTILINE)


def documented(function: Callable[..., Any], inputs: Sequence[Any], **names: str) -> str:
    """Moves the section Args of a docstring to the components; returns the rest as the description of the endpoint.

    Args:
        function: of the endpoint, with a docstring in the style of Google.
        inputs: components whose labels are parameter names. One that has a description already keeps it.
        names: values for words in braces.
    """
    text = inspect.getdoc(function) or ""
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    summary, *rest = _SECTION.split(text)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    arguments = dict(_ARGUMENT.findall(sections.get("Args", "")))
    for component in inputs:
        if component.label in arguments:
            said = _one_line(arguments[component.label])
            describe(component, said[:1].upper() + said[1:])
    return "\n".join(filter(None, (_one_line(summary), _returns(sections.get("Returns", "")))))


def describe(component: Any, text: str) -> None:
    """Sets what the page says of a component, once."""
    if "api_info" in vars(component):
        return
    schema = component.api_info
    component.api_info = lambda: {**schema(), "additional_description": text}


def example_of(component: Any, *names: str) -> Any:
    """Makes the code on the page send files of these names, not one from the network; returns the component.

    Args:
        names: one for a component that takes a single file.
    """
    files = [{"path": name, "url": name, "orig_name": name, "meta": {"_type": "gradio.FileData"}} for name in names]
    component.example_payload = lambda: files if component.file_count == "multiple" else files[0]
    return component


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _returns(text: str) -> str:
    return f"Returns: {_one_line(text)}" if text else ""
