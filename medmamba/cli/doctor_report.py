"""Report of versions, devices, backends and optional packages, for `medmamba doctor`."""

import importlib.metadata
import os
import platform
import sys

import torch

from ..kernels import BackendError, available_backends, resolve_backend

EXTRAS = {
    "captum": "explain",
    "matplotlib": "explain",
    "pydicom": "dicom",
    "scikit-learn": "train",
    "accelerate": "train",
    "gradio": "demo",
    "jupyter": "notebooks",
    "onnxruntime": "export",
}


def report() -> list[tuple[str, str]]:
    """Returns (item, finding) pairs in display order."""
    from .._version import __version__
    from ..pretrained import bundled_models

    rows = [
        ("medmamba", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        (
            "torch",
            f"{torch.__version__}, {torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}",
        ),
        ("accelerator", _accelerator()),
    ]
    for name, reason in available_backends().items():
        rows.append((f"scan backend {name}", "available" if reason is None else f"not available: {reason}"))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            chosen = resolve_backend(torch.device(device), torch.float32)
        except BackendError as error:
            chosen = f"none: {error}"
        setting = os.environ.get("MEDMAMBA_SCAN")
        rows.append((f"scan on {device}", chosen + (f" (MEDMAMBA_SCAN={setting})" if setting else "")))
    missing: dict[str, list[str]] = {}
    for package, extra in EXTRAS.items():
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            missing.setdefault(extra, []).append(package)
    for extra, packages in missing.items():
        rows.append((", ".join(packages), f'not installed: {sys.executable} -m pip install "medmamba[{extra}]"'))
    rows.append(("bundled models", ", ".join(bundled_models()) or "none"))
    return rows


def _accelerator() -> str:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, compute capability {major}.{minor}"
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS): the scan runs there in plain PyTorch"
    if torch.version.cuda is None:
        return "none: this is a CPU build of PyTorch; with an NVIDIA GPU, install one for CUDA (see pytorch.org)"
    return "none visible: PyTorch is built for CUDA but finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
