"""None"""

import io
from pathlib import Path

import numpy as np
import pytest

from medmamba.imaging.dicom import WindowPreset, dicom_window_presets
from medmamba.imaging.load import ImageError, load_image

pydicom = pytest.importorskip("pydicom", minversion="3.0")
# ruff: noqa: E402

from dicom_files import HU, TWELVE, lut, make, shipped, to_bytes
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian


def linear(x, center, width):
    """PS3.3 C.11.2.1.2.1, written out per value as in the standard, for the output range 0..1."""
    if x <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if x > center - 0.5 + (width - 1) / 2:
        return 1.0
    return (x - (center - 0.5)) / (width - 1) + 0.5


def flat(image) -> np.ndarray:
    return image.pixels[..., 0].ravel()


# --- pydicom's own files --------------------------------------------------------------------------------------------


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


# --- the grey pipeline, on made-up files ----------------------------------------------------------------------------


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
