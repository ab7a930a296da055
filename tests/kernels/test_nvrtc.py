"""The CUDA kernels compile for the GPUs that are supported, from the oldest to the newest. Needs NVRTC, and no GPU."""

import pytest
import torch
from test_cuda_kernels import DEVICE, emulate, problem, saved_states
from test_fused_ops_model import forget, network, step
from test_lines import problem as problem_1d

from medmamba.kernels.backends import cuda as cuda_backend
from medmamba.kernels.block import between, eligibility
from medmamba.kernels.block.convolution import conv3x3
from medmamba.kernels.cuda import nvrtc
from medmamba.kernels.cuda.lines import Plan

TYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [(96, 3), (192, 6), (384, 12), (768, 24), (34, 2)]  # channels and rank of the scans of `tiny`, and an odd one
# Turing, Ampere, Ada, Hopper, Blackwell for data centres and for desks.
CAPABILITIES = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
FILES = {
    *("forward.cu", "backward.cu", "sum.cu", "fused.cu", "depthwise.cu"),
    *("patches.cu", "train.cu", "train_conv.cu", "batch.cu", "whole.cu"),
    *nvrtc.LINES,
}
FILES |= set(nvrtc.TENSOR)


@pytest.fixture
def wanted(monkeypatch):
    """(file, constants) that a training step, an inference and the scans of `tiny` have compiled. Nothing runs."""
    found = set()

    def load_kernel(file, name, signature, constants, shared, device):
        found.add((file, constants))
        return lambda *_: None

    forget()
    emulate(monkeypatch, processors=132)
    monkeypatch.setattr(nvrtc, "load_kernel", load_kernel)
    monkeypatch.setattr(eligibility, "_on_cuda_backend", lambda x, backend: True)
    monkeypatch.setattr(between, "takes_tensor", lambda device: True)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    for dtype in TYPES:
        step(network("tiny"), images, None if dtype == torch.float32 else dtype)
        with torch.inference_mode():
            network("tiny").eval().fuse(dtype).cuda_pyramid(images)
            network("nano").eval().fuse(dtype).cuda_pyramid(images)
        for C, R in WIDTHS:
            tensors = problem(H=7, W=7, C=C, R=R, dtype=dtype)
            states = saved_states(tensors[0], 16)
            cuda_backend.BACKEND.scan_2d(*tensors, states)
            cuda_backend.BACKEND.scan_2d_backward(tensors[0], *tensors, states)
        for L, N in ((196, 16), (49, 16), (300, 1), (49, 1), (150, 8)):
            lines = problem_1d(L=L, N=N, dtype=dtype)
            cuda_backend.BACKEND.scan_1d(*lines, True)  # few lines
            for packed in (0, 1):
                cuda_backend.BACKEND.scan_1d(*lines, True, plan=Plan(packed=packed))
            cuda_backend.BACKEND.scan_1d_backward(lines[0], *lines, True)
    for dtype in TYPES[1:]:
        for C, S, O in ((256, 128, 128), (128, 64, 64), (64, 32, 32), (32, 0, 16), (16, 0, 16)):
            x, skip = torch.randn(1, 4, 4, C).to(dtype), torch.randn(1, 8, 8, S).to(dtype) if S else None
            conv3x3(x, skip, x, torch.zeros(O), enlarge=True)
            conv3x3(x, None, x, torch.zeros(1), head=True)
    forget()  # kernels that do nothing
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_compiles_for_every_supported_gpu(wanted):
    try:
        nvrtc.compiler()
    except OSError as error:
        pytest.skip(str(error))
    assert {file for file, _ in wanted} == FILES == {path.name for path in nvrtc.SOURCES.glob("*.cu")}
    for number, (file, constants) in enumerate(sorted(wanted)):
        capability = CAPABILITIES[number % len(CAPABILITIES)]  # in turn: all for each would take minutes
        compile_for(file, constants, max(capability, oldest(file)))
    for file, constants in dict(sorted(wanted)).items():
        for capability in CAPABILITIES:
            if capability >= oldest(file):
                compile_for(file, constants, capability)


def oldest(file):
    """The least capability that a file is compiled for."""
    return nvrtc.TENSOR_CAPABILITY if file in nvrtc.TENSOR else CAPABILITIES[0]


def compile_for(file, constants, capability):
    flags = [f"-D{key}={value}" for key, value in constants]
    code = nvrtc.compile_kernel(nvrtc.kernel_source(file), flags, capability)
    # PTX, for the driver to translate, where NVRTC is older than the GPU.
    assert code.startswith(b"\x7fELF") or capability >= (10, 0), f"{file} for {capability} is no machine code"
