"""The checks of benchmarks/explain.py, shared among processes.

One process leaves a GPU idle half of the time: it waits for Python between the kernels of single images.
"""

import pickle
import queue
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import explain_controls
import torch

import medmamba
from medmamba.data import registry
from medmamba.explain import Assessor, ExplainCancelled, Explanation, explain
from medmamba.explain.conditions import FullPrecision
from medmamba.explain.removal import area
from medmamba.imaging.load import load_image

METRICS = {
    "faithfulness": ("infidelity", "removal"),
    "randomisation": ("randomisation",),
    "sensitivity": ("sensitivity",),
}


@dataclass(frozen=True)
class Job:
    """A dataset, its model and its images in the order in which they are taken."""

    dataset: str
    model: str
    images: list[str]


class Task(NamedTuple):
    """A check, of `METRICS`, of all methods on one image."""

    job: int
    image: int
    check: str


def key(path: str) -> str:
    """What the records call an image."""
    return f"{Path(path).parent.name}/{Path(path).name}"


def load(name: str, device: str, fuse: bool) -> medmamba.MedMamba:
    """The model, fused if asked for and if that changes the logits of a random image by less than one in a thousand."""
    model = medmamba.MedMamba.from_pretrained(name).float().eval().to(device)
    if not fuse:
        return model
    fused = model.fuse()
    size = model.config.preprocess.input_size
    x = torch.randn(2, model.config.in_chans, *size, generator=torch.Generator().manual_seed(0)).to(device)
    with FullPrecision(), torch.no_grad():
        expected, got = model(x), fused(x)
    if (got - expected).abs().max() < 1e-3 * expected.abs().max():
        return fused
    print(f"{name}: not fused, since its logits change by {(got - expected).abs().max():.2g}", flush=True)
    return model


