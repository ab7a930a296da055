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

from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing, get_decoder
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGExtended12Bit

PHI = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711-X",
    "PatientBirthDate": "19610203",
    "PatientAddress": "Elm Street 9",
    "InstitutionName": "Saint Nowhere Hospital",
    "ReferringPhysicianName": "House^Gregory",
    "AccessionNumber": "ACC998877",
    "ImageComments": "secretcomment",
    "StudyDescription": "secretstudy",
    "StudyInstanceUID": "1.2.3.987654321.1",
}


def shipped(name: str) -> str:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom comes without {name}")
    return str(path)


def make(stored, *, bits=None, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **elements) -> Dataset:
    """A dataset around `stored` (frames first where there are several), with made-up patient data."""
    stored = np.asarray(stored)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPInstanceUID = "1.2.3.4"
    for keyword, value in PHI.items():
        setattr(ds, keyword, value)
    ds.add_new(0x00091001, "LO", "secretprivate")
    color = photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    ds.SamplesPerPixel = 3 if color else 1
    if color:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.Rows, ds.Columns = stored.shape[-3:-1] if color else stored.shape[-2:]
    if stored.ndim == (4 if color else 3):
        ds.NumberOfFrames = stored.shape[0]
    ds.BitsAllocated = stored.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    data = stored.astype(stored.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def to_bytes(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def lut(data, first, bits, *, vr="US") -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "US" if first >= 0 else "SS", [len(data), first, bits])
    item.add_new(0x00283006, vr, list(data) if vr == "US" else np.asarray(data, "<u2").tobytes())
    return item


def linear(x, center, width):
    """PS3.3 C.11.2.1.2.1, written out per value as in the standard, for the output range 0..1."""
    if x <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if x > center - 0.5 + (width - 1) / 2:
        return 1.0
    return (x - (center - 0.5)) / (width - 1) + 0.5


def flat(image) -> np.ndarray:
    return image.pixels[..., 0].ravel()


# ---- pydicom's own files --------------------------------------------------------------------------------------------


def test_ct_without_window_uses_the_full_range():
    path = shipped("CT_small.dcm")
    image = load_image(path)
    # The pixel data are the last 128 * 128 signed words before the trailing padding element.
    raw = np.frombuffer(pydicom.dcmread(path).PixelData, "<i2").astype(float) - 1024
    np.testing.assert_allclose(flat(image), (raw + 33792) / 65535, atol=1e-6)
    assert image.pixels.shape == (128, 128, 1) and image.pixels.dtype == np.float32
    assert (image.source, image.format, image.mode, image.bit_depth) == ("CT_small.dcm", "DICOM", "MONOCHROME2", 16)
    assert image.value_range == (raw.min(), raw.max()) == (-896, 1167)
    assert image.notes[0] == "rescaled by slope 1, intercept -1024"
    assert "full 16-bit range -33792..31743" in image.notes[1] and "window=" in image.notes[1]


def test_ct_with_explicit_window():
    path = shipped("CT_small.dcm")
    raw = np.frombuffer(pydicom.dcmread(path).PixelData, "<i2").astype(float) - 1024
    image = load_image(path, window=(40, 400))
    np.testing.assert_allclose(flat(image), [linear(x, 40, 400) for x in raw], atol=1e-6)
    assert image.notes[-1] == "window 40/400 applied"


@pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "examples_overlay.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_window_of_the_file(name):
    ds = pydicom.dcmread(shipped(name))
    raw = ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
    out = apply_windowing(raw, ds)
    levels, offset = 2**ds.BitsStored - 1, float(ds.get("RescaleIntercept", 0))
    low = offset - (2 ** (ds.BitsStored - 1) if ds.PixelRepresentation else 0)
    image = load_image(shipped(name))
    np.testing.assert_allclose(image.pixels[..., 0], (out - low) / levels, atol=1e-6)
    assert image.pixels.min() == 0 or name == "MR_small.dcm"
    assert image.notes[-1].startswith("VOI window ")
    preset = dicom_window_presets(shipped(name)).presets[0]
    explicit = load_image(shipped(name), window=(preset.center, preset.width))
    np.testing.assert_array_equal(explicit.pixels, image.pixels)


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_expb.dcm",
        "MR_small_implicit.dcm",
        "MR_small_padded.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore:The pixel data is")
