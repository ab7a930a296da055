"""Adds pages whose source lies outside docs/ (tutorials, model cards, the changelog) and resolves links to such files.

Links in docs/ are relative to the repository, so that they work there as well. On the site, a link to a file that has a
page leads to that page; other files are linked in the repository, where its address is known.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted((ROOT / "hub" / "models").glob("*/README.md"))
PICTURES = ("attribution.png", "confusion.png", "reliability.png", "roc.png")
SITE = {  # path in the repository -> path on the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "hub/models": "zoo/index.md",
}
SITE |= {f"notebooks/{path.name}": f"tutorials/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
SITE |= {f"hub/models/{card.parent.name}": f"zoo/{card.parent.name}.md" for card in CARDS}
SITE |= {
    f"hub/models/{path.parent.name}/{name}": f"zoo/{path.parent.name}-{name}" for path in CARDS for name in PICTURES
}
SOURCE = {page: source for source, page in SITE.items()} | {"index.md": "docs/index.md", "zoo/index.md": "README.md"}
LINK = re.compile(r"(?P<start>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")
OUTSIDE = re.compile(r"^([a-z]+:|#|/)")


def on_config(config: MkDocsConfig) -> None:
    """Lists the model cards in the navigation."""
    models = next(section["Models"] for section in config.nav if "Models" in section)
    models[1:1] = [{path.parent.name: SITE[f"hub/models/{path.parent.name}"]} for path in CARDS]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and their pictures."""

    def add(page: str, content: str | bytes) -> None:
        files.append(File.generated(config, page, content=content))

    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        add(SITE[name], (ROOT / name).read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, pictures = _tutorial(path)
        add(SITE[f"notebooks/{path.name}"], page)
        add(f"tutorials/{path.name}", path.read_bytes())
        for name, content in pictures.items():
            add(f"tutorials/{name}", content)
    for path in CARDS:
        folder = f"hub/models/{path.parent.name}"
        add(SITE[folder], path.read_text(encoding="utf-8").split("---\n", 2)[-1])  # without the metadata
        for name in PICTURES:
            if (path.parent / name).is_file():
                add(SITE[f"{folder}/{name}"], (path.parent / name).read_bytes())
    add("zoo/index.md", _zoo())
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolves links that leave docs/."""
    uri = page.file.src_uri
    source = SOURCE.get(uri, f"docs/{uri}")
    base = source if source in SOURCE.values() and (ROOT / source).is_dir() else posixpath.dirname(source)

    def resolve(link: re.Match[str]) -> str:
        path, hash_, anchor = link["target"].partition("#")
        if OUTSIDE.match(link["target"]) or not path:
            return link[0]
        target = posixpath.normpath(posixpath.join(base, path))
        site = SITE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if site:
            return f"{link['start']}({posixpath.relpath(site, posixpath.dirname(uri) or '.')}{hash_}{anchor})"
        if not (ROOT / target).exists():
            return link[0]  # the strict build reports it
        return f"{link['start']}({_repository()}/blob/main/{target})" if _repository() else link["start"][1:-1]

    return LINK.sub(resolve, markdown)


def _repository() -> str:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "([^"]+)"', project, re.MULTILINE)
    return found[1].rstrip("/") if found else ""


def _tutorial(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by file name."""
    notebook = nbformat.read(path, as_version=4)
    # Without what is hidden in a notebook too: set-up, checks, and the code of the sliders.
    hidden = {"setup", "check", "hide-input"}
    notebook.cells = [cell for cell in notebook.cells if not hidden & set(cell.metadata.get("tags", []))]
    download = f'[Download this notebook]({path.name}){{ download="{path.name}" }} to run it.'
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^\[!\[Open in Colab\].*$", lambda _: download, cell.source, flags=re.MULTILINE)
            cell.source = re.sub(
                r"^> \*\*(What can go wrong[^*]*?|For research[^*]*?)[.:]?\*\* (.*)$",
                lambda note: f'!!! warning "{note[1]}"\n    {note[2]}',
                cell.source,
                flags=re.MULTILINE,
            )
    body, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    body = re.sub(r"<style scoped>.*?</style>", "", body, flags=re.DOTALL)
    # The caption below a picture is what it says to those who do not see it.
    body = re.sub(r"!\[png\](\([^)]+\)\s+)\*(Figure \d+\. )([^*\n]+)\*", r"![\3]\1*\2\3*", body)
    return body, resources["outputs"]


def _zoo() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = "<!-- models: python -m hub.results -->", "<!-- end of models -->"
    table = readme.partition(start)[2].partition(end)[0].strip()
    return (
        "# Models\n\nEach model has a card with its data, split, metrics, calibration, limits and licence. "
        "[Results](docs/results.md) compares all runs, seeds and baselines.\n\n"
        f"{table}\n\nAccuracy and AUROC are on held-out test images, with 95 % bootstrap intervals.\n"
    )
