"""The window that an image reports is the one that was applied: read again with it, the pixels are the same."""

import io

import numpy as np
import pytest
from PIL import Image

from medmamba.imaging.image import FrameNeeded, WindowNeeded
from medmamba.imaging.load import load_image

RNG = np.random.default_rng(0)


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def dicom(**header) -> bytes:
    """A 12-bit grey image in memory, values 300 to 3200."""
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.Dataset()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 16, 16, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    ds.PixelData = np.linspace(300, 3200, 256).astype("<u2").tobytes()
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("header", "origin"),
    [
        ({}, "range"),
        ({"RescaleSlope": 2, "RescaleIntercept": -1000}, "range"),
        ({"WindowCenter": 1500, "WindowWidth": 800}, "file"),
        ({"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"}, "file"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "range"),
        ({"VOILUTFunction": "LINEAR_EXACT"}, "range"),
    ],
)
def test_dicom(header, origin):
    found = load_image(dicom(**header))
    assert found.window_from == origin
    np.testing.assert_allclose(load_image(dicom(**header), window=found.window).pixels, found.pixels, atol=1e-6)


@pytest.mark.parametrize("values", [
    RNG.integers(0, 256, (9, 9), np.uint8), RNG.integers(348, 3205, (9, 9)).astype(np.uint16), RNG.random((9, 9)),
])  # fmt: skip
def test_arrays_and_files(values):
    for source in (values, *([png(values)] if values.dtype != np.float64 else [])):
        found = load_image(source)
        assert found.window_from == "range"
        np.testing.assert_allclose(load_image(source, window=found.window).pixels, found.pixels, atol=1e-6)


def test_what_takes_no_window_reports_none():
    for source in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        assert load_image(source).window is None and load_image(source).range_window is None
    assert load_image(np.full((4, 4), 7, np.uint8)).range_window is None, "a constant has no range"


def test_twelve_bits_in_sixteen_are_known_to_be_drawn_badly():
    deep = png(np.linspace(348, 3204, 400).reshape(20, 20).astype(np.uint16))
    found = load_image(deep)
    assert found.window == (32767.5, 65535) and found.low_contrast
    assert found.range_window == (1776, 2856)
    mended = load_image(deep, window=found.range_window)
    assert not mended.low_contrast and (mended.pixels.min(), mended.pixels.max()) == (0, 1)


def test_the_window_by_range_uses_the_whole_range_of_a_dicom_file():
    pixels = load_image(dicom(), window=load_image(dicom()).range_window).pixels
    assert (pixels.min(), pixels.max()) == (0, 1) and 0 < pixels.ravel()[1] < 0.01, "nothing is cut off"


def test_a_good_window_is_not_called_bad():
    assert not load_image(dicom()).low_contrast, "12 bits that use 12 bits"
    assert not load_image(np.full((8, 8), 200, np.uint8)).low_contrast
    assert not load_image(RNG.integers(0, 40, (8, 8), np.uint8)).low_contrast, "a dark photograph is as it is"
    assert load_image(dicom(WindowCenter=-5000, WindowWidth=100)).low_contrast, "all white"


def test_errors_say_what_is_needed_in_a_form_for_programs():
    with pytest.raises(WindowNeeded, match="declare no range") as error:
        load_image(np.array([[-5, 9]], np.int16))
    assert error.value.value_range == (-5, 9)
    stack = io.BytesIO()
    pages = [Image.new("L", (4, 4), level) for level in (1, 2, 3)]
    pages[0].save(stack, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(FrameNeeded, match="3 frames") as error:
        load_image(stack.getvalue())
    assert error.value.n_frames == 3
