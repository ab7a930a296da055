"""MedMamba through timm: by name, from a folder, from the Hub; as a classifier and as a backbone."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hub_server import connect, serve

import medmamba
from medmamba import MedMamba, create_model
from medmamba.integrations import timm as timm_models
from medmamba.integrations import timm_hook
from medmamba.pretrained.timm_config import FILE_FIELDS, timm_fields


@pytest.fixture
def saved(tmp_path):
    """A grown-up model: grey, four classes with names, its own input size and dims."""
    torch.manual_seed(0)
    model = create_model(
        "test",
        num_classes=4,
        in_chans=1,
        dims=(16, 32, 64, 128),
        id2label={0: "drusen", 1: "normal", 2: "cnv", 3: "dme"},
        preprocess=dict(input_size=(48, 64), crop_mode="pad", mean=(0.4,), std=(0.2,)),
    ).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.fixture
def images():
    return torch.randn(2, 1, 64, 96, generator=torch.Generator().manual_seed(1))


# --- without timm ---


def test_nothing_imports_timm_or_torchvision_by_being_imported():
    package = Path(medmamba.__file__).parent
    for module in package.rglob("*.py"):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("timm", "torchvision") for name in names), module


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package called timm, with as much of a registry as the hook needs; the real one, if any, is put aside."""
    models = tmp_path / "timm" / "models.py"
    models.parent.mkdir()
    (models.parent / "__init__.py").write_text("from .models import known")
    models.write_text(
        "known = {}\ndef is_model(name): return name in known\ndef register_model(f): known[f.__name__] = f\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "timm"}
    finders = list(sys.meta_path)
    yield models
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]
    sys.modules.update(aside)
    sys.meta_path[:] = finders


def test_the_hook_registers_when_timm_comes_later(stand_in):
    timm_hook.install()
    timm_hook.install()
    waiting = [finder for finder in sys.meta_path if type(finder).__name__ == "_AfterTimm"]
    assert len(waiting) == 1  # not one more each time
    timm = importlib.import_module("timm")
    assert {"medmamba", "medmamba_tiny", "medmamba_small_paper"} <= set(timm.known)
    assert waiting[0] not in sys.meta_path


def test_the_hook_survives_those_who_only_look_for_timm(stand_in):
    timm_hook.install()
    assert importlib.util.find_spec("timm") is not None  # as accelerate and transformers do
    timm = importlib.import_module("timm")
    assert "medmamba" in timm.known


def test_the_hook_registers_when_timm_is_there_already(stand_in):
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_AfterTimm"]
    timm = importlib.import_module("timm")
    assert not timm.known
    timm_hook.install()
    assert "medmamba" in timm.known


def test_a_timm_that_does_not_fit_still_imports(stand_in):
    stand_in.write_text("known = {}\n")
    timm_hook.install()
    with pytest.warns(UserWarning, match="could not register its models with timm: cannot import name"):
        assert importlib.import_module("timm").known == {}


def test_config_json_holds_what_timm_reads(saved):
    import json

    data = json.loads((saved[1] / "config.json").read_text())
    assert data["architecture"] == "medmamba" and data["num_classes"] == 4 and data["num_features"] == 128
    assert data["model_args"]["dims"] == [16, 32, 64, 128]
    cfg = data["pretrained_cfg"]
    assert cfg["input_size"] == [1, 48, 64] and cfg["mean"] == [0.4] and cfg["crop_mode"] == "border"
    assert cfg["label_names"] == ["drusen", "normal", "cnv", "dme"]
    assert cfg["first_conv"] == "patch_embed.proj" and cfg["classifier"] == "head"
    model = MedMamba.from_pretrained(saved[1])
    assert hasattr(model.patch_embed, "proj") and hasattr(model, "head")  # what those two name
    assert set(FILE_FIELDS) < set(data) - set(model.config.to_dict())


def test_one_mean_for_three_channels_is_spelled_out():
    config = create_model("test", num_classes=2, preprocess=dict(mean=(0.5,), std=(0.25,))).config
    assert timm_fields(config)["pretrained_cfg"]["mean"] == (0.5, 0.5, 0.5)


