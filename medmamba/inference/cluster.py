"""Prediction on a cluster with Ray Data: the readers, the model and the answers of one machine, on many.

Ray (https://docs.ray.io/en/latest/data/batch_inference.html) schedules the work, restarts what dies and scales. Sources
go out in blocks; each actor holds one copy of the model and answers blocks with `iter_predict`; the answers come back
to the caller, in the order of the sources, and only the caller writes. So a node that is lost can neither lose nor
repeat an answer: its blocks are computed again elsewhere before they are passed on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

from ..utils.extras import require
from ..utils.modes import unwrap
from .predict import Failure, Prediction, iter_predict

BLOCK = 64
"""Images per block: what is computed again where a node dies."""
GPU_BLOCK = 1024
"""The same on GPUs, where each block has to fill and empty the pipeline of `iter_predict`."""
WAVE = 65_536
"""Images that are planned at once; the memory of the caller does not grow beyond them."""
CORES = 2
"""Cores of an actor without a GPU, where the cluster has so many on a node."""


def predict_on_ray(
    model: Any,
    images: Iterable[Any],
    top_k: int | None = None,
    *,
    address: str = "auto",
    gpus: float | None = None,
    cores: float | None = None,
    actors: tuple[int, int | None] = (1, None),
    **options: Any,
) -> Iterator[Prediction | Failure]:
    """Classifies images on a Ray cluster; yields what `iter_predict` yields, in the order of the images.

    The package must be installed on all nodes, and the images must be readable there: on shared storage, or by address.
    The model is sent to the nodes. Where a node dies, its work is done again.

    Args:
        model: a `MedMamba`, on any device.
        images: names of files, or other sources of `iter_predict` that can be pickled; taken as needed, of any number.
        top_k: as for `iter_predict`.
        address: "auto" for the running cluster (or `RAY_ADDRESS`), or else a new one on this machine; "HOST:PORT",
            "ray://HOST:10001", or "local" for a new one.
        gpus: of each actor; None: 1 where the cluster has GPUs, else 0.
        cores: of each actor; None: 2 without a GPU, or as many as the smallest node has; with one, the share of its
            node.
        actors: least and most; Ray starts and stops them, and asks an autoscaling cluster for nodes. None: no limit.
        options: further ones of `iter_predict`.

    Raises:
        ImportError: the extra "ray" is not installed.
        ConnectionError: no cluster at this address.
        ValueError: no node of the cluster has what an actor needs.
    """
    ray = require("ray", "prediction on a cluster")
    require("ray.data", "prediction on a cluster", "ray")
    with connected(address), _quiet(ray):
        gpus, cores = _shares(ray, gpus, cores)
        inner: Any = unwrap(model)
        weight = inner.patch_embed.proj.weight
        shipped = ray.put(inner if weight.device.type == "cpu" else copy.deepcopy(inner).to("cpu"))
        settings = {"top_k": top_k, **options}
        if gpus == 0 and settings.get("workers") is None:
            settings["workers"] = 0  # actors fill the cores
        block = GPU_BLOCK if gpus else BLOCK
        pickled = (pickle.dumps(image) for image in images)
        blocks = iter(lambda: list(itertools.islice(pickled, block)), [])
        while wave := list(itertools.islice(blocks, max(1, WAVE // block))):
            yield from _answers(ray, wave, shipped, settings, gpus, cores, actors)


def _answers(
    ray: Any,
    wave: list[list[bytes]],
    shipped: Any,
    options: dict[str, Any],
    gpus: float,
    cores: float,
    actors: tuple[int, int | None],
) -> Iterator[Prediction | Failure]:
    import pyarrow

    data = ray.data.from_arrow([pyarrow.table({"image": block}) for block in wave])
    least, most = actors
    found = data.map_batches(
        Answerer,
        batch_size=None,  # a block as it is
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=max(least, most or len(wave))),
        num_gpus=gpus or None,
        num_cpus=cores,
        fn_constructor_kwargs={"model": shipped, "options": options, "on_gpu": gpus > 0, "cores": cores},
    )
    count = 0
    for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for answer in batch["answer"].to_pylist():
            count += 1
            yield pickle.loads(answer)
    if count != (expected := sum(map(len, wave))):
        raise RuntimeError(f"Ray returned {count} answers to {expected} images; run the command again")


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Keeps the order of the blocks, and progress and plans off the screen."""
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    options, level = context.execution_options, log.level
    before = options.preserve_order, context.enable_progress_bars
    options.preserve_order, context.enable_progress_bars = True, False
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        options.preserve_order, context.enable_progress_bars = before
        log.setLevel(level)


class Answerer:
    """An actor: one copy of the model, which answers blocks of images.

    Args:
        model: reference to a `MedMamba` in Ray's object store.
        options: of `iter_predict`.
        on_gpu: whether Ray gave it a GPU.
        cores: threads of PyTorch.
    """

    def __init__(self, model: Any, options: dict[str, Any], on_gpu: bool, cores: float) -> None:
        import ray
        import torch

        torch.set_num_threads(max(1, int(cores)))
        self.model = ray.get(model).to("cuda" if on_gpu else "cpu")
        self.options = options

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        # Pickles of the caller, whose code runs here anyway, as everything that Ray sends.
        images = [pickle.loads(image) for image in batch["image"].to_pylist()]
        return pyarrow.table({"answer": [packed(found) for found in iter_predict(self.model, images, **self.options)]})


def packed(found: Prediction | Failure) -> bytes:
    """Returns an answer in a form that can be sent; the `cause` of a failure stays behind, which may hold anything."""
    return pickle.dumps(dataclasses.replace(found, cause=None) if isinstance(found, Failure) else found)


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to a cluster, unless the program is connected already; closes what it opened.

    Raises:
        ConnectionError: no cluster at this address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address == "auto":
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:
                ray.init(address="local", include_dashboard=False, **quiet)
        elif address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"no Ray cluster at {address!r} ({reason}); start one with `ray start --head`, or use 'auto' or 'local'"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _shares(ray: Any, gpus: float | None, cores: float | None) -> tuple[float, float]:
    """Returns GPUs and cores of each actor."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
    fitting = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) > 0]
    if cores is None:
        if gpus:
            cores = min((node["CPU"] // max(1, node["GPU"] // gpus) for node in fitting), default=1) or 1
        else:
            cores = min([CORES, *(node["CPU"] for node in fitting)])
    if not any(node["CPU"] >= cores for node in fitting):
        raise ValueError(
            f"no node of the cluster has {cores:g} cores and {gpus:g} GPUs at once; ask for less with cores= and gpus="
        )
    return gpus, cores
