"""The subcommand `medmamba serve`."""

import argparse
from typing import Any

from ..config import DEFAULT_MODEL


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer requests to classify images over HTTP",
        description="Serves a model: POST /classify (a form with file, and optionally frame, window_center and "
        "window_width) answers as JSON; GET /health, /metrics (Prometheus) and /models. Requests that arrive together "
        "are classified in one batch. There is no login: put a proxy in front of it.",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="bundled name, org/name[@revision] or folder (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    parser.add_argument("--devices", type=_devices, default=1, metavar="N", help="GPUs, or auto for all (default: 1)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes per device (default: 1)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="most images at once (default: 32)")
    parser.add_argument(
        "--wait", type=float, default=5.0, metavar="MS", help="milliseconds to wait for a fuller batch (default: 5)"
    )
    parser.add_argument("--max-mb", type=float, default=100.0, metavar="MB", help="largest upload (default: 100)")
    parser.set_defaults(run=run)


def _devices(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run(args: argparse.Namespace) -> int:
    from ..serving import serve

    serve(
        args.model,
        args.host,
        args.port,
        device=args.device,
        devices=args.devices,
        workers=args.workers,
        batch_size=args.batch_size,
        wait=args.wait / 1000,
        max_bytes=int(args.max_mb * 2**20),
    )
    return 0
