"""Decodes the images of a split once, with masks or boxes, and keeps them where they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..config import PreprocessConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class SplitCache:
    """Returns the images of a split at a size; keeps one size of each split in memory.

    Args:
        decode: of (dataset, preprocessing, channels, progress bar), such as `cache_pairs`.
        dataset: with splits.
        config: for crop mode and interpolation.
        in_chans: channels of the model.
        accelerator: on whose GPU the images are kept where they take less than a third of its free memory.
        progress: shows a progress bar.
        say: receives the warnings of the image reader.
    """

    decode: Callable[[Any, PreprocessConfig, int, Any], Any]
    dataset: Any
    config: PreprocessConfig
    in_chans: int
    accelerator: Accelerator
    progress: bool = False
    say: Callable[[str], None] | None = None
    _kept: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def __call__(self, split: str, size: int) -> Any:
        """Returns the images of a split, decoded at `size` pixels."""
        if split not in self._kept or self._kept[split][0] != size:
            self._kept.pop(split, None)  # frees its memory before more is taken
            self._kept[split] = (size, self._load(split, size))
        return self._kept[split][1]

    def _load(self, split: str, size: int) -> Any:
        from tqdm import tqdm

        part = self.dataset.split(split)
        visible = self.progress and self.accelerator.process_index == 0

        def bar(items: Iterable[int]) -> Iterable[int]:
            return tqdm(items, f"reading {split}", len(part), unit="img", disable=not visible)

        found = self.decode(part, dataclasses.replace(self.config, input_size=(size, size)), self.in_chans, bar)
        for line in found.warnings if self.say else ():
            self.say(f"{split}: {line}")  # type: ignore[misc]
        if self.accelerator.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.accelerator.device)
            if found.nbytes < free // 3:
                found.to(self.accelerator.device)
        return found
