"""The cache of decoded images: used again for the same content alone, as deep as the files, and whole or absent."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmamba.config import PreprocessConfig
from medmamba.data import DatasetError, ImageDataset, Record, cache_images, identity, open_dataset
from medmamba.data.cache import _checksum
from medmamba.data.identity import FileIndex, contents
from medmamba.data.pixels import Pixels, group_warnings
from medmamba.imaging.load import MedicalImage, load_image
from medmamba.imaging.preprocess import preprocess

SIZE = PreprocessConfig((32, 32), mean=(0.4,) * 3, std=(0.3,) * 3)
ROOT = Path(__file__).parents[2]


def make(root: Path, seed: int = 0, count: int = 6, suffix: str = ".png", largest: int = 255) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, largest + 1, (40, 36)).astype(np.uint8 if largest < 256 else np.uint16)
        file = root / "ab"[i % 2] / f"{i}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return root


def decoded(dataset: ImageDataset) -> torch.Tensor:
    """What `predict` makes of the same images."""
    return torch.stack([preprocess(dataset.image(i), SIZE) for i in range(len(dataset))])


def close(cached, dataset: ImageDataset, levels: int = 255) -> bool:
    """To half a step, in units of the standard deviation."""
    images, _ = cached.batch(range(len(dataset)))
    return bool((images - decoded(dataset)).abs().max() <= 0.5 / levels / 0.3 + 1e-6)


@pytest.fixture
def never(monkeypatch):
    """Called: from then on no image may be decoded."""

    def forbid() -> None:
        def fail(self, row):
            raise AssertionError("decoded again")

        monkeypatch.setattr(ImageDataset, "image", fail)

    return forbid


# --- identity ---


def test_other_pictures_of_the_same_names_are_not_taken_from_the_cache(tmp_path):
    one, two = open_dataset(make(tmp_path / "one", 0)), open_dataset(make(tmp_path / "two", 1))
    file = tmp_path / "c.npy"
    cache_images(one, SIZE, file=file)
    with pytest.warns(UserWarning, match="some of its images have changed"):
        second = cache_images(two, SIZE, file=file)
    assert close(second, two) and not close(second, one)


def test_arrays_of_other_sizes_are_not_taken_from_the_cache(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "c.npy"
    for size in (64, 128):
        arrays = {"images": rng.integers(0, 256, (4, size, size), np.uint8), "labels": np.array([0, 1, 0, 1])}
        np.savez(tmp_path / f"{size}.npz", **arrays)
    cache_images(open_dataset(tmp_path / "64.npz"), SIZE, file=file)
    larger = open_dataset(tmp_path / "128.npz")
    with pytest.warns(UserWarning, match="have changed"):
        assert close(cache_images(larger, SIZE, file=file), larger)


@pytest.mark.parametrize("replace", ["write", "rename", "copy with its time"])
def test_a_file_replaced_in_place_is_noticed(tmp_path, replace):
    """By another of the same size and the same time of modification, which `cp -p` and `mv` can make."""
    root = make(tmp_path / "data", suffix=".bmp")
    dataset = open_dataset(root)
    target, source = root / "a" / "0.bmp", root / "a" / "2.bmp"
    before, other = target.stat(), source.read_bytes()
    assert before.st_size == source.stat().st_size
    for file in root.rglob("*.bmp"):  # long ago, so that no time is too recent to be trusted
        os.utime(file, ns=(10**18, 10**18))
    index = FileIndex()
    cache_images(dataset, SIZE, file=tmp_path / "c.npy", files=index)
    for row in index._known.values():
        row[5] += 10**10  # as if looked at 10 s later: times are trusted
    if replace == "write":
        target.write_bytes(other)
    elif replace == "rename":
        shutil.copyfile(source, tmp_path / "new")
        os.replace(tmp_path / "new", target)
    else:
        shutil.copy2(source, target)
    os.utime(target, ns=(10**18, 10**18))
    with pytest.warns(UserWarning, match="have changed"):
        again = cache_images(dataset, SIZE, file=tmp_path / "c.npy", files=index)
    assert close(again, dataset) and torch.equal(again.images[0], again.images[1])


def test_a_file_that_only_looks_new_is_not_decoded_again(tmp_path, never):
    root = make(tmp_path / "data")
    first = cache_images(open_dataset(root), SIZE, file=tmp_path / "c.npy")
    shutil.copytree(root, tmp_path / "copy")
    os.utime(root / "a" / "0.png")
    never()
    for place in (root, tmp_path / "copy"):
        assert torch.equal(cache_images(open_dataset(place), SIZE, file=tmp_path / "c.npy").images, first.images)


def test_files_are_read_only_when_they_may_have_changed(tmp_path, monkeypatch):
    file = tmp_path / "x"
    file.write_bytes(b"one")
    index = FileIndex()
    first = index.hashes([file, file])
    assert first[0] == first[1] and index.read == 1
    kept = identity._signature(str(file))
    later = FileIndex()
    later.add(json.loads(json.dumps(index.table([file]))))
    assert later.hashes([file]) == first[:1] and later.read == 1  # written a moment before it was read: not trusted
    later._known[str(file)][5] += 10**10
    assert later.hashes([file]) == first[:1] and later.read == 1
    file.write_bytes(b"two")  # within one tick of a coarse clock: nothing but the content differs
    monkeypatch.setattr(identity, "_signature", lambda path: kept)
    assert index.hashes([file]) != first[:1]
    monkeypatch.undo()
    assert later.hashes([file]) != first[:1]
    file.unlink()
    assert later.hashes([file]) == ["unreadable"] and not later.table([file])
    later.add([1]), later.add({"y": 3})  # damaged tables


def test_images_without_files_are_known_by_their_pixels(tmp_path):
    class Memory:
        def __init__(self, seed):
            self.pixels = np.random.default_rng(seed).integers(0, 256, (4, 32, 32), np.uint8)

        def read(self, record):
            return load_image(self.pixels[record.source])

    records = [Record(i, i % 2) for i in range(4)]
    one, two = (ImageDataset(records, ["a", "b"], Memory(seed)) for seed in (0, 1))
    assert contents(one, FileIndex()) == contents(one, FileIndex()) != contents(two, FileIndex())
    cache_images(one, SIZE, file=tmp_path / "c.npy")
    with pytest.warns(UserWarning, match="have changed"):
        assert close(cache_images(two, SIZE, file=tmp_path / "c.npy"), two)


def test_another_window_is_other_content(tmp_path):
    """The same files, of which another window shows other pixels."""
    dataset = open_dataset(make(tmp_path / "data", largest=4095))
    before = contents(dataset, FileIndex())
    dataset.reader.window = (2047.5, 4095)
    assert len({*before, *contents(dataset, FileIndex())}) == 2 * len(before)


def test_other_code_that_reads_images_makes_the_cache_again(tmp_path, monkeypatch, never):
    dataset = open_dataset(make(tmp_path / "data"))
    cache_images(dataset, SIZE, file=tmp_path / "c.npy")
    assert len(identity.reading_code()) == 32
    monkeypatch.setattr("medmamba.data.cache.reading_code", lambda: "other")
    with pytest.warns(UserWarning, match="other versions of the code"):
        cache_images(dataset, SIZE, file=tmp_path / "c.npy")
    never()
    cache_images(dataset, SIZE, file=tmp_path / "c.npy")


# --- damage, processes, disks ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" * 9),
        lambda path: path.unlink(),
        lambda path: Path(f"{path}.json").write_text('{"format": 2}'),
        lambda path: Path(f"{path}.json").write_text("[]"),
        lambda path: Path(f"{path}.json").write_bytes(b"\xff\x00"),
        lambda path: Path(f"{path}.json").write_text('{"key": "of the first version"}'),
        lambda path: Path(f"{path}.json").unlink(),
    ],
)
def test_a_damaged_cache_is_made_again_with_a_word(tmp_path, damage):
    dataset = open_dataset(make(tmp_path / "data"))
    file = tmp_path / "cache" / "c.npy"
    file.parent.mkdir()
    cache_images(dataset, SIZE, file=file)
    damage(file)
    with pytest.warns(UserWarning, match=r"c\.npy: damaged.*decoded again"):
        assert close(cache_images(dataset, SIZE, file=file), dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cache_images(dataset, SIZE, file=file)
    assert sorted(path.name for path in file.parent.iterdir()) == ["c.npy", "c.npy.json"]


def test_the_checksum_of_a_cache_sees_every_kind_of_damage():
    class Trickle(io.BytesIO):
        def readinto(self, buffer):  # as a network file system may
            return super().readinto(buffer[:100_000])

    whole = np.random.default_rng(0).integers(0, 256, 3 * 2**18 + 100, np.uint8).tobytes()
    half = len(whole) // 2
    damaged = [
        whole[:-1],
        whole[: 2**18],
        whole + b"\0",
        whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],  # one bit
        whole[: 2**18] + bytes(4096) + whole[2**18 + 4096 :],  # a block of zeros
        whole[2**18 : 2**19] + whole[: 2**18] + whole[2**19 :],  # exchanged
        whole[4096:8192] + whole[:4096] + whole[8192:],
        whole[:-100] + bytes(100),
        b"",
    ]
    assert _checksum(Trickle(whole)) == _checksum(io.BytesIO(whole))
    found = {_checksum(io.BytesIO(data)) for data in [whole, *damaged]}
    assert len(found) == 1 + len(damaged)


def test_of_two_that_want_one_cache_one_makes_it(tmp_path, monkeypatch):
    dataset = open_dataset(make(tmp_path / "data"))
    count, put = [], Pixels.put
    monkeypatch.setattr(Pixels, "put", lambda self, row, *a: (count.append(row), time.sleep(0.02), put(self, row, *a)))
    found: list = []
    make_it = lambda: found.append(cache_images(dataset, SIZE, file=tmp_path / "c.npy"))  # noqa: E731
    threads = [threading.Thread(target=make_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == list(range(6))
    assert len(found) == 3 and all(torch.equal(one.images, found[0].images) for one in found)


FULL = """
import resource, sys
from pathlib import Path
from medmamba.config import PreprocessConfig
from medmamba.data import cache_images, open_dataset
from medmamba.utils.files import DiskFullError
dataset = open_dataset(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, 2**13))
try:
    cache_images(dataset, PreprocessConfig((32, 32)), file=sys.argv[2])
