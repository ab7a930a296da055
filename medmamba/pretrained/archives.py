"""Unpacks a model from an untrusted zip: only the files of a model, and no larger than they need to be.

The header of the weights is compared with the configuration before the tensors are unpacked, so a small file cannot
fill the disk, and nothing enters the cache that could not be loaded.
"""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME, PretrainedError
from .config_file import MAX_CONFIG, read_config
from .weights_file import check_header, parse_header, read_header

SIDECARS = (
    "decisions.json",
    "results.json",
    "similar.safetensors",
    "unusual.json",
)  # optional files of a model, shown by the app
MAX_SIDECAR = 64 * 2**20  # bytes
MAX_MEMBERS = 10_000
MAX_RATIO = 100  # unpacked to packed size; weights hardly compress
_CHUNK = 1 << 20


def extract(file: Path, folder: Path) -> None:
    """Unpacks the only model of a zip, at its top level or in a folder, into `folder`.

    Raises:
        PretrainedError: not exactly one model, damaged, encrypted, links, or larger than its configuration implies.
        ConfigError: a configuration that cannot be read.
    """
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
                raise PretrainedError(f"{file} is damaged: the length of {WEIGHTS_NAME} does not match its header")
            if size > shutil.disk_usage(folder).free:
                raise PretrainedError(f"{file} needs {size / 2**20:,.0f} MiB, more than is free in {folder.parent}")
            _copy(archive, weights, folder / WEIGHTS_NAME, size)
            for name in SIDECARS:
                if root + name in members:
                    _copy(archive, members[root + name], folder / name, MAX_SIDECAR)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:  # last: encrypted
        raise PretrainedError(f"{file} is damaged or cannot be unpacked ({error}); download or zip it again") from error


def inspect(folder: Path) -> None:
    """Checks the header of downloaded weights against the configuration, before they enter the cache.

    Raises:
        PretrainedError: not a safetensors file, or its size does not match the network.
        ConfigError: a configuration that cannot be read.
    """
    check_header(read_header(folder / WEIGHTS_NAME), read_config(folder), str(folder / WEIGHTS_NAME))


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """Returns the members by name, with the backslashes of Windows tools replaced."""
    found: dict[str, zipfile.ZipInfo] = {}
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise PretrainedError(f"{file} has {len(infos):,} members; a model has only a few")
    for info in infos:
        name = info.filename.replace("\\", "/")
        if name in found and not name.endswith("/"):
            raise PretrainedError(f"{file} contains {name} twice, which is ambiguous; zip the model again")
        found[name] = info
    return found


def _root(members: dict[str, zipfile.ZipInfo], file: Path) -> str:
    """Returns the prefix of the only folder that holds a configuration and weights; "" for the top level."""
    roots = [n.removesuffix(CONFIG_NAME) for n in members if n == CONFIG_NAME or n.endswith(f"/{CONFIG_NAME}")]
    roots = [root for root in roots if root + WEIGHTS_NAME in members]
    if len(roots) != 1:
        found = f"it holds {len(roots)}: {', '.join(sorted(roots)[:5])}" if roots else "it holds none"
        raise PretrainedError(f"{file} must hold exactly one {CONFIG_NAME} beside a {WEIGHTS_NAME}; {found}")
    return roots[0]


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, most: int) -> None:
    """Unpacks one member to `target`, ignoring its path in the archive, and counts the bytes as they arrive."""
    name = target.name
    if stat.S_ISLNK(info.external_attr >> 16):
        raise PretrainedError(f"{name} in {archive.filename} is a symbolic link; zip the file itself")
    limit = f"{name} in {archive.filename} unpacks to more than {most / 2**20:,.0f} MiB, the limit"
    if info.file_size > most:
        raise PretrainedError(limit)
    ratio = info.file_size / max(info.compress_size, 1)
    if info.file_size > _CHUNK and ratio > MAX_RATIO:
        raise PretrainedError(
            f"{name} in {archive.filename} unpacks to {ratio:.0f} times its size, which no trained model does"
        )
    written = 0
    with archive.open(info) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK):  # zipfile checks the CRC at the end
            written += len(chunk)
            if written > most:
                raise PretrainedError(limit)
            sink.write(chunk)
