"""Strangers' text in the app: models, files and errors are shown as text, on every tab, in a real Chromium too."""

import ast
import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import CHROMIUM, save_model, serving
from PIL import Image

gradio = pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

import demo  # noqa: E402
from demo import charts, guard, html, theme  # noqa: E402
from demo.tabs import answers  # noqa: E402

EVIL = [
    '<img src=x onerror="window.__xss=1">',
    '=HYPERLINK("http://127.0.0.1:1/","x")',
    "</script><script>window.__xss=2</script>",
    "[x](javascript:window.__xss=3) ${window.__xss=4} {{constructor.constructor('window.__xss=5')()}}",
    "\"><svg onload='window.__xss=6'>",
]
MARKUP = "<img src=x", "<script>window.__xss", "<svg onload", "<b onmouseover"
DEMO = Path(demo.__file__).parent


def evil_model(folder: Path) -> Path:
    """A model whose every text is an attack; its classes are `EVIL`."""
    save_model(folder, dataset=None, calibration={})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = dict(enumerate(EVIL[:3]))
    config["training"] = {
        "dataset": EVIL[0],
        "dataset_title": EVIL[4],
        "licence": "<b onmouseover=1>x",
        "source": EVIL[3],
        "note": EVIL[2],
        "split": EVIL[4],
        "init": EVIL[0],
        "recipe": EVIL[0],
    }
    config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), "label_names": EVIL[:3]}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return evil_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    with serving([model], tmp_path_factory.mktemp("app")) as address:
        yield address


# --- one place ---


