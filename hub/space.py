"""python -m hub.space build DIR: builds the folder of the web app's Space, ready to upload.

    python -m hub.space build space
    hf upload ORG/medmamba space . --repo-type space

The folder holds the app, the package, the models and the small general backbone, from which Fine-tune starts, so
nothing else has to be published first. With --from-hub, the models are downloaded from the Hub when the Space is built
instead of being copied, and Fine-tune starts from one of them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import medmamba
from demo.dense import DEFAULT as DEFAULT_DENSE
from medmamba.cards import is_dense
from medmamba.config import BACKBONES, DEFAULT_MODEL, ORGANISATION
from medmamba.pretrained import PretrainedError, bundled_models, has_classes
from medmamba.pretrained.sources import SIDECARS
from medmamba.utils.checksums import CONFIG_NAME, WEIGHTS_NAME

ROOT = Path(__file__).resolve().parents[1]
ENTRY = '''"""Entry point of the Space: the app of `demo/`, within the limits of a public server."""

import os

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  must precede anything that may touch CUDA

from demo.app import build_demo, launch_options, prepare
from demo.options import PUBLIC, Options

root = prepare()
options = Options({models!r}, "auto", PUBLIC, {backbones!r})
demo = build_demo(options, root)

if __name__ == "__main__":
    demo.launch(**launch_options(options.limits))
'''

# Not needed on a Space: compiled code for other systems, sources, caches.
IGNORED = ("__pycache__", "*.pyc", "csrc", "macos-*", "windows-*", "linux-aarch64*", "*.so.tmp")


class SpaceError(ValueError):
    """A Space cannot be built from this folder or model; the message says what to do."""


def build(folder: Path, models: list[str] | None = None, from_hub: bool = False) -> list[Path]:
    """Builds the folder of a Space.

    Args:
        folder: new or empty, or an earlier build, whose files are replaced.
        models: names to offer, the default first; None: all bundled classifiers and models for masks and boxes.
        from_hub: download the models, "org/name" or "org/name@revision", when the Space is built.

    Returns:
        The files, relative to the folder.

    Raises:
        SpaceError: no models, an unknown model, or a folder that holds something else.
    """
    classifiers = [name for name, path in bundled_models().items() if has_classes(path)]
    dense = [name for name, path in bundled_models().items() if is_dense(path)]
    order = (DEFAULT_MODEL, DEFAULT_DENSE)
    names = models or sorted(classifiers + dense, key=lambda name: (name in dense, name not in order))
    if not names:
        raise SpaceError("this copy of medmamba has no bundled models; name some with --models, or train one first")
    _clear(folder)
    shutil.copytree(ROOT / "demo", folder / "demo", ignore=shutil.ignore_patterns(*IGNORED, "*.txt"))
    (
        folder / "demo" / "README.md"
    ).unlink()  # becomes that of the Space; examples/README.md, with the image sources, stays
    shutil.copytree(
        ROOT / "medmamba", folder / "medmamba", ignore=shutil.ignore_patterns(*IGNORED, "weights"), dirs_exist_ok=True
    )
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    for name in ("requirements.txt", "packages.txt"):  # for pip and, one Debian package a line, for apt
        shutil.copyfile(ROOT / "demo" / name, folder / name)
    backbones: list[str] = []
    if not from_hub:
        weights = folder / "medmamba" / "weights"
        names = [_copy_model(name, weights) for name in names]
        # Training on a Space is on a CPU mostly, so the small one: the last.
        backbones = [_copy_model(name, weights) for name in BACKBONES[-1:] if name in bundled_models()]
    elif wrong := [name for name in names if name.count("/") != 1]:
        raise SpaceError(f"models on the Hub are named org/name or org/name@revision, not {', '.join(wrong)}")
    (folder / "app.py").write_text(ENTRY.format(models=tuple(names), backbones=tuple(backbones)), encoding="utf-8")
    (folder / "README.md").write_text(_readme(names, from_hub), encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "app.py").is_file() or not (folder / "demo").is_dir():
            raise SpaceError(f"{folder} holds something other than a Space; choose a new folder")
        for path in folder.iterdir():
            if path.name == ".git":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _copy_model(name: str, target: Path) -> str:
    """Copies a bundled model or a folder into the bundled models of the Space; returns its name there."""
    source = bundled_models().get(name, Path(name))
    if not (source / CONFIG_NAME).is_file() or not (source / WEIGHTS_NAME).is_file():
        raise SpaceError(f"no model {name!r} here: pass a folder, or --from-hub to download it from the Hub")
    shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("checkpoint", ".*"))
    return f"{ORGANISATION}/{source.name}"


def _readme(models: list[str], from_hub: bool) -> str:
    """Returns demo/README.md with the front matter completed for these models."""
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
    """Lists the files of a model to preload; a missing file would fail the build of the Space."""
    here = bundled_models().get(f"{ORGANISATION}/{repo.partition('/')[2]}")
    return [CONFIG_NAME, WEIGHTS_NAME, *(name for name in SIDECARS if here and (here / name).is_file())]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hub.space", description="Builds the folder of the web app's Space.")
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="build the folder")
    builder.add_argument("folder", type=Path, metavar="DIR")
    builder.add_argument("--models", nargs="+", metavar="MODEL", help="names or folders, the default first")
    builder.add_argument("--from-hub", action="store_true", help="download the models when the Space is built")
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
