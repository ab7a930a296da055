"""A network on one device, fed with prepared images: transfers beside computation, answers one batch later.

On a GPU, copies run on a stream of their own from pinned memory, the network on another, and the answers of a batch are
fetched while the next ones are computed. On a CPU the network runs in the caller's thread while processes read ahead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..imaging.ahead import Chunk, Order, Prepared, Unread
from ..imaging.preprocess import normalise
from ..utils.modes import eval_view, frozen_view
from ..utils.precision import FullPrecision
from .fingerprint import stamp
from .gpu_decode import GpuDecoder
from .replay import Repeats
from .signature import collector, signature, watch_maps
from .tta import mean_logits

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBED = (64, 128, 256, 512)
_ENOUGH = 0.95  # of the best rate: the smallest batch that reaches it is taken
_CPU_BATCH = 16
_FIRST = -1  # priority of streams for copies and looks at weights: short, and waited for


class Answer(NamedTuple):
    """What a network says of a batch.

    Attributes:
        features: (n, C) float32 on the CPU, what its classifier was given; None where it does without `model.head`.
        logits: (n, K) float32 on the CPU.
        signature: (n, S) float32 on the CPU, see `signature`; None where it was not asked for, or without features.
    """

    features: Tensor | None
    logits: Tensor
    signature: Tensor | None = None


class Transferred(NamedTuple):
    """Images on their way to a device: (n, h, w, c) each, and the event after which they are there."""

    arrays: list[Tensor]
    event: torch.cuda.Event | None


class Running:
    """A batch on its way; `answer` waits for it."""

    def __init__(
        self, features: Tensor | None, logits: Tensor, device: torch.device, signature: Tensor | None = None
    ) -> None:
        self._event = None
        if device.type == "cuda":
            features = None if features is None else _to_host(features)
            signature = None if signature is None else _to_host(signature)
            logits = _to_host(logits)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        self._found = features, logits, signature

    @property
    def done(self) -> bool:
        """Whether `answer` would not wait."""
        return self._event is None or self._event.query()

    def answer(self) -> Answer:
        if self._event is not None:
            self._event.synchronize()
        features, logits, seen = (None if found is None else found.float().cpu() for found in self._found)
        assert logits is not None
        return Answer(features, logits, seen)


class Engine:
    """A copy of a network for inference on one device.

    Args:
        model: in any mode; not changed.
        device: where to compute.
        precision: see `PRECISIONS`; None: that of the model's weights.
        tta: views whose logits are averaged, see `tta`; features are those of the image itself.
        order: how images are read, where the device decodes some of them.
        signature: answers hold the signatures of the images; those that are collected (`signatures`) are made anyway.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        precision: str | None = None,
        tta: str = "none",
        order: Order | None = None,
        signature: bool = False,
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.model, self.device, self.precision, self.tta, self.order = model, device, precision, tta, order
        weight = model.patch_embed.proj.weight
        self.dtype = weight.dtype if precision is None else PRECISIONS[precision]
        self.exact = device.type == "cuda" and self.dtype == torch.float32 and precision != "tf32"
        self._own = threading.local()
        self.signature = signature
        self._seen: list[Tensor] = []
        self._maps: list[list[Tensor]] = []
        self._made: tuple[Any, Any] | None = None
        self._repeats = Repeats(self._seen, self._maps)

    def network(self) -> Any:
        """Returns the network to call, made again where the model's weights have changed."""
        with looking(self.model):
            now = stamp(self.model), collector() is not None
        if self._made is None or self._made[0] != now:
            self._made = now, self._make()
        return self._made[1]

    def _make(self) -> Any:
        """Returns the fused network, or one layer by layer where it cannot be fused or somebody watches its layers."""
        weight = self.model.patch_embed.proj.weight
        cast = self.dtype if self.dtype != weight.dtype else None
        if not _hooked(self.model):
            with contextlib.suppress(AttributeError, ValueError):  # another architecture, adapters, changed layers
                fused = eval_view(self.model).fuse(cast).to(self.device)
                return self._watched(fused.float() if cast == torch.float32 else fused)
        return self._watched(frozen_view(self.model, cast, self.device))

    def _watched(self, view: Any) -> Any:
        """Returns a view or copy of the model that leaves its features here and, if they are asked for, its maps."""
        if self.signature or collector() is not None:
            watch_maps(view, self._maps)
        return _with_features(view, self._seen)

    def transfer(self, chunk: Chunk) -> Transferred:
        """Starts to bring the images of a chunk that could be read to the device, and to decode what is left to it.

        Any thread may do that; copies run on a stream of the thread's own. The chunk may be released once the answer to
        its images is there.
        """
        with self._on_device():
            if self.device.type != "cuda":
                return Transferred(self._arrays(chunk), None)
            with torch.cuda.stream(self._stream()):
                if any(isinstance(item, Prepared) and item.encoded for item in chunk.items):
                    parts = self._decoded(chunk)
                else:
                    parts = self._arrays(chunk)
                event = torch.cuda.Event()
                event.record()
            return Transferred(parts, event)

    def submit(self, parts: Sequence[Transferred], config: MedMambaConfig, many: bool = True) -> Running | None:
        """Starts to compute transferred images; None where there are none.

        Args:
            many: whether a copy of the network, made for speed, is worth it.
        """
        with self._on_device():
            pixels = [array for part in parts for array in part.arrays]
            if not pixels:
                return None
            for part in parts:
                if part.event is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(part.event)
                    for array in part.arrays:
                        array.record_stream(current)
            if len({(array.dtype, array.shape[1:]) for array in pixels}) == 1:
                return self.compute(as_input(_joined(pixels), config), many)
            return self.compute(_joined([as_input(array, config) for array in pixels]), many)

    @torch.inference_mode()
    def compute(self, batch: Tensor, many: bool = True) -> Running:
        """Starts to compute normalised images (B, C, H, W) that are on the device."""
        weight = self.model.patch_embed.proj.weight
        same = weight.dtype == self.dtype and weight.device == self.device
        network = self.network() if many or not same else self._watched(eval_view(self.model))
        self._seen.clear()
        self._maps.clear()
        # Else an explanation in another thread, which turns TF32 off for the process, would change the answer.
        with FullPrecision() if self.exact else contextlib.nullcontext():
            images = batch.to(self.dtype)
            if many and self.device.type == "cuda" and self.tta == "none" and hasattr(network, "graphed"):
                network = self._repeats.faster(network, images)
            logits = mean_logits(network, images, self.tta)
            seen = self._signature(batch)
        check_logits(logits, len(batch), network.config.num_classes)
        return Running(self._seen[0] if self._seen else None, logits, self.device, seen if self.signature else None)

    def _signature(self, batch: Tensor) -> Tensor | None:
        """Returns the signatures of images, from the first pass of them, which is that of the images themselves."""
        if not self._maps or not self._seen:
            return None
        found = signature(batch, self._maps[0], self._seen[0], self.model.config)
        self._maps.clear()
        if (sink := collector()) is not None:
            sink.add(found)
        return found

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _arrays(self, chunk: Chunk) -> list[Tensor]:
        """Returns the pixels of a chunk on the device, in order, each (n, h, w, c) of one dtype."""
        arrays = chunk.runs or _runs([item.pixels for item in chunk.items if isinstance(item, Prepared)])
        return [_tensor(array).to(self.device, non_blocking=True) for array in arrays]

    def _decoded(self, chunk: Chunk) -> list[Tensor]:
        """Does the same as `_arrays` where some images are still compressed."""
        assert self.order is not None
        decoder = self._own.__dict__.setdefault("decoder", None) or GpuDecoder(self.device)
        self._own.decoder = decoder
        found: dict[int, Tensor | Unread] = {}
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(chunk.items):
            if isinstance(item, Prepared):
                groups.setdefault(item.encoded or i, []).append(i)
        for rows in groups.values():
            items = [item for item in (chunk.items[i] for i in rows) if isinstance(item, Prepared)]
            if items[0].encoded:
                found.update(zip(rows, decoder.decode(items, self.order), strict=True))
            else:
                found[rows[0]] = _tensor(items[0].pixels[None]).to(self.device)
        for i, result in found.items():
            if isinstance(result, Unread):
                chunk.items[i] = result
        return [result for _, result in sorted(found.items()) if isinstance(result, Tensor)]

    def _stream(self) -> torch.cuda.Stream:
        """Returns the stream of the present thread for copies."""
        if "stream" not in self._own.__dict__:
            self._own.stream = torch.cuda.Stream(self.device, priority=_FIRST)
        return self._own.stream

    def best_batch(self, config: MedMambaConfig, most: int) -> int:
        """Returns the batch size that computes fastest, by trying; on a CPU, where it matters little, 16.

        Args:
            most: the largest worth trying.
        """
        if self.device.type != "cuda":
            return min(_CPU_BATCH, most)
        rates: dict[int, float] = {}
        for size in [size for size in _PROBED if size <= most] or [most]:
            try:
                rates[size] = self._rate(size, config)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if len(rates) > 1 and rates[size] < 1.03 * max(list(rates.values())[:-1]):
                break
        if not rates:
            return 1
        return min(size for size, rate in rates.items() if rate >= _ENOUGH * max(rates.values()))

    def _rate(self, size: int, config: MedMambaConfig) -> float:
        batch = as_input(torch.rand(size, *config.preprocess.input_size, config.in_chans, device=self.device), config)
        best = float("inf")
        with self._on_device():
            for _ in range(3):  # the first compiles
                start = time.perf_counter()
                self.compute(batch).answer()
                best = min(best, time.perf_counter() - start)
        return size / best


