"""The header of a compressed stream, the length of native pixels and unused bits, against the DICOM header."""

import contextlib
import io
import struct

import numpy as np
import pytest
from PIL import Image

from medmamba.imaging.load import ImageError, load_image

pydicom = pytest.importorskip("pydicom", minversion="3.0")
# ruff: noqa: E402

from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from medmamba.imaging.decoding.codestream import StreamError, parse_stream, rle_segments
from medmamba.imaging.dicom.decode import decode_frame

RGB = np.zeros((16, 24, 3), np.uint8)
RGB[:, :8], RGB[:, 8:16], RGB[:, 16:] = (220, 30, 40), (20, 200, 60), (240, 235, 10)
GREY = (np.arange(16 * 24).reshape(16, 24) * 10).astype(np.uint16)  # 12 bits


def header(
    shape, bits, *, photometric=None, stored=None, high=None, signed=0, syntax=ExplicitVRLittleEndian
) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.Rows, ds.Columns = shape[:2]
    ds.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if len(shape) == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric or ("RGB" if len(shape) == 3 else "MONOCHROME2")
    ds.BitsAllocated, ds.BitsStored = bits, stored or bits
    ds.HighBit = ds.BitsStored - 1 if high is None else high
    ds.PixelRepresentation = signed
    return ds


def native(pixels, **kwargs) -> Dataset:
    ds = header(pixels.shape, pixels.itemsize * 8, **kwargs)
    data = pixels.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW"
    return ds


def compressed(frame, syntax, shape, bits, **kwargs) -> Dataset:
    ds = header(shape, bits, syntax=syntax, **kwargs)
    ds.PixelData = encapsulate([bytes(frame)])
    return ds


