"""Reports as HTML and PDF."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from medmamba.data import open_dataset
from medmamba.inference.ood import fit_unusual
from medmamba.inference.ood_fit import learn_unusual
from medmamba.reporting import CHECKLISTS, write_drift, write_report
from medmamba.reporting.blocks import Section, Text, from_markdown
from medmamba.reporting.checklists import MISSING, REPORTED, STATED, answers
from medmamba.reporting.page import render, to_pdf, write

pytest.importorskip("captum")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A model and its data, with classes whose names are no HTML."""
    import torch

    import medmamba

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("report")
    model = medmamba.create_model("test", num_classes=3).eval()
    model.config = model.config.replace(id2label={0: "a<b>", 1: "b & c", 2: "c"}, training={"dataset": "own"})
    rng = np.random.default_rng(0)
    rows = ["name,sex,label,split"]
    for i in range(54):
        name = f"{i}.png"
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        label, split = ["a<b>", "b & c", "c"][i % 3], ["train", "val", "test"][i % 9 // 3]
        rows.append(f"{name},{'F' if i % 2 else 'M'},{label},{split}")
    (root / "data.csv").write_text("\n".join(rows).replace("name,", "path,", 1))
    model.unusual = learn_unusual(model, open_dataset(root / "data.csv"))
    model.save_pretrained(root / "model")
    model.unusual.save(root / "model")
    return root


class Page(html.parser.HTMLParser):
    """Anchors, links, addresses and texts of a page; fails on tags that are not closed."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.words = [], set(), set(), [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found["id"]} if "id" in found else set()
        self.links |= {found["href"]} if "href" in found else set()
        self.sources += [found["src"]] if "src" in found else []
        assert tag != "img" or found["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_report_is_one_file_that_says_what_was_measured(trial, tmp_path):
    options = dict(by=("sex",), resamples=20, explain=0, device="cpu", pdf=False)
    statement = {"TRIPOD+AI": {"17": "Approved by the board of <X>."}}
    paths = write_report(trial / "model", trial / "data.csv", tmp_path, statements=statement, **options)
    text = paths["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert {"summary", "model", "data", "performance", "calibration", "subgroups", "ood"} <= page.ids
    assert {"limits", "tripod-ai", "claim"} <= page.ids
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    words = " ".join(page.words)
    assert "a<b>" in words and "Approved by the board of <X>." in words  # escaped, not interpreted
    assert "http-equiv" in text and "<script" not in text

    from medmamba.evaluation import evaluate_model

    found = evaluate_model(trial / "model", trial / "data.csv", by=("sex",), resamples=20, device="cpu")
    assert str(found.evaluation.overall["balanced_accuracy"]) in words
    assert found.subgroups.summary()[:60] in words
    flagged = re.search(r"(\d+) of 18 images", words)
    assert flagged and 0 <= int(flagged[1]) <= 18


@pytest.mark.slow
def test_decisions_are_checked_on_the_evaluated_images(trial, tmp_path):
    import shutil

    import medmamba
    from medmamba.decision import Rule
    from medmamba.evaluation.decide import decide_model

    model = medmamba.MedMamba.from_pretrained(trial / "model")
    points = [(["c"], Rule("sensitivity", 0.5, margin=False))]
    decide_model(model, open_dataset(trial / "data.csv"), points, coverage=0.6, answer_share=0.5)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(trial / "model" / "unusual.json", tmp_path / "model")
    options = dict(resamples=20, explain=0, device="cpu", pdf=False)
    paths = write_report(tmp_path / "model", trial / "data.csv", tmp_path / "out", **options)
    page = Page(paths["html"].read_text(encoding="utf-8"))
    words = " ".join(page.words)
    assert "decisions" in page.ids and "checked here on images that chose nothing" in words
    assert "Decision curves" in words and "Risk-coverage curve" in words and "sets that hold it" in words
    val = write_report(tmp_path / "model", trial / "data.csv", tmp_path / "val", split="val", **options)
    assert "the figures are too good" in val["html"].read_text(encoding="utf-8")


@pytest.mark.slow
def test_explanations_come_with_their_checks(trial, tmp_path):
    paths = write_report(trial / "model", trial / "data.csv", tmp_path, explain=1, resamples=0, device="cpu", pdf=False)
    words = " ".join(Page(paths["html"].read_text(encoding="utf-8")).words)
    assert "max-sensitivity" in words and "the check with random weights" in words


def test_models_without_records_and_images_of_several_labels(tmp_path):
    """A model with neither training record, calibration nor detector, and a dataset with one split."""
    import medmamba

    model = medmamba.create_model("test", num_classes=3)
    model.config = model.config.replace(id2label={0: "x", 1: "y", 2: "z"}, task="multilabel")
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = ["path,label,patient"]
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (16, 24), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{['x;y', 'z', 'y;z', ''][i % 4]},p{i // 2}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    options = dict(split=None, resamples=20, explain=0, device="cpu", pdf=False, external=True)
    paths = write_report(tmp_path / "model", tmp_path / "data.csv", tmp_path / "out", **options)
    page = Page(paths["html"].read_text(encoding="utf-8"))
    assert not {"training", "ood", "decisions", "subgroups", "corruptions"} & page.ids
    words = " ".join(page.words)
    assert "The data have one split" in words and "24 images of 12 patients" in words
    assert "Subgroups were not analysed" in words and "The model has no calibration" in words


def test_statements_on_items_that_do_not_exist_are_refused(trial, tmp_path):
    with pytest.raises(ValueError, match="TRIPOD\\+AI has no item 99"):
        write_report(trial / "model", trial / "data.csv", tmp_path, statements={"TRIPOD+AI": {"99": "x"}}, pdf=False)
    (tmp_path / "s.json").write_text('{"STARD": {}}')
    with pytest.raises(ValueError, match="unknown checklist STARD"):
        write_report(trial / "model", trial / "data.csv", tmp_path / "out", statements=tmp_path / "s.json", pdf=False)
    assert not (tmp_path / "out").exists()


def test_checklists_are_complete_and_say_what_is_missing():
    assert len(CHECKLISTS["TRIPOD+AI"]) == 52 and len(CHECKLISTS["CLAIM"]) == 44
    mains = {re.match(r"\d+", number)[0] for number in CHECKLISTS["TRIPOD+AI"]}
    assert mains == {str(i) for i in range(1, 28)}
    keys = {"summary", "model", "data", "training", "performance", "calibration", "subgroups", "corruptions", "ood"}
    keys |= {"explanations", "failures", "limits", "decisions", "external", "internal", "patients"}
    for items in CHECKLISTS.values():
        assert {section for _, sections, _ in items.values() for section in sections} <= keys
    found = {answer.number: answer for answer in answers("CLAIM", {"performance"}, {"44": "Nobody."})}
    assert found["28"].status == REPORTED
    assert (found["30"].status, found["30"].note) == (MISSING, "no corrupted images: give --corruptions")
    assert (found["44"].status, found["44"].note) == (STATED, "Nobody.")
    assert found["11"].note == "to be supplied by the authors"


def test_a_page_on_drift(tiny_model, tmp_path):
    from medmamba.evaluation.drift import detect_drift

    rng = np.random.default_rng(0)
    (tmp_path / "new").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "new" / f"{i}.png")
    width = tiny_model.head.in_features
    tiny_model.unusual = fit_unusual(rng.normal(size=(60, width)), rng.integers(0, 2, 60), rng.normal(size=(60, width)))
    found = detect_drift(tiny_model, tmp_path / "new", predicted=[10, 10, 10])
    paths = write_drift(found, tmp_path / "out", tiny_model.unusual, pdf=False)
    page = Page(paths["html"].read_text(encoding="utf-8"))
    assert found.summary() in " ".join(page.words) and len(page.sources) == 1
    assert json.loads(paths["json"].read_text())["n_images"] == 12


@pytest.mark.slow
def test_a_page_on_drift_is_one_page(tmp_path):
    """Also with labels, many classes and every test."""
    weasyprint = pytest.importorskip("weasyprint")
    from medmamba.evaluation.drift import Drift, DriftTest
    from medmamba.metrics import evaluate

    rng = np.random.default_rng(0)
    names = [f"class number {i}" for i in range(12)]
    p = rng.dirichlet(np.ones(12), 100)
    tests = tuple(DriftTest("what is compared", "a value " * 4, "another value " * 6, 0.5, 1.0) for _ in range(5))
    scores = tuple(np.sort(rng.random(100)).tolist())
    shares = dict.fromkeys(names, (0.1, 0.2))
    evaluation = evaluate(rng.integers(0, 12, 100), p, names, resamples=20)
    found = Drift("m", "d", 100, (), tests, 0.05, (1, 2, 0.3), shares, evaluation, scores, scores)
    detector = fit_unusual(rng.normal(size=(60, 4)), rng.integers(0, 2, 60), rng.normal(size=(60, 4)))
    paths = write_drift(found, tmp_path, detector)
    assert len(weasyprint.HTML(string=paths["html"].read_text(encoding="utf-8")).render().pages) == 1


def test_tables_of_markdown_become_tables():
    table, text = from_markdown(["| a | b |", "| --- | --- |", "| 1 | x\\|y |", "", "Words."])
    assert list(table.header) == ["a", "b"] and [list(row) for row in table.rows] == [["1", "x|y"]]
    assert text.text == "Words."


@pytest.mark.slow
def test_a_pdf_has_the_pages_of_the_report(tmp_path):
    pytest.importorskip("weasyprint")
    sections = [Section("one", "One", tuple(Text(f"Paragraph {i}. " * 30) for i in range(20)))]
    page = render("A title", sections, notice="For research.", about={"Model": "m"})
    content = to_pdf(page)
    assert content.startswith(b"%PDF-") and len(content) > 5000
    assert set(write(tmp_path, "report", page, pdf=True)) == {"html", "pdf"}
    elsewhere = page.replace("</body>", '<img src="http://127.0.0.1:9/x.png" alt="x"></body>')
    assert to_pdf(elsewhere).startswith(b"%PDF-")  # shown without what it does not contain
