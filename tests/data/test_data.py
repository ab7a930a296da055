"""Readers, splits, leakage checks, dataset checks and the cache."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, random_split

from medmamba import data
from medmamba.config import PreprocessConfig
from medmamba.data import DatasetError, LeakageError, Record, open_dataset, registry
from medmamba.imaging.load import ImageError, load_image
from medmamba.imaging.preprocess import preprocess

SMALL = PreprocessConfig(input_size=(32, 40))


def picture(seed: int, size: tuple[int, int] = (12, 10), colour: bool = True) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3) if colour else size, dtype=np.uint8)


def save(path: Path, seed: int, colour: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, colour=colour)).save(path)
    return path


def tree(root: Path, paths: list[str]) -> Path:
    for seed, path in enumerate(paths):
        save(root / path, seed)
    return root


class Memory:
    """Pixels from the record's label, for tests of what needs no files."""

    def read(self, record: Record):
        return load_image(np.full((4, 4), record.source, dtype=np.uint8))


def in_memory(labels: list[int], patients: list[str | None] | None = None, k: int | None = None) -> data.ImageDataset:
    patients = patients or [None] * len(labels)
    records = [Record(i % 256, y, None, p) for i, (y, p) in enumerate(zip(labels, patients, strict=True))]
    return data.ImageDataset(records, [f"c{i}" for i in range(k or max(labels) + 1)], Memory())


# ---- folders --------------------------------------------------------------------------------------------------------


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


# ---- order of classes -----------------------------------------------------------------------------------------------


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


# ---- CSV ------------------------------------------------------------------------------------------------------------


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


# ---- MedMNIST -------------------------------------------------------------------------------------------------------


def npz(
    path: Path, size: int = 28, k: int = 3, colour: bool = False, compressed: bool = True, **extra: np.ndarray
) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(
            0, 256, (n, size, size, 3) if colour else (n, size, size), dtype=np.uint8
        )
        arrays[f"{split}_labels"] = (np.arange(n) % k).astype(np.uint8)[:, None]
    arrays.update(extra)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("size", "colour"), [(28, False), (64, True)])
def test_npz(tmp_path: Path, size: int, colour: bool, compressed: bool) -> None:
    path = npz(tmp_path / "set.npz", size, 3, colour, compressed)
    dataset = open_dataset(path)
    assert dataset.classes == ("0", "1", "2") and dataset.split_sizes == {"train": 6, "val": 2, "test": 3}
    test = dataset.split("test")
    image, label = test[2]
    expected = np.load(path)["test_images"][2]
    np.testing.assert_allclose(image.numpy(), np.atleast_3d(expected).transpose(2, 0, 1) / 255, atol=1e-6)
    assert label.item() == 2 and image.shape == (3 if colour else 1, size, size)
    array = test.reader._array("test_images")
    assert isinstance(array, np.memmap) is not compressed


def test_npz_classes_from_the_file_name_and_multilabel(tmp_path: Path) -> None:
    assert open_dataset(npz(tmp_path / "breastmnist_64.npz", k=2)).classes == ("malignant", "normal, benign")
    labels = {
        f"{split}_labels": np.eye(4, dtype=np.uint8)[np.arange(n) % 4]
        for split, n in (("train", 6), ("val", 2), ("test", 3))
    }
    chest = open_dataset(npz(tmp_path / "chest.npz", **labels))
    assert chest.task == "multilabel" and chest.labels.shape == (11, 4)


def test_npz_in_a_folder_is_found_by_name(tmp_path: Path) -> None:
    npz(tmp_path / "bloodmnist_64.npz")
    npz(tmp_path / "other.npz")
    assert open_dataset(tmp_path, dataset="bloodmnist").name == "bloodmnist_64"
    with pytest.raises(DatasetError, match=r"holds bloodmnist_64\.npz, other\.npz; name the one"):
        open_dataset(tmp_path)


