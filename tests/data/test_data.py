"""Readers, splits, leakage checks, dataset checks and the cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import picture, save, tree

from medmamba import data
from medmamba.data import DatasetError, open_dataset, registry
from medmamba.imaging.load import ImageError

# --- folders --------------------------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path: Path) -> None:
    root = tree(tmp_path, ["b/2.png", "a/x.png", "b/1.png", "a/notes.txt.png", ".git/c.png", "preview.png"])
    (root / "a" / "Thumbs.db").write_bytes(b"junk")
    dataset = open_dataset(root)
    assert dataset.classes == ("a", "b") and dataset.task == "multiclass"
    assert [record.source for record in dataset.records] == ["a/notes.txt.png", "a/x.png", "b/1.png", "b/2.png"]
    assert dataset.labels.tolist() == [0, 0, 1, 1] and dataset.split_sizes == {None: 4}
    image, label = dataset[3]
    assert image.dtype == torch.float32 and image.shape == (3, 12, 10) and label.item() == 1
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), picture(0) / 255, atol=1e-6)


def test_folder_of_splits(tmp_path: Path) -> None:
    names = ["train/a/1.png", "train/b/2.png", "valid/a/3.png", "Test/b/4.png", "train/c/5.png"]
    dataset = open_dataset(tree(tmp_path, names))
    assert dataset.classes == ("a", "b", "c")  # test and val lack some
    assert dataset.split_sizes == {"train": 3, "val": 1, "test": 1}
    assert [r.source for r in dataset.split("val").records] == ["valid/a/3.png"]
    assert len(open_dataset(tmp_path, "train")) == 3
    with pytest.raises(DatasetError, match="no split 'holdout'"):
        dataset.split("holdout")


def test_outer_folders_of_a_download_are_seen_through(tmp_path: Path) -> None:
    dataset = open_dataset(tree(tmp_path, ["kvasir/data/polyps/1.png", "kvasir/data/normal/2.png"]))
    assert dataset.classes == ("normal", "polyps")


def test_patients_from_file_names(tmp_path: Path) -> None:
    root = tree(tmp_path, ["a/p1_x.png", "a/p1_y.png", "b/p22_x.png", "b/other.png"])
    dataset = open_dataset(root, patient_pattern=r"^(p\d+)_")
    assert dataset.patients == ["p1", "p1", None, "p22"]
    with pytest.raises(DatasetError, match="not a regular expression"):
        open_dataset(root, patient_pattern="(")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["1.png", "2.png"], "2 images, none of them in a class folder"),
        ([], "0 images"),
        (["train/a/1.png", "train/b/1.png", "extra/a/2.png"], "extra do not"),
        (["images/1.png", "images/2.png"], "only one class folder .images."),
    ],
)
def test_folders_that_make_no_dataset(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(tree(tmp_path, paths))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, ["a/1.png", "b/2.png"])
    (root / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ImageError, match=r"a/1\.png"):
        open_dataset(root)[0]


def test_link_loops_end(tmp_path: Path) -> None:
    root = tree(tmp_path, ["a/1.png", "b/2.png"])
    (root / "a" / "again").symlink_to(root)
    assert len(open_dataset(root)) == 2


# --- order of classes -----------------------------------------------------------------------------------------------


def test_numeric_folders_and_the_alphabetical_trap(tmp_path: Path) -> None:
    root = tree(tmp_path, [f"{i}/x.png" for i in range(12)])
    assert open_dataset(root).classes == tuple(str(i) for i in range(12))
    trap = open_dataset(root, class_order="alphabetical")
    assert trap.classes == ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
    # The permutation says which official label each output of a model trained that way stands for.
    assert data.alphabetical_permutation(12) == tuple(int(name) for name in trap.classes)
    assert data.alphabetical_permutation(11) == (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)
    assert data.alphabetical_permutation(10) == tuple(range(10))
    official = open_dataset(root)
    by_source = {r.source: r.label for r in official.records}
    permutation = data.alphabetical_permutation(12)
    assert all(permutation[r.label] == by_source[r.source] for r in trap.records)
    organs = tree(tmp_path / "organs", [f"{i}/x.png" for i in range(11)])
    assert open_dataset(organs, dataset="organamnist").labels.tolist() == list(range(11))
    assert open_dataset(organs, dataset="organamnist").records[10].source == "10/x.png"
    with pytest.raises(DatasetError, match="one is 'x'"):
        data.order_classes(["1", "x"], "numeric")
    with pytest.raises(DatasetError, match="class_order must be"):
        data.order_classes(["1"], "random")


def test_registry_fixes_the_order_whatever_the_folders_are_called(tmp_path: Path) -> None:
    names = ["melanocytic_nevi", "melanoma", "actinic_keratoses", "bcc", "benign_keratosis", "df", "vascular lesions"]
    dataset = open_dataset(
        tree(tmp_path, [f"{name}/HAM_1-{i}.png" for i, name in enumerate(names)]), dataset="dermamnist"
    )
    assert dataset.classes == registry.get("dermamnist").classes
    assert {str(r.source).split("/")[0]: r.label for r in dataset.records} == {
        "actinic_keratoses": 0, "bcc": 1, "benign_keratosis": 2, "df": 3, "melanoma": 4, "melanocytic_nevi": 5,
        "vascular lesions": 6,
    }  # fmt: skip
    assert set(dataset.patients) == {"HAM_1"}  # the registry's pattern
    (tmp_path / "wart").mkdir()
    save(tmp_path / "wart" / "1.png", 1)
    with pytest.raises(DatasetError, match="'wart' is not among dataset dermamnist"):
        open_dataset(tmp_path, dataset="dermamnist")


def test_two_folders_of_the_same_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="mean the same class"):
        open_dataset(tree(tmp_path, ["COVID/1.png", "covid19/2.png", "normal/3.png"]), dataset="cpn-xray")


def test_classes_given(tmp_path: Path) -> None:
    root = tree(tmp_path, ["a/1.png", "b/2.png"])
    assert open_dataset(root, classes=["b", "never", "a"]).labels.tolist() == [0, 2]
    with pytest.raises(DatasetError, match="'a' is not among the classes given"):
        open_dataset(root, classes=["b", "c"])


# --- CSV ------------------------------------------------------------------------------------------------------------


def csv(root: Path, text: str) -> Path:
    for seed in range(4):
        save(root / "img" / f"{seed}.png", seed)
    path = root / "labels.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_csv(tmp_path: Path) -> None:
    text = "Path,Label,patient_id,split\nimg/0.png,cat,p1,train\nimg/1.png,dog,p2,valid\nimg/2.png,cat,,\n"
    dataset = open_dataset(csv(tmp_path, text))
    assert dataset.classes == ("cat", "dog") and dataset.labels.tolist() == [0, 1, 0]
    assert dataset.patients == ["p1", "p2", None] and dataset.splits == ["train", "val", None]
    assert dataset[1][0].shape == (3, 12, 10)


def test_csv_is_found_in_its_folder_only_if_nothing_else_is_meant(tmp_path: Path) -> None:
    csv(tmp_path, "path,label\nimg/0.png,cat\nimg/1.png,dog\n")
    with pytest.raises(DatasetError, match="give its path"):
        open_dataset(tmp_path)
    flat = tmp_path / "flat"
    save(flat / "0.png", 0)
    save(flat / "1.png", 1)
    (flat / "list.csv").write_text("path;label\n0.png;cat\n1.png;dog\n")  # semicolons as spreadsheets write them
    assert open_dataset(flat).labels.tolist() == [0, 1]


def test_csv_with_several_labels(tmp_path: Path) -> None:
    path = csv(tmp_path, "path,labels\nimg/0.png,mass; edema\nimg/1.png,\nimg/2.png,edema\n")
    dataset = open_dataset(path)
    assert dataset.task == "multilabel" and dataset.classes == ("edema", "mass")
    assert dataset.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert dataset[0][1].dtype == torch.float32 and dataset.class_counts.tolist() == [2, 1]


def test_csv_with_a_column_per_class(tmp_path: Path) -> None:
    dataset = open_dataset(
        csv(tmp_path, "path,split,mass,edema\nimg/0.png,train,1,0\nimg/1.png,test,0,0\nimg/2.png,val,1,1.0\n")
    )
    assert dataset.task == "multilabel" and dataset.classes == ("mass", "edema")
    assert dataset.labels.tolist() == [[1, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimg/9.png,cat\nimg/0.png,dog\n", r"1 of 2 images do not exist .*img/9\.png"),
        ("picture,label\nimg/0.png,cat\n", "no column 'path' .columns: picture, label."),
        ("path\nimg/0.png\n", "no column 'label'"),
        ("path,label\nimg/0.png,\nimg/1.png,dog\n", "line 2: no label"),
        ("path,label,split\nimg/0.png,cat,trian\n", "line 2: split 'trian'"),
        ("path,label\n", "no rows"),
        ("path,label\nimg/0.png,cat,extra\n", "line 2: more fields"),
        ("path,mass\nimg/0.png,yes\n", "column 'mass' holds 'yes'"),
        ("path,label\nimg/0.png,cat\nimg/0.png,dog\n", "more than once"),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(csv(tmp_path, text))
