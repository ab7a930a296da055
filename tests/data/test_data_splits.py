"""Splits, leakage between them, and the cache of decoded images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import Memory, npz, picture, tree
from PIL import Image
from torch.utils.data import DataLoader, random_split

from medmamba import data
from medmamba.config import PreprocessConfig
from medmamba.data import DatasetError, LeakageError, Record, open_dataset, registry
from medmamba.imaging.load import ImageError, load_image
from medmamba.imaging.preprocess import preprocess

SMALL = PreprocessConfig(input_size=(32, 40))


def in_memory(labels: list[int], patients: list[str | None] | None = None, k: int | None = None) -> data.ImageDataset:
    patients = patients or [None] * len(labels)
    records = [Record(i % 256, y, None, p) for i, (y, p) in enumerate(zip(labels, patients, strict=True))]
    return data.ImageDataset(records, [f"c{i}" for i in range(k or max(labels) + 1)], Memory())


# --- index ----------------------------------------------------------------------------------------------------------


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


# --- splits ---------------------------------------------------------------------------------------------------------


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


# --- leakage --------------------------------------------------------------------------------------------------------


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


# --- cache ----------------------------------------------------------------------------------------------------------


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

    def forbidden(*_: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("medmamba.data.cache.fill", forbidden)
        assert torch.equal(data.cache_images(mixed, SMALL, file=file).images, first.images)
        with pytest.raises(AssertionError, match="decoded again"):
            data.cache_images(mixed, PreprocessConfig((32, 32)), file=file)
    backwards = data.cache_images(mixed.subset(range(5, -1, -1)), SMALL, file=file)
    assert torch.equal(backwards.images, first.images.flip(0)) and not torch.equal(backwards.images, first.images)
    other = mixed.subset([0, 1])
    assert len(data.cache_images(other, SMALL, file=file)) == 2
    assert sorted(path.name for path in file.parent.iterdir()) == ["pixels.npy", "pixels.npy.json"]


def test_processes_decode_the_same_and_name_what_cannot_be_read(mixed: data.ImageDataset, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    here = data.cache_images(mixed, SMALL, workers=0)
    apart = data.cache_images(mixed, SMALL, file=folder / "a.npy", workers=2)
    assert torch.equal(apart.images, here.images)
    source = str(mixed.records[3].source)
    (Path(mixed.reader.root) / source).write_bytes(b"")  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match=source):
        data.cache_images(mixed, SMALL, file=folder / "b.npy", workers=2)
    assert sorted(path.name for path in folder.iterdir()) == ["a.npy", "a.npy.json"]


def test_cache_names_the_image_that_cannot_be_read(mixed: data.ImageDataset) -> None:
    broken = Path(mixed.reader.root) / str(mixed.records[3].source)  # type: ignore[attr-defined]
    broken.write_bytes(b"")
    with pytest.raises(ImageError, match=str(mixed.records[3].source)):
        data.cache_images(mixed, SMALL)


# --- real images ----------------------------------------------------------------------------------------------------


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
