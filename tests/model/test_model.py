"""The model: the published function, shapes, configuration, and the ways it is run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import fill

import medmamba
from medmamba import ConfigError, MedMambaConfig, create_model
from medmamba.config import VARIANTS
from medmamba.integrations import upstream as convert
from medmamba.model import network

GOLDEN = Path(fill.__file__).parent


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("file", ["micro", "tiny"])
def test_golden(file, backend):
    """Same logits, and gradients for the input and every parameter, as the published code."""
    data = json.loads((GOLDEN / f"{file}.json").read_text())
    state = fill.fill(data["shapes"])
    model = medmamba.load_upstream(state)
    model.set_scan_backend(backend)
    published_name = {new: old for old, new in convert.map_keys(state).items()}
    for case in data["cases"]:
        image = fill.image(case["batch"], data["in_chans"], case["height"], case["width"], case["seed"])
        with_grad = "input_grad_norm" in case
        with torch.set_grad_enabled(with_grad):
            logits = model(image.requires_grad_(with_grad))
        torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=0, atol=2e-4)
        if not with_grad:
            continue
        model.zero_grad()
        (logits * torch.arange(1, logits.shape[1] + 1)).sum().backward()
        assert image.grad.norm().item() == pytest.approx(case["input_grad_norm"], rel=2e-4)
        assert image.grad.sum().item() == pytest.approx(case["input_grad_sum"], rel=2e-4, abs=2e-4)
        assert {published_name[n] for n, _ in model.named_parameters()} == set(case["param_grad_norm"])
        for name, parameter in model.named_parameters():
            expected = case["param_grad_norm"][published_name[name]]
            assert parameter.grad.norm().item() == pytest.approx(expected, rel=2e-4, abs=2e-4), name


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 14.457222),
        ("small", 18.625158),
        ("base", 39.864838),
        ("small-paper", 22.793094),
        ("base-paper", 47.126022),
    ],
)
def test_sizes(name, millions):
    with torch.device("meta"):
        model = create_model(name, num_classes=6)
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_nano_is_at_most_two_million():
    assert sum(p.numel() for p in create_model("nano", num_classes=11).parameters()) <= 2_000_000


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (100, 76), (35, 200)])
def test_any_size(tiny_model, size, capsys):
    image = torch.randn(2, 3, *size)
    maps = tiny_model.forward_pyramid(image)
    h, w = size[0] // 4, size[1] // 4
    for i, dim in enumerate(tiny_model.config.dims):
        assert maps[i].shape == (2, dim, h >> i, w >> i)
    torch.testing.assert_close(tiny_model.forward_features(image), maps[-1])
    torch.testing.assert_close(tiny_model.forward_head(maps[-1]), tiny_model(image))
    assert tiny_model.forward_head(maps[-1], pre_logits=True).shape == (2, tiny_model.config.dims[-1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("in_chans", [1, 3, 7])
def test_any_channels(in_chans):
    model = create_model("test", num_classes=2, in_chans=in_chans)
    assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 2)


def test_wrong_inputs_are_explained(tiny_model):
    with pytest.raises(ValueError, match="at least 32x32, got 31x64"):
        tiny_model(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 64, 64\)"):
        tiny_model(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 64, 64\)"):
        tiny_model(torch.zeros(1, 1, 64, 64))


def test_reset_classifier(tiny_model):
    tiny_model.config.calibration = {"temperature": 2.0}
    features = tiny_model.forward_features(torch.randn(1, 3, 32, 32))
    tiny_model.reset_classifier(5, {i: f"c{i}" for i in range(5)})
    assert tiny_model.forward_head(features).shape == (1, 5)
    assert tiny_model.config.labels == ["c0", "c1", "c2", "c3", "c4"]
    assert tiny_model.config.calibration == {}
    tiny_model.reset_classifier(0)
    assert tiny_model.forward_head(features).shape == (1, tiny_model.config.dims[-1])


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    models = [create_model("test", num_classes=2, drop_path_rate=0.5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].set_grad_checkpointing()
    image = torch.randn(4, 3, 32, 32)
    for model in models:
        torch.manual_seed(1)  # the same paths dropped
        model.train()(image).square().sum().backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    # A second forward in the backward pass must not count the batch twice in the running statistics.
    for (name, a), b in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_drop_path_drops_the_scan_branch_only():
    torch.manual_seed(0)
    model = create_model("test", num_classes=2, drop_path_rate=0.9).train()
    block = model.stages[3].blocks[0]  # rate 0.9
    x = torch.randn(64, 1, 1, 64)
    maps = {}
    block.conv.register_forward_hook(lambda m, i, o: maps.update(conv=o))
    block.ssm_map.register_forward_hook(lambda m, i, o: maps.update(ssm=o))
    conv, ssm = ((block(x) - x)[..., i::2].permute(0, 3, 1, 2) for i in (0, 1))  # each draws anew
    assert not (conv == 0).all(dim=(1, 2, 3)).any()
    dropped = (ssm == 0).all(dim=(1, 2, 3))
    assert 40 <= dropped.sum() < 64  # nine in ten of 64
    torch.testing.assert_close(ssm[~dropped], maps["ssm"][~dropped] / (1 - 0.9))
    block.eval()
    torch.testing.assert_close((block(x) - x)[..., 1::2].permute(0, 3, 1, 2), maps["ssm"])


def test_a_padded_step_size_code_changes_nothing(monkeypatch):
    """As it is on GPUs; the ranks of this variant are 1, 1, 2 and 4."""
    model = create_model("test", num_classes=3, drop_path_rate=0.0).double().train()
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    found = []
    for padded in (False, True):
        monkeypatch.setattr(network, "_pads_rank", lambda x, padded=padded: padded)
        ranks = []
        hook = lambda m, i, o, ranks=ranks: ranks.append(m.scan_inputs(i[0])[2].shape[2])  # noqa: E731
        handles = [block.ssm.register_forward_hook(hook) for stage in model.stages for block in stage.blocks]
        logits = model(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append((ranks, logits, *gradients))
        for handle in handles:
            handle.remove()
    assert found[0][0] != found[1][0] and set(found[1][0]) == {4}
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b)


def test_fused_copy_gives_the_same_logits(tiny_model):
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    image = torch.randn(2, 3, 64, 48)
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    expected = tiny_model(image)
    fused = tiny_model.fuse()
    torch.testing.assert_close(fused(image), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        tiny_model.train().fuse()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(tiny_model, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler on a CPU")
    image = torch.randn(2, 3, 32, 64)
    compiled = torch.compile(tiny_model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(image), tiny_model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_exports_with_dynamic_batch(tiny_model):
    image = torch.randn(2, 3, 64, 64)
    program = torch.export.export(tiny_model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    other = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(other), tiny_model(other), rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_scan_parameters_and_trains(tiny_model):
    model = tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    logits.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_half_precision_weights_run(tiny_model):
    image = torch.randn(2, 3, 64, 64)
    expected = tiny_model(image)
    actual = tiny_model.bfloat16()(image.bfloat16()).float()
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max() + 0.05


def test_modules_hold_no_bound_methods(tiny_model):
    """A bound method stored on a module would make every DataParallel replica run on the first device."""
    for module in tiny_model.modules():
        assert not [k for k, v in vars(module).items() if callable(v) and hasattr(v, "__self__")]


def test_no_weight_decay_names_exist(tiny_model):
    names = tiny_model.no_weight_decay()
    parameters = dict(tiny_model.named_parameters())
    assert names <= set(parameters)
    assert "stages.0.blocks.0.ssm.A_log" in names and "stages.0.blocks.0.ssm.D" in names
    assert "stages.0.blocks.0.ssm.in_proj.weight" not in names and "stages.0.blocks.0.ssm.x_proj" not in names


def test_import_has_no_side_effects():
    unwanted = {"torchvision", "timm", "captum", "gradio", "huggingface_hub"}
    code = f"import sys, medmamba; print(sorted({unwanted} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]" and result.stderr == ""


# --- configuration ---


def test_config_survives_json():
    config = MedMambaConfig(
        num_classes=2,
        id2label={0: "normal", 1: "pneumonia"},
        training={"dataset": "x"},
        calibration={"temperature": 1.5},
    )
    assert MedMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "not a MedMamba config"),
        ({"surprise": 1}, r"unknown fields \['surprise'\]"),
        ({"dims": [96, 200, 384, 768]}, "twice the channels"),
        ({"depths": [2, 2]}, "one entry of at least 1 per stage"),
        ({"num_classes": 3}, "id2label must name classes 0 to 2"),
        ({"task": "ranking"}, "task must be"),
        ({"preprocess": {"input_size": [16, 16]}}, "at least 32"),
        ({"preprocess": {"std": [1, 0, 1]}}, "positive"),
        ({"preprocess": {"crop_mode": "zoom"}}, "crop_mode"),
        ({"in_chans": 1}, "3 values for 1 channels"),
    ],
)
def test_contradicting_configs_are_refused(change, message):
    data = {**MedMambaConfig(num_classes=2).to_dict(), **change}
    with pytest.raises(ConfigError, match=message):
        MedMambaConfig.from_dict(data)


def test_incomplete_config_is_refused():
    data = MedMambaConfig(num_classes=2).to_dict()
    del data["dims"]
    with pytest.raises(ConfigError, match="no 'dims'"):
        MedMambaConfig.from_dict(data)


def test_unknown_variant_lists_the_known():
    with pytest.raises(ConfigError, match="there are: " + ", ".join(VARIANTS)):
        create_model("huge")
    with pytest.raises(ConfigError, match="unknown fields"):
        create_model("tiny", dropout=0.5)


def test_fused_bfloat16_copy_keeps_the_scan_in_float32(tiny_model):
    image = torch.randn(2, 3, 64, 64)
    fused = tiny_model.fuse(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in fused.named_parameters()}
    assert dtypes["stages.0.blocks.0.ssm.A_log"] == torch.float32
    assert dtypes["stages.0.blocks.0.ssm.in_proj.weight"] == torch.bfloat16
    expected, actual = tiny_model(image), fused(image.bfloat16()).float()
    assert 0 < (actual - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
    assert fused.predict(image[0].permute(1, 2, 0).sigmoid().numpy()).label in tiny_model.config.labels