def test_every_lossless_encoding_gives_the_same_pixels(name):
    np.testing.assert_array_equal(load_image(shipped(name)).pixels, load_image(shipped("MR_small.dcm")).pixels)


BARS = [(255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255)]
BARS += [(0, 0, 0), (64, 64, 64), (192, 192, 192), (255, 255, 255)]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_jpeg_gdcm.dcm", 0),
        ("SC_rgb_gdcm_KY.dcm", 1),
        ("SC_ybr_full_422_uncompressed.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cr.dcm", 1),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+s4.dcm", 5),
        ("SC_rgb_jpeg_dcmtk.dcm", 5),
        ("SC_rgb_jls_lossy_line.dcm", 4),
    ],
)
def test_colour_bars(name, tolerance):
    image = load_image(shipped(name))
    assert image.pixels.shape == (100, 100, 3) and image.value_range is None
    middles = image.to_uint8()[5::10, 50].astype(int)
    assert np.abs(middles - BARS).max() <= tolerance
    assert any("converted to RGB" in note for note in image.notes) == (image.mode != "RGB")


def test_16_and_32_bit_colour():
    for name in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"):
        np.testing.assert_allclose(load_image(shipped(name)).pixels[5::10, 50], np.array(BARS) / 255, atol=1e-5)


def test_multi_frame_file():
    path = shipped("SC_rgb_rle_2frame.dcm")
    with pytest.raises(ImageError, match=r"has 2 frames; choose one with frame=0 \.\.\. frame=1"):
        load_image(path)
    first, second = (load_image(path, frame=index) for index in (0, 1))
    assert (second.frame, second.n_frames) == (1, 2)
    np.testing.assert_allclose(first.pixels, 1 - second.pixels, atol=1e-6)  # the second frame is the inverse
    with pytest.raises(ImageError, match="number of frames is 2"):
        load_image(path, frame=2)


def test_palette_file():
    path = shipped("examples_palette.dcm")
    ds = pydicom.dcmread(path)
    tables = [np.frombuffer(ds[f"{c}PaletteColorLookupTableData"].value, "<u2") for c in ("Red", "Green", "Blue")]
    index = np.frombuffer(ds.PixelData, np.uint8).reshape(350, 800)
    image = load_image(path)
    np.testing.assert_allclose(image.pixels, np.stack([table[index] for table in tables], -1) / 65535, atol=1e-6)
    assert image.notes == ("palette expanded to RGB",)


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "image_dfl.dcm", "liver_1frame.dcm"])
def test_other_compressions(name):
    ds = pydicom.dcmread(shipped(name))
    low = -(2 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
    np.testing.assert_allclose(
        load_image(shipped(name)).pixels[..., 0], (ds.pixel_array - float(low)) / (2**ds.BitsStored - 1), atol=1e-6
    )


@pytest.mark.filterwarnings("ignore")
def test_every_shipped_file_gives_an_image_or_an_image_error():
    folder = Path(shipped("CT_small.dcm")).parent
    names = sorted(path.name for path in folder.glob("*.dcm"))
    read = 0
    for name in names:
        try:
            image = load_image(folder / name, frame=0)
        except ImageError as error:
            message = str(error)
            assert "no DICOM pixel data" in message or "damaged" in message or "lacks" in message or "limit" in message
            continue
        read += 1
        assert image.pixels.min() >= 0 and image.pixels.max() <= 1 and image.pixels.shape[2] in (1, 3)
    assert len(names) >= 60 and read >= 50


# ---- the grey pipeline, on made-up files ----------------------------------------------------------------------------

TWELVE = np.array([[0, 1024, 1064, 2000, 4095]], np.uint16)
HU = TWELVE[0].astype(float) - 1024


def test_monochrome1_is_inverted_within_the_output_range():
    ds = make(TWELVE, bits=12, photometric="MONOCHROME1", RescaleSlope=1, RescaleIntercept=-1024)
    image = load_image(to_bytes(ds))
    np.testing.assert_allclose(flat(image), 1 - TWELVE[0] / 4095, atol=1e-6)
    assert image.value_range == (-1024, 3071) and image.mode == "MONOCHROME1"
    assert image.notes[-1] == "MONOCHROME1 inverted"
    windowed = load_image(to_bytes(ds), window=(40, 400))
    np.testing.assert_allclose(flat(windowed), [1 - linear(x, 40, 400) for x in HU], atol=1e-6)
    assert flat(windowed)[0] == 1 and flat(windowed)[-1] == 0


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME2", "IDENTITY", False),
    ],
)
def test_presentation_lut_shape(photometric, shape, inverted):
    image = load_image(make(TWELVE, bits=12, photometric=photometric, PresentationLUTShape=shape))
    np.testing.assert_allclose(flat(image), 1 - TWELVE[0] / 4095 if inverted else TWELVE[0] / 4095, atol=1e-6)
    assert any("inverted" in note for note in image.notes) == inverted


