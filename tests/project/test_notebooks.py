"""The notebooks run, their stored outputs are those of their code, and they use the public interface alone."""

import ast
import base64
import importlib.util
import io
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = ("01_classify", "02_explain", "03_finetune", "04_segment", "05_is_this_real")
SLIDING = ("01_classify", "02_explain", "04_segment", "05_is_this_real")  # with sliders
_spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)
code_cells = execute.code_cells


@pytest.fixture(params=NAMES)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def trees(notebook: nbformat.NotebookNode) -> list[ast.Module]:
    transform = TransformerManager().transform_cell  # turns % and ! lines into Python
    return [ast.parse(transform(cell.source)) for cell in code_cells(notebook)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_with_small_parameters(name, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_NOTEBOOK_FAST", "1")
    monkeypatch.delenv("MEDMAMBA_HUB_REPO", raising=False)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    noise = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not noise


def test_stored_outputs_are_of_this_code_and_these_weights_complete_and_clean(notebook):
    assert execute.problems(notebook) == [], "run: make notebooks"
    drawn = [cell for cell in code_cells(notebook) if execute.DRAWS.search(cell.source)]
    assert len(drawn) >= 7 and len(nbformat.writes(notebook)) < 1_000_000


def with_output(kind: str, **fields):
    def add(notebook):
        cell = code_cells(notebook)[3]
        cell.outputs.append(nbformat.v4.new_output(kind, **fields))
        notebook.metadata[execute.OUTPUTS] = execute.output_types(notebook)  # as if it had been there when it ran

    return add


def without_picture(notebook):
    cell = next(cell for cell in code_cells(notebook) if any("image/png" in o.get("data", {}) for o in cell.outputs))
    for output in cell.outputs:
        output.get("data", {}).pop("image/png", None)


def large_picture(notebook):
    stream = io.BytesIO()
    Image.new("L", (execute.MAX_WIDTH + 1, 10)).save(stream, "PNG")
    data = {"image/png": base64.b64encode(stream.getvalue()).decode()}
    with_output("display_data", data=data)(notebook)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda n: code_cells(n)[-1].update(source=code_cells(n)[-1].source + "\n"),
            "the outputs are from different code",
        ),
        (lambda n: n.cells.remove(code_cells(n)[-1]), "the outputs are from different code"),
        (lambda n: n.metadata.pop(execute.SOURCE), "the outputs are from different code"),
        (lambda n: n.metadata.update({execute.WEIGHTS: "0" * 64}), "the outputs are from different weights"),
        (lambda n: code_cells(n)[4].update(execution_count=40), "not run once each, in order"),
        (lambda n: code_cells(n)[-1].update(execution_count=None), "not run once each, in order"),
        (lambda n: next(c for c in code_cells(n) if c.outputs).outputs.clear(), "outputs are missing"),
        (lambda n: [c.outputs.clear() for c in code_cells(n)], "outputs are missing"),
        (without_picture, "has no figure"),
        (large_picture, "has an oversized figure"),
        (with_output("error", ename="ValueError", evalue="no", traceback=[]), "has an error"),
        (with_output("stream", name="stderr", text="careful"), "has warnings"),
        (with_output("stream", name="stdout", text="UserWarning: careful"), "has warnings"),
        (with_output("stream", name="stdout", text="/home/me/x.png"), "has a local path"),
        (with_output("stream", name="stdout", text="12%|#  | 3.1it/s"), "has a progress bar"),
    ],
)
def test_outputs_that_are_wrong_are_noticed(spoil, problem):
    notebook = nbformat.read(FOLDER / "01_classify.ipynb", as_version=4)
    assert not execute.problems(notebook)
    spoil(notebook)
    assert any(problem in found for found in execute.problems(notebook)), execute.problems(notebook)


@pytest.mark.parametrize("address", ["", "https://github.com/somebody/medmamba"])
def test_the_address_is_that_of_the_project(notebook, address):
    """One place says it, pyproject.toml; where it does not, nothing points to a repository that may not exist."""
    before = execute.source_hash(notebook)
    name = notebook.cells[0].source.splitlines()[0]
    execute.set_address(notebook, "01_classify.ipynb", address)
    first, setup = notebook.cells[0].source, code_cells(notebook)[0].source
    assert first.splitlines()[0] == name and execute.source_hash(notebook) == before
    assert f'REPOSITORY = "{address}"' in setup
    wanted = "somebody/medmamba/blob/main/notebooks/01_classify.ipynb)" if address else ") and enter the address"
    assert f"](https://colab.research.google.com/github/{wanted}" in first
    assert set(re.findall(r"https://github\.com/([\w.-]+)", nbformat.writes(notebook))) <= {"NAME", "somebody"}


def test_the_stored_address_is_up_to_date():
    for name in NAMES:
        stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        fresh = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        execute.set_address(fresh, f"{name}.ipynb", execute.repository())
        assert fresh == stored, "run: python notebooks/execute.py --address"


def test_the_address_is_read_from_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "FOLDER", tmp_path / "notebooks")
    project = '[project.urls]\nPaper = "https://arxiv.org"\nRepository = "https://github.com/a/b/"\n\n[tool.x]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    assert execute.repository() == "https://github.com/a/b"
    (tmp_path / "pyproject.toml").write_text(project.replace("Repository", "Other"))
    assert execute.repository() == ""


def test_an_unknown_address_is_asked_for(monkeypatch):
    setup = code_cells(nbformat.read(FOLDER / "01_classify.ipynb", as_version=4))[0].source
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code = TransformerManager().transform_cell(re.sub(r'REPOSITORY = ".*?"', 'REPOSITORY = ""', setup))
    with pytest.raises(AssertionError, match="enter the address above"):
        exec(compile(code, "setup", "exec"), {})