except DiskFullError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for the size of files")
def test_no_space_for_the_cache_is_said_and_leaves_nothing(tmp_path):
    """Not found out by writing through a map, which ends the process."""
    (tmp_path / "cache").mkdir()
    command = [sys.executable, "-c", FULL, str(make(tmp_path / "data")), str(tmp_path / "cache" / "c.npy")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "no space to write" in run.stdout and not list((tmp_path / "cache").iterdir())


def test_a_place_that_cannot_hold_a_cache_is_named(tmp_path):
    dataset = open_dataset(make(tmp_path / "data"))
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"cannot hold decoded images .*--cache"):
        cache_images(dataset, SIZE, file=tmp_path / "file" / "c.npy")


# --- depth ---


@pytest.mark.parametrize(("suffix", "largest"), [(".png", 4095), (".png", 65535), (".tif", 4095)])
@pytest.mark.parametrize("processes", [1, 2])
def test_training_sees_the_pixels_that_predict_sees(tmp_path, suffix, largest, processes):
    """Also of 12 bits in 16, of which 8 bits would leave 16 levels."""
    dataset = open_dataset(make(tmp_path / "data", suffix=suffix, largest=largest))
    first = cache_images(dataset, SIZE, file=tmp_path / "c.npy", processes=processes)
    assert first.images.dtype == torch.uint16 and close(first, dataset, 65535)
    again = cache_images(dataset, SIZE, file=tmp_path / "c.npy")
    assert torch.equal(again.batch([3, 1])[0], first.batch([3, 1])[0])
    assert torch.equal(again[2][0], first.batch([2])[0][0])


