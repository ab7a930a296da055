"""From a file to an answer: the package does the work, this puts its parts together for the pages and the API."""

from __future__ import annotations

import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medmamba.explain import Comparison, assess, compare
from medmamba.explain.subject import sub_progress
from medmamba.imaging.dicom import DicomWindows, dicom_window_presets
from medmamba.imaging.image import FrameNeeded, WindowNeeded
from medmamba.imaging.load import ImageError, MedicalImage, load_image
from medmamba.imaging.preprocess import preprocess, to_display
from medmamba.inference.predict import UNUSUAL, Failure, Prediction, iter_predict

from .advice import WARNING, of_problem
from .gpu import ZERO_GPU, on_gpu
from .store import Loaded, ModelStore

UNSURE = 0.7
"""Below this calibrated probability of the best class, wrong in three of ten cases, the model is called unsure."""
THUMBNAIL = 48
MAPS_SHARE = 0.3
"""Of an explanation with checks, how much of the time the maps themselves take."""
LARGEST_SHOWN = 1024
"""Longest side in pixels of an image in a page."""

Window = tuple[float, float]
Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """How to read a file: which frame, and which window (center, width) instead of its own."""

    frame: int | None = None
    window: Window | None = None


@dataclass(frozen=True)
class FileFacts:
    """What a window control and a preview need.

    Attributes:
        image: read under the view asked for; without a window of its own or one asked for, by the range of its values.
        windows: declared in the file; None where no window applies (8 bits, colour).
        lacks_window: the file declares no range, and no window was asked for: it can be shown, not classified.
    """

    image: MedicalImage
    windows: DicomWindows | None
    lacks_window: bool = False

    @property
    def windowed(self) -> bool:
        """Whether a window can be chosen."""
        return self.windows is not None and self.windows.value_range is not None


@dataclass(frozen=True)
class Answer:
    """What a model says of one image.

    Attributes:
        unsure: the best class is below `UNSURE`; for several labels, none reaches a half.
        unusual: unlike what the model was trained on; None where it has no threshold for that.
        seen: (H, W, 3) uint8, the image as the model sees it; of several files, a thumbnail of each.
        milliseconds: from the file to the answer.
        window: that was applied, and `window_from`, by whom: see `MedicalImage`.
        better_window: by the range of values, where the one applied hides most of the image.
        values: smallest and largest value of a grey image.
        frame, n_frames: which of how many.
    """

    prediction: Prediction
    unsure: bool
    unusual: bool | None
    seen: np.ndarray
    milliseconds: float
    window: Window | None = None
    window_from: str = ""
    better_window: Window | None = None
    values: tuple[float, float] | None = None
    frame: int = 0
    n_frames: int = 1

    @property
    def warnings(self) -> list[str]:
        """Notes that change what the answer is worth; the remark on unusual images has a place of its own."""
        found = [note for note in self.prediction.image_notes if note.startswith(WARNING)]
        if self.better_window is not None and not any(is_of_contrast(note) for note in found):
            found.append(f"{WARNING}unused-range: another window would show far more of this image")
        return found

    @property
    def notes(self) -> list[str]:
        """The other notes: what was done to the file."""
        return [note for note in self.prediction.image_notes if not note.startswith(WARNING)]


CONTRAST = frozenset(("unused-range", "saturated", "two-valued", "almost-constant", "constant"))
"""Kinds of warnings, see `MedicalImage.warnings`, of images that another window may show better."""


def is_of_contrast(note: str) -> bool:
    """Whether a warning is of one of those kinds."""
    return note.removeprefix(WARNING).partition(": ")[0] in CONTRAST


class AnswerError(ValueError):
    """The image was read, and the model gave no answer; the message says why."""


