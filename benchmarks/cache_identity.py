"""What it costs to know the images of a run by their content: part of a start with 12,000 images.

    python benchmarks/cache_identity.py [--images 12000] [--folder DIR]

Times a first start (index, identity, decoding into a cache) and the next one (index, identity, cache), with the files
in the memory of the operating system, as after a download. Times are of the CPU, so that other work on the machine
does not count. The last column is the share of the identity in the start.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from medmamba.config import PreprocessConfig
from medmamba.data import cache_images, open_dataset
from medmamba.data.cache import _checksum
from medmamba.data.identity import FileIndex, contents, files_of, reading_code
from medmamba.training.identity import data_table, fingerprint, known_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--side", type=int, default=224, help="of the files and of the cache, in pixels")
    parser.add_argument("--folder", type=Path, help="where to make the images; they stay there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        make(root / "data", args.images, args.side)
        reading_code.cache_clear()
        for name in ("first start", "next start", "next start, trusted"):
            measure(name, root, args.side)
            if name == "next start":
                time.sleep(2.1)  # from now on, times are old enough to be trusted


def make(root: Path, count: int, side: int) -> None:
    """Smooth noise as colour PNG, of about the size of photographs."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (root / "train" / label).mkdir(parents=True)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(root / "train" / "ab"[i % 2] / f"{i}.png")


def measure(name: str, root: Path, side: int) -> None:
    times = [time.process_time()]
    cache = root / "cache"
    cache.mkdir(exist_ok=True)
    index = open_dataset(root / "data")
    times.append(time.process_time())
    files = known_files(cache)
    identity = fingerprint(index, data_table(index, files))
    reading_code()
    times.append(time.process_time())
    cached = cache_images(index, PreprocessConfig((side, side)), file=cache / f"train-{side}.npy", files=files)
    float(cached.batch(range(8))[0].sum())
    times.append(time.process_time())
    first = time.process_time()
    contents(index, files)  # what of the last step is identity, again: hashes that are known, and the cache's own
    if name != "next start, trusted":
        FileIndex().hashes([cache / f"train-{side}.npy"], digest=_checksum)
    again = time.process_time() - first
    opened, known, decoded = (b - a for a, b in itertools.pairwise(times))
    size = sum(file.stat().st_size for file in files_of(index)) / 2**20
    share = (known + again) / (opened + known + decoded)
    print(
        f"{name}: {len(index)} images, {size:.0f} MiB: index {opened:.2f} s, identity {known:.2f} s, "
        f"cache {decoded:.2f} s ({again:.2f} s of it identity); identity is {share:.1%} [{identity[:8]}]"
    )


if __name__ == "__main__":
    main()
