"""End to end: from files to answers, beside what its parts and other pipelines reach in the same run.

    python benchmarks/pipeline.py --source FOLDER_OF_REAL_IMAGES [--model tiny] [--device cuda:0] [--workers 16]
    python benchmarks/pipeline.py --source FOLDER_OF_REAL_IMAGES --kinds jpeg --device cuda:0 cuda:0,cuda:1 --no-peers

Writes real images in the formats below into a temporary folder and prints for each: what the processes can read and
prepare (decode), what the network can compute (network), what comes out of `iter_predict` (end to end: in all, and
without the start, which is the first tenth or 4,096 images, at most half), its share of the slower of the two, and the
share of the time in which the GPUs compute (by NVML; on a CPU, images x time of the network alone). The files are in
the page cache. Of several sets of devices, each is measured in turn.

Peers, with the same number of processes: a PyTorch DataLoader around torchvision's transforms before the same network,
as in timm's `inference.py`, and the image-classification pipeline of transformers, around a ResNet-50 since it takes no
other network.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pipeline_peers import data_loader, transformers_pipeline

from medmamba import MedMamba, create_model
from medmamba.imaging.ahead import Order, Prepared, cores, prepare, read_ahead
from medmamba.imaging.ahead.memory import SharedMemory
from medmamba.imaging.find import find_in
from medmamba.inference.engine import Engine, as_input
from medmamba.inference.pinned import copy_rate, pinned
from medmamba.inference.predict import Failure, iter_predict

START = 4096  # images: by then processes run, the batch size is found, and on a GPU the network is captured as a graph
KINDS = ("webp", "png", "jpeg", "big", "dicom")
NAMES = {
    "webp": "224 WebP",
    "png": "224 PNG",
    "jpeg": "224 JPEG",
    "big": "1600x1200 JPEG, grey",
    "dicom": "512x512 CT DICOM",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of real images, of which the inputs are made")
    parser.add_argument("--model", default="tiny", help="nano, tiny or a model folder")
    parser.add_argument("--size", type=int, default=224, help="of the network's input, for nano and tiny")
    parser.add_argument(
        "--device",
        nargs="+",
        default=["cuda:0" if torch.cuda.is_available() else "cpu"],
        help="or several together: cuda:0,cuda:1; each argument is measured",
    )
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement, about")
    parser.add_argument("--unique", type=int, default=128, help="different files of each kind")
    parser.add_argument("--precision", nargs="+", default=["float32"], help="float32, tf32, bfloat16, float16")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--options", nargs="*", default=[], choices=("reduced", "gpu"), help="also with these ways to decode"
    )
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    groups = [group.split(",") for group in args.device]
    model = (
        create_model(args.model, num_classes=8, preprocess={"input_size": (args.size, args.size)})
        if args.model in ("nano", "tiny", "small", "base")
        else MedMamba.from_pretrained(args.model)
    )
    model = model.eval().to(groups[0][0])
    rows: list[dict[str, Any]] = []
    print(
        f"{args.model} at {model.config.preprocess.input_size[0]}, {device_name(groups[-1])}, "
        f"{args.workers} processes, {torch.get_num_threads()} threads, PyTorch {torch.__version__}",
        flush=True,
    )
    names = sorted({name for group in groups for name in group})
    singly = {(name, p): network_alone(model, name, p, args.batch_size) for name in names for p in args.precision}
    for (name, precision), (rate, batch) in singly.items():
        print(f"network alone, {name}, {precision}: {rate:.0f} images/s at batch size {batch}", flush=True)
    for name in names:
        if name.startswith("cuda"):
            print(copies_alone(name), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            files = write(kind, Path(args.source), Path(folder) / kind, args.unique)
            order = Order(model.config.preprocess, model.config.in_chans)
            core = one_core(files, order)
            decode = decode_alone(files, order, counted(args.seconds, core * args.workers, len(files)), args.workers)
            print(f"\n{NAMES[kind]}: {1e3 / core:.2f} ms of one core to read and prepare", flush=True)
            row = {"kind": NAMES[kind], "ms of a core": 1e3 / core, "decode": decode}
            for devices in groups:
                for precision in args.precision:
                    network = sum(singly[device, precision][0] for device in devices)
                    count = counted(args.seconds, min(decode, network), len(files))
                    for option in ("", *args.options):
                        if option and kind != "big":
                            continue
                        found = end_to_end(model, files, count, args, devices, precision, option, network)
                        rows.append({**row, "devices": len(devices), **found})
                        show(rows[-1])
            if args.peers:
                slower = min(decode, singly[groups[0][0], args.precision[0]][0])
                rows += peers(kind, model, files, counted(args.seconds, slower, len(files)), args, groups[0][0])
            if args.json:  # after each, so that a run that is stopped leaves what it has
                measured = {"args": vars(args), "network": {" ".join(key): value for key, value in singly.items()}}
                Path(args.json).write_text(json.dumps({**measured, "rows": rows}, indent=1))
    print("\n" + table(rows))


def write(kind: str, source: Path, folder: Path, unique: int) -> list[str]:
    """Writes so many different images of a kind and returns their paths."""
    folder.mkdir()
    found = [source / path for path in find_in(source).paths]
    if not found:
        raise SystemExit(f"no images in {source}")

    def one(i: int) -> str:
        with Image.open(found[i % len(found)]) as image:
            picture = image.convert("RGB")
        turned = picture.transpose(Image.Transpose(i // len(found) % 7)) if i >= len(found) else picture
        path = folder / f"{i:05}.{ {'big': 'jpg', 'jpeg': 'jpg', 'dicom': 'dcm'}.get(kind, kind) }"
        if kind == "dicom":
            path.write_bytes(ct_slice(turned, i))
        elif kind == "big":
            turned.convert("L").resize((1600, 1200), Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)
        else:
            small = turned.resize((224, 224), Image.Resampling.BICUBIC)
            small.save(path, **({"quality": 90} if kind != "png" else {}))
        return str(path)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(unique)))


def ct_slice(image: Image.Image, number: int) -> bytes:
    """Returns a CT slice of 512x512 with the greys of an image as Hounsfield units, uncompressed, 16 bits."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    grey = np.asarray(image.convert("L").resize((512, 512), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = np.random.default_rng(number).normal(0, 8, grey.shape)
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, generate_uid(), "CT"
    ds.Rows = ds.Columns = 512
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.WindowCenter, ds.WindowWidth = -1024, 1, 40, 400
    ds.PixelSpacing = [0.7, 0.7]
    ds.PixelData = np.clip(grey * 1.6 + 860 + noise, 0, 4095).astype(np.uint16).tobytes()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def one_core(files: list[str], order: Order) -> float:
    """Returns images per second of one thread, the median of 30 after a warm-up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for path in (files * 40)[:40]:
        start = time.perf_counter()
        assert isinstance(prepare(path, order), Prepared)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1 / statistics.median(times[10:])


def counted(seconds: float, rate: float, unique: int) -> int:
    """Returns how many images take about so many seconds."""
    return max(int(rate * seconds) // unique, 1) * unique


def decode_alone(files: list[str], order: Order, count: int, workers: int) -> float:
    """Returns what the processes read and prepare per second while nobody does anything else."""
    start, seen, late = 0.0, 0, 0
    for chunk in read_ahead((files * (count // len(files) + 1))[:count], order, workers=workers, ahead=32, wait=True):
        seen += len(chunk.items)
        chunk.release()
        if not start:
            start, late = time.perf_counter(), seen
    return (seen - late) / (time.perf_counter() - start)


def network_alone(model: Any, name: str, precision: str, batch: int | None) -> tuple[float, int]:
    """Returns images per second of the network on a device with inputs already there, and the batch size."""
    config = model.config
    engine = Engine(model, torch.device(name), precision)
    size = batch or engine.best_batch(config, 256)
    with torch.cuda.device(name) if name.startswith("cuda") else torch.no_grad():
        inputs = torch.rand(size, *config.preprocess.input_size, config.in_chans, device=name)
        inputs = as_input(inputs, config)
        for _ in range(12 if name.startswith("cuda") else 1):  # the same kernels as end to end: replayed from a graph
            engine.compute(inputs).answer()
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < 3:
            running = [engine.compute(inputs) for _ in range(8 if name.startswith("cuda") else 1)]
            running[-1].answer()
            n += size * len(running)
        return n / (time.perf_counter() - start), size


def copies_alone(name: str) -> str:
    """Returns how fast a GPU copies from memory that processes share, and from other memory."""
    device, memory = torch.device(name), SharedMemory(256 << 20)
    shared = np.frombuffer(memory.map, np.uint8)
    shared[:] = 1  # takes the space
    with pinned(memory, [device]) as is_pinned:
        found = copy_rate(torch.from_numpy(shared), device)
    other = copy_rate(torch.ones(256 << 20, dtype=torch.uint8), device)
    how = "pinned" if is_pinned else "not pinned"
    return (
        f"copies alone, {name}: {found / 1e9:.1f} GB/s from shared memory, {how}; {other / 1e9:.1f} from other memory"
    )


def end_to_end(
    model: Any, files: list[str], count: int, args: Any, devices: list[str], precision: str, option: str, network: float
) -> dict[str, Any]:
    """Measures `iter_predict`, beside a network that alone computes `network` images per second."""
    paths = (files * (count // len(files) + 1))[:count]
    options: dict[str, Any] = {{"gpu": "gpu_decode"}.get(option, option): True} if option else {}
    results = iter_predict(
        model, paths, batch_size=args.batch_size, workers=args.workers, precision=precision, devices=devices, **options
    )
    total, steady, busy = timed(results, count, lambda result: not isinstance(result, Failure), devices)
    return {
        "what": " ".join(["iter_predict", precision, option]).strip(),
        "images": count,
        "network": network,
        "total": total,
        "steady": steady,
        "busy": busy,
        "busy by network": steady / network,
    }


def timed(
    results: Iterator[Any], count: int, good: Callable[[Any], bool], devices: list[str]
) -> tuple[float, float, float | None]:
    """Returns images per second in all, without the start, and the busy share of the GPUs after it."""
    begin = min(max(count // 10, START), count // 2)
    with Busy(devices) as busy:
        start = time.perf_counter()
        first, done = 0.0, 0
        for result in results:
            done += 1
            if not good(result):
                raise SystemExit(f"an image failed: {result}")
            if done == begin:
                first = time.perf_counter()
                busy.begin()
        end = time.perf_counter()
    if done != count:
        raise SystemExit(f"{done} answers for {count} images")
    return count / (end - start), (count - begin) / (end - first), busy.share


class Busy:
    """Samples how busy GPUs are, by NVML; the mean of several."""

    def __init__(self, devices: list[str]) -> None:
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if devices[0].startswith("cuda"):
            try:
                import pynvml

                pynvml.nvmlInit()
                # Not by index, which NVML counts without CUDA_VISIBLE_DEVICES.
                names = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
                handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
            except Exception:
                return
            self._thread = threading.Thread(target=self._watch, args=(pynvml, handles), daemon=True)

    def _watch(self, nvml: Any, handles: list[Any]) -> None:
        while not self._stop.wait(0.05):
            self._samples += [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]

    def begin(self) -> None:
        self._samples.clear()

    @property
    def share(self) -> float | None:
        return statistics.mean(self._samples) / 100 if self._samples else None

    def __enter__(self) -> Busy:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()


def peers(kind: str, model: Any, files: list[str], count: int, args: Any, device: str) -> list[dict[str, Any]]:
    """Measures other pipelines on the same files."""
    rows = []
    for name, run, part in (
        ("DataLoader + torchvision", data_loader, 1),
        ("transformers pipeline", transformers_pipeline, 4),
    ):
        fewer = max(count // part // len(files), 1) * len(files)  # it takes longer
        paths = (files * (fewer // len(files) + 1))[:fewer]
        try:
            total, steady, busy = timed(run(kind, model, paths, args.workers, device), fewer, lambda _: True, [device])
        except Exception as error:  # the others are shown all the same
            print(f"{name}: left out, {error}")
            continue
        rows.append({"kind": NAMES[kind], "what": name, "images": fewer, "decode": None, "network": None})
        rows[-1] |= {"total": total, "steady": steady, "busy": busy, "busy by network": None, "ms of a core": None}
        show(rows[-1])
    return rows


def device_name(devices: list[str]) -> str:
    if devices[0].startswith("cuda"):
        return f"{len(devices)} x {torch.cuda.get_device_name(devices[0])}"
    return "CPU"


def show(row: dict[str, Any]) -> None:
    print("  " + ", ".join(f"{k} {format_value(v)}" for k, v in row.items() if v is not None), flush=True)


def format_value(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    heads = [
        "images",
        "pipeline",
        "devices",
        "decode/s",
        "network/s",
        "end to end/s",
        "without start/s",
        "of the slower",
        "GPU busy",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        limit = min(v for v in (row["decode"], row["network"]) if v is not None) if row["decode"] else None
        cells = [
            row["kind"],
            row["what"],
            row.get("devices"),
            row["decode"],
            row["network"],
            row["total"],
            row["steady"],
        ]
        cells += [
            row["steady"] / limit if limit else None,
            row["busy"] if row["busy"] is not None else row["busy by network"],
        ]
        lines.append("| " + " | ".join("" if cell is None else format_value(cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
