"""Slices of a series are shown in the order of their positions."""

import pytest

from medmamba.imaging.dicom.series import series_order

pydicom = pytest.importorskip("pydicom")


def test_slices_are_ordered_by_position_and_other_files_stay(tmp_path):
    source = pydicom.data.get_testdata_file("CT_small.dcm", download=False)

    def save(name, series="1.2.3", **elements):
        ds = pydicom.dcmread(source)
        ds.SeriesInstanceUID = series
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
        ds.save_as(tmp_path / name)
        return tmp_path / name

    flat = [1, 0, 0, 0, 1, 0]
    slices = [
        save(f"{i}.dcm", ImageOrientationPatient=flat, ImagePositionPatient=[0, 0, z], InstanceNumber=i)
        for i, z in enumerate((30, -5, 12.5))
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    numbered = [save(f"n{i}.dcm", "4.5", ImagePositionPatient=None, InstanceNumber=n) for i, n in enumerate((2, 1))]
    files = [slices[0], tmp_path / "a.png", numbered[0], slices[1], numbered[1], slices[2], tmp_path / "none.dcm"]
    assert series_order(files) == [3, 5, 0, 1, 4, 2, 6]
    assert series_order([]) == []
