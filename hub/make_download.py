"""Downloads that resume where they were cut off, check the published checksum and leave no half-written file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medmamba.utils.extras import require
from medmamba.utils.files import write_text

from .make_sources import Download, MakeError, mirrored

RECORD = "downloads.json"
ATTEMPTS = 5  # in a row without a new byte
PAUSE = 1.0  # seconds before the second attempt, doubled each time
TIMEOUT = 60  # seconds without a byte
CHUNK = 2**20


def fetch(
    files: tuple[Download, ...],
    folder: Path,
    mirror: str = "",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Downloads files into a folder and returns their paths; complete ones are kept.

    `downloads.json` in the folder records size, MD5 and SHA-256 of each, and whether a published checksum confirmed it.

    Raises:
        MakeError: the server refuses, the connection fails again and again, the checksum differs, or the disk is full.
            What arrived of a file that was cut off stays in `.NAME.part`, and the next call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_fetch(file, folder, mirrored(file.url, mirror), progress, say) for file in files]


def _fetch(file: Download, folder: Path, url: str, progress: bool, say: Callable[[str], None]) -> Path:
    path = folder / file.name
    known = _records(folder).get(file.name)
    if known and path.is_file() and _stamp(path) == known["stamp"] and file.md5 in (None, known["md5"]):
        return path
    pooch = require("pooch", "downloading datasets", "hub")
    pooch.get_logger().setLevel(logging.WARNING)
    downloader = _Resuming(folder / f".{file.name}.part", progress)
    try:
        pooch.retrieve(url, f"md5:{file.md5}" if file.md5 else None, file.name, folder, downloader=downloader)
    except ValueError as error:  # the checksum; pooch has deleted the file
        raise MakeError(
            f"{file.name} from {url} is not the published file: its MD5 is {_found(error)}, published is {file.md5}. "
            "Nothing of it was kept. Run the command again; if it stays so, the source has changed or something "
            "between you and it alters the file"
        ) from error
    found = _hashes(path)
    record = {"url": file.url, "bytes": path.stat().st_size, **found, "published_md5": file.md5, "stamp": _stamp(path)}
    write_text(folder / RECORD, json.dumps({**_records(folder), file.name: record}, indent=2) + "\n")
    checked = "as published" if file.md5 else f"no checksum is published; SHA-256 {found['sha256']}"
    say(f"{file.name}: {record['bytes']:,} bytes, {checked}")
    return path


class _Resuming:
    """A downloader for pooch: goes on with what an earlier attempt left in `part`, as long as the file is the same."""

    def __init__(self, part: Path, progress: bool) -> None:
        self.part, self.progress = part, progress
        self.tag = part.with_name(f"{part.name}.tag")  # what the server calls this version of the file

    def __call__(self, url: str, output_file: Any, pooch: Any, check_only: bool = False) -> None:
        import requests
        import urllib3

        failures, before = 0, self._size()
        while True:
            try:
                self._attempt(requests, url)
                break
            except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
                size = self._size()
                failures, before = (1 if size > before else failures + 1), size
                if failures >= ATTEMPTS:
                    raise MakeError(
                        f"{url} was cut off after {size:,} bytes, {ATTEMPTS} times without getting further "
                        f"({_one_line(error)}). Run the command again to go on from there"
                    ) from error
                time.sleep(PAUSE * 2 ** (failures - 1))
            except requests.RequestException as error:
                raise MakeError(f"{url} cannot be downloaded: {_one_line(error)}") from error
        os.replace(self.part, output_file)
        self.tag.unlink(missing_ok=True)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _attempt(self, requests: Any, url: str) -> None:
        have = self._size()
        tag = self.tag.read_text(encoding="utf-8") if have and self.tag.is_file() else ""
        # Without a name for the version the server cannot say whether the rest belongs to what is here.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-", "If-Range": tag} if tag else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416 and answer.headers.get("Content-Range") == f"bytes */{have}":
                return  # complete already
            if answer.status_code >= 500 or answer.status_code in (408, 429):
                raise requests.ConnectionError(f"HTTP {answer.status_code}")
            if answer.status_code not in (200, 206):
                raise MakeError(
                    f"{url} answers HTTP {answer.status_code}. The address may have changed: look at the page of the "
                    "dataset, put the file into the folder of downloads by hand, or give a --mirror"
                )
            goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            length = answer.headers.get("Content-Length")
            total = (have if goes_on else 0) + int(length) if length and length.isdecimal() else None
            _check_space(self.part.parent, (total or 0) - (have if goes_on else 0), url)
            etag = answer.headers.get("ETag", "")
            new = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")
            self.tag.write_text(new, encoding="utf-8")
            mode, start = ("ab", have) if goes_on else ("wb", 0)
            bar = tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=self.part.name[1:-5],
                disable=not self.progress,
            )
            with self.part.open(mode) as stream, bar:
                # Undecoded: decoding would hold back, and lose, what arrived of the last chunk before a cut.
                for chunk in answer.raw.stream(CHUNK, decode_content=False):
                    stream.write(chunk)
                    bar.update(len(chunk))
        if total is not None and self._size() != total:
            raise requests.ConnectionError(f"{self._size():,} of {total:,} bytes arrived")


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MakeError(f"{what} needs {needed / 1e9:.1f} GB more, and {folder} has {free / 1e9:.1f} GB free")


def content_length(url: str) -> int | None:
    """Returns the size that the server states without sending the file; None where it does not, or does not answer."""
    requests = require("requests", "asking for the size of a download", "hub")
    try:
        answer = requests.head(url, allow_redirects=True, timeout=5, headers={"Accept-Encoding": "identity"})
    except requests.RequestException:
        return None
    length = answer.headers.get("Content-Length", "") if answer.status_code == 200 else ""
    return int(length) if length.isdecimal() else None


def records(folder: Path) -> dict[str, Any]:
    """Returns what `fetch` recorded of each file, without the stamp by which it knows the file again."""
    return {name: {k: v for k, v in row.items() if k != "stamp"} for name, row in _records(folder).items()}


def _records(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _hashes(path: Path) -> dict[str, str]:
    digests = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            for digest in digests.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _found(error: ValueError) -> str:
    hashes = re.findall(r"\b[0-9a-f]{32}\b", str(error))
    return hashes[-1] if hashes else "another"


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
