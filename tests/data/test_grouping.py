"""Patients by folder and by a column of a CSV file."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from medmamba.data import DatasetError, make_splits, open_dataset, with_patients
from medmamba.data.grouping import examples, table_columns


@pytest.fixture
def nested(tmp_path):
    """Two classes, ten patients with four images each; patient p0 is in both classes."""
    for label in ("ill", "well"):
        for patient in range(10):
            folder = tmp_path / "set" / label / f"p{patient if label == 'ill' else 10 * patient}" / "series"
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng([patient, i, len(label)]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{label}{patient}_{i}.png")
    return tmp_path / "set"


def test_the_folder_below_the_class_is_the_patient(nested):
    found = open_dataset(nested, patients="folder")
    assert len(set(found.patients)) == 19 and found.patients.count("p0") == 4
    assert any("patients by folder: 19" in note for note in found.notes)
    split = make_splits(found, (0.6, 0.2, 0.2))
    for patient in set(split.patients):
        assert len({s for s, p in zip(split.splits, split.patients, strict=True) if p == patient}) == 1
    assert set(examples(found, 3)) <= {(r.source.rpartition("/")[2], r.patient) for r in found.records}


def test_in_archives_and_below_split_folders(nested, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(nested.rglob("*.png")):
            label, patient, _, name = path.relative_to(nested).parts
            split = {"0": "train", "1": "val"}.get(patient[-1], "test")
            archive.write(path, f"wrapper/{split}/{label}/{patient}/{name}")
    found = open_dataset(tmp_path / "set.zip", patients="folder")
    assert {"p1", "p20"} <= set(found.patients) and all(p.startswith("p") for p in found.patients)


def test_a_column_tells_the_patient(nested, tmp_path):
    rows = ["image;Case;age"]
    for path in sorted(nested.rglob("*.png")):
        rows.append(f"{path.name};{'' if path.name == 'ill3_0.png' else path.name[-7:-5]};40")
    table = tmp_path / "about.csv"
    table.write_text("\n".join(rows))
    assert table_columns(table) == ["image", "Case", "age"]
    found = open_dataset(nested, patients=f"{table}:case")
    assert found.patients.count(None) == 1 and len(set(found.patients)) > 5
    assert any("1 images without one" in note for note in found.notes)


def test_rules_that_find_nothing_are_refused(nested, tmp_path):
    flat = tmp_path / "flat"
    for label in ("a", "b"):
        (flat / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(flat / label / "1.png")
    with pytest.raises(DatasetError, match="no image lies in a folder below"):
        open_dataset(flat, patients="folder")
    table = tmp_path / "t.csv"
    table.write_text("image,who\nill0_0.png,\n")
    for rule, message in (
        (f"{table}:what", "no column 'what'"),
        (f"{table}:who", "the column is empty"),
        ("missing.csv:who", "give 'folder'"),
        ("everyone", "give 'folder'"),
    ):
        with pytest.raises(DatasetError, match=message):
            with_patients(open_dataset(nested), rule)
    with pytest.raises(DatasetError, match="leave one out"):
        open_dataset(nested, patients="folder", patient_pattern="p")
