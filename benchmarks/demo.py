"""How the web app behaves: start, first paint, click to answer, and many clients at once.

    python benchmarks/demo.py [--model NAME] [--clients 20] [--seconds 60] [--docs]

Starts the app in a process of its own, with every model that comes with this copy unless it is told otherwise. Paint,
click and training are timed in a browser and left out where Chromium or playwright is missing. With --docs, the figures
and the pictures of docs/app.md are replaced.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import app_pictures

from medmamba.utils.text import json_text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BEGIN, END = "<!-- figures of benchmarks/demo.py -->", "<!-- end of figures -->"
IMAGES = sorted((ROOT / "demo" / "examples").glob("blood_*.webp"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder (default: that of the app)")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=5, help="page loads and clicks (%(default)s)")
    parser.add_argument("--docs", action="store_true", help="write the figures and pictures of docs/app.md")
    args = parser.parse_args()
    import torch

    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "clients": args.clients,
        "seconds": args.seconds,
    }
    process, url, found["start"] = start(args.model)
    try:
        found["model"] = default_model(url)
        if CHROMIUM:
            found |= in_browser(url, args.repeats)
        found |= under_load(url, process.pid, args.clients, args.seconds)
        if CHROMIUM and args.docs:
            pictures = app_pictures.take(url, DOCS / "app", CHROMIUM, FLAGS)
            found["train"] = pictures.pop("train")
            print({path: f"{size / 1000:.0f} kB" for path, size in pictures.items()})
    finally:
        process.terminate()
        process.wait(30)
    print(json_text(found, indent=2))
    if args.docs:
        write_docs(found)


def write_docs(found: dict[str, Any]) -> None:
    """Puts the figures between the marks in docs/app.md."""
    rows = [
        ("start of the server until its first page, s", "start", 15),
        ("first contentful paint, s", "first_paint", None),
        ("first meaningful paint: tabs, model and examples are there, s", "meaningful_paint", 2),
        ("click on an example to its answer, median, s", "click", 1),
        ("slowest such click, s", "slowest_click", 1),
        ("answers", "answers", None),
        ("answers per second", "per_second", None),
        ("answer, p50, s", "p50", None),
        ("answer, p95, s", "p95", None),
        ("errors", "errors", 0),
        ("memory of the server in the second quarter of the time, MiB", "memory_early", None),
        ("memory in the last quarter, MiB", "memory_late", None),
        ("10 epochs on the sample set of 64 images, from `nano-medical`, s", "train", None),
    ]
    table = ["| what | measured | goal |", "| --- | --- | --- |"]
    for name, key, goal in rows:
        if key == "answers":
            name += f" to {found['clients']} clients that ask without a pause for {found['seconds']:g} s"
        if key in found:
            text = "" if goal is None else "none" if goal == 0 else f"under {goal}"
            table.append(f"| {name} | {found[key]} | {text} |")
    lead = (
        f"`python benchmarks/demo.py --docs`: {found['model']} on {found['cores']} cores of {found['processor']}, "
        f"torch {found['torch']}. The clients and the browser ran on the same cores; the load average before was "
        f"{found['load_before']}."
    )
    text = (DOCS / "app.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{textwrap.fill(lead, 120)}\n\n" + "\n".join(table) + f"\n{END}{after}"
    (DOCS / "app.md").write_text(new, encoding="utf-8")


def processor() -> str:
    """Its name, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def default_model(url: str) -> str:
    """Name and variant of the model that answers."""
    from gradio_client import Client

    first = Client(url, verbose=False).predict(api_name="/models")[0]
    return f"{first['name']} ({first.get('architecture', 'unknown')})"


def start(model: str | None) -> tuple[subprocess.Popen, str, float]:
    """The app, its address, and the seconds until it answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "demo.app", "--port", str(port), *(["--model", model] if model else [])]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    while True:
        if process.poll() is not None:
            raise SystemExit("the app did not start; its message is above")
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return process, url, round(time.perf_counter() - began, 2)
        except OSError:
            time.sleep(0.05)


def in_browser(url: str, repeats: int) -> dict[str, Any]:
    """Median seconds, in a fresh browser each time: until the page shows its first state, and from a click on an
    example to its answer."""
    from playwright.sync_api import sync_playwright

    paints, meaningful, clicks = [], [], []
    with sync_playwright() as playwright:
        for _ in range(repeats):
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.perf_counter()
            page.goto(url, wait_until="commit")
            page.locator(".mm-empty").first.wait_for()
            page.locator("[data-mm-example]").first.wait_for()
            meaningful.append(time.perf_counter() - began)
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3)
            page.wait_for_timeout(500)
            began = time.perf_counter()
            page.locator("[data-mm-example]").nth(6).click()
            page.locator(".mm-answer").wait_for()
            clicks.append(time.perf_counter() - began)
            browser.close()
    return {
        "first_paint": round(statistics.median(paints), 2),
        "meaningful_paint": round(statistics.median(meaningful), 2),
        "click": round(statistics.median(clicks), 2),
        "slowest_click": round(max(clicks), 2),
    }


def under_load(url: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they have an answer; latencies, errors, and the memory of the server."""
    from gradio_client import Client, handle_file

    latencies: list[float] = []
    errors: list[str] = []
    memory: list[float] = []
    lock = threading.Lock()
    ready, end = threading.Barrier(clients + 1), [0.0]

    def ask(number: int) -> None:
        client = Client(url, verbose=False)
        image = handle_file(str(IMAGES[number % len(IMAGES)]))
        client.predict(image, api_name="/classify")
        ready.wait()
        while time.monotonic() < end[0]:
            began = time.perf_counter()
            try:
                client.predict(image, api_name="/classify")
            except Exception as error:  # whatever goes wrong is what is looked for
                with lock:
                    errors.append(repr(error))
            else:
                with lock:
                    latencies.append(time.perf_counter() - began)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(clients)]
    for thread in threads:
        thread.start()
    end[0] = time.monotonic() + 3600
    ready.wait()
    end[0] = time.monotonic() + seconds
    while time.monotonic() < end[0]:
        memory.append(resident(pid))
        time.sleep(1)
    for thread in threads:
        thread.join(60)
    ordered = sorted(latencies)
    quarter = max(len(memory) // 4, 1)
    return {
        "answers": len(ordered),
        "per_second": round(len(ordered) / seconds, 1),
        "p50": round(ordered[len(ordered) // 2], 3),
        "p95": round(ordered[int(0.95 * len(ordered))], 3),
        "errors": len(errors),
        "first_errors": errors[:3],
        "memory_early": round(statistics.median(memory[quarter : 2 * quarter])),
        "memory_late": round(statistics.median(memory[-quarter:])),
    }


def resident(pid: int) -> float:
    """Memory of a process in MiB; 0 where it cannot be known."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


if __name__ == "__main__":
    main()
