"""What the subcommands that train share."""

from __future__ import annotations

STOPPED = 3  # exit code of a run that stopped cleanly and can be resumed


def split_option(text: str | None) -> str | list[float] | None:
    """Parses --split: three fractions, or "published"."""
    if text is None or text == "published":
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--split takes three fractions such as 0.7,0.1,0.2, or 'published'; got {text!r}") from None
