"""The models in hub/models: each is fit to be published as it lies there, and says what it is."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import medmamba
from hub import dense_runs
from hub.golden import GOLDEN_NAME, check_golden
from hub.publish import model_folders
from hub.validate import validate
from medmamba import MedMamba
from medmamba.cards import EXAMPLE_NAME, is_dense, read_dense_facts, read_facts, render_card, render_dense_card
from medmamba.cli.main import main
from medmamba.inference.ood import load_unusual
from medmamba.inference.signature import width
from medmamba.pretrained import has_classes, read_config

DENSE = [folder for folder in model_folders() if is_dense(folder)]
BACKBONES = [folder for folder in model_folders() if not has_classes(folder) and folder not in DENSE]
FOLDERS = [folder for folder in model_folders() if folder not in BACKBONES + DENSE]
WHOLE_ZOO = 300 * 2**20  # bytes, of a clone; replace a file only by one that is better by more than seed noise


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_the_default_model_is_there():
    assert medmamba.DEFAULT_MODEL in medmamba.bundled_models()
    assert f"medmamba/{Path(medmamba.bundled_models()[medmamba.DEFAULT_MODEL]).name}" == medmamba.DEFAULT_MODEL


def test_it_may_be_published_as_it_is(folder, tmp_path):
    """A copy, since publishing may write into a folder; nothing of it may have to be written."""
    copy = shutil.copytree(folder, tmp_path / folder.name)
    report = validate(copy, f"medmamba/{folder.name}")
    assert not report.problems
    assert not [w for w in report.warnings if "written" in w or "not calibrated" in w], report.warnings
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(report.files) == {p.name for p in folder.iterdir()}  # nothing lies there that is not part of it


def test_its_golden_prediction_is_on_record_and_reproduced(folder):
    golden = json.loads((folder / GOLDEN_NAME).read_text(encoding="utf-8"))
    assert check_golden(MedMamba.from_pretrained(f"medmamba/{folder.name}"), golden, folder.name) < 0.02


def test_its_figures_are_of_a_test_split_that_selected_nothing(folder):
    facts = read_facts(folder)
    assert facts.split == "test" and facts.evaluations["test"].resamples >= 200
    training = facts.config.training
    assert training["split_sizes"]["test"] == facts.evaluations["test"].n_images
    assert training["seed"] is not None and training["recipe"] and training["selected_by"]
    assert facts.config.calibration["temperature"] > 0


def test_its_card_tells_everything(folder):
    facts = read_facts(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == render_card(facts, f"medmamba/{folder.name}")  # python -m hub.card hub/models/*
    card = ModelCard(text)
    assert "](confusion.png)" in text and "](reliability.png)" in text
    assert card.data.license == facts.terms.licence and facts.entry is not None
    assert ("nc" in card.data.license.split("-")) == bool(facts.terms.non_commercial)
    if facts.entry.licence.id == "CC-BY-4.0":  # an image of these may be shown
        assert "](attribution.png)" in text
        assert "CC BY 4.0" in json.loads((folder / EXAMPLE_NAME).read_text(encoding="utf-8"))["credit"]
    command = text.partition("## How to reproduce")[2].partition("```bash\n")[2].partition("```")[0]
    assert (
        command.startswith(("medmamba train", "python -m hub.zoo"))
        and f"--seed {facts.config.training['seed']}" in command
    )
    assert load_unusual(folder) is not None and "## Out-of-distribution images" in text


def test_its_detector_compares_signatures_and_flags_other_kinds(folder):
    found = load_unusual(folder)
    assert found.combined.width == width(read_config(folder)) and found.reference.n == len(found.reference.scores) > 50
    assert (folder / "unusual.json").stat().st_size < 2**20
    others, own = found.measured["auroc"], found.measured["own"]
    assert len(others) >= 7 and all(row["called_unusual"] >= 0.95 for row in others.values())
    assert own["called_unusual"] <= 0.1 and own["called_far"] <= 0.02 and found.measured["same_kind"]


@pytest.fixture(params=BACKBONES, ids=lambda folder: folder.name)
def backbone(request) -> Path:
    return request.param


def test_a_backbone_may_be_published_as_it_is(backbone, tmp_path):
    copy = shutil.copytree(backbone, tmp_path / backbone.name)
    report = validate(copy, f"medmamba/{backbone.name}")
    assert not report.problems and report.warnings == ["the model has no classifier"]
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in backbone.iterdir()}
    text = (backbone / "README.md").read_text(encoding="utf-8")
    assert text == render_card(read_facts(backbone), f"medmamba/{backbone.name}")  # python -m hub.card hub/models/*


def test_a_backbone_loads_by_name_and_is_no_classifier(backbone, capsys):
    model = MedMamba.from_pretrained(f"medmamba/{backbone.name}")
    assert model.config.num_classes == 0 and model.config.architecture in backbone.name
    image = Path(__file__).parents[2] / "demo" / "examples" / "blood_neutrophil.webp"
    with pytest.raises(ValueError, match=r"no classifier.*reset_classifier"):
        model.predict(image)
    assert main(["predict", str(image), "--model", f"medmamba/{backbone.name}"]) == 2
    assert "no classifier: train one: medmamba train --from" in capsys.readouterr().err
    assert f"medmamba/{backbone.name}" in medmamba.bundled_models()


@pytest.fixture(params=DENSE, ids=lambda folder: folder.name)
def dense(request) -> Path:
    return request.param


def test_a_model_for_masks_or_boxes_may_be_published_as_it_is(dense, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    copy = shutil.copytree(dense, tmp_path / dense.name)
    report = validate(copy, f"medmamba/{dense.name}")  # its golden prediction too
    assert report.problems == [] and report.warnings == []
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in dense.iterdir()}
    facts = read_dense_facts(dense)
    card = (dense / "README.md").read_text(encoding="utf-8")
    assert card == render_dense_card(facts, f"medmamba/{dense.name}")  # python -m hub.card hub/models/*
    assert facts.results["splits"]["test"]["n"] == facts.training["split_sizes"]["test"]
    assert (dense / "model.safetensors").stat().st_size < 6 * 2**20, f"{dense.name}: save it in half precision"
    assert f"medmamba/{dense.name}" in card and "3 seeds were trained" in card


def test_the_seed_of_masks_or_boxes_was_chosen_on_validation_and_its_results_are_stored(dense):
    facts = read_dense_facts(dense)
    training, metric = facts.training, facts.training["selected_by"][0]
    paths = sorted(dense_runs.RESULTS.glob(f"{training['dataset']}-nano-*/results.json"))
    runs = {run["training"]["seed"]: run for run in (json.loads(path.read_text(encoding="utf-8")) for path in paths)}
    assert len(runs) == 3 and runs[training["seed"]]["splits"] == facts.results["splits"]
    best = max(training["seeds"], key=lambda run: run["val"])
    assert best["seed"] == training["seed"] and best["metric"] == metric
    assert dict(facts.scores("test"))[metric]["value"] == pytest.approx(best["test"])
    assert all(run["training"]["best_epoch"] <= run["training"]["epochs"] for run in runs.values())


@pytest.mark.parametrize(("page", "module"), [("segmentation", "segment"), ("detection", "detect")])
def test_the_tables_of_runs_are_those_of_the_stored_results(page, module, capsys):
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    marker = f"<!-- runs: python -m hub.{module} table -->"
    shown = text.partition(marker)[2].partition("<!-- end of runs -->")[0].strip()
    importlib.import_module(f"hub.{module}").main(["table"])
    assert shown == capsys.readouterr().out.strip(), f"run: python -m hub.{module} table"


def test_kvasir_is_not_for_commerce_and_shows_no_image():
    folder = next(folder for folder in DENSE if folder.name == "kvasir-polyps")
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    assert card.data.license_name == "research-and-education-only" and "non-commercial" in card.data.tags
    assert not [path for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".webp")]
    assert "U-Net with ResNet-34 of segmentation_models_pytorch, from random weights" in card.text


@pytest.mark.slow
def test_cells_are_found_in_smears():
    pytest.importorskip("torchvision")
    model = medmamba.MedMambaDetector.from_pretrained("medmamba/bccd-cells")
    folder = Path(__file__).parents[2] / "demo" / "examples"
    found = {path.stem: model.predict(path).counts for path in folder.glob("smear_*.jpg")}
    assert found["smear_2_white_cells_and_4_platelets"]["WBC"] == 2
    assert found["smear_white_cell_and_2_platelets"]["WBC"] == found["smear_white_cell_and_4_platelets"]["WBC"] == 1
    assert all(counts["Platelets"] == 3 for counts in found.values()), "one more or less than were boxed by hand"
    assert all(counts["RBC"] >= 5 for counts in found.values())


def test_the_app_and_its_space_leave_backbones_out():
    from demo.app import default_models

    offered = default_models()
    assert set(offered) == {f"medmamba/{folder.name}" for folder in FOLDERS} and BACKBONES


def test_together_they_fit_a_clone():
    sizes = {folder.name: sum(p.stat().st_size for p in folder.iterdir()) for folder in FOLDERS + BACKBONES + DENSE}
    assert sum(sizes.values()) < WHOLE_ZOO, sizes
    for folder in FOLDERS + BACKBONES:
        weights = (folder / "model.safetensors").stat().st_size
        parameters = sum(p.numel() for p in MedMamba.from_pretrained(folder).parameters())
        assert weights < 2.3 * parameters, f"{folder.name}: save it in half precision"
