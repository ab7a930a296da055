"""The Compare tab in a browser: labelled and unlabelled images, models that cannot be compared."""

import pytest
from browser_cases import MARKS, serious, to_tab
from demo_helpers import save_model, serving

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from demo.options import EXAMPLES, SAMPLE_SET

pytestmark = [pytest.mark.slow, *MARKS]


def test_two_models_on_the_same_images(browser, tmp_path):
    folders = [save_model(tmp_path / name, dataset="pneumoniamnist") for name in ("old", "new")]
    folders.append(save_model(tmp_path / "blood"))
    problems: list[str] = []
    with serving(folders, tmp_path / "app") as address:
        page = browser.new_page(viewport={"width": 800, "height": 900}, color_scheme="dark")
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.get_by_text("No image yet").wait_for()
        to_tab(page, "Compare")
        page.get_by_role("button", name="Images of Classify").click()
        page.get_by_text("No images in Classify").wait_for()
        drop = page.locator("#mm-compared input[type=file]")
        drop.set_input_files([str(path) for path in sorted(EXAMPLES.glob("chest_*.jpeg"))])
        page.locator("#mm-compared-set", has_text="2 images without labels").wait_for()
        page.locator("#mm-run-compare").click()
        page.locator("#mm-comparison", has_text="2 of 2 images (100%)").wait_for()
        assert "McNemar" not in page.locator("#mm-comparison").inner_text()
        drop.set_input_files(SAMPLE_SET)
        page.locator("#mm-compared-set", has_text="64 images, 2 classes").wait_for()
        page.locator("#mm-run-compare").click()
        page.locator("#mm-comparison", has_text="64 of 64 images (100%)").wait_for(timeout=60_000)
        assert "McNemar" in page.locator("#mm-comparison").inner_text()
        assert page.locator("#mm-differences tbody tr").count() == 24
        assert page.evaluate("document.documentElement.scrollWidth") <= 800
        found = serious(page)
        with page.expect_download():
            page.locator("#mm-compare-file").click()
        page.locator("#mm-second input").click()
        page.get_by_role("option", name="blood").click()
        page.locator("#mm-run-compare").click()
        page.get_by_text("Only models with the same classes can be compared").wait_for()
        page.close()
    assert not found, found
    assert problems == []
