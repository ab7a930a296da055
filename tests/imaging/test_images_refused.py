"""Files that cannot be read, and which files a folder or a pattern stands for."""

import os
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from image_files import GREY, GREY16, RGB, encode, png_bytes, tiff_bytes
from PIL import Image, ImageFile

from medmamba.imaging.load import MAX_PIXELS, ImageError, expand_inputs, load_image

# --- what cannot be read --------------------------------------------------------------------------------------------


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


# --- expand_inputs --------------------------------------------------------------------------------------------------


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