@pytest.mark.parametrize("path", sorted(DEMO.rglob("*.py")), ids=lambda path: str(path.relative_to(DEMO)))
def test_html_is_made_of_literals_alone(path):
    """No f-string, no concatenation, no variable becomes HTML: `tag` and `Markup` are given literals."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "tag" for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("tag", "Markup") and id(node) not in own:
            assert isinstance(node.args[0], ast.Constant), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gr":
            shows = ("HTML", "Markdown", "Label", "Dataframe", "Gallery", "Info", "Warning", "Chatbot", "Plot")
            allowed = path.name == "theme.py"
            assert node.attr not in shows or allowed, f"{path.name}:{node.lineno} shows HTML of its own"


def test_the_literals_leave_no_attribute_unquoted():
    """Escaping is enough between quotes only."""
    for path in DEMO.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tag" and node.args:
                text = getattr(node.args[0], "value", "")
                assert "={" not in str(text), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("text", [*EVIL, "'", '"', "<b>", "&"])
def test_plain_text_is_escaped_wherever_it_is_put(text):
    pieces = [
        html.error(text, text),
        html.callout("warn", text, text),
        html.empty(text, text),
        html.bars([(text, 0.5), *[(text, 0.0)] * 20], text),
        html.table([text], [[text]], text, sort=True, css=text),
        html.facts([(text, text), (text, html.with_detail(text, text))]),
        html.bullets([text], text),
        html.join([text, html.tag("<i>{}</i>", text)], text),
        html.card(html.NOTHING, text, text, text),
        charts.chart([charts.Line(text, [0, 1], [0, 1])], text, text, text),
        answers.failure_html(text, Path(text)),
    ]
    for piece in pieces:
        assert isinstance(piece, html.Markup)
        for mark in MARKUP:
            assert mark not in piece
        assert len(text) == 1 or text not in piece or not set(text) & set("<>\"'&")


def test_the_component_escapes_what_is_not_html_first_and_later():
    with gradio.Blocks():
        shown = theme.Html(EVIL[0])
    assert "<img" not in shown.value and shown.get_block_name() == "html"
    assert "<img" not in shown.postprocess(EVIL[0])
    again = shown.__class__(**{**shown.constructor_args, "value": EVIL[0]})  # as Gradio does for each visitor
    assert "<img" not in again.value and "<img" not in again.postprocess(EVIL[0])
    assert shown.postprocess(html.tag("<b>{}</b>", "<")) == "<b>&lt;</b>"
    assert not list(DEMO.rglob("*.pyi"))


# --- the server ---


def test_the_policy_allows_no_inline_code_but_the_templates_own(url, app_url):
    response = httpx.get(url)
    rules = dict(rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";"))
    assert "unsafe-inline" not in rules["script-src"] and "data:" not in rules["script-src"]
    assert rules["script-src-attr"] == "'none'" and rules["object-src"] == "'none'"
    plain = httpx.get(app_url)
    count = [page.headers["content-security-policy"].count("'sha256-") for page in (response, plain)]
    assert count[0] == count[1] > 0, "what a model says adds no script"
    for text in MARKUP:
        assert text not in response.text


def test_hashes_are_those_that_browsers_compute():
    page = b"<script>one()</script><script src='x.js'></script><SCRIPT type='module'>\r\ntwo()</SCRIPT >"
    rules = guard.policy(page)
    # printf 'one()' | openssl dgst -sha256 -binary | base64; of the second "\ntwo()": browsers see line feeds alone
    for digest in ("HR7iaask9daLMRRskMI++QeJtjWDOjyPA6lGzYGzKW4=", "Lb2lc9BzdFQqYRFBcRPaZUZ0kClPkx4OtyGKdmIkL+s="):
        assert f"'sha256-{digest}'" in rules
    assert rules.count("'sha256-") == 2


def test_a_file_of_a_visitor_is_no_page(url):
    name = "page.html"
    (path,) = httpx.post(f"{url}gradio_api/upload", files={"files": (name, b"<script>1</script>")}).json()
    response = httpx.get(f"{url}gradio_api/file={path}")
    rules = response.headers["content-security-policy"]
    assert "sandbox" in rules and "default-src 'none'" in rules and "sha256" not in rules


def test_a_table_starts_no_formula(url, tmp_path):
    names = ["=1+1.png", "+a.png", "-a.png", "@a.png"]
    for name in names:
        Image.new("L", (32, 32), 90).save(tmp_path / name)
    client = gradio_client.Client(url, verbose=False)
    files = [gradio_client.handle_file(str(tmp_path / name)) for name in names]
    records, text = client.predict(files, api_name="/classify_batch")
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert len(records) == 4 and any("HYPERLINK" in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


# --- in a browser ---


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM")
def test_nothing_of_a_model_or_file_runs_on_any_tab(browser, url, tmp_path):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    blocked = []
    page.on("console", lambda m: blocked.append(m.text) if "Content Security Policy" in m.text else None)

    def clean(where: str) -> None:
        page.wait_for_timeout(150)
        assert page.evaluate("window.__xss") is None, where
        assert page.locator("img[src=x], svg[onload], b[onmouseover], a[href^='javascript:']").count() == 0, where
        assert blocked == [], "nothing was kept from running by the policy alone"

    page.goto(url)
    page.get_by_text("No image yet").wait_for()
    clean("start")
    image = tmp_path / "<img src=x onerror=window.__xss=7>.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(image)
    chosen = page.locator("#mm-drop input[type=file]")
    chosen.set_input_files(image)
    page.locator(".mm-answer").wait_for()
    clean("answer")
    assert "<img src=x onerror" in page.locator(".mm-answer, .mm-model").all_inner_texts()[0] + page.inner_text("body")
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_label("Class to explain").click()
    clean("menu of classes")
    page.keyboard.press("Escape")
    page.locator("#mm-run-explain").click()
    page.locator("#mm-downloads button").first.wait_for()
    clean("maps")
    page.get_by_role("tab", name="Fine-tune").click()
    archive = tmp_path / "<img src=x onerror=window.__xss=8>.zip"
    picture = image.read_bytes()
    with zipfile.ZipFile(archive, "w") as target:
        for label in ("<svg onload=window.__xss=9>", "b"):
            for i in range(6):
                target.writestr(f"{label}/{i}.png", picture)
    page.locator("#mm-zip input[type=file]").set_input_files(archive)
    page.locator("#mm-set .mm-card").wait_for()
    clean("set")
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as target:
        target.writestr("../<img src=x onerror=window.__xss=10>.png", b"x")
    page.locator("#mm-zip").get_by_role("button").first.click()
    page.locator("#mm-zip input[type=file]").set_input_files(bad)
    page.get_by_text("This dataset cannot be used").wait_for()
    clean("refused set")
    page.get_by_role("tab", name="Models").click()
    clean("models")
    page.get_by_role("tab", name="Classify").click()
    broken = tmp_path / "<svg onload=window.__xss=11>.png"
    broken.write_bytes(b"%PDF-1.4 <img src=x>")
    chosen.set_input_files(broken)
    page.get_by_role("alert").filter(has_text="could not be read").wait_for()
    clean("error")
    chosen.set_input_files([image, broken])
    page.locator(".mm-batch").wait_for()
    clean("batch")
    page.close()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium, or the variable CHROMIUM")
def test_the_policy_stops_what_would_get_through(browser, url):
    """The second wall alone: HTML put into a page by hand does not run."""
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("No image yet").wait_for()
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.__xss=1\">')")
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.__xss=2'; "
        "document.body.append(s); }"
    )
    page.evaluate("() => { const a = document.createElement('a'); a.href = 'javascript:window.__xss=3'; "
                  "document.body.append(a); a.click(); }")  # fmt: skip
    page.wait_for_timeout(500)
    assert page.evaluate("window.__xss") is None
    page.close()
