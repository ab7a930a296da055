"""The sources of the public datasets on loopback: small archives laid out as the real ones, and faults on demand."""

import csv
import dataclasses
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from hub.make_sources import Source, source_of
from medmamba.data.registry import DatasetEntry, get

PER_CLASS = 10


def picture(seed: int, level: int, kind: str) -> bytes:
    """A noisy picture whose brightness tells the class."""
    pixels = np.random.default_rng(seed).normal(30 + 25 * level, 6, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def table(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def kvasir(classes: tuple[str, ...] | None = None) -> bytes:
    """One folder of class folders, with what macOS adds."""
    names = get("kvasir").classes
    members = {"__MACOSX/kvasir-dataset/polyps/._x.jpg": b"x", "kvasir-dataset/.DS_Store": b"x"}
    for label, name in enumerate(names):
        for i in range(PER_CLASS if classes is None or name in classes else 0):
            members[f"kvasir-dataset/{name}/{label:02x}{i:04x}-1a2b.jpg"] = picture(100 * label + i, label, "JPEG")
    return zipped(members)


def cpn() -> bytes:
    """An archive whose one file is an archive of three class folders."""
    inner = {
        f"{name}/{name.lower()}-{i}.png": picture(100 * label + i, 3 * label, "PNG")
        for label, name in enumerate(get("cpn-xray").classes)
        for i in range(PER_CLASS)
    }
    return zipped({"dvntn9yhd2-1/Covid19-Pneumonia-Normal Chest X-Ray Images Dataset.zip": zipped(inner)})


def pad() -> bytes:
    """A table, and three archives inside of the archive, none with a folder per class."""
    rows, parts = [], {1: {}, 2: {}, 3: {}}
    for label, name in enumerate(get("pad-ufes-20").classes):
        for i in range(PER_CLASS):
            image = f"PAT_{10 * label + i // 2}_{i}_{label}{i}.png"
            rows.append({"patient_id": image.split("_")[1], "lesion_id": str(i), "diagnostic": name, "img_id": image})
            parts[i % 3 + 1][f"imgs_part_{i % 3 + 1}/{image}"] = picture(100 * label + i, label, "PNG")
    members = {f"images/imgs_part_{number}.zip": zipped(part) for number, part in parts.items()}
    return zipped({"metadata.csv": table(rows), **members})


def fetal() -> bytes:
    """A flat folder, and a table with semicolons, names without suffix and a column that ends in a space."""
    rows, members = [], {}
    for label, name in enumerate(get("fetal-planes-db").classes):
        for i in range(PER_CLASS):
            image = f"Patient{100 * label + i // 2:05d}_Plane{label + 1}_{i % 2 + 1}_of_2"
            rows.append({"Image_name": image, "Patient_num": str(100 * label + i // 2), "Plane": name,
                         "Brain_plane": "Not A Brain", "Operator": "Other", "Train ": "1"})  # fmt: skip
            members[f"Images/{image}.png"] = picture(100 * label + i, label, "PNG")
    return zipped(
        {"FETAL_PLANES_DB_data.csv": table(rows, ";"), "FETAL_PLANES_DB_data.xlsx": b"x", "README.md": b"x", **members}
    )


def ham() -> list[bytes]:
    """Two archives of images without folders, and a table of its own with the lesions."""
    short = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    rows, parts = [], ({}, {})
    for label, name in enumerate(short):
        for i in range(PER_CLASS):
            image = f"ISIC_{100 * label + i:07d}"
            lesion = f"HAM_{100 * label + (i // 2 if i < 4 else i):07d}"  # some have two images
            rows.append({"lesion_id": lesion, "image_id": image, "dx": name, "dx_type": "histo", "age": "50.0",
                         "sex": "male", "localization": "back", "dataset": "vidir_modern"})  # fmt: skip
            parts[i % 2][f"{image}.jpg"] = picture(100 * label + i, label, "JPEG")
    return [zipped(parts[0]), zipped(parts[1]), table(rows)]


def medmnist(entry: DatasetEntry, side: int) -> bytes:
    """Arrays as MedMNIST stores them: grey without a channel axis, labels (N, 1), or (N, K) where there are several."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (entry.splits or {}).items():
        grades = np.arange(count) % entry.num_classes
        shape = (count, side, side) + ((3,) if entry.channels == 3 else ())
        level = grades.reshape(-1, *[1] * (len(shape) - 1))
        arrays[f"{split}_images"] = rng.normal(40 + 20 * level, 6, shape).clip(0, 255).astype(np.uint8)
        labels = np.eye(entry.num_classes, dtype=np.uint8)[grades] if entry.task == "multilabel" else grades[:, None]
        if entry.task == "multilabel":
            labels[::3] = 0  # no finding
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def small(name: str) -> DatasetEntry:
    """The entry of a dataset with the counts of the small copy here."""
    entry = get(name)
    n = PER_CLASS * entry.num_classes
    sizes = dict(zip(("train", "val", "test"), (n - 2 * (n // 4), n // 4, n // 4), strict=True))
    counts = (PER_CLASS,) * entry.num_classes if entry.class_counts else None
    return dataclasses.replace(entry, n_images=n, splits=sizes, other_splits=(), class_counts=counts)


class Sources:
    """What the server has, by path; `cuts` is how many bytes to send before the connection breaks, once per entry."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.ranges = True
        self.log: list[tuple[str, str]] = []
        self.url = ""

    def add(self, source: Source, contents: list[bytes], published: bool = True) -> Source:
        """Serves the files of a source; returns it with the checksums of these where the real ones are published."""
        downloads = []
        for file, content in zip(source.downloads, contents, strict=True):
            parts = urlsplit(file.url)
            self.files[f"/{parts.netloc}{parts.path}"] = content
            md5 = hashlib.md5(content).hexdigest() if file.md5 and published else file.md5
            downloads.append(dataclasses.replace(file, md5=md5))
        return dataclasses.replace(source, downloads=tuple(downloads))


CONTENTS = {"kvasir": kvasir, "cpn-xray": cpn, "pad-ufes-20": pad, "fetal-planes-db": fetal}


def layout(server: Sources, name: str, size: int = 28, original: bool = False) -> tuple[DatasetEntry, Source]:
    """Serves a small copy of a dataset; returns its entry and source with the counts and checksums of the copy."""
    entry = small(name)
    source = source_of(entry, size, original)
    if original:
        return entry, server.add(source, ham())
    contents = CONTENTS[name]() if name in CONTENTS else medmnist(entry, size)
    return entry, server.add(source, [contents])


@contextmanager
def serve() -> Iterator[Sources]:
    """Runs the server on a free port of loopback."""
    sources = Sources()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = urlsplit(self.path).path
            wanted = self.headers.get("Range", "")
            sources.log.append((path, wanted))
            content = sources.files.get(path)
            if content is None:
                self.send_error(404)
                return
            tag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
            if wanted and sources.ranges and self.headers.get("If-Range", tag) == tag:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if not body:
                return
            rest = content[start:]
            if sources.cuts:
                self.wfile.write(rest[: sources.cuts.pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(rest)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sources.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield sources
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
