"""What the app says is what was done: every sentence follows from a condition, and each condition is tried here."""

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import CALIBRATION, save_model
from PIL import Image

import medmamba
from medmamba.data import DatasetError, registry
from medmamba.imaging.load import load_image
from medmamba.inference.predict import Prediction
from medmamba.metrics import Estimate, evaluate

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo import advice, service, sessions, store
from demo.context import Context
from demo.options import Limits, Options
from demo.service import Answer, View, inspect
from demo.tabs import answers, classify, finetune, models, patients, remarks, results, window
from medmamba.serving.record import UNSURE, Applied

GOOD = {**CALIBRATION, "n": 1000, "ece_after": 0.02}


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """12 bits in a 16-bit PNG: values 348 to 3204."""
    path = tmp_path_factory.mktemp("images") / "chest.png"
    values = np.random.default_rng(0).integers(348, 3205, (64, 64)).astype(np.uint16)
    values[0, :2] = 348, 3204
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope="module")
def loaded_with(tmp_path_factory):
    """A loaded model by its calibration."""
    root = tmp_path_factory.mktemp("models")

    def load(name: str, **config) -> store.Loaded:
        folder = save_model(root / name, **config)
        return store.ModelStore((str(folder),), "cpu").default

    return load


@pytest.fixture(scope="module")
def by_calibration(loaded_with):
    return {
        "good": loaded_with("good", calibration=GOOD),
        "few": loaded_with("few", calibration={**GOOD, "n": 14}),
        "bad": loaded_with("bad", calibration={**GOOD, "ece_after": 0.348}),
        "none": loaded_with("none", calibration={**GOOD, "method": "none", "temperature": 1.0, "ece_after": 0.348}),
        "absent": loaded_with("absent", calibration={}),
    }


def answer(probability=0.92, notes=(), unusual=False, **how) -> Answer:
    top = [("neutrophil", probability), ("monocyte", 1 - probability)]
    prediction = Prediction("a.png", "neutrophil", probability, top, list(notes), [1.0, 0.0], unusual)
    return Answer(prediction, probability < UNSURE, unusual, np.zeros((8, 8, 3), np.uint8), 1.0, Applied(**how))


def said(found: Answer, loaded: store.Loaded) -> str:
    return " | ".join(f"{title}. {text}" for part in remarks.remarks_of(found, loaded) for _, title, text, _ in part)


# --- calibration ---


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("good", "correct in about 56 of 100 cases"),
        ("few", "only 14 images, too few to say"),
        ("bad", "off by 35 points"),
        ("none", "could not be calibrated"),
        ("absent", "is not calibrated"),
    ],
)
@pytest.mark.parametrize("probability", [0.56, 0.92])
def test_shares_of_right_answers_are_told_only_where_they_are_known(by_calibration, which, says, probability):
    text = said(answer(probability), by_calibration[which])
    assert says.replace("56", str(round(100 * probability))).split(" cases")[0] in text
    assert ("of 100" in text) == (which == "good")


def test_a_share_needs_enough_images_and_a_small_error(loaded_with):
    for n, error, known in ((199, 0.02, False), (200, 0.02, True), (200, 0.051, False)):
        loaded = loaded_with(f"n{n}-{error}", calibration={**GOOD, "n": n, "ece_after": error})
        assert ("of 100" in said(answer(), loaded)) is known


@pytest.mark.parametrize("which", ["good", "few", "bad", "none", "absent"])
def test_scores_are_called_probabilities_where_a_temperature_was_fitted(by_calibration, which):
    page = answers.answer_html(answer(), by_calibration[which])
    fitted = which in ("good", "few", "bad")
    assert ("Calibrated probability" in page) is fitted and ("Score (not calibrated)" in page) is not fitted
    assert ("Score" in answers.batch_html([Path("a.png")], [answer()], fitted)) is not fitted


def test_the_card_does_not_call_a_calibration_unneeded(by_calibration):
    page = answers.card_html(by_calibration["none"])
    assert "Not needed" not in page and "0.348" in page and "not calibrated probabilities" in page
    assert "Temperature 0.10" in answers.card_html(by_calibration["good"])


def test_whether_unusual_images_are_noticed_does_not_follow_from_the_calibration(by_calibration, loaded_with):
    without = loaded_with("blind", calibration={k: v for k, v in GOOD.items() if k != "ood"})
    for loaded, blind in ((by_calibration["none"], False), (by_calibration["absent"], True), (without, True)):
        assert ("does not detect out-of-distribution images" in said(answer(), loaded)) is blind


