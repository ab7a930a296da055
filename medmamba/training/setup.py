"""Prepares a run: decoded images, checks of the splits, and the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import MedMambaConfig, variant_config
from ..data import CachedDataset, DatasetError, ImageDataset, cache_images
from ..data.decode import is_deep
from ..data.identity import FileIndex
from ..data.streaming import DecodedAnew, StoredImages, StreamedDataset
from ..model import MedMamba
from ..utils.memory import cores, free_disk, free_memory, local_processes
from ..utils.weights import adapt_input
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

KEEP = ("auto", "memory", "disk", "nowhere")
_SHARE_OF_MEMORY = 0.5  # of what is free, that one split may take


@dataclass
class ImageCache:
    """Decodes images by split and size on first use; keeps one size of each split in memory.

    Args:
        index: the dataset, with splits.
        config: for preprocessing and channels.
        accelerator: on whose GPU the images are kept where they take less than a third of its free memory.
        folder: keeps them on disk too; None: in memory only.
        progress: shows progress bars.
        files: known hashes of the image files.
        say: receives the warnings of the image readers, once per split.
        keep: where decoded images stay, see `train`.
        workers: processes that decode where nothing is kept; None: the cores there are, divided among the processes.
        tell: receives a note where images do not stay in memory.
    """

    index: ImageDataset
    config: MedMambaConfig
    accelerator: Accelerator
    folder: Path | None = None
    progress: bool = False
    files: FileIndex = field(default_factory=FileIndex)
    say: Callable[[str], None] | None = None
    keep: str = "auto"
    workers: int | None = None
    tell: Callable[[str], None] | None = None
    _warned: dict[str, list[str]] = field(default_factory=dict)
    _kept: dict[str, tuple[int, CachedDataset]] = field(default_factory=dict)

    def __call__(self, split: str, size: int) -> CachedDataset:
        """Returns the images of a split, decoded at `size` pixels."""
        if not self.holds(split, size):
            self._kept.pop(split, None)  # frees its memory before more is taken
            self._kept[split] = (size, self._load(split, size))
        return self._kept[split][1]

    def holds(self, split: str, size: int) -> bool:
        """Returns whether the images of this split are at hand at this size."""
        return split in self._kept and self._kept[split][0] == size

    @property
    def warnings(self) -> dict[str, list[str]]:
        """Warnings of the image readers so far, by split."""
        for split, (_, data) in self._kept.items():
            if lines := data.warning_lines():  # of images that are decoded anew they grow
                self._warned[split] = lines
        return self._warned

    def _load(self, split: str, size: int) -> CachedDataset:
        from tqdm import tqdm

        part = self.index.split(split)
        place = self._place(part, split, size)
        preprocess = dataclasses.replace(self.config.preprocess, input_size=(size, size), mean=(0.0,), std=(1.0,))
        if place == "nowhere":
            workers = cores() // local_processes(self.accelerator) if self.workers is None else self.workers
            return StreamedDataset(DecodedAnew(part, preprocess, self.config.in_chans, workers), part)
        visible = self.progress and self.accelerator.process_index == 0
        file = None
        if self.folder is not None:
            with contextlib.suppress(OSError):  # `cache_images` reports what is wrong with it
                self.folder.mkdir(parents=True, exist_ok=True)
            file = self._file(split, size)

        def bar(items: Iterable[int]) -> Iterable[int]:
            return tqdm(items, f"reading {split}", len(part), unit="img", disable=not visible)

        first = file is not None and self.accelerator.num_processes > 1
        with self.accelerator.main_process_first() if first else contextlib.nullcontext():
            cached = cache_images(part, preprocess, self.config.in_chans, file=file, progress=bar, files=self.files)
        self._warn(split, cached.warning_lines())
        if place == "disk":
            assert file is not None
            return StreamedDataset(StoredImages(file), part, warnings=cached.warnings)
        if self.accelerator.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.accelerator.device)
            if cached.images.nbytes < free // 3:
                cached.images = cached.images.to(self.accelerator.device)
                cached.targets = cached.targets.to(self.accelerator.device)
        return cached

    def _file(self, split: str, size: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{split}-{size}.npy"

    def _warn(self, split: str, lines: list[str]) -> None:
        if lines and self.say and split not in self._warned:
            for line in lines:
                self.say(f"{split}: {line.removeprefix('warning: ')}")
        if lines:
            self._warned[split] = lines

    def _place(self, part: ImageDataset, split: str, size: int) -> str:
        """Returns where the decoded images of a split stay: "memory", "disk" or "nowhere"."""
        need = len(part) * size * size * self.config.in_chans * (2 if is_deep(part) else 1)
        found = self.keep if self.keep != "auto" else self._choose(need, self._file(split, size))
        if found == "disk" and self.folder is None:
            raise DatasetError("keep='disk' (--keep disk) needs a folder for the decoded images: cache= (--cache DIR)")
        if found != "memory" and self.tell:
            how = "read from disk as they are needed" if found == "disk" else "decoded anew in every epoch"
            self.tell(f"{split}: {len(part):,} images of {size} pixels ({need / 1e9:.1f} GB decoded) are {how}")
        return found

    def _choose(self, need: int, file: Path | None) -> str:
        """Chooses the fastest place that has the space."""
        if self.accelerator.num_processes > 1:  # all must come to the same answer, and may see different numbers
            from accelerate.utils import broadcast_object_list

            answer = [self._fits(need, file) if self.accelerator.process_index == 0 else ""]
            broadcast_object_list(answer)
            return answer[0]
        return self._fits(need, file)

    def _fits(self, need: int, file: Path | None) -> str:
        copies = 1 if file else local_processes(self.accelerator)  # processes share a file
        if need * copies <= free_memory() * _SHARE_OF_MEMORY:
            return "memory"
        if file is None:
            return "nowhere"
        there = file.stat().st_size if file.is_file() else 0  # to be used, or replaced
        return "disk" if need <= free_disk(file.parent) + there else "nowhere"


def check_splits(index: ImageDataset, needed: Iterable[str] = ("train", "val")) -> None:
    """Checks that a dataset can be trained on.

    Raises:
        DatasetError: a missing split, fewer than two classes, or a class without training images.
    """
    sizes = index.split_sizes
    missing = [name for name in needed if not sizes.get(name)]
    if missing:
        raise DatasetError(f"{index.name} has no images in {' and '.join(missing)}; {_how_to_split(sizes)}")
    if len(index.classes) < 2 and index.task != "multilabel":
        raise DatasetError(f"{index.name} has one class, {index.classes[0]!r}: a classifier needs at least two")
    counts = index.split("train").class_counts
    empty = [name for name, count in zip(index.classes, counts, strict=True) if count == 0]
    if empty:
        raise DatasetError(f"{index.name}: no training images of {', '.join(empty)}; add some or remove the class")


def _how_to_split(sizes: dict[str | None, int]) -> str:
    """Returns advice on missing splits, given the sizes of those present."""
    if not set(sizes) - {None}:
        return (
            "provide folders train, val and test, a CSV with a column split, or have splits made: "
            "split=(0.7, 0.1, 0.2) (--split 0.7,0.1,0.2)"
        )
    there = ", ".join(str(name) for name in sizes)
    if "train" not in sizes:
        return (
            f"it has only {there}. Name the split to train on 'train': the name of its folder, or the value in column "
            "split"
        )
    return (
        f"it has only {there}. Move part of train to a folder val, or pass the folder train itself, if it has class "
        "folders, and have splits made: split=(0.7, 0.1, 0.2) (--split 0.7,0.1,0.2)"
    )


def build_model(
    recipe: Recipe,
    index: ImageDataset,
    variant: str,
    source: MedMamba | None,
    in_chans: int | None,
    labels: dict[int, str],
) -> MedMamba:
    """Builds a model for these classes, new or with the weights of `source`, which is not changed.

    The classifier of `source` is kept if it has the same classes in the same order, and replaced otherwise.
    """
    base = source.config if source else variant_config(variant)
    channels = in_chans or base.in_chans
    config = base.replace(in_chans=channels, num_classes=len(labels), id2label=labels)
    preprocess = dataclasses.replace(config.preprocess, input_size=(recipe.evaluated_at, recipe.evaluated_at))
    if recipe.crop_mode:
        preprocess = dataclasses.replace(preprocess, crop_mode=recipe.crop_mode)
    config = config.replace(task=index.task, preprocess=preprocess, calibration={}, decisions={}, training={})
    if recipe.drop_path is not None:
        config = config.replace(drop_path_rate=recipe.drop_path)
    if recipe.drop is not None:
        config = config.replace(drop_rate=recipe.drop)
    model = MedMamba(config)
    if source:
        same_head = source.config.labels == config.labels and source.config.task == config.task
        tensors = {
            key: tensor.detach().clone()
            for key, tensor in source.state_dict().items()
            if same_head or not key.startswith("head.")
        }
        tensors["patch_embed.proj.weight"] = adapt_input(tensors["patch_embed.proj.weight"], channels)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and all(key.startswith("head.") for key in missing)
    return model
