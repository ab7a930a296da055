"""Where the images of each public dataset come from: addresses, published checksums, and how each archive is laid out.

Checksums are those that the publisher prints; None means that none is published, and then `hub.make` records what it
got. Layouts are described from the places named in `Source.known_from`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from medmamba.data.registry import DatasetEntry

MEDMNIST = "https://zenodo.org/records/10519652/files/{name}.npz?download=1"
MENDELEY = "https://prod-dcd-datasets-cache-zipfiles.s3.eu-west-1.amazonaws.com/{name}.zip"
DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/{id}"
SIZES = (28, 64, 128, 224)


class MakeError(RuntimeError):
    """A model cannot be made; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Download:
    """One file to fetch.

    Attributes:
        name: what it is called here.
        md5: as its publisher prints it; None: not published.
        about_bytes: size that the publisher states, often rounded; None: not stated.
    """

    url: str
    name: str
    md5: str | None = None
    about_bytes: int | None = None


@dataclass(frozen=True)
class Table:
    """A table of labels beside a flat folder of images.

    Attributes:
        name: file name of the table, in an archive or downloaded by itself.
        image, label: columns.
        suffix: to append to the image column.
        group: column of the patient or lesion that is put before the file name, so that the pattern of the registry
            finds it; "" if the file name starts with it anyway.
    """

    name: str
    image: str
    label: str
    suffix: str = ""
    group: str = ""


@dataclass(frozen=True)
class Source:
    """The files of a dataset and their layout.

    Attributes:
        layout: "npz": MedMNIST arrays; "folders": one folder per class somewhere in the archives; "table": images
            anywhere in the archives, labels in a table.
        known_from: where the layout is known from.
        by_group: the split is drawn anew, with all images of a patient or lesion on one side, because the official one
            does not apply to these files.
        note: recorded with the weights.
    """

    layout: str
    downloads: tuple[Download, ...]
    known_from: str
    table: Table | None = None
    by_group: bool = False
    note: str = ""


_LOADER = "MedViTV2's datasets.py (github.com/Omid-Nejati/MedViTV2), which downloads and unpacks it"
_SOURCES = {
    # kvasir-dataset/<class>/<uuid>.jpg
    "kvasir": Source(
        "folders",
        (
            Download(
                "https://datasets.simula.no/downloads/kvasir/kvasir-dataset.zip",
                "kvasir-dataset.zip",
                about_bytes=1_200_000_000,
            ),
        ),
        f"datasets.simula.no/kvasir (1.2 GB, no checksum) and {_LOADER}",
    ),
    # dvntn9yhd2-1/Covid19-Pneumonia-Normal Chest X-Ray Images Dataset.zip holds COVID/, NORMAL/, PNEUMONIA/
    "cpn-xray": Source("folders", (Download(MENDELEY.format(name="dvntn9yhd2-1"), "dvntn9yhd2-1.zip"),), _LOADER),
    # metadata.csv and images/imgs_part_1.zip to _3.zip, each with imgs_part_N/PAT_<patient>_<lesion>_<number>.png
    "pad-ufes-20": Source(
        "table",
        (Download(MENDELEY.format(name="zr7vgbcyr2-1"), "zr7vgbcyr2-1.zip"),),
        f"Pacheco et al. 2020 and {_LOADER}",
        Table("metadata.csv", "img_id", "diagnostic"),
    ),
    # Images/Patient<number>_Plane<n>_<i>_of_<k>.png; FETAL_PLANES_DB_data.csv (semicolons) and .xlsx
    "fetal-planes-db": Source(
        "table",
        (
            Download(
                "https://zenodo.org/records/3904280/files/FETAL_PLANES_ZENODO.zip?download=1",
                "FETAL_PLANES_ZENODO.zip",
                "2a5fcc2cefb789bcc0f6c1f73e0ea43f",
                2_100_000_000,
            ),
        ),
        f"the README in the archive, the checksum on zenodo.org/records/3904280, and {_LOADER}",
        Table("FETAL_PLANES_DB_data.csv", "Image_name", "Plane", ".png"),
    ),
}
# The originals of a MedMNIST set at full resolution. ISIC_<number>.jpg in two archives; lesions in the table.
_ORIGINALS = {
    "dermamnist": Source(
        "table",
        (
            Download(DATAVERSE.format(id=3172585), "HAM10000_images_part_1.zip", "4639bfa73ab251610530a97c898e6e46"),
            Download(DATAVERSE.format(id=3172584), "HAM10000_images_part_2.zip", "da43d6cc50f6613013be07e8986b384b"),
            Download(
                DATAVERSE.format(id=4338392) + "?format=original",
                "HAM10000_metadata.csv",
                "8f85fb1aa29d80a2797247e434deb79d",
            ),
        ),
        "Tschandl et al. 2018; checksums as Harvard Dataverse lists them (doi:10.7910/DVN/DBW86T)",
        Table("HAM10000_metadata.csv", "image_id", "dx", ".jpg", "lesion_id"),
        by_group=True,
        note="HAM10000 at full resolution, split by lesion (70/10/20, stratified, seed 0): not that of DermaMNIST, "
        "which has lesions in several parts.",
    )
}


def source_of(entry: DatasetEntry, size: int = 224, original: bool = False) -> Source:
    """Returns where a dataset comes from.

    Args:
        size: of the MedMNIST file: 28, 64, 128 or 224 pixels; the others come in one size.
        original: the images that a MedMNIST set was made from, where known.

    Raises:
        MakeError: private data, no such size, or no originals known.
    """
    if not entry.source.public:
        raise MakeError(
            f"the images of {entry.title} are not public. {entry.source.contact or entry.source.url} With the images: "
            f"medmamba train --data FOLDER --dataset {entry.name} --from medmamba/tiny-medical --recipe finetune"
        )
    if original:
        if entry.name not in _ORIGINALS:
            raise MakeError(
                f"originals are known for {', '.join(_ORIGINALS)}, not for {entry.name}; leave --original out"
            )
        return _ORIGINALS[entry.name]
    if entry.name in _SOURCES:
        return _SOURCES[entry.name]
    if size not in entry.source.md5:
        raise MakeError(f"{entry.title} is published at {', '.join(map(str, SIZES))} pixels, not {size}")
    stem = entry.name if size == 28 else f"{entry.name}_{size}"
    file = Download(MEDMNIST.format(name=stem), f"{stem}.npz", entry.source.md5[size])
    return Source("npz", (file,), "medmnist/info.py of MedMNIST 3.0, with the MD5 of every file")


def mirrored(url: str, mirror: str) -> str:
    """Returns the address at a mirror: its scheme and host, then the host and the path of the original.

    >>> mirrored("https://zenodo.org/records/1/files/a.zip", "http://localhost:8000")
    'http://localhost:8000/zenodo.org/records/1/files/a.zip'
    """
    if not mirror:
        return url
    parts, other = urlsplit(url), urlsplit(mirror)
    path = f"{other.path.rstrip('/')}/{parts.netloc}{parts.path}"
    return urlunsplit((other.scheme, other.netloc, path, parts.query, ""))
