"""The checks of explanations tell good maps from bad ones, and the scan field is the gradient of the scan."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from explain_cases import picture, squares

import medmamba
from medmamba.explain import Assessor, ExplainCancelled, Trust, assess, explain
from medmamba.explain.conditions import controlled
from medmamba.explain.location import location_note
from medmamba.explain.randomisation import SIMILAR, random_states
from medmamba.explain.regions import make_baseline
from medmamba.explain.removal import Curves, area, infidelity, removal_curves
from medmamba.explain.similarity import rank_correlation, similarities, ssim, top_overlap
from medmamba.explain.subject import Subject, frozen_view
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import preprocess


def edges(model, x, target):
    """What looks like an explanation and knows nothing of the model."""
    grey = x.mean(1, keepdim=True)
    return ((grey - grey.roll(1, 2)).abs() + (grey - grey.roll(1, 3)).abs())[0, 0]


class Linear(torch.nn.Module):
    """A 'model' whose logit is a weighted sum of pixels, so that the true map is known."""

    def __init__(self):
        super().__init__()
        self.config = medmamba.MedMambaConfig(num_classes=1, preprocess=dict(input_size=(32, 32)))
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, 1, 4)
        self.weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))

    def forward(self, x):
        return (x.mean(1) * self.weight).sum((1, 2))[:, None]


@pytest.fixture
def linear() -> tuple[Subject, torch.Tensor]:
    """A linear subject and its exact map against a grey (zero) baseline."""
    model = Linear()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return Subject(model, x, 0), x.mean(1)[0] * model.weight


def test_infidelity_is_zero_for_the_true_map_and_large_for_others(linear):
    subject, true = linear
    with controlled(torch.device("cpu"), 0):
        value, share = infidelity(subject, true, "grey")
        assert share < 1e-6
        assert value < 1e-4
        # The scale of a map is fitted, so that maps in other units can be compared.
        assert infidelity(subject, 100 * true, "grey")[1] < 1e-6
        assert infidelity(subject, torch.zeros_like(true), "grey")[1] == pytest.approx(1)
        noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
        assert infidelity(subject, noise, "grey")[1] > 0.3
        # A map that is wrong everywhere would fit perfectly at a scale of -1.
        assert infidelity(subject, -true, "grey")[1] == pytest.approx(1)


def test_removal_curves_of_the_true_map_beat_random_orders(linear):
    subject, true = linear
    curves = removal_curves(subject, true, "grey", random_orders=8)
    assert curves.deletion[0] - curves.deletion[-1] == pytest.approx(1 if curves.deletion[0] > 0 else -1)
    mean, sd = curves.random_deletion_auc
    assert curves.deletion_auc < mean - 4 * sd
    mean, sd = curves.random_insertion_auc
    assert curves.insertion_auc > mean + 4 * sd
    worst = removal_curves(subject, -true, "grey", known=curves)
    assert worst.deletion_auc > curves.random_deletion_auc[0] > curves.deletion_auc
    assert np.array_equal(worst.random_deletion, curves.random_deletion)


def test_a_map_without_preferences_is_a_random_order(linear):
    """Ties are broken at random: else a constant map would be judged by the order of the pixels."""
    subject, true = linear
    curves = removal_curves(subject, torch.ones_like(true), "grey", random_orders=20)
    mean, sd = curves.random_deletion_auc
    assert abs(curves.deletion_auc - mean) < 3 * sd
    other = removal_curves(subject, torch.ones_like(true), "grey", random_orders=2, seed=1)
    assert other.deletion_auc != curves.deletion_auc


def test_area():
    assert area(np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.5, 1.0])) == pytest.approx(0.75)


def test_randomisation_catches_a_map_that_ignores_the_weights(trained):
    fake = assess(trained, explain(trained, picture(), edges), ["randomisation"])
    assert fake.randomisation.similarity == pytest.approx(1)
    assert not fake.randomisation.passed
    assert "FAILED" in fake.table()
    real = assess(trained, explain(trained, picture(), "occlusion"), ["randomisation"])
    assert real.randomisation.passed
    assert real.randomisation.similarity < 0.6
    assert "passed" in real.table()


def upside_down(model, x, target):
    """Edges whose sign the weights decide."""
    return edges(model, x, target) * model.head.weight[target].sum().sign()


def sparse(model, x, target):
    """The strongest edges, on a background of invisible values that do depend on the weights."""
    strong = edges(model, x, target)
    noise = torch.Generator().manual_seed(int(1e6 * model.head.weight[0, 0].abs()))
    return torch.where(strong > strong.quantile(0.9), strong, 0.0) + 1e-4 * torch.randn(x.shape[2:], generator=noise)


def test_a_map_is_no_more_like_itself_than_wholly():
    generator = torch.Generator().manual_seed(0)
    for side in range(4, 40):
        heat = torch.rand(side, side, generator=generator).double()
        assert 0.999 < rank_correlation(heat, heat) <= 1 and -1 <= rank_correlation(heat, -heat) < -0.999
        assert top_overlap(heat, heat) <= 1


@pytest.mark.parametrize("method", [upside_down, sparse])
def test_randomisation_catches_disguises(trained, method):
    check = assess(trained, explain(trained, picture(), method), ["randomisation"]).randomisation
    assert not check.passed
    assert method is upside_down or check.steps[-1]["rank_correlation"] < 0.5  # ranks alone would not


@pytest.mark.parametrize(
    "method",
    [
        "gradcam",
        "saliency",
        pytest.param("integrated_gradients", marks=pytest.mark.slow),
        pytest.param("gradient_shap", marks=pytest.mark.slow),
    ],
)
def test_randomisation_passes_methods_that_use_the_weights(trained, method):
    images, passed = squares(6, 3)[0], 0
    for image in images:
        few = {"n_steps": 10, "max_steps": 10} if method == "integrated_gradients" else {}
        options = {"layer": "stage1"} if method == "gradcam" else {"samples": 10} if method == "gradient_shap" else few
        e = explain(trained, image.permute(1, 2, 0).numpy(), method, **options)
        passed += assess(trained, e, ["randomisation"]).randomisation.passed
    assert passed >= 5


def test_similarity_is_the_share_of_the_map_that_the_image_alone_makes():
    """A map of two independent parts of equal variance, of which one changes with the weights; and the limit, where
    the first has 70% of the variance."""
    g = torch.Generator().manual_seed(0)
    image, one, other = torch.randn(3, 100, 100, generator=g)
    for share in (0.3, 0.5, 0.9):
        a, b = (share**0.5 * image + (1 - share) ** 0.5 * weights for weights in (one, other))
        measured = similarities(a, b, signed=True)
        assert measured["rank_correlation"] == pytest.approx(share, abs=0.03)
        assert (measured["rank_correlation"] < SIMILAR) == (share < 0.7)


def test_top_overlap():
    a = torch.arange(100.0)
    assert top_overlap(a, a) == pytest.approx(1)
    assert top_overlap(a, -a) == 0
    assert top_overlap(a, torch.cat((torch.zeros(95), torch.ones(5)))) == pytest.approx(0.5 + 5 * (5 / 95) / 10)
    assert top_overlap(torch.ones(100), torch.ones(100)) == pytest.approx(0.1)  # constant maps agree by chance alone
    assert similarities(a.view(10, 10), -a.view(10, 10), signed=True)["top_overlap"] == pytest.approx(1)
    assert similarities(a.view(10, 10), -a.view(10, 10), signed=False)["top_overlap"] == 0


def test_cascade_randomises_from_the_classifier_down_and_leaves_the_model(trained):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    trust = assess(trained, explain(trained, picture(), "saliency"), ["randomisation"], cascade=True)
    names = [step["randomised"] for step in trust.randomisation.steps]
    assert names == ["classifier", "stage4 and above", "stage3 and above", "stage2 and above", "all"]
    assert trust.randomisation.steps[0]["rank_correlation"] > trust.randomisation.steps[-1]["rank_correlation"]
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


@pytest.mark.parametrize("cascade", [False, True])
def test_random_weights_for_a_fused_model_are_fused_too(trained, cascade):
    """Its kernels take the blocks as `fuse` leaves them; parts of both kinds must not be put together."""
    fused = trained.fuse()
    kinds = [type(module) for module in fused.modules()]
    for _, models in random_states(fused, 2, cascade, seed=0):
        for model in models:
            assert [type(module) for module in model.modules()] == kinds
            assert not any(module.training for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("fuse", [False, True])
def test_a_gpu_gives_the_same_figures(trained, fuse):
    """But for rounding, which decides between regions of equal evidence."""
    there = medmamba.create_model("test", num_classes=2).eval()
    there.load_state_dict(trained.state_dict())
    there = there.cuda().fuse() if fuse else there.cuda()
    checks, settings = ["randomisation", "removal"], dict(steps=6, random_orders=2)
    maps = [("saliency", {}), ("gradcam", {}), ("gradcam", {"layer": "stage1"}), ("integrated_gradients", {})]
    for method, options in maps:
        expected = assess(trained, explain(trained, picture(), method, 1, **options), checks, **settings)
        found = assess(there, explain(there, picture(), method, 1, **options), checks, **settings)
        assert found.randomisation.similarity == pytest.approx(expected.randomisation.similarity, abs=0.05)
        assert found.curves.deletion_auc == pytest.approx(expected.curves.deletion_auc, abs=0.05)


def test_assess_reports_everything_and_repeats_itself(trained):
    e = explain(trained, picture(), "smoothgrad", samples=4)
    seen = []
    torch.manual_seed(3)
    state = torch.get_rng_state()
    trust = assess(trained, e, perturbations=8, repeats=2, random_orders=2, steps=5, progress=seen.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == sorted(seen) and seen[-1] == 1
    assert max(np.diff(seen)) < 0.3
    record = json.loads(json.dumps(trust.to_dict(), allow_nan=False))
    assert record["method"] == "smoothgrad"
    assert set(record) >= {"infidelity", "unexplained", "sensitivity", "deletion_auc", "insertion_auc", "randomisation"}
    assert len(trust.rows()) == 6
    again = assess(trained, e, perturbations=8, repeats=2, random_orders=2, steps=5, batch_size=3)
    assert again.unexplained == pytest.approx(trust.unexplained, rel=1e-3)
    # The noise of the method is the same in each run, so what is measured is the perturbation of the image.
    assert again.sensitivity == pytest.approx(trust.sensitivity, rel=1e-3)
    assert trust.sensitivity > assess(trained, e, ["sensitivity"], radius=1e-6, repeats=2).sensitivity


def same_figures(a, b) -> bool:
    """Equal but for rounding: the same images in batches of another size."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_figures(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_figures, a, b))
    return a == (pytest.approx(b, rel=1e-4, abs=1e-5) if isinstance(a, float) else b)


