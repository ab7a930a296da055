"""What a run of `hub.make` takes: download, disk, memory and GPU time, from stated sizes and measured rates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.data.registry import DatasetEntry
from medmamba.training.recipe import Recipe

from .make_download import content_length
from .make_sources import Download, Source, mirrored

RESULTS = Path(__file__).parent / "results"
MEASURED_AT = 224  # pixels


@dataclass(frozen=True)
class Plan:
    """Needs of one run.

    Attributes:
        download: bytes still to fetch; None: a size is not stated.
        unpacked: bytes of the arranged images, where they can be told before the download.
        decoded: bytes of the decoded images, in memory and with --cache on disk.
        images: training images times epochs.
        rate: training images per second on one GPU; None: none was measured for this variant.
        measured: where the rate comes from.
    """

    download: int | None
    unpacked: int | None
    decoded: int
    images: int
    rate: float | None
    measured: str

    @property
    def gpu_hours(self) -> float | None:
        """Time of all epochs on one GPU; early stopping may end it before."""
        return None if self.rate is None else self.images / self.rate / 3600

    def lines(self) -> list[str]:
        """Returns the needs as text."""
        hours = "unknown: give --rate" if self.gpu_hours is None else f"{self.gpu_hours:.2f} at most"
        unpacked = "about the download again" if self.unpacked is None else f"{self.unpacked / 1e9:.2f} GB of arrays"
        download = "size not stated by the source" if self.download is None else f"{self.download / 1e9:.2f} GB"
        return [
            f"download   {download}",
            f"disk       the download, {unpacked}, {self.decoded / 1e9:.2f} GB of decoded images",
            f"memory     {self.decoded / 1e9:.2f} GB for the decoded images",
            f"GPU hours  {hours} ({self.images:,} images in all epochs; {self.measured})",
        ]


def plan(
    entry: DatasetEntry,
    source: Source,
    recipe: Recipe,
    variant: str,
    *,
    npz_size: int,
    downloads: Path,
    mirror: str = "",
    rate: float | None = None,
) -> Plan:
    """Returns what a run takes. Asks the servers for sizes that no publisher states; sends and writes nothing else.

    Args:
        recipe: with its size set.
        npz_size: size of the MedMNIST file in pixels.
        downloads: folder where files may be already.
        rate: training images per second of the GPU to use, instead of the measured one.
    """
    n = entry.n_images or 0
    train = entry.splits["train"] if entry.splits else 0
    side = recipe.evaluated_at
    size = recipe.size_at(0)
    found, measured = measured_rate(variant, size) if rate is None else (rate, "rate as given")
    return Plan(
        _missing_bytes(source.downloads, downloads, mirror),
        n * npz_size**2 * entry.channels if source.layout == "npz" else None,
        n * side**2 * 3,
        train * recipe.epochs,
        found,
        measured,
    )


def measured_rate(variant: str, size: int, results: Path = RESULTS) -> tuple[float | None, str]:
    """Returns training images per second: the median over the runs in hub/results, and what it is from.

    Runs at 224 pixels in bfloat16 on one GPU count, whole epochs with validation. For another size it is scaled by the
    number of pixels, which is an estimate.
    """
    rates, devices = [], set()
    for path in sorted(results.glob("*/*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        settings = run.get("settings", {})
        same = run.get("architecture") == variant and settings.get("size") == MEASURED_AT
        if same and not settings.get("final_epochs") and run.get("precision") == "bf16" and run.get("seconds"):
            rates.append(run["split_sizes"]["train"] * run["epochs"] / run["seconds"])
            devices.add(run["device"])
    if not rates:
        return None, f"no run of {variant} at {MEASURED_AT} pixels in hub/results"
    rate = statistics.median(rates) * (MEASURED_AT / size) ** 2
    scaled = "" if size == MEASURED_AT else f", scaled from {MEASURED_AT} to {size} pixels"
    return rate, f"{rate:,.0f} images/s, median of {len(rates)} runs on {' and '.join(sorted(devices))}{scaled}"


def _missing_bytes(files: Sequence[Download], folder: Path, mirror: str) -> int | None:
    total = 0
    for file in files:
        if (folder / file.name).is_file():
            continue
        size = content_length(mirrored(file.url, mirror)) or file.about_bytes
        if size is None:
            return None
        part = folder / f".{file.name}.part"
        total += size - (part.stat().st_size if part.is_file() else 0)
    return total
