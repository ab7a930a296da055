"""A fused model: what it refuses and keeps, and that threads share it. Its kernels are in test_inference_cuda.py."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import medmamba
from medmamba.model import fused as fused_model
from medmamba.model.fused import FusedMedMamba, fused_class


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


class Doubled(medmamba.MedMamba):
    """A subclass with a head of its own."""

    def forward_head(self, features, pre_logits=False):
        return 2 * super().forward_head(features, pre_logits)


class OtherMaps(medmamba.MedMamba):
    def forward_pyramid(self, x):
        return [m + 1 for m in super().forward_pyramid(x)]


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def of(cls):
    torch.manual_seed(0)
    return cls(medmamba.create_model("test", num_classes=3).config).eval()


def test_it_refuses_what_could_not_be_undone(tiny_model, tmp_path):
    fused = tiny_model.fuse()
    with pytest.raises(RuntimeError, match=r"cannot be saved.*save the model that fuse\(\) was called on"):
        fused.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="cannot be pushed"):
        fused.push_to_hub("me/model")
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fused.train()
    assert not any(module.training for module in fused.modules())
    assert fused.eval() is fused and fused.train(False) is fused
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_model.train()


@pytest.mark.parametrize("cls", [Doubled, OtherMaps])
def test_a_subclass_keeps_its_methods(cls, image):
    model = of(cls)
    fused = model.fuse()
    assert isinstance(fused, FusedMedMamba) and isinstance(fused, cls)
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.fuse()):
        torch.testing.assert_close(each(image), model(image), rtol=1e-4, atol=1e-5)
        assert type(each) is fused_class(cls) is fused_class(fused_class(cls))


def test_timm_features_are_those_of_the_model(image):
    from medmamba.integrations.timm_model import TimmMedMamba

    config = {k: getattr(of(medmamba.MedMamba).config, k) for k in ("dims", "depths", "d_state")}
    model = TimmMedMamba(num_classes=0, global_pool="", **config).eval()
    torch.testing.assert_close(model.fuse()(image), model(image), rtol=1e-4, atol=1e-5)
    fused = model.fuse()
    fused.reset_classifier(5, "avg")
    assert fused(image).shape == (2, 5)


def test_layers_that_it_cannot_fold_are_refused(tiny_model):
    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

        def forward(self, x):
            return self.layer(x) + 1

    model = copy.deepcopy(tiny_model)
    model.stages[0].blocks[0].conv[1] = Adapter(model.stages[0].blocks[0].conv[1])
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.conv.*Adapter.*merge_and_unload"):
        model.fuse()
    model = copy.deepcopy(tiny_model)
    model.stages[1].train()  # batch norms that depend on the batch, in a model that says it is in eval mode
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        model.fuse()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(tiny_model)).eval()
    assert not any("Norm2d" in type(m).__name__ or "Sync" in type(m).__name__ for m in converted.fuse().modules())


def test_kernels_stand_for_known_layers_only(tiny_model, monkeypatch):
    monkeypatch.setattr(fused_model, "resolve_backend", lambda *_: "native")

    def fits(model):
        with torch.inference_mode():
            return model._runs_fused(torch.zeros(1, 3, 32, 32))

    fused = tiny_model.fuse()
    assert fits(fused)

    class Other(nn.Linear):
        pass

    linear = fused.stages[0].blocks[0].ssm.in_proj
    fused.stages[0].blocks[0].ssm.in_proj = Other(linear.in_features, linear.out_features, bias=False)
    assert not fits(copy.deepcopy(fused).to(torch.float32))
    assert not fits(of(OtherMaps).fuse())
    assert fits(of(Doubled).fuse())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_its_kernels_compute_what_the_layers_do(tiny_model, dtype):
    model, images = copy.deepcopy(tiny_model), torch.randn(2, 3, 68, 36)
    with torch.no_grad():
        for module in model.modules():  # so that nothing is one or zero by chance
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    fused = model.fuse(dtype)
    with torch.inference_mode():
        assert fused._runs_fused(images.to(dtype or torch.float32))
        expected, found = model.forward_pyramid(images), fused.forward_pyramid(images)
    tolerance = {None: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f.float(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_scans_beyond_the_range_of_float16(tiny_model):
    """As some trained networks have; without their factor all is NaN."""
    model, images = copy.deepcopy(tiny_model), torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.ssm.D.fill_(3e4)
                block.ssm.conv.weight.mul_(20), block.ssm.conv.bias.fill_(5)
    fused = model.fuse(torch.float16)
    with torch.inference_mode():
        expected, found = model.forward_pyramid(images), fused.forward_pyramid(images)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f.float(), e, rtol=0.02, atol=0.02 * float(e.abs().max()))
    weight, D = fused._prepared().blocks[0][0].x_proj, fused._prepared().blocks[0][0].scan[3]
    assert weight.dtype == torch.float16 and D.max() == 3e4 / 64


def test_weights_that_a_module_around_it_loads_are_used(tiny_model, image):
    fused, other = tiny_model.fuse(), copy.deepcopy(tiny_model)
    around = nn.Sequential(fused)
    with torch.inference_mode():
        fused(image)
        changes = fused._changes
        other.stages[0].blocks[0].ssm.in_proj.weight.normal_()
        new = nn.Sequential(other.fuse())
        around.load_state_dict(new.state_dict(), assign=True)
        assert torch.equal(around(image), new(image)) and fused._changes > changes


def test_hooks_fire_on_a_cpu(tiny_model):
    fused, seen = tiny_model.fuse(), []
    fused.stages[1].blocks[0].ssm.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        fused(torch.zeros(1, 3, 32, 32))
    assert seen == [1]


def test_layers_run_where_something_watches_each_module_or_replaces_one(tiny_model):
    fused, seen = tiny_model.fuse(), []
    hook = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(type(layer)))
    try:
        with torch.inference_mode():
            fused(torch.zeros(1, 3, 32, 32))
    finally:
        hook.remove()
    assert nn.LayerNorm in seen
    fused.stages[0].blocks[0].forward = torch.zeros_like
    with torch.inference_mode():
        assert not fused.forward_pyramid(torch.randn(1, 3, 32, 32))[0].any()


def test_layers_run_on_tensors_without_memory_and_under_modes_that_count(tiny_model):
    """The kernels would read from address zero, and no mode would see them."""
    fused, images = tiny_model.fuse(), torch.zeros(1, 3, 32, 32)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode():
        assert fused._runs_fused(images)
        assert not fused._runs_fused(fake.from_tensor(images))  # also outside of its mode
        with FlopCounterMode(display=False) as counted:
            assert not fused._runs_fused(images)
            fused(images)
    with torch.no_grad(), fake:
        assert fused(fake.from_tensor(images)).shape == (1, fused.config.num_classes)
    with torch.inference_mode(), FlopCounterMode(display=False) as expected:
        tiny_model(images)
    assert counted.get_total_flops() == expected.get_total_flops() > 0


def test_what_the_kernels_read_follows_the_weights(tiny_model):
    fused, other = tiny_model.fuse(), of(medmamba.MedMamba)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05)
    other = other.fuse()

    def read(model):
        return [block.scan[2] for stage in model._prepared().blocks for block in stage]

    first = read(fused)
    assert all(a is b for a, b in zip(read(fused), first, strict=True)), "made once"
    assert not any(map(torch.equal, read(fused), read(other)))
    fused.load_state_dict(other.state_dict())
    assert all(map(torch.equal, read(fused), read(other)))
    with torch.no_grad():
        fused.stages[0].blocks[0].ssm.A_log.add_(1)
    assert not torch.equal(read(fused)[0], read(other)[0])
    fused.stages = fused.stages[:1]
    assert len(fused._prepared().blocks) == 1


def test_threads_prepare_it_once(tiny_model, monkeypatch):
    made, prepare = [], fused_model.prepare_block
    monkeypatch.setattr(fused_model, "prepare_block", lambda block, *args: made.append(block) or prepare(block, *args))
    fused, found = tiny_model.fuse(), []
    threads = [threading.Thread(target=lambda: found.append(fused._prepared())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == sum(fused.config.depths)
    assert all(each is found[0] for each in found) and len(found) == 8


# --- on a GPU -------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_threads_and_graphs(dtype):
    """Threads with streams of their own share a fused model and a graph, and get what one thread gets."""
    torch.manual_seed(0)
    model = medmamba.create_model("nano", num_classes=4).eval().cuda()
    nn.init.normal_(model.head.weight)
    fast = model.fuse(dtype)
    images = [torch.randn(1, 3, 64, 64, device="cuda") * (i + 1) for i in range(8)]
    graph = fast.graphed(images[0])
    with torch.inference_mode():
        expected = [fast(x) for x in images]
    torch.cuda.synchronize()
    wrong = []

    @torch.inference_mode()
    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(100):
                i = (number + turn) % 8
                for found in (fast(images[i]), graph(images[i])):
                    if not torch.allclose(found.float(), expected[i].float(), rtol=1e-2, atol=1e-2):
                        wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    kept = graph(images[1])
    graph(images[2])
    torch.testing.assert_close(kept.float(), expected[1].float(), rtol=1e-2, atol=1e-2)


@gpu
def test_a_graph_outlives_its_model_and_refuses_a_changed_one():
    torch.manual_seed(0)
    model = medmamba.create_model("test", num_classes=4).eval().cuda()
    image = torch.randn(1, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        expected = model.fuse()(image)
    graph = model.fuse().graphed(image)
    filled = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    torch.testing.assert_close(graph(image), expected)
    del filled
    fused = model.fuse()
    graph = fused.graphed(image)
    fused.load_state_dict(fused.state_dict())
    with pytest.raises(RuntimeError, match="has changed since this graph"):
        graph(image)
    with pytest.raises(ValueError, match="at least one image"):
        fused.graphed(image[:0])


@gpu
def test_an_empty_batch_on_a_gpu():
    model = medmamba.create_model("test", num_classes=4).eval().cuda()
    nothing = torch.empty(0, 3, 64, 64, device="cuda")
    for each in (model, model.fuse(), model.fuse(torch.bfloat16)):
        with torch.inference_mode():
            assert each(nothing).shape == (0, 4)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_on_another_gpu_than_the_current(dtype):
    torch.manual_seed(0)
    model = medmamba.create_model("nano", num_classes=4).eval()
    image = torch.randn(2, 3, 64, 64)
    results = []
    torch.cuda.set_device(0)
    for device in ("cuda:0", "cuda:1"):
        fused = model.to(device).fuse(dtype)
        graph = fused.graphed(image.to(device))
        with torch.inference_mode():
            results.append([model(image.to(device)), fused(image.to(device)), graph(image.to(device))])
        assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-2, atol=1e-2)
