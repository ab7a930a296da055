"""Writes masks: PNG, NIfTI, or DICOM Segmentation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..utils.extras import require
from ..utils.files import write_atomically

if TYPE_CHECKING:
    from .result import Segmentation

SUFFIXES = (".png", ".nii", ".nii.gz", ".dcm")


def write_masks(found: Segmentation, path: str | os.PathLike, source: Any = None) -> Path:
    """Writes the masks of a segmentation; an existing file is replaced once the new one is complete.

    Args:
        path: `.png`: one class 0 and 255, several as `label_map`; `.nii`, `.nii.gz`: `label_map`, with the spacing
            where it is known; `.dcm`: a DICOM Segmentation that refers to the image.
        source: the DICOM file or `Dataset` that was segmented; needed for `.dcm`.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, or `.dcm` without a DICOM source of the same size.
        ImportError: nibabel or highdicom is not installed; the message holds the command that installs it.
        DiskFullError: no space; an existing file is unchanged.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(".png"):
        return _write_png(found, path)
    if name.endswith((".nii", ".nii.gz")):
        return _write_nifti(found, path)
    if name.endswith(".dcm"):
        return _write_dicom(found, path, source)
    raise ValueError(f"{path.name}: masks are written as {', '.join(SUFFIXES)}; choose one of these suffixes")


def _write_png(found: Segmentation, path: Path) -> Path:
    from PIL import Image

    if len(found.classes) == 1:
        picture = Image.fromarray(found.masks[0].astype(np.uint8) * 255)
    elif len(found.classes) < 256:
        picture = Image.fromarray(found.label_map.astype(np.uint8))
    else:
        picture = Image.fromarray(found.label_map)
    return write_atomically(path, lambda partial: picture.save(partial, format="PNG"))


def _write_nifti(found: Segmentation, path: Path) -> Path:
    nibabel = require("nibabel", "writing NIfTI")
    row, column = found.spacing or (1.0, 1.0)
    # NIfTI's axes are x, y, z; a picture's rows are y.
    image = nibabel.Nifti1Image(found.label_map.T[:, :, None], np.diag([column, row, 1.0, 1.0]))
    if found.spacing:
        image.header.set_xyzt_units("mm")
    compressed = path.name.lower().endswith(".gz")

    def write(partial: Path) -> None:
        content = image.to_bytes()
        if compressed:
            import gzip

            content = gzip.compress(content)
        partial.write_bytes(content)

    return write_atomically(path, write)


def _write_dicom(found: Segmentation, path: Path, source: Any) -> Path:
    highdicom = require("highdicom", "writing DICOM Segmentation")
    import pydicom
    from pydicom.sr.codedict import codes

    from ..imaging.image import is_dataset

    if source is None:
        raise ValueError("a DICOM Segmentation refers to a DICOM image: pass source=, the file that was segmented")
    dataset = source if is_dataset(source) else pydicom.dcmread(source)
    size = (int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0)))
    if size != found.size:
        raise ValueError(f"the DICOM source has {size[0]}x{size[1]} pixels, the masks {found.size[0]}x{found.size[1]}")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="MedMamba", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label[:64],
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(found.classes, 1)
    ]
    result = highdicom.seg.Segmentation(
        source_images=[dataset],
        pixel_array=found.masks.transpose(1, 2, 0)[None].astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=int(dataset.get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="medmamba",
        manufacturer_model_name="MedMamba",
        software_versions=__version__,
        device_serial_number="0",
        omit_empty_frames=False,
    )
    return write_atomically(path, lambda partial: result.save_as(partial))
