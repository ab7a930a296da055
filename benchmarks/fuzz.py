"""Read altered files of every kind, and compare each answer with independent readers.

    python benchmarks/fuzz.py --files 20000 --docs    # every kind of file; writes docs/robustness.md
    python benchmarks/fuzz.py --files 300 --seed 7    # prints the table only

Files that read well (`fuzz_corpus`) are altered by seeded rules: bytes, length, header elements, headers of compressed
streams, transfer syntaxes, lengths of elements. `medmamba.load_image` reads each in one process, other readers read it
in a second one: pydicom, and where that differs SimpleITK, for DICOM; Pillow, and tifffile or imagecodecs, for raster
formats. Compared are raw values (after the modality LUT) for grey DICOM, else pixels in [0, 1].

The exit status is 1 where a process died or hung, or an answer differs from all other readers without a note.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_corpus import CHANGES, Sample, alter, corpus

from medmamba.utils.text import json_text

DOCS = Path(__file__).resolve().parents[1] / "docs" / "robustness.md"
MARKS = ("<!-- fuzz: begin -->", "<!-- fuzz: end -->")
LIMIT = 90.0  # seconds for one file, start of a process included; the reader's own limits are lower
TOLERANCE = {"JPEG": 3 / 255, "WEBP": 3 / 255}  # decoders of lossy formats may round differently
# Notes that every good file of a kind carries; any other says that something is unusual.
_USUAL = re.compile(
    r"(VOI |window |rescaled by |modality LUT applied|no usable window|(?!warning).* converted to RGB$|.*inverted$|"
    r"palette expanded|pixels are not square|padding \(|16-bit colour|alpha|transparency|rotated)"
)


@dataclass
class Answer:
    """What a reader made of a file: "image", "refused", "died" or "hung"; its values and notes."""

    outcome: str
    values: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    text: str = ""


class Reader:
    """A function in a process of its own, which is started again where it dies or hangs."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.process: Any = None
        self.pipe: Any = None

    def ask(self, name: str, data: bytes) -> None:
        """Hand a file over."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(self.function, other), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send((name, data))

    def answer(self) -> Answer:
        """Return the answer to the file handed over."""
        try:
            if self.pipe.poll(LIMIT):
                return self.pipe.recv()
            outcome = "hung"
        except (EOFError, OSError):
            outcome = "died"
        self.close()
        return Answer(outcome)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _serve(function: Any, pipe: Connection) -> None:
    import logging

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # decoders print
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    while True:
        try:
            name, data = pipe.recv()
        except EOFError:
            return
        pipe.send(function(name, data))


def read_here(name: str, data: bytes) -> Answer:
    """Read with medmamba."""
    import io

    from medmamba import ImageError, load_image
    from medmamba.imaging.dicom.decode import read_dataset
    from medmamba.imaging.dicom.frame import Frame

    try:
        image = load_image(data, frame=0)
    except ImageError as error:
        return Answer("refused", text=str(error))
    except Exception as error:  # a fault: every error has to be an ImageError
        return Answer("died", text=f"{type(error).__name__}: {error}")
    values = image.pixels
    if image.format == "DICOM" and image.value_range is not None:
        # The public answer is windowed; raw values are compared.
        decoded = Frame(read_dataset(io.BytesIO(data)), 0)
        values = decoded.modality()[0][..., None]
        if not np.isfinite(image.pixels).all() or image.pixels.min() < 0 or image.pixels.max() > 1:
            return Answer("died", text="pixels outside 0..1")
    return Answer("image", values, image.notes)


def read_there(name: str, data: bytes) -> Answer:
    """Read with pydicom, SimpleITK, Pillow, tifffile or imagecodecs: "reader:kind"."""
    import fuzz_referees

    reader, kind = name.split(":", 1)
    try:
        return Answer("image", fuzz_referees.READERS[reader](kind, data))
    except Exception as error:
        return Answer("refused", text=f"{type(error).__name__}: {error}")


def same(kind: str, mine: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two readers agree up to rounding."""
    mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
    if other.ndim == 2:
        other = other[..., None]
    if mine.shape != other.shape:
        return mine.shape[:2] == other.shape[:2] and 1 in (mine.shape[2], other.shape[2]) and same_grey(mine, other)
    size = max(1.0, float(np.abs(other).max()))
    return float(np.abs(mine - other).max()) <= TOLERANCE.get(kind, 0) + 1e-5 * size


def same_grey(mine: np.ndarray, other: np.ndarray) -> bool:
    """Return whether a grey picture and a colour picture without colour are the same."""
    spread = max(float(np.ptp(array, axis=2).max()) for array in (mine, other))
    return spread == 0 and float(np.abs(mine[..., :1] - other[..., :1]).max()) <= 1e-5


