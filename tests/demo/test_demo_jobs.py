"""Fine-tuning in the app, pieces of its pages, and several models."""

import dataclasses
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from demo_cases import NEUTROPHIL, SECRET, Request, classify
from demo_helpers import save_model, serving
from PIL import Image

import medmamba
from medmamba.data import registry
from medmamba.imaging.colour import colour_note
from medmamba.inference.ood import fit_unusual, load_unusual

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

from demo import (  # noqa: E402
    app,
    charts,
    context,
    examples,
    html,
    jobs,
    options,
    service,
    sessions,
    store,
)
from demo.options import EXAMPLES, Limits  # noqa: E402
from demo.service import inspect, reduced  # noqa: E402
from demo.tabs import answers, finetune, models, window  # noqa: E402

# --- fine-tuning: what is let in ------------------------------------------------------------------------------------


def make_zip(path: Path, names: list[str], content: bytes | None = None) -> Path:
    buffer = io.BytesIO()
    Image.new("L", (32, 32), 90).save(buffer, "PNG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, buffer.getvalue() if content is None else content)
    return path


GOOD = [f"{c}/{i}.png" for c in "ab" for i in range(6)]


@pytest.mark.parametrize(
    ("names", "content", "limits", "says"),
    [
        (["../evil.png", *GOOD], None, {}, "leads out of the archive"),
        (["/etc/evil.png", *GOOD], None, {}, "leads out of the archive"),
        (["a/inner.zip", *GOOD], None, {}, "is an archive itself"),
        (["a/bomb.png", *GOOD], bytes(8 * 2**20), {}, "zip bomb"),
        (GOOD, bytes(2**20), {"zip_unpacked_mb": 4}, "unpacks to more than"),
        (GOOD, None, {"zip_images": 5}, "limit here is 5"),
        (GOOD, None, {"zip_classes": 1}, "limit here is 1"),
        (["a/1.png", "a/2.png"], None, {}, "only one class"),
        (["a/1.png", "b/2.png"], None, {}, "only 1 images"),
        (["1.png"], None, {}, "class folder"),
        ([f"train/{name}" for name in GOOD], None, {}, "called 'val'"),
    ],
)
def test_zips_that_are_refused(tmp_path, names, content, limits, says):
    path = make_zip(tmp_path / "set.zip", names, content)
    with pytest.raises(medmamba.data.DatasetError, match=says):
        jobs.plan(path, Limits(**limits))


def test_the_sample_set_is_taken():
    found = jobs.plan(options.SAMPLE_SET, Limits())
    assert found.index.classes == ("normal", "pneumonia") and found.made and len(found.index) == 64
    assert b"CC BY 4.0" in zipfile.ZipFile(options.SAMPLE_SET).read("CREDITS.txt")


@pytest.mark.slow
def test_a_job_ends_in_a_model(tmp_path, model_folder):
    path = make_zip(tmp_path / "set.zip", [])
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for label, level in (("dark", 40), ("light", 210)):
            for i in range(10):
                buffer = io.BytesIO()
                Image.fromarray(rng.normal(level, 12, (32, 32)).clip(0, 255).astype("uint8")).save(buffer, "PNG")
                archive.writestr(f"{label}/{i}.png", buffer.getvalue())
    job = jobs.Job(jobs.plan(path, Limits()), str(model_folder), 2, tmp_path, Limits(), "cpu")
    try:
        found = job.result()
        progress = job.progress()
    finally:
        job.stop()
    assert load_unusual(job.out).means.shape == (2, 64), "its own warning for unusual images"
    assert found["test"].n_images == 4 and len(progress.history) == 2
    model = medmamba.MedMamba.from_pretrained(job.out)
    assert model.config.labels == ["dark", "light"]


@pytest.mark.slow
def test_a_job_that_fails_says_why_without_paths(tmp_path, model_folder):
    path = make_zip(tmp_path / "set.zip", GOOD)  # all images are the same: duplicates between the splits
    job = jobs.Job(jobs.plan(path, Limits()), str(model_folder), 1, tmp_path, Limits(), "cpu")
    with pytest.raises(jobs.JobError) as error:
        job.result()
    assert "set.zip" in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_keeps_to_its_time_and_still_ends_in_a_model(tmp_path, model_folder):
    """The limit is doubled until an epoch fits into it, however slow or busy the machine is."""
    minutes = 0.1
    while True:
        limits = Limits(train_minutes=minutes)
        folder = tmp_path / f"{minutes:g}"
        folder.mkdir()
        job = jobs.Job(jobs.plan(options.SAMPLE_SET, limits), str(model_folder), 1000, folder, limits, "cpu")
        try:
            found = job.result()
            break
        except jobs.JobError as error:
            if "the first epoch did not finish" not in str(error) or minutes > 5:
                raise
            minutes *= 2
        finally:
            job.stop()
    progress = job.progress()
    assert found["test"].n_images == 12
    assert 1 <= len(progress.history) < 1000 and progress.seconds >= 60 * minutes, "ended by the limit"


@pytest.mark.slow
def test_a_job_without_time_for_an_epoch_says_so(tmp_path, model_folder):
    limits = Limits(train_minutes=0.0001)
    job = jobs.Job(jobs.plan(options.SAMPLE_SET, limits), str(model_folder), 30, tmp_path, limits, "cpu")
    with pytest.raises(jobs.JobError, match=r"within the limit of 0\.0001 minutes; use fewer images"):
        job.result()
    assert not job.progress().history


def test_a_job_can_be_ended(tmp_path, model_folder):
    job = jobs.Job(jobs.plan(options.SAMPLE_SET, Limits()), str(model_folder), 30, tmp_path, Limits(), "cpu")
    assert job.running
    job.stop()
    assert not job.running
    with pytest.raises(jobs.JobError):
        job.result()


# --- pieces of pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "50.0%"), (1.0, "100%"), (0.99996, ">99.9%"), (0.0001, "<0.1%"), (0.0, "0.0%")]
)
def test_percent(value, shown):
    assert html.percent(value) == shown


