"""A page for the record: from Python, by the command, and the same facts in the metadata of a PNG."""

import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.__main__ import main
from medmamba.explain import compare
from medmamba.imaging.load import load_image
from medmamba.inference.predict import Failure, predict
from medmamba.reporting import Entry, RecordedModel, record_facts, record_page, write_record
from medmamba.utils.checksums import file_hash

pytest.importorskip("jinja2", reason='needs pip install "medmamba[report]"')


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    found = medmamba.create_model("test", 2, id2label={0: "no", 1: "<b>yes</b>"})
    folder = found.save_pretrained(tmp_path_factory.mktemp("models") / "mine")
    return found, folder


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, (40, 40)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    return tmp_path / "scan.png"


def record(model, path, comparison=None):
    network, folder = model
    result = predict(network, path)
    about = RecordedModel.of(str(folder), folder, network.config)
    return about, Entry.of(path, result, load_image(path), comparison)


def test_what_the_page_says(model, image):
    about, entry = record(model, image)
    html = record_page(about, [entry], date="2026-01-02T03:04:05+00:00")
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    weights = file_hash(model[1] / "model.safetensors")
    for expected in (digest, weights, "scan.png", "2026-01-02T03:04:05", "Research only", "32767.5 / 65535", "mine"):
        assert expected in html, expected
    assert "<b>yes</b>" not in html and "&lt;b&gt;yes" in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html), "it needs no other file"
    assert str(image.parent) not in html


def test_the_same_facts_are_metadata_of_a_picture(model, image):
    pytest.importorskip("captum")
    comparison = compare(model[0], image, ["saliency"])
    about, entry = record(model, image, comparison)
    facts = record_facts(about, entry)
    comparison.save(image.with_name("maps.png"), facts)
    with Image.open(image.with_name("maps.png")) as picture:
        assert {name: picture.text[name] for name in facts if facts[name]} == {n: v for n, v in facts.items() if v}
    assert facts["file_sha256"] == entry.digest and facts["warnings"] and facts["notice"].startswith("For research")
    html = record_page(about, [entry])
    assert "saliency" in html and html.count("data:image/png") == 2


def test_batches_failures_and_limits(model, image):
    about, entry = record(model, image)
    failed = Entry.of(image.with_name("x.png"), Failure("x.png", f"{image.with_name('x.png')}: is not an image"))
    html = record_page(about, [entry, failed])
    assert "Overview" in html and "x.png: is not an image" in html and str(image.parent) not in html
    with pytest.raises(ValueError, match="1 to 100 images, not 101"):
        record_page(about, [entry] * 101)
    with pytest.raises(ValueError, match=r"\.html or \.pdf"):
        write_record(image.with_name("page.doc"), about, [entry])


def test_a_patient_is_not_on_it(model, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    for keyword in ("PatientName", "PatientID", "InstitutionName", "StudyDescription"):
        setattr(ds, keyword, "DOE^JANE4711")
    ds.save_as(tmp_path / "scan.dcm")
    about, entry = record(model, tmp_path / "scan.dcm")
    assert "JANE4711" not in record_page(about, [entry]) + str(record_facts(about, entry))


def test_the_command(model, image, capsys):
    target = image.with_name("page.html")
    bad = image.with_name("bad.png")
    bad.write_bytes(b"nothing")
    code = main(["predict", str(image), str(bad), "--model", str(model[1]), "--top-k", "1", "--record", str(target)])
    said = capsys.readouterr()
    assert code == 1 and said.out.count("%") == 1, "the list is as short as without a page"
    html = target.read_text()
    assert "Overview" in html and "bad.png" in html and html.count(" %</td>") == 2, "every class is on the page"
    assert main(["predict", str(image), "--record", str(target), "--out", str(image.with_name("a.csv"))]) != 0
    assert main(["predict", str(image), "--record", "page.doc"]) != 0


def test_the_picture_of_the_command_explain(model, image):
    pytest.importorskip("captum")
    target = image.with_name("map.png")
    command = ["explain", str(image), "--model", str(model[1]), "--method", "saliency", "--out", str(target)]
    assert main(command) == 0
    with Image.open(target) as picture:
        assert picture.text["file_sha256"] == file_hash(image)
        assert picture.text["weights_sha256"] == file_hash(model[1] / "model.safetensors")


@pytest.mark.slow
def test_as_pdf(model, image):
    pytest.importorskip("weasyprint")
    about, entry = record(model, image)
    path = write_record(image.with_name("page.pdf"), about, [entry])
    assert path.read_bytes().startswith(b"%PDF")
