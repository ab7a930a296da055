"""MedMNIST files and zips as datasets, and whether a dataset is the one it is said to be."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import Memory, npz, save
from torch.utils.data import DataLoader

from medmamba import data
from medmamba.data import DatasetError, Record, open_dataset, registry

# --- MedMNIST -------------------------------------------------------------------------------------------------------


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


# --- zip ------------------------------------------------------------------------------------------------------------


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


# --- is it the dataset it is said to be? ----------------------------------------------------------------------------


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
