"""The Segment tab and its endpoints: masks and boxes over an image, their areas, and what can be downloaded."""

import importlib.util
import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_helpers import CHROMIUM, save_model, serving
from PIL import Image
from segmentation_data import disc

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)
pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo.dense import split_models
from demo.options import EXAMPLES

pytestmark = pytest.mark.slow
browser_only = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    from medmamba.detection import create_detector
    from medmamba.segmentation import create_segmenter

    root = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    segmenter = create_segmenter("test", ("disc",), size=64).eval()
    segmenter.config = segmenter.config.replace(training={"dataset": "discs", "licence": "cc-by-4.0"})
    detector = create_detector("test", ("bright", "dark"), size=64, channels=64).eval()
    return {
        "classifier": save_model(root / "blood"),
        "segmenter": segmenter.save_pretrained(root / "discs"),
        "detector": detector.save_pretrained(root / "squares"),
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "lesion.png"
    Image.fromarray(disc((96, 128), 1)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def dicom(tmp_path_factory) -> Path:
    """A DICOM image with a pixel spacing of 0.5 x 0.25 mm."""
    from dicom_images import write_dicom

    pydicom = pytest.importorskip("pydicom")
    path = tmp_path_factory.mktemp("dicom") / "slice.dcm"
    write_dicom(pydicom, path, disc((64, 48), 2)[0][..., 0], [0.5, 0.25])
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """A TIFF of floating-point values, which declares no window; beside it a colour image."""
    path = tmp_path_factory.mktemp("scan") / "slice.tif"
    Image.fromarray(disc((48, 64), 2)[0][..., 0].astype(np.float32) * 8 - 1000).save(path)
    Image.fromarray(disc((64, 96), 1)[0]).save(path.with_name("colour.png"))
    return path


@pytest.fixture(scope="module")
def url(folders, tmp_path_factory):
    with serving(list(folders.values()), tmp_path_factory.mktemp("app")) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return pytest.importorskip("gradio_client").Client(url, verbose=False)


def test_models_are_told_apart_and_classifiers_alone_have_no_tab(folders):
    classifiers, dense = split_models([str(folder) for folder in folders.values()])
    assert classifiers == (str(folders["classifier"]),)
    assert dense == (str(folders["segmenter"]), str(folders["detector"]))


def test_the_endpoint_gives_what_the_package_gives(client, folders, image):
    import medmamba

    handle = pytest.importorskip("gradio_client").handle_file(str(image))
    record, mask, overlay, seg = client.predict(handle, "", 0.4, False, None, None, None, api_name="/segment")
    expected = medmamba.MedMambaSegmenter.from_pretrained(folders["segmenter"]).predict(image).with_thresholds(0.4)
    assert record["classes"] == json.loads(json.dumps(expected.to_dict()["classes"]))
    assert record["model"] == "discs" and record["threshold"] == 0.4 and "notice" in record and seg is None
    assert np.array_equal(np.asarray(Image.open(mask)) > 0, expected.masks[0])
    assert Image.open(overlay).size == (128, 96)


def test_a_dicom_image_gives_areas_in_mm2_and_a_dicom_segmentation(client, dicom):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    handle = pytest.importorskip("gradio_client").handle_file(str(dicom))
    record, _, _, seg = client.predict(handle, "discs", 0.3, False, None, None, None, api_name="/segment")
    assert record["classes"][0]["area_mm2"] == pytest.approx(record["classes"][0]["area"] * 0.125)
    assert pydicom.dcmread(seg).Modality == "SEG"


def test_boxes_come_from_a_detector(client, folders, image):
    import medmamba

    handle = pytest.importorskip("gradio_client").handle_file(str(image))
    record, overlay = client.predict(handle, "", 0.01, None, None, None, api_name="/detect")
    expected = medmamba.MedMambaDetector.from_pretrained(folders["detector"]).predict(image, score=0.01)
    assert record["counts"] == expected.counts and len(record["boxes"]) == len(expected.boxes)
    assert Image.open(overlay).size == (128, 96)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("blood", None), "no model 'blood' for segmentation"),
        (("squares", None), "no model 'squares' for segmentation"),
        (("", 7.0), "thresholds are one or 1 values in [0, 1]"),
    ],
)
def test_wrong_fields_are_named(client, image, values, said):
    gradio_client = pytest.importorskip("gradio_client")
    handle = gradio_client.handle_file(str(image))
    with pytest.raises(Exception, match=r"\w") as caught:
        client.predict(handle, *values, False, None, None, None, api_name="/segment")
    assert said in str(caught.value)


