"""Whether the web app answers under load what it answers alone: many clients classify while another explains.

    python benchmarks/app_load.py [--model NAME] [--device auto] [--clients 8] [--seconds 30] [--direct] [--train]

Prints how many answers and maps differ from those of one client alone by more than rounding; the exit code is 1 where
any does. With --direct the threads call the app's service instead of its server, which needs neither Gradio nor a port.
With --train a model is fine-tuned at the same time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.service import Service, View  # noqa: E402
from demo.store import ModelStore  # noqa: E402
from medmamba.utils.text import json_text  # noqa: E402

IMAGES = sorted(path for path in (ROOT / "demo" / "examples").iterdir() if path.suffix in (".webp", ".jpg", ".jpeg"))
ROUNDING = 1e-4
"""Of a probability; of a map, as a share of its largest value."""
Classify = Callable[[Path], dict[str, float]]
Explain = Callable[[Path], np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medmamba/bloodmnist-nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--direct", action="store_true", help="without a server")
    parser.add_argument("--train", action="store_true", help="fine-tune a model meanwhile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json_text(found, indent=1))
    return 1 if found["answers_that_differ"] or found["maps_that_differ"] or found["errors"] else 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The figures, as plain data."""
    store = ModelStore((args.model,), args.device)
    service = Service(store)
    source = args.model
    expected = {path: dict(service.classify(source, path, View(0)).prediction.top) for path in IMAGES}
    maps = {path: attribution(service, source, path) for path in IMAGES[:2]}
    job = None
    if args.train:
        from demo.jobs import Job, plan
        from demo.options import SAMPLE_SET, Limits

        job = Job(plan(SAMPLE_SET, Limits()), source, 30, folder, Limits(), store.device.type)
    try:
        if args.direct:
            return under_load(args, expected, maps, lambda: direct(service, source), store)
        with serving(args, folder) as url:
            return under_load(args, expected, maps, lambda: through(url), store)
    finally:
        if job:
            job.stop()


def attribution(service: Service, source: str, path: Path) -> np.ndarray:
    *_, found = service.explain(source, path, View(0), ["integrated_gradients"], None, False)
    return found.explanations[0].attribution


def direct(service: Service, source: str) -> tuple[Classify, Explain]:
    def classify(path: Path) -> dict[str, float]:
        return dict(service.classify(source, path, View(0)).prediction.top)

    return classify, lambda path: attribution(service, source, path)


def through(url: str) -> tuple[Classify, Explain]:
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)

    def classify(path: Path) -> dict[str, float]:
        return client.predict(handle_file(str(path)), api_name="/classify")["probabilities"]

    def explain(path: Path) -> np.ndarray:
        return np.load(client.predict(handle_file(str(path)), api_name="/explain")[2])["attribution"]

    return classify, explain


def serving(args: argparse.Namespace, folder: Path):
    """The address of the app, as a context."""
    import contextlib
    import os

    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    from demo import app
    from demo.options import Options

    @contextlib.contextmanager
    def running():
        options = Options((args.model,), args.device)
        demo = app.build_demo(options, folder)
        try:
            _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options(options.limits))
            yield url
        finally:
            demo.close(verbose=False)

    return running()


def under_load(
    args: argparse.Namespace,
    expected: dict[Path, dict[str, float]],
    maps: dict[Path, np.ndarray],
    connect: Callable[[], tuple[Classify, Explain]],
    store: ModelStore,
) -> dict[str, object]:
    """Counts what differs while everybody asks at once, for `args.seconds`."""
    until = time.monotonic() + args.seconds
    lock = threading.Lock()
    count = {"answers": 0, "answers_that_differ": 0, "maps": 0, "maps_that_differ": 0, "errors": 0}
    worst = {"answer": 0.0, "map": 0.0}

    def note(kind: str, error: float) -> None:
        with lock:
            count[f"{kind}s"] += 1
            count[f"{kind}s_that_differ"] += error > ROUNDING
            worst[kind] = max(worst[kind], error)

    def ask(number: int) -> None:
        classify, _ = connect()
        turn = number
        while time.monotonic() < until:
            path = IMAGES[turn % len(IMAGES)]
            turn += 1
            found = classify(path)
            note("answer", max(abs(found[label] - value) for label, value in expected[path].items()))

    def explain() -> None:
        _, explained = connect()
        while time.monotonic() < until:
            for path, alone in maps.items():
                note("map", float(np.abs(explained(path) - alone).max() / np.abs(alone).max()))

    with ThreadPoolExecutor(args.clients + 1) as pool:
        futures = [pool.submit(explain), *(pool.submit(ask, i) for i in range(args.clients))]
        for future in futures:
            if problem := future.exception():
                count["errors"] += 1
                print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
    return {
        "model": args.model,
        "device": str(store.default.device),
        "backend": store.default.backend,
        "clients": args.clients,
        "seconds": args.seconds,
        "by": "service" if args.direct else "server",
        **count,
        "largest_difference": {key: float(f"{value:.2g}") for key, value in worst.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
