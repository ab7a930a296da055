"""How the web app behaves: start, first paint, click to answer, and many clients at once.

    python benchmarks/demo.py [--model NAME] [--clients 20] [--seconds 60] [--json FILE]

Starts the app in a process of its own. First paint and click need Chromium and playwright and are left out without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "clients": args.clients,
    }
    process, url, found["start_seconds"] = start(args.model)
    try:
        if CHROMIUM:
            found |= in_browser(url, args.repeats)
        found |= under_load(url, process.pid, args.clients, args.seconds)
    finally:
        process.terminate()
        process.wait(30)
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


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
            meaningful.append(time.perf_counter() - began)
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3)
            page.wait_for_timeout(500)
            began = time.perf_counter()
            page.locator("[data-mm-example]").nth(6).click()
            page.locator(".mm-answer").wait_for()
            clicks.append(time.perf_counter() - began)
            browser.close()
    return {
        "first_paint_seconds": round(statistics.median(paints), 2),
        "meaningful_paint_seconds": round(statistics.median(meaningful), 2),
        "click_to_answer_seconds": round(statistics.median(clicks), 2),
        "slowest_click_seconds": round(max(clicks), 2),
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
        "answers_per_second": round(len(ordered) / seconds, 1),
        "p50_seconds": round(ordered[len(ordered) // 2], 3),
        "p95_seconds": round(ordered[int(0.95 * len(ordered))], 3),
        "errors": len(errors),
        "first_errors": errors[:3],
        "memory_mib_early": round(statistics.median(memory[quarter : 2 * quarter])),
        "memory_mib_late": round(statistics.median(memory[-quarter:])),
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