def test_first_of_several_windows():
    elements = {"WindowCenter": [40, 600], "WindowWidth": [400, 1600], "RescaleIntercept": -1024, "RescaleSlope": 1}
    image = load_image(make(TWELVE, bits=12, **elements))
    np.testing.assert_allclose(flat(image), [linear(x, 40, 400) for x in HU], atol=1e-6)
    assert image.notes[-1] == "VOI window 40/400 applied (first of 2 in the file)"


def test_negative_slope_keeps_the_window_upright():
    ds = make(TWELVE, bits=12, RescaleSlope=-2, RescaleIntercept=100)
    raw = 100 - 2.0 * TWELVE[0]
    np.testing.assert_allclose(flat(load_image(ds)), (raw + 8090) / 8190, atol=1e-6)
    np.testing.assert_allclose(flat(load_image(ds, window=(0, 300))), [linear(x, 0, 300) for x in raw], atol=1e-6)


def test_voi_functions():
    exact = make(TWELVE, bits=12, VOILUTFunction="LINEAR_EXACT", WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_allclose(flat(load_image(exact)), TWELVE[0] / 4096, atol=1e-6)
    sigmoid = make(TWELVE, bits=12, VOILUTFunction="SIGMOID", WindowCenter=1000, WindowWidth=500)
    expected = 1 / (1 + np.exp(-4 * (TWELVE[0].astype(float) - 1000) / 500))
    np.testing.assert_allclose(flat(load_image(sigmoid)), expected, atol=1e-6)
    assert flat(load_image(sigmoid, window=(0, 1e-3))).tolist() == [0.5, 1, 1, 1, 1]
    threshold = load_image(make(TWELVE, bits=12), window=(1064.5, 1))
    assert flat(threshold).tolist() == [0, 0, 0, 1, 1]
    fine = make(TWELVE, bits=12, RescaleSlope=1e-4, RescaleIntercept=0)  # LINEAR is not defined for such a width
    np.testing.assert_allclose(flat(load_image(fine, window=(0.25, 0.5))), TWELVE[0] / 5000, atol=1e-6)
    unknown = load_image(make(TWELVE, bits=12, VOILUTFunction="DOE_JANE", WindowCenter=1064, WindowWidth=101))
    np.testing.assert_allclose(flat(unknown), [linear(x, 1064, 101) for x in TWELVE[0]], atol=1e-6)
    assert unknown.warning_kinds == ("voi-function",) and "JANE" not in str(unknown.notes)


@pytest.mark.parametrize("window", [{"WindowCenter": 40, "WindowWidth": 0}, {"WindowCenter": 40}, {"WindowWidth": 9}])
def test_unusable_windows_are_not_applied(window):
    image = load_image(make(TWELVE, bits=12, **window))
    np.testing.assert_allclose(flat(image), TWELVE[0] / 4095, atol=1e-6)
    assert image.notes[-1].startswith("no usable window in the file: full 12-bit range 0..4095")


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_voi_lut_with_8_bit_entries_for_12_bit_values(vr):
    table = [value // 16 for value in range(4096)]
    image = load_image(to_bytes(make(TWELVE, bits=12, VOILUTSequence=[lut(table, 0, 8, vr=vr)], WindowCenter=1)))
    np.testing.assert_allclose(flat(image), (TWELVE[0] // 16) / 255, atol=1e-6)
    assert image.notes[-1] == "VOI LUT applied"


def test_voi_lut_after_rescale_and_outside_its_table():
    table = [100, 200, 300]  # for -1, 0, 1
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, "VOILUTSequence": [lut(table, -1, 10)]}
    image = load_image(make(np.array([[0, 1023, 1024, 1025, 4095]], np.uint16), bits=12, **elements))
    np.testing.assert_allclose(flat(image), np.array([100, 100, 200, 300, 300]) / 1023, atol=1e-6)


def test_first_value_of_a_lut_written_as_unsigned():
    item = lut([0, 255], 2**16 - 1024, 8)  # -1024
    image = load_image(make(TWELVE, bits=12, RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=[item]))
    assert flat(image).tolist() == [0, 1, 1, 1, 1]


def test_modality_lut():
    table = [0, 1000, 4000, 65535]
    image = load_image(to_bytes(make(np.array([[0, 1, 2, 3, 9]], np.uint8), ModalityLUTSequence=[lut(table, 0, 16)])))
    np.testing.assert_allclose(flat(image), np.array([0, 1000, 4000, 65535, 65535]) / 65535, atol=1e-6)
    assert image.notes[0] == "modality LUT applied" and image.value_range == (0, 65535)


def test_damaged_tables_are_refused():
    item = lut([1, 2, 3], 0, 16)
    item.LUTDescriptor = [300, 0, 16]
    with pytest.raises(ImageError, match="lookup table"):
        load_image(make(TWELVE, bits=12, ModalityLUTSequence=[item]))
    optional = load_image(make(TWELVE, bits=12, VOILUTSequence=[item], WindowCenter=1064, WindowWidth=101))
    np.testing.assert_allclose(flat(optional), [linear(x, 1064, 101) for x in TWELVE[0]], atol=1e-6)
    assert optional.warning_kinds == ("voi-lut",)


def test_unused_high_bits_are_masked():
    stored = np.array([[5 | 0xF000, 4095]], np.uint16)  # an overlay in the upper four bits
    assert load_image(to_bytes(make(stored, bits=12))).value_range == (5, 4095)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_signed_pixels(syntax):
    stored = np.array([[-2048, -1, 0, 2047]], np.int16)
    image = load_image(to_bytes_any(make(stored, bits=12, syntax=syntax)))
    np.testing.assert_allclose(flat(image), (stored[0] + 2048.0) / 4095, atol=1e-6)


def to_bytes_any(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    big = ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True, implicit_vr=False, little_endian=not big)
    return buffer.getvalue()


def test_float_pixels_have_only_their_own_range():
    ds = make(np.zeros((1, 3), np.uint16))
    del ds.PixelData, ds.PixelRepresentation
    ds.BitsAllocated = 32
    ds.FloatPixelData = np.array([-0.5, 0, 1.5], "<f4").tobytes()
    image = load_image(to_bytes(ds))
    np.testing.assert_allclose(flat(image), [0, 0.25, 1], atol=1e-6)
    assert "floating-point values -0.5..1.5" in image.notes[-1]
    ds.FloatPixelData = np.array([np.nan, 0, 1.5], "<f4").tobytes()
    with pytest.raises(ImageError, match="NaN"):
        load_image(to_bytes(ds))


def test_functional_groups_of_an_enhanced_multi_frame():
    stored = np.stack([TWELVE, TWELVE[:, ::-1]])
    shared, frames = Dataset(), [Dataset(), Dataset()]
    shared.PixelValueTransformationSequence = [Dataset()]
    shared.PixelValueTransformationSequence[0].RescaleSlope = 1
    shared.PixelValueTransformationSequence[0].RescaleIntercept = -1024
    for frame, center in zip(frames, (40, 900), strict=True):
        frame.FrameVOILUTSequence = [Dataset()]
        frame.FrameVOILUTSequence[0].WindowCenter = center
        frame.FrameVOILUTSequence[0].WindowWidth = 400
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    data = to_bytes(make(stored, bits=12, **groups))
    for index, (raw, center) in enumerate(((HU, 40), (HU[::-1], 900))):
        image = load_image(data, frame=index)
        np.testing.assert_allclose(flat(image), [linear(x, center, 400) for x in raw], atol=1e-6)
    assert dicom_window_presets(data, frame=1).presets == (WindowPreset(900, 400),)


def test_colour_and_palette():
    rgb = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_image(to_bytes(make(rgb, photometric="RGB"))).to_uint8(), rgb)
    planar = make(rgb, photometric="RGB", PlanarConfiguration=1)
    planar.PixelData = rgb.transpose(2, 0, 1).tobytes() + b"\0"
    np.testing.assert_array_equal(load_image(planar).to_uint8(), rgb)
    with pytest.raises(ImageError, match="grey images only"):
        load_image(planar, window=(40, 400))
    index = np.array([[9, 10, 11, 300]], np.uint16)
    palette = make(index, photometric="PALETTE COLOR")
    for shift, color in enumerate(("Red", "Green", "Blue")):
        setattr(palette, f"{color}PaletteColorLookupTableDescriptor", [3, 10, 8])
        setattr(palette, f"{color}PaletteColorLookupTableData", bytes([10 + shift, 20 + shift, 255 - shift, 0]))
    expected = [[10, 11, 12], [10, 11, 12], [20, 21, 22], [255, 254, 253]]
    assert load_image(to_bytes(palette)).to_uint8()[0].tolist() == expected
    with pytest.raises(ImageError, match="colour space is not supported"):
        load_image(make(rgb, photometric="HSV"))
    with pytest.raises(ImageError, match="colour space is not supported"):
        load_image(make(rgb.view(np.int8), photometric="RGB"))


def test_segmented_palette():
    palette = make(np.array([[10, 11, 12, 13]], np.uint8), photometric="PALETTE COLOR")
    for shift, color in enumerate(("Red", "Green", "Blue")):
        setattr(palette, f"{color}PaletteColorLookupTableDescriptor", [4, 10, 8])
        segments = bytes([0, 2, 10 + shift, 20, 1, 2, 200])  # discrete: two entries, then linear: two up to 200
        setattr(palette, f"Segmented{color}PaletteColorLookupTableData", segments)
    assert load_image(to_bytes(palette)).to_uint8()[0].tolist() == [[10, 11, 12], [20] * 3, [110] * 3, [200] * 3]


def test_non_square_pixels_are_noted():
    assert "not square" in load_image(make(TWELVE, bits=12, PixelSpacing=[1.0, 0.5])).notes[-1]
    assert "not square" not in load_image(make(TWELVE, bits=12, PixelSpacing=[0.5, 0.5])).notes[-1]


# ---- recognition and sources ----------------------------------------------------------------------------------------


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


# ---- what cannot be read --------------------------------------------------------------------------------------------


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


# ---- privacy --------------------------------------------------------------------------------------------------------


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


# ---- windows for a control ------------------------------------------------------------------------------------------


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
