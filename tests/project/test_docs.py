"""The documentation builds strictly, has no dead link and loads nothing from other servers."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="needs the extra: pip install 'medmamba[docs]'")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOMS = ("data", "evaluation", "explain", "export", "imaging", "inference", "kernels", "metrics", "training")
PAGES = sorted(DOCS.rglob("*.md"))
PROSE = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
_spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "_hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def navigation() -> list[str]:
    """Returns the pages that mkdocs.yml lists, in order."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config = SimpleNamespace(nav=settings["nav"])
    hooks.on_config(config)

    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry if isinstance(entry, list) else entry.values()) for page in pages(part)]

    return pages(config.nav)


def test_every_page_is_in_the_navigation():
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert {page.relative_to(DOCS).as_posix() for page in PAGES} <= set(listed)
    generated = set(hooks.SITE.values())
    assert [page for page in listed if not (DOCS / page).is_file() and page not in generated] == []
    assert {f"zoo/{path.name}.md" for path in (ROOT / "hub" / "models").iterdir()} <= set(listed)


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)[^)]*\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("page", "link", "resolved"),
    [
        ("index.md", "[a](../notebooks/01_classify.ipynb)", "[a](tutorials/01_classify.md)"),
        ("faq.md", "[zoo](../hub/models) [b](hub.md#timm)", "[zoo](zoo/index.md) [b](hub.md#timm)"),
        ("api/models.md", "[h](../how-it-works.md)", "[h](../how-it-works.md)"),
        ("changelog.md", "[r](docs/robustness.md)", "[r](robustness.md)"),
        ("zoo/index.md", "[`n`](hub/models/breastmnist)", "[`n`](breastmnist.md)"),
        ("zoo/breastmnist.md", "![c](confusion.png)", "![c](breastmnist-confusion.png)"),
        ("tutorials/02_explain.md", "[t](03_finetune.ipynb) [d](../docs/app.md)", "[t](03_finetune.md) [d](../app.md)"),
        ("index.md", "[w](https://arxiv.org) [s](#scan) x[0](y)", "[w](https://arxiv.org) [s](#scan) x[0](y)"),
    ],
)
def test_links_are_resolved_for_the_site(page, link, resolved, monkeypatch):
    monkeypatch.setattr(hooks, "_repository", lambda: "")
    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(link, file, None, None) == resolved


def test_a_tutorial_shows_no_hidden_cell_and_its_pictures_say_what_they_show():
    page, pictures = hooks._tutorial(ROOT / "notebooks" / "05_is_this_real.ipynb")
    assert "assert " not in page and "@title" not in page and "find_spec" not in page
    assert len(pictures) >= 7 and page.count("![") == len(pictures) and "![png]" not in page


def test_other_files_are_linked_in_the_repository(monkeypatch):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="how-it-works.md"))
    link = "[`network.py`](../medmamba/model/network.py)"
    monkeypatch.setattr(hooks, "_repository", lambda: "")
    assert hooks.on_page_markdown(link, page, None, None) == "`network.py`"
    monkeypatch.setattr(hooks, "_repository", lambda: "https://git.example/m")
    expected = "[`network.py`](https://git.example/m/blob/main/medmamba/model/network.py)"
    assert hooks.on_page_markdown(link, page, None, None) == expected


class Loaded(HTMLParser):
    """Collects what a page loads, and the ids in it."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.append(values.get("id") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.urls.append(values["href"])
        self.urls += [values[key] for key in ("src", "srcset", "data") if values.get(key)]


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(navigation())
    documented: set[str] = set()
    for path in pages:
        page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        assert [url for url in page.urls if re.match(r"(https?:)?//", url)] == [], path
        private = [name for name in page.ids if re.search(r"^medmamba\..*\._(?!_)", name)]
        assert private == [], path
        documented.update(page.ids)
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(.?https?:|@import", style.read_text(encoding="utf-8")), style
    # Every public class and function is in the reference, under its package or the module that defines it.
    for room in ("", *(f".{name}" for name in ROOMS)):
        package = importlib.import_module(f"medmamba{room}")
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                places = ("medmamba", f"medmamba{room}", value.__module__, *(f"medmamba.{other}" for other in ROOMS))
                anchors = [f"{place}.{name}" for place in places]
                assert documented.intersection(anchors), anchors