def jpeg(pixels, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def without_app(frame: bytes, *markers: int) -> bytes:
    """A JPEG stream without its APPn segments."""
    out, position = frame[:2], 2
    while frame[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if frame[position + 1] not in markers:
            out += frame[position:end]
        position = end
    return out + frame[position:]


def adobe(frame: bytes, transform: int) -> bytes:
    return frame[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + frame[2:]


def codecs():
    return pytest.importorskip("imagecodecs")


def j2k(pixels, bits, **options) -> bytes:
    codec = codecs()
    return codec.jpeg2k_encode(pixels, level=0, reversible=True, bitspersample=bits, codecformat="j2k", **options)


def decoded(ds):
    return decode_frame(ds, 0, int(ds.get("NumberOfFrames") or 1))


# ---- parsing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "size", "precision", "signed", "color"),
    [
        ("SC_rgb_jpeg_dcmtk.dcm", "JPEG", (100, 100, 3), 8, None, "YBR"),
        ("SC_rgb_jpeg_app14_dcmd.dcm", "JPEG", (256, 256, 3), 8, None, "RGB"),
        ("SC_rgb_jpeg_gdcm.dcm", "JPEG Lossless", (100, 100, 3), 8, None, "RGB"),
        ("JPGExtended.dcm", "JPEG", (1024, 256, 1), 12, None, None),
        ("MR_small_jpeg_ls_lossless.dcm", "JPEG-LS", (64, 64, 1), 16, None, None),
        ("SC_rgb_jls_lossy_line.dcm", "JPEG-LS", (100, 100, 3), 8, None, None),
        ("J2K_pixelrep_mismatch.dcm", "JPEG 2000", (512, 512, 1), 13, False, None),
        ("693_J2KI.dcm", "JPEG 2000", (512, 512, 1), 16, True, None),
        ("GDCMJ2K_TextGBR.dcm", "JPEG 2000", (400, 400, 3), 8, False, "MCT"),
    ],
)
def test_headers_of_streams(name, family, size, precision, signed, color):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom comes without {name}")
    frame = get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)
    stream = parse_stream(frame)
    assert (stream.family, (stream.rows, stream.columns, stream.components)) == (family, size)
    assert stream.precision == (precision,) * size[2] and (stream.signed, stream.color) == (signed, color)
    assert stream.complete
    for cut in range(0, 120, 3):  # never anything but an error of its own
        with contextlib.suppress(StreamError):
            assert not parse_stream(frame[:cut]).complete


def test_header_of_rle():
    frame = struct.pack("<16L", 2, 64, 70, *[0] * 13) + bytes(20)
    assert rle_segments(frame) == 2
    for segments in ((0, 64), (16, 64), (2, 64, 64), (2, 70, 64), (2, 64, 84), (1, 60)):
        with pytest.raises(StreamError):
            rle_segments(struct.pack("<16L", *segments, *[0] * (16 - len(segments))) + bytes(20))
    with pytest.raises(StreamError):
        rle_segments(frame[:50])


# ---- the stream against the header ----------------------------------------------------------------------------------


def test_a_missing_planar_configuration_is_noted():
    ds = compressed(jpeg(RGB), JPEGBaseline8Bit, RGB.shape, 8, photometric="YBR_FULL_422")
    expected = load_image(ds).pixels
    del ds.PlanarConfiguration
    image = load_image(ds)
    assert np.array_equal(image.pixels, expected) and any("Planar Configuration missing" in n for n in image.notes)


def test_colour_stream_in_a_grey_header_is_refused():
    codec = codecs()
    streams = [
        (jpeg(RGB), JPEGBaseline8Bit),
        (codec.jpegls_encode(RGB), JPEGLSLossless),
        (j2k(RGB, 8), JPEG2000Lossless),
    ]
    for frame, syntax in streams:
        with pytest.raises(ImageError, match="Samples per Pixel is 1, but the compressed stream has 3 components"):
            load_image(compressed(frame, syntax, RGB.shape[:2], 8))


def test_grey_stream_in_a_colour_header_is_refused():
    codec = codecs()
    grey = RGB[..., 0].copy()
    streams = [(jpeg(grey), JPEGBaseline8Bit), (codec.jpegls_encode(grey), JPEGLSLossless), (j2k(grey, 8), JPEG2000)]
    for frame, syntax in streams:
        with pytest.raises(ImageError, match="Samples per Pixel is 3, but the compressed stream has 1 comp"):
            load_image(compressed(frame, syntax, RGB.shape, 8))


def test_other_size_or_depth_is_refused():
    codec = codecs()
    for frame, syntax in ((codec.jpegls_encode(GREY), JPEGLSLossless), (j2k(GREY, 12), JPEG2000Lossless)):
        with pytest.raises(ImageError, match="Rows and Columns are 24 and 16, but the compressed stream is 16 by 24"):
            load_image(compressed(frame, syntax, (24, 16), 16, stored=12))
        with pytest.raises(ImageError, match=r"Bits Allocated is 8, but .* samples of 1[26] bits"):
            load_image(compressed(frame, syntax, GREY.shape, 8))
        other = JPEG2000 if syntax == JPEGLSLossless else JPEGLSLossless
        for uid in (other, JPEGBaseline8Bit, JPEGLossless):
            with pytest.raises(ImageError, match=r"Transfer Syntax says .* but the pixel data is a JPEG"):
                load_image(compressed(frame, uid, GREY.shape, 16, stored=12))


def test_rle_segments_against_the_header():
    ds = native(RGB)
    ds.compress(RLELossless, generate_instance_uid=False)
    assert np.array_equal(decoded(ds).words, RGB)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    with pytest.raises(
        ImageError, match=r"3 segments, where Samples per Pixel \(1\) and Bits Allocated \(8\) ask for 1"
    ):
        load_image(ds)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    with pytest.raises(ImageError, match="ask for 2"):
        load_image(ds)


def test_stream_of_fewer_bits_than_bits_stored_is_noted():
    codec = codecs()
    low = (GREY % 200).astype(np.uint8)
    for frame, syntax in (
        (jpeg(low), JPEGBaseline8Bit),
        (codec.jpegls_encode(low), JPEGLSLossless),
        (j2k(low, 8), JPEG2000Lossless),
    ):
        result = decoded(compressed(frame, syntax, low.shape, 16, stored=12))
        assert result.notes == [
            "warning: stream-precision: Bits Stored is 12, but the compressed stream holds samples of 8 bits"
        ]
        assert result.words.dtype == np.uint16
        assert np.abs(result.words.astype(int) - low).max() <= (12 if syntax == JPEGBaseline8Bit else 0)


def test_signed_stream_in_an_unsigned_header():
    signed = GREY.astype(np.int16) - 1000
    frame = j2k(signed, 13)
    assert parse_stream(frame).signed
    with pytest.raises(ImageError, match="Pixel Representation says unsigned"):
        load_image(compressed(frame, JPEG2000Lossless, GREY.shape, 16, stored=13))
    result = decoded(compressed(frame, JPEG2000Lossless, GREY.shape, 16, stored=13, signed=1))
    assert np.array_equal(result.words, signed) and result.notes == []


def test_missing_elements_are_said():
    ds = compressed(codecs().jpegls_encode(GREY), JPEGLSLossless, GREY.shape, 16)
    del ds.BitsStored, ds.PixelRepresentation
    image = load_image(ds)
    assert "header-incomplete" in image.warning_kinds and image.value_range == (GREY.min(), GREY.max())


def test_signed_header_over_a_narrower_jpeg_ls_stream_is_not_guessed():
    frame = codecs().jpegls_encode((GREY % 256).astype(np.uint8))
    with pytest.raises(ImageError, match="sign is not certain"):
        load_image(compressed(frame, JPEGLSLossless, GREY.shape, 16, stored=12, signed=1))


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("stream", ["jfif", "adobe 1", "adobe 0", "rgb identifiers", "silent", "silent 4:2:0"])
def test_colour_space_follows_the_stream(photometric, stream):
    """What the stream says in so many words wins over the header; a silent stream is what the header says."""
    plain = without_app(jpeg(RGB, subsampling=2 if stream == "silent 4:2:0" else 0), 0xE0)
    is_ybr = True
    if stream == "jfif":
        frame = jpeg(RGB, subsampling=0)
    elif stream.startswith("silent"):
        frame, is_ybr = plain, photometric != "RGB" or "4:2:0" in stream
    elif stream == "adobe 1":
        frame = adobe(plain, 1)
    else:
        frame = without_app(jpeg(RGB, keep_rgb=True), 0xEE, 0xE0)
        is_ybr = False
        if stream == "adobe 0":
            start = frame.index(b"\xff\xc0") + 10
            frame = bytearray(frame)
            for sos in (frame.index(b"\xff\xda") + 5,):
                for i in range(3):
                    frame[start + 3 * i] = i + 1
                    frame[sos + 2 * i] = i + 1
            frame = adobe(bytes(frame), 0)
    result = decoded(compressed(frame, JPEGBaseline8Bit, RGB.shape, 8, photometric=photometric))
    raw = np.asarray(Image.open(io.BytesIO(jpeg(RGB, subsampling=0))).convert("RGB"))
    if stream == "silent" and photometric == "RGB":  # luma and chroma taken for RGB, as the header asks
        raw = np.asarray(Image.open(io.BytesIO(jpeg(RGB, subsampling=0))).convert("YCbCr"))
    inner = np.r_[2:6, 10:14, 18:22]
    assert result.photometric == "RGB"
    assert np.abs(result.words[2:14][:, inner].astype(int) - raw[2:14][:, inner]).max() <= 12
    contradicts = is_ybr == (photometric == "RGB") and stream != "silent"
    assert bool(result.notes) == contradicts, result.notes


@pytest.mark.parametrize("photometric", ["RGB", "YBR_RCT", "YBR_FULL"])
@pytest.mark.parametrize("transform", [True, False])
def test_component_transform_follows_the_stream(photometric, transform):
    frame = j2k(RGB, 8, mct=transform)
    assert (parse_stream(frame).color == "MCT") == transform
    result = decoded(compressed(frame, JPEG2000Lossless, RGB.shape, 8, photometric=photometric))
    assert result.photometric == "RGB"
    if transform or photometric != "YBR_FULL":
        assert np.array_equal(result.words, RGB)
    else:  # no transform in the stream: the components are what the header says
        assert not np.array_equal(result.words, RGB)
    agree = {"RGB": not transform, "YBR_RCT": transform, "YBR_FULL": not transform}[photometric]
    assert bool(result.notes) == (not agree)


def test_cut_streams_and_frames_that_nobody_declared_are_refused():
    codec = codecs()
    streams = [(jpeg(RGB), JPEGBaseline8Bit, RGB), (codec.jpegls_encode(GREY), JPEGLSLossless, GREY)]
    streams.append((j2k(GREY, 12), JPEG2000Lossless, GREY))
    for frame, syntax, pixels in streams:
        bits = {"stored": 12} if pixels is GREY else {}
        cut = compressed(frame[: len(frame) // 2], syntax, pixels.shape, pixels.itemsize * 8, **bits)
        with pytest.raises(ImageError, match="ends before its end marker"):
            load_image(cut)
        ds = header(pixels.shape, pixels.itemsize * 8, syntax=syntax, **bits)
        ds.PixelData = encapsulate([frame, frame])
        with pytest.raises(ImageError, match="Number of Frames is 1, but the pixel data holds 2"):
            load_image(ds)
        ds.NumberOfFrames = 3
        with pytest.raises(ImageError, match="Number of Frames is 3, but the pixel data holds 2"):
            load_image(ds, frame=0)
        ds.NumberOfFrames = 2
        assert load_image(ds, frame=1).size == pixels.shape[:2]
        ds.PixelData = ds.PixelData[: len(ds.PixelData) - len(frame) // 2]
        with pytest.raises(ImageError, match=r"cut short|damaged"):
            load_image(ds, frame=1)


def test_what_is_no_stream_is_refused():
    for syntax in (JPEGBaseline8Bit, UID("1.2.840.10008.1.2.4.201")):
        with pytest.raises(ImageError, match="no known header"):
            load_image(compressed(bytes(64), syntax, (8, 8), 8))


# ---- native pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [1, 7, 64, 16 * 24 * 2, 3 * 16 * 24 * 2])
def test_native_pixels_longer_than_the_header_says(excess):
    ds = native(GREY, stored=12)
    ds.PixelData += bytes(excess)
    result = decoded(ds)
    assert np.array_equal(result.words, GREY)
    assert result.notes == [f"{excess} bytes of padding after the pixel data ignored"]
    ds.PixelData = ds.PixelData[:-1] + b"\1"
    element = "Number of Frames" if excess >= 16 * 24 * 2 else "Rows, Columns and Bits Allocated"
    with pytest.raises(ImageError, match=element):
        load_image(ds)


def test_native_pixels_shorter_than_the_header_says():
    for change in ({"Rows": 17}, {"Columns": 25}, {"NumberOfFrames": 2}, {"BitsAllocated": 32}):
        ds = native(GREY, stored=12)
        for keyword, value in change.items():
            setattr(ds, keyword, value)
        with pytest.raises(ImageError, match="ask for") as error:
            load_image(ds, frame=0)
        assert next(iter(change)).lower() in str(error.value).replace(" ", "").lower()


def test_odd_lengths_and_single_bits():
    odd = np.arange(15, dtype=np.uint8).reshape(3, 5)
    result = decoded(native(odd))
    assert np.array_equal(result.words, odd) and result.notes == []
    frames = np.random.default_rng(0).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    ds = header((5, 7), 1)
    ds.NumberOfFrames = 3
    ds.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
    for index in range(3):
        assert np.array_equal(decode_frame(ds, index, 3).words, frames[index])
    ds.NumberOfFrames = 4
    with pytest.raises(ImageError, match="Number of Frames"):
        load_image(ds, frame=0)


def test_single_bits_of_big_endian_files():
    bits = np.random.default_rng(0).integers(0, 2, (8, 16)).astype(np.uint8)
    data = np.packbits(bits.ravel(), bitorder="little")
    for vr, stored in (("OB", data), ("OW", data.view("<u2").byteswap())):
        ds = header((8, 16), 1, syntax=ExplicitVRBigEndian)
        ds.PixelData = stored.tobytes()
        ds["PixelData"].VR = vr
        assert np.array_equal(decoded(ds).words, bits)


def test_impossible_pixel_representation_and_bits_stored():
    for ds in (native(GREY, stored=12), compressed(codecs().jpegls_encode(GREY), JPEGLSLossless, GREY.shape, 16)):
        ds.PixelRepresentation = 12
        with pytest.raises(ImageError, match="Pixel Representation"):
            load_image(ds)
        ds.PixelRepresentation = 0
        for bits in (0, 17):
            ds.BitsStored = bits
            with pytest.raises(ImageError, match="BitsStored"):
                load_image(ds)


def test_ybr_of_more_than_8_bits_is_refused():
    with pytest.raises(ImageError, match="YBR_FULL with 16 Bits Allocated"):
        load_image(native(RGB.astype(np.uint16) * 16, photometric="YBR_FULL", stored=12))


# ---- unused bits of compressed images -------------------------------------------------------------------------------


def flat(ds, top):
    return np.rint(load_image(ds).pixels[..., 0] * top).astype(int)


def test_overlay_in_the_unused_bits_of_a_compressed_image():
    overlay = GREY | ((GREY // 10 % 16) << 12).astype(np.uint16)
    for frame, syntax in ((codecs().jpegls_encode(overlay), JPEGLSLossless), (j2k(overlay, 16), JPEG2000Lossless)):
        ds = compressed(frame, syntax, GREY.shape, 16, stored=12)
        assert np.array_equal(flat(ds, 4095), GREY)
        assert any("ignored" in note for note in load_image(ds).notes)


def test_values_that_go_on_in_the_unused_bits_are_refused():
    wide = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    for frame, syntax in ((codecs().jpegls_encode(wide), JPEGLSLossless), (j2k(wide, 16), JPEG2000Lossless)):
        with pytest.raises(ImageError, match="BitsStored"):
            load_image(compressed(frame, syntax, wide.shape, 16, stored=12))


def test_high_bit_of_compressed_images():
    cells = ((GREY << 4) | 5).astype(np.uint16)  # other data in the lowest four bits
    rle = native(cells, stored=12, high=15)
    rle.compress(RLELossless, generate_instance_uid=False)
    assert np.array_equal(flat(rle, 4095), GREY)
    for syntax, frame in ((JPEGLSLossless, codecs().jpegls_encode(cells)), (JPEG2000Lossless, j2k(cells, 16))):
        assert np.array_equal(flat(compressed(frame, syntax, GREY.shape, 16, stored=12, high=15), 4095), GREY)
    # A stream of 12 bits holds the samples themselves.
    assert np.array_equal(
        flat(compressed(j2k(GREY, 12), JPEG2000Lossless, GREY.shape, 16, stored=12, high=15), 4095), GREY
    )