def test_npz_rows_survive_a_new_split(tmp_path: Path) -> None:
    dataset = open_dataset(npz(tmp_path / "set.npz"))
    before = [dataset.image(i).pixels for i in range(len(dataset))]
    after = data.make_splits(dataset, (0.4, 0.3, 0.3))
    assert after.splits != dataset.splits
    assert all((after.image(i).pixels == before[i]).all() for i in range(len(dataset)))


def test_npz_cut_off_is_told_apart(tmp_path: Path) -> None:
    path = npz(tmp_path / "set.npz")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DatasetError, match=r"not a complete \.npz file .*cut off"):
        open_dataset(path)


def test_npz_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "set.npz", compressed=True)
    content = bytearray(path.read_bytes())
    content[400] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"set\.npz: array train_images"):
        open_dataset(path, "train")[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_labels": np.array([object()] * 6)}, "Python objects, which are refused"),
        ({"train_labels": np.zeros((5, 1), np.uint8)}, "6 train_images but 5 train_labels"),
        ({"train_labels": np.zeros((6, 1), np.float32)}, "must be integers"),
        ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, "volumes"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, extra: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(npz(tmp_path / "set.npz", **extra))


def test_npz_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", w=np.zeros(3))
    with pytest.raises(DatasetError, match=r"no array .images. .found: w."):
        open_dataset(tmp_path / "weights.npz")


def test_unpack_npz(tmp_path: Path) -> None:
    source = npz(tmp_path / "set.npz", size=64)
    target = data.unpack_npz(source, tmp_path / "plain.npz")
    assert isinstance(open_dataset(target).reader._array("val_images"), np.memmap)
    np.testing.assert_array_equal(np.load(target)["val_images"], np.load(source)["val_images"])
    assert [file.name for file in tmp_path.glob("*.part")] == []


# ---- zip ------------------------------------------------------------------------------------------------------------


def zip_of(path: Path, members: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if change:
                change(info)
            archive.writestr(info, content)
    return path


@pytest.fixture
def good_members(tmp_path: Path) -> dict[str, bytes]:
    names = ["set/a/1.png", "set/a/2.png", "set/b/3.png"]
    return {name: save(tmp_path / "src" / name, seed).read_bytes() for seed, name in enumerate(names)}


def test_zip_reads_like_the_folder(tmp_path: Path, good_members: dict[str, bytes]) -> None:
    good_members |= {"__MACOSX/set/a/._1.png": b"junk", "set/readme.txt": b"hello"}
    dataset = open_dataset(zip_of(tmp_path / "set.zip", good_members))
    folder = open_dataset(tmp_path / "src")
    assert dataset.classes == folder.classes and dataset.labels.tolist() == folder.labels.tolist() == [0, 0, 1]
    for i in range(3):
        assert torch.equal(dataset[i][0], folder[i][0])


def test_zip_in_worker_processes_and_after_pickling(tmp_path: Path, good_members: dict[str, bytes]) -> None:
    dataset = open_dataset(zip_of(tmp_path / "set.zip", good_members))
    expected = torch.stack([image for image, _ in dataset])  # opens the archive in this process too
    loader = DataLoader(dataset, batch_size=1, num_workers=2)
    assert torch.equal(torch.cat([image for image, _ in loader]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2][0], expected[2])


def test_a_forked_process_opens_the_zip_again(
    tmp_path: Path, good_members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that share one file position read each other's bytes."""
    reader = open_dataset(zip_of(tmp_path / "set.zip", good_members)).reader
    mine = reader._archive()
    assert reader._archive() is mine
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert reader._archive() is not mine


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a/evil.png", "leads out of the archive"),
        ("/etc/evil.png", "leads out of the archive"),
        ("a/../../evil.png", "leads out of the archive"),
        ("a\\..\\..\\evil.png", "leads out of the archive"),
        ("C:/evil.png", "leads out of the archive"),
        ("a/more.zip", "is an archive itself"),
        ("a/more.tar.gz", "is an archive itself"),
    ],
)
def test_zip_with_a_bad_member_is_refused(
    tmp_path: Path, good_members: dict[str, bytes], name: str, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(zip_of(tmp_path / "set.zip", {**good_members, name: b"x"}))


def test_zip_bombs_links_and_cut_files_are_refused(
    tmp_path: Path, good_members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = zip_of(tmp_path / "bomb.zip", {**good_members, "set/a/bomb.png": bytes(4 * 2**20)})
    with pytest.raises(DatasetError, match="zip bomb"):
        open_dataset(bomb)
    with monkeypatch.context() as patch:
        patch.setattr("medmamba.data.files.MAX_MEMBER_BYTES", 100)
        with pytest.raises(DatasetError, match="unpacks to 0 MiB; the limit"):
            open_dataset(zip_of(tmp_path / "big.zip", good_members))

    def link(info: zipfile.ZipInfo) -> None:
        info.external_attr = 0o120777 << 16

    with pytest.raises(DatasetError, match="is a link"):
        open_dataset(zip_of(tmp_path / "link.zip", good_members, link))
    cut = tmp_path / "cut.zip"
    cut.write_bytes(zip_of(tmp_path / "whole.zip", good_members).read_bytes()[:-50])
    with pytest.raises(DatasetError, match="not a complete zip file"):
        open_dataset(cut)


def test_what_is_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file or folder; give a folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="not a dataset"):
        open_dataset(save(tmp_path / "one.png", 0))


# ---- index ----------------------------------------------------------------------------------------------------------


def test_dataset_is_a_torch_dataset_with_an_injected_transform(tmp_path: Path) -> None:
    dataset = open_dataset(
        tree(tmp_path, ["a/1.png", "a/2.png", "b/3.png"]), transform=lambda image: preprocess(image, SMALL)
    )
    images, labels = next(iter(DataLoader(dataset, batch_size=3)))
    assert images.shape == (3, 3, 32, 40) and labels.tolist() == [0, 0, 1] and labels.dtype == torch.int64
    assert dataset.with_transform(None)[0][0].shape == (3, 12, 10)
    assert "3 images, 2 classes" in repr(dataset)


def test_labels_must_fit_the_classes() -> None:
    for label, task in ((2, "multiclass"), ((1, 0, 1), "multilabel"), ((2, 0), "multilabel"), (1, "multilabel")):
        with pytest.raises(DatasetError, match="does not fit"):
            data.ImageDataset([Record(0, label)], ["a", "b"], Memory(), task)
    with pytest.raises(DatasetError, match="not unique"):
        data.ImageDataset([], ["a", "a"], Memory())


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_split_is_stratified_to_one_image() -> None:
    labels = [0] * 100 + [1] * 31 + [2] * 10
    dataset = data.make_splits(in_memory(labels), seed=3)
    for name, share in zip(data.SPLITS, (0.7, 0.1, 0.2), strict=True):
        counts = dataset.split(name).class_counts
        assert (np.abs(counts - share * np.array([100, 31, 10])) <= 1).all(), (name, counts)
    again = data.make_splits(in_memory(labels), seed=3)
    assert dataset.splits == again.splits
    assert dataset.splits != data.make_splits(in_memory(labels), seed=4).splits


def test_split_keeps_patients_together_and_stays_stratified() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 300, 2000)]
    commonest = {patient: int(rng.random() < 0.2) for patient in patients}
    labels = [commonest[p] if rng.random() < 0.9 else 1 - commonest[p] for p in patients]
    dataset = data.make_splits(in_memory(labels, patients))
    assert not data.find_leakage(dataset, duplicates=False)
    share = np.mean(labels)
    for name, fraction in zip(data.SPLITS, (0.7, 0.1, 0.2), strict=True):
        part = dataset.split(name)
        assert abs(len(part) / 2000 - fraction) < 0.01
        assert abs(part.labels.mean() - share) < 0.02


