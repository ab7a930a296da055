"""Model cards: what they say, that the Hub would take them, that no figure in them can go stale unnoticed."""

import json
import re
import shutil

import numpy as np
import pytest
from hub_folder import finished_model, training
from hub_server import LICENCES, serve
from huggingface_hub import ModelCard
from PIL import Image

from hub import card as tool
from medmamba import create_model
from medmamba.cards import NOTICE, CardError, ModelFacts, check_card, read_facts, render_card, write_card
from medmamba.cards.licences import HUB_LICENCES, LicenceError, terms_of
from medmamba.cards.reproduce import changed_settings
from medmamba.data import registry
from medmamba.inference.ood import Unusual
from medmamba.training import load_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished_model(tmp_path_factory.mktemp("made") / "bloodmnist")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "bloodmnist")


def test_the_card_is_complete(folder):
    write_card(folder, "medmamba/bloodmnist")
    text = (folder / "README.md").read_text()
    assert NOTICE in text
    headings = re.findall(r"^## (.+)$", text, re.M)
    for heading in ("Intended use", "Training data", "Evaluation", "Calibration", "Limits", "How to reproduce",
                    "Licence", "Citation"):  # fmt: skip
        assert heading in headings
    for picture in ("confusion.png", "reliability.png", "roc.png"):
        assert f"]({picture})" in text
    assert 'MedMamba.from_pretrained("medmamba/bloodmnist")' in text
    assert "arXiv:2403.03849" in text and "Acevedo" in text  # the paper, and those who made the images
    assert "900 train, 120 val, 160 test" in text and "This is not the published split" in text
    assert "medmamba train --data DATA --out OUT --recipe default --dataset bloodmnist --variant test --seed 0" in text
    results = json.loads((folder / "results.json").read_text())["splits"]["test"]
    assert f"calibration error is {results['uncalibrated']['ece']:.3f} without" in text
    assert check_card(text, read_facts(folder)) == []


def test_the_hub_gets_every_figure_with_its_interval(folder):
    data = ModelCard.load(write_card(folder)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("medmamba", "image-classification", "cc-by-4.0")
    overall = json.loads((folder / "results.json").read_text())["splits"]["test"]["overall"]
    told = {result.metric_type: result for result in data.eval_results}
    for ours, theirs in (("accuracy", "accuracy"), ("auroc", "roc_auc"), ("sensitivity", "recall"), ("ece", "ece")):
        assert told[theirs].metric_value == pytest.approx(overall[ours]["value"], abs=5e-5)
        interval = told[theirs].metric_args["interval"]
        assert interval["low"] == pytest.approx(overall[ours]["low"], abs=5e-5) and interval["level"] == 0.95
        assert (told[theirs].dataset_type, told[theirs].dataset_split) == ("bloodmnist", "test")


def test_the_hubs_own_validation_takes_it(folder, monkeypatch):
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        ModelCard.load(write_card(folder)).validate()
        assert hub.requests("POST", "validate-yaml")


def test_every_licence_that_is_offered_is_one_of_the_hub():
    assert {"unknown"} == LICENCES - HUB_LICENCES  # written down twice, independently


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(NOTICE, ""), "the notice is missing"),
        (lambda t: re.sub(r"## Limits\n.*?(?=\n## )", "", t, flags=re.S), 'the section "Limits" is missing'),
        (
            lambda t: re.sub(r"(type: accuracy\n +value: )0\.\d+", r"\g<1>0.999", t),
            r"accuracy 0\.999, results.json says",
        ),
        (lambda t: re.sub(r"\| Accuracy \| 0\.\d+", "| Accuracy | 0.999", t), "table of metrics differs"),
        (lambda t: re.sub(r"    - type: ece\n.*?(?=---\n\n#)", "", t, flags=re.S), "model-index lacks ece"),
        (lambda t: t.replace("- type: ece", "- type: luck"), "claims luck"),
        (lambda t: t.replace("license: cc-by-4.0", "license: mit"), "license is mit.*BloodMNIST.*CC-BY-4.0"),
        (lambda t: t.replace("license: cc-by-4.0", "license: free"), "must be an identifier the Hub knows"),
        (lambda t: t.replace("library_name: medmamba", "library_name: timm"), "library_name must be medmamba"),
        (lambda t: t.replace("(roc.png)", "(other.png)"), "shows other.png, which is not in the folder"),
        (lambda t: t + "\nTODO\n", "placeholder"),
        (lambda t: t.replace("model-index:", "model-index: ["), "metadata cannot be read"),
    ],
)
def test_a_card_that_is_wrong_is_found_out(folder, change, message):
    facts = read_facts(folder)
    text = render_card(facts, "medmamba/bloodmnist")
    assert change(text) != text
    assert re.search(message, "\n".join(check_card(change(text), facts))), check_card(change(text), facts)


