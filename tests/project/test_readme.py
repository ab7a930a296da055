"""The commands and snippets of the README run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

import medmamba
from medmamba.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"(<!-- not run: [^>]+ -->\n)?```{language}\n(.*?)```", README, re.DOTALL)
    return [text for skipped, text in found if not skipped]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder: nothing is needed but what the README makes itself."""
    monkeypatch.chdir(tmp_path)


def test_it_opens_with_a_picture_and_an_example():
    first, picture, *_ = [line for line in README.splitlines() if line]
    assert first == "# medmamba" and re.fullmatch(r"!\[[^\]]+\]\(docs/[\w/.-]+\)", picture)
    assert README.index("```python") < README.index("\n## ")


def test_the_first_model_is_the_one_that_needs_no_network():
    loaded = re.findall(r'from_pretrained\("([^"]+)"\)', README)
    assert loaded[0] == medmamba.DEFAULT_MODEL
    named = set(re.findall(r"medmamba/[a-z]+mnist(?:-[a-z]+)?", README))
    assert named <= set(medmamba.bundled_models()), "a name that no folder in hub/models has"


def test_python_snippets(folder, capsys):
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    (said,) = re.findall(r"print\(model.predict\(image\)\)  # (.*?), \.\.\.", README)
    assert f"\n{said}, " in f"\n{capsys.readouterr().out}"
    assert said.endswith(f"{namespace['prediction'].label} {namespace['prediction'].probability:.1%}")
    assert [len(p.top) for p in namespace["predictions"]] == [2, 2]
    assert namespace["logits"].shape == (2, 4) and len(namespace["maps"]) == 4


def test_commands(folder, capsys):
    (saved,) = re.findall(r'save\("(.+?)"\)', README)
    medmamba.example_image().to_pil().save(saved)
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert [c[:2] for c in commands] == [["medmamba", "predict"], ["medmamba", "doctor"]]
    for command in commands:
        assert main(command[1:]) == 0
    assert "neutrophil" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_commands_in_the_table_exist(capsys):
    for command in set(re.findall(r"`medmamba (\w+)", README)):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