@pytest.mark.slow
def test_an_assessor_gives_each_map_the_same_figures_for_fewer_evaluations(trained, monkeypatch):
    count = []
    forward = medmamba.MedMamba.forward
    monkeypatch.setattr(medmamba.MedMamba, "forward", lambda self, x: count.append(len(x)) or forward(self, x))
    settings = dict(perturbations=8, random_orders=3, steps=5, random_models=2)
    metrics = ["infidelity", "removal", "randomisation"]
    a, b = (explain(trained, load_image(picture()), m, 1) for m in ("saliency", "gradcam"))
    b = dataclasses.replace(b, image=a.image)
    other = explain(trained, load_image(picture(1)), "gradcam", 1)
    assessor = Assessor(trained, **settings)
    count.clear()
    shared, costs = [], []
    for e in (a, b, other):
        shared.append(assessor.assess(e, metrics).to_dict() | {"seconds": 0})
        costs.append(sum(count))
        count.clear()
    for e, got in zip((a, b, other), shared, strict=True):
        assert same_figures(assess(trained, e, metrics, **settings).to_dict() | {"seconds": 0}, got)
    # Two ends; four inner points in two directions; two random models. For the first map also the image itself, eight
    # squares with the image again, and three random orders.
    assert costs == [12 + 1 + 9 + 24, 12, 12 + 1 + 9 + 24]


