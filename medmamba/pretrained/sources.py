"""Resolves the name of a model to a local folder with verified files, downloading them where necessary.

A name is a folder, a zip file, a bundled model, "org/name[@revision]" on the Hub (or its mirror, HF_ENDPOINT), or any
URL that fsspec reads ("s3://...", "file://...", "https://....zip").
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import ORGANISATION, ConfigError
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME, Damaged, PretrainedError, checked, file_hash, verify
from ..utils.files import is_disk_full
from ..utils.network import unreachable
from .advice import how_to_make
from .archives import MAX_SIDECAR, SIDECARS, extract, inspect
from .config_file import MAX_CONFIG

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds before the second attempt, doubled each time
PATIENCE = 60.0  # seconds after which no further attempt is made; the Hub client also retries by itself


def bundled_models() -> dict[str, Path]:
    """Returns the folders of the models shipped with this copy of medmamba, by name ("medmamba/FOLDER")."""
    package = Path(__file__).parents[1]
    found: dict[str, Path] = {}
    for root in (package / "weights", package.parent / "hub" / "models"):  # an installed wheel; a clone
        for config in sorted(root.glob(f"*/{CONFIG_NAME}")):
            if (config.parent / WEIGHTS_NAME).is_file():
                found.setdefault(f"{ORGANISATION}/{config.parent.name}", config.parent)
    return found


def has_classes(folder: Path) -> bool:
    """Returns whether the model in a folder is a classifier; True where config.json does not say (loading will)."""
    config = _config_of(folder)
    return model_kind(folder) == "medmamba" and config.get("num_classes") != 0


def model_kind(folder: str | os.PathLike) -> str:
    """Returns what kind of model a folder holds: "medmamba", "medmamba-segmenter" or "medmamba-detector".

    "medmamba" too where config.json does not say; loading then reports it.
    """
    kind = _config_of(Path(folder)).get("model_type")
    return kind if isinstance(kind, str) and kind.startswith("medmamba-") else "medmamba"


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fetch(
    name: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    sidecars: bool | Sequence[str] = False,
) -> Path:
    """Returns the local folder of a model, its files verified against their checksums.

    Args:
        name: a folder or a zip of one; "org/name" or "org/name@revision"; the short name of a bundled model; or a URL
            that fsspec reads, of a folder or a zip.
        revision: branch, tag or commit, for models on the Hub.
        cache_dir: where downloads are kept; default: the Hub's cache.
        token: for private models; default: the one stored by `hf auth login`.
        local_files_only: do not access the network.
        force_download: download again what is cached.
        sidecars: names of optional files to fetch from the Hub where the model has them; True for all `SIDECARS`. Other
            sources always provide them.

    Raises:
        PretrainedError: no such model, no network, no permission, an incomplete folder or a damaged file.
    """
    text = str(name)
    if Path(name).is_dir() or Path(name).is_file() or (is_address(text) and not text.startswith("hf://")):
        if revision is not None:
            raise PretrainedError(f"revision={revision!r} is for models on the Hub, and {text} is not one of them")
        if is_address(text):
            return _from_address(text, cache_dir, local_files_only, force_download)
        return checked(_complete(Path(name) if Path(name).is_dir() else unpack(Path(name), cache_dir)))
    repo, _, at = re.sub(r"^(hf://|hf[-_]hub:)", "", text).partition("@")
    revision = revision or at or None
    bundled = bundled_models()
    if "/" not in repo:
        repo = f"{ORGANISATION}/{repo}"
    if repo in bundled and revision is None and not force_download:
        return checked(bundled[repo])
    if isinstance(name, os.PathLike) or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise PretrainedError(f"no such folder: {name}. {_what_exists(bundled)}")
    options = dict(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    wanted = SIDECARS if sidecars is True else sidecars or ()
    return _from_hub(repo, force_download, options, wanted)


def hub_name(name: str | os.PathLike) -> str | None:
    """Returns "org/name[@revision]" if `fetch` would take the name from the Hub or the bundled models, else None."""
    text = str(name)
    if isinstance(name, os.PathLike) or Path(text).exists() or (is_address(text) and not text.startswith("hf://")):
        return None
    text = re.sub(r"^(hf://|hf[-_]hub:)", "", text)
    text = text if "/" in text else f"{ORGANISATION}/{text}"
    return text if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", text) else None


def is_address(name: str) -> bool:
    """Returns whether a name is a URL for fsspec rather than a path: its scheme has at least two letters."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)", name) is not None


