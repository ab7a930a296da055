"""One server and one browser for all tests of the app in a process; tests that need other limits start their own.

Package scope, not session: while a browser of Playwright is open, its thread has a running event loop, which tests of
other folders must not find.
"""

from pathlib import Path

import pytest
from demo_cases import SECRET
from demo_helpers import CHROMIUM, FLAGS, save_model, serving


@pytest.fixture(scope="package")
def model_folders(tmp_path_factory) -> list[Path]:
    """Random models: two for blood cells and one for breast ultrasound."""
    root = tmp_path_factory.mktemp("models")
    folders = [save_model(root / name) for name in ("blood", "other")]
    return [*folders, save_model(root / "breast", dataset="breastmnist")]


@pytest.fixture(scope="package")
def model_folder(model_folders) -> Path:
    """The default model of the shared server."""
    return model_folders[0]


@pytest.fixture(scope="package")
def app_root(tmp_path_factory) -> Path:
    """Folder of uploads and sessions of the shared server."""
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="package")
def app_url(model_folders, app_root):
    """Address of the shared server."""
    with serving(model_folders, app_root) as address:
        yield address


@pytest.fixture(scope="package")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_root(tmp_path_factory):
    """Folder of uploads and sessions of the server of this module, which no other test shares."""
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def page_url(model_folders, page_root):
    with serving(model_folders, page_root) as address:
        yield address


class Pages:
    """Opens the app, and records what a page asks of another server and the errors that it throws until it is left."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address
        self.opened, self.left, self.outside, self.problems = [], [], [], []

    def __call__(self, address=None, width=1280, dark=False):
        address = address or self.address
        scheme = "dark" if dark else "light"
        page = self.browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)
        own = (address, "data:", "blob:")
        page.on("request", lambda r: self.outside.append(r.url) if not r.url.startswith(own) else None)
        page.on("pageerror", lambda error: self.record(page, str(error)))
        page.on("console", lambda m: self.record(page, m.text) if m.type == "error" else None)
        page.goto(address)
        page.get_by_text("No image yet").wait_for()
        self.opened.append(page)
        return page

    def record(self, page, problem):
        if page not in self.left:
            self.problems.append(problem)

    def leave(self, page):
        """Goes to an empty page. The requests which that cuts off are errors of the page, and no problem."""
        self.left.append(page)
        page.goto("about:blank")


@pytest.fixture
def open_page(browser, page_url):
    """Opens the app; at the end no page may have asked another server or thrown an error."""
    pages = Pages(browser, page_url)
    yield pages
    for page in pages.opened:
        page.close()
    assert pages.outside == [] and pages.problems == []


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def url(model_folder, root):
    with serving([model_folder], root, batch_files=4, image_mb=1) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return pytest.importorskip("gradio_client").Client(url, verbose=False)


@pytest.fixture
def dicom_with_patient(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    ds.PatientName, ds.PatientID = SECRET, "ID-" + SECRET
    path = tmp_path / "scan.dcm"
    ds.save_as(path)
    return path