class Campaign:
    """Counts of a run, by kind of file and by change."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.samples = corpus()
        self.by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_change: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: list[str] = []
        self.files = 0
        self.here, self.there = Reader(read_here), Reader(read_there)

    def altered(self, number: int) -> tuple[Sample, str, bytes]:
        """Return file `number` of the run: what it was made of, how it was changed, and its bytes."""
        rng = random.Random(self.seed * 1_000_003 + number)
        sample = self.samples[number % len(self.samples)]
        change = "none" if number < len(self.samples) else rng.choice(CHANGES[sample.is_dicom])
        return sample, change, alter(sample, change, rng)

    def run(self, files: int, seconds: float) -> None:
        """Read up to `files` files for up to `seconds`."""
        start = time.monotonic()
        for number in range(files):
            if time.monotonic() - start > seconds:
                break
            sample, change, data = self.altered(number)
            outcome, text = self.judge(sample, data)
            self.files += 1
            for counter in (self.by_kind[sample.kind], self.by_change[change]):
                counter[outcome] += 1
            if change == "none" and outcome not in ("same", "alone"):
                print(f"unaltered {sample.name}: {outcome} {text}", file=sys.stderr, flush=True)
            if outcome in ("died", "hung", "differs"):
                self.faults.append(f"file {number}, {sample.name}, change '{change}': {outcome} {text}")
                print(self.faults[-1], file=sys.stderr, flush=True)
            if number % 500 == 499:
                print(f"{number + 1} files, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        self.here.close()
        self.there.close()

    def judge(self, sample: Sample, data: bytes) -> tuple[str, str]:
        """Return the outcome for one file, and a text for faults."""
        first, *others = ("pydicom", "simpleitk") if sample.is_dicom else ("pillow", "codec")
        self.there.ask(f"{first}:{sample.kind}", data)
        self.here.ask(sample.kind, data)
        mine, other = self.here.answer(), self.there.answer()
        if mine.outcome != "image":
            return mine.outcome, mine.text
        assert mine.values is not None
        candidates = [other]
        for reader in others:
            if any(self._agrees(sample, mine, candidate) for candidate in candidates):
                break
            self.there.ask(f"{reader}:{sample.kind}", data)
            candidates.append(self.there.answer())
        if any(self._agrees(sample, mine, candidate) for candidate in candidates):
            return "same", ""
        if all(candidate.values is None for candidate in candidates):
            return "alone", ""
        if any(not _USUAL.match(note) for note in mine.notes):
            return "noted", ""
        return "differs", f"{mine.notes} {[(c.outcome, c.values is not None and c.values.shape) for c in candidates]}"

    @staticmethod
    def _agrees(sample: Sample, mine: Answer, other: Answer) -> bool:
        return mine.values is not None and other.values is not None and same(sample.kind, mine.values, other.values)


COLUMNS = (
    ("same", "same as another reader"),
    ("noted", "differs, with a note"),
    ("alone", "no other reader reads it"),
    ("refused", "refused"),
    ("differs", "differs silently"),
    ("died", "process died"),
    ("hung", "hung"),
)


def table(title: str, counts: dict[str, Counter[str]]) -> str:
    """Return a Markdown table of outcomes."""
    names = " | ".join(text for _, text in COLUMNS)
    lines = [f"| {title} | files | {names} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    total: Counter[str] = Counter()
    for name in sorted(counts):
        total.update(counts[name])
        lines.append(_row(name, counts[name]))
    return "\n".join([*lines, _row("all", total)])


def _row(name: str, counter: Counter[str]) -> str:
    cells = " | ".join(f"{counter[key]:,}" for key, _ in COLUMNS)
    return f"| {name} | {sum(counter.values()):,} | {cells} |"


def write_docs(campaign: Campaign, command: str) -> None:
    """Replace the marked section of docs/robustness.md."""
    from importlib.metadata import version

    packages = ("pydicom", "python-gdcm", "pylibjpeg-openjpeg", "pillow", "SimpleITK", "tifffile", "imagecodecs")
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    body = "\n\n".join(
        [
            f"`{command}`: {campaign.files:,} files made from {len(campaign.samples)}.",
            "Faults: " + ("none." if not campaign.faults else "\n\n" + "\n".join(f"- {f}" for f in campaign.faults)),
            table("kind of file", campaign.by_kind),
            table("change", campaign.by_change),
            "Versions: " + ", ".join(f"{name} {version(name)}" for name in packages) + ".",
        ]
    )
    DOCS.write_text(f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="files to read")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/robustness.md")
    parser.add_argument("--faults", type=Path, help="write faults as JSON")
    args = parser.parse_args()
    campaign = Campaign(args.seed)
    campaign.run(args.files, args.seconds)
    print(table("kind of file", campaign.by_kind), table("change", campaign.by_change), sep="\n\n")
    if args.faults:
        args.faults.write_text(json_text(campaign.faults, indent=1), encoding="utf-8")
    if args.docs:
        write_docs(campaign, "python benchmarks/fuzz.py " + " ".join(sys.argv[1:]))
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
