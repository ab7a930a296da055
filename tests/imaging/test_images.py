"""None"""

import io

import numpy as np
import pytest
from image_files import GREY, GREY16, RGB, encode, png_bytes, rng, tiff_bytes
from PIL import Image

from medmamba.imaging.load import ImageError, load_image

# --- formats and bit depths -----------------------------------------------------------------------------------------


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


# --- alpha ----------------------------------------------------------------------------------------------------------


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


# --- rotation -------------------------------------------------------------------------------------------------------


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