def test_a_warning_takes_the_tick_away(by_calibration):
    loaded = by_calibration["good"]
    assert any(kind == "good" for part in remarks.remarks_of(answer(), loaded) for kind, *_ in part)
    for found in (answer(notes=["warning: two-valued: all is black or white"]), answer(unusual=True),
                  answer(better_window=(1776, 2856))):  # fmt: skip
        before, after = remarks.remarks_of(found, loaded)
        assert before and not any(kind == "good" for kind, *_ in after) and "of 100" not in said(found, loaded)
        page = answers.answer_html(found, loaded)
        assert page.index("mm-warn") < page.index("mm-kicker"), "above the answer"


# --- counts ---


def evaluation(patients: bool, unit: str = "patient"):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1], 40)
    groups = [f"g{i // 2}" for i in range(40)] if patients else None
    return evaluate(np.arange(40) % 2, probabilities, ["a", "b"], patients=groups, resamples=20, unit=unit)


@pytest.mark.parametrize(
    ("dataset", "unit"), [("dermamnist", "lesions"), ("bloodmnist", "patients"), (None, "patients")]
)
def test_groups_are_called_what_they_are(loaded_with, dataset, unit):
    loaded = loaded_with(f"of-{dataset}", dataset=dataset)
    loaded = dataclasses.replace(
        loaded,
        facts=dataclasses.replace(
            loaded.facts, evaluations={"test": evaluation(True, registry.group_unit(dataset or ""))}
        ),
    )
    assert f"40 images of 20 {unit}" in answers.card_html(loaded)