def test_charts_are_drawn_inside_their_frame():
    drawing = charts.chart([charts.Line("a", [1, 2, 3], [0.1, float("nan"), 5.0])], "Title", "x", "y")
    points = [tuple(map(float, p.split(","))) for p in drawing.split('points="')[1].split('"')[0].split()]
    assert len(points) == 2 and all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)
    assert charts.ticks(0, 1) == [0, 0.5, 1] or len(charts.ticks(0, 1)) >= 3


def test_inspect_and_reduce(tmp_path, dicom_with_patient):
    found = inspect(dicom_with_patient)
    assert found.windows is not None and found.windows.value_range == (-896.0, 1167.0)
    assert inspect(NEUTROPHIL).windows is None
    large = medmamba.imaging.load.load_image(np.zeros((300, 2000, 3), np.uint8))
    assert reduced(large).size == (154, 1024) and reduced(large, 4000) is large


def test_licences_as_people_write_them():
    names = ["cc-by-4.0", "CC-BY-NC-4.0", "apache-2.0", "LicenseRef-Kvasir", None]
    assert [html.licence_name(n) for n in names] == [
        "CC BY 4.0", "CC BY-NC 4.0", "apache-2.0", "custom terms", "not stated",
    ]  # fmt: skip


def test_windows_on_offer(tmp_path, dicom_with_patient):
    names = dict(window.presets(inspect(dicom_with_patient)))
    assert names["Lung (-600 / 1500)"] == (-600, 1500), "those in use for CT"
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.dcmread(dicom_with_patient)
    ds.WindowCenter, ds.WindowWidth = [50, 60], [350, 300]
    ds.WindowCenterWidthExplanation = [SECRET, "SOFT TISSUE"]
    ds.save_as(tmp_path / "windows.dcm")
    found = inspect(tmp_path / "windows.dcm")
    names = [name for name, _ in window.presets(found)]
    assert names[:2] == ["Window (50 / 350)", "Soft tissue (60 / 300)"], "free text of a header is not shown"
    assert window.default_window(found) == (50, 350)


