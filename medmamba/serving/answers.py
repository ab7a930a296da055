"""A model that answers requests in batches."""

from __future__ import annotations

import time
from typing import Any

from ..inference.predict import Failure, iter_predict
from .record import Server, applied, classification, for_programs, problem_for_programs
from .upload import Upload, load_upload


def check_model(source: str) -> dict[str, Any]:
    """Returns what `/models` says of a model, which is loaded once to see that it can be.

    Raises:
        PretrainedError, ConfigError: it cannot be.
        ValueError: it has no classifier.
    """
    from ..model import MedMamba

    config = MedMamba.from_pretrained(source).config
    if not config.num_classes:
        raise ValueError(f"{source} has no classifier: train one with `medmamba train --from {source}`")
    return {"name": source, "architecture": config.architecture, "classes": config.labels, "task": config.task}


class Answers:
    """A model on a device that answers requests.

    Args:
        source: of the model.
        device: of torch.
    """

    def __init__(self, source: str, device: str) -> None:
        from ..kernels import resolve_backend
        from ..model import MedMamba

        model = MedMamba.from_pretrained(source).to(device)
        weight = model.patch_embed.proj.weight
        self.model: Any = model.fuse()
        calibrated = model.config.calibration.get("method") == "temperature"
        backend = resolve_backend(weight.device, weight.dtype)
        self.about = Server(source, model.config, calibrated, backend, str(weight.device))

    def __call__(self, uploads: list[Upload]) -> list[tuple[int, dict[str, Any]]]:
        """Returns status and content of the response to each request."""
        images = [load_upload(upload) for upload in uploads]
        readable = [image for image in images if not isinstance(image, Exception)]
        results = iter(list(iter_predict(self.model, readable, batch_size=max(1, len(readable)))))
        found: list[tuple[int, dict[str, Any]]] = []
        for upload, image in zip(uploads, images, strict=True):
            if isinstance(image, Exception):
                found.append((422, {"detail": problem_for_programs(image)}))
                continue
            result = next(results)
            if isinstance(result, Failure):
                found.append((500, {"detail": for_programs(result.error)}))
                continue
            passed = 1e3 * (time.monotonic() - upload.arrived)
            found.append((200, classification(result, applied(image), passed, self.about)))
        return found
