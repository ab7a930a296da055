"""Files of results that are written as they come, and gone on with after whatever stopped them.

A JSON Lines or CSV file grows line by line; a line that was cut off is removed when the work goes on. Parquet cannot
grow: its rows are written in parts, each of which appears whole, and a single file is put together from them in the
end. Beside the results lies `NAME.run.json`, which says what they were made with: another model or other options do
not go on in the same file.
"""

from __future__ import annotations

import abc
import csv
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.extras import require
from ..utils.files import clear_space_errors, locked, write_atomically, write_text
from ..utils.strict_json import read_json
from ..utils.tables import csv_cell, csv_row
from ..utils.text import json_text
from .seen import Seen

FORMAT = 1
SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS = 256  # between writes, or
_SECONDS = 2.0
_PART_ROWS = 20_000  # of Parquet, or
_PART_SECONDS = 30.0


class SinkError(ValueError):
    """Results that cannot be written there, or were begun with something else."""


class Sink(abc.ABC):
    """Results of images, each answered once; a context manager, inside of which it is locked.

    Args:
        path: file, or folder of parts.
        labels: names of the classes.
        identity: plain data that results depend on: model, options. A file that was begun with others is refused.

    Attributes:
        seen: names of the images that have been answered. Whoever takes on an image adds it there.
        answered: how many were answered before.
    """

    rows_at_once, seconds_at_once = _ROWS, _SECONDS

    def __init__(self, path: Path, labels: Sequence[str], identity: Mapping[str, Any]) -> None:
        self.path, self.labels = path, list(labels)
        self.identity = json.loads(json_text({**identity, "labels": self.labels}))
        self.seen = Seen()
        self.answered = 0
        self._rows: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def __enter__(self) -> Sink:
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        self._lock = locked(lock, f"{self.path} is being written", timeout=0, remove=True)
        self._lock.__enter__()
        try:
            self._check_identity()
            with clear_space_errors(self.path):
                self._open()
        except BaseException as error:
            self._lock.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            with clear_space_errors(self.path):
                self.flush()
                self._close(complete=kind is None)
        finally:
            self._lock.__exit__(kind, error, trace)

    def take(self, name: str) -> bool:
        """Takes on an image; False where it has been answered, or taken on, before."""
        return self.seen.add(self.key(name))

    def key(self, name: str) -> str:
        """Returns the name as it stands in the file."""
        return name

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the result of one image: "source", and either "error" or the fields of a `Prediction`."""
        self._rows.append(dict(row))
        if len(self._rows) >= self.rows_at_once or time.monotonic() - self._last > self.seconds_at_once:
            with clear_space_errors(self.path):
                self.flush()

    def flush(self) -> None:
        """Writes what is held back."""
        if self._rows:
            self._append(self._rows)
            self._rows = []
        self._last = time.monotonic()

    @property
    def sidecar(self) -> Path:
        """The file that says what the results were made with."""
        return self.path.with_name(f"{self.path.name}.run.json")

    def _check_identity(self) -> None:
        if self.sidecar.is_file():
            begun = read_json(self.sidecar)
            before = begun.get("made_with") if isinstance(begun, dict) and begun.get("format") == FORMAT else None
            if before != self.identity:
                known = before if isinstance(before, dict) else {}
                keys = sorted(k for k in {*known, *self.identity} if known.get(k) != self.identity.get(k))
                raise SinkError(
                    f"{self.path} was begun with something else ({', '.join(keys)}): choose another file for these "
                    f"results, or remove it and {self.sidecar.name} to begin again"
                )
            return
        if self._exists():
            raise SinkError(
                f"{self.path} exists, and {self.sidecar.name}, which says what it was made with, does not: choose "
                "another file"
            )
        write_text(self.sidecar, json_text({"format": FORMAT, "made_with": self.identity}, indent=1))

    def _exists(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _found(self, name: str) -> None:
        self.seen.add(name)
        self.answered += 1

    @abc.abstractmethod
    def _open(self) -> None: ...

    @abc.abstractmethod
    def _append(self, rows: list[dict[str, Any]]) -> None: ...

    @abc.abstractmethod
    def _close(self, complete: bool) -> None: ...


def open_sink(path: str | os.PathLike[str], labels: Sequence[str], identity: Mapping[str, Any]) -> Sink:
    """Returns the sink for a file ending in .jsonl, .csv or .parquet, or for a folder of Parquet parts.

    Raises:
        SinkError: another suffix; and when it is entered: begun with another model or other options, or damaged.
        LockedError: when it is entered: another process writes it.
        ImportError: Parquet needs pyarrow.
    """
    text, file = os.fspath(path), Path(path)
    kind = file.suffix.lower()
    if file.is_dir() or text.endswith(("/", os.sep)) or not kind:
        require("pyarrow.parquet", "writing Parquet", "parquet")
        return PartsSink(file, labels, identity)
    if kind not in SUFFIXES:
        raise SinkError(
            f"{file}: results are written to a file ending in {', '.join(SUFFIXES)}, or to a folder of parts"
        )
    if kind == ".parquet":
        require("pyarrow.parquet", "writing Parquet", "parquet")
        return ParquetSink(file, labels, identity)
    return (LinesSink if kind == ".jsonl" else CsvSink)(file, labels, identity)


class _GrowingSink(Sink):
    """A text file that is appended to, line by line."""

    def _open(self) -> None:
        self._file = self.path.open("a+b")
        self._cut_torn_line()
        self._file.seek(0)
        for name in self._names():
            self._found(name)
        self._file.seek(0, os.SEEK_END)

    def _cut_torn_line(self) -> None:
        end = position = self._file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(position - (1 << 16), 0)
            self._file.seek(start)
            last = self._file.read(position - start).rfind(b"\n")
            if last >= 0:
                position = start + last + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)

    @abc.abstractmethod
    def _names(self) -> Iterator[str]: ...

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()

    def _close(self, complete: bool) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class LinesSink(_GrowingSink):
    """One JSON object per line."""

    def key(self, name: str) -> str:
        return json.loads(json_text(name))

    def _names(self) -> Iterator[str]:
        for number, line in enumerate(self._file, 1):
            try:
                yield str(json.loads(line)["source"])
            except (ValueError, KeyError, TypeError):
                raise SinkError(
                    f"{self.path}, line {number}: not a result; somebody has changed the file. Remove that line, or "
                    "choose another file"
                ) from None

    def _append(self, rows: list[dict[str, Any]]) -> None:
        self._write("".join(json_text(row) + "\n" for row in rows).encode("utf-8"))


class CsvSink(_GrowingSink):
    """The table of `medmamba predict --csv`: source, label, probability, (labels or grade), all classes, error."""

    @property
    def _extra(self) -> list[str]:
        return {"multilabel": ["labels"], "ordinal": ["grade"]}.get(self.identity.get("task", ""), [])

    def key(self, name: str) -> str:
        return str(csv_cell(name))

    @property
    def _header(self) -> list[str]:
        return csv_row(["source", "label", "probability", *self._extra, *self.labels, "error"])

    def _names(self) -> Iterator[str]:
        if self._file.seek(0, os.SEEK_END) == 0:
            self._write(self._text([self._header]))
            return
        with self.path.open(encoding="utf-8", newline="") as text:
            rows = csv.reader(text)
            if (header := next(rows)) != self._header:
                raise SinkError(f"{self.path}: its columns are others ({', '.join(header)}); choose another file")
            for number, row in enumerate(rows, 2):
                if len(row) != len(header):
                    raise SinkError(f"{self.path}, line {number}: not a result; somebody has changed the file")
                yield row[0]

    def _append(self, rows: list[dict[str, Any]]) -> None:
        self._write(self._text([csv_row(self._cells(row)) for row in rows]))

    def _cells(self, row: dict[str, Any]) -> list[Any]:
        if "error" in row:
            return [row["source"], "", "", *[""] * len(self._extra + self.labels), row["error"]]
        scores = dict(row["top"])
        own = [";".join(row[name]) if name == "labels" else row[name] for name in self._extra]
        return [row["source"], row["label"], row["probability"], *own, *[scores.get(k, "") for k in self.labels], ""]

    @staticmethod
    def _text(rows: list[list[Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode("utf-8")


class PartsSink(Sink):
    """A folder of Parquet files, part-00000.parquet and so on."""

    rows_at_once, seconds_at_once = _PART_ROWS, _PART_SECONDS

    @property
    def sidecar(self) -> Path:
        return self.folder / "_run.json"

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.path

    def _exists(self) -> bool:
        return self.folder.is_dir() and any(self.folder.glob("*.parquet"))

    def _check_identity(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        super()._check_identity()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _open(self) -> None:
        for unfinished in self.folder.glob(".part-*.part"):
            unfinished.unlink()
        for file in self._files():
            self._read_names(file)
        last = self._files()[-1].stem.rpartition("-")[2] if self._files() else "-1"
        self._next = int(last) + 1

    def _read_names(self, file: Path) -> None:
        import pyarrow.parquet as parquet

        try:
            for batch in parquet.ParquetFile(file).iter_batches(columns=["source"]):
                for name in batch.column(0).to_pylist():
                    self._found(name)
        except (OSError, ValueError, KeyError) as error:
            raise SinkError(
                f"{file}: not a part of results ({error}); remove it to have its images answered again"
            ) from None

    def key(self, name: str) -> str:
        return name.encode("utf-8", "backslashreplace").decode("utf-8")

    def _append(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        table = arrow.table(self._columns(rows), schema=self._schema())
        name = f"part-{self._next:05}.parquet"
        write_atomically(self.folder / name, lambda partial: parquet.write_table(table, partial, compression="zstd"))
        self._next += 1

    def _schema(self) -> Any:
        import pyarrow as arrow

        values, texts = arrow.list_(arrow.float32()), arrow.list_(arrow.string())
        fields = [("source", arrow.string()), ("label", arrow.string()), ("probability", arrow.float64())]
        fields += [("probabilities", arrow.list_(arrow.float64())), ("logits", values), ("unusual", arrow.bool_())]
        fields += [("image_notes", texts), ("error", arrow.string())]
        return arrow.schema(fields, metadata={"labels": json.dumps(self.labels), "medmamba": json.dumps(self.identity)})

    def _columns(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in self._schema().names}
        found["source"] = [self.key(row["source"]) for row in rows]
        found["probabilities"] = [
            [dict(row["top"]).get(label) for label in self.labels] if "top" in row else None for row in rows
        ]
        return found

    def _close(self, complete: bool) -> None:
        pass


class ParquetSink(PartsSink):
    """One Parquet file, put together at the end from parts in `NAME.parts`, which is then removed."""

    @property
    def folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.parts")

    @property
    def sidecar(self) -> Path:
        return Sink.sidecar.fget(self)  # type: ignore[attr-defined]

    def _exists(self) -> bool:
        return self.path.exists() or super()._exists()

    def _open(self) -> None:
        if self.path.exists():
            self._read_names(self.path)
            for part in self._files():  # stopped between the whole and the removal of its parts
                if self._first_name(part) in self.seen:
                    part.unlink()
        super()._open()

    def _close(self, complete: bool) -> None:
        import pyarrow.parquet as parquet

        if not complete:
            return
        parts = self._files()
        if not parts and not self.path.exists():
            self._append([])
            parts = self._files()
        if parts:
            before = [self.path] if self.path.exists() else []

            def join(partial: Path) -> None:
                with parquet.ParquetWriter(partial, self._schema(), compression="zstd") as writer:
                    for file in (*before, *parts):
                        for batch in parquet.ParquetFile(file).iter_batches(_PART_ROWS):
                            writer.write_batch(batch)

            write_atomically(self.path, join)
        self._remove_parts()

    def _first_name(self, part: Path) -> str:
        import pyarrow.parquet as parquet

        return next((name for b in parquet.ParquetFile(part).iter_batches(1) for name in b["source"].to_pylist()), "")

    def _remove_parts(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
