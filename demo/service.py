"""Prediction and explanation for the pages and the API, on top of the package."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medmamba import MedMamba
from medmamba.config import MedMambaConfig
from medmamba.data import ImageDataset
from medmamba.data.metadata import Columns
from medmamba.evaluation import Pair, Review, compare_models, review
from medmamba.explain import Comparison, iter_compare
from medmamba.imaging.dicom import DicomWindows, dicom_window_presets
from medmamba.imaging.image import FrameNeeded, WindowNeeded
from medmamba.imaging.load import ImageError, MedicalImage, load_image
from medmamba.imaging.preprocess import preprocess, to_display
from medmamba.inference.ood import Unusual
from medmamba.inference.predict import Failure, Prediction, iter_predict
from medmamba.inference.signature import signatures
from medmamba.inference.similar import features_of
from medmamba.inference.suggest import Suggestion, suggest_model
from medmamba.serving.record import WARNING, Applied, applied, is_unsure, warnings_of, without_unusual

from .advice import of_problem
from .gpu import ZERO_GPU, on_gpu
from .store import Loaded, ModelStore

THUMBNAIL = 48
LARGEST_SHOWN = 1024
"""Longest side, in pixels, of a displayed image."""

Window = tuple[float, float]
Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """Options for reading a file: frame, and a window (center, width) that overrides its own."""

    frame: int | None = None
    window: Window | None = None


@dataclass(frozen=True)
class FileFacts:
    """Data for the preview and the window controls.

    Attributes:
        image: as read with the requested view; with neither a declared nor a requested window, by its value range.
        windows: windows declared in the file, or None if no window applies (8 bit, colour).
        lacks_window: whether a window is missing, so that the image can be shown but not classified.
    """

    image: MedicalImage
    windows: DicomWindows | None
    lacks_window: bool = False

    @property
    def windowed(self) -> bool:
        """Whether the window is adjustable."""
        return self.windows is not None and self.windows.value_range is not None


@dataclass(frozen=True)
class Answer:
    """A model's prediction for one image, with its context.

    Attributes:
        prediction: labels and probabilities.
        unsure: whether the top probability is below `UNSURE` (multilabel: no label is above its threshold).
        unusual: whether the image is out of distribution, or None if the model has no threshold.
        seen: (H, W, 3) uint8, the image as preprocessed for the model; for several files, a thumbnail.
        milliseconds: total time from file to prediction.
        how: how the file was read; its fields are attributes of the answer too.
        features: (C,) pooled features, where the model has training images to compare them with; else None.
    """

    prediction: Prediction
    unsure: bool
    unusual: bool | None
    seen: np.ndarray
    milliseconds: float
    how: Applied = field(default_factory=Applied)
    features: np.ndarray | None = field(default=None, repr=False)

    @property
    def refused(self) -> bool:
        """Whether the image is too unlike the training images to be answered, unless somebody asks for it."""
        return self.prediction.unusual_level == "far"

    @property
    def window(self) -> Window | None:
        return self.how.window

    @property
    def window_from(self) -> str:
        return self.how.window_from

    @property
    def better_window(self) -> Window | None:
        return self.how.better_window

    @property
    def values(self) -> tuple[float, float] | None:
        return self.how.values

    @property
    def frame(self) -> int:
        return self.how.frame

    @property
    def n_frames(self) -> int:
        return self.how.n_frames

    @property
    def warnings(self) -> list[str]:
        """Notes that affect how reliable the answer is, apart from the out-of-distribution warning."""
        return warnings_of(self.prediction, self.how)

    @property
    def notes(self) -> list[str]:
        """The remaining notes: how the file was processed."""
        return [note for note in self.prediction.image_notes if not note.startswith(WARNING)]


class AnswerError(ValueError):
    """The image was read but could not be classified; the message says why."""


def inspect(path: Path, view: View | None = None) -> FileFacts:
    """Reads a file with the given view; the first frame of a multi-frame file by default.

    Raises:
        ImageError: the file cannot be read.
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
    """Classifies and explains images for the pages and the API."""

    def __init__(self, store: ModelStore):
        self.store = store
        self._forward = on_gpu(20)(self._predict)
        # A single thread: libraries below PyTorch keep buffers per thread, and server threads come and go.
        self._thread = ThreadPoolExecutor(1, "predict")
        self._evaluations = ThreadPoolExecutor(1, "evaluate")
        self._explain = on_gpu(_explain_seconds)(self._explained)

    def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a function in the prediction thread, in the context of the request, which ZeroGPU needs."""
        return self._thread.submit(contextvars.copy_context().run, function, *arguments).result()

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a function of another part of the app in the prediction thread."""
        return self._in_thread(function, *arguments)

    def classify(self, source: str, path: Path, view: View | None = None) -> Answer:
        """Classifies one file.

        Args:
            source: name or folder of the model.

        Raises:
            ImageError: the file cannot be read.
            PretrainedError, ConfigError: the model cannot be loaded.
        """
        return self._in_thread(self._classify, source, path, view or View())

    def _classify(self, source: str, path: Path, view: View) -> Answer:
        loaded = self.store.get(source)
        began = time.perf_counter()
        image = load_image(path, frame=view.frame, window=view.window)
        ((result, kept),) = self._forward(source, [image])
        if isinstance(result, Failure):
            raise AnswerError(result.error)
        seen = to_display(preprocess(image, loaded.config.preprocess, loaded.config.in_chans), loaded.config.preprocess)
        found = answer(loaded, result, seen, 1e3 * (time.perf_counter() - began), applied(image))
        return dataclasses.replace(found, features=kept.features)

    def classify_files(self, source: str, paths: list[Path], program: bool = False) -> list[Answer | Failure]:
        """Classifies several files; returns one entry per file, in order. Multi-frame files are failures.

        Args:
            program: whether failures are worded for API clients.
        """
        return self._in_thread(self._classify_files, source, paths, program)

    def _classify_files(self, source: str, paths: list[Path], program: bool) -> list[Answer | Failure]:
        loaded = self.store.get(source)
        began = time.perf_counter()
        results = self._forward(source, paths, program)
        each = 1e3 * (time.perf_counter() - began) / max(len(paths), 1)
        return [
            result if isinstance(result, Failure) else answer(loaded, result, seen.thumbnail, each, seen.applied)
            for result, seen in results
        ]

    def suggest(
        self,
        path: Path,
        view: View | None,
        known: Mapping[str, tuple[MedMambaConfig, Unusual | None]],
        load: Callable[[str], MedMamba] | None = None,
    ) -> Suggestion | None:
        """Returns the model for an image that another refused, see `suggest_model`; None if it cannot be read."""
        view = view or View()

        def find() -> Suggestion | None:
            try:
                return suggest_model(load_image(path, frame=view.frame, window=view.window), known, load)
            except (ImageError, ValueError, OSError):
                return None

        return self._in_thread(find)

    def features(self, source: str, paths: list[Path], view: View) -> np.ndarray:
        """Returns the pooled features (N, C) of files.

        Raises:
            SimilarError: a file cannot be read.
            PretrainedError, ConfigError: the model cannot be loaded.
        """
        return self._in_thread(on_gpu(20)(self._features), source, paths, view)

    def _features(self, source: str, paths: list[Path], view: View) -> np.ndarray:
        return features_of(self.store.get(source).fused, paths, view.frame, view.window)

    def explain(
        self,
        source: str,
        path: Path,
        view: View,
        methods: list[str],
        target: str | None,
        checks: bool,
        report: Callable[[float], object] | None = None,
    ) -> Iterator[Comparison]:
        """Yields the maps so far after each of them, then, with `checks`, after the checks of each.

        Args:
            target: label to explain; None: the predicted one.
            report: called with the completed fraction; returns False to cancel.

        Raises:
            ImageError, PretrainedError, ConfigError, ValueError; ExplainCancelled.
        """
        self.store.get(source)
        # A callback cannot be sent to the process that holds the GPU.
        yield from self._explain(source, path, view, methods, target, checks, None if ZERO_GPU else report)

    def review(
        self,
        loaded: Loaded,
        index: ImageDataset,
        columns: Callable[[ImageDataset], Columns] | None = None,
        split: str = "all",
        progress: Callable[[int], object] | None = None,
    ) -> Future[Review]:
        """Starts to evaluate a model on labelled images, in a thread of its own, on the CPU where GPUs are lent.

        Args:
            progress: called with the number of images that are done; returns False to cancel.

        Returns:
            The result to come; raises what `medmamba.evaluation.review` raises.
        """

        def run() -> Review:
            return review(loaded.fused, index, name=loaded.title, split=split, columns=columns, progress=progress)

        return self._evaluations.submit(run)

    def compare(
        self,
        first: Loaded,
        second: Loaded,
        images: ImageDataset | list[Path],
        progress: Callable[[int], object] | None = None,
    ) -> Future[Pair]:
        """Starts to compare two models; see `review`, and `medmamba.evaluation.compare_models`."""

        def run() -> Pair:
            names = first.title, second.title
            return compare_models(first.fused, second.fused, images, names=names, progress=progress)

        return self._evaluations.submit(run)

    def _predict(
        self, source: str, images: Sequence[MedicalImage | Path], program: bool = False
    ) -> list[tuple[Prediction | Failure, Seen]]:
        """Returns a prediction, and the data kept for display, per image."""
        loaded = self.store.get(source)
        kept: list[Seen] = []
        failed: dict[int, Failure] = {}

        def read() -> Iterator[MedicalImage]:  # lazily: files can be large
            for number, item in enumerate(images):
                try:
                    image = item if isinstance(item, MedicalImage) else load_image(item)
                except (ImageError, ValueError, OSError) as problem:
                    kept.append(Seen())
                    failed[number] = Failure(str(item), of_problem(problem, program, alone=len(images) == 1))
                else:
                    kept.append(Seen(reduced(image, THUMBNAIL).to_uint8(), applied(image)))
                    yield image

        # The forward pass of the answer gives what similar images are found by.
        watched = signatures() if loaded.compares else contextlib.nullcontext()
        with watched as seen:
            found = list(iter_predict(loaded.fused, read(), decide=loaded.decide))
        if seen is not None and len(rows := seen.array()) == len(found):
            for one, row in zip((one for i, one in enumerate(kept) if i not in failed), rows, strict=True):
                one.features = row[-loaded.config.dims[-1] :]
        answers = iter(found)
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
        shown = reduced(image)
        metrics = None if checks else ()
        for found in iter_compare(model, image, methods, target, metrics=metrics, progress=report):
            yield with_image(found, shown)