# --- with timm ---


def test_a_saved_folder_gives_the_same_logits(timm, saved, images):
    model, folder = saved
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))
    assert loaded.config.labels == model.config.labels
    assert loaded.config.preprocess == model.config.preprocess
    data = timm.data.resolve_model_data_config(loaded)
    assert data["input_size"] == [1, 48, 64] and data["mean"] == [0.4] and data["crop_mode"] == "border"


@pytest.mark.parametrize("name", ["hf-hub:org/eye", "hf-hub:org/eye@v2"])
def test_from_the_hub(timm, saved, images, name, monkeypatch, tmp_path):
    model, folder = saved
    with serve() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        for branch in ("main", "v2"):
            hub.commit("org/eye", branch, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}, branch)
        loaded = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))


def test_features_only_gives_a_pyramid_for_detection(timm, saved, images):
    model, folder = saved
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    assert backbone.feature_info.channels() == [16, 32, 64, 128]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    for got, expected in zip(backbone(images), model.forward_pyramid(images), strict=True):
        assert torch.equal(got, expected)
    some = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 2)).eval()
    assert some.feature_info.channels() == [32, 64]
    assert [tuple(m.shape) for m in some(images)] == [(2, 32, 8, 12), (2, 64, 4, 6)]
    names = {name for name, _ in some.named_parameters()}
    assert not any(name.startswith(("model.stages.3", "model.head")) for name in names)  # what is not needed is gone


def test_other_classes_and_channels_adapt_the_weights(timm, saved):
    model, folder = saved
    adapted = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, in_chans=3, drop_path_rate=0.3)
    assert adapted(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert torch.equal(adapted.stages[0].blocks[0].ssm.x_proj, model.stages[0].blocks[0].ssm.x_proj)
    assert adapted.config.in_chans == adapted.in_chans == 3 and adapted.config.drop_path_rate == 0.3
    assert adapted.config.labels[0] == "class_0"


def test_what_timm_users_call(timm):
    from timm.optim import create_optimizer_v2

    assert set(timm.list_models("medmamba*")) == {"medmamba", *(n for n in timm_models.default_cfgs)}
    model = timm.create_model("medmamba_nano", num_classes=5)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8).param_groups
    assert len({group["lr_scale"] for group in groups}) > 5  # deeper layers learn faster
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not any(id(p) in decayed for n, p in model.named_parameters() if n.endswith(("A_log", ".D", ".bias")))
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 256) and model.num_classes == 0
    with pytest.raises(ValueError, match="no pooling"):
        timm.create_model("medmamba_nano", global_pool="max")
    with pytest.raises(TypeError, match="has no hat"):
        timm.create_model("medmamba_nano", hat="red")


def test_a_model_fine_tuned_in_timm_saves_and_loads_here(timm, saved, images, tmp_path):
    tuned = timm.create_model(f"local-dir:{saved[1]}", pretrained=True, num_classes=2).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    assert torch.equal(medmamba.MedMamba.from_pretrained(tmp_path / "tuned")(images), tuned(images))


def test_a_fused_model_keeps_what_timm_asked_for_and_folders_load_as_timm_models(tmp_path):
    from medmamba.integrations.timm_model import TimmMedMamba

    shape = dict(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), preprocess={"input_size": (32, 32)})
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps = TimmMedMamba(num_classes=0, global_pool="", **shape).eval()
        assert maps.fuse()(x).shape == maps(x).shape == (2, 64, 2, 2)
        classifier = TimmMedMamba(num_classes=3, **shape).eval()
        fused = classifier.fuse()
        fused.reset_classifier(5, "avg")
        assert fused(x).shape == (2, 5)
        loaded = TimmMedMamba.from_pretrained(classifier.save_pretrained(tmp_path))
        assert isinstance(loaded, TimmMedMamba) and torch.allclose(loaded(x), classifier(x))