def check_logits(logits: Any, count: int, classes: int) -> None:
    """Raises `ValueError` where these are not logits of so many images and classes (0 classes: anything goes)."""
    if classes and (not isinstance(logits, Tensor) or logits.shape != (count, classes)):
        found = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model returned {found} for {count} images, not logits ({count}, {classes}): to give it "
            "another classifier use model.reset_classifier(num_classes), which also replaces the names of the classes"
        )


def _with_features(view: Any, seen: list[Tensor]) -> Any:
    """Returns a view of a model whose classifier leaves its input in `seen`; the model itself is not changed."""
    if isinstance(view.head, nn.Module) and not isinstance(view.head, torch.jit.ScriptModule):
        table = view.head.__dict__["_forward_pre_hooks"].copy()  # the view's own, from here on
        view.head.__dict__["_forward_pre_hooks"] = table
        view.head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    return view


def as_input(pixels: Tensor, config: MedMambaConfig) -> Tensor:
    """Returns fitted pixels (B, h, w, c), uint8, uint16 or float32, as normalised input (B, in_chans, h, w)."""
    if pixels.dtype == torch.uint8:
        values = pixels.float().div_(255)
    elif pixels.dtype == torch.uint16:
        values = (pixels.view(torch.int16).int() & 0xFFFF).float().div_(65535)
    else:
        values = pixels
    values = values.permute(0, 3, 1, 2)
    layout = torch.channels_last if pixels.is_cuda else torch.contiguous_format
    return normalise(values.expand(-1, config.in_chans, -1, -1), config.preprocess).contiguous(memory_format=layout)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _runs(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Stacks neighbours of one kind, without a copy where they lie side by side in shared memory."""
    found: list[np.ndarray] = []
    start = 0
    for end in range(1, len(arrays) + 1):
        if end < len(arrays) and _kind(arrays[end]) == _kind(arrays[start]):
            continue
        found.append(_stacked(arrays[start:end]))
        start = end
    return found


def _kind(array: np.ndarray) -> tuple[Any, ...]:
    return array.dtype, array.shape


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    first = arrays[0]
    step, place = first.nbytes, first.__array_interface__["data"][0]
    beside = all(array.__array_interface__["data"][0] == place + i * step for i, array in enumerate(arrays))
    if not (beside and all(array.flags.c_contiguous for array in arrays)):
        return np.stack(arrays)
    return np.lib.stride_tricks.as_strided(first, (len(arrays), *first.shape), (step, *first.strides))


@contextlib.contextmanager
def looking(model: Any) -> Iterator[None]:
    """Reads values of a model's weights without waiting for what its GPU has been asked to compute."""
    weight = model.patch_embed.proj.weight
    stream = torch.cuda.Stream(weight.device, priority=_FIRST) if weight.is_cuda else None
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        yield


def _tensor(array: np.ndarray) -> Tensor:
    if not array.flags.writeable:  # PyTorch would warn; nothing here writes
        array = np.array(array)
    return torch.from_numpy(array)


def _to_host(tensor: Tensor) -> Tensor:
    """Starts to bring a tensor to the CPU as float32.

    The GPU converts it: on the CPU all threads of PyTorch would, and take the cores from the processes that read.
    """
    host = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
    return host.copy_(tensor.float(), non_blocking=True)


def _hooked(model: Any) -> bool:
    """Returns whether hooks are registered on other modules than the classifier."""
    head = set(model.head.modules()) if isinstance(getattr(model, "head", None), nn.Module) else set()
    return any(
        module not in head and (module._forward_hooks or module._forward_pre_hooks) for module in model.modules()
    )
