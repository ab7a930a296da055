"""Folders, archives and tables that say something doubtful: it is refused with the reason, or said."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    order_classes,
    val_from_train,
)
from medmamba.imaging.load import ImageError

NFC, NFD = "caf\u00e9", "cafe\u0301"


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)).save(path, format="PNG")
    return path


def tree(root: Path, *paths: str) -> Path:
    for seed, path in enumerate(paths):
        save(root / path, seed)
    return root


def said(dataset) -> str:
    return "\n".join(dataset.notes)


def refuses(message: str, path: Path, **options) -> str:
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(path, **options)
    return str(caught.value)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_class_folder_without_images_does_not_vanish(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "c").mkdir()
    assert "class would vanish" in refuses("class folder 'c' holds no images,", tmp_path)
    (tmp_path / "c" / "v.nii").write_bytes(b"x")
    (tmp_path / "c" / "deep").mkdir()
    (tmp_path / "c" / "deep" / "w.NII").write_bytes(b"x")
    refuses(r"class folder 'c' holds no images \(2 \.nii\)", tmp_path)
    # Where the classes are known from elsewhere, none can vanish.
    assert "class folder 'c' holds no images" in said(open_dataset(tmp_path, classes=["a", "b"]))
    (tmp_path / "c").rename(tmp_path / ".c")
    assert open_dataset(tmp_path).classes == ("a", "b")


def test_a_class_of_subfolders_beside_one_without_images_is_no_outer_folder(tmp_path: Path) -> None:
    tree(tmp_path, "a/left/1.png", "a/right/2.png")
    (tmp_path / "b").mkdir()
    refuses("is folder 'b' a class[?] .* Give the path of 'a'", tmp_path)
    (tmp_path / "b" / "v.nii").write_bytes(b"x")
    refuses("is folder 'b' a class", tmp_path)
    assert open_dataset(tmp_path / "a").classes == ("left", "right")


def test_an_empty_class_in_one_split_is_said_and_in_all_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    (tmp_path / "val" / "b").mkdir()
    assert "class folder 'val/b' holds no images" in said(open_dataset(tmp_path))
    (tmp_path / "val" / "c").mkdir()
    refuses("class folder 'val/c' holds no images", tmp_path)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    tree(tmp_path, "set/a/1.png", "set/b/2.png", "set/a/.3.png")
    (tmp_path / "set" / "a" / "notes.txt").write_text("text")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("text")
    text = said(open_dataset(tmp_path))
    assert "passed over 3 files: 1 .md, 1 .txt, 1 hidden" in text
    assert "below 'set', the folder that holds all images" in text and "folders 'docs' beside it" in text
    save(tmp_path / "set" / "preview.png")
    (tmp_path / "set" / "labels.csv").write_text("path,label\n")
    text = said(open_dataset(tmp_path / "set"))
    assert "1 images beside the class folders have no label and are not used, such as 'preview.png'" in text
    assert "'labels.csv' beside the folders not used" in text


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), ("cat", "cat "), ("cat", "cat\u200b")])
def test_class_folders_that_look_the_same(tmp_path: Path, one: str, other: str) -> None:
    tree(tmp_path / "side", f"{one}/1.png", f"{other}/2.png", "dog/3.png")
    refuses("differ in their Unicode form or outer spaces alone", tmp_path / "side")
    tree(tmp_path / "splits", f"train/{one}/1.png", "train/dog/2.png", f"val/{other}/3.png", "val/dog/4.png")
    dataset = open_dataset(tmp_path / "splits")
    assert dataset.classes == tuple(sorted((one, "dog"))) and "count as one class" in said(dataset)
    assert dataset[3][0].shape == (1, 6, 5)  # files are opened by the names they have


def test_doubtful_class_names_are_said_or_refused(tmp_path: Path) -> None:
    assert "'Benign', 'benign' differ in case" in said(
        open_dataset(tree(tmp_path / "a", "Benign/1.png", "benign/2.png"))
    )
    assert "'nan' reads like a missing label" in said(open_dataset(tree(tmp_path / "b", "nan/1.png", "x/2.png")))
    assert said(open_dataset(tree(tmp_path / "c", "ER+/1.png", "ER-/2.png"))) == ""
    refuses("'01', '1' spell the same number", tree(tmp_path / "d", "1/1.png", "01/2.png"))
    refuses("'1', '1.0' spell the same number", tree(tmp_path / "e", "1/1.png", "1.0/2.png"))
    assert order_classes(["2", "10"]) == ("2", "10")


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_class_folder_that_is_not_utf8(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", os.fsdecode(b"caf\xe9") + "/2.png")
    refuses(r"'caf\\udce9' is not UTF-8", tmp_path)


def test_split_folders(tmp_path: Path) -> None:
    names = [f"{split}/{c}/{i}.png" for i, split in enumerate(("train", "Training", "test")) for c in "ab"]
    refuses("folders 'Training', 'train' would all be train", tree(tmp_path / "x", *names))
    inside = tree(tmp_path / "y", *[f"{c}/{split}/1.png" for c in "ab" for split in ("train", "test")])
    refuses(r"splits are inside the class folders \(a/test\)", inside)


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    refuses("1 folders cannot be opened, such as 'c'", tmp_path)


def test_one_class_alone(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "a/2.png")
    refuses("only one class folder .a..*dataset=NAME .--dataset", tmp_path)
    assert open_dataset(tmp_path, single_class=True).classes == ("a",)


# ---- patients and options -------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, *[f"{'ab'[i % 2]}/pb{i:02d}_{k}.png" for i in range(10) for k in range(2)])
    text = refuses("matches none of the 20 file names, such as 'pb00_0.png'", tmp_path, patient_pattern=r"^(P\w\d+)_")
    assert "but 20 regardless of case: begin it with (?i)" in text
    refuses("matches none", tmp_path, patient_pattern=r"^a/(pb)")  # the name without its folders
    refuses("patient_pattern is empty", tmp_path, patient_pattern="")
    refuses("matches none", tmp_path, patient_pattern=r"(x?)")  # matches, but never a character
    dataset = open_dataset(tmp_path, patient_pattern=r"(?i)^(P\w\d+)_")
    assert "patient_pattern matches 20 of 20 file names: 10 patients" in said(dataset)
    partly = open_dataset(tmp_path, patient_pattern=r"^(pb0[0-4])_")
    assert "10 of 20 file names: 5 patients; 10 images without one count as a patient each" in said(partly)


def test_a_pattern_of_the_registry_without_effect_is_said(tmp_path: Path) -> None:
    dataset = open_dataset(tree(tmp_path, "bcc/1.png", "mel/2.png"), dataset="dermamnist")
    assert "the pattern of dermamnist" in said(dataset) and "patients are unknown" in said(dataset)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    refuses("patient_pattern has no effect", tmp_path / "x.npz", patient_pattern="(p)")
    refuses("class_order has no effect", tmp_path / "x.npz", class_order="alphabetical")
    folder = tree(tmp_path / "f", "a/1.png", "b/2.png")
    refuses("class_order='numeric' has no effect", folder, classes=["a", "b"], class_order="numeric")
    table = csv(tmp_path, "path,label,patient\n0.png,a,p1\n1.png,b,p2\n")
    refuses("column of patients, 'patient'", table, patient_pattern=r"(\d)")


# ---- archives -------------------------------------------------------------------------------------------------------


def pack(
    path: Path, *names: str, system: int = 3, flag: int | None = None, raw: dict[str, bytes] | None = None
) -> Path:
    """A zip whose members are pictures; `flag` 0 takes the mark of UTF-8 away."""
    picture = save(path.parent / "one.png").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.filename = name  # the constructor would replace separators of this system
            info.create_system = system
            archive.writestr(info, b"" if name.endswith(("/", "\\")) else picture)
        for name, content in (raw or {}).items():
            archive.writestr(name, content)
    if flag is not None:
        content = bytearray(path.read_bytes())
        for magic, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
            at = content.find(magic)
            while at >= 0:
                content[at + offset + 1] &= 0xF7
                at = content.find(magic, at + 4)
        path.write_bytes(content)
    return path


def test_a_zip_of_windows_powershell(tmp_path: Path) -> None:
    plain = pack(tmp_path / "x.zip", "a\\0.png", "a\\1.png", "b\\2.png")
    dataset = open_dataset(plain)
    assert dataset.classes == ("a", "b") and [r.source for r in dataset.records] == ["a/0.png", "a/1.png", "b/2.png"]
    assert "separates folders by backslashes" in said(dataset) and dataset[2][0].shape == (1, 6, 5)
    nested = open_dataset(pack(tmp_path / "y.zip", "set\\", "set\\train\\a\\0.png", "set\\train\\b\\1.png", system=0))
    assert nested.split_sizes == {"train": 2} and nested.classes == ("a", "b")
    mixed = open_dataset(pack(tmp_path / "m.zip", "a/0.png", "b\\1.png", system=0))
    assert mixed.classes == ("a", "b")
    refuses("is in the archive twice", pack(tmp_path / "t.zip", "a/0.png", "a\\0.png", "b\\1.png", system=0))
    # On other systems a backslash may be part of a name.
    assert open_dataset(pack(tmp_path / "u.zip", "a/x\\0.png", "b/1.png")).records[0].source == "a/x\\0.png"


def test_zip_names_that_are_not_marked_as_utf8(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", f"{NFD}/1.png", "the/2.png", flag=0)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[0] != f"{NFD}/1.png"  # as zipfile reads it
    dataset = open_dataset(path)
    assert dataset.classes == (NFC, "the") and dataset[0][0].shape == (1, 6, 5)


def test_zip_with_empty_classes_and_names_that_differ_little(tmp_path: Path) -> None:
    refuses("class folder 'c' holds no images", pack(tmp_path / "e.zip", "a/1.png", "b/2.png", "c/"))
    mixed = pack(tmp_path / "u.zip", "a/1.png", "b/2.png", raw={"c/x.nii": b"x"})
    refuses(r"class folder 'c' holds no images \(1 \.nii\)", mixed)
    assert len(open_dataset(pack(tmp_path / "case.zip", "a/1.png", "a/1.PNG", "b/2.png"))) == 3
    refuses("Unicode form", pack(tmp_path / "n.zip", f"{NFC}/1.png", f"{NFD}/2.png", "b/3.png"))


def test_zip_takes_images_without_a_suffix_and_counts_the_rest(tmp_path: Path) -> None:
    raw = {"a/notes.txt": b"text", "__MACOSX/a/._1": b"x", "a/.hidden.png": b"x"}
    dataset = open_dataset(pack(tmp_path / "x.zip", "a/1.2.840.1", "b/IM1", "b/x.IMA", raw=raw))
    assert len(dataset) == 3 and dataset[1][0].shape == (1, 6, 5)
    assert "passed over 3 files: 1 .txt, 1 hidden, 1 of the operating system" in said(dataset)


@pytest.mark.parametrize("name", ["//a/1.png", "\\\\server\\a\\1.png", "a\\..\\..\\1.png", "C:\\a\\1.png", "/a/1.png"])
def test_zip_paths_that_lead_out(tmp_path: Path, name: str) -> None:
    refuses("leads out of the archive", pack(tmp_path / "x.zip", "a\\0.png", "b\\1.png", name, system=0))


def test_zip_members_that_cannot_be_unpacked(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", "a/1.png", "b/2.png")
    content = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        content[content.find(magic) + offset] = 9
    (tmp_path / "deflate64.zip").write_bytes(content)
    refuses("method 9.*Deflate64", tmp_path / "deflate64.zip")
    content = bytearray(path.read_bytes())
    content[content.find(b"IDAT") + 8] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(content)
    with pytest.raises(ImageError, match=r"'a/1\.png' is damaged .*CRC"):
        open_dataset(tmp_path / "flipped.zip")[0]
    with pytest.raises(ImageError, match=r"b/2\.png: "):  # an image that is none is named by its path
        open_dataset(pack(tmp_path / "bad.zip", "a/1.png", raw={"b/2.png": b"text"}))[1]


def test_zip_that_is_encrypted(tmp_path: Path) -> None:
    content = bytearray(pack(tmp_path / "x.zip", "a/1.png", "b/2.png").read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    refuses("'a/1.png' is encrypted; unpack the archive first", tmp_path / "locked.zip")


def test_the_app_says_what_it_passed_over_and_where_val_comes_from(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from demo.jobs import plan
    from demo.options import Limits
    from demo.tabs.finetune import set_html

    names = [f"{split}\\{c}\\{i}.IMA" for split in ("train", "test") for c in "ab" for i in range(8)]
    found = plan(pack(tmp_path / "x.zip", *names, raw={"train\\a\\notes.txt": b"text"}), Limits())
    assert found.index.split_sizes == {"train": 14, "val": 2, "test": 16}
    text = str(set_html(found))
    assert "passed over 1 file: 1 .txt" in text and "val taken from train, the rest as in the folders" in text


# ---- tables ---------------------------------------------------------------------------------------------------------


def csv(root: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    for i in range(4):
        save(root / f"{i}.png", i)
    save(root / "class" / "0.png")
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return root / name


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


# ---- splits and contradictions --------------------------------------------------------------------------------------


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


# ---- arrays ---------------------------------------------------------------------------------------------------------

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
