"""The training loop: optimiser steps, validation after each epoch, selection of the best epoch, stop and resume."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..imaging.preprocess import normalise
from ..inference.predict import NotFiniteError
from ..model import MedMamba
from ..utils.devices import autocast, owning
from . import augment, data_parallel, graphed_step, loss, sampling
from .checkpoint import CheckpointStore, ResumeError, another_run
from .divergence import check_weights, diverged
from .identity import differences
from .optim import WeightAverage, build_optimizer, freeze_stages, lr_factor, set_lr
from .progress import Progress
from .recipe import POWERS, Recipe, RecipeError
from .run_log import RunLog
from .stopping import stop_on_sigterm
from .teacher import Teacher
from .validation import selection_score, validate, validation_batch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data import CachedDataset

Images = Callable[[str, int], "CachedDataset"]  # ("train" or "val", side in pixels) -> decoded images


class _SizedGraph(NamedTuple):
    size: torch.Size | None
    step: graphed_step.GraphedStep | None


_NO_GRAPH = _SizedGraph(None, None)


class Trainer:
    """Trains `model` in place.

    Args:
        model: the network; moved to the device of `accelerator`.
        recipe: every setting that affects the result.
        images: returns the decoded images of a split at a size; called for "train" and "val" only.
        accelerator: device, precision and processes.
        store: where checkpoints are written, and resumed from.
        log: progress bar and history files.
        seed: of order, augmentation and dropout.
        accumulate: parts in which each process takes its share of a batch.
        identity: inputs of the run (`run_identity`); a checkpoint with another identity is rejected.
        deadline: `time.monotonic()` after which to stop once the current step is done; None: never.
        checkpoint_seconds: minimum time between two checkpoints.
        graphs: "auto": forward and backward as one CUDA graph on each GPU, see `graphed_step`; "off": never.
        teacher: its answers count `recipe.distill`, the labels the rest.
    """

    def __init__(
        self,
        model: MedMamba,
        recipe: Recipe,
        images: Images,
        accelerator: Accelerator,
        store: CheckpointStore,
        log: RunLog,
        *,
        seed: int = 0,
        accumulate: int = 1,
        identity: dict[str, Any] | None = None,
        deadline: float | None = None,
        checkpoint_seconds: float = 60.0,
        graphs: str = "auto",
        teacher: Teacher | None = None,
    ):
        if (teacher is None) != (recipe.distill == 0):
            raise RecipeError("distillation needs both a teacher and the setting distill, the weight of its answers")
        self.teacher = teacher
        self.recipe, self.images, self.accelerator, self.store, self.log = recipe, images, accelerator, store, log
        self.seed, self.identity, self.deadline = seed, identity or {}, deadline
        self.checkpoint_seconds, self._saved_at = checkpoint_seconds, time.monotonic()
        self.config = model.config
        self.frozen = freeze_stages(model, recipe.freeze)
        # One memory format for convolutions, their inputs and gradients, so that none is reordered.
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = WeightAverage(self.model, recipe.ema) if recipe.ema else None
        self.progress = Progress()
        self._best: dict[str, Tensor] | None = None  # weights of the best epoch not yet written by a checkpoint
        if recipe.balance == "sampling" and model.config.task == "multilabel":
            raise RecipeError("balance='sampling' needs one label per image; use balance='loss' for several")
        if "quadratic_kappa" in recipe.select and model.config.task != "ordinal":
            raise RecipeError("select='quadratic_kappa' needs an ordinal task: grades in order (task='ordinal')")

        labels = self._labels(images("train", recipe.size_at(0)))
        self.labels, self.classes = labels, self.config.num_classes
        self.batches = sampling.Batches.plan(len(labels), recipe.batch_size, accelerator.num_processes, accumulate)
        self.weights: Tensor | None = None
        if recipe.balance in POWERS:
            power = POWERS[recipe.balance]
            self.weights = sampling.class_weights(labels, self.classes, power).to(accelerator.device)
        synchronised = data_parallel.sync_batch_norm(self.model, accelerator, self.batches.part)
        self._use_graphs = graphs == "auto" and graphed_step.graphs_possible(accelerator) and not synchronised
        self._graph = _NO_GRAPH
        with owning(accelerator):
            self.optimizer = accelerator.prepare(build_optimizer(self.model, recipe))
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.wrapped: torch.nn.Module = self.model
        self._gradients = data_parallel.GradientMean(accelerator, self._trained)
        self._statistics = data_parallel.StatisticsMean(self.model, accelerator, accumulate)
        if self._use_graphs:
            data_parallel.broadcast_state(self.model, accelerator)
        else:
            self._wrap()

    # --- the run ---

    def fit(self) -> Progress:
        """Trains to the end, the deadline or a SIGTERM; `progress.finished(recipe)` tells whether it is the end.

        Raises:
            TrainingError: the loss or the weights are NaN or infinite.
            ResumeError: the checkpoint is damaged or belongs to another run.
        """
        self._resume()
        self.images(
            "val", self.recipe.validated_at(self.progress.epoch)
        )  # fails now, not after an epoch, on unreadable files
        total = self.recipe.epochs * self.batches.steps
        with stop_on_sigterm() as stopping, self.log.bar(total * self.batches.size, self._global_step()) as bar:
            while not self.progress.finished(self.recipe):
                if not self._train_epoch(bar, stopping):
                    self._save()
                    break
                self._end_epoch(bar)
        return self.progress

    def _train_epoch(self, bar: Any, stopping: threading.Event) -> bool:
        """Trains the rest of the current epoch; returns False if it was stopped early."""
        progress, epoch = self.progress, self.progress.epoch
        size = self.recipe.size_at(epoch)
        data = self.images("train", size)
        order = torch.from_numpy(sampling.epoch_order(self.labels, self.recipe.balance, self.seed, epoch))
        order = order.to(data.device)  # once: indexing with a tensor on another device synchronises each time
        feed = data.batches(self._rows(order), self.accelerator.device)
        self.model.train()
        for module in self.frozen:
            module.eval()
        # Kept on the device: reading it waits for all work queued before.
        running = torch.tensor(progress.loss_sum, dtype=torch.float64, device=_double(self.accelerator.device))
        started, before = time.monotonic(), progress.seconds
        while progress.step < self.batches.steps:
            running += self._step(data.size, feed, epoch, progress.step).to(running.device)
            progress.step += 1
            bar.update(self.batches.size)
            last = progress.step == self.batches.steps
            if bar.due or last or self._checkpoint_due():
                progress.loss_sum = self._checked(running, epoch)
                progress.seconds = before + time.monotonic() - started
                bar.show(epoch, progress.loss_sum / progress.step, progress.history)
            if not last and self._checkpoint_due():
                self._save()
            if self._must_stop(stopping):
                progress.loss_sum = self._checked(running, epoch)
                progress.seconds = before + time.monotonic() - started
                return False
        return True

    def _rows(self, order: Tensor) -> Iterator[Tensor]:
        """Yields the rows that this process takes in each part of each step left in the epoch."""
        for step in range(self.progress.step, self.batches.steps):
            for turn in range(self.batches.accumulate):
                yield order[self.batches.rows(step, self.accelerator.process_index, turn)[0]]

    def _step(self, size: tuple[int, int], feed: Iterator[tuple[Tensor, Tensor]], epoch: int, step: int) -> Tensor:
        """Runs one optimiser step; returns the mean loss of this process."""
        recipe, plan, process = self.recipe, self.batches, self.accelerator.process_index
        drawn = augment.draw(recipe, plan.size, sampling.augment_rng(self.seed, epoch, step))
        count, switch = epoch * plan.steps + step, recipe.final_phase * plan.steps
        set_lr(self.optimizer, recipe.lr * lr_factor(count, plan.steps, recipe))
        total: Tensor | float = 0.0
        self._statistics.begin()
        for turn in range(plan.accumulate):
            _, of_step = plan.rows(step, process, turn)
            images, targets = self._batch(*next(feed), drawn.rows(of_step.start, of_step.stop), size)
            graph = self._graph_for(images, targets)
            if graph and turn == 0:
                graph.begin()
            sampling.seed_network(self.seed, epoch, step, of_step.start, images.device)
            if graph:
                total = total + graph(images, targets)
            else:
                last = turn == plan.accumulate - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    part_loss = self._loss(images, targets)
                    self.accelerator.backward(part_loss)
                total = total + part_loss.detach()
            self._statistics.part_done(turn)
        self._statistics.end()
        if self._graph.step:
            self._gradients.average()
        if recipe.clip_grad:
            self.accelerator.unscale_gradients(self.optimizer)
            clip_grad_norm_(self._trained, recipe.clip_grad)
        # Without a scaler not through accelerate, which looks for a package on the disk at every step.
        (self.optimizer if self.accelerator.scaler else self.optimizer.optimizer).step()
        if not self._graph.step:  # a graph reuses its gradients
            self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            # Starts over in the final phase: weights and statistics of small images would linger.
            self.average.update(self.model, count if epoch < recipe.final_phase else count - switch)
        return torch.as_tensor(total)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.accelerator):
            logits = self.wrapped(images)
        found = loss.classification_loss(logits, targets, self.config.task, self.weights)
        return found / self.batches.accumulate

    # What `SegmentationTrainer` does in another way, beside `_loss` and `_batch`.

    def _labels(self, data: CachedDataset) -> np.ndarray:
        """Returns the labels of the training images, for the order and the weights of classes."""
        return data.index.labels

    def _validate(self, model: MedMamba, data: CachedDataset, batch_size: int) -> dict[str, float]:
        """Returns the metrics that can select an epoch, "loss" among them."""
        return validate(model, data, self.accelerator, batch_size)

    def _graph_for(self, images: Tensor, targets: Tensor) -> graphed_step.GraphedStep | None:
        """Returns the graph for batches of this size, captured on first use; None where graphs are off."""
        if self._use_graphs and self._graph.size != images.shape[2:]:
            self._graph = _NO_GRAPH  # frees its memory before more is allocated
            step = graphed_step.capture(self.model, self._loss, images, targets, self.batches.accumulate)
            self._use_graphs = self._mean_over_processes(float(step is not None)) == 1  # in all processes or in none
            self._graph = _SizedGraph(images.shape[2:], step if self._use_graphs else None)
            if not self._use_graphs:
                self._wrap()
        return self._graph.step

    def _wrap(self) -> None:
        """Wraps the model in DistributedDataParallel, for steps without graphs in several processes."""
        if self.accelerator.num_processes > 1:
            with owning(self.accelerator):
                self.wrapped = self.accelerator.prepare(self.model)
            if self.average:
                self.average.forget_tensors()  # wrapping may replace the model's buffers

    def _batch(
        self, images: Tensor, labels: Tensor, drawn: augment.Draw, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Returns augmented, mixed and normalised images (B, C, H, W), channels_last, and targets (B, K)."""
        images = augment.augment(images, drawn, self.recipe.augment, size)
        targets = loss.soft_targets(labels, self.classes, self.recipe.label_smoothing)
        images, targets = augment.mix(images, targets, drawn)
        if self.teacher is not None:
            with torch.no_grad(), autocast(self.accelerator):
                answers = self.teacher(images)
            targets = targets.lerp(answers.to(targets.dtype), self.recipe.distill)
        return normalise(images, self.config.preprocess).contiguous(memory_format=torch.channels_last), targets

    def _end_epoch(self, bar: Any) -> None:
        """Validates, adds the epoch to the history and keeps its weights if it is the best."""
        progress, plan, recipe = self.progress, self.batches, self.recipe
        mean_loss = self._mean_over_processes(progress.loss_sum / plan.steps)
        self._agree_on_statistics()
        shown = self.average.model if self.average else self.model
        val = self.images("val", recipe.validated_at(progress.epoch))
        if progress.epoch == recipe.final_phase:
            progress.best = None  # earlier epochs had another image size
        batch_size = validation_batch(plan.part, self.accelerator.device)
        check_weights(self.model, self.progress.epoch, self.store)
        try:
            scores = self._validate(shown, val, batch_size)
        except NotFiniteError as error:
            raise diverged(f"{error} after epoch {progress.epoch + 1}", self.store) from error
        score = [selection_score(scores, metric) for metric in recipe.select]
        is_best = progress.best is None or score > progress.best["score"]
        row = {
            "epoch": progress.epoch + 1,
            "lr": recipe.lr * lr_factor((progress.epoch + 1) * plan.steps - 1, plan.steps, recipe),
            "size": recipe.size_at(progress.epoch),
            "loss": mean_loss,
            **{f"val_{name}": value if math.isfinite(value) else None for name, value in scores.items()},
            "best": is_best,
            "images_per_second": round(plan.steps * plan.size / max(progress.seconds, 1e-9), 2),
            "seconds": round(progress.seconds, 3),
        }
        if is_best:
            progress.best = {"epoch": progress.epoch, "score": score}
            if self.accelerator.process_index == 0:
                self._best = {name: tensor.clone() for name, tensor in shown.state_dict().items()}
        progress.history.append(row)
        progress.epoch, progress.step, progress.loss_sum, progress.seconds = progress.epoch + 1, 0, 0.0, 0.0
        self.log.epoch(progress.history)
        bar.show(progress.epoch - 1, mean_loss, progress.history)
        if self._checkpoint_due() or progress.finished(recipe):
            self._save()

    # --- between processes ---

    def _agree_on_statistics(self) -> None:
        """Broadcasts buffers, equal up to rounding (`StatisticsMean`), so that processes do not drift apart."""
        for model in [self.model, *([self.average.model] if self.average else [])]:
            data_parallel.broadcast_state(model, self.accelerator, buffers_only=True)

    def _mean_over_processes(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        number = torch.tensor(value, device=self.accelerator.device)
        return float(self.accelerator.reduce(number, reduction="mean"))

    def _must_stop(self, stopping: threading.Event) -> bool:
        stop = stopping.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline)
        if self.accelerator.num_processes == 1:
            return stop
        if self.progress.step % 10 and self.progress.step != self.batches.steps:
            return False  # each check costs a collective operation
        return self._mean_over_processes(float(stop)) > 0

    # --- checkpoints ---

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.checkpoint_seconds

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.accelerator.process_index != 0:
            return
        check_weights(self.model, self.progress.epoch, self.store)
        progress = self.progress
        scaler = self.accelerator.scaler
        if self._best is not None and progress.best:
            self.store.save_best(progress.best["epoch"], self._best)
            self._best = None
        self.store.save(
            {
                "identity": self.identity,
                "plan": self._plan(),
                "epoch": progress.epoch,
                "step": progress.step,
                "loss_sum": progress.loss_sum,
                "seconds": progress.seconds,
                "history": progress.history,
                "best": progress.best,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.model.state_dict() if self.average else None,
                "scaler": scaler.state_dict() if scaler else None,
            }
        )

    def _resume(self) -> None:
        state = self.store.load()
        if state is None:
            return
        if changed := differences(self.identity, state["identity"]):
            raise another_run(self.store, changed)
        if state["plan"] != self._plan():
            raise ResumeError(
                f"{self.store.folder} holds a run with other batches (steps, images per step, images at once: "
                f"{state['plan']}, now {self._plan()}); resume it with the same number of processes and accumulation"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
        self.log.resumed(self.progress.history)

    def _plan(self) -> list[int]:
        return [self.batches.steps, self.batches.size, self.batches.part]

    # --- checks ---

    def _global_step(self) -> int:
        return (self.progress.epoch * self.batches.steps + self.progress.step) * self.batches.size

    def _checked(self, running: Tensor, epoch: int) -> float:
        value = float(running)
        if not math.isfinite(value):
            raise diverged(f"the loss is NaN or infinite in epoch {epoch + 1}", self.store)
        return value


def _double(device: torch.device) -> torch.device:
    """Returns a device that has float64, which Apple GPUs lack."""
    return torch.device("cpu") if device.type == "mps" else device
