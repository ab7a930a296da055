"""The web app in a real Chromium: every tab, with its errors, on a desk and on a phone, and by axe's rules."""

import base64
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import CHROMIUM, serving
from PIL import Image

import medmamba

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from demo.options import EXAMPLES, SAMPLE_SET

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM"),
]
NEUTROPHIL = EXAMPLES / "blood_neutrophil.webp"
TABS = ("Classify", "Explain", "Fine-tune", "Models")


@pytest.fixture(scope="module")
def app_root(tmp_path_factory):
    """Folder of uploads and sessions of the server of this module, which no other test shares."""
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def url(model_folders, app_root):
    with serving(model_folders, app_root) as address:
        yield address


@pytest.fixture
def open_page(browser, url):
    """Opens the app; at the end no page may have asked another server or thrown an error."""
    pages, outside, problems = [], [], []

    def open_(address=url, width=1280, dark=False):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(120_000)
        own = (address, "data:", "blob:")
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(own) else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.get_by_text("No image yet").wait_for()
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert outside == [] and problems == []


def give(page, *paths):
    page.locator("#mm-drop input[type=file]").set_input_files([str(p) for p in paths])


def answer_of(page, *paths) -> str:
    """Uploads an image and waits for its answer."""
    give(page, *paths)
    page.get_by_text(Path(paths[0]).name).first.wait_for()
    page.locator(".mm-answer").wait_for()
    return page.locator(".mm-answer").inner_text()


def to_tab(page, name):
    page.get_by_role("tab", name=name).click()
    page.wait_for_timeout(300)


def serious(page) -> list[tuple[str, list[str]]]:
    """What axe objects to on a page as it is now."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    page.wait_for_timeout(300)  # colours that fade in
    report = axe.run(page).response
    assert len(report["passes"]) > 10, "the rules were applied"
    return [
        (violation["id"], [node["html"][:160] for node in violation["nodes"]][:4])
        for violation in report["violations"]
        if violation["impact"] in ("serious", "critical")
    ]


# --- Classify ---


def test_a_person_classifies_an_image(open_page):
    page = open_page()
    assert page.get_by_text("Not a medical device").is_visible()
    text = answer_of(page, NEUTROPHIL)
    for expected in ("neutrophil", "%", "Calibrated probability", "ms", "blood", "on cpu", "32×32"):
        assert expected in text
    seen = page.locator(".mm-seen img").get_attribute("src")
    assert seen.startswith("data:image/png;base64,")


@pytest.mark.slow
def test_examples_paste_and_another_model(open_page):
    page = open_page()
    page.get_by_role("button", name="platelet, blood cell").click()
    page.get_by_text("blood_platelet.webp").wait_for()
    page.evaluate(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "pasted.webp", {type: "image/webp"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
        }""",
        base64.b64encode(NEUTROPHIL.read_bytes()).decode(),
    )
    page.get_by_text("pasted.webp").wait_for()
    page.locator("#mm-model input").click()
    page.get_by_role("option", name="other").click()
    page.locator(".mm-answer .mm-facts", has_text="other").wait_for()
    assert page.locator(".mm-model h2").inner_text() == "other"


@pytest.mark.slow
def test_models_for_other_images(open_page):
    page = open_page()
    assert page.locator("[data-mm-example]").count() == 10
    to_tab(page, "Models")
    page.locator("[data-mm-use]", has_text="breast").click()
    page.locator(".mm-model h2", has_text="breast").wait_for()
    assert page.locator("#mm-model input").input_value() == "Breast ultrasound · breast"
    page.get_by_role("button", name="malignant, breast ultrasound").click()
    page.locator(".mm-answer", has_text="normal, benign").wait_for()
    to_tab(page, "Explain")
    page.get_by_text("Ready", exact=True).wait_for()
    page.locator("#mm-run-explain").click()
    page.locator("#mm-downloads button").first.wait_for()
    assert page.locator(".mm-map").count() == 3
    page.get_by_label("Class to explain").click()
    assert page.get_by_role("option", name="normal, benign").is_visible()


