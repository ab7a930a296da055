"""Backend "mamba_ssm": the CUDA kernel of that package, which is compiled when the package is installed.

The kernel scans one direction per channel, so a map is first unfolded into four sequences in float32, as in the
published MedMamba. It sums gradients with atomics, so two runs differ in the last digits.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ..reference import from_directions, to_directions
from .base import Backend, Gradients1d, Gradients2d
from .eager import directions_to_maps

CHUNK = 512  # tokens per saved state; gives `states` enough room for what the kernel saves
KERNEL_CHUNK = 2048  # tokens between the states that the kernel itself saves; needed for longer sequences only
INSTALL = (
    "with nvcc: MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE pip install --force-reinstall --no-cache-dir "
    "--no-build-isolation --no-deps mamba-ssm (requirements-cuda.txt has the details)"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kernel() -> ModuleType:
    """Returns the extension, which is stateless and runs on the device and current stream of its tensors."""
    return importlib.import_module("selective_scan_cuda")


def _unfold(maps: Tensor, K: int) -> Tensor:
    """Unfolds (B, H, W, C) to the four sequences (B, K * C, L), float32 and contiguous."""
    B, H, W, C = maps.shape
    seqs = to_directions(maps.float().unsqueeze(3).expand(B, H, W, K, C))  # (B, K, L, C)
    return seqs.transpose(2, 3).flatten(1, 2).contiguous()


def _sequences(x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> tuple:
    """Returns the kernel's arguments before `dout`: u, delta, A, B, C, D, z, delta_bias."""
    K, C, R = dt_weight.shape
    N = A.shape[-1]
    code, Bs, Cs = to_directions(proj.float()).transpose(2, 3).split((R, N, N), dim=2)  # (B, K, R or N, L)
    delta = (dt_weight.float() @ code).flatten(1, 2)  # (B, K * C, L)
    parameters = A.float().flatten(0, 1).contiguous(), D.float().flatten(), dt_bias.float().flatten()
    return _unfold(x, K), delta, parameters[0], Bs.contiguous(), Cs.contiguous(), parameters[1], None, parameters[2]


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float().contiguous() for t in tensors)


class MambaSsmBackend(Backend):
    """Calls the extension. `states` holds what the kernel needs for the backward pass of long sequences."""

    name = "mamba_ssm"
    chunk = CHUNK

    def why_not(self) -> str | None:
        # Newer releases of mamba_ssm import without their CUDA scan, so the extension itself is what counts.
        if importlib.util.find_spec("selective_scan_cuda") is None:
            return f"the extension selective_scan_cuda is not installed; {INSTALL}"
        try:
            _kernel()
        except ImportError as error:
            return f"selective_scan_cuda does not load, likely built for another PyTorch ({error}); {INSTALL}"
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA GPU; check nvidia-smi, and that this PyTorch was built for CUDA"
        return None

    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"mamba_ssm's kernel computes in float32 and takes no {dtype}; use backend 'torch'"
        return (
            None if device.type == "cuda" else f"mamba_ssm's kernel runs on CUDA GPUs, the tensors are on {device.type}"
        )

    def scan_2d(
        self, x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, states: Tensor
    ) -> Tensor:
        B, H, W, C = x.shape
        y, saved = _kernel().fwd(*_sequences(x, proj, dt_weight, dt_bias, A, D), True)
        if states.numel() and H * W > KERNEL_CHUNK:
            states.view(-1)[: saved.numel()].copy_(saved.view(-1))
        ys = y.unflatten(1, (-1, C)).transpose(2, 3)  # (B, K, L, C)
        return from_directions(ys, H, W).to(x.dtype).contiguous()

    def scan_2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
    ) -> Gradients2d:
        B, H, W, C = x.shape
        K, _, R = dt_weight.shape
        N, L = A.shape[-1], H * W
        sequences = _sequences(x, proj, dt_weight, dt_bias, A, D)
        saved = None
        if L > KERNEL_CHUNK:
            shape = (B, K * C, -(-L // KERNEL_CHUNK), 2 * N)
            saved = states.view(-1)[: torch.Size(shape).numel()].view(shape)
        du, ddelta, dA, dB, dC, dD, dbias = _kernel().bwd(*sequences, _unfold(dy, K), saved, None, None, True, False)

        ddelta = ddelta.unflatten(1, (K, C)).transpose(2, 3)  # (B, K, L, C)
        code = to_directions(proj[..., :R].float())  # (B, K, L, R)
        dproj = torch.cat(
            (ddelta @ dt_weight.float(), dB.transpose(2, 3), dC.transpose(2, 3)), dim=-1
        )  # (B, K, L, R + 2N)
        grads = (
            from_directions(du.unflatten(1, (K, C)).transpose(2, 3), H, W),
            directions_to_maps(dproj, H, W),
            torch.einsum("bklc,bklr->kcr", ddelta, code),
            dbias.view(K, C),
            dA.view(K, C, N),
            dD.view(K, C),
        )
        inputs = (x, proj, dt_weight, dt_bias, A, D)
        return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]

    def scan_1d(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, softplus: bool
    ) -> tuple[Tensor, Tensor]:
        y, saved = _kernel().fwd(*_float(u, delta, A, B, C, D), None, *_float(delta_bias), softplus)
        return y.to(u.dtype), saved[:, :, -1, 1::2].contiguous()

    def scan_1d_backward(
        self,
        dy: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        softplus: bool,
    ) -> Gradients1d:
        inputs = (u, delta, A, B, C, D, delta_bias)
        sequences = (*_float(u, delta, A, B, C, D), None, *_float(delta_bias))
        saved = _kernel().fwd(*sequences, softplus)[1] if u.shape[-1] > KERNEL_CHUNK else None
        grads = _kernel().bwd(*sequences, *_float(dy), saved, None, None, softplus, False)
        return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]


BACKEND = MambaSsmBackend()
