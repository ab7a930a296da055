"""Published checkpoints become model folders: names, class order, an independent check, refusals."""

import json
from pathlib import Path

import pytest
import torch
from golden import fill
from huggingface_hub import ModelCard
from PIL import Image

from hub import convert as tool
from hub.publish import PublishError, publish
from hub.reference import reference_logits
from hub.validate import validate
from medmamba import ConversionError, MedMamba, load_upstream
from medmamba.config import VARIANTS
from medmamba.data import registry
from medmamba.integrations.upstream import WEIGHT_MAP

KVASIR = registry.get("kvasir")
GOLDEN = Path(fill.__file__).parent


def checkpoint(classes=8, dims=(16, 32, 64, 128), depths=(1, 2, 1, 1), seed=0):
    """A state dict in the published layout, with every tensor random enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0, shift=0.0):
        return torch.randn(shape, generator=generator) * scale + shift

    def norm(name, dim):
        return {f"{name}.weight": random(dim, scale=0.1, shift=1), f"{name}.bias": random(dim, scale=0.1)}

    state = {
        "patch_embed.proj.weight": random(dims[0], 3, 4, 4, scale=0.2),
        "patch_embed.proj.bias": random(dims[0], scale=0.1),
        **norm("patch_embed.norm", dims[0]),
    }
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        half, inner, rank = dim // 2, dim, -(-dim // 2 // 16)
        for j in range(depth):
            block = {
                **norm("ln_1", half),
                "self_attention.x_proj_weight": random(4, rank + 32, inner, scale=inner**-0.5),
                "self_attention.dt_projs_weight": random(4, inner, rank, scale=rank**-0.5),
                "self_attention.dt_projs_bias": random(4, inner, scale=0.7, shift=-3),
                "self_attention.A_logs": torch.log(torch.arange(1.0, 17)) + random(4 * inner, 16, scale=0.1),
                "self_attention.Ds": random(4 * inner, scale=0.1, shift=1),
                "self_attention.in_proj.weight": random(4 * half, half, scale=half**-0.5),
                "self_attention.conv2d.weight": random(inner, 1, 3, 3, scale=0.3),
                "self_attention.conv2d.bias": random(inner, scale=0.1),
                **norm("self_attention.out_norm", inner),
                "self_attention.out_proj.weight": random(half, inner, scale=inner**-0.5),
            }
            for k, size in ((0, 0), (1, 3), (2, 0), (4, 3), (5, 0), (7, 1)):
                name = f"conv33conv33conv11.{k}"
                if size:
                    block[f"{name}.weight"] = random(half, half, size, size, scale=(half * size**2) ** -0.5)
                    block[f"{name}.bias"] = random(half, scale=0.1)
                else:
                    block |= norm(name, half) | {
                        f"{name}.running_mean": random(half, scale=0.1),
                        f"{name}.running_var": 1 + 0.2 * random(half).abs(),
                        f"{name}.num_batches_tracked": torch.tensor(7),
                    }
            state |= {f"layers.{i}.blocks.{j}.{key}": tensor for key, tensor in block.items()}
        if i < len(dims) - 1:
            state |= norm(f"layers.{i}.downsample.norm", 4 * dim)
            state[f"layers.{i}.downsample.reduction.weight"] = random(2 * dim, 4 * dim, scale=(4 * dim) ** -0.5)
    state |= {"head.weight": random(classes, dims[-1], scale=0.1), "head.bias": random(classes, scale=0.1)}
    return state


@pytest.fixture
def saved(tmp_path):
    def save(state, name="MedMamba_kvasir.pth"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


# --- the reference ---


def test_the_reference_computes_the_published_logits():
    data = json.loads((GOLDEN / "micro.json").read_text())
    state = fill.fill(data["shapes"])
    for case in data["cases"]:
        image = fill.image(case["batch"], data["in_chans"], case["height"], case["width"], case["seed"])
        expected = torch.tensor(case["logits"], dtype=torch.float64)
        torch.testing.assert_close(reference_logits(state, image), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("key", ["x_proj_weight", "A_logs", "Ds", "dt_projs_bias", "conv33conv33conv11.4.weight"])
def test_the_check_notices_a_tensor_that_went_to_the_wrong_place(key):
    state = checkpoint()
    name = next(k for k in state if key in k)
    model = load_upstream({**state, name: state[name].flip(0)})
    with pytest.raises(ConversionError, match="does not reproduce the checkpoint"):
        tool.check_logits(model, state)


# --- conversion ---


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "test"])
def test_every_variant_is_recognised_and_converted(variant):
    shape = VARIANTS[variant]
    state = checkpoint(dims=shape["dims"], depths=shape["depths"])
    model = load_upstream(state)
    assert model.config.architecture == variant
    difference, largest = tool.check_logits(model, state)
    assert difference < 1e-4 < largest


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"epoch": 3, "model": {f"module.{k}": v for k, v in s.items()}}]
)
def test_a_published_file_becomes_a_model_folder(saved, tmp_path, wrap, capsys):
    state = checkpoint()
    file = saved(wrap(state))
    assert tool.main([str(file), "--dataset", "kvasir", "--out", str(tmp_path / "kvasir")]) == 0
    out = capsys.readouterr().out
    assert "largest logit difference from the checkpoint" in out and "ask before you redistribute them" in out
    folder = tmp_path / "kvasir"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "golden.json", "model.safetensors"]
    model = MedMamba.from_pretrained(folder)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images).double(), reference_logits(state, images), rtol=0, atol=1e-3)
    assert model.config.labels == list(KVASIR.id2label.values())
    preprocess = model.config.preprocess  # of the published evaluation
    assert (preprocess.crop_mode, preprocess.input_size, preprocess.mean) == ("squash", (224, 224), (0.5, 0.5, 0.5))
    assert len(model.config.training["origin"]["sha256"]) == 64


def test_the_card_says_whose_the_weights_are(saved, tmp_path):
    folder = tool.convert(saved(checkpoint()), tmp_path / "kvasir", dataset="kvasir", repo="me/kvasir").folder
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "no-licence-stated")
    assert card.data.license_link == "https://github.com/YubiaoYue/MedMamba"
    assert card.data.eval_results is None  # the authors' figures are quoted, not claimed
    assert "owned by their authors" in card.text and "all rights are theirs" in card.text
    assert "You may not redistribute these weights without their permission" in card.text
    assert "MedMamba_kvasir.pth" in card.text and "Not for clinical use" in card.text


def test_publishing_them_needs_permission(saved, tmp_path):
    folder = tool.convert(saved(checkpoint()), tmp_path / "kvasir", dataset="kvasir").folder
    with pytest.raises(PublishError, match="stated no licence"):
        publish(folder, "medmamba/kvasir", dry_run=True)
    said = []
    publish(folder, "medmamba/kvasir", dry_run=True, private=True, say=said.append)
    assert any("keep the repository private" in line for line in said)
    permission = "Y. Yue by mail, 2026-01-05"
    publish(folder, "me/kvasir", dry_run=True, permission=permission, say=said.append)
    card = validate(folder, "me/kvasir", permission=permission).card  # nobody had edited it, so it is written again
    assert f"published with permission: {permission}" in card and "me/kvasir" in card
    (folder / "README.md").write_text(card)
    with pytest.raises(PublishError, match=r"license is by-permission-of-the-authors, and.*no-licence-stated"):
        publish(folder, "me/kvasir", dry_run=True, private=True, say=said.append)


# --- class names and their order ---


def test_folders_named_by_numbers_are_sorted_as_text(saved, tmp_path):
    entry = registry.get("organamnist")
    state = checkpoint(classes=11)
    with pytest.raises(ConversionError, match=r"order of the 11 outputs is ambiguous.*--order folders"):
        tool.convert(saved(state), tmp_path / "unclear", dataset="organamnist")
    assert not (tmp_path / "unclear").exists()
    as_is = tool.convert(saved(state), tmp_path / "numbers", dataset="organamnist", order="numbers")
    moved = tool.convert(saved(state), tmp_path / "folders", dataset="organamnist", order="folders")
    assert moved.order == (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9) and as_is.order is None
    assert moved.model.config.labels == as_is.model.config.labels == list(entry.id2label.values())
    images = torch.randn(1, 3, 32, 32)
    raw, fixed = as_is.model(images)[0], MedMamba.from_pretrained(moved.folder)(images)[0]
    torch.testing.assert_close(fixed[list(moved.order)], raw)
    assert "reordered to the official class order" in (moved.folder / "README.md").read_text()


def test_class_indices_of_numbers_tell_the_order(saved, tmp_path):
    names = sorted(map(str, range(11)))
    (tmp_path / "class_indices.json").write_text(json.dumps(dict(enumerate(names))))
    done = tool.convert(
        saved(checkpoint(classes=11)),
        tmp_path / "o",
        dataset="organamnist",
        class_indices=tmp_path / "class_indices.json",
    )
    assert done.order == (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize("inverted", [False, True])
def test_class_indices_of_names_are_put_into_the_official_order(saved, tmp_path, inverted):
    names = list(reversed(KVASIR.classes))
    indices = {name: i for i, name in enumerate(names)} if inverted else {str(i): n for i, n in enumerate(names)}
    (tmp_path / "c.json").write_text(json.dumps(indices))
    done = tool.convert(saved(checkpoint()), tmp_path / "k", dataset="kvasir", class_indices=tmp_path / "c.json")
    assert done.order == tuple(reversed(range(8))) and done.model.config.labels == list(KVASIR.id2label.values())


def test_a_dataset_of_ones_own_takes_its_names_from_class_indices(saved, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"0": "wart", "1": "mole"}))
    file = saved(checkpoint(classes=2))
    done = tool.convert(file, tmp_path / "s", class_indices=tmp_path / "c.json", dataset=None)
    assert done.model.config.labels == ["wart", "mole"] and done.order is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dataset="breastmnist"), "checkpoint has 8 classes, but BreastMNIST has 2"),
        (dict(dataset="lungs"), "no dataset 'lungs' in the registry.*--class-indices"),
        (dict(class_indices={"0": "a", "1": "b"}), r"names outputs \[0, 1\], but the checkpoint has 8 outputs"),
        (dict(class_indices=["a"]), "is not a class_indices.json"),
        (dict(dataset="kvasir", class_indices={str(i): f"x{i}" for i in range(8)}), "has x0, x1"),
        (dict(dataset="kvasir", order=[0, 0, 1, 2, 3, 4, 5, 6]), "each of 0 to 7 once"),
        (dict(dataset="kvasir", order="folders", class_indices={str(i): c for i, c in enumerate(KVASIR.classes)}),
         "omit --order"),
    ],
)  # fmt: skip
def test_classes_that_do_not_fit_are_named(saved, tmp_path, options, message):
    if "class_indices" in options:
        (tmp_path / "c.json").write_text(json.dumps(options["class_indices"]))
        options = {**options, "class_indices": tmp_path / "c.json"}
    with pytest.raises(ConversionError, match=message):
        tool.convert(saved(checkpoint()), tmp_path / "x", **options)


def grey_images(folder, classes):
    """One image of one grey level in each of the folders "0", "1", ..., and the levels."""
    levels = torch.linspace(0, 255, classes).int().tolist()
    for number, level in enumerate(levels):
        (folder / str(number)).mkdir(parents=True)
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / str(number) / "image.png")
    return levels


def test_labelled_images_tell_a_wrong_order(saved, tmp_path):
    state = checkpoint(classes=11, depths=(1, 1, 1, 1))
    weight, bias = _nearest_level_head(state, grey_images(tmp_path / "images", 11))
    order = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    state["head.weight"], state["head.bias"] = weight[order], bias[order]  # as trained on sorted folders
    options = dict(dataset="organamnist", images=tmp_path / "images")
    with pytest.raises(ConversionError, match="in the other: try --order folders"):
        tool.convert(saved(state), tmp_path / "a", order="numbers", **options)
    assert tool.convert(saved(state), tmp_path / "b", order="folders", **options).order == tuple(order)


def test_labelled_images_tell_that_no_order_fits(saved, tmp_path):
    state = checkpoint(classes=2, depths=(1, 1, 1, 1))
    state["head.weight"], state["head.bias"] = _nearest_level_head(state, grey_images(tmp_path / "images", 2))
    with pytest.raises(ConversionError, match="only 0%, no better than chance with 2 classes"):
        tool.convert(saved(state), tmp_path / "c", dataset="breastmnist", order=[1, 0], images=tmp_path / "images")


def _nearest_level_head(state, levels):
    """Least squares from pooled features to the level's one-hot, for flat grey images as `predict` sees them."""
    model = load_upstream(state)
    flat = torch.stack([torch.full((3, 224, 224), level / 255 * 2 - 1) for level in levels])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(flat), pre_logits=True).double()
    ones = torch.cat([features, torch.ones(len(levels), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(ones, 10 * torch.eye(len(levels), dtype=torch.float64), driver="gelsd").solution
    return solution[:-1].T.float().contiguous(), solution[-1].float()


# --- refusals ---


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"weights": [1, 2, 3]}, "it has no 'patch_embed.proj.weight'"),
        (lambda s: {k: v for k, v in s.items() if "x_proj_weight" not in k}, "missing"),
        (lambda s: s | {"layers.0.blocks.0.finalconv11.weight": torch.zeros(1)}, "before April 2024"),
        (lambda s: s | {"head.weight": torch.full_like(s["head.weight"], torch.nan)}, "has NaN or infinity in 1 of"),
    ],
)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(saved, tmp_path, spoil, message, capsys):
    file = saved(spoil(checkpoint()))
    assert tool.main([str(file), "--dataset", "kvasir", "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_model_is_not_overwritten(saved, tmp_path):
    tool.convert(saved(checkpoint()), tmp_path / "k", dataset="kvasir")
    with pytest.raises(ConversionError, match="already holds a model"):
        tool.convert(saved(checkpoint(seed=1)), tmp_path / "k", dataset="kvasir")


def test_the_reference_knows_every_tensor_that_conversion_maps():
    names = {key.partition("blocks.")[2].partition(".")[2] or key for key in checkpoint()}
    mapped = {key.partition("blocks.{}.")[2] or key for key in WEIGHT_MAP}
    assert {n.replace("layers.0", "layers.{}") for n in names if "layers.1" not in n and "layers.2" not in n} == mapped
