"""Training of sets that do not fit in memory: time to the first step and memory of a million rows, and the rate.

    python benchmarks/train_large.py rows --rows 1000000 --format npz --keep disk --seconds 30
    python benchmarks/train_large.py rate --variant nano --size 64 --batch-size 16 --keep memory disk nowhere
    python benchmarks/train_large.py rate --variant tiny --size 224 --batch-size 64 256 --images 20000 --workers 15

`rows` makes a set of repeated small pictures, decodes it once into a cache (`--folder` keeps both for the next time),
and measures a fresh process: seconds from its start to the end of the first step, images per second, and its memory
while it trains, as the kernel counts it; of worker processes the sum. `rate` compares `train` from a warm cache,
whatever it does (reading, augmentation, statistics, progress), with the bare training step: forward, backward and
optimiser on one batch that is already prepared on the device.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES, CLASSES, SIDE = 1000, 4, 28
WARM_UP = 10  # steps before the rate is counted


# --- data ---


def make_rows(path: Path, rows: int, form: str) -> Path:
    """Writes `rows` rows of repeated pictures of 28 pixels, of which 1,000 each are val and test."""
    path = path / f"{form}-{rows}{'.npz' if form == 'npz' else ''}"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (PICTURES, SIDE, SIDE), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, PICTURES)
    counts = {"train": rows - 2 * PICTURES, "val": PICTURES, "test": PICTURES}
    if form == "npz":
        arrays: dict[str, Any] = {}
        for split, count in counts.items():
            chosen = np.arange(count) % PICTURES
            arrays |= {f"{split}_images": pictures[chosen], f"{split}_labels": labels[chosen]}
        np.savez(path, **arrays)
        return path
    encoded = [_png(picture) for picture in pictures]
    if form == "tar":
        path.mkdir(parents=True)
        for split, count in counts.items():
            for start in range(0, count, 100_000):
                with (path / f"{split}-{start // 100_000:03d}.tar").open("wb") as file:
                    for row in range(start, min(start + 100_000, count)):
                        label = str(labels[row % PICTURES]).encode()
                        for suffix, content in (("png", encoded[row % PICTURES]), ("cls", label)):
                            header = tarfile.TarInfo(f"{row:08d}.{suffix}")
                            header.size = len(content)
                            padding = bytes(-len(content) % 512)
                            file.write(header.tobuf(tarfile.USTAR_FORMAT) + content + padding)
                    file.write(bytes(1024))
        return path
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(CLASSES)])}
    )
    parts = {}
    for split, count in counts.items():
        chosen = np.arange(count) % PICTURES
        columns = {"image": [{"bytes": encoded[i], "path": None} for i in chosen], "label": labels[chosen]}
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return path


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def make_pictures(folder: Path, images: int, side: int) -> Path:
    """Writes tar shards of smooth random JPEGs, 100 different ones in turn."""
    root = folder / f"jpeg-{images}-{side}"
    if root.exists():
        return root
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(100):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    root.mkdir(parents=True)
    for split, count in (("train", images), ("val", 100)):
        with tarfile.open(root / f"{split}-000.tar", "w") as archive:
            for row in range(count):
                label = str(row % CLASSES).encode()
                for suffix, content in (("jpg", pictures[row % 100]), ("cls", label)):
                    header = tarfile.TarInfo(f"{row:08d}.{suffix}")
                    header.size = len(content)
                    archive.addfile(header, io.BytesIO(content))
    return root


# --- one run, in a process of its own ---


class Watch:
    """Times of the steps of a run, and either memory or processor time of this process and those it started.

    Both look through all processes of the machine, which takes longer than a step: memory five times a second, the
    processor time before and after the steps that count alone.

    Args:
        steps: that count, after `WARM_UP` others; 0: all, and memory is watched.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []
        self.cpu: list[float] = []  # seconds of this process and of those it started, at both ends
        self.peak = {"anonymous": 0, "mapped": 0}
        self.first = dict(self.peak)  # at the first step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        if not self.steps:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if not self.steps:
            self._thread.join()

    @property
    def at_an_end(self) -> bool:
        """Whether the next step is the first, or the last at one of both ends of those that count."""
        return len(self.times) in (0, WARM_UP, WARM_UP + self.steps)

    def step(self) -> None:
        if not self.times and not self.steps:
            self.first = self._memory()
        if self.times and self.at_an_end:
            self.cpu.append(self._cpu())
        self.times.append(time.time())

    @staticmethod
    def _cpu() -> float:
        import psutil

        total = time.process_time()
        for child in psutil.Process().children():
            try:
                spent = child.cpu_times()
            except psutil.Error:
                continue
            total += spent.user + spent.system
        return total

    def _sample(self) -> None:
        while not self._stop.wait(0.2):
            for kind, size in self._memory().items():
                self.peak[kind] = max(self.peak[kind], size)

    @staticmethod
    def _memory() -> dict[str, int]:
        """Returns MiB, of a page that several processes share only once (Linux: private pages of the children)."""
        import psutil

        me = psutil.Process()
        fields = {}
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name] = value
        anonymous = int(fields["RssAnon"].split()[0]) // 1024
        mapped = (int(fields["RssFile"].split()[0]) + int(fields["RssShmem"].split()[0])) // 1024
        for child in me.children():
            try:
                anonymous += child.memory_full_info().uss // 2**20
            except psutil.Error:
                continue
        return {"anonymous": anonymous, "mapped": mapped}