def test_it_reads_well(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 96, cell.source  # wider is cut off on a screen
            assert len(cell.source.splitlines()) <= 36, cell.source
        for block in re.findall(r"<details>.*?</details>", cell.source, re.DOTALL):
            assert "\n\n" not in block, block  # Markdown would end the block there, and the answer lie open


def test_layout(notebook):
    first = notebook.cells[0].source
    assert first.startswith("# ") and execute.BADGE in first
    assert [c.metadata.get("tags") for c in code_cells(notebook)[:2]] == [["setup"], ["parameters"]]
    assert re.search("^MODEL = ", code_cells(notebook)[1].source, re.MULTILINE)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "What can go wrong" in prose and prose.count("<details>") == prose.count("</details>") >= 3
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (FOLDER / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_checks_are_hidden_and_the_time_of_each_section_is_said(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in code_cells(notebook):
        hidden = "check" in cell.metadata.get("tags", [])
        if "setup" not in cell.metadata.get("tags", []):
            assert hidden or not any(isinstance(node, ast.Assert) for node in ast.walk(trees_of(cell))), cell.source
        if hidden:  # in Jupyter, in Colab, and on the website
            assert cell.metadata.jupyter.source_hidden and cell.metadata.cellView == "form" and not cell.outputs
            assert cell.source.startswith("# @title ")
    assert execute.TIMES.search(notebook.cells[0].source)
    late = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    late.cells.append(nbformat.v4.new_markdown_cell("## 99. One more"))
    assert any("how long" in problem for problem in execute.problems(late))


def test_the_time_of_a_section_is_that_of_its_cells():
    def ran(start: int, end: int):
        stamp = "2026-01-01T00:00:{:02d}.000000Z"
        times = {"iopub.execute_input": stamp.format(start), "shell.execute_reply": stamp.format(end)}
        return nbformat.v4.new_code_cell("1", metadata={"execution": times})

    head = nbformat.v4.new_markdown_cell
    cells = [ran(0, 2), head("## 1. A"), ran(2, 5), head("text\n\n## 2. B"), ran(5, 6), ran(6, 10), head("## Words")]
    found = execute.section_seconds(nbformat.v4.new_notebook(cells=cells))
    assert found == {"0": 2, "1": 3, "2": 5}
    assert re.findall(r"(\d+)\) (\d+) s", execute.times_text(found)) == [("1", "3"), ("2", "5")]


@pytest.mark.parametrize("name", SLIDING)
def test_sliders_are_left_out_where_they_cannot_be(name, monkeypatch):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in code_cells(notebook) if "def explore(" in cell.source)
    namespace: dict = {}
    exec(cell.source, namespace)
    drawn: list = []
    offered: list = []
    fake = type(sys)("ipywidgets")
    fake.interact = lambda draw, **ranges: offered.append(ranges)
    monkeypatch.setitem(sys.modules, "ipywidgets", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    namespace["explore"](lambda: drawn.append(1), x=(0, 1))
    assert drawn == [1] and not offered
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake)
    namespace["explore"](lambda: drawn.append(2), x=(0, 1))
    assert drawn == [1] and offered == [{"x": (0, 1)}]
    monkeypatch.setenv(execute.STATIC, "1")
    namespace["explore"](lambda: drawn.append(3), x=(0, 1))
    assert drawn == [1, 3]


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


# ---- the notebook that needs a network ------------------------------------------------------------------------------

COLAB = FOLDER / "colab" / "kvasir.ipynb"


def test_the_notebook_for_colab_calls_commands_that_exist() -> None:
    from hub.make import _parser

    notebook = nbformat.read(COLAB, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert all(not cell.outputs for cell in cells) and len(trees(notebook)) == len(cells)
    assert cells[0].metadata.tags == ["setup"] and '"./medmamba[train,hub]"' in cells[0].source
    calls = [line for cell in cells for line in cell.source.splitlines() if line.startswith("!python -m hub.make")]
    assert len(calls) == 2
    for line in calls:
        words = line.format(NAME="kvasir", OUT="make", MORE="").split()[3:]
        assert _parser().parse_args(words).dataset == "kvasir"
    fresh = nbformat.read(COLAB, as_version=4)
    execute.set_address(fresh, "colab/kvasir.ipynb", execute.repository())
    assert fresh == notebook, "run: python notebooks/execute.py --address"


@pytest.mark.slow
def test_the_notebook_for_colab_runs_against_a_small_copy_of_the_source(monkeypatch, tmp_path) -> None:
    pytest.importorskip("pooch", reason='needs pip install "medmamba[hub]"')
    from dataset_server import layout, serve

    with serve() as server:
        layout(server, "kvasir")
        small = "--allow partial --init scratch --variant test --device cpu --set epochs=1 size=32 batch_size=8"
        monkeypatch.setenv("MEDMAMBA_MAKE_OPTIONS", f"--mirror {server.url} {small}")
        monkeypatch.setenv("MEDMAMBA_MAKE_OUT", str(tmp_path))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # of !python
        notebook = nbformat.read(COLAB, as_version=4)
        place = {"metadata": {"path": FOLDER.parent}}
        NotebookClient(notebook, timeout=200, kernel_name="python3", resources=place).execute()
    said = "".join(str(output.get("text", "")) for output in outputs(notebook))
    assert "[5/5] card" in said and "would be published" in said
