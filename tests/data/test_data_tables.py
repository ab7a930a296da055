"""Tables, splits and arrays as users bring them: read, or refused with the reason."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_input import NFC, NFD, csv, refuses, said, save, tree

from medmamba import cli, create_model
from medmamba.data import (
    SPLITS,
    DatasetError,
    ImageDataset,
    LeakageError,
    Record,
    check_leakage,
    find_leakage,
    make_splits,
    open_csv,
    open_dataset,
    val_from_train,
)

# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["", "nan", "NaN", "None", "NA", "N/A", "null", "-", "?", "<NA>", "#N/A", " "])
def test_missing_labels_are_refused_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    path = csv(tmp_path, f"path,label\n0.png,a\n1.png,b\n2.png,{spelling}\n3.png,{spelling}\n")
    text = refuses(r"line 4: no label; 2 of 4 rows have none", path)
    assert "lines 4, 5" in text and "'no finding'" in text and "classes=[...]" in text


def test_a_missing_label_can_be_kept_as_a_class(tmp_path: Path) -> None:
    path = csv(tmp_path, "path,label\n0.png,a\n1.png,None\n")
    dataset = open_dataset(path, classes=["None", "a"])
    assert dataset.labels.tolist() == [1, 0] and "'None' reads like a missing label" in said(dataset)
    refuses("line 3: no label", csv(tmp_path, "path,label\n0.png,a;b\n1.png,nan\n2.png,\n"))
    assert open_dataset(csv(tmp_path, "path,label\n0.png,a;b\n2.png,\n")).labels.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    "cell", ["a|b", '"[""a"",""b""]"', "\"['a', 'b']\"", '"{a,b}"', '"a,b"', "a/b", "a+b", "a and b"]
)
def test_several_labels_in_one_cell(tmp_path: Path, cell: str) -> None:
    path = csv(tmp_path, f"path,label\n0.png,a\n1.png,b\n2.png,{cell}\n")
    assert "A;B" in refuses("line 4: .* looks like several labels in one cell", path)


def test_labels_that_only_look_like_several(tmp_path: Path) -> None:
    path = csv(tmp_path, 'path,label\n0.png,"normal, benign"\n1.png,ER+\n2.png,ER-\n3.png,and\n')
    dataset = open_dataset(path)
    assert dataset.classes == ("ER+", "ER-", "and", "normal, benign") and dataset.task == "multiclass"
    assert open_dataset(csv(tmp_path, "path,label\n0.png,a|b\n1.png,c\n"), classes=["a|b", "c"]).classes == ("a|b", "c")
    doubtful = csv(tmp_path, "path,label\n0.png,a/b\n1.png,b/c\n2.png,a/c\n")
    assert "'a/b', 'a/c', 'b/c' count as classes of their own" in said(open_dataset(doubtful))
    # One label with the separator behind it is one label, and the same label twice too.
    single = open_dataset(csv(tmp_path, "path,label\n0.png,a;\n1.png,b;b\n"))
    assert single.task == "multiclass" and single.labels.tolist() == [0, 1]
    multi = open_dataset(csv(tmp_path, "path,label\n0.png,a;b\n1.png,b\n"))
    assert "1 of 2 rows have several labels" in said(multi)


def test_labels_spelt_in_two_ways(tmp_path: Path) -> None:
    refuses("'1', '1.0' spell the same number", csv(tmp_path, "path,label\n0.png,1\n1.png,1.0\n2.png,0\n"))
    assert open_dataset(csv(tmp_path, f"path,label\n0.png,{NFC}\n1.png,{NFD}\n2.png,x \n")).classes == (NFC, "x")
    assert "'Cat', 'cat' differ in case" in said(open_dataset(csv(tmp_path, "path,label\n0.png,Cat\n1.png,cat\n")))


@pytest.mark.parametrize("other", ["0.png", "./0.png", "class/../0.png", "class\\..\\0.png"])
def test_contradicting_rows(tmp_path: Path, other: str) -> None:
    refuses(r"lines 2 and 4: .*as 'a' and as 'b'", csv(tmp_path, f"path,label\n0.png,a\n1.png,b\n{other},b\n"))
    refuses(r"lines 2 and 3: .*with the same label", csv(tmp_path, f"path,label\n0.png,a\n{other},a\n1.png,b\n"))


def test_paths_of_windows(tmp_path: Path) -> None:
    dataset = open_dataset(csv(tmp_path, "path,label\nclass\\0.png,a\n.\\1.png,b\n"))
    assert [r.source for r in dataset.records] == ["class/0.png", "1.png"]
    assert "2 paths hold backslashes" in said(dataset) and dataset[0][0].shape == (1, 6, 5)
    refuses("absolute paths of a Windows computer", csv(tmp_path, "path,label\nC:\\data\\0.png,a\n1.png,b\n"))
    save(tmp_path / "odd\\name.png")  # a name that holds one goes first
    assert open_dataset(csv(tmp_path, "path,label\nodd\\name.png,a\n1.png,b\n")).records[0].source == "odd\\name.png"


def test_paths_that_nearly_exist(tmp_path: Path) -> None:
    refuses("there is '0.png', which differs in upper", csv(tmp_path, "path,label\n0.PNG,a\n1.png,b\n"))
    refuses("there is '0.png': write the suffix", csv(tmp_path, "path,label\n0,a\n1.png,b\n"))
    refuses("line 3: no path", csv(tmp_path, "path,label\n0.png,a\n,b\n"))
    save(tmp_path / f"{NFD}.png")
    dataset = open_dataset(csv(tmp_path, f"path,label\n{NFC}.png,a\n1.png,b\n"))
    assert "another Unicode form" in said(dataset) and dataset[0][0].shape == (1, 6, 5)


TEXT = 'path;label;note\n0.png;a;"1, 2\n3"\n\n1.png;b;é\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_encodings_and_delimiters(tmp_path: Path, encoding: str, delimiter: str) -> None:
    bom = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    path = csv(tmp_path, (bom + TEXT.replace(";", delimiter)).encode(encoding))
    assert open_dataset(path).classes == ("a", "b")
    with pytest.raises(DatasetError, match="line 5: split 'x'"):  # counted in lines of the file
        open_dataset(csv(tmp_path, TEXT.replace("note", "note;split").replace('3"', '3";train').replace("é", "é;x")))


def test_headers(tmp_path: Path) -> None:
    assert open_dataset(csv(tmp_path, "sep=;\npath;label, of it;label\n0.png;x;a\n1.png;y;b\n")).classes == ("a", "b")
    refuses("two columns are called 'label'", csv(tmp_path, "path,Label,label\n0.png,a,b\n"))
    both = open_dataset(csv(tmp_path, "image,path,diagnosis,label\nx,0.png,1,a\ny,1.png,2,b\n"))
    assert both.classes == ("a", "b") and "column 'path' is read as the path, not 'image'" in said(both)
    assert "column 'label' is read as the label, not 'diagnosis'" in said(both)
    index = open_dataset(csv(tmp_path, ",path,label,\n0,0.png,a,\n1,1.png,b,\n"))  # pandas' index, a spreadsheet's end
    assert index.classes == ("a", "b")
    marks = open_dataset(csv(tmp_path, ",path,mass,edema\n0,0.png,1,0\n1,1.png,0,1\n"))
    assert marks.classes == ("mass", "edema")


def test_other_files_called_csv(tmp_path: Path) -> None:
    refuses("line 2 is in another encoding", csv(tmp_path, "path,label\n0.png,café\n".encode("latin-1")))
    refuses("workbook", csv(tmp_path, b"PK\x03\x04" + bytes(100)))
    refuses("zero bytes", csv(tmp_path, "path,label\n0.png,a\n".encode("utf-16-le")))
    refuses("near line 2", csv(tmp_path, 'path,label\n0.png,"a"b\n'))
    assert len(open_csv(csv(tmp_path, "path\tlabel\n0.png\ta\n1.png\tb\n", "x.tsv"))) == 2
    assert len(open_dataset(tmp_path / "x.tsv")) == 2


def test_patients_and_splits_of_a_table(tmp_path: Path) -> None:
    rows = "0.png,a,P1,l,train\n1.png,b,nan,l,train\n2.png,a,p1,m,\n3.png,b,NA,m,test\n"
    dataset = open_dataset(csv(tmp_path, "path,label,patient_id,lesion_id,split\n" + rows))
    assert dataset.patients == ["P1", None, "p1", None]
    text = said(dataset)
    assert "1 'nan', 1 'NA' in column 'patient_id' mean no known patient" in text
    assert "patients 'P1', 'p1' count as 2" in text and "not 'lesion_id'" in text
    assert "1 of 4 rows have no split and are in none" in text


# --- splits and contradictions --------------------------------------------------------------------------------------


def indexed(labels: list[int], patients: list[str] | None = None, splits: list[str] | None = None) -> ImageDataset:
    names = patients or [None] * len(labels)
    places = splits or [None] * len(labels)
    rows = zip(labels, names, places, strict=True)
    records = [Record(str(i), label, split, patient) for i, (label, patient, split) in enumerate(rows)]
    return ImageDataset(records, ["a", "b"], None)  # type: ignore[arg-type]


def test_val_is_taken_from_train_by_patient_and_test_stays() -> None:
    labels = [i % 2 for i in range(240)]
    patients = [f"p{i // 4}" for i in range(240)]
    dataset = indexed(labels, patients, ["train"] * 200 + ["test"] * 40)
    found = val_from_train(dataset, seed=1)
    assert found.split_sizes == {"train": 176, "val": 24, "test": 40}  # an eighth, in whole patients of four
    assert [r.source for r in found.split("test").records] == [str(i) for i in range(200, 240)]
    assert not find_leakage(found, duplicates=False) and found.split("val").class_counts.tolist() == [12, 12]
    assert "24 of 200 training images were taken for it, by patient; test was not touched" in said(found)
    assert found.splits == val_from_train(dataset, seed=1).splits != val_from_train(dataset, seed=2).splits
    assert "patients are unknown" in said(val_from_train(indexed(labels, None, dataset.splits)))
    for splits in (["train"] * 239 + ["val"], ["test"] * 240):
        with pytest.raises(DatasetError, match="where there is a train and no val"):
            val_from_train(indexed(labels, patients, splits))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([None] * 4, r"no images in train and val; .*\(--split 0\.7,0\.1,0\.2\)"),
        (["val", "val", "test", "test"], "no images in train; it has only val, test. Name the split to train on"),
        (["train"] * 4, "no images in val; it has only train. Move part of train to a folder val"),
    ],
)
def test_missing_splits_come_with_advice_that_can_be_followed(splits: list[str], message: str) -> None:
    from medmamba.training.setup import check_splits

    with pytest.raises(DatasetError, match=message):
        check_splits(indexed([0, 1, 0, 1], None, splits))


def test_too_few_images_or_patients_for_a_split_are_told_apart() -> None:
    with pytest.raises(DatasetError, match=r"6 images are few for these .* val 0\.6, .*a class has only 3") as few:
        make_splits(indexed([0, 1] * 3), (0.7, 0.1, 0.2))
    assert "patients" not in str(few.value)
    fractions = tuple(map(float, re.search(r"\(([\d., ]+)\) would do", str(few.value))[1].split(",")))  # type: ignore[index]
    assert set(make_splits(indexed([0, 1] * 3), np.array(fractions) / sum(fractions)).splits) == set(SPLITS)
    patients = ["x"] * 60 + ["y"] * 60 + ["z"] * 3
    with pytest.raises(DatasetError, match="a few patients hold most images, up to 60 of 123"):
        make_splits(indexed([i % 2 for i in range(123)], patients), (0.7, 0.1, 0.2))


def test_the_same_image_under_two_classes_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, *[f"train/{c}/{i}.png" for c in "ab" for i in range(2)], "val/a/x.png", "val/b/y.png")
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/b/again.png")
    dataset = open_dataset(tmp_path)
    with pytest.raises(LeakageError, match=r"1 groups of identical images in one split have contradict") as it:
        check_leakage(dataset)
    assert "train/a/0.png (a) = train/b/again.png (b)" in str(it.value) and "--allow-leakage" in str(it.value)
    assert check_leakage(dataset, allow=["conflicts"]).conflicts
    shutil.move(tmp_path / "train/b/again.png", tmp_path / "train/a/again.png")  # the same label: harmless
    assert check_leakage(open_dataset(tmp_path)).repeats


def test_the_command_trains_on_train_and_test_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    tree(tmp_path / "d", *[f"{s}/{c}/p{i}_{c}.png" for s in ("train", "test") for c in "ab" for i in range(8)])
    for i, path in enumerate(sorted((tmp_path / "d" / "test").rglob("*.png"))):
        save(path, 100 + i)
        path.rename(path.with_name(f"q{path.name}"))
    (tmp_path / "d" / "train" / "a" / "notes.txt").write_text("text")
    command = ["train", "--data", str(tmp_path / "d"), "--out", str(tmp_path / "out"), "--variant", "test", "--quiet"]
    command += ["--size", "32", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    assert cli.main([*command, "--patient-pattern", r"^(p\d)_"]) == 0
    err = capsys.readouterr().err
    assert (
        "passed over 1 file: 1 .txt" in err and "no val: 2 of 16 training images were taken for it, by patient" in err
    )
    assert "16 of 32 file names: 8 patients" in err
    record = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert record["split"].startswith("val taken from train") and record["split_sizes"]["test"] == 16
    assert cli.main([*command[:-2], "--patient-pattern", "^(x)", "--restart"]) == 2
    assert "matches none of the 32 file names" in capsys.readouterr().err


def test_evaluation_of_one_class_folder_and_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    model = create_model("test", num_classes=2)
    model.config = model.config.replace(id2label={0: "a", 1: "b"})
    model.save_pretrained(tmp_path / "model")
    tree(tmp_path / "d", "a/1.png", "a/2.png")
    (tmp_path / "d" / "a" / "notes.txt").write_text("text")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--device", "cpu", "--quiet", "--resamples", "0"]
    assert cli.main([*command, "--data", str(tmp_path / "d")]) == 2
    assert "--split all" in capsys.readouterr().err
    assert cli.main([*command, "--data", str(tmp_path / "d"), "--split", "all"]) == 0
    assert "passed over 1 file: 1 .txt" in capsys.readouterr().err
    tree(tmp_path / "e", "other/1.png")
    assert cli.main([*command, "--data", str(tmp_path / "e"), "--split", "all"]) == 2
    assert "the model does not know other" in capsys.readouterr().err


# --- arrays ---------------------------------------------------------------------------------------------------------


PIXELS = np.zeros((4, 8, 8), np.uint8)


LABELS = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS.astype(np.int64), "labels": LABELS}, "images is of type int64"),
        ({"images": PIXELS.astype(np.complex64), "labels": LABELS}, "images is of type complex64"),
        ({"images": PIXELS.astype("U1"), "labels": LABELS}, "images is of type <U1"),
        ({"images": np.zeros((4, 3, 8, 8), np.uint8), "labels": LABELS}, r"channels first.*transpose\(0, 2, 3, 1\)"),
        ({"images": PIXELS.reshape(4, 64), "labels": LABELS}, "something else"),
        ({"images": PIXELS, "labels": LABELS.astype(float)}, "must be integers"),
        ({"images": PIXELS, "labels": LABELS.astype(object)}, "Python objects, which are refused"),
        ({"images": PIXELS.astype(object), "labels": LABELS}, "Python objects, which are refused"),
        ({"images": PIXELS, "labels": LABELS[:3]}, "4 images but 3 labels"),
        ({"images": PIXELS, "labels": LABELS - 1}, "label -1 of .* does not fit"),
        ({"images": PIXELS, "labels": LABELS * 10**9}, "a label is 1000000000, and classes are counted from 0"),
        (
            {"images": PIXELS, "labels": LABELS, "train_images": PIXELS, "train_labels": LABELS},
            "beside those of splits",
        ),
        ({"images": PIXELS}, "no array 'labels'"),
    ],
)
def test_arrays_that_are_no_dataset(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refuses(message, tmp_path / "x.npz")


def test_arrays_that_are_doubtful(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=LABELS * 2, ages=LABELS)
    text = said(open_dataset(tmp_path / "x.npz"))
    assert "arrays 'ages' are not used" in text and "no image has the class '1'" in text
    np.savez(tmp_path / "y.npz", images=PIXELS, labels=np.eye(2, dtype=int)[LABELS])
    assert "exactly one class, and counts as a multi-label task" in said(open_dataset(tmp_path / "y.npz"))
    np.savez(tmp_path / "bloodmnist.npz", images=PIXELS, labels=LABELS)
    assert "classes are named as those of BloodMNIST" in said(open_dataset(tmp_path / "bloodmnist.npz"))
    np.savez(tmp_path / "bloodmnist_of_mine.npz", images=PIXELS, labels=LABELS)  # another set, as its name says
    assert open_dataset(tmp_path / "bloodmnist_of_mine.npz").classes == ("0", "1")
