"""Images per second of training, by size and precision, on synthetic images.

    python benchmarks/train.py --variant nano --sizes 96 128 224 --precisions fp32 bf16
    torchrun --nproc-per-node 2 benchmarks/train.py --variant tiny --sizes 224 --precisions bf16 --batch-size 256

Counts what a run does between two validations: augmentation by the recipe, forward, backward, optimiser, average.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator

from medmamba.config import variant_config
from medmamba.data import CachedDataset, ImageDataset, Record
from medmamba.model import MedMamba
from medmamba.training import load_recipe
from medmamba.training.checkpoint import CheckpointStore
from medmamba.training.run_log import RunLog
from medmamba.training.sampling import epoch_order
from medmamba.training.trainer import Trainer
from medmamba.utils.devices import make_accelerator
from medmamba.utils.text import json_text

CLASSES = 8
WARM_UP = 5


def images_per_second(args: argparse.Namespace, size: int, precision: str) -> tuple[float, Accelerator]:
    """Of all processes together, over `args.steps` steps after some to warm up."""
    torch.manual_seed(0)
    recipe = load_recipe(args.recipe, size=size, batch_size=args.batch_size)
    accelerator = make_accelerator(args.device, precision)
    pixels = torch.randint(0, 256, (4 * args.batch_size, size, size, 3), dtype=torch.uint8)
    records = [Record(i, i % CLASSES, "train") for i in range(len(pixels))]
    index = ImageDataset(records, [f"class {i}" for i in range(CLASSES)], reader=None)  # never read: already decoded
    data = CachedDataset(pixels.to(accelerator.device), index)
    data.targets = data.targets.to(accelerator.device)
    model = MedMamba(variant_config(args.variant, num_classes=CLASSES, drop_path_rate=recipe.drop_path or 0.1))
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            recipe,
            lambda split, size: data,
            accelerator,
            CheckpointStore(Path(folder)),
            RunLog(Path(folder), progress=False),
            accumulate=args.accumulate,
        )
        trainer.model.train()
        order = torch.from_numpy(epoch_order(index.labels, "none", 0, 0)).to(accelerator.device)
        started = 0.0
        for done in range(-WARM_UP, args.steps):  # the same number in each process
            if done == 0:
                _wait(accelerator.device)
                started = time.perf_counter()
            step = done % trainer.batches.steps
            rows = order[trainer.batches.rows(step, accelerator.process_index, 0)[0]]
            trainer._step(data.size, iter([data.batch(rows, accelerator.device)] * args.accumulate), 0, step)
        _wait(accelerator.device)
        return args.steps * trainer.batches.size / (time.perf_counter() - started), accelerator


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 224])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=64, help="over all processes")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    for size in args.sizes:
        for precision in args.precisions:
            rate, accelerator = images_per_second(args, size, precision)
            row = {"variant": args.variant, "recipe": args.recipe, "size": size, "precision": precision}
            row |= {"processes": accelerator.num_processes, "batch": args.batch_size}
            if accelerator.is_main_process:
                print(json_text({**row, "images_per_second": round(rate, 1)}), flush=True)


if __name__ == "__main__":
    main()