@pytest.mark.slow
def test_a_patient_is_never_shown(open_page, tmp_path, capfd):
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    for keyword in ("PatientName", "PatientID", "InstitutionName", "WindowCenterWidthExplanation", "StudyDescription"):
        setattr(ds, keyword, "DOE^JANE4711")
    ds.WindowCenter, ds.WindowWidth = 40, 400
    ds.save_as(tmp_path / "scan.dcm")
    page = open_page()
    answer_of(page, tmp_path / "scan.dcm")
    answered = page.content()
    page.locator("#mm-reading").get_by_label("Window", exact=True).click()
    assert page.get_by_role("option", name="Window (40 / 400)").is_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.locator("#mm-run-explain").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Record (JSON)").click()
    output = capfd.readouterr()
    texts = [answered, page.content(), Path(download.value.path()).read_text(), output.out, output.err]
    assert "scan.dcm" in answered, "the name of the file is the visitor's own"
    assert not any("JANE4711" in text for text in texts)


@pytest.mark.slow
def test_a_window_that_hides_an_image_is_mended_by_a_button(open_page, tmp_path):
    """12 bits in a 16-bit PNG: the controls show what was applied, before and after."""
    values = np.random.default_rng(0).integers(348, 3205, (64, 64)).astype(np.uint16)
    values[0, :2] = 348, 3204
    Image.fromarray(values).save(tmp_path / "deep.png")
    page = open_page()
    answer_of(page, tmp_path / "deep.png")
    level = page.get_by_label("number input for Level (centre)")
    width = page.get_by_label("number input for Window width")
    preset = page.locator("#mm-reading").get_by_label("Window", exact=True)
    assert [level.input_value(), width.input_value()] == ["32767.5", "65535"]
    assert preset.input_value() == "From the file"
    page.get_by_role("button", name="Use the full value range").click()
    page.locator(".mm-answer", has_text="1776 / 2856").wait_for()
    assert [level.input_value(), width.input_value()] == ["1776", "2856"]
    assert preset.input_value() == "Full value range (1776 / 2856)"
    assert page.get_by_role("button", name="Use the full value range").count() == 0
    level.fill("2000")
    level.press("Enter")
    page.locator(".mm-answer", has_text="2000 / 2856").wait_for()
    assert preset.input_value() == "Manual"