def test_a_file_that_is_no_image_is_named(client, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    (tmp_path / "scan.png").write_bytes(b"%PDF-1.4 not an image")
    with pytest.raises(Exception, match=r"scan\.png") as caught:
        client.predict(gradio_client.handle_file(str(tmp_path / "scan.png")), "", None, False, None, None, None,
                       api_name="/segment")  # fmt: skip
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(("which", "package"), [(0, "segmentation_models_pytorch"), (1, "torchvision")])
def test_a_missing_package_is_named_before_a_model_is_loaded(folders, monkeypatch, which, package):
    from demo import dense

    folder = [folders["segmenter"], folders["detector"]][which]
    models = dense.DenseModels((str(folder),), "cpu", None)
    found = dense.importlib.util.find_spec
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ImportError, match=r"medmamba\[segment\]"):
        models.about(None)


@pytest.fixture
def page(browser, url):
    """The Segment tab; at the end the page may not have asked another server or thrown an error."""
    outside, problems = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.get_by_role("tab", name="Segment").click()
    page.get_by_text("Nothing to outline yet").wait_for()
    yield page
    page.close()
    assert outside == [] and problems == []


def serious(page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    page.wait_for_timeout(300)  # colours that fade in
    found = axe.run(page).response["violations"]
    return [f"{v['id']} {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]


def test_the_code_on_the_api_page_runs_as_it_stands(url, image, dicom, tmp_path, monkeypatch):
    httpx, gradio_client = pytest.importorskip("httpx"), pytest.importorskip("gradio_client")
    (tmp_path / "image.png").write_bytes(image.read_bytes())
    (tmp_path / "scan.dcm").write_bytes(dicom.read_bytes())
    with zipfile.ZipFile(tmp_path / "labelled.zip", "w") as archive:
        for name in ("neutrophil", "platelet"):
            for path in sorted(EXAMPLES.glob(f"blood_{name}.*")):
                archive.write(path, f"{name}/{path.name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gradio_client, "Client", partial(gradio_client.Client, verbose=False, download_files=tmp_path))
    endpoints = httpx.get(f"{url}gradio_api/info").json()["named_endpoints"]
    answers = {}
    for name, endpoint in endpoints.items():
        exec(endpoint["code_snippets"]["python"], scope := {})
        answers[name] = scope["result"]
    assert [record["name"] for record in answers["/models"]] == ["blood"]
    assert set(answers["/classify"]["probabilities"]) == set(answers["/models"][0]["classes"])
    records, csv = answers["/classify_batch"]
    assert [record["file"] for record in records] == ["image.png", "scan.dcm"] and "scan.dcm" in csv
    assert answers["/evaluate"][0]["n_images"] == 2
    assert answers["/explain"][0]["explanations"][0]["method"] == "integrated_gradients"
    assert answers["/segment"][0]["model"] == "discs" and answers["/detect"][0]["model"] == "squares"
    assert len(answers) == 7


class TestInABrowser:
    pytestmark = browser_only

    def test_a_person_outlines_a_lesion(self, page, image, dicom, tmp_path):
        assert serious(page) == []
        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(image))
        page.locator(".mm-outlined .mm-over").wait_for()
        result = page.locator("#mm-segment-result")
        assert "128×96 pixels" in result.inner_text() and "mm²" not in result.inner_text()
        assert page.get_by_role("button", name="DICOM Segmentation").count() == 0

        page.get_by_label("Opacity of the mask").fill("80")
        assert page.locator(".mm-maps").get_attribute("style") == "--mm-opacity: 0.8;"

        slider = page.locator("#mm-segment-threshold input[type=number]")
        slider.fill("0.06")
        slider.press("Tab")
        page.get_by_text("from a probability of 0.06").wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Mask (PNG)").click()
        download.value.save_as(tmp_path / "mask.png")
        mask = np.asarray(Image.open(tmp_path / "mask.png"))
        assert mask.shape == (96, 128)
        assert f"{int((mask > 0).sum()):,}" in result.inner_text()
        assert serious(page) == []

        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(dicom))
        page.get_by_text("48×64 pixels, 0.5 × 0.25 mm each").wait_for()
        assert "mm²" in result.inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="DICOM Segmentation").click()
        assert download.value.suggested_filename.endswith(".dcm")

    def test_boxes_and_what_cannot_be_read(self, page, image, tmp_path):
        page.locator("#mm-segment-model input").click()
        page.get_by_role("option", name="squares").click()
        page.get_by_text("Score from which a box is shown").wait_for()
        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(image))
        page.locator("#mm-segment-result .mm-outlined > img").wait_for()
        assert "Boxes with a score of at least" in page.locator("#mm-segment-result").inner_text()
        assert page.get_by_role("button", name="Mask (PNG)").count() == 0
        (tmp_path / "scan.png").write_bytes(b"%PDF-1.4 not an image")
        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(tmp_path / "scan.png"))
        page.get_by_role("alert").filter(has_text="could not be read").wait_for()
        assert serious(page) == []

    def test_a_window_is_chosen_where_the_file_declares_none(self, page, folders, scan, tmp_path):
        import medmamba

        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(scan))
        page.get_by_text("declares no display window").wait_for()
        assert "endpoint" not in page.locator("#mm-segment-result").inner_text()
        page.get_by_role("button", name="Use the full value range").click()
        page.locator(".mm-outlined .mm-over").wait_for()
        level = page.locator("#mm-segment-reading input[type=number]")
        window = [float(level.nth(k).input_value()) for k in (0, 1)]
        assert serious(page) == []
        # A level by hand gives what the package gives with that window.
        level.nth(0).fill(str(window[0] + 200))
        level.nth(0).press("Tab")
        page.wait_for_function(
            "[...document.querySelectorAll('#mm-segment-reading input')].some((input) => input.value === 'Manual')"
        )
        page.wait_for_timeout(500)
        page.get_by_text("from a probability of").wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Mask (PNG)").click()
        download.value.save_as(tmp_path / "mask.png")
        model = medmamba.MedMambaSegmenter.from_pretrained(folders["segmenter"])
        found = model.predict(scan, window=(window[0] + 200, window[1]))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")) > 0, found.masks[0])
        assert not np.array_equal(found.masks[0], model.predict(scan, window=tuple(window)).masks[0])
        # The next image has controls of its own.
        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(scan.with_name("colour.png")))
        page.get_by_text("96×64 pixels").wait_for()
        assert not page.locator("#mm-segment-reading").is_visible()

    def test_it_fits_a_phone(self, page, image):
        page.set_viewport_size({"width": 390, "height": 800})
        page.locator("#mm-segment-drop input[type=file]").set_input_files(str(image))
        page.locator(".mm-outlined .mm-over").wait_for()
        page.wait_for_function(
            "document.querySelector('#mm-segment-result').getBoundingClientRect().top < 300"
        )  # scrolled to
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_examples_are_offered_to_models_of_their_dataset_alone():
    from demo.examples import load_examples, outlined_html

    examples = load_examples(boxed=True)
    offered = outlined_html(examples, "pad_ufes_20")
    assert offered.count("<button") == 6 and "melanoma" in offered and "neutrophil" not in offered
    assert "Pacheco" in offered and "Acevedo" not in offered, "the sources of what is shown"
    smears = outlined_html(examples, "bccd")
    assert smears.count("<button") == 3 and "2 white cells and 4 platelets" in smears
    assert "Sources, all MIT" in smears and "© 2017 shenggan" in smears and "CC BY" not in smears
    assert "Permission is hereby granted" in (EXAMPLES / "LICENSE-BCCD").read_text(encoding="utf-8")
    assert load_examples() == [e for e in examples if e.kind != "blood smear"], (
        "same numbers, no smears for classifiers"
    )
    assert outlined_html(examples, "discs") == "" and outlined_html(examples, "kvasir_seg") == ""


def test_the_bundled_models_are_offered_the_one_with_examples_first():
    from demo.dense import bundled_dense

    assert bundled_dense() == ("medmamba/pad-lesions", "medmamba/bccd-cells", "medmamba/kvasir-polyps")
