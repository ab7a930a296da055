"""Shows `>>>` examples in docstrings as code, wherever they stand in the text."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)(?:>>>|\.\.\.).*)*", re.MULTILINE)


class Examples(Extension):
    """Puts fences around examples before docstrings are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrites the docstring of `obj`."""
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(
                lambda m: f"\n{m['indent']}```pycon\n{m[0]}\n{m['indent']}```\n", obj.docstring.value
            )
