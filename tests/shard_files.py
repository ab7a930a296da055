"""Writes datasets in the layouts of other libraries, in the order of their records."""

import io
import tarfile
from pathlib import Path

from medmamba.data import ImageDataset


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def write_shards(dataset: ImageDataset, root: Path, per_shard: int = 20) -> Path:
    """Writes `split-000.tar` and so on, with a PNG and a `.cls` per sample."""
    for split in ("train", "val", "test"):
        part = dataset.split(split)
        for start in range(0, len(part), per_shard):
            members = []
            for row in range(start, min(start + per_shard, len(part))):
                content = part.reader.file_of(part.records[row]).read_bytes()
                name = part.classes[part.labels[row]].encode()
                members += [(f"{row:06d}.png", content), (f"{row:06d}.cls", name)]
            write_tar(root / f"{split}-{start // per_shard:03d}.tar", members)
    return root


def write_hf(dataset: ImageDataset, root: Path) -> Path:
    """Saves it as a `datasets.DatasetDict`."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(dataset.classes))})
    parts = {}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        part = dataset.split(split)
        images = [{"bytes": part.reader.file_of(r).read_bytes(), "path": None} for r in part.records]
        columns = {"image": images, "label": part.labels.tolist()}
        parts[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root
