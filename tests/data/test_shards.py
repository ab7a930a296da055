"""Tar shards and Hugging Face datasets: labels, splits and patients as they say, and damage that is named."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from shard_files import write_hf, write_shards, write_tar

from medmamba.data import DatasetError, Record, open_dataset
from medmamba.data.hf_datasets import LinkedReader
from medmamba.data.identity import FileIndex, contents
from medmamba.data.leakage import pixel_hash
from medmamba.data.tar_index import tar_members


def png(value: int = 0, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("val", 2), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.png").write_bytes(png(40 * label + 3 * i + len(split)))
    return tmp_path / "images"


def assert_same_images(found, expected) -> None:
    assert found.classes == expected.classes and found.splits == expected.splits
    assert found.labels.tolist() == expected.labels.tolist()
    for row in range(len(expected)):
        assert pixel_hash(found.image(row)) == pixel_hash(expected.image(row))


def test_shards_hold_the_same_images_as_the_folder(folder, tmp_path):
    expected = open_dataset(folder)
    root = write_shards(expected, tmp_path / "shards", per_shard=3)
    found = open_dataset(root)
    assert_same_images(found, expected)
    assert_same_images(pickle.loads(pickle.dumps(found)), expected)
    some = open_dataset(f"{root}/train-*.tar")  # alone, "train" means "all"
    assert some.split_sizes == {None: 10} and "its only split" in " ".join(some.notes)
    assert len(open_dataset(root / "val-000.tar", classes=("cat", "dog"))) == 3


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a/000.png", "a" * 120 + "/000.png", "ä/000.png"])
def test_members_are_those_of_tarfile(kind, name, tmp_path):
    path = write_tar(tmp_path / "x.tar", [(name, png(1)), (name[:-3] + "cls", b"7")], kind)
    found = list(tar_members(path, frozenset([".cls"])))
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive]
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert [m.content for m in found] == [None, b"7"]


def test_webdataset_reads_the_same_samples(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    root = write_shards(open_dataset(folder), tmp_path / "shards")
    theirs = webdataset.WebDataset(str(root / "train-000.tar"), shardshuffle=False)
    ours = open_dataset(root).split("train")
    for row, sample in enumerate(theirs):
        shard, offset, size, name = str(ours.records[row].source).split(":", 3)
        assert name == f"{sample['__key__']}.png" and sample["cls"].decode() == ours.classes[ours.labels[row]]
        with (root / shard).open("rb") as file:
            file.seek(int(offset))
            assert file.read(int(size)) == sample["png"]


def test_json_tells_label_patient_and_split(tmp_path):
    members = []
    for i, (split, label) in enumerate([("train", ["a", "b"]), ("train", ["b"]), ("valid", ["a"]), ("test", "b")]):
        about = {"label": label, "split": split, "patient": f"p{i // 2}"}
        members += [(f"{i}.png", png(i)), (f"{i}.json", json.dumps(about).encode())]
    found = open_dataset(write_tar(tmp_path / "all.tar", members))
    assert found.task == "multilabel" and found.labels.tolist() == [[1, 1], [0, 1], [1, 0], [0, 1]]
    assert found.splits == ["train", "train", "val", "test"] and found.patients == ["p0", "p0", "p1", "p1"]


def test_numbers_as_labels_keep_the_order_of_numbers(tmp_path):
    members = [m for i in range(12) for m in ((f"{i}.png", png(i)), (f"{i}.cls", str(i).encode()))]
    found = open_dataset(write_tar(tmp_path / "x.tar", members))
    assert found.labels.tolist() == list(range(12))


def _gzipped(path):
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))


@pytest.mark.parametrize("other", ["download.tar", "metadata.parquet"])
def test_a_file_beside_class_folders_does_not_make_them_another_dataset(other, folder):
    (folder / other).write_bytes(b"x" * 100)
    assert open_dataset(folder).split_sizes == {"train": 10, "val": 4, "test": 4}


CASES = {
    "no label at all": (lambda p: write_tar(p, [("a.png", png())]), "no image with a label"),
    "two images": (lambda p: write_tar(p, [("a.png", png()), ("a.jpg", png()), ("a.cls", b"1")]), "one image"),
    "missing label": (lambda p: write_tar(p, [("a.png", png()), ("a.cls", b"nan")]), "no label"),
    "not a tar": (lambda p: p.write_bytes(b"x" * 4000), "not a complete tar"),
    "empty": (lambda p: p.write_bytes(b""), "not a complete tar"),
    "compressed": (_gzipped, "gunzip"),
    "bad json": (lambda p: write_tar(p, [("a.png", png()), ("a.json", b"{")]), "not JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_shards_are_refused_with_a_reason(case, tmp_path):
    write, message = CASES[case]
    write(tmp_path / "x.tar")
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_that_was_cut_off_is_refused(kind, tmp_path):
    members = [m for i in range(4) for m in ((f"{i}.png", png(i, 64)), (f"{i}é.cls", str(i).encode()))]
    path = write_tar(tmp_path / "x.tar", members, kind)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match="not a complete tar"):
        open_dataset(path)


def test_images_without_a_label_are_left_out_with_a_note(tmp_path):
    members = [("a.png", png(1)), ("a.cls", b"x"), ("b.png", png(2)), ("c.png", png(3)), ("c.cls", b"y")]
    found = open_dataset(write_tar(tmp_path / "x.tar", members))
    assert len(found) == 2 and any("1 images without" in note for note in found.notes)


def test_a_shard_replaced_in_place_is_other_content(folder, tmp_path):
    root = write_shards(open_dataset(folder), tmp_path / "shards")
    before = contents(open_dataset(root), FileIndex())
    path = root / "val-000.tar"
    path.write_bytes(path.read_bytes().replace(png(3), png(9)))
    after = contents(open_dataset(root), FileIndex())
    assert before[:10] == after[:10] and before[10] != after[10]


# --- Hugging Face datasets ---


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


@pytest.mark.slow
def test_saved_datasets_hold_the_same_images(datasets, folder, tmp_path):
    expected = open_dataset(folder)
    saved = write_hf(expected, tmp_path / "saved")
    found = open_dataset(saved)
    assert_same_images(found, expected)
    assert len(set(contents(found, FileIndex()))) == 1
    loaded = datasets.load_from_disk(str(saved))
    before = contents(open_dataset(saved), FileIndex())
    loaded["train"] = loaded["train"].select([0, 2, 9])
    loaded.save_to_disk(str(tmp_path / "fewer"))
    fewer = open_dataset(tmp_path / "fewer")
    assert fewer.split("train").labels.tolist() == [0, 0, 1] and contents(fewer, FileIndex())[0] != before[0]


@pytest.mark.slow
def test_parquet_folders_and_their_splits(datasets, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected = open_dataset(folder)
    loaded = datasets.load_from_disk(str(write_hf(expected, tmp_path / "saved")))
    (tmp_path / "data").mkdir()
    for name, part in loaded.items():
        part.to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    assert_same_images(open_dataset(tmp_path / "data"), expected)
    alone = open_dataset(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert alone.split_sizes == {None: 10}


@pytest.mark.slow
def test_lists_of_classes_patients_and_names(datasets, tmp_path):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "labels": datasets.Sequence(datasets.ClassLabel(names=["none", "b", "a"])),
            "patient_id": datasets.Value("int64"),
        }
    )
    rows = {
        "img": [{"bytes": png(i), "path": None} for i in range(4)],
        "labels": [[1, 2], [2], [], [1]],
        "patient_id": [4, 4, 5, None],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    found = open_dataset(tmp_path / "saved")
    assert found.task == "multilabel" and found.classes == ("none", "b", "a")  # their order, not the alphabet's
    assert found.labels.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert found.patients == ["4", "4", "5", None]


@pytest.mark.slow
def test_files_that_rows_only_name_are_part_of_the_content(datasets, folder, tmp_path):
    expected = open_dataset(folder).split("val")
    paths = [str(expected.reader.file_of(record)) for record in expected.records]
    rows = datasets.Dataset.from_dict({"image": paths, "label": ["cat", "cat", "dog", "dog"]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    found = expected.with_records([Record(f"val:{row}", 0) for row in range(4)])
    found.reader = LinkedReader({"val": rows}, "image")
    before = contents(found, FileIndex())
    (folder / "val" / "cat" / "1.png").write_bytes(png(200))
    after = contents(found, FileIndex())
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "message"),
    [({"image": [b"x"], "text": ["a"]}, "no column of labels"), ({"label": [1]}, "no column of images")],
)
def test_datasets_without_images_or_labels_are_refused(datasets, rows, message, tmp_path):
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://owner/name", (("owner/name",), None)),
        ("hf://owner/name@v1", (("owner/name",), "v1")),
        ("hf://datasets/owner/name/small", (("owner/name", "small"), None)),
    ],
)
def test_addresses_name_repository_revision_and_configuration(
    datasets, folder, tmp_path, monkeypatch, address, expected
):
    loaded = datasets.load_from_disk(str(write_hf(open_dataset(folder), tmp_path / "saved")))
    asked = []

    def load(*names, revision=None):
        asked.append((names, revision))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_dataset(address)) == 18 and asked == [expected]


def test_addresses_that_make_no_sense_are_refused(datasets):
    with pytest.raises(DatasetError, match="hf://owner/name"):
        open_dataset("hf://owner")
