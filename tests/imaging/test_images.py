import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from medmamba.imaging.load import MAX_PIXELS, ImageError, MedicalImage, expand_inputs, load_image

rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (11, 7, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (11, 7), dtype=np.uint8)
GREY16 = rng.integers(0, 65536, (11, 7), dtype=np.uint16)
GREY16[0, 0] = 65535


def encode(array_or_image, fmt, **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png_bytes(array, color_type, *, size=None) -> bytes:
    """A PNG written by hand, since Pillow writes no 16-bit colour."""
    height, width = size or array.shape[:2]
    depth = array.dtype.itemsize * 8
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_bytes(data, width, height, *, bits, photometric=1, sample_format=1) -> bytes:
    """A one-strip grey TIFF written by hand, for the variants that Pillow reads but does not write."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


# ---- formats and bit depths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_are_exact(tmp_path, fmt, options):
    path = tmp_path / "no_suffix_needed"
    path.write_bytes(encode(RGB, fmt, **options))
    image = load_image(path)
    assert image.pixels.dtype == np.float32 and image.pixels.flags.c_contiguous
    np.testing.assert_array_equal(image.pixels, (RGB.astype(np.float64) / 255).astype(np.float32))
    np.testing.assert_array_equal(image.to_uint8(), RGB)
    assert (image.source, image.format, image.mode, image.bit_depth) == ("no_suffix_needed", fmt, "RGB", 8)
    assert (image.size, image.frame, image.n_frames, image.value_range, image.notes) == ((11, 7), 0, 1, None, ())


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_stays_one_channel(fmt):
    image = load_image(encode(GREY, fmt))
    assert image.pixels.shape == (11, 7, 1)
    np.testing.assert_array_equal(image.to_uint8()[..., 0], GREY)
    assert image.value_range == (GREY.min(), GREY.max())
    assert image.to_pil().mode == "L"


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 3)])
def test_jpeg_close_to_the_original(shape):
    ramp = np.broadcast_to(np.linspace(20, 230, 40)[(slice(None), *[None] * (len(shape) - 1))], shape).astype(np.uint8)
    image = load_image(encode(ramp, "JPEG", quality=95))
    assert image.pixels.shape == (40, 30, 3 if len(shape) == 3 else 1)
    np.testing.assert_allclose(image.pixels.reshape(shape), ramp / 255, atol=3 / 255)


@pytest.mark.parametrize(
    "data",
    [
        png_bytes(GREY16, 0),
        encode(GREY16, "TIFF"),
        tiff_bytes(GREY16.tobytes(), 7, 11, bits=16),
    ],
)
def test_sixteen_bit_grey_scaled_by_65535(data):
    image = load_image(data)
    np.testing.assert_allclose(image.pixels[..., 0], GREY16 / 65535, atol=1e-7)
    assert image.bit_depth == 16 and image.notes == ()
    assert image.value_range == (GREY16.min(), 65535)


def test_twelve_bits_in_a_16_bit_png_stay_dark_and_are_noted():
    values = np.array([[0, 100, 2048, 4095]], dtype=np.uint16)
    image = load_image(png_bytes(values, 0))
    np.testing.assert_allclose(image.pixels[0, :, 0], values[0] / 65535, atol=1e-7)
    assert "window=(2047.5, 4095)" in image.notes[0]
    windowed = load_image(png_bytes(values, 0), window=(2047.5, 4095))
    np.testing.assert_allclose(windowed.pixels[0, :, 0], values[0] / 4095, atol=1e-6)
    assert windowed.notes == ("window 2047.5/4095 applied",)


def test_tiff_that_declares_12_bits_is_scaled_by_4095():
    values = np.array([[0, 1, 2048, 4095]])
    nibbles = "".join(f"{value:03x}" for value in values[0])
    image = load_image(tiff_bytes(bytes.fromhex(nibbles), 4, 1, bits=12))
    np.testing.assert_allclose(image.pixels[0, :, 0], values[0] / 4095, atol=1e-7)
    assert image.bit_depth == 12


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_tiff_is_inverted(dtype):
    values = np.array([[0, 3, np.iinfo(dtype).max]], dtype=dtype)
    image = load_image(tiff_bytes(values.tobytes(), 3, 1, bits=values.itemsize * 8, photometric=0))
    np.testing.assert_allclose(image.pixels[0, :, 0], 1 - values[0] / np.iinfo(dtype).max, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "sample_format"),
    [
        (np.array([[-1000, 0, 40, 3000]], np.int16), 2),
        (np.array([[-100, 0, 40, 127]], np.int8), 2),
        (np.array([[-1000, 0, 40, 70000]], np.int32), 2),
        (np.array([[5, 0, 40, 2**32 - 1]], np.uint32), 1),
    ],
)
def test_integers_without_declared_range_need_a_window(values, sample_format):
    data = tiff_bytes(values.tobytes(), 4, 1, bits=values.itemsize * 8, sample_format=sample_format)
    with pytest.raises(ImageError, match=r"declare no range; pass window="):
        load_image(data)
    image = load_image(data, window=(40, 80))
    np.testing.assert_allclose(image.pixels[0, :, 0], np.clip(values[0] / 80, 0, 1), atol=1e-6)
    assert image.value_range == (values.min(), values.max())


def test_float_tiff():
    unit = np.array([[0, 0.25, 1]], np.float32)
    np.testing.assert_array_equal(load_image(encode(unit, "TIFF")).pixels[0, :, 0], unit[0])
    with pytest.raises(ImageError, match=r"must be in 0\.\.1, these are in 0\.\.255; divide them by 255"):
        load_image(encode(unit * 255, "TIFF"))
    np.testing.assert_allclose(load_image(encode(unit * 255, "TIFF"), window=(127.5, 255)).pixels[0, :, 0], unit[0])
    with pytest.raises(ImageError, match="NaN"):
        load_image(encode(np.array([[0, np.nan]], np.float32), "TIFF"))


def test_16_bit_colour_keeps_16_bits():
    colour = rng.integers(0, 65536, (5, 4, 3), dtype=np.uint16)
    image = load_image(png_bytes(colour, 2))
    np.testing.assert_allclose(image.pixels, colour / 65535, atol=1e-7)
    assert image.bit_depth == 16 and image.notes == ()


def test_16_bit_grey_with_alpha_is_one_channel():
    pair = np.stack([np.array([[0x1234, 0xFF00]]), np.array([[0xFFFF, 0xFFFF]])], -1).astype(np.uint16)
    image = load_image(png_bytes(pair, 4))
    np.testing.assert_allclose(image.pixels, pair[..., :1] / 65535, atol=1e-7)


def test_one_bit():
    bits = GREY > 127
    for data in (encode(bits, "PNG"), encode(bits, "TIFF"), encode(bits, "TIFF", compression="group4")):
        image = load_image(data)
        np.testing.assert_array_equal(image.pixels[..., 0], bits)
        assert image.bit_depth == 1


def test_palette_gives_colour_or_grey():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([255, 0, 0, 0, 128, 0, 10, 20, 30])
    loaded = load_image(encode(image, "PNG"))
    assert loaded.to_uint8().tolist() == [[[255, 0, 0], [0, 128, 0], [10, 20, 30]]]
    assert loaded.notes == ("palette expanded to RGB",)
    image.putpalette([255, 255, 255, 9, 9, 9, 77, 77, 77])
    assert load_image(encode(image, "PNG")).to_uint8().tolist() == [[[255], [9], [77]]]


def test_cmyk():
    image = load_image(encode(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"))
    assert image.to_uint8()[0, 0].tolist() == [255, 0, 0]
    assert "CMYK converted" in image.notes[0]


def test_variants_that_pillow_does_not_know():
    with pytest.raises(ImageError, match="Pillow cannot read"):
        load_image(tiff_bytes(bytes(16), 2, 1, bits=48))


# ---- alpha ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "as_png"), [(2, True), (4, True), (4, False)])
def test_alpha_is_composited_on_black(channels, as_png):
    array = np.full((1, 4, channels), 200, np.uint8)
    array[0, :, -1] = [255, 0, 128, 255]
    image = load_image(encode(array, "PNG") if as_png else array)
    assert image.pixels.shape == (1, 4, channels - 1)
    np.testing.assert_allclose(image.pixels[0, :, 0], 200 / 255 * np.array([255, 0, 128, 255]) / 255, atol=1e-6)
    assert image.notes == ("transparent areas (50% of the pixels) composited on black",)


def test_opaque_and_empty_alpha_are_dropped():
    for value, note in ((255, "opaque alpha channel dropped"), (0, "alpha channel ignored, it is zero everywhere")):
        array = np.dstack([RGB, np.full(RGB.shape[:2], value, np.uint8)])
        image = load_image(encode(array, "PNG"))
        np.testing.assert_array_equal(image.to_uint8(), RGB)
        assert image.notes == (note,)


def test_transparent_colours_without_alpha_channel():
    grey = load_image(encode(np.array([[7, 8]], np.uint8), "PNG", transparency=7))
    assert grey.to_uint8().tolist() == [[[0], [8]]]
    rgb = load_image(encode(np.array([[[7, 7, 7], [8, 9, 10]]], np.uint8), "PNG", transparency=(7, 7, 7)))
    assert rgb.to_uint8().tolist() == [[[0, 0, 0], [8, 9, 10]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([255, 0, 0, 0, 128, 0])
    assert load_image(encode(palette, "PNG", transparency=0)).to_uint8().tolist() == [[[0, 0, 0], [0, 128, 0]]]


# ---- rotation -------------------------------------------------------------------------------------------------------

# What a viewer does for each EXIF orientation.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "PIL"])
def test_exif_rotation(fmt, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(RGB, "PNG" if fmt == "PIL" else fmt, exif=exif, **options)
    image = load_image(Image.open(io.BytesIO(data)) if fmt == "PIL" else data)
    np.testing.assert_array_equal(image.to_uint8(), UPRIGHT[orientation](RGB))
    assert ("EXIF rotation applied" in " ".join(image.notes)) == (orientation != 1)


def test_exif_rotation_of_jpeg_and_16_bit():
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    image = load_image(encode(ramp, "JPEG", exif=exif, quality=95))
    assert image.size == (32, 16) and image.pixels[0].mean() < 0.1 < 0.9 < image.pixels[-1].mean()
    deep = load_image(encode(GREY16, "PNG", exif=exif))
    np.testing.assert_allclose(deep.pixels[..., 0], np.rot90(GREY16, -1) / 65535, atol=1e-7)


def test_damaged_exif_keeps_the_pixels_and_is_noted():
    image = load_image(encode(RGB, "PNG", exif=b"Exif\0\0garbage!"))
    np.testing.assert_array_equal(image.to_uint8(), RGB)
    assert "unreadable EXIF" in image.notes[0]


# ---- several frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_need_a_frame(fmt):
    frames = [Image.fromarray(np.full((6, 5), level, np.uint8)) for level in (10, 120, 250)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    with pytest.raises(ImageError, match=r"3 frames; choose one with frame=0 \.\.\. frame=2"):
        load_image(data)
    for index, level in enumerate((10, 120, 250)):
        image = load_image(data, frame=np.int64(index))
        assert (image.frame, image.n_frames) == (index, 3)
        np.testing.assert_allclose(image.pixels, level / 255, atol=1e-6)
    for wrong in (3, -1):
        with pytest.raises(ImageError, match="does not exist: the number of frames is 3"):
            load_image(data, frame=wrong)
    with pytest.raises(ImageError, match="must be an integer"):
        load_image(data, frame=1.5)


def test_frame_on_a_single_image():
    assert load_image(encode(RGB, "PNG"), frame=0).n_frames == 1
    with pytest.raises(ImageError, match="number of frames is 1"):
        load_image(encode(RGB, "PNG"), frame=1)


def test_a_camera_jpeg_with_preview_reads_as_its_picture():
    picture, preview = Image.new("RGB", (32, 24), (200, 0, 0)), Image.new("RGB", (16, 12), (0, 200, 0))
    image = load_image(encode(picture, "MPO", save_all=True, append_images=[preview]))
    assert image.size == (24, 32) and image.pixels[0, 0, 0] > 0.7
    assert image.notes[0] == "first of 2 pictures in this JPEG used"


# ---- arrays and objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB / 255),
        (GREY, GREY[..., None] / 255),
        (GREY16[..., None], GREY16[..., None] / 65535),
        (GREY > 99, (GREY > 99)[..., None]),
        (GREY / 255.0, GREY[..., None] / 255),
        ((RGB / 255).astype(np.float16), RGB / 255),
        (np.asfortranarray(RGB)[::-1], RGB[::-1] / 255),
        (np.full((2, 2), 1 + 5e-7), np.ones((2, 2, 1))),
    ],
)
def test_arrays(array, expected):
    image = load_image(array)
    tolerance = 1e-3 if array.dtype == np.float16 else 1e-6
    np.testing.assert_allclose(image.pixels, expected, atol=tolerance)
    assert image.pixels.dtype == np.float32 and image.pixels.max() <= 1
    assert (image.source, image.format, image.mode) == ("numpy array", "numpy", str(array.dtype))


def test_result_does_not_share_memory_with_the_source():
    array = np.zeros((4, 4, 3), np.float32)
    load_image(array).pixels[:] = 1
    assert array.max() == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 20, 30)), r"channels first; pass numpy.transpose\(array, \(1, 2, 0\)\)"),
        (np.zeros((1, 20, 30)), "channels first"),
        (np.zeros((20, 30, 5)), r"shape \(20, 30, 5\) is not an image"),
        (np.zeros((20, 30, 2)), "is not an image"),
        (np.zeros(20), "is not an image"),
        (np.zeros((2, 20, 30, 3)), "is not an image"),
        (np.zeros((0, 30)), "no pixels"),
        (np.full((4, 4), 255.0), r"must be in 0\.\.1.*divide them by 255"),
        (np.full((4, 4), -0.1), r"must be in 0\.\.1"),
        (np.full((4, 4), np.nan), "NaN or infinite"),
        (np.full((4, 4), np.inf), "NaN or infinite"),
        (np.zeros((4, 4), np.int64), "int64 pixels declare no range"),
        (np.zeros((4, 4), complex), "are not images"),
        (np.zeros((4, 4), object), "are not images"),
        (np.ma.masked_array(np.zeros((4, 4))), "masked"),
        (np.broadcast_to(np.uint8(0), (9000, 9000)), "81 million pixels; the limit is 67 million"),
    ],
)
def test_arrays_refused(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_window_on_arrays():
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]], np.int16)
    image = load_image(hounsfield, window=(40, 400))
    np.testing.assert_allclose(image.pixels[0, :, 0], [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(load_image(np.array([[0.2, 0.4]]), window=(0.5, 1)).pixels.ravel(), [0.2, 0.4])
    with pytest.raises(ImageError, match="grey images only"):
        load_image(RGB, window=(40, 400))


@pytest.mark.parametrize("window", [(1,), (1, 0), (1, -5), (1, np.nan), ("a", "b"), 3, (1, 2, 3)])
def test_invalid_windows(window):
    with pytest.raises(ImageError, match="window"):
        load_image(GREY, window=window)


def test_pil_images_are_not_changed():
    source = Image.open(io.BytesIO(encode(RGB, "PNG")))
    np.testing.assert_array_equal(load_image(source).to_uint8(), RGB)
    np.testing.assert_array_equal(np.asarray(source), RGB)
    frames = [Image.new("L", (3, 3), level) for level in (1, 2, 3)]
    stack = Image.open(io.BytesIO(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])))
    assert load_image(stack, frame=2).to_uint8().max() == 3
    assert stack.tell() == 0
    np.testing.assert_allclose(load_image(Image.fromarray(GREY16)).pixels[..., 0], GREY16 / 65535, atol=1e-7)
    with pytest.raises(ImageError, match="int32 pixels declare no range"):
        load_image(Image.fromarray(np.array([[-5, 9]], np.int32)))


def test_bytes_and_file_objects(tmp_path):
    data = encode(RGB, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    upload = io.BytesIO(data)
    upload.seek(0, os.SEEK_END)
    with open(tmp_path / "a.png", "rb") as opened:
        sources = {data: "bytes", memoryview(data): "bytes", upload: "file object", opened: "file object"}
        for source, name in sources.items():
            image = load_image(source)
            np.testing.assert_array_equal(image.to_uint8(), RGB)
            assert image.source == name
        assert not opened.closed and not upload.closed
    with open(tmp_path / "a.png", encoding="latin-1") as text, pytest.raises(ImageError, match="mode 'rb'"):
        load_image(text)
    upload.close()
    with pytest.raises(ImageError, match="closed"):
        load_image(upload)


def test_medical_image():
    image = load_image(RGB)
    assert "pixels" not in repr(image) and len(repr(image)) < 200
    with pytest.raises(AttributeError):
        image.frame = 3
    assert isinstance(image, MedicalImage) and image.to_pil().size == (7, 11)


# ---- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"hello, I am no image\n", "text file"),
        (b"a;b\n1;2\n", "text file"),
        (b"PK\x03\x04" + bytes(60), "ZIP archive, not an image file; unpack"),
        (b"%PDF-1.7\n" + bytes(60), "PDF document.*export its pages"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"\x1f\x8b\x08" + bytes(60), "gzip"),
        (b"\x93NUMPY\x01\x00", r"numpy\.load"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(60), "HEIC"),
        (bytes(range(256)) * 4, "not a supported image format"),
        (b"\x00", "not a supported image format"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated PNG"),
    ],
)
def test_not_an_image(tmp_path, data, message):
    path = tmp_path / "scan.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as error:
        load_image(path)
    assert str(error.value).startswith(f"{path}: ")


def test_paths_that_cannot_be_opened(tmp_path):
    with pytest.raises(ImageError, match=r"no such file$"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="no such file; download it first"):
        load_image("https://example.org/a.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(ImageError, match="cannot be opened"):
            load_image(name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe")
    for other in (None, 3, [RGB], {"a": 1}):
        with pytest.raises(ImageError, match="expected a path"):
            load_image(other)


@pytest.mark.parametrize("side", [8193, 12_000, 60_000])
def test_too_many_pixels_are_refused_before_decoding(side):
    tiny = np.zeros((1, 1), np.uint8)
    bmp = bytearray(encode(tiny, "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    tiff = tiff_bytes(b"\0", side, side, bits=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns from 89 million on
        for data in (png_bytes(tiny, 0, size=(side, side)), bytes(bmp), tiff):
            with pytest.raises(ImageError, match="the limit"):
                load_image(data)
    assert MAX_PIXELS == 8192**2


def test_tiff_with_missing_strips_is_refused():
    data = tiff_bytes(GREY.tobytes(), 7, 11, bits=8)
    assert load_image(data).size == (11, 7)
    with pytest.raises(ImageError, match="part of its pixels is missing"):
        load_image(data.replace(struct.pack("<HHII", 257, 4, 1, 11), struct.pack("<HHII", 257, 4, 1, 12)))


def test_flipped_bits_in_a_png_are_noticed():
    data = encode(np.zeros((40, 40), np.uint8), "PNG", compress_level=0)
    start = data.index(b"IDAT") + 100
    damaged = data[:start] + b"\x55" + data[start + 1 :]
    with pytest.raises(ImageError, match="damaged"):
        load_image(damaged)


SAMPLES = {
    "png": encode(RGB, "PNG"),
    "png16": png_bytes(GREY16, 0),
    "palette": encode(Image.fromarray(RGB).quantize(16), "PNG"),
    "apng": encode(Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
    "jpeg": encode(RGB.repeat(4, 0).repeat(4, 1), "JPEG"),
    "progressive": encode(RGB.repeat(4, 0).repeat(4, 1), "JPEG", progressive=True),
    "webp": encode(RGB, "WEBP"),
    "webp lossless": encode(RGB, "WEBP", lossless=True),
    "tiff": encode(RGB, "TIFF"),
    "tiff lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encode(RGB.repeat(4, 0), "TIFF", compression="jpeg"),
    "tiff16": encode(GREY16, "TIFF"),
    "tiff group4": encode(GREY > 127, "TIFF", compression="group4"),
    "bmp": encode(RGB, "BMP"),
    "gif": encode(Image.fromarray(RGB).quantize(16), "GIF"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_files_are_refused(name):
    data = SAMPLES[name]
    load_image(data, frame=0)
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        with pytest.raises(ImageError):
            load_image(data[: int(len(data) * share)], frame=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_files_give_an_image_or_an_image_error(name):
    data, random_ = SAMPLES[name], random.Random(name)
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(random_.choice((1, 2, 8))):
            damaged[random_.randrange(min(len(damaged), random_.choice((64, 10_000))))] = random_.randrange(256)
        if random_.random() < 0.3:
            del damaged[random_.randrange(len(damaged)) :]
        try:
            image = load_image(bytes(damaged), frame=random_.choice((None, 0, 1)))
        except ImageError:
            continue
        assert image.pixels.ndim == 3 and image.pixels.shape[2] in (1, 3)
        assert image.pixels.min() >= 0 and image.pixels.max() <= 1


def test_pillow_settings_are_left_alone():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    load_image(SAMPLES["jpeg"])
    with pytest.raises(ImageError):
        load_image(SAMPLES["jpeg"][:100])
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


# ---- expand_inputs --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.png",
        "a.JPG",
        "notes.txt",
        ".hidden.png",
        "sub/c.dcm",
        "sub/.d.png",
        ".cache/e.png",
        "sub/[1].png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "sub" / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "sub" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "sub" / "README").write_bytes(b"text")
    return tmp_path


def relative(paths, folder):
    return [str(Path(path).relative_to(folder)) for path in paths]


def test_folders_are_searched(folder):
    found = expand_inputs([folder])
    assert relative(found, folder) == ["a.JPG", "b.png", "sub/IM0001", "sub/[1].png", "sub/c.dcm"]
    assert all(isinstance(path, Path) for path in found)
    assert relative(expand_inputs(str(folder / "sub")), folder) == ["sub/IM0001", "sub/[1].png", "sub/c.dcm"]


def test_files_patterns_and_duplicates(folder, monkeypatch):
    assert relative(expand_inputs([folder / "notes.txt"]), folder) == ["notes.txt"]
    assert relative(expand_inputs([folder / ".hidden.png"]), folder) == [".hidden.png"]
    assert relative(expand_inputs([f"{folder}/sub/[1].png"]), folder) == ["sub/[1].png"]
    assert relative(expand_inputs([f"{folder}/*.*"]), folder) == ["a.JPG", "b.png"]
    assert relative(expand_inputs([f"{folder}/**/*.dcm"]), folder) == ["sub/c.dcm"]
    assert relative(expand_inputs([f"{folder}/s*"]), folder) == ["sub/IM0001", "sub/[1].png", "sub/c.dcm"]
    monkeypatch.chdir(folder)
    assert expand_inputs(["b.png", "./b.png", folder / "b.png", "*.png"]) == [Path("b.png")]


def test_inputs_that_match_nothing(folder):
    for entry, message in (("absent.png", "no such file"), ("*.bmp", "no image matches"), ("", "no such file")):
        with pytest.raises(ImageError, match=message):
            expand_inputs([folder / "b.png", f"{folder}/{entry}" if entry else ""])
    (folder / "empty").mkdir()
    with pytest.raises(ImageError, match="no images in this folder"):
        expand_inputs([folder / "empty"])
    with pytest.raises(ImageError, match="no images given"):
        expand_inputs([])