@dataclass
class Seen:
    """Data of an image, kept after prediction: a thumbnail, and fields of its `Answer`."""

    thumbnail: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))
    applied: Applied = field(default_factory=Applied)
    features: np.ndarray | None = None


def answer(
    loaded: Loaded, prediction: Prediction, seen: np.ndarray, milliseconds: float, how: Applied | None = None
) -> Answer:
    """Builds an `Answer`; the out-of-distribution note is removed, because pages show it separately."""
    prediction = without_unusual(prediction)
    unsure = is_unsure(prediction, loaded.config)
    return Answer(prediction, unsure, prediction.unusual, seen, milliseconds, how or Applied())


def with_image(comparison: Comparison, image: MedicalImage) -> Comparison:
    """Returns the comparison with its maps over another size of the image."""
    explanations = tuple(dataclasses.replace(e, image=image) for e in comparison.explanations)
    return dataclasses.replace(comparison, explanations=explanations)


def reduced(image: MedicalImage, longest: int = LARGEST_SHOWN) -> MedicalImage:
    """Returns the image, downscaled if its longest side exceeds `longest` pixels."""
    if max(image.size) <= longest:
        return image
    picture = image.to_pil()
    picture.thumbnail((longest, longest))
    pixels = np.asarray(picture, np.float32) / 255
    return dataclasses.replace(image, pixels=pixels if pixels.ndim == 3 else pixels[..., None])


def _explain_seconds(source: str, path: Path, view: View, methods: list[str], *rest: object) -> int:
    """Returns the GPU seconds to request on a ZeroGPU Space."""
    checks = len(rest) > 1 and bool(rest[1])
    return min(20 + len(methods) * (30 if checks else 8), 180)
