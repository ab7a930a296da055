"""python -m hub.space build DIR: writes the folder of the web app's Space, to be uploaded as it is.

    python -m hub.space build space
    hf upload ORG/medmamba space . --repo-type space

The folder holds the app, the package and the models, so that nothing else must be published first; with --from-hub, the
models are not copied but fetched from the Hub while the Space is built.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import medmamba
from medmamba.config import DEFAULT_MODEL, ORGANISATION
from medmamba.pretrained import PretrainedError, bundled_models
from medmamba.pretrained.sources import SIDECARS
from medmamba.utils.checksums import CONFIG_NAME, WEIGHTS_NAME

ROOT = Path(__file__).resolve().parents[1]
ENTRY = '''"""Entry point of the Space: the app of `demo/`, within the limits of a public server."""

import os

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  before anything that may touch CUDA

from demo.app import build_demo, launch_options, prepare
from demo.options import PUBLIC, Options

root = prepare()
options = Options({models!r}, "auto", PUBLIC)
demo = build_demo(options, root)

if __name__ == "__main__":
    demo.launch(**launch_options(options.limits))
'''

# Not needed there: compiled code for other systems, sources, tests of the app's own.
IGNORED = ("__pycache__", "*.pyc", "csrc", "macos-*", "windows-*", "linux-aarch64*", "*.so.tmp")


class SpaceError(ValueError):
    """A folder or model that a Space cannot be made from; the message says what to do."""


def build(folder: Path, models: list[str] | None = None, from_hub: bool = False) -> list[Path]:
    """Writes the Space.

    Args:
        folder: new or empty, or a Space that was built before, whose files are then replaced.
        models: names on offer, the default first; None: all that come with this copy of medmamba.
        from_hub: take the models from the Hub, "org/name" or "org/name@revision", when the Space is built there.

    Returns:
        The files, relative to the folder.

    Raises:
        SpaceError: no models, one that is not here, or a folder that holds something else.
    """
    names = models or sorted(bundled_models(), key=lambda name: name != DEFAULT_MODEL)
    if not names:
        raise SpaceError("no model comes with this copy of medmamba; name some with --models, or train one first")
    _clear(folder)
    shutil.copytree(ROOT / "demo", folder / "demo", ignore=shutil.ignore_patterns(*IGNORED, "*.txt"))
    (folder / "demo" / "README.md").unlink()  # becomes that of the Space; the one with the images' sources stays
    shutil.copytree(
        ROOT / "medmamba", folder / "medmamba", ignore=shutil.ignore_patterns(*IGNORED, "weights"), dirs_exist_ok=True
    )
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copyfile(ROOT / "demo" / "requirements.txt", folder / "requirements.txt")
    if not from_hub:
        names = [_copy_model(name, folder / "medmamba" / "weights") for name in names]
    elif wrong := [name for name in names if name.count("/") != 1]:
        raise SpaceError(f"the Hub knows models as org/name or org/name@revision, not {', '.join(wrong)}")
    (folder / "app.py").write_text(ENTRY.format(models=tuple(names)), encoding="utf-8")
    (folder / "README.md").write_text(_readme(names, from_hub), encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "app.py").is_file() or not (folder / "demo").is_dir():
            raise SpaceError(f"{folder} holds something that is not a Space; give a new folder")
        for path in folder.iterdir():
            if path.name == ".git":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _copy_model(name: str, target: Path) -> str:
    """Copies a bundled model or folder to where the package looks for bundled ones; returns its name there."""
    source = bundled_models().get(name, Path(name))
    if not (source / CONFIG_NAME).is_file() or not (source / WEIGHTS_NAME).is_file():
        raise SpaceError(f"no model {name!r} here: give a folder, or --from-hub to take it from the Hub")
    shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("checkpoint", ".*"))
    return f"{ORGANISATION}/{source.name}"


def _readme(models: list[str], from_hub: bool) -> str:
    """demo/README.md, with what depends on the models in its front matter."""
    from huggingface_hub import SpaceCard

    card = SpaceCard((ROOT / "demo" / "README.md").read_text(encoding="utf-8"))
    data: dict[str, Any] = {}
    if from_hub:
        data["models"] = [name.partition("@")[0] for name in models]
        data["preload_from_hub"] = [
            " ".join(filter(None, (repo, ",".join(_files(repo)), revision)))
            for repo, _, revision in (name.partition("@") for name in models)
        ]
    for key, value in data.items():
        setattr(card.data, key, value)
    return str(card)


def _files(repo: str) -> list[str]:
    """What to fetch of a model while the Space is built: a file that is not there would stop that."""
    here = bundled_models().get(f"{ORGANISATION}/{repo.partition('/')[2]}")
    return [CONFIG_NAME, WEIGHTS_NAME, *(name for name in SIDECARS if here and (here / name).is_file())]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hub.space", description="The folder of the web app's Space.")
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="write the folder")
    builder.add_argument("folder", type=Path, metavar="DIR")
    builder.add_argument("--models", nargs="+", metavar="MODEL", help="names or folders, the default first")
    builder.add_argument("--from-hub", action="store_true", help="fetch the models while the Space is built")
    args = parser.parse_args(argv)
    try:
        files = build(args.folder, args.models, args.from_hub)
    except (SpaceError, PretrainedError) as error:
        print(f"hub.space: {error}", file=sys.stderr)
        return 2
    size = sum((args.folder / path).stat().st_size for path in files)
    print(f"{args.folder}: {len(files)} files, {size / 2**20:.1f} MiB, medmamba {medmamba.__version__}")
    print(f"upload it with: hf upload ORG/medmamba {args.folder} . --repo-type space")
    return 0


if __name__ == "__main__":
    sys.exit(main())