def test_split_of_several_labels() -> None:
    rng = np.random.default_rng(1)
    rows = (rng.random((1000, 4)) < (0.5, 0.2, 0.05, 0.01)).astype(int)
    records = [Record(i % 256, tuple(row.tolist())) for i, row in enumerate(rows)]
    dataset = data.make_splits(data.ImageDataset(records, "abcd", Memory(), "multilabel"), (0.6, 0.2, 0.2))
    shares = dataset.split("train").class_counts / rows.sum(0)
    assert np.abs(shares - 0.6).max() < 0.07, shares


def test_split_without_a_part_and_impossible_ones() -> None:
    dataset = data.make_splits(in_memory([0, 1] * 10), (0.8, 0, 0.2))
    assert set(dataset.splits) == {"train", "test"}
    with pytest.raises(DatasetError, match=r"2 patients .* cannot fill 3 splits"):
        data.make_splits(in_memory([0, 1] * 10, ["p", "q"] * 10))
    for fractions in ((0.5, 0.5), (0.5, 0.2, 0.2), (1.2, -0.1, -0.1)):
        with pytest.raises(DatasetError, match="add up to 1"):
            data.make_splits(in_memory([0, 1]), fractions)


def test_published_split_is_torch_random_split(tmp_path: Path) -> None:
    """Drawn by hand as the code that it repeats does: seed, ImageFolder order, random_split."""
    names = [f"{c}/{i}.png" for c in ("ack", "bcc", "mel") for i in (1, 10, 2, 30, 4)]
    dataset = open_dataset(tree(tmp_path, names))
    torch.manual_seed(42)
    parts = random_split(sorted(names), [9, 2, 4])
    drawn = data.random_split(dataset, [9, 2, 4], seed=42)
    for name, part in zip(data.SPLITS, parts, strict=True):
        assert {record.source for record in drawn.split(name).records} == set(part)
    with pytest.raises(DatasetError, match="do not add up to its 15 images"):
        data.random_split(dataset, [9, 2, 3], seed=42)


