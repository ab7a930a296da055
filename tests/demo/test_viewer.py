"""The image viewer: its requests and records, and the dialog in a browser."""

import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from browser_cases import MARKS
from demo_cases import NEUTROPHIL
from PIL import Image

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo.service import View
from demo.sessions import Session
from demo.tabs import viewer


def asked(**detail):
    return viewer.parse(SimpleNamespace(index=json.dumps(detail)))


def test_only_requests_of_the_page_are_read():
    assert asked(seq=3, image=1, window=[40, 400], quick=True) == viewer.Asked(3, None, 1, None, (40, 400), True)
    for bad in (
        {"seq": -1}, {"frame": 1.5}, {"map": "0"}, {"window": [1]}, {"window": [0, 0]}, {"window": ["x", 1]},
        {"window": [1e999, 1]},
    ):  # fmt: skip
        assert asked(**bad) is None, bad
    assert viewer.parse(SimpleNamespace(index="[")) is None and viewer.parse(SimpleNamespace(index="7")) is None


def test_a_record_names_the_pictures_the_window_and_the_scale(tmp_path):
    path = pytest.importorskip("pydicom").data.get_testdata_file("CT_small.dcm", download=False)
    session = Session(tmp_path / "private", tmp_path / "outbox")
    session.keep_images([path, str(NEUTROPHIL)])
    found = viewer.record(session, viewer.Asked(seq=5, image=0, window=(40, 400)), View(0))
    assert found["seq"] == 5 and found["index"] == 0 and found["count"] == 2 and found["size"] == [128, 128]
    assert found["window"]["level"] == 40 and found["window"]["unit"] == "HU" and not found["applies"]
    assert found["scale"]["plane"] == "in the patient" and found["scale"]["mm"] == pytest.approx(0.661468)
    files = [tmp_path / "outbox", *(tmp_path / "outbox").rglob("*.png")]
    assert found["panes"][0]["file"] == f"gradio_api/file={files[1]}"
    assert np.asarray(Image.open(files[1])).shape == (128, 128)
    other = viewer.record(session, viewer.Asked(image=1, quick=True), View(0))
    assert other["window"] is None and other["scale"] is None and other["panes"][0]["src"].startswith("data:image/webp")
    for _ in range(4):  # old pictures are deleted
        viewer.record(session, viewer.Asked(), View(0))
    assert len(list((tmp_path / "outbox").rglob("*.png"))) == 2


@pytest.fixture
def page(browser, app_url):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(30_000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    opened.goto(app_url)
    opened.get_by_text("No image yet").wait_for()
    yield opened
    opened.close()
    assert problems == []


def give(page, *paths):
    page.locator("#mm-drop input[type=file]").set_input_files([str(p) for p in paths])
    page.locator(".mm-answer, .mm-batch").first.wait_for()


class TestInABrowser:
    pytestmark: ClassVar = [pytest.mark.slow, *MARKS]

    def test_zoom_pan_and_window_of_a_scan(self, page):
        give(page, pytest.importorskip("pydicom").data.get_testdata_file("CT_small.dcm", download=False))
        page.get_by_role("button", name="Enlarge the image").click()
        dialog = page.get_by_role("dialog", name="Image viewer")
        page.wait_for_function("document.querySelector('.mm-canvas img')?.naturalWidth === 128")
        assert "mm per pixel, in the patient" in dialog.inner_text()
        assert page.locator(".mm-scale").inner_text().split()[1] in ("mm", "cm")
        zoom = dialog.get_by_label("Zoom", exact=True)
        whole = zoom.inner_text()
        page.mouse.move(600, 450)
        page.mouse.wheel(0, -500)
        page.wait_for_function(f"document.querySelector('.mm-viewer header output').textContent !== '{whole}'")
        where = "document.querySelector('.mm-canvas').style.transform"
        before = page.evaluate(where)
        page.mouse.down()
        page.mouse.move(700, 500)
        page.mouse.up()
        dragged = page.evaluate(where)
        page.keyboard.press("ArrowLeft")
        assert len({before, dragged, page.evaluate(where)}) == 3
        page.keyboard.press("0")
        assert zoom.inner_text() == whole
        # The right button sets the window, and the prediction follows.
        window = page.locator(".mm-viewer-facts").inner_text()
        page.mouse.down(button="right")
        page.mouse.move(620, 330, steps=4)
        page.mouse.up(button="right")
        page.wait_for_function(f"document.querySelector('.mm-viewer-facts').textContent !== {json.dumps(window)}")
        page.locator(".mm-answer", has_text="set here").wait_for(state="attached")
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        assert page.locator("#mm-reading").get_by_label("Window", exact=True).input_value() == "Manual"

    def test_frames_and_the_images_of_a_batch(self, page, tmp_path):
        frames = [Image.fromarray(np.full((40, 40), 60 * i, np.uint8)) for i in range(3)]
        frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
        give(page, tmp_path / "stack.tif")
        page.get_by_role("button", name="Enlarge the image").click()
        slider = page.get_by_role("dialog").get_by_label("Frame", exact=True)
        slider.wait_for()
        page.keyboard.press(".")
        page.locator(".mm-current", has_text="frame 2 of 3").wait_for()
        page.keyboard.press("Escape")
        give(page, tmp_path / "stack.tif", NEUTROPHIL)
        page.locator(".mm-batch [data-mm-view]").click()  # a stack needs a frame: it is an error there
        page.locator(".mm-viewer-title", has_text="blood_neutrophil.webp").wait_for()
        page.keyboard.press("PageUp")
        page.locator(".mm-viewer-title", has_text="stack.tif").wait_for()

    def test_maps_appear_one_by_one_and_open_beside_the_image(self, page):
        give(page, NEUTROPHIL)
        page.get_by_role("button", name="Explain this prediction").click()
        page.get_by_text("Ready", exact=True).wait_for()
        for method in page.locator("#mm-methods input").all():
            method.uncheck()
        for method in ("Grad-CAM", "Saliency", "Occlusion"):
            page.locator("#mm-methods label", has_text=method).locator("input").check()
        page.locator(".mm-cost", has_text="3 maps on this machine").wait_for()
        page.evaluate(
            """() => { window.counts = new Set(); new MutationObserver(() => window.counts.add(
            document.querySelectorAll('.mm-map:not(.mm-skeleton)').length)).observe(
            document.getElementById('mm-maps'), {childList: true, subtree: true}); }"""
        )
        page.locator("#mm-run-explain").click()
        page.locator("#mm-downloads button").first.wait_for()
        assert {1, 2, 3} <= set(page.evaluate("[...window.counts]"))
        assert page.locator(".mm-heat td").count() == 10
        assert "values, enlarged" in page.locator(".mm-map", has_text="Grad-CAM").inner_text()
        page.get_by_role("button", name="Enlarge Occlusion beside the image").click()
        page.locator(".mm-pane").nth(1).wait_for()
        page.wait_for_function("document.querySelectorAll('.mm-canvas .mm-over')[1]?.naturalWidth === 224")
        assert "hiding this would lower the score" in page.locator(".mm-pane").nth(1).inner_text()