def test_big_endian_files_are_seen_alike(tmp_path):
    """The same values, stored in the other order of bytes."""
    root = make(tmp_path / "little", largest=4095, suffix=".tif")
    for file in root.rglob("*.tif"):
        values = np.asarray(Image.open(file)).astype(">u2")
        raw = values.tobytes()
        height, width = values.shape
        tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
        tags += [(277, 3, 1), (278, 3, height), (279, 4, len(raw)), (339, 3, 1)]
        where = 8 + len(raw)
        head = b"MM\0\x2a" + where.to_bytes(4, "big") + raw + len(tags).to_bytes(2, "big")
        for tag, kind, value in tags:
            number = value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big")
            head += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + number
        new = tmp_path / "big" / file.relative_to(root)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(head + bytes(4))
    big, little = open_dataset(tmp_path / "big"), open_dataset(root)
    cached, expected = cache_images(big, SIZE), cache_images(little, SIZE)
    assert torch.equal(cached.images, expected.images)
    (text,) = cached.warnings  # 12 bits of 16
    assert "unused-range" in text and cached.warnings[text] == list(range(len(big)))


@pytest.mark.parametrize("processes", [1, 2])
def test_one_deep_image_among_others_keeps_its_depth_and_theirs(tmp_path, processes):
    root = make(tmp_path / "data")
    Image.fromarray(np.arange(1440, dtype=np.uint16).reshape(40, 36)).save(root / "b" / "5.png")
    dataset = open_dataset(root)
    for file in (None, tmp_path / "c.npy"):
        cached = cache_images(dataset, SIZE, file=file, processes=processes)
        images = cached.batch(range(6))[0] - decoded(dataset)
        assert cached.images.dtype == torch.uint16
        assert images[-1].abs().max() <= 0.5 / 65535 / 0.3 + 1e-6
        assert images.abs().max() <= 0.5 / 255 / 0.3 + 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npy", "c.npy.json", "data"]