def test_published_split_by_registry(tmp_path: Path) -> None:
    kvasir = registry.get("kvasir")
    labels = [i for i in range(8) for _ in range(500)]
    records = [Record(f"{kvasir.classes[y]}/{i:04d}.jpg", y) for i, y in enumerate(labels)]
    dataset = data.ImageDataset(records, kvasir.classes, Memory())
    split = data.published_split(dataset, kvasir)
    assert split.split_sizes == {"train": 2408, "val": 392, "test": 1200}
    with pytest.raises(DatasetError, match="has 3999 images, Kvasir has 4000"):
        data.published_split(dataset.subset(range(3999)), kvasir)
    with pytest.raises(DatasetError, match="never published"):
        data.published_split(dataset, registry.get("otoscopy2024"))
    medmnist = open_dataset(npz(tmp_path / "breastmnist.npz", k=2))
    assert data.published_split(medmnist, registry.get("breastmnist")) is medmnist
    with pytest.raises(DatasetError, match="carries none"):
        data.published_split(in_memory([0, 1]), registry.get("breastmnist"))


# ---- leakage --------------------------------------------------------------------------------------------------------


def test_patients_in_two_splits_are_refused() -> None:
    dataset = in_memory([0, 1, 0, 1], ["p1", "p1", "p2", "p3"]).with_splits(["train", "test", "train", "val"])
    with pytest.raises(
        LeakageError, match=r"1 patients have images in more than one split: p1 \(test and train\)"
    ) as caught:
        data.check_leakage(dataset)
    assert caught.value.report.patients == (("p1", ("test", "train")),)
    assert data.check_leakage(dataset, allow=["patients"]).patients
    with pytest.raises(DatasetError, match="allow takes"):
        data.check_leakage(dataset, allow=["everything"])