# --- the Hub ---


def _from_hub(repo: str, force: bool, options: dict[str, Any], extras: Sequence[str]) -> Path:
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    def download(again: bool) -> Path:
        # The configuration first: it is small, so a wrong name fails fast, and the Hub counts downloads by it.
        get = functools.partial(hf_hub_download, repo, force_download=force or again)
        config = Path(get(CONFIG_NAME, **options))
        # The rest from the same commit, even if the branch has moved: the cache names folders by commit.
        pinned = options | {"revision": config.parent.name}
        paths = [config, Path(get(WEIGHTS_NAME, **pinned))]
        for file in extras:
            known = try_to_load_from_cache(repo, file, options["cache_dir"], pinned["revision"])
            if known is _CACHED_NO_EXIST and not (force or again):
                continue  # the cache knows that this commit has no such file
            with contextlib.suppress(EntryNotFoundError):
                paths.append(Path(get(file, **pinned)))
        verify(paths[0].parent, {path.name: _blob_hash(path) for path in paths})
        return paths[0].parent

    offline = unreachable(constants.ENDPOINT) if _asks_network(repo, force, options) else None
    if offline:  # the client would retry for half a minute
        if force:
            raise PretrainedError(f"{repo!r} cannot be downloaded: {offline}. {_without_network(repo)}")
        options = options | {"local_files_only": True}
    # The client's errors derive from those of its HTTP library, which depends on its version.
    transport: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        return _retry(download, transport, _worth_retrying, offline=options["local_files_only"])
    except Damaged as error:
        hint = "with force_download=True" if options["local_files_only"] else "later, or from another mirror"
        raise PretrainedError(f"{repo!r} is damaged: {error}. Download it again {hint}") from error
    except PretrainedError:
        raise
    except transport as error:
        raise PretrainedError(_hub_message(error, repo, options["revision"], offline)) from error


def _asks_network(repo: str, force: bool, options: dict[str, Any]) -> bool:
    """Returns whether the client will contact the Hub; a cached commit needs no network."""
    from huggingface_hub import constants, try_to_load_from_cache

    if options["local_files_only"] or constants.HF_HUB_OFFLINE:
        return False
    commit = re.fullmatch(r"[0-9a-f]{40}", options["revision"] or "")
    known = commit and not force and try_to_load_from_cache(repo, WEIGHTS_NAME, options["cache_dir"], commit[0])
    return not isinstance(known, str)