def child(started: float, options: dict[str, Any]) -> dict[str, Any]:
    """Trains as the command does; returns times and memory."""
    import torch

    from medmamba.training import train, trainer

    plain = trainer.Trainer._step
    until = options.pop("steps")
    watch = Watch(until)

    def step(self: Any, *args: Any) -> Any:
        if until and len(watch.times) == WARM_UP + until:
            self.deadline = 0.0
        found = plain(self, *args)
        if watch.at_an_end and self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        watch.step()
        return found

    trainer.Trainer._step = step  # type: ignore[method-assign]
    batch = options["batch_size"]
    with TemporaryDirectory() as out, watch:
        result = train(options.pop("data"), out, "default", **options, progress=False, check_duplicates=False)
    times = watch.times[WARM_UP : WARM_UP + until + 1] if until else watch.times[WARM_UP:]
    rate = batch * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return {
        "start": watch.times[0] - started if watch.times else None,
        "rate": rate,
        "cpu": 1e3 * (watch.cpu[1] - watch.cpu[0]) / (batch * until) if len(watch.cpu) == 2 else 0.0,
        "steps": len(watch.times),
        "first": watch.first,
        "peak": watch.peak,
        "epochs": result.epoch,
    }


def run(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "child", repr(time.time()), json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def bare(variant: str, size: int, batch: int, device: str, steps: int) -> tuple[float, float]:
    """Returns images per second of forward, backward and optimiser on a batch that is ready on the device, and
    milliseconds of CPU per image."""
    import torch

    from medmamba.config import variant_config
    from medmamba.data import CachedDataset, ImageDataset, Record
    from medmamba.model import MedMamba
    from medmamba.training import load_recipe
    from medmamba.training.checkpoint import CheckpointStore
    from medmamba.training.loss import soft_targets
    from medmamba.training.run_log import RunLog
    from medmamba.training.trainer import Trainer
    from medmamba.utils.devices import make_accelerator

    recipe, accelerator = load_recipe("default", size=size, batch_size=batch), make_accelerator(device)
    index = ImageDataset([Record(i, i % CLASSES, "train") for i in range(batch)], [*"abcd"], reader=None)  # type: ignore[arg-type]
    data = CachedDataset(torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8), index)
    model = MedMamba(variant_config(variant, num_classes=CLASSES))
    with TemporaryDirectory() as folder:
        log = RunLog(Path(folder), progress=False)
        trainer = Trainer(model, recipe, lambda *_: data, accelerator, CheckpointStore(Path(folder)), log)
        trainer.model.train()
        images = torch.randn(batch, 3, size, size, device=accelerator.device)
        ready = (
            images.contiguous(memory_format=torch.channels_last),
            soft_targets(index.targets.to(accelerator.device), CLASSES, recipe.label_smoothing),
        )
        trainer._batch = lambda *_: ready  # type: ignore[method-assign]
        started = cpu = 0.0
        for done in range(-WARM_UP, steps):
            if done == 0:
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                started, cpu = time.perf_counter(), time.process_time()
            trainer._step((size, size), iter([ready]), 0, 0)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        spent = 1e3 * (time.process_time() - cpu) / (batch * steps)
        return batch * steps / (time.perf_counter() - started), spent