def test_the_same_picture_in_other_files_is_found(tmp_path: Path) -> None:
    root = tree(tmp_path, [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(2)])
    shades = picture(99, colour=False)
    Image.fromarray(shades).save(root / "train/a/grey.png")
    Image.fromarray(shades).convert("RGB").save(root / "test/b/rgb.bmp")  # other bytes, channels and label
    Image.fromarray(picture(0)).save(root / "train/b/twice.tif")  # the picture of train/a/0.png
    dataset = open_dataset(root)
    report = data.find_leakage(dataset)
    name = [str(record.source) for record in dataset.records]
    assert [{name[i] for i in group} for group in report.duplicates] == [{"train/a/grey.png", "test/b/rgb.bmp"}]
    assert [{name[i] for i in group} for group in report.repeats] == [{"train/a/0.png", "train/b/twice.tif"}]
    assert len(report.conflicts) == 2
    with pytest.raises(
        LeakageError, match=r"1 images are in more than one split: train/a/grey.png \(train\) = test/b/rgb"
    ):
        data.check_leakage(dataset)
    assert not data.check_leakage(dataset, allow={"duplicates"}).duplicates


def test_pictures_of_other_shape_are_not_the_same() -> None:
    a, b = np.zeros((4, 6), np.uint8), np.zeros((6, 4), np.uint8)
    hashes = {data.leakage.pixel_hash(load_image(array)) for array in (a, b, a + 1)}
    assert len(hashes) == 3


# ---- is it the dataset it is said to be? ----------------------------------------------------------------------------


def labelled(name: str, counts: list[int]) -> data.ImageDataset:
    entry = registry.get(name)
    records = [Record(0, label) for label, count in enumerate(counts) for _ in range(count)]
    return data.ImageDataset(records, entry.classes, Memory(), name=name)


def split_as(dataset: data.ImageDataset, sizes: tuple[int, int, int]) -> data.ImageDataset:
    return dataset.with_splits([name for name, n in zip(data.SPLITS, sizes, strict=True) for _ in range(n)])


def test_complete_partial_and_other_sets_are_told_apart() -> None:
    kvasir = registry.get("kvasir")
    assert data.check_dataset(labelled("kvasir", [500] * 8), kvasir).status == "complete"
    check = data.check_dataset(labelled("kvasir", [500] * 6 + [120, 0]), kvasir)
    assert check.status == "partial" and not check.ok
    text = "; ".join(check.messages)
    assert "3120 of the 4000" in text and "polyps 120 of 500" in text and "ulcerative-colitis 0 of 500" in text
    assert "https://datasets.simula.no/kvasir/" in text
    with pytest.raises(DatasetError, match="3120 of the 4000"):
        check.raise_if_not_ok()
    check.raise_if_not_ok("partial")
    assert data.check_dataset(labelled("kvasir", [1000] * 8), kvasir).status == "larger"  # that is v2
    wrong = data.check_dataset(labelled("cpn-xray", [1626, 1802, 1800]), kvasir)
    assert wrong.status == "other classes" and "unknown COVID" in wrong.messages[0]


def test_order_of_classes_is_checked() -> None:
    entry = registry.get("pneumoniamnist")
    swapped = data.ImageDataset([Record(0, 0)], entry.classes[::-1], Memory())
    assert "in another order" in data.check_dataset(swapped, entry).messages[0]


def test_splits_are_checked() -> None:
    entry = registry.get("breastmnist")
    full = labelled("breastmnist", [210, 570])
    assert data.check_dataset(split_as(full, (546, 78, 156)), entry).status == "complete"
    assert data.check_dataset(split_as(full, (500, 124, 156)), entry).status == "other split"
    assert data.check_dataset(full, entry).status == "other split"
    lost = data.check_dataset(split_as(full, (546, 78, 156)).subset(range(600)), entry)
    assert (
        lost.status == "partial" and "no test images at all" in lost.messages and "short: val 54 of 78" in lost.messages
    )


def test_an_earlier_release_is_known() -> None:
    entry = registry.get("organcmnist")
    old = split_as(labelled("organcmnist", [23660] + [0] * 10), (13000, 2392, 8268))
    assert data.check_dataset(old, entry).status == "other release"