def _worth_retrying(error: Exception) -> bool:
    """Returns True for dropped connections, short bodies and server errors; False for answers such as "not found"."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    # LocalEntryNotFoundError, an EntryNotFoundError: the client has already retried. ValueError: an invalid name, or a
    # forced download that could not start.
    return not isinstance(error, ValueError | EntryNotFoundError | PermissionError | PretrainedError)


def _hub_message(error: BaseException, repo: str, revision: str | None, offline: str | None = None) -> str:
    """Explains an error of the Hub client, and what to do about it."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, ValueError) and error.__cause__ is not None:  # a forced download that could not start
        error = error.__cause__
    exists = _what_exists(bundled_models())
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        return (
            f"there is no model {repo!r} on the Hub that you may read (private and gated models need `hf auth login` "
            f"or token=...).{how_to_make(repo)} {exists}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo!r} has no revision {revision!r}; omit it for the latest"
    if isinstance(error, LocalEntryNotFoundError):
        why = offline or (_one_line(error.__cause__) if error.__cause__ is not None else "")
        return (
            f"{repo!r} is not in the local cache, and the Hub cannot be reached or access is disabled"
            f"{f' ({why})' if why else ''}. {_without_network(repo)}"
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{repo!r} on the Hub has no {CONFIG_NAME} or no {WEIGHTS_NAME}, so it is not a medmamba model; load a "
            "published .pth with medmamba.load_upstream"
        )
    if isinstance(error, HFValidationError):
        return f"{repo!r} is neither a folder nor a model name such as org/name. {exists}"
    if status in (401, 403):
        return (
            f"the Hub rejects your token for {repo!r} (HTTP {status}): run `hf auth login` again, or use token=False "
            "for a public model"
        )
    if status == 429:
        return f"the Hub limits your requests for {repo!r} (HTTP 429): wait a few minutes, or run `hf auth login`"
    return f"downloading {repo!r} failed after retries: {_one_line(error)}. Try again: complete files are kept"


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _blob_hash(path: Path) -> str | None:
    """Returns the hash the Hub announced for a cached file, which names its blob; None without symbolic links."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


# --- addresses and zips ---


def _from_address(url: str, cache_dir: str | os.PathLike | None, local_files_only: bool, force: bool) -> Path:
    import fsspec

    copies = _cache(cache_dir) / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    if local_files_only:
        known = sorted((c for c in copies.glob("*") if (c / CONFIG_NAME).is_file()), key=lambda c: c.stat().st_mtime)
        if not known:
            raise PretrainedError(f"{url} is not in the local cache, and network access is disabled")
        return checked(known[-1])

    def download(again: bool) -> Path:
        fs, path = fsspec.core.url_to_fs(url)
        zipped = path.endswith(".zip") and fs.isfile(path)
        files = [path] if zipped else [f"{path.rstrip('/')}/{file}" for file in (CONFIG_NAME, WEIGHTS_NAME)]
        # Identifies the version of a remote file: an ETag, or size and time.
        version = hashlib.sha256("".join(str(fs.ukey(file)) for file in files).encode()).hexdigest()[:16]
        if (copies / version / CONFIG_NAME).is_file() and not (force or again):
            return verify(copies / version)
        with _writable(copies, f"downloading {url}"):
            copies.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copies, prefix=".part-") as staging:
            beside = [] if zipped else [f"{path.rstrip('/')}/{file}" for file in SIDECARS]
            for file in [*files, *filter(fs.exists, beside)]:
                _check_size(fs.info(file).get("size"), Path(file).name)
                target = Path(staging, Path(file).name)
                fs.get_file(file, str(target))
                if (size := fs.info(file).get("size")) not in (None, target.stat().st_size):
                    raise Damaged(f"{file} has {size} bytes, received {target.stat().st_size}")
            if zipped:
                extract(Path(staging, Path(path).name), Path(staging))
            inspect(Path(staging))
            return _install(verify(Path(staging)), copies / version)

    def worth(error: Exception) -> bool:
        return not isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | PretrainedError)

    try:
        return _retry(download, (Exception,), worth)
    except (PretrainedError, ConfigError):
        raise
    except FileNotFoundError as error:
        raise PretrainedError(f"{url} is neither a folder with {CONFIG_NAME} and {WEIGHTS_NAME} nor a zip") from error
    except ImportError as error:
        raise PretrainedError(f"reading {url} needs another package: {error}") from error
    except Damaged as error:
        raise PretrainedError(f"{url} was damaged in {ATTEMPTS} downloads: {error}") from error
    except Exception as error:  # each file system has its own errors; ValueError: an unknown scheme
        raise PretrainedError(f"cannot read {url}: {_one_line(error)}") from error


def unpack(file: Path, cache_dir: str | os.PathLike | None = None) -> Path:
    """Unpacks the model in a zip, at its top level or in a folder, into the cache, and returns its folder there.

    Raises:
        PretrainedError: not a zip, damaged, or without exactly one model.
    """
    if file.suffix in PICKLES or not zipfile.is_zipfile(file):  # a .pth is a zip too
        hint = "load a published .pth with medmamba.load_upstream" if file.suffix in PICKLES else "pass its folder"
        raise PretrainedError(f"{file} is not a folder or zip with {CONFIG_NAME} and {WEIGHTS_NAME}; {hint}")
    target = _cache(cache_dir) / "zip" / file_hash(file)[:32]
    if not (target / CONFIG_NAME).is_file():
        with _writable(target.parent, f"unpacking {file}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as staging:
                extract(file, Path(staging))
                _install(Path(staging), target)
    return target


@contextlib.contextmanager
def _writable(folder: Path, what: str) -> Iterator[None]:
    """Turns errors of writing to the cache into one that says what to do."""
    try:
        yield
    except PretrainedError:
        raise
    except OSError as error:
        full = is_disk_full(error)
        why = "the disk is full" if full else f"the cache {folder} cannot be written ({error.strerror or error})"
        raise PretrainedError(
            f"{what} failed: {why}. Set HF_HOME, or cache_dir=..., to a writable folder with free space; or unpack the "
            "model yourself and pass its folder"
        ) from error


def _check_size(size: Any, name: str) -> None:
    most = {CONFIG_NAME: MAX_CONFIG, **dict.fromkeys(SIDECARS, MAX_SIDECAR)}.get(name)
    if most and isinstance(size, int) and size > most:
        raise PretrainedError(f"{name} has {size / 2**20:,.0f} MiB; the limit is {most / 2**20:.0f} MiB")


def _cache(cache_dir: str | os.PathLike | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HOME) / "medmamba"


def _install(folder: Path, target: Path) -> Path:
    """Moves the files into the cache, the configuration last: it marks the copy as complete."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (*(name for name in SIDECARS if (folder / name).is_file()), WEIGHTS_NAME, CONFIG_NAME):
        os.replace(folder / file, target / file)
    return target


def _retry(
    download: Callable[[bool], Path],
    catch: tuple[Any, ...],
    worth: Callable[[Exception], bool],
    offline: bool = False,
) -> Path:
    """Calls `download(again)` until it succeeds; `again` is True after a damaged download, to bypass caches.

    Args:
        catch: errors of the transport; which are worth another attempt, `worth` decides.
        offline: do not repeat.
    """
    start, again = time.monotonic(), False
    for attempt in range(ATTEMPTS):
        try:
            return download(again)
        except (Damaged, *catch) as error:
            last = attempt == ATTEMPTS - 1 or time.monotonic() - start > PATIENCE
            if offline or last or not (isinstance(error, Damaged) or worth(error)):
                raise
            again = again or isinstance(error, Damaged)
        time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _complete(folder: Path) -> Path:
    """Returns the folder if it holds a configuration and weights.

    Raises:
        PretrainedError: one of them is missing.
    """
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / file).is_file():
            hint = ""
            if any(path.suffix in PICKLES for path in folder.iterdir()):
                hint = "; load a published .pth with medmamba.load_upstream, which never unpickles code"
            raise PretrainedError(f"{folder} has no {file}, so save_pretrained did not write it{hint}")
    return folder


def _without_network(repo: str) -> str:
    """Says what to do without a network: connect, make the model where the dataset is known, or use another one."""
    return f"Connect once, or point HF_ENDPOINT at a mirror.{how_to_make(repo)} {_what_exists(bundled_models())}"


def _what_exists(bundled: dict[str, Path]) -> str:
    """Lists the models that can be loaded without a network, and how to make others."""
    names = ", ".join(bundled) or "none"
    return (
        f"Models that come with medmamba: {names}. To train your own: `medmamba train --data FOLDER --out DIR`, then "
        "MedMamba.from_pretrained(DIR); for a new model with random weights: medmamba.create_model('tiny', "
        "num_classes=...)"
    )
