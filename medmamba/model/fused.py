"""A model for inference whose blocks run as few kernels on an NVIDIA GPU: `model.fuse()` makes it.

Per block: two convolutions with their ReLU, four matrix products, a depthwise convolution with its SiLU, the scan, its
norm and gate, and the mixing of the branches with the preparation of the next block: ten launches, none of which reads
or writes more than it must. Elsewhere (CPUs, gradients, torch.compile, autocast over float32 weights, layers that were
replaced by others) the layers of `model.py` run one by one. Hooks on layers inside a block are called only there.

Any number of threads may use one fused model, and one graph of it, at the same time, each on a CUDA stream of its own.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import cuda_graphs, resolve_backend
from ..kernels.block import inference as fused
from ..kernels.block.layers import pad_rank
from ..kernels.dispatch import transformed
from ..kernels.once import once
from .fuse import ChannelAffine, Pointwise
from .medmamba import MedMamba
from .network import SS2D, ConvBranch, DropPath, PatchEmbed, PatchMerging, SSConvSSM, Stage

# What the kernels stand for. A subclass or another layer, such as an adapter, may compute something else.
LAYERS = {
    *(PatchEmbed, PatchMerging, Stage, SSConvSSM, SS2D, ConvBranch, DropPath, ChannelAffine, Pointwise),
    *(nn.Conv2d, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.ReLU),
}
_preparing = threading.Lock()


class _Block(NamedTuple):
    """What the kernels take of one block, in their layout and types."""

    convs: tuple[nn.Conv2d, nn.Conv2d]
    pointwise: nn.Linear
    in_proj: Tensor
    depthwise: tuple[Tensor, Tensor]  # (9, C), (C,)
    x_proj: Tensor  # (K * (R4 + 2N), C): R padded to a multiple of 4 with zeros, for aligned matrix products
    scan: tuple[Tensor, Tensor, Tensor, Tensor]  # dt_weight (K, C, R4), dt_bias, A, D
    out_norm: tuple[Tensor, Tensor, float]
    out_proj: Tensor
    split: tuple[Tensor, Tensor, Tensor, Tensor, float]  # the affine of the left half, the norm of the right


class _Prepared(NamedTuple):
    """All blocks by stage, and the parameters and buffers that they were made from, in the state `version`."""

    blocks: list[list[_Block]]
    sources: list[Tensor]
    version: int


class FusedMedMamba(MedMamba):
    """See the module. Made by `MedMamba.fuse`; of a subclass of MedMamba by `fused_class`."""

    _blocks: _Prepared | None = None
    _plain: bool | None = None  # whether all layers are those that the kernels stand for; None: not looked yet
    _changes = 0  # how often layers were moved, loaded or replaced

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The feature maps of the four stages: (B, dims[i], H / 2^(i+2), W / 2^(i+2)), channels_last in memory."""
        self._check_input(x)
        if x.dtype != (dtype := self.patch_embed.proj.weight.dtype):
            x = x.to(dtype)
        return self.cuda_pyramid(x) if self._runs_fused(x) else super().forward_pyramid(x)

    @torch.inference_mode()
    def graphed(self, example: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from images of the shape of `example` to their logits, as one CUDA graph: what is left of small
        batches is the time of the GPU, without that of Python.

        Each call returns a tensor of its own. Threads may share the function, on one CUDA stream or several: calls then
        run one after the other, because a graph has one place for its images. For calls that run side by side, make a
        graph for each thread. The function keeps the weights that it was captured with.

        Raises:
            ValueError: not on an NVIDIA GPU, or no image in `example`. The function: images of another shape.
            RuntimeError: from the function, the model has been moved or its weights loaded since.
        """
        images = example.to(self.patch_embed.proj.weight.device).clone()
        if not images.is_cuda:
            raise ValueError("CUDA graphs need a model on an NVIDIA GPU: call model.cuda() first")
        if not len(images):
            raise ValueError(f"a graph needs at least one image, got {tuple(images.shape)}")
        device, graph = images.device, torch.cuda.CUDAGraph()
        cuda_graphs.warm_up(device, lambda: self(images))
        changes = self._changes
        # What the graph reads must outlive the model, and what replaces it in the model.
        weights = self._blocks, [t.detach() for t in (*self.parameters(), *self.buffers())]
        logits = cuda_graphs.record(graph, device, lambda: self(images))
        lock, finished, last = threading.Lock(), torch.cuda.Event(), torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            finished.record()

        @torch.inference_mode()
        def run(batch: Tensor) -> Tensor:
            nonlocal last
            if batch.shape != images.shape:
                raise ValueError(f"this graph takes {tuple(images.shape)}, got {tuple(batch.shape)}")
            if self._changes != changes:
                raise RuntimeError("the model has changed since this graph was made: call model.graphed(...) again")
            with lock, torch.cuda.device(device):
                stream = torch.cuda.current_stream()
                if stream != last:  # the last call may still be reading or writing
                    stream.wait_event(finished)
                images.copy_(batch)
                graph.replay()
                answer = logits.clone()
                finished.record(stream)
                last = stream
            return answer

        run.weights = weights  # type: ignore[attr-defined]
        return run

    # --- what a fused model cannot do ---

    def train(self, mode: bool = True):
        """Only evaluation mode: training raises RuntimeError."""
        if mode:
            _refuse("cannot be trained: its batch norms are folded into the convolutions", "train")
        return super().train(False)

    def save_pretrained(self, *args, **kwargs) -> NoReturn:  # type: ignore[override]
        """Raises RuntimeError: nothing could load it."""
        _refuse("cannot be saved: its layers are not those that from_pretrained builds", "save")

    def push_to_hub(self, *args, **kwargs) -> NoReturn:  # type: ignore[override]
        """Raises RuntimeError: nothing could load it."""
        _refuse("cannot be pushed: its layers are not those that from_pretrained builds", "push")

    # --- what it is prepared from ---

    def _apply(self, fn, recurse=True):
        self._forget()  # moved, or of another type
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args, **kwargs):
        """As of any module; graphs made before refuse to run."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._forget()
        super().__setattr__(name, value)

    def _forget(self) -> None:
        self._blocks, self._plain, self._changes = None, None, self._changes + 1

    def __reduce__(self):
        return _unpickle, (self._base,), self.__dict__ | {"_blocks": None}

    _base: type[MedMamba] = MedMamba

    def _runs_fused(self, x: Tensor) -> bool:
        weight = self.patch_embed.proj.weight
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not (x.is_cuda and weight.device == x.device):
            return False
        if weight.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            return False
        if not len(x) or torch.jit.is_tracing() or transformed():
            return False
        if self._plain is None:
            parts = (self.patch_embed, self.stages, self.downsamples)
            own = super().forward_pyramid.__func__ is MedMamba.forward_pyramid  # type: ignore[attr-defined]
            self._plain = own and all(type(m) in LAYERS for part in parts for m in part.modules())
            self._share("_plain", self._plain)
        if not self._plain:
            return False
        stages: Any = self.stages
        ssm = stages[0].blocks[0].ssm
        fits = all(dim % 4 == 0 for dim in self.config.dims) and self.config.d_state <= 16
        return fits and resolve_backend(x.device, weight.dtype, ssm.scan_backend) == "cuda"

    def _prepared(self) -> list[list[_Block]]:
        """The blocks for the kernels. One thread makes them, others wait for it, and for the GPU to have made them."""
        plan = self._blocks
        if plan is not None and _version(plan.sources) == plan.version:
            return plan.blocks
        with _preparing:
            plan = self._blocks
            if plan is None or _version(plan.sources) != plan.version:
                stages: Any = self.stages
                sources = [*stages.parameters(), *stages.buffers()]
                version = _version(sources)
                plan = _Prepared([[_prepare(block) for block in stage.blocks] for stage in stages], sources, version)
                if sources[0].is_cuda:
                    if torch.cuda.is_current_stream_capturing():
                        return plan.blocks  # they are filled when the graph is replayed, so they are for it alone
                    torch.cuda.current_stream(sources[0].device).synchronize()  # others read them on other streams
                self._blocks = plan
                self._share("_blocks", plan)
            return plan.blocks

    def _share(self, name: str, value: Any) -> None:
        """Leaves with the original what an `eval_view` of it, with the same weights, has found out."""
        original = self.__dict__.get("_viewed", lambda: None)()
        if original is not None and original._changes == self._changes:  # not moved or loaded since
            original.__dict__[name] = value

    @torch.no_grad()
    def cuda_pyramid(self, x: Tensor) -> list[Tensor]:
        """`forward_pyramid` by the kernels of `kernels/fused.py`, for tensors where these run."""
        embed: Any = self.patch_embed
        x = embed.proj(x.to(embed.proj.weight.dtype).contiguous(memory_format=torch.channels_last))
        x = fused.norm(x.permute(0, 2, 3, 1).contiguous(), *_norm(embed.norm))  # (B, H, W, C)
        maps = []
        for i, blocks in enumerate(self._prepared()):
            if i:
                merging: Any = self.downsamples[i - 1]
                x = F.linear(fused.gather_norm(x, *_norm(merging.norm)), merging.reduction.weight)
            _, *halves = fused.mix_split(x, None, blocks[0].split)
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                left, right = halves
                assert left is not None and right is not None
                mixed = _conv_branch(left, block), _scan_branch(right, block)
                x, *halves = fused.mix_split(x, mixed, following.split if following else None)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


@once
def fused_class(base: type[MedMamba]) -> type[FusedMedMamba]:
    """Returns the class of a fused model of class `base`, which keeps what `base` adds, such as another head."""
    if issubclass(base, FusedMedMamba):
        return base
    if base is MedMamba:
        return FusedMedMamba
    return type(f"Fused{base.__name__}", (FusedMedMamba, base), {"_base": base, "__doc__": FusedMedMamba.__doc__})


def _unpickle(base: type[MedMamba]) -> FusedMedMamba:
    cls = fused_class(base)
    return cls.__new__(cls)


def _refuse(what: str, verb: str) -> NoReturn:
    raise RuntimeError(f"a fused model {what}; {verb} the model that fuse() was called on, which it left as it was")


def _version(tensors: list[Tensor]) -> int:
    """Rises when one of them is written to."""
    try:
        return sum([t._version for t in tensors])
    except RuntimeError:  # made in inference mode, where nothing is counted
        return sum(t._version for t in tensors if not t.is_inference())


def _conv_branch(x: Tensor, block: _Block) -> Tensor:
    """(B, H, W, C/2) to the same, before the last ReLU."""
    x = x.permute(0, 3, 1, 2)  # (B, C/2, H, W), channels_last
    for conv in block.convs:
        if x.is_cuda:
            x = torch.cudnn_convolution_relu(x, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1)
        else:
            x = F.relu(conv(x))
    return block.pointwise(x).permute(0, 2, 3, 1)


def _scan_branch(x: Tensor, block: _Block) -> Tensor:
    """(B, H, W, C/2) to the same."""
    x, gate = F.linear(x, block.in_proj).chunk(2, dim=-1)  # (B, H, W, C) each
    x = fused.depthwise_silu(x, *block.depthwise)
    proj = F.linear(x, block.x_proj).unflatten(-1, (block.scan[0].shape[0], -1))  # (B, H, W, K, R4 + 2N)
    return F.linear(fused.scan_gate(x, proj, *block.scan, gate, *block.out_norm), block.out_proj)


def _prepare(block: SSConvSSM) -> _Block:
    layers: Any = list(block.conv)
    affine, conv1, _, conv2, _, pointwise, _ = layers
    ssm: Any = block.ssm
    x_proj, dt_weight = pad_rank(ssm.x_proj, ssm.dt_weight.float())
    scale, shift = (getattr(affine, name).flatten().float().contiguous() for name in ("scale", "shift"))
    return _Block(
        convs=(conv1, conv2),
        pointwise=pointwise,
        in_proj=ssm.in_proj.weight,
        depthwise=(ssm.conv.weight.flatten(1).T.float().contiguous(), ssm.conv.bias.float()),
        x_proj=x_proj.flatten(0, 1).contiguous(),
        scan=(
            dt_weight,
            ssm.dt_bias.float(),
            -torch.exp(ssm.A_log.float()),
            ssm.D.float(),
        ),
        out_norm=_norm(ssm.out_norm),
        out_proj=ssm.out_proj.weight,
        split=(scale, shift, *_norm(block.norm)),
    )


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.float(), norm.bias.float(), norm.eps
