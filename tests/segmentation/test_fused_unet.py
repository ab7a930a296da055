"""The decoder of a fused segmentation model by its kernels: on a GPU, or in the emulator of the CUDA kernels."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch

from medmamba import MedMamba
from medmamba.config import variant_config
from medmamba.kernels.block import convolution, eligibility
from medmamba.segmentation import create_segmenter
from medmamba.segmentation.fused import FusedConv, FusedUnetDecoder

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from test_cuda_kernels import CUDA, DEVICE, emulate, gpu, runs


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if not CUDA:
        emulate(monkeypatch, processors=2)
        monkeypatch.setattr(eligibility, "_on_cuda_backend", lambda x, backend: True)
        monkeypatch.setattr(convolution, "takes_tensor", lambda device: True)


@pytest.fixture
def launched(monkeypatch):
    """The kernels of the decoder that ran, by the channels of their input."""
    found = []

    def conv3x3(x, skip, *args, **kwargs):
        found.append((x.shape[-1], 0 if skip is None else skip.shape[-1]))
        return kept(x, skip, *args, **kwargs)

    kept = convolution.conv3x3
    monkeypatch.setattr(convolution, "conv3x3", conv3x3)
    return found


def made(dims=(16, 32, 64, 128), channels=(32, 16, 16, 16, 16), **options):
    torch.manual_seed(0)
    start = MedMamba(variant_config("test", dims=dims))
    model = create_segmenter(
        start=start, classes=["a", "b"], size=32, decoder_options={"decoder_channels": channels, **options}
    ).eval()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_mean, -0.5, 0.5), torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
    return model.to(DEVICE)


# Compiling a dozen kernels for the emulator takes seconds.
ALL = [(128, 64), (32, 0), (32, 32), (16, 0), (16, 16), (16, 0), (16, 0), (16, 0), (16, 0), (16, 0), (16, 0)]


@pytest.mark.slow
@runs
@torch.inference_mode()
def test_every_convolution_runs_as_a_kernel_and_the_answer_is_the_same(launched):
    model = made()
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    expected = model(x)
    fused = model.fuse(torch.bfloat16)
    found = fused(x)
    assert launched == ALL and found.shape == (1, 2, 32, 32) and found.is_contiguous()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    launched.clear()
    torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-4, atol=1e-4)  # float32: layer by layer
    assert not launched


@pytest.mark.slow
@runs
@torch.inference_mode()
def test_channels_that_tensor_cores_do_not_take_run_as_layers(launched):
    model = made(dims=(8, 16, 32, 64))
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    found = model.fuse(torch.bfloat16)(x)
    assert (16, 8) not in launched and (32, 16) in launched  # the skip connection of the first stage has 8
    assert (found - model(x)).abs().max() < 0.05 * found.abs().max()


@pytest.mark.slow
@runs
def test_hooks_gradients_and_new_weights_are_respected(launched):
    fused = made().fuse(torch.bfloat16)
    features = [torch.randn(1, c, 32 // s, 32 // s, device=DEVICE).bfloat16() for c, s in ((3, 1), (0, 2), (16, 4))]
    features += [
        torch.randn(1, c, 32 // s, 32 // s, device=DEVICE).bfloat16() for c, s in ((32, 8), (64, 16), (128, 32))
    ]
    features = [f.contiguous(memory_format=torch.channels_last) for f in features]
    decoder = fused.net.decoder
    assert isinstance(decoder, FusedUnetDecoder) and isinstance(fused.net.segmentation_head, FusedConv)
    with torch.no_grad():
        kernels = decoder(features)
    assert len(launched) == 10
    plain = decoder(features)  # with gradients
    assert len(launched) == 10 and plain.requires_grad
    torch.testing.assert_close(kernels, plain.detach(), rtol=0.1, atol=0.05)
    with torch.no_grad():
        calls = []
        handle = decoder.blocks[0].conv1[0].register_forward_hook(lambda *args: calls.append(1))
        decoder(features)
        assert calls == [1] and len(launched) == 19
        handle.remove()
        decoder.blocks[4].conv2[0].weight.zero_()
        decoder.blocks[4].conv2[0].bias.fill_(3)
        assert decoder(features).eq(3).all()


@runs
@torch.no_grad()
def test_weights_that_were_replaced_count():
    fused = made().fuse(torch.bfloat16)
    conv, x = fused.net.decoder.blocks[4].conv2, torch.zeros(1, 32, 32, 16, device=DEVICE).bfloat16()
    assert conv.runs(x) and copy.deepcopy(conv).runs(x)
    fused.load_state_dict({name: 2 * t for name, t in fused.state_dict().items()}, assign=True)
    assert not conv.runs(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_were_loaded_count(mode, assign):
    model, other, x = made().cpu(), made().cpu(), torch.randn(1, 3, 32, 32)
    with mode():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        fused, expected = model.fuse(), other.fuse()
        assert (fused(x) - expected(x)).abs().max() > 0.1
        fused.load_state_dict(expected.state_dict(), assign=assign)
        torch.testing.assert_close(fused(x), expected(x))


@torch.no_grad()
def test_copies_arrange_weights_that_were_written_to():
    layers = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU())
    conv, x = FusedConv(layers.to(DEVICE).bfloat16()), torch.ones(1, 4, 4, 16, device=DEVICE).bfloat16()
    assert conv.runs(x)
    conv[0].weight += 1
    assert not conv.runs(x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), conv.to(torch.float16)):
        assert other.runs(x.to(other[0].weight.dtype))
        assert torch.equal(other.arranged, convolution.arranged(other[0].weight))


@torch.inference_mode()
def test_a_fused_copy_can_be_copied_and_keeps_the_names_of_its_weights():
    model = made().cpu()
    fused, x = model.fuse(), torch.randn(1, 3, 32, 32)
    names = {name for name in model.state_dict() if "encoder" not in name and ".1." not in name}  # no norms
    assert names <= set(fused.state_dict()) and not any("arranged" in name for name in fused.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x))


@pytest.mark.slow
@torch.no_grad()
def test_compilers_and_exporters_see_the_layers():
    fused, x = create_segmenter("test", ["a"], size=32).eval().fuse(), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    exported = torch.export.export(fused, (x,)).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(x), fused(x), rtol=1e-4, atol=1e-5)


def test_other_decoders_are_left_as_they_are():
    for decoder, options in (("fpn", {}), ("unet", {"decoder_attention_type": "scse"})):
        net = create_segmenter("test", ["a"], size=64, decoder=decoder, decoder_options=options).eval().fuse().net
        assert not any(isinstance(part, (FusedConv, FusedUnetDecoder)) for part in net.modules())


def test_a_graph_needs_a_fused_model_on_a_gpu():
    model = create_segmenter("test", ["a"], size=32).eval()
    with pytest.raises(RuntimeError, match=r"model.fuse\(torch.float16\).cuda"):
        model.graphed(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="an NVIDIA GPU"):
        model.fuse().graphed(torch.zeros(1, 3, 32, 32))


@gpu
@torch.inference_mode()
def test_a_graph_gives_the_same_bits(launched):
    torch.manual_seed(0)
    fused = create_segmenter("nano", ["polyp"], size=64).eval().fuse(torch.float16).cuda()
    images = torch.randn(2, 3, 64, 96)
    run = fused.graphed(torch.zeros_like(images))
    assert len(launched) == 4 * 9  # warming up and capturing; the two convolutions to 128 channels are the library's
    assert torch.equal(run(images.cuda()), fused(images.cuda()))
    fused.cpu()
    with pytest.raises(RuntimeError, match="has changed"):
        run(images.cuda())


@gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_the_released_size_on_a_gpu(dtype, batch):
    torch.manual_seed(0)
    model = create_segmenter("nano", ["polyp"], size=352).eval().cuda()
    x = torch.randn(batch, 3, 352, 352, device="cuda")
    expected, found = model(x), model.fuse(dtype)(x)
    exact = model.fuse()(x)
    assert (exact - expected).abs().max() < 0.01 * expected.abs().max()  # convolutions in TF32
    assert (found - expected).abs().max() < (0.01 if dtype == torch.float16 else 0.06) * expected.abs().max()
