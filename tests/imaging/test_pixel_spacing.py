"""The distance of pixels, and the plane that it is of."""

import pytest

from medmamba.imaging.spacing import DETECTOR, FILM, PATIENT, UNSTATED, image_spacing, pixel_spacing

pydicom = pytest.importorskip("pydicom")


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"Modality": "CT", "PixelSpacing": [0.5, 0.25]}, (0.5, 0.25, PATIENT)),
        ({"Modality": "DX", "ImagerPixelSpacing": [0.15, 0.15]}, (0.15, 0.15, DETECTOR)),
        # Equal to that at the detector: not corrected for the enlargement.
        ({"Modality": "DX", "ImagerPixelSpacing": [0.2, 0.2], "PixelSpacing": [0.2, 0.2]}, (0.2, 0.2, DETECTOR)),
        ({"Modality": "DX", "ImagerPixelSpacing": [0.2, 0.2], "PixelSpacing": [0.18, 0.18]}, (0.18, 0.18, PATIENT)),
        ({"Modality": "CR", "PixelSpacing": [0.2, 0.2]}, (0.2, 0.2, UNSTATED)),
        (
            {"Modality": "CR", "PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "FIDUCIAL"},
            (0.2, 0.2, PATIENT),
        ),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, 0.1, FILM)),
        ({"Modality": "CT", "PixelSpacing": [0, 0.25]}, None),
        ({"Modality": "US"}, None),
    ],
)
def test_the_plane_of_a_spacing(elements, expected):
    ds = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    assert image_spacing(ds) == expected


def test_spacing_of_frames_and_files(tmp_path):
    ds = pydicom.Dataset()
    ds.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = [pydicom.Dataset()]
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.7, 0.7]
    assert image_spacing(ds, 3) == (0.7, 0.7, PATIENT)
    path = pydicom.data.get_testdata_file("CT_small.dcm", download=False)
    assert image_spacing(path) == (*pixel_spacing(path), PATIENT)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    assert image_spacing(tmp_path / "a.png") is None and image_spacing(tmp_path / "none.dcm") is None
