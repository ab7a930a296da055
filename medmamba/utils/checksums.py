"""Checks that the two files of a saved model are complete and belong together."""

import hashlib
from pathlib import Path

from .strict_json import read_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CHECKSUM_KEY = "weights_sha256"  # in config.json: of the model.safetensors that it was saved with


class PretrainedError(OSError):
    """A pretrained model that cannot be found, read or saved; the message says what to do."""


class Damaged(Exception):
    """A file that does not match its checksum; downloading it again may help."""


def verify(folder: Path, announced: dict[str, str | None] | None = None) -> Path:
    """Compares both files with the hashes that a server announced, and the weights with the one in the configuration.

    Raises:
        Damaged: a file is not the one that was announced.
    """
    announced = announced or {}
    for file, expected in announced.items():
        if expected and file_hash(folder / file, expected) != expected:
            raise Damaged(f"{file} does not match its checksum")
    recorded = _recorded_hash(folder)
    if recorded and recorded != announced.get(WEIGHTS_NAME) and file_hash(folder / WEIGHTS_NAME) != recorded:
        if announced.get(WEIGHTS_NAME):  # not damaged on the way: it was published so
            raise PretrainedError(f"{WEIGHTS_NAME} in {folder} is not the one that its {CONFIG_NAME} was saved with")
        raise Damaged(f"{WEIGHTS_NAME} does not match its checksum")
    return folder


def checked(folder: Path) -> Path:
    """Runs `verify` on a local folder, with errors that say how to repair it."""
    try:
        return verify(folder)
    except Damaged as error:
        if (folder / WEIGHTS_NAME).stat().st_size < 1024 and b"git-lfs" in (folder / WEIGHTS_NAME).read_bytes():
            raise PretrainedError(
                f"{folder / WEIGHTS_NAME} is only a pointer: run `git lfs pull` in {folder}"
            ) from error
        raise PretrainedError(
            f"{folder}: {error}. It is cut short, or not the file that {CONFIG_NAME} was saved with. Save or download "
            f'both again; if you changed the weights on purpose, remove "{CHECKSUM_KEY}" from {CONFIG_NAME}'
        ) from error


def _recorded_hash(folder: Path) -> str | None:
    try:
        data = read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return None  # read_config says what is wrong with it
    value = data.get(CHECKSUM_KEY) if isinstance(data, dict) else None
    return value if isinstance(value, str) else None


def file_hash(path: Path, like: str = "") -> str:
    """Returns the SHA-256 of a file, or its git blob SHA-1 if `like` has 40 digits."""
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
