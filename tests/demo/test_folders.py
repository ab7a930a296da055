"""Folders that are dropped or chosen in the browser: class folders keep their names on the way to the server."""

import pytest
from browser_cases import MARKS, to_tab
from PIL import Image

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = [pytest.mark.slow, *MARKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, in which images have the same names; a hidden file, and an umlaut in a name."""
    root = tmp_path_factory.mktemp("choose") / "my lesions"
    for k, name in enumerate(("benign", "Übergang")):
        (root / name).mkdir(parents=True)
        for n in range(6):
            Image.new("RGB", (32, 32), (40 * n, 120 * k, 60)).save(root / name / f"{n}.png")
    (root / "benign" / ".DS_Store").write_bytes(b"x")
    return root


def choose(page, zone, folder):
    with page.expect_file_chooser() as chooser:
        page.locator(f"[data-mm-folder={zone}]").click()
    chooser.value.set_files(str(folder))


def drop(page, zone, folder):
    """Drops a folder as the browser's own drag and drop does, with entries of a file system."""
    page.evaluate(
        """([zone, name, files]) => {
          const bytes = (path) => Uint8Array.from(atob(files[path]), (c) => c.charCodeAt(0));
          const file = (path) => new File([bytes(path)], path.split('/').pop());
          const entry = (path, isFile) => ({
            isFile, isDirectory: !isFile, name: path.split('/').pop(), fullPath: '/' + path,
            file: (done) => done(file(path)),
            createReader: () => {
              const depth = path.split('/').length;
              let inside = [...new Set(Object.keys(files).filter((other) => other.startsWith(path + '/'))
                .map((other) => other.split('/').slice(0, depth + 1).join('/')))];
              const some = () => inside.splice(0, 4).map((other) => entry(other, other in files));
              return { readEntries: (done) => done(some()) };
            },
          });
          const event = new Event('drop', { bubbles: true, cancelable: true });
          event.dataTransfer = { items: [{ webkitGetAsEntry: () => entry(name, false) }], files: [] };
          document.querySelector(`#${zone} button, #${zone}`).dispatchEvent(event);
        }""",
        [zone, folder.name, encoded(folder)],
    )  # fmt: skip


def encoded(folder):
    import base64

    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder.parent)): base64.b64encode(path.read_bytes()).decode() for path in files}


@pytest.mark.parametrize("way", [choose, drop])
def test_class_folders_survive(open_page, folder, way):
    page = open_page()
    to_tab(page, "Evaluate")
    way(page, "mm-labelled", folder)
    seen = page.locator("#mm-labelled-set")
    seen.get_by_text("Übergang").first.wait_for()
    assert "benign" in seen.inner_text() and "12" in seen.inner_text() and folder.name in seen.inner_text()
    to_tab(page, "Fine-tune")
    way(page, "mm-zip", folder)
    page.locator("#mm-set").get_by_text("Übergang").first.wait_for()
    assert page.locator("#mm-run-train").is_enabled()
    to_tab(page, "Classify")
    way(page, "mm-drop", folder)
    page.locator(".mm-batch").wait_for()
    assert page.locator("#mm-batch tbody tr").count() == 12


def test_a_dropped_folder_is_compared(open_page, tmp_path):
    root = tmp_path / "two kinds"
    for k, name in enumerate(("neutrophil", "platelet")):
        (root / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (32, 32), (40 * n, 120 * k, 60)).save(root / name / f"{n}.png")
    page = open_page()
    to_tab(page, "Compare")
    drop(page, "mm-compared", root)
    seen = page.locator("#mm-compared-set", has_text="6 images, 2 classes")
    seen.wait_for(timeout=20_000)
    assert root.name in seen.inner_text()
    page.locator("#mm-run-compare").click()
    page.locator("#mm-comparison", has_text="of 6 images").wait_for(timeout=60_000)
    assert "McNemar" in page.locator("#mm-comparison").inner_text(), "the names of the class folders are the labels"


def test_what_is_too_large_or_empty_is_said(open_page, folder, tmp_path):
    page = open_page()
    to_tab(page, "Evaluate")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_bytes(b"x")
    choose(page, "mm-labelled", tmp_path / "empty")
    page.get_by_text("The folder is empty").wait_for()
    page.evaluate("document.querySelector('[data-mm-folder=mm-labelled]').dataset.mmLargest = 0.0001")
    choose(page, "mm-labelled", folder)
    page.get_by_text("at most 0.0001 MB").wait_for()
    assert page.locator("#mm-run-evaluate").is_disabled()
