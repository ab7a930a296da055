"""Independent readers for `fuzz`: raw values of grey DICOM, else pixels in [0, 1], without any code of medmamba."""

from __future__ import annotations

import io
import os
import tempfile

import numpy as np
from PIL import Image, ImageOps


def read_pydicom(kind: str, data: bytes) -> np.ndarray:
    """Read frame 0 with pydicom's own functions."""
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    ds = dcmread(io.BytesIO(data), force=True)
    array = pixel_array(ds, index=0)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        table = apply_color_lut(array, ds)[..., :3]
        return table / (255.0 if table.dtype.itemsize == 1 else 65535.0)
    if array.ndim == 3:
        return array / (2.0 ** int(ds.BitsStored) - 1)
    if "ModalityLUTSequence" in ds:
        return np.asarray(apply_modality_lut(array, ds), np.float64)
    # Not apply_modality_lut, which fails where one of the two elements is missing.
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    return array * float(1 if slope is None else slope) + float(intercept or 0)


def read_simpleitk(kind: str, data: bytes) -> np.ndarray:
    """Read frame 0 with SimpleITK, which takes files only."""
    import SimpleITK as sitk

    handle, path = tempfile.mkstemp(suffix=".dcm")
    try:
        os.write(handle, data)
        os.close(handle)
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        image = sitk.ReadImage(path)
    finally:
        os.remove(path)
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() == 1:
        return array.astype(np.float64)[0] if array.ndim == 3 else array.astype(np.float64)
    array = array[0] if array.ndim == 4 else array
    return array / float(np.iinfo(array.dtype).max)


def read_pillow(kind: str, data: bytes) -> np.ndarray:
    """Read the first frame with Pillow: palettes expanded, transparency on black, rotated as EXIF says."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    return _unit(image)


def _unit(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image) / 65535.0
    if image.mode == "1":
        return np.asarray(image, np.float64)
    if image.mode == "L" and "transparency" not in image.info:
        return np.asarray(image) / 255.0
    if image.mode in ("CMYK", "YCbCr", "LAB", "RGB") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB")) / 255.0
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa", "L", "RGB"):
        pixels = np.asarray(image.convert("RGBA"), np.float64) / 255
        alpha = pixels[..., 3:]
        return pixels[..., :3] * (alpha if alpha.any() else 1.0)
    raise ValueError(image.mode)


def read_codec(kind: str, data: bytes) -> np.ndarray:
    """Read with tifffile (TIFF) or imagecodecs."""
    if kind == "TIFF":
        import tifffile

        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            array = page.asarray()
            bits = page.bitspersample
            if page.photometric == 0:  # white is zero
                array = (2**bits - 1) - array.astype(np.int64)
            if page.photometric == 3:
                return page.colormap.T[array] / 65535.0
    else:
        import imagecodecs

        array = getattr(imagecodecs, f"{kind.lower()}_decode")(data)
        bits = array.dtype.itemsize * 8
    if array.dtype == bool:
        return array.astype(np.float64)
    array = array / (2.0**bits - 1)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        alpha = array[..., -1:]
        array = array[..., :-1] * (alpha if alpha.any() else 1.0)
    return array


READERS = {
    "pydicom": read_pydicom,
    "simpleitk": read_simpleitk,
    "pillow": read_pillow,
    "codec": read_codec,
}
