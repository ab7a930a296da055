"""Elements of a DICOM header that change the picture: obeyed, refused by name, or noted; never read and ignored."""

import io

import numpy as np
import pytest
from dicom_files import TWELVE, lut, make, shipped, to_bytes
from test_dicom import flat, linear

from medmamba.imaging.dicom import dicom_window_presets
from medmamba.imaging.load import ImageError, load_image

pydicom = pytest.importorskip("pydicom", minversion="3.0")
# ruff: noqa: E402

from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLSLossless

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
SMOOTH = np.add.outer(np.arange(64), np.arange(64)) * 500  # 0..63000, steps of 500
RNG = np.random.default_rng(0)


def written(ds: Dataset, *, implicit=False, big=False) -> bytes:
    buffer = io.BytesIO()
    if implicit:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True, implicit_vr=implicit, little_endian=not big)
    return buffer.getvalue()


def with_text(ds: Dataset, **texts) -> bytes:
    """A file whose numeric element holds any text: the writer is given a placeholder of the same length."""
    ((keyword, text),) = texts.items()
    text = text.ljust(len(text) + len(text) % 2)
    placeholder = "7391827364"[: len(text)]
    setattr(ds, keyword, placeholder)
    data = to_bytes(ds)
    assert data.count(placeholder.encode()) == 1
    return data.replace(placeholder.encode(), text.encode())


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "jls", "j2k", "rle"])
@pytest.mark.parametrize("signed", [False, True])
def test_what_lies_in_unused_bits_is_no_part_of_the_picture(codec, signed):
    low = RAMP.astype(np.int16) - 2048 if signed else RAMP
    overlay = RNG.integers(0, 16, RAMP.shape).astype(np.uint16) << 12
    words = (low.view(np.uint16) & 0x0FFF) | overlay
    ds = make(words.view(np.int16) if signed else words, bits=12)
    if codec == "rle":
        ds.compress(pydicom.uid.RLELossless)
    elif codec:
        if signed:
            pytest.skip("the encoders here know the sign, and fill unused bits themselves")
        imagecodecs = pytest.importorskip("imagecodecs")
        stream = imagecodecs.jpegls_encode(words) if codec == "jls" else imagecodecs.jpeg2k_encode(
            words, level=0, reversible=True, codecformat="j2k"
        )  # fmt: skip
        ds.file_meta.TransferSyntaxUID = JPEGLSLossless if codec == "jls" else JPEG2000Lossless
        ds.PixelData = encapsulate([stream])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
    image = load_image(to_bytes(ds))
    np.testing.assert_allclose(flat(image), np.arange(4096) / 4095, atol=1e-6)
    assert image.used_bits == 12 and "bits outside the 12 stored ones ignored" in image.notes


@pytest.mark.parametrize("signed", [False, True])
def test_values_that_need_more_bits_than_stored_are_refused(signed):
    ds = make((SMOOTH - 30000).astype(np.int16) if signed else SMOOTH.astype(np.uint16), bits=12)
    with pytest.raises(ImageError, match=r"BitsStored \(0028,0101\) of the DICOM header is 12"):
        load_image(to_bytes(ds))


def test_impossible_bits_stored_is_named():
    with pytest.raises(ImageError):
        load_image(make(TWELVE, bits=17))


def test_high_bit_elsewhere_shifts_the_values():
    ds = make(RAMP << 4, bits=12, HighBit=15)
    image = load_image(to_bytes(ds))
    np.testing.assert_allclose(flat(image), np.arange(4096) / 4095, atol=1e-6)
    signed = make(((RAMP.astype(np.int32) - 2048) << 4).astype(np.int16), bits=12, HighBit=15)
    assert load_image(to_bytes(signed)).value_range == (-2048, 2047)


def test_high_bit_that_the_values_contradict_is_noted():
    for high_bit in (15, 3, 99):
        image = load_image(to_bytes(make(RAMP, bits=12, HighBit=high_bit)))
        np.testing.assert_allclose(flat(image), np.arange(4096) / 4095, atol=1e-6)
        assert image.warning_kinds == ("high-bit",)