# --- several models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> list[Path]:
    """Two sizes of one dataset, another dataset with a measured warning, and a model of nobody's."""
    root = tmp_path_factory.mktemp("zoo")
    folders = [
        save_model(root / "blood-large", variant="nano"),
        save_model(root / "blood-small"),
        save_model(root / "breast", dataset="breastmnist"),
        save_model(root / "mine", dataset=None),
    ]
    x = np.random.default_rng(0).normal(size=(20, 64))
    warning = fit_unusual(x, np.arange(20) % 2, x)
    row = {"auroc": 0.912, "n": 5, "called_unusual": 0.8}
    measured = {"own": {"n": 1234, "called_unusual": 0.04}, "auroc": {"BloodMNIST": row}}
    dataclasses.replace(warning, measured=measured).save(folders[2])
    return folders


def context_of(folders, tmp_path, **given) -> context.Context:
    names = tuple(map(str, folders))
    return context.Context(
        options.Options(names, "cpu", **given),
        store.ModelStore(names, "cpu"),
        sessions.Sessions(Limits(), tmp_path / "root"),
    )


def test_menus_name_what_models_are_for(zoo, tmp_path):
    found = context_of(zoo, tmp_path)
    assert found.choices(None)[0] == ("Blood cell microscopy · blood-large", "blood-large")
    assert found.choices(None)[3] == ("mine", "mine"), "no dataset is known"
    assert found.default_title == "blood-large" and found.lightest_title != "blood-large"
    assert finetune.first_base(found) == found.lightest_title, "a CPU trains the small one"
    assert found.starts == found.choices(None), "without backbones"
    session = found.sessions.of(Request("one"))
    session.models["Yours: set"] = zoo[3]
    assert found.choices(session)[0] == ("Yours: set", "Yours: set")


def test_training_starts_from_a_general_backbone(zoo, tmp_path, monkeypatch):
    large = medmamba.create_model("nano", 0).save_pretrained(tmp_path / "large")
    small = medmamba.create_model("test", 0).save_pretrained(tmp_path / "small")
    large_name, small_name = "medmamba/tiny-medical", "medmamba/nano-medical"
    here = {large_name: large, small_name: small}
    monkeypatch.setattr("demo.context.fetch", lambda name, **options: here.get(name, Path(name)))
    monkeypatch.setattr(medmamba, "bundled_models", lambda: here)
    found = context_of(zoo, tmp_path, backbones=app.bundled_backbones())
    assert found.starts[:2] == [
        ("General backbone · tiny-medical", large_name),
        ("General backbone · nano-medical", small_name),
    ]
    assert found.starts[2:] == found.choices(None), "those who have better reasons choose a model"
    assert finetune.first_base(found) == small_name, "a CPU trains the small one"
    assert found.first_start(light=False) == large_name
    assert [found.start(name) for name in here] == list(here) and found.start("mine") == str(zoo[3])
    with pytest.raises(ValueError, match="no model 'other'"):
        found.start("other")
    assert not set(here) & set(found.titles(None)), "they have no classes to answer with"


def test_two_models_of_one_name_are_refused(zoo, tmp_path):
    twin = save_model(tmp_path / "elsewhere" / "breast")
    with pytest.raises(ValueError, match="two models are called 'breast'"):
        context_of([*zoo, twin], tmp_path)