@pytest.mark.slow
def test_a_window_by_hand(open_page):
    pydicom = pytest.importorskip("pydicom")
    page = open_page()
    answer_of(page, pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    before = page.locator(".mm-current img").get_attribute("src")
    assert "Use the full value range" in page.locator(".mm-answer").inner_text()
    level = page.get_by_label("number input for Level (centre) (HU)")
    level.fill("40")
    level.press("Enter")
    page.get_by_label("number input for Window width (HU)").fill("400")
    page.get_by_label("number input for Window width (HU)").press("Enter")
    page.locator(".mm-notes", has_text="window 40/400 applied").wait_for(state="attached")
    assert page.locator(".mm-current img").get_attribute("src") != before


def test_many_files_become_a_table_and_a_csv(open_page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    page = open_page()
    give(page, *sorted(EXAMPLES.glob("*.webp"))[:3], tmp_path / "broken.png")
    page.locator(".mm-batch").wait_for()
    assert "1 could not be read" in page.locator("#mm-batch").inner_text()
    page.locator(".mm-batch").get_by_role("button", name="Probability").click()
    values = [float(v.get_attribute("data-mm-value")) for v in page.locator(".mm-batch [data-mm-value]").all()]
    assert values == sorted(values) and len(values) == 3
    page.get_by_role("button", name="blood_eosinophil.webp").click()
    page.locator(".mm-answer").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the table").click()
    text = Path(download.value.path()).read_text()
    assert text.count("\n") == 5 and "broken.png" in text


def test_errors_are_shown_in_place_with_a_way_out(open_page, tmp_path):
    (tmp_path / "scan.png").write_bytes(b"%PDF-1.4 not an image")
    page = open_page()
    give(page, tmp_path / "scan.png")
    alert = page.get_by_role("alert").filter(has_text="scan.png could not be read")
    alert.wait_for()
    assert "export its pages as PNG" in alert.inner_text()
    answer_of(page, NEUTROPHIL)  # and on it goes


def test_keys_rows_and_examples(open_page):
    page = open_page(width=800)
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_text("choose an image first").wait_for()
    page.get_by_role("button", name="platelet, blood cell").click()
    page.locator(".mm-truth", has_text="this test image shows platelet").wait_for()
    for name in page.locator(".mm-bars th").all()[:8]:  # words are not broken into letters
        assert name.bounding_box()["width"] > 60
    assert page.locator(".mm-bar").first.bounding_box()["width"] > 60
    page.locator("#mm-model input").click()
    page.get_by_role("option", name="other").wait_for()
    page.keyboard.press("Tab")
    page.get_by_role("option", name="other").wait_for(state="hidden")
    page.get_by_role("tab", name="Classify").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("Check the maps").wait_for()
    page.wait_for_function("document.activeElement?.textContent.trim() === 'Explain'")
    page.keyboard.press("End")
    page.get_by_text("The sixteen datasets of the paper").wait_for()
    page.wait_for_function("document.activeElement?.textContent.trim() === 'Models'")
    to_tab(page, "Classify")
    give(page, *sorted(EXAMPLES.glob("*.webp")))
    page.locator(".mm-batch").wait_for()
    page.get_by_role("button", name="blood_basophil.webp").click()
    page.locator(".mm-answer").wait_for()
    page.wait_for_function("document.querySelector('.mm-answer').getBoundingClientRect().top < 600")


# --- Explain ---


@pytest.mark.slow
def test_explaining_an_answer(open_page):
    page = open_page()
    to_tab(page, "Explain")
    page.get_by_text("Nothing to explain yet").wait_for()
    to_tab(page, "Classify")
    answer_of(page, NEUTROPHIL)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_label("Occlusion").uncheck()
    page.get_by_label("Check the maps").check()
    page.locator("#mm-run-explain").click()
    page.get_by_text("Can these maps be trusted?").wait_for()
    page.locator("#mm-downloads button").first.wait_for()
    assert page.locator(".mm-verdicts strong", has_text="Better than chance:").count() == 2
    assert not page.locator(".mm-trust").is_visible(), "the numbers are folded"
    page.get_by_text("Results of each check").click()
    assert page.locator(".mm-map").count() == 2 and page.locator("#mm-trust .mm-chart").count() == 2
    trust = page.locator(".mm-trust").inner_text()
    assert "Deletion AUC" in trust and "Same map with random weights" in trust
    slider = page.locator("[data-mm-opacity]")
    slider.fill("10")
    assert page.locator(".mm-over").first.evaluate("e => getComputedStyle(e).opacity") == "0.1"
    with page.expect_download() as download:
        page.get_by_role("button", name="Maps (NumPy)").click()
    assert len(np.load(download.value.path()).files) == 3
    for method in page.locator("#mm-methods input").all():
        method.uncheck()
    page.locator("#mm-run-explain").click()
    page.get_by_text("No method selected").wait_for()


@pytest.mark.slow
def test_an_explanation_can_be_cancelled(open_page):
    page = open_page()
    answer_of(page, NEUTROPHIL)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    for method in page.locator("#mm-methods input").all():
        method.check()
    page.get_by_label("Check the maps").check()
    page.locator("#mm-run-explain").click()
    page.locator("#mm-stop-explain").click()
    page.locator("#mm-run-explain").wait_for()
    assert page.locator(".mm-trust thead th").count() < 9


# --- Fine-tune ---


@pytest.mark.slow
def test_fine_tuning_and_trying_the_new_model(open_page):
    page = open_page()
    to_tab(page, "Fine-tune")
    assert page.locator("#mm-run-train").is_disabled()
    page.locator("#mm-sample").click()
    page.locator("#mm-set").get_by_text("64 images, 2 classes").wait_for()
    epochs = page.get_by_label("number input for Epochs")
    epochs.fill("2")
    epochs.press("Tab")
    page.locator("#mm-run-train").click()
    page.get_by_role("progressbar", name="Training").wait_for()
    page.locator("#mm-try").wait_for(timeout=240_000)
    assert page.locator(".mm-confusion td[style]").count() == 4
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the model").click()
    path = Path(download.value.path()).rename(Path(download.value.path()).with_suffix(".zip"))
    assert {"model/config.json", "model/model.safetensors"} <= set(zipfile.ZipFile(path).namelist())
    assert medmamba.MedMamba.from_pretrained(path).config.labels == ["normal", "pneumonia"]
    page.locator("#mm-try").click()
    page.get_by_role("button", name="pneumonia, your test image").first.click()
    page.locator(".mm-truth", has_text="this test image shows pneumonia").wait_for()
    assert "Yours: chest_xray_sample" in page.locator(".mm-answer").inner_text()


@pytest.mark.slow
def test_fine_tuning_can_be_cancelled_and_refuses_what_is_no_set(open_page, tmp_path):
    page = open_page()
    to_tab(page, "Fine-tune")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../a/1.png", b"x")
    page.locator("#mm-zip input[type=file]").set_input_files(tmp_path / "evil.zip")
    page.get_by_text("leads out of the archive").wait_for()
    # The drop zone takes another file at once.
    page.locator("#mm-zip input[type=file]").set_input_files(SAMPLE_SET)
    page.locator("#mm-set", has_text="Images of one patient may be in several splits").wait_for()
    page.get_by_text("Patients in file names").click()
    field = page.get_by_label("Pattern (regular expression)")
    field.fill("(nothing)")
    field.press("Enter")
    page.locator("#mm-set", has_text="matches none of the 64 file names").wait_for()
    assert page.locator("#mm-run-train").is_disabled()
    field.fill(r"(\d)\.")
    page.locator("#mm-apply-pattern").click()
    page.locator("#mm-set", has_text="with up to").wait_for()
    page.locator("#mm-run-train").click()
    page.locator("#mm-stop-train").click()
    page.get_by_text("Nothing was saved").wait_for()


@pytest.mark.slow
def test_one_model_is_trained_at_a_time_and_others_are_told(open_page):
    first, second = open_page(), open_page()
    for page in (first, second):
        to_tab(page, "Fine-tune")
        page.locator("#mm-sample").click()
        page.locator("#mm-set .mm-card").wait_for()
        page.locator("#mm-run-train").click()
        if page is first:
            first.locator("#mm-training h2", has_text="Reading the images").wait_for()
    second.get_by_text("Waiting for another training to finish").wait_for()
    second.locator("#mm-stop-train").click()  # must not end the other
    first.locator("#mm-training h2", has_text="Epoch").wait_for()
    assert "Waiting" in second.locator("#mm-training").inner_text()
    first.locator("#mm-stop-train").click()
    for page in (first, second):
        page.get_by_text("Nothing was saved").wait_for()
        assert page.locator("#mm-run-train").is_visible()


# --- everywhere ---


@pytest.mark.slow
def test_what_was_uploaded_is_gone_with_the_page(open_page, app_root, tmp_path):
    image = tmp_path / "leaving.webp"
    image.write_bytes(NEUTROPHIL.read_bytes() + b"\0")  # equal uploads of other tests are one file
    page = open_page()
    answer_of(page, image)

    def copies():
        return [where for where, _, names in os.walk(app_root) if image.name in names]

    assert len(copies()) == 2, "what the server received, and what the visitor works with"
    page.goto("about:blank")
    until = time.monotonic() + 120
    while time.monotonic() < until and copies():
        time.sleep(0.3)
    assert copies() == []


@pytest.mark.slow
def test_the_address_that_the_app_opens_shows_an_answer(browser, url):
    page = browser.new_page()
    page.goto(f"{url}?example")
    page.locator(".mm-answer").wait_for(timeout=120_000)
    assert "basophil" in page.locator(".mm-answer").inner_text().lower()
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_sticks_out_on_a_phone(open_page, dark):
    page = open_page(width=390, dark=dark)
    answer_of(page, NEUTROPHIL)
    page.wait_for_function("document.querySelector('.mm-answer').getBoundingClientRect().top < 300")  # scrolled to
    for tab in TABS:
        button = page.get_by_role("tab", name=tab)
        if button.is_visible():
            button.click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["light", "dark"])
def test_axe_finds_nothing_serious(open_page, dark, tmp_path):
    (tmp_path / "scan.png").write_bytes(b"%PDF-1.4 not an image")
    page = open_page(dark=dark)
    found = {"empty": serious(page)}
    answer_of(page, NEUTROPHIL)
    for tab in TABS:
        to_tab(page, tab)
        found[tab] = serious(page)
    to_tab(page, "Classify")
    give(page, tmp_path / "scan.png")
    page.get_by_role("alert").filter(has_text="could not be read").wait_for()
    found["error"] = serious(page)
    give(page, *sorted(EXAMPLES.glob("*.webp"))[:2], tmp_path / "scan.png")
    page.locator(".mm-batch").wait_for()
    found["batch"] = serious(page)
    assert not any(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious_in_what_takes_longer(open_page, dark):
    page = open_page(dark=dark, width=390 if dark else 1280)
    answer_of(page, NEUTROPHIL)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_label("Occlusion").uncheck()
    page.get_by_label("Check the maps").check()
    page.locator("#mm-run-explain").click()
    page.locator("#mm-downloads button").first.wait_for()
    found = {"maps": serious(page)}
    to_tab(page, "Fine-tune")
    page.locator("#mm-sample").click()
    page.locator("#mm-set .mm-card").wait_for()
    page.get_by_label("number input for Epochs").fill("1")
    page.get_by_label("number input for Epochs").press("Tab")
    page.locator("#mm-run-train").click()
    page.get_by_role("progressbar", name="Training").wait_for()
    found["training"] = serious(page)
    page.locator("#mm-try").wait_for(timeout=240_000)
    found["trained"] = serious(page)
    assert not any(found.values()), found


@pytest.mark.slow
def test_light_and_dark_by_hand(open_page):
    page = open_page()
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Switch between light and dark").click()
    page.wait_for_function(f"{background} !== '{light}'")
    page.reload()
    page.get_by_text("No image yet").wait_for()
    page.wait_for_function(f"{background} !== '{light}'")  # the choice is kept


@pytest.mark.slow
@pytest.mark.skipif("medmamba/bloodmnist" not in medmamba.bundled_models(), reason="no such model in this copy")
def test_the_bundled_model_knows_its_examples(open_page, tmp_path):
    with serving([Path("medmamba/bloodmnist")], tmp_path) as address:
        for name in ("eosinophil", "lymphocyte", "platelet"):
            page = open_page(address)  # a fresh one: the answer of the image before would be read at once
            text = answer_of(page, EXAMPLES / f"blood_{name}.webp")
            page.close()
            assert text.split("Prediction")[1].split()[0].lower() == name
        page = open_page(address)
        page.get_by_role("button", name="normal, chest X-ray").click()
        page.get_by_text("This image does not look like the training images").wait_for()
        page.close()
