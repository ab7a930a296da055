"""The routes of docs/segmentation.md and docs/detection.md into other libraries, run as they stand there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from detection_data import squares
from PIL import Image
from segmentation_data import disc

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)

DOCS = Path(__file__).resolve().parents[2] / "docs"
NANO = Path(__file__).resolve().parents[2] / "hub" / "models" / "nano-medical" / "model.safetensors"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NANO.is_file(), reason="needs medmamba/nano-medical, which comes with a clone"),
]


def snippet(page: str, word: str) -> str:
    """Returns the Python block of a page that holds a word."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return found


def run(code: str, **names):
    exec(compile(code, "documentation", "exec"), names)
    return names


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The images that the pages name."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(disc((64, 64), 3)[0]).save("skin.png")
    Image.fromarray(squares(0)[0]).save("smear.png")


def trainable(loss, net):
    loss.backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_smp_takes_the_encoder():
    net = run(snippet("segmentation.md", "import segmentation_models_pytorch"))["net"]
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_transformers_takes_the_backbone():
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("timm")
    net = run(snippet("segmentation.md", "UperNetConfig"))["net"].eval()
    answer = net(torch.rand(1, 3, 64, 64), labels=torch.zeros(1, 64, 64, dtype=torch.long))
    assert answer.logits.shape == (1, 2, 64, 64)
    answer.loss.backward()
    assert net.backbone._backbone.model.get_parameter("patch_embed.proj.weight").grad.abs().max() > 0


def test_monai_takes_logits_and_masks_and_agrees_on_dice_and_hd95(segmenter):
    pytest.importorskip("monai", reason="needs monai")
    from monai.metrics import compute_hausdorff_distance

    from medmamba.metrics.segmentation import score_mask

    images = torch.rand(3, 3, 64, 64)
    masks = torch.stack([torch.from_numpy(disc((64, 64), seed)[1]) for seed in range(3)])[:, None]
    found = run(snippet("segmentation.md", "DiceCELoss"), model=segmenter, images=images, masks=masks)
    assert trainable(found["loss"], segmenter)
    predicted = found["logits"].sigmoid() > 0.5
    distances = compute_hausdorff_distance(predicted, masks, percentile=95)
    for i in range(3):
        ours = score_mask(predicted[i, 0].numpy(), masks[i, 0].numpy())
        assert ours.dice == pytest.approx(found["dice"][i].item(), abs=1e-6)
        if predicted[i].any():
            assert ours.hd95 == pytest.approx(distances[i].item(), abs=1e-3)


def test_torchvision_takes_the_pyramid():
    pytest.importorskip("torchvision")
    net = run(snippet("detection.md", "RetinaNet"))["net"].train()
    target = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    losses = net([torch.rand(3, 96, 96)], [target])
    assert trainable(sum(losses.values()), net)


def test_a_mask_is_explained(files, segmenter):
    pytest.importorskip("captum")
    found = run(snippet("segmentation.md", "mask_score").replace('"lesion"', '"disc"'), model=segmenter)
    assert Path("why.png").stat().st_size > 1000 and 0 < found["reach"].area < 1
    import captum

    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert captum.attr.Saliency(found["score"]).attribute(x, target=0).shape == x.shape


def test_a_box_is_explained(files):
    pytest.importorskip("captum")
    from medmamba.detection import create_detector

    torch.manual_seed(0)
    model = create_detector("test", ("bright", "dark"), size=64, channels=64).eval()
    model.config = model.config.replace(score=0.0)
    run(snippet("detection.md", "box_score"), model=model)
    assert Path("why.png").stat().st_size > 1000