def test_infidelity_and_sensitivity_by_their_formulas(trained):
    """Infidelity from the answers to the same squares, and sensitivity from maps of the same moved images."""
    e = explain(trained, picture(), "saliency", 1)
    view = frozen_view(trained)
    x = preprocess(load_image(picture()), view.config.preprocess)[None]
    start = make_baseline(x, "blur", view.config.preprocess)
    map_ = torch.from_numpy(e.attribution)
    with controlled(torch.device("cpu"), 0), torch.no_grad():
        predicted, change = [], []
        for _ in range(8):
            side = int(torch.randint(4, 17, ()))
            top, left = int(torch.randint(33 - side, ())), int(torch.randint(33 - side, ()))
            mask = torch.zeros(32, 32)
            mask[top : top + side, left : left + side] = 1
            predicted.append((mask * map_).sum())
            change.append((view(x) - view(torch.lerp(x, start, mask)))[0, 1])
    predicted, change = torch.stack(predicted), torch.stack(change)
    scale = (predicted * change).sum() / predicted.square().sum()
    expected = (change - scale * predicted).square().mean().item() if scale > 0 else change.square().mean().item()
    got = assess(trained, e, ["infidelity"], perturbations=8)
    assert got.infidelity == pytest.approx(expected, rel=1e-3)
    assert got.unexplained == pytest.approx(expected / change.square().mean().item(), rel=1e-3)
    found = assess(trained, e, ["sensitivity"], radius=0.05, repeats=3).sensitivity
    with controlled(torch.device("cpu"), 0):
        moves = [torch.empty(x.shape).uniform_(-0.05, 0.05) for _ in range(3)]
    gradients = []
    for image in (x, *(x + move for move in moves)):
        image = image.requires_grad_()
        gradients.append(torch.autograd.grad(view(image)[0, 1], image)[0].abs().amax(1))
    expected = max((g - gradients[0]).norm() / gradients[0].norm() for g in gradients[1:]).item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_assess_refuses_and_cancels(trained):
    e = explain(trained, picture(), "saliency")
    with pytest.raises(ValueError, match="unknown metric 'accuracy'; choose from infidelity"):
        assess(trained, e, ["accuracy"])
    with pytest.raises(ValueError, match="made with other weights"):
        assess(medmamba.create_model("test", num_classes=2), e)
    for message, settings in (("batch_size must be", {"batch_size": 0}), ("random_models", {"random_models": 0})):
        with pytest.raises(ValueError, match=message):
            assess(trained, e, **settings)
    with pytest.raises(ValueError, match="unknown baseline"):
        assess(trained, e, removal="white")
    with pytest.raises(ExplainCancelled):
        assess(trained, e, progress=lambda fraction: fraction < 0.5)
    assert assess(trained, e, []).rows() == []


