"""Opens a model that was saved before: the zip that Fine-tune offers, or the files of a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.inference.ood import UnusualError
from medmamba.pretrained import PretrainedError
from medmamba.pretrained.archives import SIDECARS, extract, inspect
from medmamba.utils.checksums import CONFIG_NAME, WEIGHTS_NAME

from ..context import Context
from ..html import error, tag
from ..options import Limits
from ..sessions import Session
from ..theme import Html
from . import answers
from .classify import ClassifyTab

MOST_MODELS = 8
"""Models of a visitor, trained and opened ones together."""
LARGEST_SIDE = 1024
"""Largest input of an opened model, in pixels; larger ones could occupy the server for minutes."""
FILES = (CONFIG_NAME, WEIGHTS_NAME, *SIDECARS)


def build(context: Context, classify: ClassifyTab) -> None:
    """Builds the button and its event. Call inside the column of the Classify tab."""
    limits = context.options.limits
    button = gr.UploadButton(
        "Open a saved model", file_count="multiple", type="filepath", size="sm", elem_id="mm-open-model"
    )
    shown = Html("", elem_id="mm-opened")

    def take(paths: list[str] | None, request: gr.Request) -> dict[Any, Any]:
        session = context.sessions.of(request)
        files = [Path(path) for path in paths or []]
        session.uploads.update(files)
        try:
            title = open_model(context, session, files, limits)
        except (PretrainedError, ConfigError, UnusualError, OSError, ValueError) as problem:
            text = str(problem)
            for path in (*files, session.folder):
                text = text.replace(str(path), path.name if path in files else "")
            return {shown: error("This model cannot be opened", answers.reason(text, Path("model")))}
        said = tag('<p class="mm-hint" role="status">{} is open, for you alone until you leave the page.</p>', title)
        return {shown: said, classify.model: gr.update(choices=context.choices(session), value=title)}

    private: dict[str, Any] = dict(api_visibility="private", concurrency_id="open-model")
    button.upload(take, button, [shown, classify.model], show_progress_on=[shown], **private).then(
        classify.rerun, [classify.model, *classify.view], classify.outputs, concurrency_id="classify",
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip


def open_model(context: Context, session: Session, files: Sequence[Path], limits: Limits) -> str:
    """Checks an uploaded model and makes it one of the session; returns its displayed name.

    Only safetensors and JSON are read, so nothing is unpickled, and no name in an archive becomes a path.

    Args:
        files: one zip, or `config.json` and `model.safetensors`, and optionally the other files of a model folder.

    Raises:
        PretrainedError, ConfigError, UnusualError, ValueError: not a model, too large, damaged or without a classifier.
    """
    if len(session.models) >= MOST_MODELS:
        raise ValueError(f"{MOST_MODELS} models are open already; reload the page to close them")
    if sum(path.stat().st_size for path in files) > limits.zip_mb * 2**20:
        raise ValueError(f"it is larger than {limits.zip_mb} MB; use `medmamba predict` on your machine")
    by_name = {path.name: path for path in files}
    folder = session.new_folder() / "model"
    folder.mkdir()
    try:
        if len(files) == 1 and WEIGHTS_NAME not in by_name:
            extract(files[0], folder)
        else:
            if missing := [name for name in (CONFIG_NAME, WEIGHTS_NAME) if name not in by_name]:
                raise PretrainedError(
                    f"choose the zip, or {CONFIG_NAME} and {WEIGHTS_NAME} together; {missing[0]} is missing"
                )
            for name in FILES:
                if name in by_name:
                    shutil.copyfile(by_name[name], folder / name)
            inspect(folder)
        title = unused(session, files[0].stem if len(files) == 1 else "model")
        loaded = context.store.get(str(folder), title)
        if max(loaded.config.preprocess.input_size) > LARGEST_SIDE:
            size = " × ".join(map(str, loaded.config.preprocess.input_size))
            raise PretrainedError(f"its input is {size} pixels; the limit here is {LARGEST_SIDE}")
    except BaseException:
        context.store.forget(str(folder))
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    session.models[title] = folder
    return title


def unused(session: Session, stem: str) -> str:
    """Returns a displayed name that no other model of the visitor has."""
    name = f"Yours: {stem[:40]}"
    number = 2
    while name in session.models:
        name = f"Yours: {stem[:40]} ({number})"
        number += 1
    return name
