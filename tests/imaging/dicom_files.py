"""Makes DICOM files for tests."""

import io

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", minversion="3.0")
# ruff: noqa: E402

from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

PHI = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711-X",
    "PatientBirthDate": "19610203",
    "PatientAddress": "Elm Street 9",
    "InstitutionName": "Saint Nowhere Hospital",
    "ReferringPhysicianName": "House^Gregory",
    "AccessionNumber": "ACC998877",
    "ImageComments": "secretcomment",
    "StudyDescription": "secretstudy",
    "StudyInstanceUID": "1.2.3.987654321.1",
}


def shipped(name: str) -> str:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom comes without {name}")
    return str(path)


def make(stored, *, bits=None, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **elements) -> Dataset:
    """A dataset around `stored` (frames first where there are several), with made-up patient data."""
    stored = np.asarray(stored)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPInstanceUID = "1.2.3.4"
    for keyword, value in PHI.items():
        setattr(ds, keyword, value)
    ds.add_new(0x00091001, "LO", "secretprivate")
    color = photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    ds.SamplesPerPixel = 3 if color else 1
    if color:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.Rows, ds.Columns = stored.shape[-3:-1] if color else stored.shape[-2:]
    if stored.ndim == (4 if color else 3):
        ds.NumberOfFrames = stored.shape[0]
    ds.BitsAllocated = stored.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    data = stored.astype(stored.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def to_bytes(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def lut(data, first, bits, *, vr="US") -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "US" if first >= 0 else "SS", [len(data), first, bits])
    item.add_new(0x00283006, vr, list(data) if vr == "US" else np.asarray(data, "<u2").tobytes())
    return item


TWELVE = np.array([[0, 1024, 1064, 2000, 4095]], np.uint16)


HU = TWELVE[0].astype(float) - 1024
