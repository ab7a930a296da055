"""Similar training images and the map of a batch, as the app shows them."""

from typing import ClassVar

import numpy as np
import pytest
from browser_cases import MARKS, answer_of, give, serious
from demo_cases import NEUTROPHIL
from demo_helpers import serving
from PIL import Image

import medmamba
from medmamba.data import open_dataset
from medmamba.inference.similar import build_gallery, load_gallery, project

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo.store import ModelStore
from demo.tabs import similar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a gallery of two classes, one of which has a name that is no HTML."""
    root = tmp_path_factory.mktemp("gallery")
    names = {0: "<b>dark</b>", 1: "light"}
    medmamba.create_model("test", 2, id2label=names).save_pretrained(root / "model")
    random = np.random.default_rng(0)
    for k, level in enumerate((40, 200)):
        for i in range(5):
            target = root / "data" / "train" / str(k) / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(level - 30, level + 30, (40, 40, 3), dtype=np.uint8)).save(target)
    model = medmamba.MedMamba.from_pretrained(root / "model")
    build_gallery(model, open_dataset(root / "data"), "CC-BY-4.0", "Somebody <i>2020</i>", images=10).save(
        root / "model"
    )
    return root / "model"


def test_what_is_near_is_shown_with_its_source(folder):
    gallery = load_gallery(folder)
    page = similar.similar_html(gallery, gallery.nearest(gallery.features[0], 3))
    assert page.count("<img") == 3 and "&lt;b&gt;dark&lt;/b&gt;" in page and "<b>" not in page
    assert "CC BY 4.0 images. Somebody &lt;i&gt;2020" in page and "Nothing like this" not in page
    far = similar.similar_html(gallery, gallery.nearest(gallery.features[0] + 1e3, 3))
    assert "Nothing like this is among them" in far


def test_the_map_has_a_point_for_each_image_and_a_mark_for_each_class(folder):
    loaded = ModelStore((str(folder),), "cpu").default
    points = [similar.Point(i, f"{i}.png", loaded.config.labels[i % 2]) for i in range(3)]
    found = project(np.random.default_rng(0).normal(size=(3, 64)), loaded.gallery.features)
    page = similar.map_html(found, points, loaded)
    assert page.count("data-mm-index") == 3 and page.count("<li>") == 2
    assert page.count("<circle") == 3 + 10 + 2
    marks = {similar._mark((0, 0), i, 5) for i in range(32)}
    assert len(marks) == 32, "every class of 32 has its own mark"


class TestInABrowser:
    pytestmark: ClassVar = [pytest.mark.slow, *MARKS]

    def test_neighbours_and_the_map_of_a_batch(self, browser, folder, tmp_path):
        with serving([folder], tmp_path) as address:
            page = browser.new_page()
            page.set_default_timeout(30_000)
            page.goto(address)
            page.get_by_text("No image yet").wait_for()
            answer_of(page, NEUTROPHIL)
            page.locator(".mm-similar li").nth(5).wait_for()
            give(page, *sorted(NEUTROPHIL.parent.glob("blood_*.webp"))[:4])
            page.locator(".mm-batch").wait_for()
            page.locator("#mm-map-batch").click()
            page.locator("#mm-embedding [data-mm-index]").nth(3).wait_for()
            assert serious(page) == []
            page.locator("#mm-embedding [data-mm-index='2']").focus()
            page.keyboard.press("Enter")
            page.locator(".mm-answer").wait_for()
            assert page.locator("#mm-batch button[data-mm-current]").get_attribute("data-mm-index") == "2"
            page.close()