def test_widening_loses_nothing():
    pixels = Pixels((256, 1, 1, 1))
    for level in range(256):
        pixels.put(level, np.full((1, 1, 1), level, np.uint8))
    assert pixels.array.ravel().tolist() == list(range(256))
    pixels.widen()
    np.testing.assert_array_equal(pixels.array.ravel(), np.arange(256) * 257)


def test_images_of_eight_bits_take_no_more_memory(tmp_path):
    dataset = open_dataset(make(tmp_path / "data"))
    assert cache_images(dataset, SIZE).images.dtype == torch.uint8


# --- what readers say ---


def test_warnings_of_the_reader_are_counted_and_kept(tmp_path):
    """Those that differ only in numbers are one; they are there again when the cache is read from its file."""
    root = make(tmp_path / "data")

    class Warning_:
        def read(self, record: Record) -> MedicalImage:
            image = load_image(root / str(record.source))
            number = int(Path(str(record.source)).stem)
            said = (f"warning: uses {number + 7} of 16 bits",) if number < 3 else ()
            return MedicalImage(image.pixels, image.source, "PNG", "L", 8, notes=("a note", *said))

        def file_of(self, record: Record) -> Path:
            return root / str(record.source)

    plain = open_dataset(root)
    dataset = ImageDataset(plain.records, plain.classes, Warning_())
    expected = ["warning: 3 of 6 images: uses 7 of 16 bits (such as a/0.png)"]
    for file, processes in ((None, 1), (tmp_path / "a.npy", 1), (tmp_path / "a.npy", 1), (tmp_path / "b.npy", 2)):
        assert cache_images(dataset, SIZE, file=file, processes=processes).warning_lines() == expected
    split = dataset.with_splits(["val" if str(r.source) == "a/2.png" else "train" for r in dataset.records])
    parts = {name: cache_images(split, SIZE).split(name).warning_lines() for name in ("train", "val")}
    assert parts == {
        "train": ["warning: 2 of 5 images: uses 7 of 16 bits (such as a/0.png)"],
        "val": ["warning: 1 of 1 images: uses 7 of 16 bits (such as a/2.png)"],
    }


def test_files_that_use_few_of_their_bits_are_warned_of(tmp_path):
    dataset = open_dataset(make(tmp_path / "data", largest=4095))
    lines = cache_images(dataset, SIZE).warning_lines()
    assert len(lines) == len(dataset.image(0).warnings) == 1 and "unused-range" in lines[0]
    assert all(line.startswith("warning: 6 of 6 images: ") and line.endswith("(such as a/0.png)") for line in lines)
    assert not cache_images(open_dataset(make(tmp_path / "full", largest=65535)), SIZE).warnings


def test_warnings_are_grouped_by_their_words():
    found = group_warnings({4: ("a 1.5", "b"), 1: ("a 2e-3",), 9: ("a 7", "a 8")})
    assert found == {"a 2e-3": [1, 4, 9], "b": [4]}


@pytest.mark.parametrize("largest", [255, 65535])
def test_pixels_collected_ahead_for_a_gpu_are_those_of_a_batch(tmp_path, largest):
    cached = cache_images(open_dataset(make(tmp_path, largest=largest)), SIZE)
    rows = torch.tensor([5, 0, 3, 3])
    found = cached._collected(rows, pin=False)
    assert found.dtype == cached.images.dtype and torch.equal(cached._normalised(found, "cpu"), cached.batch(rows)[0])
    with pytest.raises(IndexError, match="rows 2 to 6 of 6 images"):
        cached._collected(torch.tensor([2, 6]), pin=False)