class Team:
    """Processes that work off tasks, and stop within a task when the deadline comes."""

    def __init__(
        self,
        jobs: list[Job],
        settings: dict[str, Any],
        device: str,
        batch_size: int | None,
        fuse: bool,
        scratch: str,
        workers: int,
    ):
        context = get_context("spawn")
        self.failures = 0
        self._tasks: Any = context.Queue()
        self._results: Any = context.Queue()
        self._deadline: Any = context.Value("d", 0.0)  # of time.time(), which all processes share; 0: none
        common = (jobs, settings, device, batch_size, fuse, scratch, workers)
        channels = (self._tasks, self._results, self._deadline)
        self._processes = [
            context.Process(target=_work, args=(*common, *channels), daemon=True) for _ in range(workers)
        ]

    def start(self) -> None:
        for process in self._processes:
            process.start()

    def wait(self) -> None:
        """Until all have loaded their libraries and rest."""
        for _ in self._processes:
            self._results.get(timeout=300)

    def work(self, tasks: list[Task], deadline: float | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(dataset, image, record) of each task that is done before the deadline, of time.monotonic()."""
        if deadline is not None:
            self._deadline.value = time.time() + deadline - time.monotonic()
        for task in (*tasks, *(None for _ in self._processes)):
            self._tasks.put(task)
        working = len(self._processes)
        while working:
            try:
                result = self._results.get(timeout=2)
            except queue.Empty:
                if not any(process.is_alive() for process in self._processes):
                    print("all processes have died", flush=True)
                    self.failures += 1
                    return
                continue
            if result is None:
                working -= 1
            elif isinstance(result, str):
                print(result, flush=True)
                self.failures += 1
            else:
                yield result

    def stop(self) -> None:
        self._tasks.cancel_join_thread()  # nobody will take what is left in it
        for process in self._processes:
            process.terminate()
            process.join(10)


def _work(
    jobs: list[Job],
    settings: dict[str, Any],
    device: str,
    batch_size: int | None,
    fuse: bool,
    scratch: str,
    workers: int,
    tasks: Any,
    results: Any,
    deadline: Any,
) -> None:
    """A process: takes tasks until it meets None, the deadline passes or three tasks have failed, and says None."""
    torch.set_num_threads(max(torch.get_num_threads() // workers, 1))

    def in_time(fraction: float = 0) -> bool:
        return not deadline.value or time.time() < deadline.value

    results.put("ready")
    benches: dict[int, _Bench] = {}
    errors = 0
    while errors < 3 and (task := tasks.get()) is not None and in_time():
        job = jobs[task.job]
        image = job.images[task.image]
        try:
            if task.job not in benches:
                benches[task.job] = _Bench(job, settings, load(job.model, device, fuse), batch_size, Path(scratch))
            results.put((job.dataset, key(image), benches[task.job].check(image, task.check, in_time)))
        except ExplainCancelled:
            break
        except Exception as error:  # a single image, or a moment of too little memory, must not end the run
            errors += 1
            results.put(f"{job.dataset} {key(image)}, {task.check}: {type(error).__name__}: {error}")
    results.put(None)


class _Bench:
    """One model, and its assessor for all images."""

    def __init__(self, job: Job, settings: dict[str, Any], model: Any, batch_size: int | None, scratch: Path):
        self.dataset, self.model, self.settings, self.batch_size = job.dataset, model, settings, batch_size
        self.scratch = scratch / job.dataset
        self.assessor = Assessor(model, seed=settings["seed"], batch_size=batch_size, **settings["checks"])

    def check(self, path: str, check: str, in_time: Any) -> dict[str, Any]:
        """Figures of a check by method, and what is known of the image."""
        found = {}
        explanations = self.explanations(path, in_time)
        for name, e in explanations.items():
            found[name] = figures(e, self.assessor.assess(e, METRICS[check], in_time))
        e = next(iter(explanations.values()))
        correct = same_class(self.dataset, Path(path).parent.name, e.label)
        return {"label": e.label, "correct": correct, "probability": round(e.probability, 4), "methods": found}

    def explanations(self, path: str, in_time: Any) -> dict[str, Explanation]:
        """By method, from the scratch folder where another check of the image has left them."""
        file = self.scratch / f"{key(path).replace('/', '_')}.pickle"
        if file.exists():
            return pickle.loads(file.read_bytes())
        image, target, found = load_image(path), None, {}
        for name in self.settings["methods"]:
            method, options = explain_controls.parse(name)
            found[name] = explain(
                self.model,
                image,
                method,
                target,
                seed=self.settings["seed"],
                batch_size=self.batch_size,
                progress=in_time,
                **options,
            )
            target = found[name].target
        self.scratch.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{id(found)}")
        part.write_bytes(pickle.dumps(found))
        part.replace(file)  # whole or not at all: other processes read it
        return found


def same_class(dataset: str, folder: str, label: str) -> bool:
    """Whether a folder of images is named after the class that a model calls so, by the registry's names for it."""
    if dataset in registry.names():
        entry = registry.get(dataset)
        if (found := entry.class_index(folder)) is not None:
            return found == entry.class_index(label)
    return folder.replace("_", " ").casefold() == label.replace("_", " ").casefold()


def figures(e: Explanation, trust: Any) -> dict[str, Any]:
    """What the tables need of the checks of one map."""
    row: dict[str, Any] = {}
    if trust.unexplained is not None:
        row["unexplained"] = trust.unexplained
        row |= {k: e.diagnostics[k] for k in ("completeness_error", "steps", "converged") if k in e.diagnostics}
    if (curves := trust.curves) is not None:
        deletion = [area(c, curves.fractions) for c in curves.random_deletion]
        insertion = [area(c, curves.fractions) for c in curves.random_insertion]
        row |= {
            "deletion_gain": statistics.mean(deletion) - curves.deletion_auc,
            "insertion_gain": curves.insertion_auc - statistics.mean(insertion),
            "deletion_wins": curves.deletion_auc < min(deletion),
            "insertion_wins": curves.insertion_auc > max(insertion),
        }
    if trust.sensitivity is not None:
        row["sensitivity"] = trust.sensitivity
    if (check := trust.randomisation) is not None:
        row |= {k: v for k, v in check.steps[-1].items() if k != "randomised"}
        row |= {"similarity": check.similarity, "passed": check.passed}
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
