"""Requests per second and their times: `medmamba serve`, the web app's API, and a deployment on Ray Serve.

    python benchmarks/serve.py [--clients 1 8] [--seconds 10] [--servers serve app ray] [--device cpu]

Clients on this machine send one picture after the other over kept connections, each as soon as it has its answer. The
app needs three requests per picture: upload, call, result. All of them run on the cores that the clients use too.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "demo" / "examples" / "blood_neutrophil.webp"
Ask = Callable[[httpx.Client, str], dict[str, Any]]


def ask_serve(client: httpx.Client, url: str) -> dict[str, Any]:
    files = {"file": (PICTURE.name, PICTURE.read_bytes())}
    return client.post(f"{url}/classify", files=files).raise_for_status().json()


def ask_app(client: httpx.Client, url: str) -> dict[str, Any]:
    files = {"files": (PICTURE.name, PICTURE.read_bytes())}
    (name,) = client.post(f"{url}/gradio_api/upload", files=files).raise_for_status().json()
    body = {"data": [{"path": name, "meta": {"_type": "gradio.FileData"}}, None, None, None, None]}
    event = client.post(f"{url}/gradio_api/call/classify", json=body).raise_for_status().json()["event_id"]
    text = client.get(f"{url}/gradio_api/call/classify/{event}").raise_for_status().text
    return json.loads(text.split("data: ", 1)[1].splitlines()[0])[0]


RAY = """
import sys, time
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from medmamba.serving.answers import Answers
from medmamba.serving.upload import Upload
model, device, port = sys.argv[1], sys.argv[2], int(sys.argv[3])

@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Classify:
    def __init__(self):
        self.answers = Answers(model, device)
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def many(self, uploads):
        return self.answers(uploads)
    async def __call__(self, request: Request):
        if request.url.path == "/health":
            return PlainTextResponse("ok")
        form = await request.form()
        content = await form["file"].read()
        status, found = await self.many(Upload(form["file"].filename, content, None, None, time.monotonic()))
        return JSONResponse(found, status)

ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(Classify.bind(), name="medmamba", route_prefix="/")
while True:
    time.sleep(1)
"""
SERVERS: dict[str, Ask] = {"serve": ask_serve, "app": ask_app, "ray": ask_serve}


@contextlib.contextmanager
def running(kind: str, args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, float, int]]:
    """Yields the address, the seconds that the start took, and the id of the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable]
    if kind == "serve":
        command += ["-m", "medmamba", "serve", "--model", args.model, "--device", args.device, "--port", str(port)]
    elif kind == "app":
        command += ["-m", "demo.app", "--model", args.model, "--device", args.device, "--port", str(port)]
    else:
        script = folder / "ray_serve.py"
        script.write_text(RAY)
        command += [str(script), args.model, args.device, str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "uploads")}
    began = time.monotonic()
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None or time.monotonic() - began > 240:
                raise RuntimeError(f"{kind} did not start: {(folder / f'{kind}.log').read_text()[-2000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/{'' if kind == 'app' else 'health'}", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        yield url, time.monotonic() - began, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def memory(pid: int) -> int:
    """Returns MiB of the memory that a process and those below it have for themselves."""
    import psutil

    me = psutil.Process(pid)
    total = 0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().uss
    return total // 2**20


def measure(ask: Ask, url: str, clients: int, seconds: float) -> tuple[float, np.ndarray]:
    """Returns answers per second, and the time of each in milliseconds."""
    until = time.monotonic() + seconds

    def one(_: int) -> list[float]:
        times = []
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < until:
                began = time.perf_counter()
                assert ask(client, url)["label"] == "neutrophil"
                times.append(1e3 * (time.perf_counter() - began))
        return times

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        times = np.array([value for part in pool.map(one, range(clients)) for value in part])
    return len(times) / (time.monotonic() - began), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medmamba/bloodmnist-nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--servers", nargs="+", default=["serve", "app"], choices=SERVERS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    print("| server | start, s | memory, MiB | clients | images/s | median, ms | 95 %, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in args.servers:
        with tempfile.TemporaryDirectory() as folder, running(kind, args, Path(folder)) as (url, start, pid):
            measure(SERVERS[kind], url, 1, 1.0)  # to warm up
            for clients in args.clients:
                rate, times = measure(SERVERS[kind], url, clients, args.seconds)
                half, most = np.percentile(times, [50, 95])
                cells = [kind, f"{start:.1f}", str(memory(pid)), str(clients)]
                print(f"| {' | '.join(cells)} | {rate:.1f} | {half:.0f} | {most:.0f} |", flush=True)


if __name__ == "__main__":
    main()
