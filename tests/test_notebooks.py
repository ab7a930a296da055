"""The notebooks run, their stored outputs are those of their code, and they use the public interface alone."""

import ast
import base64
import importlib.util
import io
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("01_classify", "02_explain", "03_finetune")
_spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)


@pytest.fixture(params=NAMES)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def trees(notebook: nbformat.NotebookNode) -> list[ast.Module]:
    transform = TransformerManager().transform_cell  # turns % and ! lines into Python
    return [ast.parse(transform(cell.source)) for cell in code_cells(notebook)]


@pytest.mark.parametrize("name", NAMES)
def test_runs_with_small_parameters(name, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_NOTEBOOK_FAST", "1")
    monkeypatch.delenv("MEDMAMBA_HUB_REPO", raising=False)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    noise = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not noise


def test_stored_outputs_are_of_this_code(notebook):
    assert notebook.metadata.get(execute.STAMP) == execute.source_hash(notebook), "run: make notebooks"
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


def test_a_changed_cell_makes_outputs_stale(notebook):
    code_cells(notebook)[-1].source += "\n"
    assert notebook.metadata.get(execute.STAMP) != execute.source_hash(notebook)


def test_stored_outputs_are_complete_clean_and_small(notebook):
    found = outputs(notebook)
    assert not [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
    figures = [o.data["image/png"] for o in found if "image/png" in o.get("data", {})]
    drawing = re.compile(r"subplots|\.figure\(|_figure\(|\.overlay\(")
    drawn = [cell for cell in code_cells(notebook) if drawing.search(cell.source)]
    assert all(any("image/png" in o.get("data", {}) for o in cell.outputs) for cell in drawn) and len(drawn) > 7
    for png in figures:
        assert max(Image.open(io.BytesIO(base64.b64decode(png))).size) <= execute.MAX_WIDTH
    text = nbformat.writes(notebook)
    assert len(text) < 1_000_000
    stored = "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in found)
    assert not re.search(r"/(home|root|tmp|Users|work|usr|var|opt)/|site-packages|[A-Z]:\\", stored)
    assert "Warning" not in stored and "it/s" not in stored


def test_layout(notebook):
    first = notebook.cells[0].source
    assert first.startswith("# ") and "colab.research.google.com/github" in first
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "What can go wrong" in prose and prose.count("<details>") == prose.count("</details>") >= 3
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (FOLDER / target).exists(), target


def test_every_section_asserts_something(notebook):
    sections: dict[str, bool] = {}
    title = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^## (\d.*)$", cell.source, re.MULTILINE):
                title = heading
                sections[title] = False
        elif title and any(isinstance(node, ast.Assert) for node in ast.walk(trees_of(cell))):
            sections[title] = True
    unguarded = [name for name, guarded in sections.items() if not guarded]
    assert len(sections) >= 7 and not unguarded, unguarded


def trees_of(cell: nbformat.NotebookNode) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(cell.source))


def test_public_names_only(notebook):
    for tree in trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medmamba"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                    assert alias.name in getattr(module, "__all__", [alias.name]), f"{alias.name} is not public"
                    assert not any(part.startswith("_") for part in (*node.module.split("."), alias.name))
            elif isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), node.attr
                if isinstance(node.value, ast.Name) and node.value.id == "medmamba":
                    assert node.attr in importlib.import_module("medmamba").__all__, node.attr


def test_images_are_few_and_their_sources_named():
    images = [path for path in (FOLDER / "data").rglob("*") if path.is_file() and path.name != "README.md"]
    assert sum(path.stat().st_size for path in images) <= 3 * 2**20
    about = (FOLDER / "data" / "README.md").read_text(encoding="utf-8")
    for folder in {path.relative_to(FOLDER / "data").parts[0] for path in images}:
        row = next(line for line in about.splitlines() if line.startswith(f"| `{folder}/`"))
        assert "CC BY 4.0" in row and "doi.org" in row
