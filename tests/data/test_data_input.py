"""Folders, archives and tables that say something doubtful: it is refused with the reason, or said."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_input import NFC, NFD, csv, refuses, said, save, tree

from medmamba.data import (
    open_dataset,
    order_classes,
)
from medmamba.imaging.load import ImageError

# --- folders --------------------------------------------------------------------------------------------------------


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


# --- patients and options -------------------------------------------------------------------------------------------


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


# --- archives -------------------------------------------------------------------------------------------------------


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
    from demo.tabs.patients import set_html

    names = [f"{split}\\{c}\\{i}.IMA" for split in ("train", "test") for c in "ab" for i in range(8)]
    found = plan(pack(tmp_path / "x.zip", *names, raw={"train\\a\\notes.txt": b"text"}), Limits())
    assert found.index.split_sizes == {"train": 14, "val": 2, "test": 16}
    text = str(set_html(found))
    assert "passed over 1 file: 1 .txt" in text and "val taken from train, the rest as in the folders" in text
