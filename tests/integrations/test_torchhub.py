"""torch.hub.load finds the entry points of hubconf.py in a clone, as in a repository on GitHub."""

import zipfile
from pathlib import Path

import torch

CLONE = Path(__file__).resolve().parents[2]
LOCAL = dict(source="local", trust_repo=True)


def test_entry_points_from_an_archive_of_the_repository(monkeypatch, tmp_path):
    """What torch.hub does with a repository on GitHub, but for the download."""

    def download(url, target, progress=True):
        assert url == "https://github.com/medmamba/medmamba/zipball/main"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("medmamba-medmamba-0123abc/", "")
            archive.write(CLONE / "hubconf.py", "medmamba-medmamba-0123abc/hubconf.py")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    options = dict(skip_validation=True, trust_repo=True, verbose=False)
    assert set(torch.hub.list("medmamba/medmamba:main", **options)) == {"new", "pretrained"}
    assert "org/name@revision" in torch.hub.help(
        "medmamba/medmamba:main", "pretrained", skip_validation=True, trust_repo=True
    )
    assert torch.hub.load("medmamba/medmamba:main", "new", "test", num_classes=2, **options).config.num_classes == 2


def test_a_saved_model_loads_with_its_options(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = torch.hub.load(str(CLONE), "pretrained", tmp_path, local_files_only=True, **LOCAL)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(image), tiny_model(image))
    assert not loaded.training


def test_a_new_model_takes_any_field():
    model = torch.hub.load(str(CLONE), "new", "test", num_classes=5, in_chans=1, drop_rate=0.1, **LOCAL)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5) and model.config.drop_rate == 0.1


def test_what_hubconf_needs_is_installed_with_medmamba():
    """torch.hub checks `dependencies` by import name; each must be a dependency of the package."""
    import hubconf

    project = (CLONE / "pyproject.toml").read_text()
    declared = project[project.index("dependencies = [") : project.index("]", project.index("dependencies = ["))]
    for module in hubconf.dependencies:
        assert {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}.get(module, module) in declared
