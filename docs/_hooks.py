"""What the site shows that lives elsewhere in the repository: tutorials, model cards, the changelog.

Also points links that leave docs/ (to code, data, weights) at the repository, where its address is known.
"""

import re
from pathlib import Path

import tomllib
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
CARD_FILES = ("confusion.png", "reliability.png", "roc.png", "attribution.png")


def on_files(files, config):
    """Adds the pages that are made from other files."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.name}", content=notebook.read_text(encoding="utf-8")))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    rows = []
    for card in sorted((ROOT / "hub" / "models").glob("*/README.md")):
        name, body = card.parent.name, _without_front_matter(card.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"zoo/{name}.md", content=body))
        for picture in CARD_FILES:
            if (card.parent / picture).is_file():
                files.append(
                    File.generated(
                        config,
                        f"zoo/{picture}".replace("zoo/", f"zoo/{name}-"),
                        content=(card.parent / picture).read_bytes(),
                    )
                )
        rows.append(f"- [`medmamba/{name}`]({name}.md)")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- models: python -m hub.results -->")[2].partition("<!-- end of models -->")[0]
    table = re.sub(r"\]\(hub/models/([\w-]+)\)", r"](\1.md)", table)
    content = f"# Models\n\n{table.strip()}\n\nEach has a card:\n\n" + "\n".join(rows) + "\n"
    files.append(File.generated(config, "zoo/index.md", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links that leave docs/."""
    source = page.file.src_uri
    if source.startswith("zoo/") and source != "zoo/index.md":
        name = Path(source).stem
        for picture in CARD_FILES:
            markdown = markdown.replace(f"]({picture})", f"]({name}-{picture})")
    with open(ROOT / "pyproject.toml", "rb") as stream:
        repository = tomllib.load(stream)["project"]["urls"].get("Repository")

    def outside(match: re.Match) -> str:
        text, path = match["text"], match["path"]
        if path.startswith("hub/models/") and path.count("/") == 2:
            return f"[{text}](zoo/{path.rpartition('/')[2]}.md)"
        return f"[{text}]({repository}/blob/main/{path})" if repository else f"{text}"

    return re.sub(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)\s]+)\)", outside, markdown)


def _without_front_matter(text: str) -> str:
    return text.split("---\n", 2)[2] if text.startswith("---\n") else text