def test_rank_correlation_with_ties():
    a = torch.tensor([1.0, 2, 2, 3])
    assert rank_correlation(a, torch.tensor([10.0, 20, 20, 90])) == pytest.approx(1)
    # By hand: ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4); 4.5 / sqrt(4.5 * 5).
    assert rank_correlation(a, torch.tensor([1.0, 2, 3, 4])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    # Two constant maps are not similar for being constant, nor are ties for being in the same place.
    assert rank_correlation(torch.ones(4), a) == 0
    stats = pytest.importorskip("scipy.stats")
    x, y = torch.randint(20, (2, 500), generator=torch.Generator().manual_seed(0)).double()
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_maps_with_the_same_background_are_not_similar():
    """Two sparse maps with peaks in different places, on backgrounds that are not quite zero."""
    g = torch.Generator().manual_seed(0)
    a, b = (1e-3 * torch.randn(64, 64, generator=g) for _ in range(2))
    a[10:14, 10:14] = 1
    b[40:44, 40:44] = 1
    measured = similarities(a, b, signed=True)
    assert measured["ssim"] > SIMILAR  # why it is not judged
    assert max(measured["rank_correlation"], measured["rank_correlation_magnitude"], measured["top_overlap"]) < 0.2


def test_ssim():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 40, generator=g), torch.randn(40, 40, generator=g)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 3 * a) == pytest.approx(1)
    assert abs(ssim(a, b)) < 0.1
    assert ssim(a, a + 0.3 * b) > ssim(a, a + b) > ssim(a, b)


def test_better_than_chance_is_yes_no_or_unclear():
    fractions = np.linspace(0, 1, 5)
    falls, rises = np.array([1, 0.2, 0.1, 0, 0]), np.array([0, 0.8, 0.9, 1, 1])
    random = np.array([[1, 0.7, 0.5, 0.3, 0], [1, 0.8, 0.5, 0.2, 0]])

    def trust(deletion, insertion):
        curves = Curves(fractions, deletion, insertion, random, random[:, ::-1])
        return Trust("m", curves=curves)

    assert trust(falls, rises).better_than_chance == "yes"
    assert trust(rises, falls).better_than_chance == "no"
    assert trust(falls, falls).better_than_chance == "unclear"
    assert Trust("m").better_than_chance is None
    assert trust(falls, rises).to_dict()["better_than_chance"] == "yes"


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (slice(0, 8), slice(0, 8), "top left corner"),
        (slice(0, 40), slice(0, 2), "border"),
        (slice(15, 25), slice(15, 25), ""),
        (slice(0, 40), slice(0, 40), ""),
    ],
)
def test_weight_in_a_corner_or_the_border_is_reported(rows, columns, expected):
    map_ = np.full((40, 40), 1e-4)
    map_[rows, columns] = -1
    note = location_note(map_)
    assert expected in note and bool(note) == bool(expected)
    assert location_note(np.zeros((40, 40))) == ""
