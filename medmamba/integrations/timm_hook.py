"""Registers MedMamba with timm as soon as timm is imported, without importing it."""

import importlib.abc
import importlib.util
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Runs `register` after the first import of timm, then removes itself."""

    def __init__(self) -> None:
        self._asking = threading.local()  # this finder consults the others and must not recurse

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None):
        if fullname != "timm" or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                # Removed only now: other packages call find_spec("timm") without importing it.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                try:
                    _register()
                except Exception as error:  # importing timm must not fail because of this
                    warnings.warn(f"medmamba could not register its models with timm: {error}", stacklevel=2)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers the models now if timm is imported, otherwise as soon as it is. Idempotent."""
    if "timm" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    from .timm import register

    register()
