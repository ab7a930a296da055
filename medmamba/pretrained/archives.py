"""Unpacks a zip with a model, which may come from anybody: only the files of a model, only what they need to be.

The header of the weights is compared with the configuration before the tensors are unpacked, so a small file cannot
fill the disk, and nothing is put into the cache that could not be loaded.
"""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME, PretrainedError
from .weights_file import check_header, parse_header, read_header

SIDECARS = ("results.json", "unusual.json")  # what a model may say of itself beside config.json; the app shows it
MAX_CONFIG, MAX_SIDECAR = 8 * 2**20, 64 * 2**20  # bytes of config.json; of a file beside it
MAX_MEMBERS = 10_000
MAX_RATIO = 100  # unpacked to packed; weights hardly compress at all
_CHUNK = 1 << 20


def extract(file: Path, folder: Path) -> None:
    """Unpacks the one model in a zip, at its top or in one folder of it, into a folder.

    Raises:
        PretrainedError: not exactly one model, damaged, encrypted, links, or larger than its configuration makes it.
        ConfigError: a configuration that cannot be read.
    """
    from .mixin import read_config

    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(archive, file)
            root = _root(members, file)
            _copy(archive, members[root + CONFIG_NAME], folder / CONFIG_NAME, MAX_CONFIG)
            config = read_config(folder)
            weights = members[root + WEIGHTS_NAME]
            with archive.open(weights) as stream:
                entries, length = parse_header(stream, f"{WEIGHTS_NAME} in {file}")
            check_header(entries, config, f"{WEIGHTS_NAME} in {file}")
            size = 8 + length + sum(entry.nbytes for entry in entries.values())
            if size != weights.file_size:
                raise PretrainedError(f"{file} is damaged: {WEIGHTS_NAME} in it is not as long as its header says")
            if size > shutil.disk_usage(folder).free:
                raise PretrainedError(f"{file} needs {size / 2**20:,.0f} MiB, more than is free at {folder.parent}")
            _copy(archive, weights, folder / WEIGHTS_NAME, size)
            for name in SIDECARS:
                if root + name in members:
                    _copy(archive, members[root + name], folder / name, MAX_SIDECAR)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:  # last: encrypted
        raise PretrainedError(f"{file} is damaged or cannot be unpacked ({error}); download or zip it again") from error


def inspect(folder: Path) -> None:
    """Compares the header of the weights in a folder with the configuration, before it is put into the cache.

    Raises:
        PretrainedError: not a safetensors file, or not of a network of this size.
        ConfigError: a configuration that cannot be read.
    """
    from .mixin import read_config

    check_header(read_header(folder / WEIGHTS_NAME), read_config(folder), str(folder / WEIGHTS_NAME))


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """Members by name; Windows' own tools write backslashes."""
    found: dict[str, zipfile.ZipInfo] = {}
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise PretrainedError(f"{file} has {len(infos):,} members; a model has a handful")
    for info in infos:
        name = info.filename.replace("\\", "/")
        if name in found and not name.endswith("/"):
            raise PretrainedError(f"{file} has {name} twice, so it is not clear which is meant; zip it again")
        found[name] = info
    return found


def _root(members: dict[str, zipfile.ZipInfo], file: Path) -> str:
    roots = [n.removesuffix(CONFIG_NAME) for n in members if n == CONFIG_NAME or n.endswith(f"/{CONFIG_NAME}")]
    roots = [root for root in roots if root + WEIGHTS_NAME in members]
    if len(roots) != 1:
        found = f"it holds {len(roots)}: {', '.join(sorted(roots)[:5])}" if roots else "it holds none"
        raise PretrainedError(f"{file} should hold one {CONFIG_NAME} beside one {WEIGHTS_NAME}, and {found}")
    return roots[0]


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, most: int) -> None:
    """Unpacks one member to a name of ours, so that no path in the archive is followed; counts what really comes."""
    name = target.name
    if stat.S_ISLNK(info.external_attr >> 16):
        raise PretrainedError(f"{name} in {archive.filename} is a link; zip the file itself")
    limit = f"{name} in {archive.filename} unpacks to more than {most / 2**20:,.0f} MiB, which is too large"
    if info.file_size > most:
        raise PretrainedError(limit)
    ratio = info.file_size / max(info.compress_size, 1)
    if info.file_size > _CHUNK and ratio > MAX_RATIO:
        raise PretrainedError(
            f"{name} in {archive.filename} unpacks to {ratio:.0f} times its size, as no trained model does"
        )
    written = 0
    with archive.open(info) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK):  # checks the CRC at the end
            written += len(chunk)
            if written > most:
                raise PretrainedError(limit)
            sink.write(chunk)
