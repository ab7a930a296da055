"""Deprecated module names: importing one warns and returns its replacement. To be removed in version 0.3."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

MODULES = {  # under medmamba: old name -> new name
    "_dicom_decode": "imaging.dicom.decode",
    "_image": "imaging.image",
    "archives": "pretrained.archives",
    "calibrate": "metrics.calibration",
    "card": "cards",
    "card_text": "cards.sections",
    "checksums": "utils.checksums",
    "cli_doctor": "cli.doctor",
    "cli_evaluate": "cli.evaluate",
    "cli_explain": "cli.explain",
    "cli_export": "cli.export",
    "cli_messages": "cli.messages",
    "cli_predict": "cli.predict",
    "cli_train": "cli.train",
    "config_checks": "utils.config_checks",
    "convert": "integrations.upstream",
    "dicom": "imaging.dicom",
    "doctor": "cli.doctor_report",
    "evaluate": "evaluation",
    "evaluation.bootstrap": "metrics.bootstrap",
    "evaluation.evaluate": "metrics.evaluate",
    "evaluation.result": "metrics.result",
    "evaluation.scores": "metrics.scores",
    "fingerprint": "inference.fingerprint",
    "fitted": "inference.fitted",
    "fuse": "model.fuse",
    "fused_model": "model.fused",
    "images": "imaging.load",
    "kernels.conv_ops": "kernels.block.training_conv",
    "kernels.cuda_backend": "kernels.backends.cuda",
    "kernels.cuda_graphs": "kernels.cuda.graph_capture",
    "kernels.fused": "kernels.block.inference",
    "kernels.fused_ops": "kernels.block.training",
    "kernels.layers": "kernels.block.eligibility",
    "kernels.mamba_ssm_backend": "kernels.backends.mamba_ssm",
    "kernels.native": "kernels.backends.cpu",
    "kernels.nvrtc": "kernels.cuda.nvrtc",
    "kernels.torch_backend": "kernels.backends.eager",
    "kernels.triton_backend": "kernels.backends.triton",
    "kernels.triton_backward": "kernels.triton.backward",
    "kernels.triton_common": "kernels.triton.common",
    "kernels.triton_forward": "kernels.triton.forward",
    "kernels.triton_launch": "kernels.triton.launch",
    "kernels.triton_plan": "kernels.triton.plan",
    "licences": "cards.licences",
    "plots": "metrics.plots",
    "predict": "inference.predict",
    "preprocess": "imaging.preprocess",
    "raster": "imaging.raster",
    "registry": "data.registry",
    "sources": "pretrained.sources",
    "timm_compat": "integrations.timm",
    "timm_model": "integrations.timm_model",
    "training.engine": "training.trainer",
    "training.finish": "training.finalise",
    "training.graphs": "training.graphed_step",
    "training.log": "training.run_log",
    "training.objective": "training.loss",
    "unusual": "inference",
    "weights_file": "pretrained.weights_file",
}


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"medmamba.{MODULES[old.removeprefix('medmamba.')]}"
        message = f"{old} is now {new}; the old name will be removed in version 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # one object under both names


class _Finder(importlib.abc.MetaPathFinder):
    """Finds deprecated names; consulted last, for names without a file."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "medmamba" or name not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader())


def install() -> None:
    """Makes the deprecated names importable. Idempotent."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a package whose names moved.

    Args:
        package: full name of the package.
        homes: name to the module, under medmamba, that defines it now.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        new = f"medmamba.{homes[name]}"
        message = f"{package}.{name} is now in {new}; the old location will be removed in version 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)

    return find
