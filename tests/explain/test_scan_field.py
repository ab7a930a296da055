"""The scan's own field of influence, and the command `medmamba explain`."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explain_cases import picture, squares

import medmamba
from medmamba import cli
from medmamba.explain import scan_field
from medmamba.explain.scan_field import influence
from medmamba.explain.subject import frozen_view
from medmamba.kernels.reference import from_directions, scan_tokens, to_directions

# --- the scan's own field -------------------------------------------------------------------------------------------


def scan_problem(H: int = 5, W: int = 7, C: int = 3, N: int = 4, R: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return dict(
        x=randn(1, H, W, C), proj=randn(1, H, W, 4, R + 2 * N), dt_weight=randn(4, C, R), dt_bias=randn(4, C) - 2,
        A=-randn(4, C, N).exp(),
    )  # fmt: skip


@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (4, 6)])
def test_influence_is_the_gradient_of_the_scan(pixel):
    """d y[k, pixel, c] / d x[k, every pixel, c] of each direction with dt, B and C held fixed, by autograd."""
    p = scan_problem()
    _, H, W, C = p["x"].shape
    R, N = p["dt_weight"].shape[2], p["A"].shape[2]
    maps = p["x"].unsqueeze(3).repeat(1, 1, 1, 4, 1).requires_grad_()  # (1, H, W, K, C): an input of its own for each
    code, B, C_ = to_directions(p["proj"]).split((R, N, N), dim=-1)
    dt = F.softplus(code @ p["dt_weight"].transpose(1, 2) + p["dt_bias"].unsqueeze(1))
    y, _ = scan_tokens(to_directions(maps), dt, p["A"], B, C_)
    # Summing over channels is enough: they do not mix.
    from_directions(y, H, W)[0, pixel[0], pixel[1]].sum().backward()
    expected = maps.grad[0].permute(2, 0, 1, 3)  # (K, H, W, C)
    got = influence(p["proj"][0], p["dt_weight"], p["dt_bias"], p["A"], pixel)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got[0].flatten(0, 1)[pixel[0] * W + pixel[1] + 1 :] == 0).all()  # nothing from the future of direction 0


@pytest.mark.parametrize("crop_mode", ["squash", "pad"])
def test_scan_field_of_an_image(trained, crop_mode, tmp_path):
    """The merged map against autograd through the operator, step sizes, B and C fixed; and the pixel in its place."""
    model = frozen_view(trained)
    model.config = model.config.replace(preprocess=medmamba.PreprocessConfig(input_size=(32, 48), crop_mode=crop_mode))
    image = np.random.default_rng(0).random((64, 96, 3), dtype=np.float32)
    field = scan_field(model, image, pixel=(20, 70), stage=1)
    assert field.pixel == (2, 8)  # of an 8x12 map: 20 / 64 * 8, 70 / 96 * 12
    assert field.directions.shape == (4, 8, 12)
    captured = {}
    ssm = model.stages[0].blocks[0].ssm
    ssm.register_forward_pre_hook(lambda module, args: captured.update(x=args[0]))
    model.predict(image)
    x, proj, _, A, _ = ssm.scan_inputs(captured["x"].clone())
    x = x.detach().requires_grad_()
    y = medmamba.selective_scan_2d(x, proj.detach(), ssm.dt_weight, ssm.dt_bias, A, torch.zeros_like(ssm.D), "torch")
    y[0, 2, 8].sum().backward()
    np.testing.assert_allclose(field.merged, x.grad[0].abs().mean(-1).numpy(), rtol=1e-4, atol=1e-7)
    with_skip = medmamba.selective_scan_2d(x, proj.detach(), ssm.dt_weight, ssm.dt_bias, A, ssm.D, "torch")
    x.grad = None
    with_skip[0, 2, 8].sum().backward()
    assert field.skip == pytest.approx(4, rel=0.1)  # D begins at 1 in each direction
    assert x.grad[0, 2, 8].abs().mean() == pytest.approx(field.merged[2, 8] + field.skip, rel=0.2)
    for suffix in (".png", ".npz", ".json"):
        assert field.save(tmp_path / f"f{suffix}").stat().st_size > 200
    assert field.merged_full.shape == (64, 96)


def test_reach_counts_tokens_in_reading_order(trained):
    field = scan_field(trained, picture(), pixel=(0, 0))
    assert field.reach["rows, forward"] is None  # the first token has nothing before it
    backward = field.directions[2].flatten()[1:]  # what the last token of "rows, backward" has read, nearest first
    n = field.reach["rows, backward"]
    assert backward[:n].sum() >= 0.9 * backward.sum() > backward[: n - 1].sum()


def test_scan_field_refuses(trained):
    for kwargs, message in (
        (dict(pixel=(32, 0)), "outside the image, 32x32"),
        (dict(pixel=(-1, 0)), "outside the image"),
        (dict(stage=5), "no stage 5"),
        (dict(block=2), "no block 2"),
    ):
        with pytest.raises(ValueError, match=message):
            scan_field(trained, picture(), **kwargs)
    model = frozen_view(trained)
    model.config = model.config.replace(preprocess=medmamba.PreprocessConfig(input_size=(32, 32), crop_mode="center"))
    with pytest.raises(ValueError, match="crops that part"):
        scan_field(model, np.zeros((32, 96), np.float32), pixel=(16, 5))
    assert scan_field(model, np.zeros((32, 96), np.float32), pixel=(16, 33)).pixel == (4, 0)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(trained, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(sys.modules["medmamba.cli.main"], "SUBCOMMANDS", ("explain",))
    trained.save_pretrained(tmp_path / "model")
    Image.fromarray((picture() * 255).astype(np.uint8)).save(tmp_path / "cell.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explain_command(*args: str) -> int:
    return cli.main(["explain", *args, "--model", "model", "--device", "cpu"])


def test_command_writes_a_map_next_to_the_numbers(on_disk, capsys):
    assert (
        explain_command("cell.png", "--target", "red", "--trust", "--method", "gradcam", "--layer", "stage2.scan") == 0
    )
    out = capsys.readouterr().out
    assert "cell.png: gradcam (stage2.scan) for red, logit" in out
    assert "insertion AUC" in out
    assert "wrote cell.explain.png" in out
    assert (on_disk / "cell.explain.png").stat().st_size > 1000


def test_command_options_and_files(on_disk, capsys):
    assert explain_command("cell.png", "--baseline", "0.5", "--option", "n_steps=6", "--out", "a.json", "a.npz") == 0
    record = json.loads((on_disk / "a.json").read_text())
    assert record["parameters"]["n_steps"] == 6
    assert record["parameters"]["baseline"] == 0.5
    assert (on_disk / "a.npz").is_file()


def test_command_compares_and_shows_scans(on_disk, capsys):
    assert explain_command("cell.png", "--compare", "saliency,gradcam:stage2.conv", "--out", "c.png", "c.json") == 0
    assert "gradcam (stage2.conv)" in capsys.readouterr().out
    assert len(json.loads((on_disk / "c.json").read_text())["explanations"]) == 2
    assert explain_command("cell.png", "--scan", "9,9", "--stage", "2", "--out", "s.json") == 0
    assert json.loads((on_disk / "s.json").read_text())["pixel"] == [1, 1]
    assert "tokens" in capsys.readouterr().out


def test_command_lists(on_disk, capsys):
    assert explain_command("--list") == 0
    out = capsys.readouterr().out
    assert "integrated_gradients" in out and 'baseline="mean"' in out and "stage4.scan" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.png"], "no such file"),
        ([], "name an image"),
        (["cell.png", "--target", "purple"], "no class is called 'purple'"),
        (["cell.png", "--method", "magic"], "unknown method"),
        (["cell.png", "--method", "saliency", "--layer", "stage1"], "saliency has no option 'layer'"),
        (["cell.png", "--out", "map.gif"], "ends in .png"),
        (["cell.png", "--out", "nowhere/map.png"], "no folder nowhere"),
        (["cell.png", "--out", "cell.png"], "overwrite the image"),
        (["cell.png", "--scan", "middle"], "expected ROW,COLUMN"),
        (["cell.png", "--option", "n_steps"], "expected NAME=VALUE"),
    ],
)
def test_command_errors_are_one_line(on_disk, capsys, args, message):
    assert explain_command(*args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in on_disk.iterdir()) == ["cell.png", "model"]


def test_squares_hold_their_colour():
    images, classes, corners = squares(4, 0)
    for image, label, (top, left) in zip(images, classes, corners, strict=True):
        assert image[0 if label else 2, top, left] == 1
