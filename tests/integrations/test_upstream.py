"""Published checkpoints: read, inferred, and refused with a reason."""

import pickle
from pathlib import Path

import pytest
import torch

import medmamba
from medmamba import ConversionError
from medmamba.integrations import upstream as convert

GOLDEN = Path(__file__).parents[1] / "golden"


def published(variant="test", num_classes=3, in_chans=3):
    """A state dict in the published layout, made by renaming one of ours backwards."""
    torch.manual_seed(0)
    model = medmamba.create_model(variant, num_classes=num_classes, in_chans=in_chans).eval()
    state = {}
    for key, tensor in model.state_dict().items():
        numbers = [p for p in key.split(".")[:4] if p.isdigit()]
        numbers = numbers[: 2 if ".blocks." in key else 1]
        pattern = key
        if numbers:
            pattern = key.replace(f"stages.{numbers[0]}.", "stages.{}.").replace(
                f"downsamples.{numbers[0]}.", "downsamples.{}."
            )
            if len(numbers) == 2:
                pattern = pattern.replace(f"blocks.{numbers[1]}.", "blocks.{}.")
        old = {v: k for k, v in convert.WEIGHT_MAP.items()}[pattern].format(*numbers)
        state[old] = tensor.flatten(0, 1) if key.endswith(("A_log", "ssm.D")) else tensor
    return model, state


def test_published_file():
    model = medmamba.load_upstream(GOLDEN / "micro.pth")
    assert (model.config.depths, model.config.dims) == ((1, 2, 1, 1), (16, 32, 64, 128))
    assert (model.config.num_classes, model.config.in_chans, model.config.architecture) == (5, 3, "custom")


@pytest.mark.parametrize(("variant", "classes", "chans"), [("test", 3, 3), ("nano", 11, 1)])
def test_everything_is_inferred(variant, classes, chans):
    model, state = published(variant, classes, chans)
    loaded = medmamba.load_upstream(state)
    assert loaded.config.architecture == variant
    assert (loaded.config.num_classes, loaded.config.in_chans) == (classes, chans)
    image = torch.randn(1, chans, 32, 32)
    torch.testing.assert_close(loaded(image), model(image))


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_checkpoints(tmp_path, wrap, prefix):
    model, state = published()
    torch.save(wrap({prefix + k: v for k, v in state.items()}), tmp_path / "w.pth")
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(medmamba.load_upstream(tmp_path / "w.pth")(image), model(image))


def test_the_layout_before_april_2024_is_refused():
    _, state = published()
    state["layers.0.blocks.0.finalconv11.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError, match="before April 2024"):
        medmamba.load_upstream(state)


def test_foreign_and_damaged_checkpoints_are_named():
    _, state = published()
    with pytest.raises(ConversionError, match=r"no 'patch_embed.proj.weight'; it has conv1.weight"):
        medmamba.load_upstream({"conv1.weight": torch.zeros(3)})
    with pytest.raises(ConversionError, match=r"unknown names, layers.0.blocks.0.attn.qkv"):
        medmamba.load_upstream({**state, "layers.0.blocks.0.attn.qkv": torch.zeros(3)})
    missing = dict(state)
    del missing["layers.1.blocks.0.ln_1.bias"]
    with pytest.raises(ConversionError, match=r"missing stages.1.blocks.0.norm.bias"):
        medmamba.load_upstream(missing)
    with pytest.raises(ConversionError, match="gaps"):
        medmamba.load_upstream({k: v for k, v in state.items() if not k.startswith("layers.1.")})
    wrong = {**state, "layers.1.blocks.0.ln_1.bias": torch.zeros(99)}
    with pytest.raises(ConversionError, match=r"is \(99,\), expected \(8,\)"):
        medmamba.load_upstream(wrong)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        medmamba.load_upstream(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConversionError):
        medmamba.load_upstream(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConversionError, match="holds a list"):
        medmamba.load_upstream(tmp_path / "list.pth")
    torch.save(published()[1], tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match="cut short"):
        medmamba.load_upstream(tmp_path / "cut.pth")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_code_in_a_checkpoint_never_runs(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Payload()}))
    with pytest.raises(ConversionError, match=r"could run arbitrary code|not a PyTorch checkpoint"):
        medmamba.load_upstream(tmp_path / "evil.pth")
    torch.save({"state_dict": Payload()}, tmp_path / "evil2.pth")
    with pytest.raises(ConversionError, match="could run arbitrary code"):
        medmamba.load_upstream(tmp_path / "evil2.pth")


def test_weights_of_this_package_are_told_where_they_belong(tiny_model):
    with pytest.raises(ConversionError, match=r"weights of this package.*load_state_dict.*from_pretrained"):
        medmamba.load_upstream(tiny_model.state_dict())


def test_checkpoints_of_other_networks_are_named_as_such():
    foreign = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512)}
    with pytest.raises(ConversionError, match=r"it has no .patch_embed.proj.weight.; it has conv1"):
        medmamba.load_upstream(foreign)
    with pytest.raises(ConversionError, match="no tensors at all"):
        medmamba.load_upstream({"epoch": 3, 7: "x"})
