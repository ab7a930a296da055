"""Reads CSV files as text: encoding, delimiter, header and rows with their line numbers."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..utils.names import canonical, shown
from .dataset import DatasetError

DELIMITERS = "\t,;|"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Table:
    """A CSV file as text.

    Attributes:
        header: names of the columns, unnamed ones left out.
        rows: the line each begins in, from 1, and its cells by column.
    """

    header: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_table(path: Path, wanted: Collection[str]) -> Table:
    """Reads a CSV file in UTF-8, or in UTF-16 or 32 with a byte order mark.

    Args:
        wanted: names in lower case, one of which shows that the header was split at the right delimiter.

    Raises:
        DatasetError: another encoding, no rows, two columns of one name, or more fields than columns.
    """
    text = _text(path)
    first, _, rest = text.partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own way to name the delimiter
        delimiter, skipped, text = first.strip()[4], 1, rest
    else:
        delimiter, skipped = _delimiter(text, wanted), 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    begins = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((begins + skipped, cells))
            begins = reader.line_num + 1
    except csv.Error as exc:
        raise DatasetError(f"{path}: cannot be read as a CSV file, near line {reader.line_num} ({exc})") from exc
    names = [canonical(cell) for cell in rows[0][1]] if rows else []
    if len(rows) < 2:
        raise DatasetError(
            f"{path}: no rows; the first line names the columns (path,label), one image per line follows"
        )
    twice = [name for name, count in Counter(name.lower() for name in names if name).items() if count > 1]
    if twice:
        raise DatasetError(f"{path}: two columns are called {shown(*twice)}; rename or remove one")
    table = []
    for line, cells in rows[1:]:
        if any(cell.strip() for cell in cells[len(names) :]):
            raise DatasetError(
                f"{path}, line {line}: more fields than the {len(names)} columns; quote text with commas (the "
                f"delimiter is {delimiter!r})"
            )
        padded = cells + [""] * (len(names) - len(cells))
        table.append((line, {name: cell for name, cell in zip(names, padded, strict=False) if name}))
    return Table([name for name in names if name], table)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise DatasetError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    if content.startswith(b"PK\x03\x04"):
        raise DatasetError(f"{path}: is a workbook or zip archive, not a CSV file; save the sheet as 'CSV UTF-8'")
    encoding = next((name for bom, name in _BOMS if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as exc:
        line = content[: exc.start].count(b"\n") + 1
        raise DatasetError(
            f"{path}: cannot be read as a CSV file in UTF-8 (line {line} is in another encoding, such as "
            "Windows-1252); save it as 'CSV UTF-8'"
        ) from exc
    if "\0" in text:
        raise DatasetError(f"{path}: holds zero bytes, so it is not text in UTF-8; save it as 'CSV UTF-8'")
    return text


def _delimiter(text: str, wanted: Collection[str]) -> str:
    """Returns the delimiter that splits the header into the most columns, preferring one with a `wanted` name."""

    def score(mark: str) -> tuple[bool, int]:
        try:
            names = next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), [])
        except csv.Error:
            return False, 0
        return any(canonical(name).lower() in wanted for name in names), len(names)

    return max(DELIMITERS, key=score)
