"""Labelled images as people hand them over: zips and loose files, with and without a table."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from medmamba.data import DatasetError, open_labelled
from medmamba.data.metadata import group_columns


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def packed(tmp_path, files: dict[str, str | int], name="set.zip"):
    """A zip of pictures (a number) and texts."""
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for path, content in files.items():
            if isinstance(content, str):
                archive.writestr(path, content)
            else:
                picture(tmp_path / "one.png", content)
                archive.write(tmp_path / "one.png", path)
    return tmp_path / name


def opened(path, tmp_path, table=None):
    (tmp_path / "work").mkdir(exist_ok=True)
    return open_labelled(path, table, folder=tmp_path / "work")


def test_class_folders(tmp_path):
    found = opened(packed(tmp_path, {"a/1.png": 1, "b/2.png": 2}), tmp_path)
    assert found.index.classes == ("a", "b") and found.table is None and found.columns == ()
    only = opened(packed(tmp_path, {"a/1.png": 1}), tmp_path)
    assert only.index.classes == ("a",), "a part of a larger set"


def test_a_table_in_the_zip_says_the_labels(tmp_path):
    rows = "path,label,sex,patient,id\n" + "".join(f"{i}.png,{'ab'[i % 2]},{'mf'[i // 2]},p{i},{i}\n" for i in range(4))
    found = opened(packed(tmp_path, {**{f"images/{i}.png": i for i in range(4)}, "images/t.csv": rows}), tmp_path)
    assert found.index.classes == ("a", "b") and found.columns == ("sex",)
    assert found.index.patients == ["p0", "p1", "p2", "p3"]
    assert [round(255 * found.index.image(i).pixels.max()) for i in range(4)] == [0, 1, 2, 3]
    assert "labels are those in t.csv" in found.index.notes


def test_metadata_beside_class_folders_only_describes(tmp_path):
    rows = "image,diagnosis,age\n1.png,x,30\n2.png,y,40\n"
    files = {"a/1.png": 1, "b/2.png": 2, "metadata.csv": rows}
    found = opened(packed(tmp_path, files), tmp_path)
    assert found.index.classes == ("a", "b") and found.columns == ("age",)


def test_loose_images_with_a_table_that_names_folders(tmp_path):
    for i in range(2):
        picture(tmp_path / "given" / f"{i}.png", i)
    (tmp_path / "t.csv").write_text("path,label\nC:\\scans\\0.png,a\nscans/1.png,b\n")
    found = opened(tmp_path / "given", tmp_path, tmp_path / "t.csv")
    assert [r.source for r in found.index.records] == ["0.png", "1.png"]
    assert any("found by their file name" in note for note in found.index.notes)


def test_a_column_for_each_class(tmp_path):
    rows = "path,a,b\n1.png,1,1\n2.png,0,1\n"
    found = opened(packed(tmp_path, {"1.png": 1, "2.png": 2, "t.csv": rows}), tmp_path)
    assert found.index.task == "multilabel" and found.index.labels.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": 1, "2.png": 2}, "none of them in a class folder"),
        ({"a/1.png": 1, "t.csv": "path,label\n9.png,a\n"}, "do not exist"),
        ({"a/1.png": 1, "b/1.png": 1, "t.csv": "path,label\nc/1.png,a\n"}, "several files have this name"),
        ({"a/1.png": 1, "t.csv": "x", "u.csv": "y"}, "leave one table"),
        ({"../1.png": 1, "t.csv": "path,label\n1.png,a\n"}, "leads out of the archive"),
    ],
)
def test_what_cannot_be_used(tmp_path, files, message):
    with pytest.raises(DatasetError, match=message):
        opened(packed(tmp_path, files), tmp_path)


def test_loose_images_need_labels(tmp_path):
    picture(tmp_path / "given" / "1.png")
    with pytest.raises(DatasetError, match="no labels; add a CSV file"):
        opened(tmp_path / "given", tmp_path)


def test_columns_that_are_groups(tmp_path):
    rows = "path,label,site,name,same\n" + "".join(f"{i}.png,{'ab'[i % 2]},{'xy'[i % 2]},n{i},1\n" for i in range(30))
    (tmp_path / "t.csv").write_text(rows)
    for i in range(30):
        picture(tmp_path / f"{i}.png")
    found = opened(tmp_path, tmp_path, tmp_path / "t.csv")
    assert group_columns(tmp_path / "t.csv", found.index) == ["site"], "neither 30 names nor one value"