def test_unused_bits_of_colour():
    rgb = RNG.integers(0, 4096, (5, 4, 3)).astype(np.uint16)
    image = load_image(to_bytes(make(rgb | 0xA000, bits=12, photometric="RGB")))
    np.testing.assert_allclose(image.pixels, rgb / 4095, atol=1e-6)


def test_twelve_bits_of_sixteen_are_warned_of():
    grey = load_image(to_bytes(make(RAMP)))
    assert grey.warning_kinds == ("unused-range",) and (grey.bit_depth, grey.used_bits) == (16, 12)
    colour = load_image(to_bytes(make(RAMP.reshape(32, 128)[:, :, None].repeat(3, 2), photometric="RGB")))
    assert colour.warning_kinds == ("unused-range",) and colour.used_bits == 12


# ---- windows --------------------------------------------------------------------------------------------------------


def test_window_narrower_than_one():
    ds = make(RAMP, RescaleSlope=1e-6, RescaleIntercept=0, WindowCenter=0.002, WindowWidth=0.004095)
    image = load_image(to_bytes(ds))
    np.testing.assert_allclose(flat(image), np.clip((np.arange(4096) * 1e-6 - 0.002) / 0.004095 + 0.5, 0, 1), atol=1e-6)
    assert image.warnings == () and image.window == (0.002, 0.004095)
    np.testing.assert_array_equal(load_image(to_bytes(ds), window=(0.002, 0.004095)).pixels, image.pixels)


