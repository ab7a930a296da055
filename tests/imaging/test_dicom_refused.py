"""DICOM: recognition, files that cannot be read, privacy, and windows for a control."""

import io
import random
import re
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmamba.imaging.dicom import DicomWindows, WindowPreset, dicom_window_presets
from medmamba.imaging.load import ImageError, MissingDependencyError, load_image

pydicom = pytest.importorskip("pydicom", minversion="3.0")
# ruff: noqa: E402

from dicom_files import PHI, TWELVE, lut, make, shipped, to_bytes
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import UID, JPEGExtended12Bit

# --- recognition and sources ----------------------------------------------------------------------------------------


def test_recognised_by_content(tmp_path):
    data = to_bytes(make(TWELVE, bits=12))
    expected = load_image(make(TWELVE, bits=12)).pixels
    tiff_preamble = b"II*\0" + data[4:]
    bare = make(TWELVE, bits=12)
    del bare.file_meta
    implicit, explicit = io.BytesIO(), io.BytesIO()
    pydicom.dcmwrite(implicit, bare, implicit_vr=True, little_endian=True)
    pydicom.dcmwrite(explicit, bare, implicit_vr=False, little_endian=True)
    for name, content in {
        "scan": data,
        "scan.png": data,
        "tiff.tif": tiff_preamble,
        "no_preamble": data[132:],
        "implicit": implicit.getvalue(),
        "explicit": explicit.getvalue(),
    }.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(load_image(tmp_path / name).pixels, expected)
    np.testing.assert_array_equal(load_image(io.BytesIO(data)).pixels, expected)
    assert load_image(make(TWELVE, bits=12)).source == "DICOM dataset"
    assert load_image(pydicom.dcmread(io.BytesIO(data))).source == "DICOM dataset"
    png = io.BytesIO()
    Image.new("L", (3, 3), 7).save(png, "PNG")
    (tmp_path / "really_a_png.dcm").write_bytes(png.getvalue())
    assert load_image(tmp_path / "really_a_png.dcm").format == "PNG"


def test_loading_leaves_a_dataset_as_it_is():
    ds = make(TWELVE, bits=12, photometric="MONOCHROME1", WindowCenter=40, WindowWidth=400)
    before = ds.to_json()
    load_image(ds)
    dicom_window_presets(ds)
    assert ds.to_json() == before


# --- what cannot be read --------------------------------------------------------------------------------------------


def test_not_an_image(tmp_path):
    with pytest.raises(ImageError, match=r"no DICOM pixel data \(it is RT Plan Storage\)"):
        load_image(shipped("rtplan.dcm"))
    (tmp_path / "text.dcm").write_text("not a DICOM file at all, only named like one\n")
    with pytest.raises(ImageError, match=r"no DICOM pixel data|damaged"):
        load_image(tmp_path / "text.dcm")
    with pytest.raises(ImageError, match="cannot be decoded: damaged, truncated"):
        load_image(shipped("MR_truncated.dcm"))
    ds = make(TWELVE, bits=12)
    del ds.Rows, ds.BitsAllocated
    with pytest.raises(ImageError, match="lacks Rows, BitsAllocated"):
        load_image(ds)


def test_too_many_pixels_are_refused_before_decoding():
    for rows, columns in ((65535, 65535), (8193, 8192)):
        with pytest.raises(ImageError, match="the limit is 67 million"):
            load_image(make(TWELVE, bits=12, Rows=rows, Columns=columns))
    with pytest.raises(ImageError, match="no pixels"):
        load_image(make(TWELVE, bits=12, Rows=0))


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_oversized_codestream_behind_a_small_header(name):
    ds = pydicom.dcmread(shipped(name))
    data = bytearray(ds.PixelData)
    if (start := data.find(b"\xff\x4f\xff\x51")) >= 0:
        data[start + 8 : start + 16] = (60000).to_bytes(4, "big") * 2
    else:
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xf7"))
        data[start + 5 : start + 9] = (60000).to_bytes(2, "big") * 2
    ds.PixelData = bytes(data)
    with pytest.raises(ImageError, match="3600 million pixels"):
        load_image(ds)


