"""From images, wherever they are, to a file of results that any interruption leaves usable."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..data.sources import name_of
from ..imaging.image import Window
from ..utils.modes import unwrap
from .decide import chosen
from .fitted import in_force
from .predict import Failure, NotFinite, Prediction, Refused, iter_predict
from .sinks import open_sink


@dataclass
class Summary:
    """What became of the images of one run.

    Attributes:
        answered: now, failures included.
        before: answered by earlier runs, or named twice.
        unread: could not be read.
        undefined: the model returned NaN or infinity.
        refused: too unlike the training images, where that was asked for.
    """

    answered: int = 0
    before: int = 0
    unread: int = 0
    undefined: int = 0
    refused: int = 0

    def count(self, result: Prediction | Failure) -> None:
        """Adds the result of one image."""
        self.answered += 1
        self.undefined += isinstance(result, NotFinite)
        self.refused += isinstance(result, Refused)
        self.unread += isinstance(result, Failure) and not isinstance(result, NotFinite | Refused)


def predict_to_file(
    model: Any,
    sources: Iterable[Any],
    out: Any,
    *,
    top_k: int | None = None,
    frame: int | None = None,
    window: Window | None = None,
    precision: str | None = None,
    reduced: bool = False,
    decide: Any = None,
    tta: str = "none",
    gpu_decode: bool = False,
    refuse_unusual: str | None = None,
    record: Callable[[str, Prediction | Failure], dict[str, Any]] | None = None,
    done: Callable[[int], object] | None = None,
    predict: Callable[..., Iterator[Prediction | Failure]] = iter_predict,
    **options: Any,
) -> Summary:
    """Classifies images and writes the results as they come; the same call goes on after an interruption.

    Every image is answered exactly once, however often the run is killed: what is in the file already is passed over.

    Args:
        model: see `iter_predict`.
        sources: names of images, or what `medmamba.data.sources.open_sources` found; any number.
        out: file ending in .jsonl, .csv or .parquet, or a folder of Parquet parts; see `medmamba.inference.sinks`.
        top_k, frame, window, precision, reduced, gpu_decode, refuse_unusual, decide, tta: see `iter_predict`. A file
            that was begun with others, or with another model, is refused.
        record: makes the row of an image from its name and its result; None: the fields of the result.
        done: called with the number of images that have been answered or passed over since the last call.
        predict: `iter_predict`, or what answers like it, such as `medmamba.inference.cluster.predict_on_ray`.
        options: further ones of `predict`, on which the answers do not depend.

    Raises:
        SinkError: `out` was begun with another model or other options, or is of another kind.
        LockedError: another process writes to it.
    """
    told = done or (lambda _count: None)
    found = Summary()
    inner: Any = unwrap(model)
    reading: dict[str, Any] = {"frame": frame, "window": window, "precision": precision}
    reading |= {"reduced": reduced, "gpu_decode": gpu_decode}
    identity: dict[str, Any] = {"model": model_identity(model), "top_k": top_k, **reading}
    if tta != "none":
        identity["tta"] = tta
    if inner.config.task != "multiclass":
        identity["task"] = inner.config.task
    if decide:
        identity["decide"] = [
            entry if isinstance(entry, str) else entry.name for entry in chosen(in_force(inner), decide)
        ]
    reading |= {"decide": decide, "tta": tta}
    if refuse_unusual:
        reading["refuse_unusual"] = identity["refuse_unusual"] = refuse_unusual
    names: deque[str] = deque()  # of the images that are on their way

    with open_sink(out, list(inner.config.labels), identity) as sink:

        def wanted() -> Iterator[Any]:
            for source in sources:
                name = name_of(source)
                if sink.take(name):
                    names.append(name)
                    yield source
                else:
                    found.before += 1
                    told(1)

        for result in predict(model, wanted(), top_k, **reading, **options):
            name = names.popleft()
            row = record(name, result) if record else {**result.to_dict(), "source": name}
            sink.write(row)
            found.count(result)
            told(1)
    return found


def model_identity(model: Any) -> str:
    """Returns a digest of a model's weights and configuration."""
    inner: Any = unwrap(model)
    digest = hashlib.sha256(json.dumps(inner.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(inner.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