def test_an_interval_of_a_single_number_is_no_certainty():
    right = np.repeat([[0.9, 0.1], [0.1, 0.9]], 6, axis=0)
    for p, interval in ((right, "0.610 to 1.000"), (right[::-1], "0.000 to 0.390")):
        found = evaluate(np.arange(12) // 6, p, ["a", "b"], resamples=20)
        page = results.per_class_html(found, "test")
        assert interval.replace("to", "–") in page and "Wilson" not in page
        assert "no certainty" in page  # AUROC has no other interval
        value = found.per_class[0].scores["sensitivity"].value
        before = {"sensitivity": Estimate(value, value, value)}  # as older results are stored
        stored = [dataclasses.replace(row, scores={**row.scores, **before}) for row in found.per_class]
        page = results.per_class_html(dataclasses.replace(found, per_class=tuple(stored)), "test")
        assert f"of 6 images found allow a sensitivity from {interval}" in page
    assert "certainty" not in results.per_class_html(evaluation(False), "test")


def test_every_unit_of_the_registry_has_a_plural():
    units = {registry.get(name).group_unit for name in registry.names()} - {None}
    assert units == {"patient", "lesion"}


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_split_of_figures_is_named_and_what_it_is_worth(loaded_with, split):
    loaded = loaded_with(f"figures-{split}")
    loaded = dataclasses.replace(
        loaded, facts=dataclasses.replace(loaded.facts, evaluations={split: evaluation(False)})
    )
    page = answers.card_html(loaded)
    assert f"On the {split} split" in page and "40 images, with 95% intervals" in page
    assert ("may have been selected on these images" in page) is (split == "val")
    assert "has no test results" in answers.card_html(dataclasses.replace(
        loaded, facts=dataclasses.replace(loaded.facts, evaluations={})))  # fmt: skip


def test_figures_of_the_models_tab_say_which_split_they_are_of(tmp_path):
    folder = save_model(tmp_path / "blood")
    (folder / "results.json").write_text('{"splits": {"val": %s}}' % evaluation(False).to_json())  # noqa: UP031
    names = (str(folder),)
    context = Context(
        Options(names, "cpu"), store.ModelStore(names, "cpu"), sessions.Sessions(Limits(), tmp_path / "r")
    )
    page = models.models_html(list(context.known.values()))
    assert "†" in page and "there is no test split" in page
    assert "†" not in models.models_html([])


def test_how_a_set_is_divided_is_said_as_it_is(tmp_path):
    import demo.jobs as jobs

    found = jobs.plan(jobs.Path(str(classify.__file__)).parents[1] / "examples" / "chest_xray_sample.zip", Limits())
    page = patients.set_html(found)
    assert "as patients are unknown" in page and "Images of one patient may be in several splits" in page
    index = found.index
    records = [dataclasses.replace(record, patient="p") for record in index.records]
    grouped = dataclasses.replace(found, index=index.with_records(records))
    assert "kept together" in patients.how_divided(grouped)
    assert patients.how_divided(dataclasses.replace(found, made=False)) == "as in the folders"
    assert "20 minutes" in finetune.kept_until(20)


# --- the window ---


def test_the_controls_show_the_window_that_was_applied(deep):
    found = inspect(deep, classify.FIRST)
    assert found.image.window == (32767.5, 65535) == load_image(deep).window
    name, levels = window.presets(found)[-1]
    assert name.startswith(window.RANGE) and levels == (1776, 2856)
    again = inspect(deep, View(0, levels))
    assert again.image.window == levels and not again.image.low_contrast


def test_the_window_that_hides_an_image_is_a_warning_with_a_button(deep, loaded_with):
    loaded = loaded_with("window")
    answering = service.Service(store.ModelStore((loaded.source,), "cpu"))
    first = answering.classify(loaded.source, deep, classify.FIRST)
    page = answers.answer_html(first, loaded)
    assert first.better_window == (1776, 2856) and "mm-doubt" in page
    assert page.index("data-mm-window") < page.index("mm-kicker")
    assert "32767.5 / 65535" in page and "full bit depth" in page and "348 to 3204" in page
    mended = answering.classify(loaded.source, deep, View(0, first.better_window))
    page = answers.answer_html(mended, loaded)
    assert "data-mm-window" not in page and "1776 / 2856" in page and "set here" in page
    model = medmamba.MedMamba.from_pretrained(loaded.source)
    expected = model.predict(load_image(deep, window=(1776, 2856)))
    assert dict(mended.prediction.top) == pytest.approx(dict(expected.top), abs=1e-5)


def test_maps_say_what_the_answer_says(deep, loaded_with):
    """Warnings of the file, a picture that is drawn with more contrast than the model sees, and what a number is."""
    from demo.tabs import maps

    loaded = loaded_with("maps")
    answering = service.Service(store.ModelStore((loaded.source,), "cpu"))
    *_, found = answering.explain(loaded.source, deep, classify.FIRST, ["gradcam"], None, False)
    page = maps.maps_html(found, loaded.calibrated)
    assert "more contrast than the model sees" in page and page.index("mm-warn") < page.index("mm-map-grid")
    assert "Calibrated probability" in page and "Score (not calibrated)" in maps.maps_html(found, False)
    *_, found = answering.explain(loaded.source, deep, View(0, (1776, 2856)), ["gradcam"], None, False)
    assert "mm-warn" not in maps.maps_html(found, True)


def test_ct_without_a_window_likewise(loaded_with):
    pydicom = pytest.importorskip("pydicom")
    path = Path(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    found = inspect(path, classify.FIRST)
    assert found.image.window == load_image(path).window and found.image.low_contrast
    assert found.image.window != found.image.range_window, "the range of the type, not of the values"
    loaded = loaded_with("ct")
    answering = service.Service(store.ModelStore((loaded.source,), "cpu"))
    assert "data-mm-window" in answers.answer_html(answering.classify(loaded.source, path, classify.FIRST), loaded)


@pytest.mark.parametrize(("center", "width"), [(100.25, 3.5), (32767.5, 65535), (40, 400)])
def test_a_step_lets_a_window_be_shown_exactly(center, width):
    step = window.slider_step(0, 4095, center, width)
    assert step == (1 if float(center).is_integer() and float(width).is_integer() else 0.5)


def test_a_table_of_answers_warns_too(deep, loaded_with):
    loaded = loaded_with("batch")
    answering = service.Service(store.ModelStore((loaded.source,), "cpu"))
    (found,) = answering.classify_files(loaded.source, [deep])
    assert "warning" in answers.batch_html([deep], [found])
    header, row = answers.batch_csv([deep], [found], loaded.config.labels).splitlines()
    assert header.endswith(",warnings,error") and row.split(",")[-2]


def test_files_that_need_a_choice_say_what_the_app_offers(tmp_path, loaded_with):
    loaded = loaded_with("needs")
    answering = service.Service(store.ModelStore((loaded.source,), "cpu"))
    pages = [Image.fromarray(np.full((40, 40), level, np.uint8)) for level in (10, 200)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    signed = np.random.default_rng(0).integers(-900, 900, (40, 40)).astype(np.int32)
    Image.fromarray(signed, "I").save(tmp_path / "signed.tif")
    stack, depth = answering.classify_files(loaded.source, [tmp_path / "stack.tif", tmp_path / "signed.tif"])
    assert "2 frames; open it on its own and choose one under Frame" in stack.error
    assert "declares no display window" in depth.error and "open it on its own to set level and width" in depth.error
    stack, depth = answering.classify_files(
        loaded.source, [tmp_path / "stack.tif", tmp_path / "signed.tif"], program=True
    )
    assert "set frame, 0 to 1" in stack.error and "window_center and window_width" in depth.error
    first = answering.classify(loaded.source, tmp_path / "stack.tif", classify.FIRST)
    assert (first.frame, first.n_frames) == (0, 2) and "frame 1 of 2 only" in said(first, loaded)
    found = inspect(tmp_path / "signed.tif", classify.FIRST)
    assert found.lacks_window and found.windowed and found.image.range_window
    assert answering.classify(loaded.source, tmp_path / "signed.tif", View(0, found.image.range_window)).prediction


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("16-bit values scaled by 65535, the largest is 3204, so the image is dark; if these are 12-bit values, "
         "pass window=(2047.5, 4095)", "16-bit values scaled by 65535, the largest is 3204, so the image is dark"),
        ("warning: unused-range: little is used; pass window=(1, 2)", "little is used"),
        ("warning: the aspect ratio is far from the model's; the image is visibly distorted",
         "the aspect ratio is far from the model's; the image is visibly distorted"),
        ("frame 3 does not exist: the number of frames is 2 (frame=0 ... frame=1)",
         "frame 3 does not exist: the number of frames is 2"),
        ("rescaled by slope 0.5, intercept -1024", "rescaled by slope 0.5, intercept -1024"),
    ],
)  # fmt: skip
def test_what_only_a_programmer_can_follow_is_left_out(text, shown):
    assert advice.in_app(text) == shown


def test_programs_are_told_of_their_fields():
    text = advice.for_programs("if these are 12-bit values, pass window=(2047.5, 4095)")
    assert text == "if these are 12-bit values, pass window_center=2047.5 and window_width=4095"
    assert "window_center and window_width" in advice.for_programs("window=(center, width) sets it")


def test_a_file_is_known_by_what_is_in_it(tmp_path, loaded_with):
    """A DICOM file named by its UID, and a picture without a suffix."""
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.data.get_testdata_file("CT_small.dcm", download=False)
    for name in ("1.2.840.113619.2.5.17", "IM0001"):
        (tmp_path / name).write_bytes(Path(source).read_bytes())
        assert inspect(tmp_path / name).image.format == "DICOM"
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    (tmp_path / "picture").write_bytes(buffer.getvalue())
    assert inspect(tmp_path / "picture").image.format == "PNG"


# --- results and patients ---


def test_results_are_per_class_and_averages_are_called_so(loaded_with):
    loaded = loaded_with("per-class")
    found = evaluation(False)
    page = answers.card_html(
        dataclasses.replace(loaded, facts=dataclasses.replace(loaded.facts, evaluations={"test": found}))
    )
    for row in found.per_class:
        assert f"{row.scores['sensitivity'].value:.3f}" in page and f"{row.scores['npv'].value:.3f}" in page
    assert page.index("PPV") < page.index("AUROC, macro average"), "classes come before averages"
    assert "Rows: true class" in page
    assert ">Sensitivity, macro average<" not in page, "averages of sensitivity hide the class that matters"


def test_an_unusual_image_is_not_said_to_be_right_so_often(by_calibration):
    loaded = by_calibration["good"]
    usual, unusual = (said(answer(0.51, unusual=flag), loaded) for flag in (False, True))
    assert "51 of 100" in usual and "of 100" not in unusual
    assert "Do not rely on" in unusual


def test_patients_in_file_names_stay_in_one_split(tmp_path):
    from demo import jobs

    path = tmp_path / "patients.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for label in "ab":
            for i in range(24):
                content = io.BytesIO()
                pixels = np.random.default_rng([ord(label), i]).integers(0, 255, (9, 9), np.uint8)
                Image.fromarray(pixels).save(content, "png")
                archive.writestr(f"{label}/{label}{i // 3}_{i}.png", content.getvalue())
    found = jobs.plan(path, Limits(), r"^(\w\d+)_")
    splits: dict[str, set] = {}
    for record in found.index.records:
        splits.setdefault(record.patient, set()).add(record.split)
    assert len(splits) == 16 and all(len(where) == 1 for where in splits.values())
    page = patients.set_html(found)
    assert "16, with up to 3 images each" in page and "a0_0.png → a0" in page
    assert "may be in several splits" not in page
    for pattern, reason in (("(", "not a regular expression"), ("^(x)", "matches none")):
        with pytest.raises(DatasetError, match=reason):
            jobs.plan(path, Limits(), pattern)


def test_a_pattern_that_never_ends_is_refused(tmp_path, monkeypatch):
    from demo import jobs

    monkeypatch.setattr(jobs, "PATTERN_SECONDS", 0.5)
    with pytest.raises(DatasetError, match="too long"):
        jobs.check_pattern(r"(a+)+$", ["a" * 60 + "b"])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            "x: 2 images are in more than one split: a = b. Results on such a test set are too optimistic. Split again "
            "with make_splits (it keeps patients together), remove the duplicates, or pass allow= (allow_leakage= of "
            "train, --allow-leakage) and report that",
            "Remove the duplicates",
        ),
        ("a.png: cannot be read (UnidentifiedImageError: cannot identify <_io.BufferedReader name='a'>)", "a.png"),
    ],
)
def test_no_words_of_python_in_messages(text, plain):
    shown = advice.in_app(text)
    assert plain in shown
    for word in ("make_splits", "allow", "UnidentifiedImageError", "_io", "--"):
        assert word not in shown
