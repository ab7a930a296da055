"""Time of reading compressed DICOM: frames decoded in the worker process against pydicom in the same process.

    python benchmarks/compressed_dicom.py [--size 512] [--rounds 60]

One image of `--size` squared and 12 bits (8 for JPEG baseline) with structure and noise, in each compression. Both ways
alternate in one process, so that other load of the machine meets them alike. The table gives the tenth percentile,
which other load disturbs least, in milliseconds, and the ratio of the medians. "In the process" is what `load_image`
would do without a worker: the same functions, with the frame decoded by `Decoder.as_array` of pydicom here. Waking
another process waits for a free core: measure on an idle machine.
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from unittest import mock

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from medmamba import load_image
from medmamba.imaging.decoding import pool


def phantom(size: int, bits: int) -> np.ndarray:
    """Return a made-up slice `(size, size)`: discs of several densities with noise, as in CT."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image = np.full((size, size), 0.02)
    for radius, cx, cy, value in (
        (0.8, 0, 0, 0.5),
        (0.25, -0.3, 0.1, 0.15),
        (0.25, 0.3, 0.1, 0.15),
        (0.1, 0, 0.5, 0.9),
    ):
        image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = value
    image = (image + rng.normal(0, 0.005, image.shape)).clip(0, 1) * (2**bits - 1)
    return image.astype(np.uint16 if bits > 8 else np.uint8)


def dicom(pixels: np.ndarray, bits: int, syntax: UID) -> bytes:
    """Return a DICOM file of `pixels` in a transfer syntax."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = pixels.itemsize * 8, bits, bits - 1
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OW"
    ds.WindowCenter, ds.WindowWidth = 2 ** (bits - 1), 2 ** (bits - 1)
    if syntax == JPEGBaseline8Bit:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        frame = stream.getvalue()
    elif syntax == JPEGLSLossless:
        import imagecodecs

        frame = imagecodecs.jpegls_encode(pixels)
    elif syntax == RLELossless:
        ds.compress(RLELossless)
        frame = None
    else:
        import imagecodecs

        frame = imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, bitspersample=bits, codecformat="j2k")
    if frame is not None:
        ds.PixelData = encapsulate([frame])
        ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def decode_here(job: dict, data: bytes, max_bytes: int) -> tuple[dict, memoryview]:
    """Stand in for `pool.decode` without another process."""
    array, properties = get_decoder(job["syntax"]).as_array(encapsulate([data]), index=0, **job["options"])
    header = {"dtype": array.dtype.str, "shape": array.shape, "photometric": properties["photometric_interpretation"]}
    return header, memoryview(array).cast("B")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"| {args.size} x {args.size} | in the process, ms | in the worker, ms | ratio | ratio of medians |")
    print("| --- | --- | --- | --- | --- |")
    for syntax in (JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless, RLELossless):
        bits = 8 if syntax == JPEGBaseline8Bit else 12
        data = dicom(phantom(args.size, bits), bits, syntax)
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(args.rounds + 3):
            for here in (True, False):
                patch = mock.patch.object(pool, "decode", decode_here if here else pool.decode)
                with patch:
                    start = time.perf_counter()
                    load_image(data)
                    if number >= 3:  # the first starts the worker
                        times[here].append(1000 * (time.perf_counter() - start))
        (low, middle), (low_after, middle_after) = (np.percentile(times[here], (10, 50)) for here in (True, False))
        print(
            f"| {syntax.name.split(',')[0]} | {low:.1f} | {low_after:.1f} | {low_after / low:.2f} | "
            f"{middle_after / middle:.2f} |"
        )


if __name__ == "__main__":
    main()
