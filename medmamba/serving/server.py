"""A server for programs: requests that arrive together are classified in one batch, on one or several devices.

LitServe (https://lightning.ai/docs/litserve) runs a process per device, collects the batches and restarts nothing by
magic; FastAPI in front of it reads the uploads. A file that cannot be read is an error of its own request only.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from ..utils.extras import require
from .upload import PATH

if TYPE_CHECKING:
    from litserve import LitServer

MAX_BYTES = 100 * 2**20
"""Largest upload."""


def build_server(
    model: str,
    device: str = "auto",
    *,
    devices: int | str = 1,
    workers: int = 1,
    batch_size: int = 32,
    wait: float = 0.005,
    max_bytes: int = MAX_BYTES,
    timeout: float = 60.0,
) -> LitServer:
    """Builds the server of `medmamba serve`; `.run(host=..., port=...)` starts it.

    `POST /classify` takes a multipart form with `file` (and optionally `frame`, `window_center`, `window_width`) and
    answers with the record of the web app's `/classify`, or with a status of 4xx and `{"detail": reason}`.
    `GET /health` is 200 once the model can answer, 503 before; `GET /metrics` has counts and times in the format of
    Prometheus; `GET /models` says what is served.

    Args:
        model: bundled name, "org/name" or folder.
        device: "auto", "cpu", "cuda" or "mps".
        devices: number of GPUs, or "auto" for all.
        workers: processes per device, each with a copy of the model; on CPUs they share the cores.
        batch_size: most images per forward pass.
        wait: seconds that a request waits for others at most.
        max_bytes: largest upload.
        timeout: seconds after which a waiting request is given up with 504.

    Raises:
        ImportError: the extra "serve" is not installed.
        PretrainedError, ConfigError: the model cannot be loaded.
        ValueError: no such device.
    """
    litserve = require("litserve", "medmamba serve")
    require("multipart", "medmamba serve", "serve")
    prometheus = require("prometheus_client", "medmamba serve", "serve")
    from ..utils.devices import pick_device
    from .answers import check_model
    from .lit import ClassifyAPI

    kind = pick_device(device).type
    about = check_model(model)
    metrics = Metrics(prometheus)
    server = litserve.LitServer(
        ClassifyAPI(model, batch_size, wait, workers),
        accelerator=kind,
        devices=devices if kind == "cuda" else 1,
        workers_per_device=workers,
        timeout=timeout,
        middlewares=[(metrics.middleware(), {})],
        model_metadata=about,
        restart_workers=True,
    )
    server.app.state.max_bytes = max_bytes
    server.app.add_api_route("/models", lambda: [about], methods=["GET"])
    server.app.add_api_route("/metrics", metrics.page, methods=["GET"])
    return server


def serve(model: str, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serves a model until interrupted; see `build_server` for the options.

    Args:
        host: address to listen on; "0.0.0.0" for all networks. There is no login: put a proxy in front of it.
        port: TCP port.
    """
    server = build_server(model, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # as containers are stopped; LitServe cleans up after Ctrl-C only
    # One process for all connections: it only passes bytes on, and its metrics are then those of the whole server.
    server.run(host, port, num_api_servers=1, generate_client_file=False)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


class Metrics:
    """Counts and times of requests, as Prometheus reads them.

    Args:
        prometheus: the module prometheus_client.
    """

    def __init__(self, prometheus: Any) -> None:
        self._prometheus = prometheus
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "medmamba_requests", "requests to classify an image, by status", ["status"], registry=self.registry
        )
        self.seconds = prometheus.Histogram(
            "medmamba_request_seconds",
            "from the request to its answer",
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.waiting = prometheus.Gauge(
            "medmamba_requests_in_progress", "requests that have no answer yet", registry=self.registry
        )

    def page(self) -> Any:
        """Returns the metrics as a response."""
        from fastapi import Response

        text = self._prometheus.generate_latest(self.registry)
        return Response(text, media_type=self._prometheus.CONTENT_TYPE_LATEST)

    def middleware(self) -> type:
        """Returns an ASGI middleware that counts requests to classify."""
        metrics = self

        class Counted:
            def __init__(self, app: Any) -> None:
                self.app = app

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] != "http" or scope["path"] != PATH:
                    await self.app(scope, receive, send)
                    return
                began, status = time.perf_counter(), [500]

                async def noted(message: Any) -> None:
                    if message["type"] == "http.response.start":
                        status[0] = message["status"]
                    await send(message)

                with metrics.waiting.track_inprogress():
                    try:
                        await self.app(scope, receive, noted)
                    finally:
                        metrics.requests.labels(str(status[0])).inc()
                        metrics.seconds.observe(time.perf_counter() - began)

        return Counted
