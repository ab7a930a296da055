"""The medmamba web app: `python -m demo.app`, or `make demo`.

The package does the work; this shows it. One module per tab in `tabs/`, endpoints for programs in `api.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
import webbrowser
from pathlib import Path
from typing import Any

import gradio as gr

import medmamba
from medmamba import DEFAULT_MODEL

from . import api, html, theme
from .context import Context
from .guard import Guard
from .options import Limits, Options
from .sessions import Sessions
from .store import ModelStore
from .tabs import classify, explain, finetune, models

HERE = Path(__file__).parent


def build_demo(options: Options, root: Path) -> gr.Blocks:
    """The app, its default model loaded.

    Args:
        root: folder for uploads and sessions, as `prepare` gives it.

    Raises:
        PretrainedError, ConfigError, ValueError: the default model cannot be loaded, or there is no such device.
    """
    sessions = Sessions(options.limits, root)
    context = Context(options, ModelStore(options.models, options.device), sessions)
    with gr.Blocks(title="medmamba", analytics_enabled=False) as demo:
        theme.Html(html.header(medmamba.__version__))
        theme.Html(html.notice())
        with gr.Tabs(elem_classes="mm-tabs") as tabs:
            with gr.Tab("Classify", id="classify"):
                classified = classify.build(context)
            with gr.Tab("Explain", id="explain") as tab:
                explain.build(context, classified, tab, tabs)
            with gr.Tab("Fine-tune", id="finetune"):
                finetune.build(context, classified, tabs)
            with gr.Tab("Models", id="models"):
                models.build(context, classified, tabs)

        api.build(context)

        def leave(request: gr.Request) -> None:
            sessions.close(request)

        demo.unload(leave)
    return demo.queue(max_size=options.limits.queue, default_concurrency_limit=1)


def launch_options(limits: Limits) -> dict[str, Any]:
    """What `launch` is called with, wherever the app runs."""
    from starlette.middleware import Middleware

    on_space = "SPACE_ID" in os.environ
    guard = Middleware(Guard, per_minute=limits.requests_per_minute, behind_proxy=on_space, endpoints=api.ENDPOINTS)
    return {
        "app_kwargs": {"middleware": [guard]},
        "theme": theme.theme(),
        "css_paths": [HERE / "style.css"],
        "js": (HERE / "page.js").read_text(encoding="utf-8"),
        "favicon_path": HERE / "favicon.png",
        "footer_links": ["api"],
        "run_history": False,  # would keep what was uploaded in the browser
        "max_file_size": f"{max(limits.image_mb, limits.zip_mb)}mb",
        "state_session_capacity": limits.sessions,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
    }


def main(argv: list[str] | None = None) -> int:
    """Starts the server and waits; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.app", description="The medmamba web app.")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help=f"models on offer, the default first: name, org/name[@revision] or folder ({DEFAULT_MODEL} and all others "
        "that come with medmamba)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=None, help="port (default: the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open the app in a browser")
    args = parser.parse_args(argv)
    root = prepare()
    options = Options(tuple(args.model or default_models()), args.device)
    try:
        demo = build_demo(options, root)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    listen = {"server_name": args.host, "server_port": args.port, "prevent_thread_lock": True}
    demo.launch(**listen, **launch_options(options.limits))
    if args.open:
        webbrowser.open(f"{demo.local_url}?example")  # page.js picks the first one: there is an answer to look at
    demo.block_thread()
    return 0


def default_models() -> list[str]:
    """The default model, then whatever else comes with this copy of medmamba."""
    return [DEFAULT_MODEL, *(name for name in medmamba.bundled_models() if name != DEFAULT_MODEL)]


def prepare() -> Path:
    """Sets this process up for the app and returns a new folder for everything that visitors bring.

    No reports to anybody, and no warnings of pydicom's, which quote values of patients' headers.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio's own statistics would keep ten thousand requests and summarise all of them after each.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    root = Path(tempfile.mkdtemp(prefix="medmamba-"))
    # Gradio reads this whenever a component is made and whenever a file arrives.
    os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
    return root


if __name__ == "__main__":
    sys.exit(main())
