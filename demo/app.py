"""Entry point of the medmamba web app: `python -m demo.app`, or `make demo`.

A Gradio front end for the package: one module per tab in `tabs/`, the API endpoints in `api.py`.
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
from medmamba.config import BACKBONES
from medmamba.pretrained import has_classes

from . import api, api_dense, html, theme
from .context import Context
from .dense import DenseModels, bundled_dense, split_models
from .guard import Guard
from .options import Limits, Options
from .sessions import Sessions
from .store import ModelStore
from .tabs import address, classify, compare, evaluate, explain, finetune, models, saved, segment, similar, viewer

HERE = Path(__file__).parent


def build_demo(options: Options, root: Path) -> gr.Blocks:
    """Builds the app and loads the default model.

    Args:
        root: folder for uploads and sessions, from `prepare`.

    Raises:
        PretrainedError, ConfigError, ValueError: the default model cannot be loaded, or the device does not exist.
    """
    sessions = Sessions(options.limits, root)
    classifiers, named = split_models(options.models)
    context = Context(options, ModelStore(classifiers or tuple(default_models()), options.device), sessions)
    outlining = DenseModels(named, options.device, context.service)
    with gr.Blocks(title="medmamba", analytics_enabled=False) as demo:
        theme.Html(html.header(medmamba.__version__))
        theme.Html(html.notice())
        with gr.Tabs(elem_classes="mm-tabs") as tabs:
            with gr.Tab("Classify", id="classify"):
                classified = classify.build(context)
                with classified.opening:
                    saved.build(context, classified)
                with classified.below:
                    similar.build(context, classified)
            with gr.Tab("Explain", id="explain") as tab:
                explain.build(context, classified, tab, tabs)
            if named:
                with gr.Tab("Segment", id="segment") as segment_tab:
                    segment.build(context, outlining, segment_tab)
            with gr.Tab("Evaluate", id="evaluate") as evaluate_tab:
                evaluate.build(context, evaluate_tab)
            with gr.Tab("Compare", id="compare") as compare_tab:
                compare.build(context, compare_tab)
            with gr.Tab("Fine-tune", id="finetune"):
                finetune.build(context, classified, tabs)
            with gr.Tab("Models", id="models") as models_tab:
                models.build(context, classified, models_tab, tabs)

        viewer.build(context, classified)
        address.build(context, classified)
        api.build(context)
        if named:
            api_dense.build(context, outlining)

        def leave(request: gr.Request) -> None:
            sessions.close(request)

        demo.unload(leave)
    return demo.queue(max_size=options.limits.queue, default_concurrency_limit=1)


def launch_options(limits: Limits) -> dict[str, Any]:
    """Returns the keyword arguments of `launch`, locally and on a Space."""
    from starlette.middleware import Middleware

    on_space = "SPACE_ID" in os.environ
    endpoints = {**api.ENDPOINTS, **api_dense.ENDPOINTS}
    guard = Middleware(Guard, per_minute=limits.requests_per_minute, behind_proxy=on_space, endpoints=endpoints)
    return {
        "app_kwargs": {"middleware": [guard]},
        "theme": theme.theme(),
        "css_paths": [HERE / "style.css"],
        "js": script(),
        "favicon_path": HERE / "favicon.png",
        "footer_links": ["api"],
        "run_history": False,  # would store uploads in the browser
        "max_file_size": f"{max(limits.image_mb, limits.zip_mb)}mb",
        "state_session_capacity": limits.sessions,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
    }


def script() -> str:
    """Returns the JavaScript of the page: a function that runs those of all files."""
    parts = [(HERE / name).read_text(encoding="utf-8") for name in ("page.js", "viewer.js", "folder.js")]
    return "() => {" + "".join(f"({part.strip()})();\n" for part in parts) + "}"


def main(argv: list[str] | None = None) -> int:
    """Starts the server and blocks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.app", description="The medmamba web app.")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="models to offer, the default first: name, org/name[@revision] or folder of a classifier, segmentation "
        f"model or detector (default: {DEFAULT_MODEL} and all other bundled models)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: local only)")
    parser.add_argument("--port", type=int, default=None, help="port (default: first free port from 7860)")
    parser.add_argument("--open", action="store_true", help="open the app in a browser")
    args = parser.parse_args(argv)
    root = prepare()
    models = tuple(args.model or (*default_models(), *bundled_dense()))
    options = Options(models, args.device, backbones=bundled_backbones())
    try:
        demo = build_demo(options, root)
    except (ValueError, OSError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    listen = {"server_name": args.host, "server_port": args.port, "prevent_thread_lock": True}
    demo.launch(**listen, **launch_options(options.limits))
    if args.open:
        webbrowser.open(f"{demo.local_url}?example")  # page.js then classifies the first example
    demo.block_thread()
    return 0


def default_models() -> list[str]:
    """Returns the names of the bundled classifiers, the default model first."""
    others = [name for name, folder in medmamba.bundled_models().items() if has_classes(folder)]
    return [DEFAULT_MODEL, *(name for name in others if name != DEFAULT_MODEL)]


def bundled_backbones() -> tuple[str, ...]:
    """Returns the names of the general backbones that come with this copy of medmamba, from which Fine-tune starts."""
    here = medmamba.bundled_models()
    return tuple(name for name in BACKBONES if name in here)


def prepare() -> Path:
    """Configures the process for the app; returns a new folder for all visitor data.

    Disables telemetry, and the warnings of pydicom, which quote values from patient headers.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # By default Gradio keeps statistics of 10,000 requests and summarises them after each one.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    root = Path(tempfile.mkdtemp(prefix="medmamba-"))
    # Gradio reads this when a component is created and when a file arrives.
    os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
    return root


if __name__ == "__main__":
    sys.exit(main())
