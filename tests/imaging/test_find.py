"""Which files of a folder are images, and what is said of the others."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmamba import cli, data
from medmamba.imaging.find import find_in
from medmamba.imaging.formats import certain_format, sniff, suffix_of
from medmamba.imaging.load import expand_inputs, find_images, load_image

UID = b"1.2.840.10008.5.1.4.1.1.7"


def dicom_bytes(preamble: bool = True, explicit: bool = True) -> bytes:
    """A complete 4 x 4 image of 8 bits."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = UID.decode(), "1.2.3", "OT"
    ds.Rows = ds.Columns = 4
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.PixelData = 7, 0, bytes(range(16))
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian
    from io import BytesIO

    stream = BytesIO()
    if preamble:
        ds.save_as(stream, enforce_file_format=True)
    else:
        del ds.file_meta
        pydicom.dcmwrite(stream, ds, implicit_vr=not explicit, little_endian=True, enforce_file_format=False)
    return stream.getvalue()


def png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, format="PNG")
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    content = dicom_bytes()
    for name in ("a.dcm", "IM000001", "1.3.6.1.4.1.14519.5.2.1.1000", "CT.1.2.840.113619.2.1", "x.IMA", "y.DCM"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nopreamble").write_bytes(dicom_bytes(False))
    (tmp_path / "implicit.1000").write_bytes(dicom_bytes(False, explicit=False))
    return tmp_path


IMAGES = ["1.3.6.1.4.1.14519.5.2.1.1000", "CT.1.2.840.113619.2.1", "IM000001", "a.dcm", "implicit.1000", "nopreamble"]
IMAGES += ["x.IMA", "y.DCM"]


def test_dicom_files_are_found_by_content_whatever_they_are_called(scans: Path) -> None:
    found = find_images(scans)
    assert [path.name for path in found.paths] == IMAGES and str(found) == "8 images"
    for path in found.paths:
        assert load_image(path).format == "DICOM"
        np.testing.assert_array_equal(load_image(path).to_uint8()[..., 0].ravel(), np.arange(16))


def test_what_is_passed_over_is_counted_with_its_reason(scans: Path) -> None:
    for name, content in {
        "notes.txt": b"BM begins this text, which is no bitmap, and goes on for a while to be sure",
        "list.csv": b"path,label\n", "more.TXT": b"\x08\x00 text", "readme": b"text", "empty": b"",
        ".hidden.png": b"x", "Thumbs.db": b"\xd0\xcf\x11\xe0", "desktop.ini": b"[x]", "DICOMDIR": dicom_bytes(),
        "copy.png.bak": b"\x89PNG\r\n\x1a\n", "half.dcm.part": dicom_bytes(), "slide.svs": b"II*\x00",
        ".git/x.png": b"x", "__MACOSX/._a.dcm": b"x", "scan.nii.gz": b"\x1f\x8b\x08",
    }.items():  # fmt: skip
        (scans / name).parent.mkdir(exist_ok=True)
        (scans / name).write_bytes(content)
    (scans / "gone.png").symlink_to(scans / "nowhere.png")
    os.mkfifo(scans / "pipe.png")
    found = find_images(scans)
    assert [path.name for path in found.paths] == IMAGES
    assert found.passed_over.counts == {
        ".txt": 2, ".csv": 1, "without suffix and not an image": 1, "empty": 1, "hidden": 1,
        "of the operating system": 2, "DICOMDIR (an index of images)": 1, "unfinished or backup copies": 2, ".svs": 1,
        ".gz": 1, "broken link": 1, "not a regular file": 1, "folder: hidden": 1, "folder: of the operating system": 1,
    }  # fmt: skip
    assert "8 images; passed over 15 files: 2 .txt, 2 of the operating system, 2 unfinished" in str(found)
    assert str(found).endswith("and 2 folders: 1 hidden, 1 of the operating system")


def test_suffixes() -> None:
    for name, suffix in {
        "a.PNG": ".png", "x.y.dcm": ".dcm", "1.3.6.1": "", "CT.1.2.840": "", "x.IMA": ".ima", "a": "", ".hidden": "",
        "scan.dcm.gz": ".gz", "image.001": "", "a. b": "", "a.png ": ".png", "IM.jp2": ".jp2", "end.": "",
    }.items():  # fmt: skip
        assert suffix_of(name) == suffix, name


def test_rasters_without_a_suffix_and_with_doubled_ones(tmp_path: Path) -> None:
    for name in ("picture", "picture.png.png", "export.0001", "UPPER.PNG", "upper.png", "photo.jpeg_large"):
        png(tmp_path / name)
    found = find_images(tmp_path)
    assert len(found.paths) == 6 and not found.passed_over
    bitmap = b"BM" + struct.pack("<IHHIIii", 70, 0, 0, 54, 40, 2, 2)
    assert certain_format(bitmap) == "BMP" and certain_format(b"BM is a text of some length, no bitmap") is None


def test_dicom_without_preamble_needs_more_than_two_bytes_as_evidence() -> None:
    good = dicom_bytes(False)
    assert certain_format(good[:1024]) == sniff(good[:1024]) == "DICOM"
    assert certain_format(good[:12]) is None  # nothing follows
    rng = np.random.default_rng(0)
    for start in (
        b"\x08\x00\x05\x00CS",
        b"\x08\x00\x16\x00UI",
        b"\x02\x00\x00\x00UL",
        b"\x08\x00\x05\x00\x04\x00\x00\x00",
    ):
        for _ in range(200):
            assert certain_format(start + rng.bytes(600)) is None


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    png(tmp_path / "set" / "benign" / "1.png")
    png(tmp_path / "elsewhere" / "2.png", 1)
    (tmp_path / "set" / "alias").symlink_to(tmp_path / "set" / "benign")  # sorts before the folder it stands for
    (tmp_path / "set" / "benign" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "other").symlink_to(tmp_path / "elsewhere")
    found = find_in(tmp_path / "set")
    assert found.paths == ["benign/1.png", "other/2.png"]
    assert found.passed_over.counts == {"folder: link to one that is read already": 2}
    assert [path.name for path in expand_inputs(tmp_path / "set")] == ["1.png", "2.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_counted(tmp_path: Path) -> None:
    png(tmp_path / "a" / "1.png")
    locked = png(tmp_path / "b" / "2.png").parent
    locked.chmod(0)
    try:
        assert "1 folder: 1 cannot be opened" in str(find_images(tmp_path))
    finally:
        locked.chmod(0o755)


def test_an_unreadable_folder_is_counted_even_for_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png(tmp_path / "a" / "1.png")
    png(tmp_path / "b" / "2.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    found = find_images(tmp_path)
    assert [path.name for path in found.paths] == ["1.png"] and "1 folder: 1 cannot be opened" in str(found)


def test_patterns_count_each_file_once(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/deep/c.png"):
        png(tmp_path / name)
    for name in ("notes.txt", "sub/notes.txt"):
        (tmp_path / name).write_text("text")
    found = find_images([f"{tmp_path}/**", tmp_path, f"{tmp_path}/sub"])
    assert str(found) == "3 images; passed over 2 files: 2 .txt"
    assert str(find_images(f"{tmp_path}/*.png")) == "1 image"
    # What is named outright is taken, and not counted as passed over besides.
    assert str(find_images([tmp_path, tmp_path / "notes.txt"])) == "4 images; passed over 1 file: 1 .txt"


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are text")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    png(tmp_path / "x.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    (path,) = expand_inputs(tmp_path)
    assert os.fsencode(path).endswith(b"caf\xe9.png") and load_image(path).size == (6, 5)


def test_the_command_says_the_count(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scans / "notes.txt").write_text("text")
    assert cli.main(["predict", str(scans), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.count("IM000001") == 1 and "8 images; passed over 1 file: 1 .txt" in err


def test_training_sees_the_files_that_prediction_sees(tmp_path: Path) -> None:
    content = dicom_bytes()
    for place in ("a/1.3.6.1.4.1.5", "a/CT.1.2.840.1", "b/x.IMA", "b/IM1", "b/y.dcm"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(content)
    (tmp_path / "b" / "notes.txt").write_text("text")
    dataset = data.open_dataset(tmp_path)
    assert {tmp_path / str(record.source) for record in dataset.records} == set(expand_inputs(tmp_path))
    assert dataset[0][0].shape == (1, 4, 4)
