"""Images of several frames, arrays and objects in memory."""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from image_files import GREY, GREY16, RGB, encode
from PIL import Image

from medmamba.data.dataset import to_tensor
from medmamba.imaging.load import ImageError, MedicalImage, load_image
from medmamba.imaging.preprocess import tensor_of

# --- several frames -------------------------------------------------------------------------------------------------


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


# --- arrays and objects ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_read_only_arrays_become_tensors_without_a_warning_and_writable_ones_without_a_copy(dtype):
    pixels = np.full((4, 4, 3), 1, dtype)
    tensor = torch.from_numpy(pixels)
    if dtype is np.float32:  # eight bits are converted anyway
        assert tensor_of(pixels).data_ptr() == tensor.data_ptr()
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tensor_of(pixels)
        image = MedicalImage(pixels=pixels[..., :1].astype(np.float32), source="x", format="", mode="L", bit_depth=8)
        image.pixels.flags.writeable = False
        assert to_tensor(image).shape == (1, 4, 4)
    found.zero_()
    assert (pixels == 1).all() and found.dtype == torch.float32
