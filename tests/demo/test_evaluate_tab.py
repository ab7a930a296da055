"""The Evaluate tab: from a labelled set to a threshold to a report; without a browser and in one."""

import csv
import importlib.util
import io
import zipfile
from pathlib import Path

import pytest
from browser_cases import serious, to_tab
from demo_helpers import CHROMIUM, save_model, serving

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo.html import Markup
from demo.labelled import take
from demo.options import EXAMPLES, SAMPLE_SET, Limits
from demo.sessions import Session
from demo.tabs import evaluation as pages

IMAGES = sorted(EXAMPLES.glob("chest_*.jpeg"))


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path / "session", tmp_path / "outbox")


def upload(tmp_path, name: str, content: bytes) -> str:
    (tmp_path / "up").mkdir(exist_ok=True)
    (tmp_path / "up" / name).write_bytes(content)
    return str(tmp_path / "up" / name)


def table_of(tmp_path, text="path,label,sex\nchest_normal.jpeg,normal,f\nchest_pneumonia.jpeg,pneumonia,m\n") -> str:
    return upload(tmp_path, "labels.csv", text.encode())


def test_what_a_visitor_can_give(session, tmp_path):
    found = take(session, [str(SAMPLE_SET)], Limits())
    assert len(found.index) == 64 and found.index.classes == ("normal", "pneumonia") and not found.columns
    session.labelled = take(session, [*map(str, IMAGES), table_of(tmp_path)], Limits())
    assert session.labelled.columns == ("sex",) and len(session.labelled.index) == 2
    columns = session.labelled.groups(["sex", "nothing"])(session.labelled.index)
    assert columns.values == {"sex": ("f", "m")}
    # A table that comes later belongs to the images that are there.
    later = upload(tmp_path, "other.csv", b"path,label\nchest_normal.jpeg,a\nchest_pneumonia.jpeg,b\n")
    assert take(session, [later], Limits()).index.classes == ("a", "b")


@pytest.mark.parametrize(
    ("limits", "files", "message"),
    [
        (Limits(zip_images=10), [SAMPLE_SET], "64 images; the limit here is 10|holds 65 files; the limit is 10"),
        (Limits(zip_classes=1), [SAMPLE_SET], "2 classes; the limit here is 1"),
        (Limits(zip_unpacked_mb=0), [SAMPLE_SET], "unpacks to more than 0 MB"),
        (Limits(), IMAGES, "no labels; add a CSV file"),
        (Limits(image_mb=0), IMAGES, "is larger than 0 MB"),
        (Limits(zip_images=1), IMAGES, "2 images; the limit here is 1"),
        (Limits(), [SAMPLE_SET, IMAGES[0]], "one zip file, or images"),
        (Limits(), [IMAGES[0], IMAGES[0]], "two images are called"),
    ],
)
def test_what_is_refused_leaves_nothing(session, limits, files, message):
    from medmamba.data import DatasetError

    with pytest.raises(DatasetError, match=message):
        take(session, [str(path) for path in files], limits)
    assert not session.folder.exists() or list(session.folder.iterdir()) == []


def test_a_table_alone_is_not_enough(session, tmp_path):
    from medmamba.data import DatasetError

    with pytest.raises(DatasetError, match="give the images too"):
        take(session, [table_of(tmp_path)], Limits())


def test_names_of_a_set_are_escaped(session, tmp_path):
    text = "path,label,sex\nchest_normal.jpeg,<img src=x>,f\nchest_pneumonia.jpeg,b,m\n"
    found = take(session, [*map(str, IMAGES), table_of(tmp_path, text)], Limits())
    html = pages.set_html(found) + pages.mapping_html({"<img src=x>": "normal"})
    assert isinstance(html, Markup) and "<img src=x>" not in html and html.count("&lt;img src=x&gt;") == 2


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """An app with random models: of blood cells, the default, and of the sample's classes."""
    root = tmp_path_factory.mktemp("evaluate")
    chest = save_model(root / "chest", dataset="pneumoniamnist")
    blood = save_model(root / "blood")
    with serving([blood, chest], root / "app") as url:
        yield url


