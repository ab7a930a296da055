"""Where images come from: each kind gives the same images, named so that they can be found again."""

import csv
import io
import os
import socket
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from medmamba.data.dataset import DatasetError
from medmamba.data.sources import name_of, open_sources
from medmamba.imaging.ahead import Deferred, read_source
from medmamba.imaging.image import ImageError
from medmamba.imaging.load import load_image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for i, name in enumerate(["a/0.png", "a/1.png", "2.png"]):
        array = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("none")
    return tmp_path


def same(sources, folder, names=("2.png", "a/0.png", "a/1.png")):
    found = list(sources)
    assert len(found) == len(names) and list(map(name_of, found)) == list(map(name_of, sources))
    for source, name in zip(found, names, strict=True):
        assert name_of(source).endswith(name)
        np.testing.assert_array_equal(read_source(source).pixels, load_image(folder / name).pixels)


def test_folders_patterns_and_files(folder):
    sources = open_sources([folder])
    assert sources.count == 3 and "1 .txt" in sources.notes[0]
    same(sources, folder)
    assert open_sources([folder / "a" / "*.png", folder / "2.png"]).count == 3
    with pytest.raises(ImageError, match="no such file"):
        open_sources([folder / "absent"])
    with pytest.raises(ImageError, match="no images given"):
        open_sources([])


def test_archives(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        for name in ("a/0.png", "a/1.png", "2.png", "a/notes.txt"):
            archive.write(folder / name, name)
    sources = open_sources([folder / "x.zip"])
    assert sources.count == 3 and all(isinstance(source, Deferred) for source in sources)
    same(sources, folder)
    for mode, name, count in (("w", "x.tar", 3), ("w:gz", "x.tar.gz", None)):
        with tarfile.open(folder / name, mode) as archive:
            for member in ("2.png", "a/0.png", "a/1.png", "a/notes.txt"):
                archive.add(folder / member, member)
        sources = open_sources([folder / name])
        assert sources.count == count
        same(sources, folder)
    (folder / "x.zip").write_bytes((folder / "x.zip").read_bytes()[:100])
    with pytest.raises(DatasetError, match="not a complete zip"):
        open_sources([folder / "x.zip"])
    (folder / "x.tar.gz").write_bytes((folder / "x.tar.gz").read_bytes()[:300])
    with pytest.raises(DatasetError, match="not a complete archive"):
        list(open_sources([folder / "x.tar.gz"]))


def test_a_bad_member_is_named(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("bad.png", b"no image")
    with pytest.raises(ImageError, match=r"x\.zip/bad\.png: this is a text file"):
        read_source(next(iter(open_sources([folder / "x.zip"]))))


def test_lists_and_tables(folder, monkeypatch):
    names = ["2.png", "a/0.png", "a/1.png"]
    (folder / "list.txt").write_text("\n".join(names) + "\n\n")
    sources = open_sources(lists=[folder / "list.txt"])
    assert sources.count == 3
    same(sources, folder)
    with open(folder / "t.csv", "w", newline="") as text:
        csv.writer(text).writerows([["id", "image"], *enumerate([*names, ""])])
    same(open_sources([folder / "t.csv"]), folder)
    same(open_sources([folder / "t.csv"], column="image"), folder)
    with pytest.raises(DatasetError, match="no column 'x'; it has id, image"):
        open_sources([folder / "t.csv"], column="x")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(str(folder / name) for name in names)))
    assert [os.path.relpath(s, folder) for s in open_sources(lists=["-"])] == names


def test_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ["2.png", "a/0.png", "a/1.png"]
    parquet.write_table(pyarrow.table({"path": names, "x": [1, 2, 3]}), folder / "t.parquet")
    sources = open_sources([folder / "t.parquet"])
    assert sources.count == 3
    same(sources, folder)


def test_addresses_without_a_network(folder):
    same(open_sources([f"file://{folder}"]), folder)
    same(open_sources([f"file://{folder}/2.png"]), folder, ["2.png"])
    with pytest.raises(ImageError, match=r"cannot be listed|nothing-like-this"):
        open_sources(["nothing-like-this://bucket"])
    with pytest.raises(ImageError, match="no such object"):
        read_source(_remote(f"file://{folder}/absent.png"))


def _remote(address):
    from medmamba.data.sources import RemoteImage

    return RemoteImage(address)


@pytest.mark.slow
def test_an_object_store(folder, monkeypatch):
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        store = s3fs.S3FileSystem()
        for attempt in range(600):
            try:
                store.mkdir("bucket")
                break
            except Exception:
                if attempt == 599:
                    raise
                time.sleep(0.2)
        for name in ("2.png", "a/0.png", "a/1.png", "a/notes.txt"):
            store.put_file(str(folder / name), f"bucket/scans/{name}")
        sources = open_sources(["s3://bucket/scans"])
        assert sources.count == 3
        same(sources, folder)
        from medmamba.config import PreprocessConfig
        from medmamba.imaging.ahead import Order, Prepared, read_ahead

        order = Order(PreprocessConfig(input_size=(16, 16)))
        chunks = read_ahead(sources, order, workers=1, chunk=2, wait=True)  # in another process, several at once
        assert [type(item) for chunk in chunks for item in (chunk.items, chunk.release())[0]] == [Prepared] * 3
    finally:
        server.kill()
        server.wait()
