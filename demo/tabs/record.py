"""A page for the record of what Classify or Explain shows, made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.explain import Comparison
from medmamba.imaging.load import ImageError, load_image
from medmamba.inference.predict import Failure, Prediction
from medmamba.pretrained import PretrainedError
from medmamba.reporting import Entry, RecordedModel, record_facts, write_record
from medmamba.utils.checksums import WEIGHTS_NAME, file_hash

from ..context import Context
from ..html import error
from ..service import Answer, AnswerError, View
from ..sessions import Session
from ..store import Loaded
from .pdf import PdfButton, click_js
from .refusals import REFUSED
from .window import view_of

PAGE = "Page for the record"


class RecordButton:
    """The buttons under an answer. Create them inside `gr.Blocks`, then `attach` them."""

    def __init__(self) -> None:
        with gr.Row(visible=False, elem_id="mm-record-row") as self.row:
            self.button = gr.Button(f"{PAGE} (HTML)", size="sm", elem_id="mm-record")
            self.file = gr.DownloadButton(
                "Download it", visible="hidden", elem_id="mm-record-file", elem_classes="mm-unseen"
            )
            self.pdf = PdfButton(f"{PAGE} (PDF)", "mm-record-pdf")

    def shown(self, visible: bool) -> dict[Any, Any]:
        """Returns an update that shows or hides the buttons."""
        return {self.row: gr.update(visible=visible)}

    def attach(self, context: Context, model: gr.Dropdown, view: Sequence[Any], result: Any) -> None:
        """Makes the buttons write a page about the current images, with the model and window that are shown.

        Args:
            model, view: the controls of the answer.
            result: where a problem is shown.
        """

        def page(name: str, session: Session, title: str, preset: str, c: float, w: float, f: float) -> Path:
            loaded = context.load(session, title)
            entries = entries_of(context, session, loaded, view_of(preset, c, w, f))
            return write_record(session.new_download(name), recorded(loaded), entries)

        def make(title: str, preset: str, c: float, w: float, f: float, request: gr.Request) -> dict[Any, Any]:
            try:
                path = page("record.html", context.sessions.of(request), title, preset, c, w, f)
            except (ImageError, AnswerError, PretrainedError, ConfigError, ImportError, OSError, ValueError) as problem:
                return {result: error("The page was not made", str(problem))}
            return {self.file: str(path)}

        self.button.click(make, [model, *view], [self.file, result], concurrency_id="classify",
                          api_visibility="private", show_progress_on=[self.button]).success(
            None, js=click_js("mm-record-file"), api_visibility="private"
        )  # fmt: skip
        self.pdf.attach(context, partial(page, "record.pdf"), [model, *view])


def recorded(loaded: Loaded) -> RecordedModel:
    """Returns what a record says of a model, by its displayed name."""
    config = loaded.config
    weights = _weights(loaded.folder, (loaded.folder / WEIGHTS_NAME).stat().st_mtime_ns)
    return RecordedModel(loaded.title, config.architecture, weights, loaded.calibrated, config.task)


@lru_cache(maxsize=32)
def _weights(folder: Path, changed: int) -> str:
    return file_hash(folder / WEIGHTS_NAME)


def entries_of(context: Context, session: Session, loaded: Loaded, view: View) -> list[Entry]:
    """Classifies the current images of a visitor again, for the record; the shown one alone if only one is there."""
    paths = session.images
    if len(paths) == 1:
        answers: list[Answer | Failure] = [context.service.classify(loaded.source, paths[0], view)]
    else:
        answers, view = context.service.classify_files(loaded.source, paths), View()
    entries = []
    for path, answer in zip(paths, answers, strict=True):
        result = result_of(answer, path, (loaded.title, path) in session.anyway)
        image = None if isinstance(result, Failure) else load_image(path, frame=view.frame, window=view.window)
        entries.append(Entry.of(path, result, image))
    return entries


def result_of(answer: Answer | Failure, path: Path, anyway: bool = False) -> Prediction | Failure:
    """Returns what a record says of an answer: one that the page refuses is none."""
    if isinstance(answer, Failure):
        return answer
    return Failure(path.name, f"refused: {REFUSED}") if answer.refused and not anyway else answer.prediction


def csv_facts(loaded: Loaded, paths: Sequence[Path], results: Sequence[Answer | Failure]) -> list[dict[str, str]]:
    """Returns the facts of a record for each row of the table of a batch."""
    model = recorded(loaded)
    found = []
    for path, answer in zip(paths, results, strict=True):
        entry = Entry.of(path, result_of(answer, path))
        how = entry.how if isinstance(answer, Failure) else answer.how
        found.append(record_facts(model, Entry(entry.name, entry.digest, entry.result, how)))
    return found


def explained(
    loaded: Loaded, path: Path, answer: Answer, view: View, comparison: Comparison, target: Path
) -> list[str]:
    """Writes an explanation as .png, .npz, .json and a page for the record; the .png carries the facts of the record.

    Returns:
        The paths, in this order.
    """
    model, image = recorded(loaded), load_image(path, frame=view.frame, window=view.window)
    entry = Entry.of(path, answer.prediction, image, comparison)
    facts = record_facts(model, entry)
    saved = [comparison.save(target.with_suffix(".png"), facts)]
    saved += [comparison.save(target.with_suffix(suffix)) for suffix in (".npz", ".json")]
    drawn = saved[0].read_bytes()
    page = write_record(target.with_name("record.html"), model, [entry.with_maps(drawn)])
    return [str(found) for found in (*saved, page)]
