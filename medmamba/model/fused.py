"""A model for inference whose blocks run as few kernels, on NVIDIA GPUs and CPUs; `model.fuse()` returns one.

`fused_blocks.py` describes the kernels of a block. In other cases (other devices, gradients, torch.compile, autocast
over float32 weights, fake tensors and modes that see every operation, replaced layers, on a CPU hooks and replaced
methods `forward`) the layers of `network.py` run one by one. On a GPU, hooks on layers inside a block fire only there.

Fused models and their graphs are thread-safe; each thread may use a CUDA stream of its own.
"""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import resolve_backend
from ..kernels.block import between, inference, inference_cpu
from ..kernels.cuda import graph_capture
from ..kernels.dispatch import transformed
from ..kernels.once import once
from .fused_blocks import Block, ChannelAffine, Pointwise, norm_of, prepare_block, run_stage
from .network import (
    SS2D,
    ConvBranch,
    DropPath,
    MedMambaNetwork,
    PatchEmbed,
    PatchMerging,
    SSConvSSM,
    Stage,
    embed_patches,
)

# The layers that the kernels implement, by exact type: a subclass or an adapter may compute something else.
LAYERS = {
    *(PatchEmbed, PatchMerging, Stage, SSConvSSM, SS2D, ConvBranch, DropPath, ChannelAffine, Pointwise),
    *(nn.Conv2d, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.ReLU),
}
RUNS = {"cuda": "cuda", "cpu": "native"}  # the scan backend on whose kernels a fused model runs
RUNS_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_preparing = threading.Lock()


class _Prepared(NamedTuple):
    """Prepared blocks by stage, with the parameters and buffers they derive from and the version of those."""

    embed_norm: tuple[Tensor, Tensor, float]
    merge_norms: list[tuple[Tensor, Tensor, float]]
    blocks: list[list[Block]]
    sources: list[Tensor]
    version: int