def inspect(path: Path, view: View | None = None) -> FileFacts:
    """Reads a file as a view asks for; of several frames the first where none is chosen.

    Raises:
        ImageError: it cannot be read.
    """
    view = view or View()
    lacking = False
    try:
        image = load_image(path, frame=view.frame, window=view.window)
    except FrameNeeded:
        return inspect(path, View(0, view.window))
    except WindowNeeded as needed:
        low, high = needed.value_range
        image = load_image(path, frame=view.frame, window=((low + high) / 2, max(high - low, 1e-6)))
        lacking = True
    windows = None
    if image.value_range is not None and image.value_range[0] < image.value_range[1]:
        if image.format == "DICOM":
            windows = dicom_window_presets(path, frame=image.frame)
        elif image.bit_depth > 8 or lacking:
            windows = DicomWindows((), image.value_range)
    return FileFacts(image, windows, lacking)


class Service:
    """Answers for the pages and the API."""

    def __init__(self, store: ModelStore):
        self.store = store
        self._forward = on_gpu(20)(self._predict)
        # Always the same thread: libraries below PyTorch keep buffers for each thread that ever used them, and the
        # server's own threads come and go.
        self._thread = ThreadPoolExecutor(1, "predict")
        self._explain = on_gpu(_explain_seconds)(self._explained)

    def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of the function; it knows whose request it works for, as ZeroGPU asks."""
        return self._thread.submit(contextvars.copy_context().run, function, *arguments).result()

    def classify(self, source: str, path: Path, view: View | None = None, title: str | None = None) -> Answer:
        """
        Args:
            source: name or folder of the model.

        Raises:
            ImageError: the file cannot be read.
            PretrainedError, ConfigError: the model cannot be loaded.
        """
        return self._in_thread(self._classify, source, path, view or View(), title)

    def _classify(self, source: str, path: Path, view: View, title: str | None) -> Answer:
        loaded = self.store.get(source, title)
        began = time.perf_counter()
        image = load_image(path, frame=view.frame, window=view.window)
        ((result, _),) = self._forward(source, [image])
        if isinstance(result, Failure):
            raise AnswerError(result.error)
        seen = to_display(preprocess(image, loaded.config.preprocess, loaded.config.in_chans), loaded.config.preprocess)
        return answer(loaded, result, seen, 1e3 * (time.perf_counter() - began), applied(image))

    def classify_files(
        self, source: str, paths: list[Path], title: str | None = None, program: bool = False
    ) -> list[Answer | Failure]:
        """One entry per file, in order; files with several frames are failures that say so.

        Args:
            program: whether failures advise one that calls the endpoints.
        """
        return self._in_thread(self._classify_files, source, paths, title, program)

    def _classify_files(
        self, source: str, paths: list[Path], title: str | None, program: bool
    ) -> list[Answer | Failure]:
        loaded = self.store.get(source, title)
        began = time.perf_counter()
        results = self._forward(source, paths, program)
        each = 1e3 * (time.perf_counter() - began) / max(len(paths), 1)
        return [
            result if isinstance(result, Failure) else answer(loaded, result, seen.thumbnail, each, seen.applied)
            for result, seen in results
        ]

    def explain(
        self,
        source: str,
        path: Path,
        view: View,
        methods: list[str],
        target: str | None,
        checks: bool,
        report: Callable[[float], object] | None = None,
        title: str | None = None,
    ) -> Iterator[Comparison]:
        """All maps, then, with `checks`, the same with the trust of one more method at a time.

        Args:
            target: label; None: the model's answer.
            report: called with the share done; returns False to stop.

        Raises:
            ImageError, PretrainedError, ConfigError, ValueError; ExplainCancelled.
        """
        self.store.get(source, title)
        # A function cannot travel to the process that has the GPU.
        yield from self._explain(source, path, view, methods, target, checks, None if ZERO_GPU else report)

    def _predict(
        self, source: str, images: Sequence[MedicalImage | Path], program: bool = False
    ) -> list[tuple[Prediction | Failure, Seen]]:
        """Predictions, and what is kept of each image."""
        loaded = self.store.get(source)
        kept: list[Seen] = []
        failed: dict[int, Failure] = {}

        def read() -> Iterator[MedicalImage]:  # one at a time: files can be large
            for number, item in enumerate(images):
                try:
                    image = item if isinstance(item, MedicalImage) else load_image(item)
                except (ImageError, ValueError, OSError) as problem:
                    kept.append(Seen())
                    failed[number] = Failure(str(item), of_problem(problem, program, alone=len(images) == 1))
                else:
                    kept.append(Seen(reduced(image, THUMBNAIL).to_uint8(), applied(image)))
                    yield image

        answers = iter(list(iter_predict(loaded.fused, read())))
        return [(failed[i] if i in failed else next(answers), seen) for i, seen in enumerate(kept)]

    def _explained(
        self,
        source: str,
        path: Path,
        view: View,
        methods: list[str],
        target: str | None,
        checks: bool,
        report: Callable[[float], object] | None = None,
    ) -> Iterator[Comparison]:
        model = self.store.get(source).model
        image = load_image(path, frame=view.frame, window=view.window)
        share = MAPS_SHARE if checks else 1.0
        found = compare(model, image, methods, target, progress=sub_progress(report, 0, share))
        yield small(found)
        if not checks:
            return
        trust = []
        for i, explanation in enumerate(found.explanations):
            step = (1 - share) / len(found.explanations)
            part = sub_progress(report, share + i * step, share + (i + 1) * step)
            trust.append(assess(model, explanation, progress=part))
            yield small(dataclasses.replace(found, trust=tuple(trust)))


@dataclass(frozen=True)
class Seen:
    """What is kept of an image when it has been predicted: a thumbnail, and fields of its `Answer`."""

    thumbnail: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))
    applied: dict[str, Any] = field(default_factory=dict)


def applied(image: MedicalImage) -> dict[str, Any]:
    """How an image was read, as fields of `Answer`."""
    doubtful = image.low_contrast or not CONTRAST.isdisjoint(image.warning_kinds)
    better = image.range_window if doubtful and image.range_window != image.window else None
    chosen = image.bit_depth > 8 or image.window_from != "range"  # else it is 0 to 255, as everybody expects
    return {
        "window": image.window if chosen else None,
        "window_from": image.window_from if chosen else "",
        "better_window": better,
        "values": image.value_range,
        "frame": image.frame,
        "n_frames": image.n_frames,
    }


def answer(
    loaded: Loaded, prediction: Prediction, seen: np.ndarray, milliseconds: float, how: dict[str, Any] | None = None
) -> Answer:
    """A prediction, and how far to believe it. The page has a place of its own for the remark on unusual images."""
    notes = [note for note in prediction.image_notes if note != UNUSUAL]
    prediction = dataclasses.replace(prediction, image_notes=notes)
    limit = 0.5 if loaded.config.task == "multilabel" else UNSURE
    unsure = prediction.probability < limit
    return Answer(prediction, unsure, prediction.unusual, seen, milliseconds, **(how or {}))


def small(comparison: Comparison) -> Comparison:
    """The same with the image no larger than a page shows it: drawing a map over 60 million pixels takes gigabytes."""
    image = reduced(comparison.explanations[0].image)
    explanations = tuple(dataclasses.replace(e, image=image) for e in comparison.explanations)
    return dataclasses.replace(comparison, explanations=explanations)


def reduced(image: MedicalImage, longest: int = LARGEST_SHOWN) -> MedicalImage:
    """The image, made smaller if its longest side is above this many pixels."""
    if max(image.size) <= longest:
        return image
    picture = image.to_pil()
    picture.thumbnail((longest, longest))
    pixels = np.asarray(picture, np.float32) / 255
    return dataclasses.replace(image, pixels=pixels if pixels.ndim == 3 else pixels[..., None])


def _explain_seconds(source: str, path: Path, view: View, methods: list[str], *rest: object) -> int:
    """The GPU time to ask a ZeroGPU Space for."""
    checks = len(rest) > 1 and bool(rest[1])
    return min(20 + len(methods) * (30 if checks else 8), 180)