def test_prose_may_be_edited(folder):
    facts = read_facts(folder)
    text = render_card(facts, "medmamba/bloodmnist").replace("Research and teaching", "Teaching and research")
    assert check_card(text, facts) == []


# --- licences ---


def config_of(dataset, /, **record):
    return create_model("test", num_classes=2).config.replace(training=training(dataset, **record))


@pytest.mark.parametrize(
    ("dataset", "wanted", "licence", "non_commercial"),
    [
        ("bloodmnist", None, "cc-by-4.0", False),
        ("bloodmnist", "cc-by-sa-4.0", "cc-by-sa-4.0", False),
        ("dermamnist", None, "cc-by-nc-4.0", True),
        ("dermamnist", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", True),
        ("kvasir", None, "other", True),
        ("cpn-xray", None, "other", False),
    ],
)
def test_weights_are_under_the_terms_of_their_data(dataset, wanted, licence, non_commercial):
    terms = terms_of(config_of(dataset), registry.get(dataset), wanted)
    assert (terms.licence, terms.non_commercial) == (licence, non_commercial)
    assert (terms.name and terms.link) or licence != "other"


@pytest.mark.parametrize(
    ("dataset", "wanted", "record", "message"),
    [
        ("dermamnist", "mit", {}, "mit would allow commercial use"),
        ("kvasir", "apache-2.0", {}, "has terms of its own"),
        ("bloodmnist", "free", {}, "the Hub does not know a licence 'free'"),
        ("bloodmnist", None, {"dataset": "my clinic", "licence": None}, "not on record.*--license"),
        ("bloodmnist", "cc-by-4.0", {"init": "medmamba/dermamnist"}, "would allow commercial use.*DermaMNIST"),
    ],
)
def test_wider_terms_than_those_of_the_data_are_refused(dataset, wanted, record, message):
    entry = None if record.get("dataset") else registry.get(dataset)
    with pytest.raises(LicenceError, match=message):
        terms_of(config_of(dataset, **record), entry, wanted)


@pytest.mark.parametrize("record", [{"init": "medmamba/dermamnist@main"}, {"pretraining": ["dermamnist"]}])
def test_terms_of_pretraining_are_inherited(record):
    config, entry = config_of("bloodmnist", **record), registry.get("bloodmnist")
    terms = terms_of(config, entry)
    assert terms.licence == "cc-by-nc-4.0" and "from weights trained on DermaMNIST" in terms.reason
    assert "non-commercial" in ModelCard(render_card(ModelFacts(config, terms, entry), "a/b")).data.tags


# --- the rest ---


def test_settings_that_differ_from_the_recipe_are_in_the_command():
    settings = load_recipe("default", epochs=7, **{"augment.hflip": 0.25}).to_dict()
    assert set(changed_settings({"recipe": "default", "settings": settings})) == {"epochs=7", "augment.hflip=0.25"}
    assert changed_settings({"recipe": "my own", "settings": settings}) == []


def test_results_of_another_program_are_refused(folder):
    (folder / "results.json").write_text('{"splits": {"test": {"acc": 0.9}}}')
    with pytest.raises(CardError, match="was not written by medmamba"):
        read_facts(folder)


def test_an_example_is_drawn_and_credited(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("captum")
    monkeypatch.setattr(tool, "METHODS", ("saliency", "gradcam:stage3.scan"))  # quick ones
    Image.new("RGB", (40, 40), (200, 90, 90)).save(tmp_path / "cell.png")
    arguments = [str(folder), "--example", str(tmp_path / "cell.png")]
    assert tool.main(arguments) == 2 and "needs --credit" in capsys.readouterr().err
    assert tool.main([*arguments, "--credit", "own drawing, CC0"]) == 0
    assert Image.open(folder / "attribution.png").size[0] > 100
    text = (folder / "README.md").read_text()
    assert "](attribution.png)" in text and "Image: own drawing, CC0." in text
    assert str(tmp_path) not in text + (folder / "attribution.json").read_text()


def test_a_student_is_trained_again_from_its_start_and_its_teachers(tmp_path):
    from hub.zoo import _parser as zoo_parser

    teachers = dict(teacher="2 x efficientnet-lite2", teacher_settings={"epochs": 10}, teacher_seeds=[4, 5])
    record = dict(recipe="zoo-breastmnist-distilled", init="zoo-breastmnist, seed 3", **teachers)
    text = write_card(finished_model(tmp_path / "breastmnist", "breastmnist", seed=7, **record)).read_text()
    commands = text.partition("## How to reproduce")[2].partition("```bash\n")[2].partition("```")[0].splitlines()
    start, *taught, last = (zoo_parser().parse_args(command.split()[3:]) for command in commands)
    assert (start.command, start.dataset, start.seed, last.init) == ("train", "breastmnist", 3, start.out)
    assert [(t.recipe, t.seed, t.set) for t in taught] == [("zoo-breastmnist", seed, ["epochs=10"]) for seed in (4, 5)]
    assert (last.recipe, last.seed, last.teacher) == (record["recipe"], 7, [t.out for t in taught])
    teachers["teacher"] += ", medmamba/bloodmnist"
    record = dict(recipe="zoo-bloodmnist-nano-distilled", init="zoo-bloodmnist-nano, seed 2", **teachers)
    text = write_card(finished_model(tmp_path / "blood", "bloodmnist", seed=0, **record)).read_text()
    commands = text.partition("## How to reproduce")[2].partition("```bash\n")[2].partition("```")[0].splitlines()
    last = zoo_parser().parse_args(commands[-1].split()[3:])
    assert [str(t) for t in last.teacher] == ["TEACHER-4", "TEACHER-5", "medmamba/bloodmnist"]


def test_a_model_of_the_zoo_is_trained_again_by_two_commands(tmp_path):
    from hub.zoo import _parser as zoo_parser

    sets = ["breastmnist", "pneumoniamnist", "dermamnist", "bloodmnist"]
    record = dict(recipe="zoo-breastmnist", init="zoo-joint, seed 3", pretraining=sets)
    folder = finished_model(tmp_path / "breastmnist", "breastmnist", seed=7, **record)
    text = write_card(folder).read_text()
    commands = text.partition("## How to reproduce")[2].partition("```bash\n")[2].partition("```")[0].splitlines()
    assert [command.split()[:4] for command in commands] == [
        ["python", "-m", "hub.zoo", "pretrain"],
        ["python", "-m", "hub.zoo", "train"],
    ]
    first, second = (zoo_parser().parse_args(command.split()[3:]) for command in commands)  # options that exist
    assert (first.seed, second.seed, second.dataset, second.init) == (3, 7, "breastmnist", first.out)
    assert "started from zoo-joint, seed 3, trained on BreastMNIST, PneumoniaMNIST, DermaMNIST and BloodMNIST" in text
    assert ModelCard(text).data.license == "cc-by-nc-4.0" and ModelCard(text).data.base_model is None
    assert check_card(text, read_facts(folder)) == []


def test_what_is_known_of_other_images_is_on_the_card(folder):
    means, spread = np.zeros((8, 64)), np.ones(64)
    measured = {
        "own": {"n": 160, "called_unusual": 0.05},
        "auroc": {"BreastMNIST": {"auroc": 0.987, "n": 156, "called_unusual": 0.913, "energy": 0.31, "max_prob": 0.4}},
    }
    Unusual(means, spread, 1.5, 0.95).save(folder)
    text = render_card(read_facts(folder), "org/bloodmnist")
    assert "## Out-of-distribution images" in text and "Its detection rate was not measured" in text
    Unusual(means, spread, 1.5, 0.95, measured).save(folder)
    facts = read_facts(folder)
    text = render_card(facts, "org/bloodmnist")
    assert "| BreastMNIST | 156 | 91.3% | 0.987 |" in text
    assert "| BloodMNIST, its own test images | 160 | 5.0% |  |" in text
    assert "on these images: its AUROC is 0.31 to 0.31" in text and "are reported as unusual" not in text
    assert any(
        "Out-of-distribution images" in p for p in check_card(text.replace("## Out-of-distribution", "## "), facts)
    )
    (folder / "unusual.json").write_text("{")
    with pytest.raises(CardError, match=r"unusual\.json cannot be read"):
        read_facts(folder)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"init": "runs/joint"}, None),  # a folder; somebody's model on the Hub could be called so
        ({"init": "zoo-joint, seed 0"}, None),
        ({"init": "medmamba/bloodmnist"}, "medmamba/bloodmnist"),
        ({"init": "clinic/eyes", "base_model": "clinic/eyes@v2"}, "clinic/eyes"),
        ({"init": "", "base_model": None}, None),
    ],
)
def test_the_base_model_is_only_ever_one_on_the_hub(tmp_path, record, expected):
    folder = finished_model(tmp_path / "model", **record)
    from medmamba.cards import card_data

    assert card_data(read_facts(folder), "medmamba/x").to_dict().get("base_model") == expected


def test_names_on_the_hub_are_told_from_folders(tmp_path, monkeypatch):
    from medmamba.pretrained import hub_name

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "joint").mkdir(parents=True)
    assert hub_name("runs/joint") is None and hub_name(tmp_path) is None and hub_name("s3://bucket/eye") is None
    assert hub_name("./runs") is None and hub_name("/no/where") is None and hub_name("a/b/c") is None
    assert hub_name("clinic/eyes@v2") == hub_name("hf://clinic/eyes@v2") == "clinic/eyes@v2"
    assert hub_name("bloodmnist-nano") == "medmamba/bloodmnist-nano"
