"""The web app in a real Chromium: classifying, and what holds on every tab, on a desk, a phone and by axe's rules."""

import base64
import os
import time
from pathlib import Path

import numpy as np
import pytest
from browser_cases import MARKS, answer_of, give, serious, to_tab
from demo_cases import NEUTROPHIL
from demo_helpers import serving
from PIL import Image

import medmamba

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from demo.options import EXAMPLES

pytestmark = MARKS
TABS = ("Classify", "Explain", "Evaluate", "Compare", "Fine-tune", "Models")


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
    assert page.locator("[data-mm-example]").count() == 11
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
    page.get_by_role("button", name="blood_eosinophil.webp", exact=True).click()
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
    page.get_by_role("option").first.wait_for(state="hidden")  # the selected one too
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
    page.get_by_role("button", name="blood_basophil.webp", exact=True).click()
    page.locator(".mm-answer").wait_for()
    page.wait_for_function("document.querySelector('.mm-answer').getBoundingClientRect().top < 600")


# --- everywhere ---


@pytest.mark.slow
def test_what_was_uploaded_is_gone_with_the_page(open_page, page_root, tmp_path):
    image = tmp_path / "leaving.webp"
    image.write_bytes(NEUTROPHIL.read_bytes() + b"\0")  # equal uploads of other tests are one file
    page = open_page()
    answer_of(page, image)

    def copies():
        return [where for where, _, names in os.walk(page_root) if image.name in names]

    assert len(copies()) == 2, "what the server received, and what the visitor works with"
    open_page.leave(page)
    until = time.monotonic() + 120
    while time.monotonic() < until and copies():
        time.sleep(0.3)
    assert copies() == []


@pytest.mark.slow
def test_the_address_that_the_app_opens_shows_an_answer(browser, page_url):
    page = browser.new_page()
    page.goto(f"{page_url}?example")
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
def test_the_slider_over_the_maps_suits_a_finger_on_a_phone(open_page):
    page = open_page(width=390)
    answer_of(page, NEUTROPHIL)
    to_tab(page, "Explain")
    page.locator("#mm-run-explain").click()
    slider = page.locator(".mm-slider input[type=range]").first
    slider.wait_for()
    box = slider.bounding_box()
    assert box["width"] >= 190 and box["x"] >= 0 and box["x"] + box["width"] <= 390
    slider.focus()
    before = slider.input_value()
    page.keyboard.press("ArrowRight")
    assert float(slider.input_value()) > float(before)


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
@pytest.mark.parametrize(("width", "dark"), [(390, False), (800, True)], ids=["light phone", "dark tablet"])
def test_axe_finds_nothing_serious_on_small_screens(open_page, width, dark):
    page = open_page(width=width, dark=dark)
    answer_of(page, NEUTROPHIL)
    found = {}
    for tab in TABS:
        to_tab(page, tab)
        found[tab] = serious(page)
    assert not any(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious_in_what_takes_longer(open_page, dark):
    page = open_page(dark=dark, width=390 if dark else 1280)
    answer_of(page, NEUTROPHIL)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_label("GradientSHAP").uncheck()
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
        page.get_by_text("Not answered: this image is unlike those the model knows").wait_for()
        page.close()