def test_a_damaged_model_does_not_keep_the_others_from_being_offered(zoo, tmp_path):
    broken = save_model(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    found = context_of([*zoo, broken], tmp_path)
    assert "broken" in found.titles(None) and "broken" not in found.known
    with pytest.raises(ValueError, match="not valid JSON"):
        found.load(None, "broken")
    page = models.models_html(list(found.known.values()))
    assert page.count("<tr>") == 17


def test_the_datasets_and_the_models_for_them(zoo, tmp_path):
    known = list(context_of(zoo, tmp_path).known.values())
    page = models.models_html(known)
    assert page.count("<tr>") == 17 and "0.978" in page
    rows = page.split("<tr>")
    assert "BreastMNIST" in rows[2] and "BloodMNIST" in rows[3], "what has weights comes first"
    assert [rows[3].count(f'data-mm-use="{name}"') for name in ("blood-large", "blood-small", "breast")] == [1, 1, 0]
    warnings = models.warnings_html(known)
    assert "<strong>80%</strong><small>flagged</small>" in warnings and "1,234" in warnings
    assert models.warnings_html(known[:2]) == ""


def test_every_model_answers_and_has_a_card(zoo):
    answers_ = service.Service(store.ModelStore(tuple(map(str, zoo)), "cpu"))
    for folder in zoo:
        found = answers_.classify(str(folder), NEUTROPHIL)
        loaded = answers_.store.get(str(folder))
        assert found.prediction.label in loaded.config.labels
        card = answers.card_html(loaded)
        assert loaded.title in card and f"MedMamba-{loaded.config.architecture}" in card


def test_programs_choose_among_models(zoo, tmp_path):
    with serving(zoo, tmp_path) as url:
        client = gradio_client.Client(url, verbose=False)
        records = {record["name"]: record for record in client.predict(api_name="/models")}
        assert list(records) == ["blood-large", "blood-small", "breast", "mine"]
        assert records["breast"]["unusual"]["auroc"]["BloodMNIST"]["auroc"] == 0.912
        assert [r["architecture"] for r in records.values()] == ["nano", "test", "test", "test"]
        assert classify(client, NEUTROPHIL)["model"] == "blood-large"
        assert set(classify(client, NEUTROPHIL, "breast")["probabilities"]) == {"malignant", "normal, benign"}


def test_examples_are_those_that_a_model_knows():
    found = examples.load_examples()
    assert {d for e in found for d in e.datasets} == {
        "bloodmnist", "breastmnist", "pneumoniamnist", "cpn-xray", "pad-ufes-20",
    }, "CC BY images alone"  # fmt: skip
    blood, other = examples.examples_html(found, "bloodmnist").split("Or an image the model was not trained for")
    assert blood.count("<button") == 8 and other.count("<button") == 3 and "breast ultrasound" in other
    breast = examples.examples_html(found, "breastmnist").split("Or an image")[0]
    assert "malignant" in breast and "benign" in breast and "neutrophil" not in breast
    skin = examples.examples_html(found, "pad-ufes-20").split("Or an image")[0]
    assert skin.count("<button") == 6 and "melanoma" in skin
    chest = [examples.examples_html(found, name).split("Or an image")[0] for name in ("pneumoniamnist", "cpn-xray")]
    assert [part.count("<button") for part in chest] == [2, 2]
    assert ["COVID" in part for part in chest] == [False, True], "what no example shows is named"
    assert all(registry.get(d).class_index(e.what) is not None for e in found for d in e.datasets), "truth"
    notes = {colour_note(medmamba.load_image(e.path), registry.get(d).colour) for e in found for d in e.datasets}
    assert notes == {""}, "no image of a dataset is called unlike its dataset"
    assert "There are no examples for this model" in examples.examples_html(found, "dermamnist")
    numbers = sorted(int(n) for n in re.findall(r'data-mm-example="(\d+)"', blood + other))
    assert len(set(numbers)) == 11 and all(0 <= n < len(found) for n in numbers)
    assert blood.count("CC BY 4.0") + other.count("CC BY 4.0") == 1 and "doi:10.17632/snkd93bnjr.1" in other
    credits = (EXAMPLES / "README.md").read_text()
    assert all(f"`{e.path.name.split('_')[0]}_*{e.path.suffix}`" in credits for e in found), "each has its source"
