"""Columns of a CSV file as groups of images."""

import pytest

from medmamba.data import DatasetError, ImageDataset, Record
from medmamba.data.metadata import metadata_file, read_columns


def dataset(*sources):
    return ImageDataset([Record(source, 0) for source in sources], ["a"], reader=None)


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


IMAGES = dataset("test/a/one.webp", "test/a/two.webp", "test/b/three.webp", "test/b/four.webp")


def test_images_are_found_by_their_names(tmp_path):
    file = table(tmp_path / "m.csv", "img_id,patient,sex\none.png,7,F\ntwo.png,7,f\nthree.png,8,M\n")
    found = read_columns(file, IMAGES, ["SEX"])
    assert found.values["SEX"] == ("F", "F", "M", None)  # spelt in two ways; no row for the fourth
    assert any("'img_id' names 3 of 4 images" in note for note in found.notes)
    assert any("four.webp" in note for note in found.notes)
    assert any("one group" in note for note in found.notes)


def test_numbers_are_divided_at_their_quartiles_or_as_given(tmp_path):
    images = dataset(*(f"{i}.png" for i in range(40)))
    rows = "".join(f"{i}.png,{i + 20 if i else 'NA'}\n" for i in range(40))
    file = table(tmp_path / "m.csv", "file,age\n" + rows)
    found = read_columns(file, images, ["age"])
    assert found.values["age"][0] is None
    assert sorted(set(found.values["age"][1:])) == ["30 to below 40", "40 to below 50", "50 and above", "below 30"]
    assert any("divided at 30, 40, 50 (the quartiles" in note for note in found.notes)
    assert any("missing for 1 of 40" in note for note in found.notes)
    given = read_columns(file, images, ["age"], {"age": (45,)})
    assert given.values["age"][24:26] == ("below 45", "45 and above")  # 44 and 45 years


def test_few_numbers_are_codes(tmp_path):
    file = table(tmp_path / "m.csv", "path,skin\ntest/a/one.webp,1.0\ntest/a/two.webp,2\ntest/b/three.webp,\n")
    assert read_columns(file, IMAGES, ["skin"]).values["skin"] == ("1", "2", None, None)


def test_what_cannot_be_groups_is_refused(tmp_path):
    file = table(tmp_path / "m.csv", "path,sex\ntest/a/one.webp,F\n")
    with pytest.raises(DatasetError, match="no column 'age'; the columns are path, sex"):
        read_columns(file, IMAGES, ["age"])
    with pytest.raises(DatasetError, match="to be cut at numbers and holds 'F'"):
        read_columns(file, IMAGES, ["sex"], {"sex": (1,)})
    with pytest.raises(DatasetError, match="must be ascending"):
        read_columns(table(tmp_path / "n.csv", "path,age\none.webp,3\n"), IMAGES, ["age"], {"age": (5, 4)})
    with pytest.raises(DatasetError, match="no column names the images"):
        read_columns(table(tmp_path / "o.csv", "path,age\nother.png,3\n"), IMAGES, ["age"])
    images = dataset(*(f"{i}.png" for i in range(30)))
    many = table(tmp_path / "p.csv", "path,who\n" + "".join(f"{i}.png,person {i}\n" for i in range(30)))
    with pytest.raises(DatasetError, match="30 different values, too many"):
        read_columns(many, images, ["who"])
    with pytest.raises(DatasetError, match="no file names"):
        read_columns(file, dataset(0, 1), ["sex"])


def test_two_rows_of_one_name_are_not_guessed(tmp_path):
    """The column of file names contradicts itself, that of paths does not."""
    images = dataset("a/1.png", "b/1.png")
    file = table(tmp_path / "m.csv", "name,path,sex\n1.png,a/1.png,F\n1.png,b/1.png,M\n")
    assert read_columns(file, images, ["sex"]).values["sex"] == ("F", "M")


def test_the_file_is_the_dataset_or_lies_in_it(tmp_path):
    file = table(tmp_path / "metadata.csv", "path,age\n")
    assert metadata_file(tmp_path) == file and metadata_file(file) == file
    with pytest.raises(DatasetError, match=r"metadata=\.\.\."):
        metadata_file(tmp_path / "elsewhere")