class FusedMedMamba(MedMambaNetwork):
    """Mixin that runs a folded network by fused kernels, in front of the class that was fused; see `fused_class`.

    Evaluation only: refuses to be trained, saved or pushed.
    """

    _base: type[MedMambaNetwork] = MedMambaNetwork  # the class that was fused
    _blocks: _Prepared | None = None
    _plain: bool | None = None  # whether the kernels implement all layers; None: not checked yet
    _changes = 0  # number of times that layers were moved, loaded or replaced

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Returns the maps of the four stages: (B, dims[i], H / 2^(i+2), W / 2^(i+2)), channels_last in memory."""
        self._check_input(x)
        if x.dtype != (dtype := self.patch_embed.proj.weight.dtype):
            x = x.to(dtype)
        if not self._runs_fused(x):
            return super().forward_pyramid(x)
        return self.cuda_pyramid(x) if x.is_cuda else self._pyramid(x, inference_cpu)

    @torch.inference_mode()
    def graphed(self, example: Tensor) -> Callable[[Tensor], Tensor]:
        """Captures a CUDA graph and returns it as a function from images to logits, without Python's launch overhead.

        Each call returns a new tensor. The function is thread-safe on one or several CUDA streams, but calls are
        serialised because a graph has one input buffer; capture one graph per thread for concurrent calls. The function
        keeps the weights that it was captured with.

        Args:
            example: images (B, in_chans, H, W); the function takes batches of exactly this shape.

        Raises:
            ValueError: the model is not on an NVIDIA GPU, or `example` is empty; from the function, another shape.
            RuntimeError: from the function, if the model was moved or its weights were loaded since.
        """
        images = example.to(self.patch_embed.proj.weight.device)

        def weights() -> list[object]:
            return [self._blocks, *(t.detach() for t in (*self.parameters(), *self.buffers()))]

        return graph_capture.replayed(self, images, weights, lambda: self._changes)

    # --- unsupported operations ---

    def train(self, mode: bool = True):
        """Sets evaluation mode; raises RuntimeError for training mode."""
        if mode:
            _refuse("cannot be trained: its batch norms are folded into the convolutions", "train")
        return super().train(False)

    def save_pretrained(self, *args, **kwargs) -> NoReturn:  # type: ignore[override]
        """Raises RuntimeError: `from_pretrained` could not load the result."""
        _refuse("cannot be saved: its layers are not those that from_pretrained builds", "save")

    def push_to_hub(self, *args, **kwargs) -> NoReturn:  # type: ignore[override]
        """Raises RuntimeError: `from_pretrained` could not load the result."""
        _refuse("cannot be pushed: its layers are not those that from_pretrained builds", "push")

    # --- weights and the blocks prepared from them ---

    def _apply(self, fn, recurse=True):
        self._forget()  # moved or cast
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()  # also where a module that this one is a part of is loaded
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._forget()
        super().__setattr__(name, value)

    def _forget(self) -> None:
        self._blocks, self._plain, self._changes = None, None, self._changes + 1

    def __reduce__(self):
        return _unpickle, (self._base,), self.__dict__ | {"_blocks": None}

    def _runs_fused(self, x: Tensor) -> bool:
        weight, device = self.patch_embed.proj.weight, x.device.type
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or weight.device != x.device:
            return False
        if device not in RUNS or weight.dtype not in RUNS_TYPES:
            return False
        if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            return False
        if not len(x) or torch.jit.is_tracing() or transformed() or _intercepted(x) or _intercepted(weight):
            return False
        if self._plain is None:
            parts = (self.patch_embed, self.stages, self.downsamples)
            own = super().forward_pyramid.__func__ is MedMambaNetwork.forward_pyramid  # type: ignore[attr-defined]
            self._plain = own and all(type(m) in LAYERS for part in parts for m in part.modules())
            self._share("_plain", self._plain)
        if not self._plain or (device == "cpu" and self._observed()):
            return False
        stages: Any = self.stages
        ssm = stages[0].blocks[0].ssm
        fits = all(dim % 4 == 0 for dim in self.config.dims) and self.config.d_state <= 16
        return fits and resolve_backend(x.device, weight.dtype, ssm.scan_backend) == RUNS[device]

    def _observed(self) -> bool:
        parts = (self.patch_embed, self.stages, self.downsamples)
        return _has_any_global_hook() or any(
            m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__
            for part in parts
            for m in part.modules()
        )

    def _prepared(self) -> _Prepared:
        """Returns what is prepared. One thread prepares it; others wait for it and for the GPU to finish."""
        plan = self._blocks
        if plan is not None and _version(plan.sources) == plan.version:
            return plan
        with _preparing:
            plan = self._blocks
            if plan is None or _version(plan.sources) != plan.version:
                stages: Any = self.stages
                embed: Any = self.patch_embed
                merging: Any = self.downsamples
                parts = (self.patch_embed, self.stages, self.downsamples)
                sources = [t for part in parts for t in (*part.parameters(), *part.buffers())]
                version = _version(sources)
                narrow = between.fits(self.config.dims, self.config.ssm_expand, embed.proj.weight)
                blocks = [[prepare_block(block, narrow) for block in stage.blocks] for stage in stages]
                norms = norm_of(embed.norm), [norm_of(m.norm) for m in merging]
                plan = _Prepared(*norms, blocks, sources, version)
                if sources[0].is_cuda:
                    if torch.cuda.is_current_stream_capturing():
                        return plan  # filled when the graph is replayed, so private to that graph
                    torch.cuda.current_stream(sources[0].device).synchronize()  # others read them on other streams
                self._blocks = plan
                self._share("_blocks", plan)
            return plan

    def _share(self, name: str, value: Any) -> None:
        """Copies what an `eval_view` computed from the shared weights to the original, for its next view."""
        original = self.__dict__.get("_viewed", lambda: None)()
        if original is not None and original._changes == self._changes:  # not moved or loaded since
            original.__dict__[name] = value

    def cuda_pyramid(self, x: Tensor) -> list[Tensor]:
        """Returns `forward_pyramid(x)` computed by the kernels of `kernels/block/inference.py`."""
        return self._pyramid(x, inference)

    @torch.no_grad()
    def _pyramid(self, x: Tensor, kernels: ModuleType) -> list[Tensor]:
        embed: Any = self.patch_embed
        x = x.to(embed.proj.weight.dtype)
        if not x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        prepared = self._prepared()
        x = embed_patches(x, embed.proj, backend=embed.scan_backend)
        x = kernels.norm(x.contiguous(), *prepared.embed_norm)  # (B, H, W, C)
        maps = []
        for i, blocks in enumerate(prepared.blocks):
            if i:
                merging: Any = self.downsamples[i - 1]
                x = F.linear(kernels.gather_norm(x, *prepared.merge_norms[i - 1]), merging.reduction.weight)
            x = run_stage(x, blocks, kernels)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


@once
def fused_class(base: type[MedMambaNetwork]) -> type[FusedMedMamba]:
    """Returns the fused counterpart of class `base`, which keeps what `base` adds, such as another head."""
    if issubclass(base, FusedMedMamba):
        return base
    return type(f"Fused{base.__name__}", (FusedMedMamba, base), {"_base": base, "__doc__": FusedMedMamba.__doc__})


def _unpickle(base: type[MedMambaNetwork]) -> FusedMedMamba:
    cls = fused_class(base)
    return cls.__new__(cls)


def _refuse(what: str, verb: str) -> NoReturn:
    raise RuntimeError(f"a fused model {what}; {verb} the model that fuse() was called on, which it left as it was")


def _version(tensors: list[Tensor]) -> int:
    """Returns a number that grows whenever one of the tensors is written to."""
    try:
        return sum([t._version for t in tensors])
    except RuntimeError:  # tensors made in inference mode carry no version counter
        return sum(t._version for t in tensors if not t.is_inference())


def _intercepted(x: Tensor) -> bool:
    """Returns whether Python sees each operation on x, whose memory may not exist: FakeTensor, FlopCounterMode."""
    return torch._C._len_torch_dispatch_stack() > 0 or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
