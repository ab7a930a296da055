"""DICOM images: header, pixel data, rescale, windows and palettes, as one `MedicalImage` per frame."""

from .load import dicom_window_presets, load_dicom
from .voi import DicomWindows, WindowPreset

__all__ = ["DicomWindows", "WindowPreset", "dicom_window_presets", "load_dicom"]