# --- tables ---


def rows(args: argparse.Namespace, folder: Path) -> None:
    print(
        "| rows | format | kept | first step, s | images/s | at the first step, MiB | peak, MiB | mapped files, MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for form in args.format:
        started = time.time()
        data = make_rows(folder, args.rows, form)
        print(f"{data} is there after {time.time() - started:.0f} s", file=sys.stderr)
        for keep in args.keep:
            options = {
                "data": str(data),
                "variant": args.variant,
                "size": 32,
                "batch_size": args.batch_size[0],
                "epochs": 1000,
                "device": args.device,
                "cache": str(folder / f"cache-{form}"),
                "keep": keep,
                "workers": args.workers,
                "steps": 0,
            }
            made = "files.json" if keep == "nowhere" else "train-32.npy.json"
            if not (folder / f"cache-{form}" / made).exists():
                started = time.time()
                run({**options, "max_seconds": 0.0})
                print(f"the cache was made in {time.time() - started:.0f} s", file=sys.stderr)
            found = run({**options, "max_seconds": args.seconds})
            cells = [f"{args.rows:,}", form, keep, f"{found['start']:.1f}", f"{found['rate']:.0f}"]
            cells += [str(found["first"]["anonymous"]), str(found["peak"]["anonymous"]), str(found["peak"]["mapped"])]
            print(f"| {' | '.join(cells)} |", flush=True)


def rate(args: argparse.Namespace, folder: Path) -> None:
    data = make_pictures(folder, args.images, args.source_size)
    heads = ["batch", "bare step, images/s", "CPU, ms/image", "kept", "trained, images/s", "of bare", "CPU, ms/image"]
    print(f"| {' | '.join(heads)} | first step, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in args.batch_size:
        for keep in args.keep:
            options = {
                "data": str(data),
                "variant": args.variant,
                "size": args.size,
                "batch_size": batch,
                "epochs": 1000,
                "device": args.device,
                "cache": None if keep == "nowhere" else str(folder / "cache"),
                "keep": keep,
                "workers": args.workers,
                "steps": args.steps,
                "split": None,
            }
            started = time.time()
            best, cpu = bare(args.variant, args.size, batch, args.device, args.steps)  # beside each, as machines drift
            said = f"bare step: {best:.0f} images/s, after {time.time() - started:.0f} s of start and compilation"
            print(said, file=sys.stderr, flush=True)
            cold = keep != "nowhere" and not (folder / "cache" / f"train-{args.size}.npy.json").exists()
            if cold and not args.cold:
                started = time.time()
                run({**options, "max_seconds": 0.0})
                print(f"the cache was made in {time.time() - started:.0f} s", file=sys.stderr, flush=True)
            found = run(options)
            cells = [str(batch), f"{best:.0f}", f"{cpu:.1f}", keep, f"{found['rate']:.0f}"]
            cells += [f"{found['rate'] / best:.2f}", f"{found['cpu']:.1f}", f"{found['start']:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "rate"))
    parser.add_argument("--folder", type=Path, help="keeps data and caches here")
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64])
    parser.add_argument("--keep", nargs="+", default=["memory", "disk", "nowhere"])
    parser.add_argument("--workers", type=int, help="processes that decode (default: one per core)")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", nargs="+", default=["npz"], choices=("npz", "tar", "hf"))
    parser.add_argument("--seconds", type=float, default=30.0, help="of the whole measured run, start included")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--source-size", type=int, default=224, help="side of the JPEGs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--cold", action="store_true", help="rate: make the cache in the measured run, whose first step is late then"
    )
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (rows if args.what == "rows" else rate)(args, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(child(float(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main()
