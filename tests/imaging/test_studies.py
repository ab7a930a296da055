"""DICOM files are grouped by their identifiers, of which nothing is returned or printed."""

import json

import numpy as np
import pytest
from PIL import Image

from medmamba import create_model
from medmamba.cli.main import main
from medmamba.decision import combine
from medmamba.inference.patients import GroupPrediction, predict_groups
from medmamba.inference.predict import Failure, predict

pydicom = pytest.importorskip("pydicom")
from medmamba.imaging.dicom.studies import group_files, pseudonyms  # noqa: E402

KEY = b"a key of more than sixteen bytes"
SECRETS = ("1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2", "DOE-1234", "HOSPITAL")


def write(path, study, series, patient, value):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = study, series, patient
    ds.IssuerOfPatientID, ds.PatientName = "HOSPITAL", "DOE^JANE"
    ds.Rows = ds.Columns = 32
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = np.full((32, 32), value, np.uint8).tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two studies of one patient, the first of two series, and a PNG."""
    root = tmp_path_factory.mktemp("studies")
    rows = [(SECRETS[0], "1.2.3", 40), (SECRETS[1], "1.2.5", 90), (SECRETS[0], "1.2.4", 140)]
    found = [write(root / f"{i}.dcm", study, series, SECRETS[2], v) for i, (study, series, v) in enumerate(rows)]
    Image.fromarray(np.full((32, 32), 200, np.uint8)).save(root / "z.png")
    return [*found, root / "z.png"]


def test_files_are_numbered_by_study_series_and_patient(files):
    assert group_files(files) == [0, 1, 0, None]
    assert group_files(files, "series") == [0, 1, 2, None]
    assert group_files(files, "patient") == [0, 0, 0, None]
    with pytest.raises(ValueError, match="level"):
        group_files(files, "ward")


def test_pseudonyms_depend_on_the_key_alone(files):
    names = pseudonyms(files, KEY)
    assert names == pseudonyms(files, KEY) and names[0] == names[2] != names[1] and names[3] is None
    assert not set(names[:3]) & set(pseudonyms(files, KEY + b"!"))
    assert not any(secret in str(names) for secret in SECRETS)
    with pytest.raises(ValueError, match="at least 16"):
        pseudonyms(files, b"short")


def test_images_of_a_study_become_one_prediction(files):
    model = create_model("test", num_classes=3).eval()
    found = predict_groups(model, files, group_files(files), method="noisy_or")
    alone = predict(model, files[:3])
    p = np.array([[dict(one.top)[name] for name in model.config.labels] for one in alone])
    assert [len(one.images) for one in found] == [2, 1, 1] and [one.group for one in found] == [0, 1, None]
    wanted = combine(p[[0, 2]], "noisy_or")
    assert dict(found[0].top) == pytest.approx(dict(zip(model.config.labels, wanted, strict=True)), abs=1e-6)
    assert dict(found[1].top) == pytest.approx(dict(alone[1].top), abs=1e-6)
    missing = predict_groups(model, ["nowhere.png", files[0]], ["a", "b"])
    assert isinstance(missing[0], Failure) and isinstance(missing[1], GroupPrediction)
    with pytest.raises(ValueError, match="3 groups"):
        predict_groups(model, files, [1, 2, 3])


def test_the_command_prints_and_writes_no_identifier(files, tmp_path, capsys):
    model = create_model("test", num_classes=3).save_pretrained(tmp_path / "model")
    before = set(tmp_path.rglob("*"))
    asked = ["predict", str(files[0].parent), "--model", str(model), "--per", "study"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.out.startswith("study 1 (2 images): ") and "1 of 4 files name no study" in said.err
    (tmp_path / "key").write_bytes(KEY)
    assert main([*asked, "--json", "--pseudonym-key", str(tmp_path / "key")]) == 0
    found = capsys.readouterr()
    record = json.loads(found.out.splitlines()[0])
    assert record["group"] == pseudonyms(files, KEY)[0] and record["images"] == 2
    for text in (said.out, said.err, found.out, found.err):
        assert not any(secret in text for secret in (*SECRETS, "JANE"))
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "key"}
    assert main([*asked, "--csv"]) == 2 and main(["predict", str(files[0]), "--combine", "max"]) == 2
