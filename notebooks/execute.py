"""Executes the notebooks and stores their outputs: `python notebooks/execute.py [01_classify.ipynb ...]`.

Figures are stored as PNG of at most 800 pixels and 96 colours, a quarter of the size, and sliders as the picture of
their first setting. The first cell gets the time that each section took, where it has a line for it. Hashes of the code
and weights and the output types per cell are stored too; `problems` compares them to detect stale or missing outputs.
`--address` runs nothing and only writes the repository URL ([project.urls] in pyproject.toml) into the badges and the
first cell.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
import re
import sys
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

import medmamba

FOLDER = Path(__file__).resolve().parent
MAX_WIDTH, COLOURS = 800, 96
SOURCE, WEIGHTS, OUTPUTS = "medmamba_source_sha256", "medmamba_weights_sha256", "medmamba_outputs"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB = "https://colab.research.google.com/github/"
# Code that draws when the cell runs, not inside a function definition.
DRAWS = re.compile(r"^\S.*(subplots|[._]figure\(|\.overlay\(|\.plot\.|display\()|^(draw|explore)\(", re.MULTILINE)
HEADING = re.compile(r"^## (\d+)\. ", re.MULTILINE)
TIMES = re.compile(r"^Time per section.*$", re.MULTILINE)
STATIC = "MEDMAMBA_NOTEBOOK_STATIC"  # where this is "1", the notebooks draw pictures instead of sliders
PRIVATE = re.compile(r"/(home|root|tmp|Users|work|usr|var|opt)/|site-packages|[A-Z]:\\")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Returns the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """Hashes all code cells in order, except the set-up cell, which does not affect outputs."""
    code = [cell.source for cell in code_cells(notebook) if "setup" not in cell.metadata.get("tags", [])]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def weights_hash() -> str:
    """Returns the weights hash of the default model, from its configuration."""
    folder = medmamba.bundled_models()[medmamba.DEFAULT_MODEL]
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["weights_sha256"]


def output_types(notebook: nbformat.NotebookNode) -> dict[str, list[str]]:
    """Returns the output types of each code cell that has outputs, by cell id."""
    return {cell.id: [output.output_type for output in cell.outputs] for cell in code_cells(notebook) if cell.outputs}


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Lists problems of stored outputs: stale, missing, errors, warnings, oversized figures, or local paths."""
    found, cells = [], code_cells(notebook)
    if notebook.metadata.get(SOURCE) != source_hash(notebook):
        found.append("the outputs are from different code")
    if notebook.metadata.get(WEIGHTS) != weights_hash():
        found.append(f"the outputs are from different weights than those of {medmamba.DEFAULT_MODEL}")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("the cells were not run once each, in order")
    if notebook.metadata.get(OUTPUTS) != output_types(notebook):
        found.append("outputs are missing or were added")
    timed = TIMES.search(notebook.cells[0].source)
    numbers = [number for cell in notebook.cells for number in HEADING.findall(cell.source) if cell.cell_type != "code"]
    if timed and re.findall(r"(\d+)\) \d+ s", timed[0]) != numbers:
        found.append("the first cell does not say how long each section takes")
    for number, cell in enumerate(cells, 1):
        pictures = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
        texts = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs)
        wrong = {
            "an error": any(o.output_type == "error" for o in cell.outputs),
            "warnings": any(o.get("name") == "stderr" for o in cell.outputs) or "Warning" in texts,
            "no figure": bool(DRAWS.search(cell.source)) and not pictures,
            "an oversized figure": any(max(_open(png).size) > MAX_WIDTH for png in pictures),
            "a local path": bool(PRIVATE.search(texts)),
            "a progress bar": "it/s" in texts,
        }
        found += [f"cell {number} has {what}" for what, is_so in wrong.items() if is_so]
    return found


def execute(path: Path, timeout: int = 900) -> nbformat.NotebookNode:
    """Runs a notebook from the top in a fresh kernel in its own folder, and returns it.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
    client.execute(env={**os.environ, STATIC: "1"})
    line = times_text(section_seconds(notebook))
    notebook.cells[0].source = TIMES.sub(lambda _: line, notebook.cells[0].source)
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    notebook.metadata |= {
        SOURCE: source_hash(notebook),
        WEIGHTS: weights_hash(),
        OUTPUTS: output_types(notebook),
    }
    return notebook


def section_seconds(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """Returns the seconds that the cells of each numbered section took, by number; "0" is what comes before the first.

    From the timestamps that the client adds to cells as it runs them.
    """
    found, number = {"0": 0.0}, "0"
    for cell in notebook.cells:
        if cell.cell_type != "code":
            number = ([number] + HEADING.findall(cell.source))[-1]
            found.setdefault(number, 0.0)
        elif stamps := cell.metadata.get("execution"):
            ends = (stamps["iopub.execute_input"], stamps["shell.execute_reply"])
            start, end = (datetime.fromisoformat(text.replace("Z", "+00:00")) for text in ends)
            found[number] += (end - start).total_seconds()
    return found


def times_text(seconds: dict[str, float]) -> str:
    """Returns the line of the first cell about the time that each section takes."""
    each = ", ".join(f"{number}) {max(1, round(value))} s" for number, value in seconds.items() if number != "0")
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    where = f"{threads} {'thread' if threads == 1 else 'threads'} of {_processor()}"
    return f"Time per section, on {where}: {each}. Loading the packages before that: {round(seconds['0'])} s."


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"a processor of type {names[0].strip() if names else platform.processor() or platform.machine()}"


def repository() -> str:
    """Returns the repository URL from pyproject.toml, or "" if unset."""
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[project\.urls\]\n(?:[^\[]*\n)?Repository = "([^"]+)"', text, re.MULTILINE)
    return found[1].rstrip("/") if found else ""


def set_address(notebook: nbformat.NotebookNode, name: str, address: str) -> None:
    """Writes the repository URL into the badge and the first cell.

    Without a URL, the badge opens Colab's repository dialogue, since a guessed link could be a stranger's.
    """
    badge = f"{BADGE}({COLAB}) and enter the address of this repository there."
    if address:
        badge = f"{BADGE}({COLAB}{address.removeprefix('https://github.com/')}/blob/main/notebooks/{name})"
    notebook.cells[0].source = re.sub(
        r"^\[!\[Open in Colab\].*$", lambda _: badge, notebook.cells[0].source, flags=re.MULTILINE
    )
    setup = code_cells(notebook)[0]
    setup.source = re.sub(r'^REPOSITORY = ".*?"', f'REPOSITORY = "{address}"', setup.source, flags=re.MULTILINE)


def _open(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def _smaller(png: str) -> str:
    picture = _open(png).convert("RGB")
    picture.thumbnail((MAX_WIDTH, MAX_WIDTH))
    stream = io.BytesIO()
    picture.quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def main(arguments: list[str]) -> int:
    """Executes the given or all notebooks; returns 1 if any has problems."""
    names = [name for name in arguments if name != "--address"]
    only_address, failures = "--address" in arguments, 0
    # Those in colab/ need a network, and are not run here.
    others = sorted(FOLDER.glob("colab/*.ipynb")) if only_address else []
    for path in [Path(name) for name in names] or [*sorted(FOLDER.glob("*.ipynb")), *others]:
        notebook = nbformat.read(path, as_version=4) if only_address else execute(path)
        set_address(notebook, path.resolve().relative_to(FOLDER).as_posix(), repository())
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, from {repository() or 'a URL to be entered'}")
        for problem in [] if only_address else problems(notebook):
            failures += 1
            print(f"  {problem}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