def test_deflated_bomb(monkeypatch):
    path = shipped("image_dfl.dcm")
    monkeypatch.setattr("medmamba.imaging.dicom.decode._MAX_INFLATED", 1 << 20)
    assert load_image(path).size == (512, 512)
    head = Path(path).read_bytes()[: 132 + 400]
    length = int.from_bytes(head[140:144], "little")
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = head[: 144 + length] + deflate.compress(bytes(1 << 25)) + deflate.flush()
    assert len(bomb) < 50_000
    with pytest.raises(ImageError, match="deflated content is larger than 1 MiB"):
        load_image(bomb)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("JPEG2000.dcm", "pylibjpeg pylibjpeg-openjpeg"),
        ("JPGExtended.dcm", "pylibjpeg pylibjpeg-libjpeg (note that this one is GPL-3.0)"),
        ("MR_small_jpeg_ls_lossless.dcm", "python-gdcm"),
    ],
)
def test_missing_plug_in_is_named(monkeypatch, name, package):
    path = shipped(name)
    decoder = get_decoder(pydicom.dcmread(path).file_meta.TransferSyntaxUID)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(MissingDependencyError, match=f"needs a plug-in: pip install {re.escape(package)}$") as error:
        load_image(path)
    assert isinstance(error.value, ImportError) and isinstance(error.value, ImageError)


def test_better_plug_in_is_suggested(monkeypatch):
    decoder = get_decoder(JPEGExtended12Bit)
    pillow_only = {name: plugin for name, plugin in decoder._available.items() if name == "pillow"}
    assert pillow_only
    monkeypatch.setattr(decoder, "_available", pillow_only)  # Pillow decodes no 12-bit JPEG
    with pytest.raises(MissingDependencyError, match="better plug-in reads it: pip install pylibjpeg"):
        load_image(shipped("JPGExtended.dcm"))


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.4.100", "1.2.3.4.5"])
def test_unsupported_compression(uid):
    ds = make(TWELVE, bits=12)
    ds.file_meta.TransferSyntaxUID = UID(uid)
    ds.PixelData = encapsulate([b"\0\0\1\xb3" + bytes(60)])
    name = "MPEG2 Main Profile" if "840" in uid else "compression that"
    with pytest.raises(ImageError, match=name) as error:
        load_image(ds)
    assert "export frames" in str(error.value)


def test_without_pydicom(monkeypatch):
    data = to_bytes(make(TWELVE, bits=12))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r'pip install "medmamba\[dicom\]"') as error:
        load_image(data)
    assert isinstance(error.value, ImageError)


# --- privacy --------------------------------------------------------------------------------------------------------


def assert_no_phi(text: str) -> None:
    words = [part for value in PHI.values() for part in value.replace("^", " ").split() if len(part) > 3]
    leaked = [word for word in [*words, "secretprivate"] if word in text]
    assert not leaked


def test_no_patient_data_comes_out(tmp_path, capsys, caplog, recwarn):
    good = {"WindowCenter": 40, "WindowWidth": 400}
    invalid = {"PatientBirthDate": PHI["PatientBirthDate"] + "?"}  # pydicom would quote it in a warning
    wrong = [
        {"Rows": 0},
        {"Rows": 60000, "Columns": 60000},
        {"Rows": 9},
        {"NumberOfFrames": 3},
        {"PhotometricInterpretation": PHI["PatientName"]},
        {"BitsStored": 99},
        {"SamplesPerPixel": 2},
        {"PixelData": b""},
    ]
    (tmp_path / "scan.dcm").write_bytes(to_bytes(make(TWELVE, bits=12, **good, **invalid)))
    broken = [make(TWELVE, bits=12, **elements) for elements in wrong]
    broken += [to_bytes(ds) for ds in broken]
    misused = to_bytes(make(TWELVE, bits=12, VOILUTFunction=PHI["PatientID"], **good))
    assert "19610203?" in str([w.message for w in recwarn.list])  # writing quotes, reading must not
    recwarn.clear()
    caplog.clear()
    caplog.set_level(0)

    image = load_image(tmp_path / "scan.dcm")
    assert_no_phi(repr(image) + str(vars(image)))
    assert_no_phi(repr(dicom_window_presets(tmp_path / "scan.dcm")))
    image = load_image(misused)
    assert image.warning_kinds == ("voi-function",)
    assert_no_phi(repr(image) + str(vars(image)))
    for source in broken:
        with pytest.raises(ImageError) as error:
            load_image(source)
        assert_no_phi("".join(traceback.format_exception(error.value)))
    out = capsys.readouterr()
    assert_no_phi(out.out + out.err + caplog.text + str([w.message for w in recwarn.list]))


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
def test_values_quoted_by_a_library_are_not_passed_on():
    data = to_bytes(make(TWELVE, bits=12, NumberOfFrames="12345678"))
    with pytest.raises(ImageError, match="damaged or unusual") as error:
        load_image(data.replace(b"12345678", PHI["PatientName"].encode()))
    assert "'Doe^Jane'" in str(find_context(error.value))
    assert_no_phi("".join(traceback.format_exception(error.value)))