@pytest.mark.parametrize("text", ["40,5", "[400]", "400//400", "N/A", "1_0", "nan", "inf", "0x10"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_window_that_cannot_be_read_blocks_nothing(text):
    data = with_text(make(RAMP, bits=12, WindowWidth=400), WindowCenter=text)
    image = load_image(data)
    np.testing.assert_allclose(flat(image), np.arange(4096) / 4095, atol=1e-6)
    assert image.warning_kinds == ("window-unreadable",) and text not in str(image.notes)
    asked = load_image(data, window=(2048, 4096))
    np.testing.assert_allclose(flat(asked), np.arange(4096) / 4095, atol=1e-6)
    assert asked.warnings == () and dicom_window_presets(data).presets == ()


def test_second_window_where_the_first_is_empty():
    data = to_bytes(make(RAMP, bits=12, WindowCenter=["", 1000], WindowWidth=["", 101]))
    image = load_image(data)
    np.testing.assert_allclose(flat(image), [linear(x, 1000, 101) for x in range(4096)], atol=1e-6)
    assert image.window == (1000, 101)


@pytest.mark.parametrize(
    ("keyword", "text"), [("RescaleSlope", "1,5"), ("RescaleIntercept", "N/A."), ("RescaleSlope", "0.00")]
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_rescale_that_cannot_be_read_is_refused_by_name(keyword, text):
    ds = make(RAMP, bits=12, RescaleSlope="2", RescaleIntercept="7")
    for window in (None, (40, 400)):
        with pytest.raises(ImageError, match=rf"{keyword} \(0028,105[23]\)"):
            load_image(with_text(ds, **{keyword: text}), window=window)


def test_window_beside_a_voi_lut_is_said_to_be_unused():
    ds = make(TWELVE, bits=12, VOILUTSequence=[lut([0, 255], 100, 8)], WindowCenter=40, WindowWidth=400)
    assert load_image(ds).notes[-1] == "VOI LUT applied; the file's window is not"


# ---- padding --------------------------------------------------------------------------------------------------------


def floats(values, **elements) -> bytes:
    values = np.asarray(values)
    ds = make(np.zeros(values.shape, np.uint16))
    del ds.PixelData, ds.PixelRepresentation, ds.BitsStored, ds.HighBit
    ds.BitsAllocated = 8 * values.dtype.itemsize
    setattr(ds, "FloatPixelData" if values.dtype == np.float32 else "DoubleFloatPixelData", values.tobytes())
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return to_bytes(ds)


@pytest.mark.parametrize("padding", [-9999.0, float(np.float32(-3.4028235e38)), float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_float_padding_is_left_out_of_the_range_and_black(padding, kind, photometric):
    values = np.linspace(0.25, 0.75, 400).astype(kind).reshape(20, 20)
    values[:5] = padding
    prefix = "Float" if kind == np.float32 else "DoubleFloat"
    image = load_image(floats(values, PhotometricInterpretation=photometric, **{f"{prefix}PixelPaddingValue": padding}))
    expected = np.linspace(-100 / 299, 1, 400).reshape(20, 20)
    expected = 1 - expected if photometric == "MONOCHROME1" else expected
    np.testing.assert_allclose(image.pixels[5:, :, 0], expected[5:], atol=1e-6)
    assert not image.pixels[:5].any() and image.value_range == (values[5, 0], values[-1, -1])
    assert "padding (25.0% of the pixels) drawn black" in image.notes and image.warnings == ()


def test_range_of_float_padding():
    values = np.linspace(0, 1, 100, dtype=np.float64).reshape(10, 10)
    values[0] = -np.arange(1, 11)
    data = floats(values, DoubleFloatPixelPaddingValue=-1.0, DoubleFloatPixelPaddingRangeLimit=-10.0)
    assert load_image(data).value_range == (values[1, 0], 1)
    assert not load_image(data).pixels[0].any()


def test_undeclared_sentinel_in_float_pixels_is_warned_of():
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    values[:5] = -3.4e38
    assert load_image(floats(values)).warning_kinds == ("two-valued",)
    with pytest.raises(ImageError, match="NaN"):
        load_image(floats(np.where(values < 0, np.nan, values).astype(np.float32)))


@pytest.mark.parametrize("how", ["US", "SS"])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_of_signed_integers_whatever_the_sign_of_its_element(how, photometric):
    stored = np.full((16, 16), 40, np.int16)
    stored[:4], stored[4:8] = -2000, 1000
    ds = make(stored, photometric=photometric, RescaleSlope=1, RescaleIntercept=-24)
    ds.add_new(0x00280120, how, -2000 if how == "SS" else 65536 - 2000)
    image = load_image(to_bytes(ds), window=(500, 4000))
    assert image.value_range == (16, 976) and not image.pixels[:4].any() and image.pixels[4:].min() > 0


def test_padding_range_and_padding_above_the_stored_bits():
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    ranged = load_image(to_bytes(make(stored, bits=12, PixelPaddingValue=0, PixelPaddingRangeLimit=99)))
    assert ranged.value_range == (100, 4095) and not flat(ranged)[:100].any() and flat(ranged)[100] > 0
    above = stored.copy()
    above[0] = 0x8000  # the word of -32768, whose lower 12 bits are 0
    outside = load_image(to_bytes(make(above.astype(np.uint16), bits=12, PixelPaddingValue=0x8000)))
    assert outside.value_range == (64, 4095) and not flat(outside)[:64].any()
    assert flat(outside)[64] == pytest.approx(64 / 4095)


def test_padding_everywhere_and_padding_nowhere_block_nothing():
    everywhere = load_image(to_bytes(make(np.full((20, 20), 5, np.uint8), PixelPaddingValue=5)))
    assert everywhere.warning_kinds == ("padding-everywhere", "almost-constant")
    assert (
        load_image(to_bytes(make(TWELVE, bits=12, PixelPaddingValue=77))).notes
        == load_image(make(TWELVE, bits=12)).notes
    )


# ---- lookup tables --------------------------------------------------------------------------------------------------


def words_lut(table, first, bits, *, data=None, entries=None, vr="US") -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, vr, [len(table) if entries is None else entries, first, bits])
    item.add_new(0x00283006, "OW", np.asarray(table, "<u2").tobytes() if data is None else data)
    return item


def test_voi_lut_whose_entries_exceed_its_bits():
    image = load_image(to_bytes(make(RAMP, bits=12, VOILUTSequence=[words_lut(np.arange(4096), 0, 8)])))
    np.testing.assert_allclose(flat(image), np.arange(4096) / 4095, atol=1e-6)
    assert image.warning_kinds == ("table-bits",)


@pytest.mark.parametrize("implicit", [False, True])
def test_first_value_mapped_of_a_voi_lut_for_shifted_signed_values(implicit):
    stored = (RAMP.astype(np.int32) + 7232).astype(np.int16)
    ds = make(stored, RescaleSlope=1, RescaleIntercept=32768, VOILUTSequence=[words_lut(np.arange(4096), 40000, 12)])
    image = load_image(written(ds, implicit=implicit))
    np.testing.assert_allclose(flat(image), np.arange(4096) / 4095, atol=1e-6)


def test_lut_of_65536_entries_and_modality_lut_against_pydicom():
    table = (np.arange(65536)[::-1] // 2).astype("<u2")
    ds = make(RNG.integers(0, 65536, (8, 8)).astype(np.uint16), VOILUTSequence=[words_lut(table, 0, 15, entries=0)])
    expected = apply_voi_lut(ds.pixel_array, ds) / 32767
    np.testing.assert_allclose(load_image(written(ds)).pixels[..., 0], expected, atol=1e-6)
    modality = make(RNG.integers(0, 256, (8, 8)).astype(np.uint8), ModalityLUTSequence=[words_lut(table[:256], 0, 16)])
    modality.ModalityLUTSequence[0].ModalityLUTType = "HU"
    expected = apply_modality_lut(modality.pixel_array, modality)
    assert load_image(written(modality)).value_range == (expected.min(), expected.max())


@pytest.mark.parametrize("big", [False, True])
def test_bytes_packed_into_the_words_of_a_lut(big):
    entries = np.arange(256, dtype=np.uint8)[::-1]
    packed = entries.reshape(-1, 2)[:, ::-1].tobytes() if big else entries.tobytes()
    syntax = {"syntax": ExplicitVRBigEndian} if big else {}
    item = words_lut(entries, 0, 8, data=packed)
    ds = make(np.arange(256, dtype=np.uint16).reshape(16, 16), bits=8, VOILUTSequence=[item], **syntax)
    image = load_image(written(ds, big=big))
    np.testing.assert_allclose(flat(image), entries / 255, atol=1e-6)


# ---- palettes -------------------------------------------------------------------------------------------------------


def palette(stored, tables, bits, first=0, *, entries=None, segmented=False, vr="OW", **elements) -> Dataset:
    ds = make(np.asarray(stored), photometric=elements.pop("photometric", "PALETTE COLOR"), **elements)
    for color, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [entries or len(table), first, bits])
        keyword = f"{'Segmented' if segmented else ''}{color}PaletteColorLookupTableData"
        setattr(ds, keyword, table if isinstance(table, bytes) else np.asarray(table, "<u2").tobytes())
        ds[keyword].VR = vr
    return ds


INDEX = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_palette_that_declares_16_bits_for_bytes():
    tables = [np.arange(256), np.arange(256)[::-1], np.arange(256) * 3 % 256]
    image = load_image(to_bytes(palette(INDEX, tables, 16)))
    np.testing.assert_array_equal(image.to_uint8().reshape(-1, 3), np.stack(tables, -1))
    assert image.warning_kinds == ("table-bits",)


def test_palette_has_one_scale_for_three_colours():
    tables = [np.arange(256) * 257, np.arange(256)[::-1] * 257, np.arange(256)]
    image = load_image(to_bytes(palette(INDEX, tables, 8)))
    np.testing.assert_allclose(image.pixels.reshape(-1, 3), np.stack(tables, -1) / 65535, atol=1e-6)
    assert image.warning_kinds == ("table-bits",)


@pytest.mark.parametrize("bits", [8, 16])
def test_segmented_palettes_against_pydicom(bits):
    scale = 1 if bits == 8 else 257
    kind = np.uint8 if bits == 8 else np.dtype("<u2")
    offset = [0, 0, 0, 0] if bits == 8 else [0, 0]
    first = [0, 2, 3 * scale, 9 * scale, 1, 100, 200 * scale]
    codes = np.array([*first, 1, 52, 0, 0, 1, 17 * scale, 2, 1, *offset, 1, 99, 255 * scale], kind)
    ds = palette(INDEX, [codes.tobytes() + b"\0" * (codes.nbytes % 2)] * 3, bits, entries=256, segmented=True)
    image = load_image(to_bytes(ds))
    expected = apply_color_lut(ds.pixel_array, ds)
    np.testing.assert_allclose(image.pixels, expected / (2**bits - 1), atol=1e-6)
    for cut in (3, 8):
        short = palette(INDEX, [codes.tobytes()[:-cut] + b"\0" * (cut % 2)] * 3, bits, entries=256, segmented=True)
        with pytest.raises(ImageError, match="palette"):
            load_image(short)


def test_palette_of_a_big_endian_file():
    tables = [np.arange(256, dtype=np.uint8)[::step].tobytes() for step in (1, -1)]
    swapped = [np.frombuffer(table, np.uint8).reshape(-1, 2)[:, ::-1].tobytes() for table in tables]
    ds = palette(INDEX.astype(np.uint16), [swapped[0], swapped[1], swapped[0]], 8, syntax=ExplicitVRBigEndian)
    out = load_image(written(ds, big=True)).to_uint8().reshape(-1, 3)
    np.testing.assert_array_equal(out, np.stack([np.arange(256), np.arange(256)[::-1], np.arange(256)], -1))


@pytest.mark.parametrize("where", ["image", "frame"])
def test_supplemental_palette_colours_the_values_in_its_range(where):
    stored = RNG.integers(0, 1124, (2, 16, 16)).astype(np.uint16)
    tables = [RNG.integers(256, 65536, 100) for _ in range(3)]
    elements = {"photometric": "MONOCHROME2", "WindowCenter": 512, "WindowWidth": 1024}
    ds = palette(stored, tables, 16, 1024, **elements)
    ds.PixelPresentation = "COLOR" if where == "image" else "MIXED"
    if where == "frame":
        frames = [Dataset(), Dataset()]
        for frame, kind in zip(frames, ("MONOCHROME", "COLOR"), strict=True):
            frame.CTImageFrameTypeSequence = [Dataset()]
            frame.CTImageFrameTypeSequence[0].PixelPresentation = kind
        ds.PerFrameFunctionalGroupsSequence = frames
    data = to_bytes(ds)
    image = load_image(data, frame=1)
    colour = stored[1] >= 1024
    expected = np.array([[linear(x, 512, 1024)] * 3 for x in stored[1].ravel()]).reshape(16, 16, 3)
    expected[colour] = np.stack([table[stored[1][colour] - 1024] / 65535 for table in tables], -1)
    np.testing.assert_allclose(image.pixels, expected, atol=1e-6)
    assert image.value_range == (stored[1][~colour].min(), stored[1][~colour].max())
    assert load_image(data, frame=0).pixels.shape[2] == (3 if where == "image" else 1)
    assert load_image(data, frame=1, window=(100, 50)).pixels.shape == (16, 16, 3)


def test_declared_colour_without_a_palette_is_noted():
    image = load_image(make(TWELVE, bits=12, PixelPresentation="COLOR"))
    assert image.warning_kinds == ("palette-missing",) and image.pixels.shape[2] == 1


# ---- what else a viewer would do ------------------------------------------------------------------------------------


def test_elements_that_are_not_applied_are_noted():
    shutter = load_image(to_bytes(make(TWELVE, bits=12, ShutterShape="CIRCULAR")))
    assert shutter.warning_kinds == ("not-applied",)
    assert load_image(make(TWELVE, bits=12, PresentationLUTShape="LIN OD")).warning_kinds == ("presentation-lut",)
    assert load_image(make(TWELVE, bits=12, PresentationLUTShape="IDENTITY")).warnings == ()


@pytest.mark.filterwarnings("ignore")
def test_shipped_pictures_are_not_warned_of_without_reason():
    for name in ("examples_overlay.dcm", "examples_palette.dcm", "693_J2KI.dcm", "SC_rgb_rle.dcm"):
        assert load_image(shipped(name)).warnings == ()
