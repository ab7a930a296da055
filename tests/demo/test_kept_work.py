"""Work that lasts: addresses, saved models opened again, corrected labels, a warning before results are lost."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from browser_cases import MARKS, give, serious, to_tab
from demo_cases import NEUTROPHIL
from demo_helpers import save_model
from PIL import Image

import medmamba
from medmamba.data import open_dataset
from medmamba.inference.predict import Failure, Prediction
from medmamba.pretrained import PretrainedError

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo.context import Context
from demo.options import Limits, Options
from demo.service import Answer
from demo.sessions import Session, Sessions
from demo.store import ModelStore
from demo.tabs import labels, saved

EXAMPLES = NEUTROPHIL.parent


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    folder = save_model(root / "blood")
    options = Options((str(folder),), "cpu", Limits(zip_mb=8))
    return Context(options, ModelStore(options.models, "cpu"), Sessions(options.limits, root / "files", 3600))


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path / "private", tmp_path / "outbox")


def zipped(folder: Path, target: Path) -> Path:
    return Path(shutil.make_archive(str(target.with_suffix("")), "zip", folder.parent, folder.name))


# --- a saved model ---


def test_a_saved_model_is_opened_for_its_visitor_alone(context, session, tmp_path):
    folder = save_model(tmp_path / "mine", dataset="breastmnist")
    title = saved.open_model(context, session, [zipped(folder, tmp_path / "mine.zip")], Limits(zip_mb=8))
    assert title == "Yours: mine" and context.load(session, title).config.num_classes == 2
    assert title in context.titles(session) and title not in context.titles(None)
    files = [folder / "config.json", folder / "model.safetensors"]
    assert saved.open_model(context, session, files, Limits(zip_mb=8)) == "Yours: model"
    # No file of the archive but those of a model is kept.
    assert {p.name for p in session.models["Yours: model"].iterdir()} == {"config.json", "model.safetensors"}


def _broken(kind: str, folder: Path, tmp_path: Path) -> list[Path]:
    target = tmp_path / "bad.zip"
    if kind == "pickle":
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("model/config.json", (folder / "config.json").read_bytes())
            archive.writestr("model/pytorch_model.bin", b"\x80\x04")
        return [target]
    if kind == "outside":
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("../../config.json", b"{}")
        return [target]
    if kind == "weights only":
        return [folder / "model.safetensors"]
    if kind == "not a model":
        return [NEUTROPHIL]
    if kind == "too large":
        (tmp_path / "large.zip").write_bytes(bytes(9 * 2**20))
        return [tmp_path / "large.zip"]
    config = json.loads((folder / "config.json").read_text())
    config["preprocess"]["input_size"] = [2048, 2048]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return [tmp_path / "config.json", folder / "model.safetensors"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pickle", "it holds none"),
        ("outside", "it holds none"),
        ("weights only", "config.json is missing"),
        ("not a model", "damaged or cannot be unpacked"),
        ("too large", "larger than 8 MB"),
        ("huge input", "its input is 2048"),
    ],
)
def test_what_is_no_model_is_refused_and_leaves_nothing(context, session, tmp_path, kind, said):
    files = _broken(kind, save_model(tmp_path / "model"), tmp_path)
    with pytest.raises((ValueError, PretrainedError), match=said):
        saved.open_model(context, session, files, Limits(zip_mb=8))
    assert session.models == {} and not list(session.folder.rglob("*.*"))
    assert not (tmp_path.parent / "config.json").exists()


# --- labels ---


def _answer(label: str, share: float) -> Answer:
    found = Prediction("x", label, share, [(label, share)], [], [1.0])
    return Answer(found, False, False, np.zeros((2, 2, 3), np.uint8), 1.0)


def test_corrected_labels_train_the_next_model(tmp_path):
    names = ["a.png", "=b.png", "c d.png", "broken.png"]
    paths = [tmp_path / name for name in names]
    for path in paths[:3]:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    results = [_answer("cat", 0.9), _answer("dog, large", 0.8), _answer("cat", 0.7), Failure("broken.png", "no")]
    known = labels.accepted(results, {2: "dog, large"})
    assert known == {0: "cat", 1: "dog, large", 2: "dog, large"}
    assert "3 of 3 images have a label; 1 of them differs" in labels.said_html(paths, results, known).striptags()
    del known[1]  # a name that a spreadsheet would run is changed in the file
    table = tmp_path / "labels.csv"
    table.write_text(labels.labels_csv(paths, results, known), encoding="utf-8")
    rows = table.read_text().splitlines()
    assert rows[1] == "a.png,cat,cat,0.900000,no" and rows[2] == 'c d.png,"dog, large",cat,0.700000,yes'
    index = open_dataset(table)
    assert len(index) == 2 and set(index.classes) == {"cat", "dog, large"}
    assert labels.classes_of("multilabel", ["a"]) == []
    twice = labels.said_html([paths[0], paths[0]], results[:2], {0: "cat", 1: "cat"}).striptags()
    assert "have the same name" in twice


# --- in a browser ---


@pytest.fixture
def open_page(browser, app_url):
    pages = []

    def open_(to="", width=1280, dark=False):
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(30_000)
        page.goto(app_url + to)
        page.locator("#mm-model input").wait_for(state="attached")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()


def choose(page, path):
    with page.expect_file_chooser() as chooser:
        page.locator("#mm-open-model").click()
    chooser.value.set_files(path)


def selected(page) -> str:
    return page.locator("[role=tab][aria-selected=true]").first.inner_text()


class TestInABrowser:
    pytestmark: ClassVar = [pytest.mark.slow, *MARKS]

    def test_an_address_opens_a_tab_and_a_model_and_back_goes_back(self, open_page):
        page = open_page("?tab=models&model=breast")
        page.get_by_text("The sixteen datasets of the paper").wait_for()
        page.wait_for_function("document.querySelector('#mm-model input').value.endsWith('breast')")
        page.wait_for_timeout(1000)
        to_tab(page, "Explain")
        page.wait_for_function("location.search.includes('tab=explain')")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("location.search.includes('tab=classify')")
        page.wait_for_function("document.activeElement?.textContent.trim() === 'Classify'")
        page.keyboard.press("ArrowLeft")  # past the first comes the last
        page.wait_for_function("location.search.includes('tab=models')")
        page.go_back()
        page.wait_for_function(
            "document.querySelector('[role=tab][aria-selected=true]').textContent.includes('Classify')"
        )
        page.wait_for_timeout(1000)
        page.locator("#mm-model input").click()
        page.get_by_role("option", name="other").click()
        page.wait_for_function("location.search.includes('model=other')")
        page.go_back()
        page.locator(".mm-model h2", has_text="breast").wait_for()
        page = open_page("?model=nobody/nothing")
        page.get_by_text("There is no model 'nobody/nothing' here").wait_for()
        assert selected(page) == "Classify"

    def test_an_address_opens_a_tab_that_a_phone_has_in_its_menu(self, open_page):
        page = open_page("?tab=fine-tune", width=390)
        page.get_by_label("Epochs").first.wait_for()
        page.wait_for_timeout(1000)
        page.get_by_label("More tabs").click()
        page.locator(".overflow-dropdown > button", has_text="Models").click()
        page.wait_for_function("location.search.includes('tab=models')")

    def test_labels_are_corrected_exported_and_kept_from_being_lost(self, open_page):
        page = open_page()
        give(page, *sorted(EXAMPLES.glob("*.webp"))[:3])
        page.locator(".mm-batch").wait_for()
        page.get_by_label("True class of blood_eosinophil.webp").select_option("platelet")
        page.get_by_text("1 of 3 images have a label").wait_for()
        page.locator("#mm-accept").click()
        page.get_by_text("3 of 3 images have a label").wait_for()
        assert page.get_by_label("True class of blood_eosinophil.webp").input_value() == "platelet"
        with page.expect_download() as download:
            page.locator("#mm-labels-csv").click()
        rows = Path(download.value.path()).read_text().splitlines()
        assert rows[0] == "path,label,predicted,probability,corrected" and rows[2].startswith(
            "blood_eosinophil.webp,plat"
        )
        page.locator("#mm-batch button[data-mm-index]").first.focus()
        page.keyboard.press("ArrowDown")
        page.locator(".mm-answer").wait_for()
        assert page.evaluate("document.activeElement.dataset.mmIndex") == "1"
        assert serious(page) == []
        asked = []
        page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
        page.evaluate("setTimeout(() => location.reload(), 20)")
        page.wait_for_timeout(700)
        assert asked == ["beforeunload"] and page.locator(".mm-batch").is_visible()

    def test_a_model_that_was_saved_is_opened_again(self, open_page, tmp_path):
        archive = zipped(save_model(tmp_path / "mine", dataset="breastmnist"), tmp_path / "mine.zip")
        page = open_page()
        choose(page, archive)
        page.locator(".mm-model h2", has_text="Yours: mine").wait_for()
        page.get_by_text("Yours: mine is open, for you alone").wait_for()
        assert "Yours" not in page.url
        give(page, EXAMPLES / "breast_benign.webp" if (EXAMPLES / "breast_benign.webp").is_file() else NEUTROPHIL)
        page.locator(".mm-answer", has_text="Yours: mine").wait_for()
        other = open_page()
        other.locator("#mm-model input").click()
        assert other.get_by_role("option", name="Yours: mine").count() == 0
        choose(page, NEUTROPHIL)
        page.get_by_text("This model cannot be opened").wait_for()


def test_the_zip_of_a_model_can_be_opened_by_the_package_too(tmp_path):
    folder = save_model(tmp_path / "mine")
    assert medmamba.MedMamba.from_pretrained(zipped(folder, tmp_path / "x.zip")).config.num_classes == 8