# ---- cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> data.ImageDataset:
    """Grey and colour, of several sizes, in two splits."""
    for i in range(6):
        path = tmp_path / ("train" if i < 4 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, (20 + 9 * i, 50), colour=i % 3 > 0)).save(path)
    return open_dataset(tmp_path)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_cache_gives_what_the_preprocessing_gives(mixed: data.ImageDataset, in_chans: int) -> None:
    config = PreprocessConfig((32, 40), mean=(0.4,) * in_chans, std=(0.3,) * in_chans)
    cached = data.cache_images(mixed, config, in_chans)
    assert cached.images.dtype == torch.uint8 and cached.images.shape == (6, 32, 40, in_chans)
    images, labels = cached.batch([5, 0])
    expected = torch.stack([preprocess(mixed.image(i), config, in_chans) for i in (5, 0)])
    assert images.shape == (2, in_chans, 32, 40) and labels.tolist() == mixed.labels[[5, 0]].tolist()
    assert (images - expected).abs().max() <= 0.5 / 255 / 0.3 + 1e-5
    assert torch.equal(cached[5][0], images[0])
    test = cached.split("test")
    assert len(test) == 2 == len(test.index) and torch.equal(test[0][0], cached[mixed.splits.index("test")][0])


def test_cache_file_is_used_again_only_for_the_same_images(
    mixed: data.ImageDataset, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path_factory.mktemp("cache") / "pixels.npy"
    first = data.cache_images(mixed, SMALL, file=file)

    def forbidden(index: int) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(mixed, "image", forbidden)
        assert torch.equal(data.cache_images(mixed, SMALL, file=file).images, first.images)
        with pytest.raises(AssertionError, match="decoded again"):
            data.cache_images(mixed, PreprocessConfig((32, 32)), file=file)
    backwards = data.cache_images(mixed.subset(range(5, -1, -1)), SMALL, file=file)
    assert torch.equal(backwards.images, first.images.flip(0)) and not torch.equal(backwards.images, first.images)
    other = mixed.subset([0, 1])
    assert len(data.cache_images(other, SMALL, file=file)) == 2
    assert sorted(path.name for path in file.parent.iterdir()) == ["pixels.npy", "pixels.npy.json"]


def test_forks_decode_the_same_and_name_what_cannot_be_read(mixed: data.ImageDataset, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    threads = data.cache_images(mixed, SMALL)
    forks = data.cache_images(mixed, SMALL, file=folder / "a.npy", processes=4)
    assert torch.equal(forks.images, threads.images)
    source = str(mixed.records[3].source)
    (Path(mixed.reader.root) / source).write_bytes(b"")  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match=source):
        data.cache_images(mixed, SMALL, file=folder / "b.npy", processes=4)
    assert sorted(path.name for path in folder.iterdir()) == ["a.npy", "a.npy.json"]


def test_cache_names_the_image_that_cannot_be_read(mixed: data.ImageDataset) -> None:
    broken = Path(mixed.reader.root) / str(mixed.records[3].source)  # type: ignore[attr-defined]
    broken.write_bytes(b"")
    with pytest.raises(ImageError, match=str(mixed.records[3].source)):
        data.cache_images(mixed, SMALL)


# ---- real images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "status"),
    [
        ("breastmnist", (546, 78, 156), "complete"),
        ("pneumoniamnist", (4708, 524, 624), "complete"),
        ("dermamnist", (7005, 1003, 2007), "other split"),
        ("bloodmnist", (11952, 1707, 3415), "partial"),
    ],
)
def test_shared_datasets(shared: Path, name: str, sizes: tuple[int, ...], status: str) -> None:
    root = shared / "data" / name
    if not root.is_dir():
        pytest.skip(f"needs {name} in ../shared/data")
    dataset = open_dataset(root, dataset=name)
    assert tuple(dataset.split_sizes.values()) == sizes
    assert data.check_dataset(dataset, registry.get(name)).status == status
    assert not data.find_leakage(dataset, duplicates=False)
    cached = data.cache_images(dataset.split("val").subset(range(8)), SMALL)
    assert cached.images.float().std() > 10
    if name == "dermamnist":  # lesions are the groups; one lesion has several images
        assert len(set(dataset.patients)) == 7470