@pytest.mark.slow
def test_the_endpoint(address, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(address, verbose=False)
    files = [gradio_client.handle_file(str(path)) for path in (*IMAGES, table_of(tmp_path))]
    record, text = client.predict(files, model="chest", by="sex", api_name="/evaluate")
    assert record["n_images"] == 2 and record["classes"] == ["normal", "pneumonia"]
    assert len(record["subgroups"]["groups"]) == 2 and record["failures"] == [] and "research" in record["notice"]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["sex"] for row in rows] == ["f", "m"] and [row["true"] for row in rows] == ["normal", "pneumonia"]
    for arguments, message in (
        ({"by": "site"}, "no column 'site'"),
        ({"model": "blood"}, "does not know normal, pneumonia"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(files, **{"model": "chest", **arguments}, api_name="/evaluate")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "dark phone"])
def test_from_a_set_to_a_threshold_to_a_report(browser, address, tmp_path, width, dark):
    problems: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.get_by_text("No image yet").wait_for()
    to_tab(page, "Evaluate")
    assert page.locator("#mm-run-evaluate").is_disabled()
    found = {"empty": serious(page)}
    # A set that is refused, then one whose classes the model does not know: both leave the drop zone free.
    drop = page.locator("#mm-labelled input[type=file]")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../a/1.png", b"x")
    drop.set_input_files(tmp_path / "evil.zip")
    page.locator("#mm-evaluation", has_text="leads out of the archive").wait_for()
    drop.set_input_files(SAMPLE_SET)
    page.locator("#mm-labelled-set", has_text="blood has other classes").wait_for()
    found["other"] = serious(page)
    # One click takes the sample set and the model for it.
    page.locator("#mm-evaluate-sample").click()
    page.locator(".mm-evaluated").wait_for(timeout=60_000)
    page.locator("#mm-evaluate-files button").first.wait_for()
    assert "chest on 64 images" in page.locator(".mm-evaluated").inner_text()
    counts = [int(cell.inner_text()) for cell in page.locator("[data-mm-cell]").all()]
    assert sum(counts) == 64
    page.locator("[data-mm-cell]").first.click()
    page.locator("#mm-cell-images .mm-gallery img").first.wait_for()
    assert page.locator("#mm-cell-images .mm-gallery li").count() == min(counts[0], 24)
    number = page.get_by_label("number input for Threshold")
    number.fill("0")
    number.press("Enter")
    page.locator("#mm-point", has_text="finds 32 of 32 with pneumonia").wait_for()
    assert "clears 0 of 32 without" in page.locator("#mm-point").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found["results"] = serious(page)
    assert page.get_by_text("Download it").locator("visible=true").count() == 0, "pressed by scripts alone"
    with page.expect_download() as download:
        page.get_by_role("button", name="Report (HTML)").click()
    assert "TRIPOD+AI" in Path(download.value.path()).read_text(encoding="utf-8")
    if not dark and importlib.util.find_spec("weasyprint"):
        with page.expect_download() as download:
            page.get_by_role("button", name="Report (PDF)").click()
        assert Path(download.value.path()).read_bytes().startswith(b"%PDF")
    with page.expect_download() as download:
        page.get_by_role("button", name="Each image (CSV)").click()
    assert len(Path(download.value.path()).read_text(encoding="utf-8").splitlines()) == 65
    page.close()
    assert not any(found.values()), found
    assert problems == []


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM")
def test_other_names_only_by_the_visitors_word(browser, address, tmp_path):
    table = table_of(tmp_path, "path,label,sex\nchest_normal.jpeg,clear,f\nchest_pneumonia.jpeg,opaque,m\n")
    page = browser.new_page()
    page.goto(address)
    page.get_by_text("No image yet").wait_for()
    to_tab(page, "Evaluate")
    page.locator("#mm-evaluate-model input").click()
    page.get_by_role("option", name="chest").click()
    page.locator("#mm-labelled input[type=file]").set_input_files([*map(str, IMAGES), table])
    page.locator("#mm-mapping", has_text="opaque").wait_for()
    assert page.locator("#mm-run-evaluate").is_disabled()
    page.locator("#mm-confirm").click()
    page.locator("#mm-mapping").wait_for(state="hidden")
    page.locator("#mm-labelled-set", has_text="'opaque' as 'pneumonia'").wait_for()
    page.locator("#mm-run-evaluate").click()
    page.locator("#mm-subgroups", has_text="By sex").wait_for(timeout=60_000)
    page.close()
