"""Pages for the record from Classify and Explain, and the same facts in the CSV and in the PNG."""

import csv
import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest
from browser_cases import MARKS, answer_of, give, serious
from demo_helpers import save_model, serving
from PIL import Image

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from demo.options import EXAMPLES
from medmamba.utils.checksums import file_hash

WEASYPRINT = importlib.util.find_spec("weasyprint")
pytestmark = [pytest.mark.slow, *MARKS]


def fetched(page, name: str) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    return Path(download.value.path())


def test_the_same_facts_everywhere(browser, tmp_path):
    folder = save_model(tmp_path / "blood")
    image = EXAMPLES / "blood_platelet.webp"
    facts = [hashlib.sha256(image.read_bytes()).hexdigest(), file_hash(folder / "model.safetensors"), "Research only"]
    with serving([folder], tmp_path / "app") as address:
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.goto(address)
        page.get_by_text("No image yet").wait_for()
        assert not page.locator("#mm-record").is_visible()
        answer_of(page, image)
        html = fetched(page, "Page for the record (HTML)").read_text(encoding="utf-8")
        assert all(fact in html for fact in [*facts, image.name]) and str(tmp_path) not in html
        assert not serious(page)
        if WEASYPRINT:
            assert fetched(page, "Page for the record (PDF)").read_bytes().startswith(b"%PDF")
        page.get_by_role("button", name="Explain this prediction").click()
        page.get_by_text("Ready", exact=True).wait_for()
        for method in page.locator("#mm-methods input").all()[1:]:
            method.uncheck()
        page.locator("#mm-methods input").first.check()
        page.locator("#mm-run-explain").click()
        page.locator("#mm-downloads button").first.wait_for()
        html = fetched(page, "Page for the record (HTML)").read_text(encoding="utf-8")
        assert all(fact in html for fact in facts) and html.count("data:image/png") == 2, "the image and its map"
        if WEASYPRINT:
            content = fetched(page, "Page for the record (PDF)").read_bytes()
            assert content.startswith(b"%PDF") and len(content) > 10_000, "with the image and its map"
        with Image.open(fetched(page, "Picture (PNG)")) as picture:
            assert [picture.text["file_sha256"], picture.text["weights_sha256"]] == facts[:2]
        page.get_by_role("tab", name="Classify").click()
        (tmp_path / "bad.png").write_bytes(b"nothing")
        give(page, image, tmp_path / "bad.png")
        page.locator(".mm-batch").wait_for()
        with open(fetched(page, "Download the table"), encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [rows[0]["file_sha256"], rows[0]["weights_sha256"]] == facts[:2]
        html = fetched(page, "Page for the record (HTML)").read_text(encoding="utf-8")
        assert "Overview" in html and "bad.png" in html
        page.close()


def test_without_a_pdf_maker_the_page_says_so_and_stays(browser, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "weasyprint", None)  # as if it were not installed
    with serving([save_model(tmp_path / "blood")], tmp_path / "app") as address:
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.goto(address)
        answer_of(page, EXAMPLES / "blood_platelet.webp")
        page.get_by_role("button", name="Page for the record (PDF)").click()
        said = page.locator(".toast-body").inner_text()
        assert "no PDF maker" in said and 'pip install "medmamba[report]"' in said and "Traceback" not in said
        assert page.locator(".mm-answer").is_visible()
        page.close()