def find_context(error: BaseException) -> BaseException:
    """The innermost exception, which Python keeps but does not show."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def test_patient_data_are_not_even_read():
    from medmamba.imaging.dicom.decode import read_dataset

    ds = read_dataset(io.BytesIO(to_bytes(make(TWELVE, bits=12))))
    assert "Rows" in ds and not any(keyword in ds for keyword in PHI)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_an_image_error():
    random_ = random.Random(0)
    rgb = np.zeros((6, 6, 3), np.uint8)
    table = {"VOILUTSequence": [lut(range(64), 0, 8)], "RescaleSlope": 2, "RescaleIntercept": -5}
    samples = [
        to_bytes(make(TWELVE, bits=12, photometric="MONOCHROME1", WindowCenter=[40, 9], WindowWidth=[400, 9])),
        to_bytes(make(TWELVE, bits=12, **table)),
        to_bytes(make(rgb, photometric="RGB")),
        to_bytes(make(np.stack([TWELVE] * 3), bits=12)),
    ]
    for name in (
        "MR_small_RLE",
        "MR_small_jp2klossless",
        "MR_small_jpeg_ls_lossless",
        "SC_rgb_jpeg_dcmtk",
        "image_dfl",
    ):
        samples.append(Path(shipped(f"{name}.dcm")).read_bytes())
    for sample in samples:
        for _ in range(60):
            damaged = bytearray(sample)
            for _ in range(random_.choice((1, 4, 20))):
                damaged[random_.randrange(132, len(damaged))] = random_.randrange(256)
            if random_.random() < 0.3:
                del damaged[random_.randrange(140, len(damaged)) :]
            try:
                image = load_image(bytes(damaged), frame=random_.choice((None, 0)))
            except ImageError as error:
                text = "".join(traceback.format_exception(error))
            else:
                text = repr(image)
                assert image.pixels.min() >= 0 and image.pixels.max() <= 1
            assert_no_phi(text)


# --- windows for a control ------------------------------------------------------------------------------------------


def test_window_presets():
    elements = {"WindowCenter": [40, -600, 5], "WindowWidth": [400, 1500, 0], "Modality": "CT"}
    elements |= {"WindowCenterWidthExplanation": ["SOFT", "LUNG", "BAD"], "RescaleSlope": 1, "RescaleIntercept": -1024}
    ds = make(TWELVE, bits=12, **elements)
    expected = DicomWindows((WindowPreset(40, 400, "SOFT"), WindowPreset(-600, 1500, "LUNG")), (-1024, 3071), "HU")
    assert dicom_window_presets(ds) == dicom_window_presets(to_bytes(ds)) == expected
    single = make(TWELVE, bits=12, WindowCenter=40, WindowWidth=400, WindowCenterWidthExplanation="SOFT")
    assert dicom_window_presets(single) == DicomWindows((WindowPreset(40, 400, "SOFT"),), (0, 4095), "")
    assert dicom_window_presets(shipped("CT_small.dcm")) == DicomWindows((), (-896, 1167), "HU")
    assert dicom_window_presets(shipped("SC_rgb_rle.dcm")) == DicomWindows((), None)
    with pytest.raises(ImageError, match="2 frames"):
        dicom_window_presets(shipped("SC_rgb_rle_2frame.dcm"))
    with pytest.raises(ImageError, match=r"absent\.dcm: no such file"):
        dicom_window_presets("absent.dcm")
    with pytest.raises(ImageError, match=r"no DICOM pixel data|damaged"):
        dicom_window_presets(b"\x89PNG\r\n\x1a\n" + bytes(100))
