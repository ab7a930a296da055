"""Variants of PNG, TIFF and others that a decoder reads to something else: read right, refused, or noted."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from image_files import encode, png_bytes
from PIL import Image

from medmamba.imaging.load import ImageError, load_image

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (37, 29)).astype(np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (37, 29, 3)).astype(np.uint16)


def tifffile_bytes(array, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    if options.get("compression"):
        pytest.importorskip("imagecodecs")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + chunk + png[33:]


# ---- byte order and sign --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("predictor", [None, 2])
def test_sixteen_bits_of_either_byte_order(compression, order, predictor):
    if predictor and compression in (None, "packbits"):
        pytest.skip("has no predictor")
    options = {"byteorder": order, "compression": compression, "predictor": predictor, "photometric": "minisblack"}
    image = load_image(tifffile_bytes(DEEP, **options))
    np.testing.assert_allclose(image.pixels[..., 0], DEEP / 65535, atol=1e-7)
    signed = (DEEP.astype(np.int32) - 32768).astype(np.int16)
    image = load_image(tifffile_bytes(signed, **options), window=(0, 65535))
    np.testing.assert_allclose(image.pixels[..., 0], signed / 65535 + 0.5, atol=1e-6)
    assert image.value_range == (signed.min(), signed.max())


@pytest.mark.parametrize("kind", ["i4", "u4", "f4"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_thirty_two_bits_of_either_byte_order(kind, order, compression):
    values = RNG.integers(0, 2**31 - 1, (9, 8)).astype(kind)
    data = tifffile_bytes(values, byteorder=order, compression=compression, photometric="minisblack")
    if kind == "u4" and order == ">":
        with pytest.raises(ImageError, match="Pillow cannot read"):
            load_image(data, window=(2**30, 2**31))
        return
    image = load_image(data, window=(2**30, 2**31))
    np.testing.assert_allclose(image.pixels[..., 0], values / 2**31, atol=1e-6)


@pytest.mark.parametrize("kind", [">u2", "<u2", ">f4", ">f8", "<f2", ">f2"])
def test_numpy_of_any_byte_order(kind):
    values = DEEP if "u" in kind else DEEP / 65535
    image = load_image(values.astype(kind))
    np.testing.assert_allclose(image.pixels[..., 0], DEEP / 65535, atol=1e-3 if "f2" in kind else 1e-6)
    assert image.value_range is not None
    signed = np.array([[-1000, 40, 3000]])
    for each in (">i2", "<i2", ">i4", ">i8"):
        np.testing.assert_allclose(load_image(signed.astype(each), window=(40, 400)).pixels.ravel(), [0, 0.5, 1])


def test_pillow_image_in_big_endian():
    source = Image.frombytes("I;16B", (29, 37), DEEP.astype(">u2").tobytes())
    np.testing.assert_allclose(load_image(source).pixels[..., 0], DEEP / 65535, atol=1e-7)


# ---- colour of 16 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"byteorder": ">"}, {"compression": "lzw", "predictor": 2}, {"compression": "deflate", "tile": (16, 16)},
    {"byteorder": ">", "compression": "zstd", "predictor": 2, "tile": (16, 16)},
])  # fmt: skip
def test_tiff_colour_keeps_16_bits(options):
    image = load_image(tifffile_bytes(DEEP_RGB, photometric="rgb", **options))
    np.testing.assert_allclose(image.pixels, DEEP_RGB / 65535, atol=1e-7)
    assert image.notes == () and image.used_bits == 16
    alpha = np.concatenate([DEEP_RGB, DEEP[..., None]], -1)
    for extra in ("unassalpha", "assocalpha"):
        if extra == "assocalpha":
            alpha = np.minimum(alpha, alpha[..., 3:])
        image = load_image(tifffile_bytes(alpha, photometric="rgb", extrasamples=[extra], **options))
        expected = alpha[..., :3] / 65535 * (alpha[..., 3:] / 65535 if extra == "unassalpha" else 1)
        np.testing.assert_allclose(image.pixels, expected, atol=1e-6)


@pytest.mark.parametrize("color_type", [2, 4, 6])
def test_png_colour_and_alpha_keep_16_bits(color_type):
    array = RNG.integers(0, 65536, (11, 7, {2: 3, 4: 2, 6: 4}[color_type])).astype(np.uint16)
    expected = array / 65535
    expected = expected if color_type == 2 else expected[..., :-1] * expected[..., -1:]
    image = load_image(png_bytes(array, color_type))
    np.testing.assert_allclose(image.pixels, expected, atol=1e-6)
    assert not any("upper 8" in note for note in image.notes)


def test_turned_and_repeated_files_keep_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = with_chunk(png_bytes(DEEP_RGB, 2), b"eXIf", exif.tobytes()[6:])
    np.testing.assert_allclose(load_image(turned).pixels, np.rot90(DEEP_RGB, -1) / 65535, atol=1e-7)
    pages = tifffile_bytes(np.stack([DEEP_RGB, DEEP_RGB[::-1]]), photometric="rgb")
    np.testing.assert_allclose(load_image(pages, frame=1).pixels, DEEP_RGB[::-1] / 65535, atol=1e-7)


def test_planes_of_16_bits_are_refused_or_said_to_be_cut():
    planes = np.moveaxis(DEEP_RGB, -1, 0)
    with pytest.raises(ImageError, match="one after the other"):
        load_image(tifffile_bytes(planes, photometric="rgb", planarconfig="separate"))
    data = tifffile_bytes(planes, photometric="rgb", planarconfig="separate", compression="deflate")
    image = load_image(data)
    np.testing.assert_array_equal(image.to_uint8(), DEEP_RGB >> 8)
    assert image.notes == ("16 bits per channel read as the upper 8",)
    dark = tifffile_bytes(planes >> 4, photometric="rgb", planarconfig="separate", compression="deflate")
    assert load_image(dark).warning_kinds == ("unused-range",)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tiff", "array"])
def test_twelve_bits_in_sixteen_are_warned_of(channels, kind):
    if kind == "array" and channels == 3:
        values = np.stack([DEEP >> 4] * 3, -1)
    else:
        values = DEEP >> 4 if channels == 1 else DEEP_RGB >> 4
    source = {"png": lambda: png_bytes(values, 0 if channels == 1 else 2), "array": lambda: values}.get(
        kind, lambda: tifffile_bytes(values, photometric="rgb" if channels == 3 else "minisblack")
    )()
    image = load_image(source)
    assert image.warning_kinds == ("unused-range",) and (image.bit_depth, image.used_bits) == (16, 12)
    np.testing.assert_allclose(image.pixels.reshape(values.shape), values / 65535, atol=1e-7)
    assert ("window=(2047.5, 4095)" in image.warnings[0]) == (channels == 1)


def test_grey_with_alpha_takes_the_window_that_its_warning_names():
    pair = np.stack([DEEP >> 4, np.full_like(DEEP, 65535)], -1)
    image = load_image(png_bytes(pair, 4))
    assert image.warning_kinds == ("unused-range",) and image.value_range == ((DEEP >> 4).min(), (DEEP >> 4).max())
    mended = load_image(png_bytes(pair, 4), window=(2047.5, 4095))
    np.testing.assert_allclose(mended.pixels[..., 0], (DEEP >> 4) / 4095, atol=1e-6)
    assert mended.warnings == ()


# ---- stacks of ImageJ -----------------------------------------------------------------------------------------------


STACK = RNG.integers(0, 65536, (6, 20, 30)).astype(np.uint16)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_imagej_stack_behind_one_directory(order, kind):
    stack = (
        (STACK >> 8).astype(kind) if kind == np.uint8 else (STACK / 65535).astype(kind) if kind != np.uint16 else STACK
    )
    data = tifffile_bytes(stack, imagej=True, truncate=True, byteorder=order, metadata={"axes": "ZYX"})
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 1, "one directory, or the test shows nothing"
    with pytest.raises(ImageError, match="6 frames"):
        load_image(data)
    scale = 1 if kind == np.float32 else np.iinfo(kind).max
    for index in (0, 4):
        image = load_image(data, frame=index)
        np.testing.assert_allclose(image.pixels[..., 0], stack[index] / scale, atol=1e-6)
        assert (image.frame, image.n_frames) == (index, 6)
    with pytest.raises(ImageError, match="cut short"):
        load_image(data[:-300], frame=4)


def test_imagej_colour_stack_and_channels():
    colour = RNG.integers(0, 256, (3, 8, 9, 3)).astype(np.uint8)
    data = tifffile_bytes(colour, imagej=True, truncate=True)
    np.testing.assert_array_equal(load_image(data, frame=2).to_uint8(), colour[2])
    channels = tifffile_bytes(STACK[:2], imagej=True, metadata={"axes": "CYX", "min": 100.0, "max": 4000.0})
    image = load_image(channels, frame=1)
    np.testing.assert_allclose(image.pixels[..., 0], STACK[1] / 65535, atol=1e-7)
    assert "ImageJ's display range 100.0..4000.0 not applied" in image.notes


def test_imagej_lookup_table_is_noted():
    ramp = np.stack([np.arange(256), np.zeros(256), np.arange(256)[::-1]]).astype(np.uint8)
    data = tifffile_bytes(STACK[0], imagej=True, metadata={"LUTs": [ramp]})
    assert "ImageJ's lookup table not applied" in load_image(data).notes


# ---- TIFF variants --------------------------------------------------------------------------------------------------


def test_predictor_without_its_compression_is_refused():
    smooth = np.add.outer(np.arange(37), np.arange(29)).astype(np.uint8)
    with pytest.raises(ImageError, match="predictor"):
        load_image(tifffile_bytes(smooth, compression="packbits", predictor=2))


@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 16}, {"tile": (32, 16)}])
def test_jpeg_strips_smaller_than_declared_are_refused(layout):
    """libtiff leaves the rest of such a strip as it finds it in memory."""
    values = RNG.integers(0, 256, (40, 52)).astype(np.uint8)
    data = tifffile_bytes(values, compression="jpeg", photometric="minisblack", **layout)
    assert load_image(data).size == (40, 52)
    header = data.rindex(b"\xff\xc0") + 5  # rows and columns of the last strip or tile
    rows, columns = (int.from_bytes(data[header + i : header + i + 2], "big") for i in (0, 2))
    for changed in (rows // 2, columns), (rows, columns - 1):
        other = b"".join(value.to_bytes(2, "big") for value in changed)
        with pytest.raises(ImageError, match="JPEG strip is smaller"):
            load_image(data[:header] + other + data[header + 4 :])


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16])
def test_white_or_black_is_zero(photometric, kind):
    values = DEEP > 30000 if kind is bool else DEEP.astype(kind) if kind == np.uint16 else (DEEP >> 8).astype(kind)
    image = load_image(tifffile_bytes(values, photometric=photometric))
    unit = values / (1 if kind is bool else np.iinfo(kind).max)
    np.testing.assert_allclose(image.pixels[..., 0], 1 - unit if photometric == "miniswhite" else unit, atol=1e-6)


def test_subsampled_ycbcr_without_compression_is_refused():
    data = tifffile_bytes(RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8), photometric="rgb")
    rgb, ycbcr = (struct.pack("<HHII", 262, 3, 1, value) for value in (2, 6))
    assert data.count(rgb) == 1
    with pytest.raises(ImageError, match="subsampled"):
        load_image(data.replace(rgb, ycbcr))


# ---- PNG and others -------------------------------------------------------------------------------------------------


def test_transparent_values_of_16_bits():
    grey = with_chunk(png_bytes(np.array([[1000, 1001]], np.uint16), 0), b"tRNS", struct.pack(">H", 1000))
    np.testing.assert_allclose(load_image(grey).pixels.ravel(), [0, 1001 / 65535], atol=1e-7)
    values = np.array([[[1000, 2000, 3000], [1001, 2000, 3000]]], np.uint16)  # the same upper bytes
    colour = with_chunk(png_bytes(values, 2), b"tRNS", struct.pack(">HHH", 1000, 2000, 3000))
    np.testing.assert_allclose(load_image(colour).pixels[0], [[0, 0, 0], values[0, 1] / 65535], atol=1e-7)


def test_gamma_and_pixel_aspect_are_noted():
    plain = png_bytes((DEEP >> 8).astype(np.uint8), 0)
    assert load_image(with_chunk(plain, b"gAMA", struct.pack(">I", 45455))).notes == ()
    assert load_image(with_chunk(plain, b"gAMA", struct.pack(">I", 100000))).notes == (
        "display gamma 1 of the file not applied",
    )
    wide = load_image(with_chunk(plain, b"pHYs", struct.pack(">IIB", 1000, 2000, 1)))
    assert re.search(r"pixels are not square", wide.notes[0])


def test_partly_transparent_palette():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([200, 100, 0, 0, 200, 100, 10, 20, 30])
    loaded = load_image(encode(image, "PNG", transparency=bytes([255, 128, 0])))
    np.testing.assert_allclose(loaded.pixels[0, 1], np.array([0, 200, 100]) / 255 * 128 / 255, atol=1e-6)
    assert not loaded.pixels[0, 2].any()


# ---- pictures that show next to nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "kinds"),
    [
        (np.full((20, 20), 200, np.uint8), ("almost-constant",)),
        (RNG.integers(100, 103, (20, 20)).astype(np.uint8), ("almost-constant",)),
        (np.where(np.arange(40000).reshape(200, 200) == 7, 255, 9).astype(np.uint8), ("almost-constant",)),
        (np.where(DEEP > 3000, 255, DEEP >> 8).astype(np.uint8), ("saturated",)),
        (np.where(DEEP > 3000, 0, 255).astype(np.uint8), ()),
        (DEEP > 30000, ()),
        (np.full((20, 20, 3), (200, 0, 0), np.uint8), ("almost-constant",)),
        (np.where(RNG.random((40, 40)) < 0.7, 0, RNG.integers(20, 255, (40, 40))).astype(np.uint8), ()),
        ((DEEP_RGB >> 8).astype(np.uint8), ()),
    ],
)
def test_pictures_that_show_next_to_nothing(picture, kinds):
    image = load_image(picture)
    assert image.warning_kinds == kinds


def test_a_mask_is_said_to_be_one_and_a_window_that_makes_one_is_warned_of():
    assert load_image(DEEP > 30000).notes[-1] == "the image has two values only, a mask"
    assert load_image(DEEP, window=(30000, 1)).warning_kinds == ("two-valued",)
