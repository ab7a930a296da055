"""The endpoints take what they should and refuse the rest with a reason; JSON stays JSON; answers under load are the
same as alone."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import CALIBRATION, save_model
from PIL import Image

import medmamba
from medmamba.imaging.load import load_image

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

from demo import api, guard, jobs, options, service, store  # noqa: E402
from demo.options import EXAMPLES  # noqa: E402

NEUTROPHIL = EXAMPLES / "blood_neutrophil.webp"


@pytest.fixture(scope="module")
def url(app_url) -> str:
    return app_url


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """Two pages of 12 bits in 16, which differ."""
    path = tmp_path_factory.mktemp("images") / "stack.tif"
    values = np.random.default_rng(0).integers(348, 3205, (2, 40, 40)).astype(np.uint16)
    values[1] = values[1, ::-1] // 2
    pages = [Image.fromarray(page) for page in values]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def upload(url: str, path: Path) -> dict:
    with open(path, "rb") as stream:
        (name,) = httpx.post(f"{url}gradio_api/upload", files={"files": (path.name, stream)}).json()
    return {"path": name, "meta": {"_type": "gradio.FileData"}}


def call(url: str, name: str, body: str) -> tuple[int, str]:
    """Status and text of a call with this body, by plain HTTP."""
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}gradio_api/call/{name}", content=body, headers=headers)
    if answer.status_code != 200:
        return answer.status_code, answer.text
    event = answer.json()["event_id"]
    name = name.removeprefix("v2/")
    return 200, httpx.get(f"{url}gradio_api/call/{name}/{event}", timeout=240).text


def body(url: str, *rest: str) -> str:
    file = json.dumps(upload(url, NEUTROPHIL))
    return f'{{"data": [{", ".join([file, *rest])}]}}'


# --- refused with a reason ---


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ("1.7", "frame must be a whole number from 0, not 1.7"),
        ("-1", "frame must be a whole number from 0, not -1"),
        ("1e400", "the number 1e400 is too large"),
        ("NaN", "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("1" + "0" * 400, "frame must be a finite number"),
        ('"one"', "frame must be a finite number"),
        ("true", "frame must be a finite number"),
        ("[1]", "frame must be a finite number"),
        ("7", "frame 7 does not exist"),
    ],
)
def test_numbers_that_are_none(url, frame, says):
    status, text = call(url, "classify", body(url, '""', frame, "null", "null"))
    assert says in text and '"error": null' not in text
    assert status == 422 or "event: error" in text


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (('""', "null", "40", "0"), "window_width must be above 0"),
        (('""', "null", "40", "-5"), "window_width must be above 0"),
        (('""', "null", "40", "null"), "set both window_center and window_width, or neither"),
        (("7", "null", "null", "null"), "model must be text"),
        (('""', "null", "40", "400"), "window applies to grey images only"),
    ],
)
def test_arguments_that_do_not_fit(url, rest, says):
    _, text = call(url, "classify", body(url, *rest))
    assert "event: error" in text and says in text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("classify", '{"data": [], "fram": 1}', "unknown field 'fram'"),
        ("classify", '{"data": [], "data": []}', "a field is given twice"),
        ("classify", "[]", "must be a JSON object"),
        ("classify", '{"data": [', "not valid JSON"),
        ("classify", "[" * 100_000, "not valid JSON"),
        ("classify", '{"data": []}', "needs 6 values"),
        ("classify", '{"data": [null, "", null, null, null, 1, 2]}', "needs 6 values"),
        ("classify", '{"data": [null, "", null, null, null]}', "file is required"),
        ("v2/classify", '{"file": null, "fram": 1}', "unknown field 'fram'"),
        ("v2/classify", '{"model": "x"}', "classify needs file"),
        ("classify", json.dumps({"data": ["x" * 9_000_000]}), "larger than 8 MB"),
    ],
)
def test_requests_that_are_none(url, name, text, says):
    status, answer = call(url, name, text)
    assert says in answer and "null}" not in answer.replace(" ", "")
    assert status in (200, 422)


@pytest.mark.parametrize(
    "problem", [OverflowError(), MemoryError(), RuntimeError("/secret/path"), ValueError(""), OSError()]
)
def test_an_error_is_never_without_a_text_nor_with_a_path(problem):
    import gradio

    with pytest.raises(gradio.Error) as error, api.client_errors("/tmp/a.png"):
        raise problem
    assert error.value.message and "/secret" not in error.value.message


# --- taken ---


def test_frame_and_window_are_those_of_the_package(client, frames, model_folder):
    model = medmamba.MedMamba.from_pretrained(model_folder)
    handle = gradio_client.handle_file(str(frames))
    with pytest.raises(Exception, match="set frame, 0 to 1"):
        client.predict(handle, api_name="/classify")
    for frame in (0, 1):
        image = load_image(frames, frame=frame, window=(1776, 2856))
        expected = model.predict(image)
        found = client.predict(handle, "", frame, 1776, 2856, api_name="/classify")
        assert found["probabilities"] == pytest.approx(dict(expected.top), abs=1e-5)
        assert found["window"] == [1776, 2856] and (found["frame"], found["frames"]) == (frame, 2)
        arguments = dict(method="gradcam", frame=frame, window_center=1776, window_width=2856)
        record, _, maps = client.predict(handle, **arguments, api_name="/explain")
        attribution = medmamba.explain.explain(model, image, "gradcam").attribution
        np.testing.assert_allclose(np.load(maps)["attribution"], attribution, atol=1e-5)
    with pytest.raises(Exception, match="whole number"):
        client.predict(handle, frame=0.5, api_name="/explain")


def test_what_changes_an_answers_worth_is_a_warning_with_the_way_out(client, frames):
    handle = gradio_client.handle_file(str(frames))
    found = client.predict(handle, "", 0, api_name="/classify")
    center, width = found["better_window"]
    assert found["window"] == [32767.5, 65535] and f"window_center={center:g}" in " ".join(found["warnings"])
    better = client.predict(handle, "", 0, center, width, api_name="/classify")
    assert better["better_window"] is None and not any("window" in text for text in better["warnings"])
    text = json.dumps(found)
    assert "window=(" not in text and "warning: " not in json.dumps(found["warnings"])


def test_calibrated_means_that_a_temperature_was_fitted(tmp_path):
    for method, calibrated in (("temperature", True), ("none", False)):
        calibration = {**CALIBRATION, "method": method, "temperature": 1.0 if method == "none" else 0.1}
        folder = save_model(tmp_path / method, calibration=calibration)
        loaded = store.ModelStore((str(folder),), "cpu").default
        found = service.Service(store.ModelStore((str(folder),), "cpu")).classify(str(folder), NEUTROPHIL)
        assert api._record(found, loaded)["calibrated"] is calibrated


def test_no_number_in_an_answer_is_nan():
    found = api.finite({"a": [1.0, float("nan"), {"b": float("inf")}], "c": ("x", 2)})
    assert json.dumps(found, allow_nan=False) == '{"a": [1.0, null, {"b": null}], "c": ["x", 2]}'


def test_fields_are_those_that_are_documented_for_programs(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    found = {name[1:]: tuple(p["parameter_name"] for p in each["parameters"]) for name, each in named.items()}
    assert found == api.ENDPOINTS and api.ENDPOINTS["explain"][-3:] == ("frame", "window_center", "window_width")


def test_bodies_that_the_pages_send_pass():
    page = {"data": [1.5, None], "event_data": {"index": "2"}, "fn_index": 3, "trigger_id": 4, "session_hash": "a"}
    assert guard.refused("/gradio_api/queue/join", json.dumps(page).encode()) == ""


# --- many at once ---


@pytest.mark.slow
def test_answers_under_load_are_those_alone(url, model_folder, tmp_path):
    """Eight clients classify while another explains and a model is trained."""
    images = sorted(EXAMPLES.glob("*.webp"))
    model = medmamba.MedMamba.from_pretrained(model_folder)
    expected = {path: dict(model.predict(path).top) for path in images}
    alone = medmamba.explain.explain(model, NEUTROPHIL, "gradcam", "monocyte").attribution
    job = jobs.Job(
        jobs.plan(options.SAMPLE_SET, options.Limits()), str(model_folder), 30, tmp_path, options.Limits(), "cpu"
    )
    ended = threading.Event()
    explained, wrong = [], []

    def explain() -> None:
        own = gradio_client.Client(url, verbose=False)
        handle = gradio_client.handle_file(str(NEUTROPHIL))
        while not ended.is_set():
            maps = own.predict(handle, method="gradcam", target="monocyte", api_name="/explain")[2]
            explained.append(float(abs(np.load(maps)["attribution"] - alone).max()))

    def classify(number: int) -> int:
        own = gradio_client.Client(url, verbose=False)
        for i in range(6):
            path = images[(number + i) % len(images)]
            found = own.predict(gradio_client.handle_file(str(path)), api_name="/classify")["probabilities"]
            worst = max(abs(found[label] - value) for label, value in expected[path].items())
            wrong.extend([(path.name, worst)] if worst > 1e-5 else [])
        return 6

    explaining = threading.Thread(target=explain)
    explaining.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(classify, range(8))) == 48
        until = time.monotonic() + 120
        while not explained and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        ended.set()
        explaining.join()
        job.stop()
    assert wrong == [] and explained and max(explained) < 1e-5


def test_requests_without_an_identifier_share_nothing(tmp_path):
    from demo import sessions

    class Request:
        session_hash = None

    kept = sessions.Sessions(options.Limits(), tmp_path / "root")
    (tmp_path / "mine.png").write_bytes(b"x")
    kept.of(Request()).keep_images([str(tmp_path / "mine.png")])
    assert kept.of(Request()).images == []
    kept.close_all()


def test_eight_visitors_keep_their_files_and_models_apart(tmp_path):
    from demo import sessions

    kept = sessions.Sessions(options.Limits(), tmp_path / "root")
    uploads = []
    for i in range(8):
        path = tmp_path / f"{i}" / "same.png"
        path.parent.mkdir()
        path.write_bytes(bytes([i]) * 64)
        uploads.append(path)

    class Request:
        def __init__(self, key: int):
            self.session_hash = str(key)

    def visit(i: int) -> bool:
        for _ in range(40):
            session = kept.of(Request(i))
            session.keep_images([str(uploads[i])])
            mine = session.images[0]
            if mine.read_bytes() != bytes([i]) * 64 or kept.of(Request(i)) is not session:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(visit, range(8)))
    folders = {kept.of(Request(i)).folder for i in range(8)} | {kept.of(Request(i)).outbox for i in range(8)}
    assert len(folders) == 16
    kept.close_all()
