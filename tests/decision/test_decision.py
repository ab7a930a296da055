"""Operating points, conformal sets, abstaining and patients, on arrays with known truth."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import beta, norm
from sklearn.metrics import roc_curve

from medmamba import MedMambaConfig
from medmamba.decision import (
    Abstention,
    ConformalSets,
    DecisionError,
    Decisions,
    OperatingPoint,
    Proportion,
    Rule,
    choose_abstention,
    choose_method,
    choose_point,
    choose_threshold,
    combine,
    confidence_of,
    count,
    coverage_of,
    decision_curve,
    effective_size,
    errors_of,
    fit_sets,
    group,
    input_checksum,
    perform,
    performance,
    predictive_values,
    proportion,
    risk_coverage,
    score,
    selected,
)
from medmamba.decision.conformal import INFINITE, quantile

CLASSES = ["benign", "malignant", "normal"]


def sample(n, seed=0, k=3, strength=1.5):
    """Returns calibrated probabilities and labels drawn from them: the truth is known."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k)) * strength
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return p, (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)


# --- intervals ---


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (27, 42), (1, 300), (1990, 2000)])
def test_clopper_pearson_is_that_of_scipy(k, n):
    found = proportion(k, n, method="clopper-pearson")
    low = 0.0 if k == 0 else beta.ppf(0.025, k, n - k + 1)
    high = 1.0 if k == n else beta.ppf(0.975, k + 1, n - k)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_wilson_solves_its_equation():
    found, z = proportion(27, 42), norm.ppf(0.975)
    for limit in (found.low, found.high):
        assert abs(27 / 42 - limit) == pytest.approx(z * np.sqrt(limit * (1 - limit) / 42))
    assert proportion(0, 9).low == 0 and proportion(9, 9).high == 1


def test_intervals_of_predictive_values_keep_their_level():
    """10,000 draws of known sensitivity and specificity; the true PPV and NPV must lie inside in about 95 %."""
    rng = np.random.default_rng(0)
    se, sp, prevalence, n1, n0 = 0.9, 0.8, 0.1, 40, 120
    truth = prevalence * se / (prevalence * se + 0.9 * 0.2), 0.9 * sp / (0.9 * sp + prevalence * 0.1)
    tp, tn = rng.binomial(n1, se, 10_000), rng.binomial(n0, sp, 10_000)
    pairs, times = np.unique(np.stack([tp, tn], 1), axis=0, return_counts=True)
    inside = np.zeros(2)
    for (a, b), weight in zip(pairs, times, strict=True):
        found = predictive_values(proportion(int(a), n1), proportion(int(b), n0), prevalence)
        inside += weight * np.array([one.low <= value <= one.high for one, value in zip(found, truth, strict=True)])
    assert (inside / 10_000 > 0.93).all() and (inside / 10_000 < 0.99).all()


def test_predictive_values_at_the_edges():
    perfect, none = proportion(10, 10), proportion(0, 10)
    for found in (*predictive_values(perfect, perfect, 0.1), *predictive_values(perfect, none, 0.3)):
        assert np.isnan(found.value) or 0 <= found.low <= found.value <= found.high <= 1
    assert predictive_values(perfect, perfect, 0.0)[1].value == 1
    with pytest.raises(ValueError, match="prevalence"):
        predictive_values(perfect, perfect, 1.5)


def test_images_of_one_patient_are_worth_less():
    hits = np.repeat([1, 0, 1, 1, 0, 1, 0, 0, 1, 1], 5)
    patients = [f"p{i}" for i in range(10) for _ in range(5)]
    assert effective_size(hits, patients) == pytest.approx(9)  # every patient is one image: m - 1 of the variance
    assert effective_size(hits, None) == 50 and effective_size(hits, [None] * 50) == 50
    assert effective_size(np.ones(50), patients) == 10


# --- operating points ---


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.99])
def test_thresholds_without_margin_are_the_best_of_scikit_learn(target):
    p, labels = sample(500)
    s, truth = p[:, 1], labels == 1
    fpr, tpr, _ = roc_curve(truth, s, drop_intermediate=False)
    at = count(s, truth, choose_threshold(s, truth, Rule("sensitivity", target, margin=False)))
    assert 1 - at.specificity().value == pytest.approx(fpr[tpr >= target].min())
    at = count(s, truth, choose_threshold(s, truth, Rule("specificity", target, margin=False)))
    assert at.sensitivity().value == pytest.approx(tpr[1 - fpr >= target - 1e-12].max())
    at = count(s, truth, choose_threshold(s, truth, Rule("youden")))
    assert at.sensitivity().value + at.specificity().value == pytest.approx((tpr - fpr).max() + 1)


@pytest.mark.parametrize("kind", ["sensitivity", "specificity"])
@pytest.mark.parametrize("draws", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_target_is_met_on_average_on_new_images_with_the_margin_only(kind, draws):
    """Validation sets of 25 scores of a known distribution: the rate on new images can be computed."""
    rng, target = np.random.default_rng(0), 0.9
    means = {}
    for margin in (True, False):
        rule, rates = Rule(kind, target, margin), []
        for _ in range(draws):
            s = np.concatenate([rng.normal(1, 1, 25), rng.normal(0, 1, 25)])
            t = choose_threshold(s, np.arange(50) < 25, rule)
            rates.append(norm.sf(t, 1, 1) if kind == "sensitivity" else norm.cdf(t, 0, 1))
        means[margin] = np.mean(rates)
    assert target - 0.2 / draws**0.5 <= means[True] < target + 0.05  # standard error about 0.06 / sqrt(draws)
    assert means[False] < target


def test_rules_of_cost_prevalence_and_f1():
    p, labels = sample(4000, seed=1)
    s, truth = p[:, 1], labels == 1
    # Of calibrated probabilities the lowest cost is at 1 / (1 + ratio), by Bayes.
    assert choose_threshold(s, truth, Rule("cost", 9)) == pytest.approx(0.1, abs=0.05)
    t = choose_threshold(s, truth, Rule("prevalence"))
    assert (s >= t).sum() == pytest.approx(truth.sum(), abs=1)
    t = choose_threshold(s, truth, Rule("f1"))
    f1 = [2 * c.tp / (2 * c.tp + c.fp + c.fn) for c in (count(s, truth, x) for x in (t, *np.unique(s)))]
    assert f1[0] == pytest.approx(max(f1))


def test_a_group_of_classes_and_its_curve():
    p, labels = sample(300)
    point = choose_point(p, labels, CLASSES, ["Malignant", "benign"], Rule("sensitivity", 0.9))
    assert point.classes == ("malignant", "benign") and point.name == "malignant+benign-sensitivity-0.9"
    assert (point.is_positive(p, CLASSES) == (p[:, 0] + p[:, 1] >= point.threshold)).all()
    at = point.curve.counts(point.curve.nearest(point.threshold))
    assert at == point.counts == count(p[:, :2].sum(axis=1), labels < 2, point.threshold)
    for i in range(len(point.curve)):
        assert point.curve.counts(i) == count(p[:, :2].sum(axis=1), labels < 2, point.curve.thresholds[i])
    assert point.curve.fp[-1] == point.curve.negatives and point.curve.tp[0] == 0
    found = performance(p, labels, CLASSES, point, prevalence=0.05)
    assert found.ppv.value < performance(p, labels, CLASSES, point).ppv.value


def test_labels_that_do_not_exclude_each_other():
    p = np.array([[0.5, 0.5, 0.1], [0.1, 0.2, 0.9]])
    assert score(p, [0, 1], "multilabel") == pytest.approx([0.75, 0.28])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(rule=Rule("sensitivity", 0.99)), "too few"),
        (dict(wanted=["cyst"]), "no class 'cyst'"),
        (dict(wanted=[]), "none"),
        (dict(wanted=CLASSES), "not all"),
        (dict(labels=np.zeros(60, int), wanted=["normal"]), "negative"),
        (dict(probabilities=np.full((60, 3), np.nan)), "finite"),
    ],
)
def test_what_cannot_be_decided_is_refused(change, what):
    p, labels = sample(60)
    given = dict(probabilities=p, labels=labels, wanted=["malignant"], rule=Rule("youden")) | change
    with pytest.raises(DecisionError, match=what):
        choose_point(given["probabilities"], given["labels"], CLASSES, given["wanted"], given["rule"])


@pytest.mark.parametrize(
    ("kind", "value"),
    [("sensitivity", None), ("sensitivity", 1.0), ("cost", -1), ("cost", float("nan")), ("youden", 3), ("best", None)],
)
def test_rules_that_make_no_sense_are_refused(kind, value):
    with pytest.raises(DecisionError):
        Rule(kind, value)


# --- decision curves ---


def test_net_benefit_of_known_truth():
    """For calibrated probabilities the net benefit at t is the mean of (p - (1 - p) t / (1 - t)) over p >= t."""
    p, labels = sample(10_000, seed=2)
    s, truth = p[:, 1], labels == 1
    found = decision_curve(s, truth, [0.1, 0.3, 0.5])
    wanted = [np.where(s >= t, s - (1 - s) * t / (1 - t), 0).mean() for t in (0.1, 0.3, 0.5)]
    assert found.model == pytest.approx(wanted, abs=0.01)
    assert found.treat_all == pytest.approx([truth.mean() - (1 - truth.mean()) * t / (1 - t) for t in (0.1, 0.3, 0.5)])
    assert found.useful() and (found.model >= np.maximum(found.treat_all, 0) - 0.01).all()
    other = decision_curve(s, truth, [0.3], prevalence=0.05, resamples=200)
    assert other.low[0] < other.model[0] < other.high[0] and other.prevalence == 0.05


# --- conformal sets ---


def test_the_quantile_is_that_of_the_definition():
    scores = np.arange(1.0, 20)
    assert quantile(scores, 0.95) == 19 and quantile(scores, 0.9) == 18 and quantile(scores[:18], 0.95) == np.inf
    # Two images of each patient count half each.
    assert quantile(np.repeat(scores, 2), 0.9, np.repeat(np.arange(19), 2)) == 18


@pytest.mark.parametrize("score_", ["lac", "aps", "raps"])
def test_sets_keep_their_promise_for_10000_draws(score_):
    """100 validation sets of 60, each checked on 100 new images of a model that is wrong about its probabilities."""
    held = []
    by_class = np.zeros((3, 2))
    for seed in range(100):
        p, labels = sample(160, seed=seed)
        p = p**2.5 / (p**2.5).sum(axis=1, keepdims=True)  # overconfident
        sets = fit_sets(p[:60], labels[:60], CLASSES, coverage=0.9, score=score_, by_class=True)
        inside = sets.members(p[60:])[np.arange(100), labels[60:]]
        held.append(inside.mean())
        for i in range(3):
            by_class[i] += inside[labels[60:] == i].sum(), (labels[60:] == i).sum()
    assert 0.895 <= np.mean(held) < 0.96
    assert (by_class[:, 0] / by_class[:, 1] > 0.885).all()  # each class: 3,300 draws, standard error 0.005


def test_rare_classes_share_a_threshold_and_say_so():
    p, labels = sample(600, seed=3, k=4)
    keep = np.flatnonzero((labels < 2) | (np.arange(600) % 12 == 0))  # about a dozen images each of classes 2 and 3
    sets = fit_sets(p[keep], labels[keep], [*CLASSES, "cyst"], coverage=0.9)
    assert sets.conditional == (True, True, False, False) and sets.pooled
    assert sets.thresholds[2] == sets.thresholds[3] < INFINITE
    assert "normal and cyst, of which there were too few" in sets.statement([*CLASSES, "cyst"])
    few = fit_sets(p[keep][:40], labels[keep][:40], [*CLASSES, "cyst"], coverage=0.99)
    assert few.members(p[:5]).all() and set(few.thresholds) == {INFINITE}


def test_randomised_sets_are_the_same_alone_and_in_any_order():
    p, labels = sample(200)
    sets = fit_sets(p, labels, CLASSES, coverage=0.9, score="aps")
    together = sets.members(p)
    assert (sets.members(p[::-1])[::-1] == together).all()
    assert all((sets.members(row[None])[0] == found).all() for row, found in zip(p, together, strict=True))
    assert (dataclasses.replace(sets, seed=1).members(p) != together).any()
    assert together[np.arange(200), p.argmax(axis=1)].all()


def test_labels_of_a_multi_label_task_are_covered():
    rng = np.random.default_rng(0)
    p = rng.random((4000, 3))
    labels = (rng.random((4000, 3)) < p).astype(int)
    sets = fit_sets(p[:2000], labels[:2000], CLASSES, coverage=0.9, task="multilabel")
    found = coverage_of(sets, p[2000:], labels[2000:], CLASSES, task="multilabel")
    assert all(share.value == pytest.approx(0.9, abs=0.03) for _, _, share in found.by_class)


# --- abstaining ---


def test_the_area_under_the_risk_coverage_curve():
    errors, sure = np.array([0, 0, 1, 0, 1.0]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    found = risk_coverage(errors, sure)
    assert found.risk == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5]) and found.coverage[-1] == 1
    assert found.aurc == pytest.approx(found.risk.mean())
    assert found.excess == pytest.approx(found.aurc - np.mean([0, 0, 0, 1 / 4, 2 / 5]))
    rng = np.random.default_rng(0)
    orders = [risk_coverage(errors[i], -np.arange(5)).aurc for i in (rng.permutation(5) for _ in range(1000))]
    assert risk_coverage(errors, np.zeros(5)).aurc == pytest.approx(np.mean(orders), abs=0.03)  # ties: any order


def test_unusual_images_are_refused_first():
    p, labels = sample(200)
    unusual = np.arange(200) % 10 == 0
    sure = confidence_of(p, unusual)
    found = choose_abstention(errors_of(p, labels), sure, coverage=0.8)
    assert found.abstains(p, unusual)[unusual].all() and (~found.abstains(p, unusual)).mean() >= 0.8
    checked = selected(found, errors_of(p, labels), sure)
    assert checked.coverage.value == found.answered / 200 and checked.risk.value < checked.full_risk


@pytest.mark.parametrize("draws", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_promised_risk_is_kept(draws):
    """The risk of new answers may exceed the target in at most 5 % of the validation sets."""
    broken = 0
    p_new, new = sample(20_000, seed=999, strength=3)
    for seed in range(draws):
        p, labels = sample(400, seed=seed, strength=3)
        try:
            found = choose_abstention(errors_of(p, labels), confidence_of(p), risk=0.1)
        except DecisionError:
            continue  # too little was seen to answer at all
        answered = ~found.abstains(p_new)
        broken += errors_of(p_new, new)[answered].mean() > 0.1
    assert broken <= 0.05 * draws
    with pytest.raises(DecisionError, match="cannot vouch"):
        choose_abstention(np.ones(50), np.arange(50.0), risk=0.1)
    with pytest.raises(DecisionError, match="not both"):
        choose_abstention(np.ones(50), np.arange(50.0), risk=0.1, coverage=0.5)


# --- patients ---


def test_one_answer_for_several_images():
    p = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    geometric = np.sqrt(p[0] * p[1])
    assert combine(p) == pytest.approx(geometric / geometric.sum())
    assert combine(p, "max") == pytest.approx(np.array([0.8, 0.7, 0.1]) / 1.6)
    assert combine(p, "noisy_or") == pytest.approx(np.array([0.84, 0.73, 0.19]) / 1.76)
    assert combine(p, "noisy_or", "multilabel") == pytest.approx([0.84, 0.73, 0.19])
    for method in ("mean_logit", "max", "noisy_or"):
        assert (combine(p[:1], method) == p[0]).all()
    with pytest.raises(DecisionError, match="unknown way"):
        combine(p, "median")


def test_groups_keep_order_and_images_without_one_are_their_own():
    p, _ = sample(6)
    found = group(p, ["b", "a", "b", None, None, "a"], [0, 1, 2, 0, 1, 1])
    assert found.keys == ("b", "a", None, None) and found.sizes.tolist() == [2, 2, 1, 1]
    assert found.labels.tolist() == [0, 1, 0, 1] and found.mixed == 1
    assert found.probabilities[1] == pytest.approx(combine(p[[1, 5]]))


def test_the_way_to_combine_is_that_which_fits():
    """Lesions that show in one image of three: the mean dilutes them, the noisy or does not."""
    rng = np.random.default_rng(0)
    sick = rng.random(400) < 0.5
    shows = sick[:, None] & (np.arange(3) == rng.integers(0, 3, (400, 1)))
    p1 = np.where(shows, rng.uniform(0.8, 0.99, (400, 3)), rng.uniform(0.01, 0.1, (400, 3))).ravel()
    method, losses = choose_method(
        np.stack([p1], 1), np.repeat(np.arange(400), 3), np.repeat(sick, 3)[:, None].astype(int), "multilabel"
    )
    assert method in ("noisy_or", "max") and losses["mean_logit"] > 2 * losses[method]


# --- the record ---


def decisions(config):
    p, labels = sample(300)
    groups = [f"p{i // 2}" for i in range(300)]
    point = choose_point(p, labels, config.labels, ["malignant"], Rule("sensitivity", 0.9), groups=groups)
    sets = fit_sets(p, labels, config.labels, coverage=0.9)
    rest = choose_abstention(errors_of(p, labels), confidence_of(p), coverage=0.9)
    data = {"name": "made up", "split": "val", "images": 300, "patients": 150}
    return Decisions((point,), (sets,), (rest,), {"method": "max"}, data, input_checksum(config))


@pytest.fixture
def config():
    return MedMambaConfig(num_classes=3, id2label=dict(enumerate(CLASSES)))


def test_the_record_survives_json(config):
    made = decisions(config)
    text = json.dumps(config.replace(decisions=made.to_dict()).to_dict(), allow_nan=False)
    loaded = MedMambaConfig.from_dict(json.loads(text))
    assert Decisions.from_config(loaded) == dataclasses.replace(made, points=Decisions.from_config(loaded).points)
    point, before = Decisions.from_config(loaded).points[0], made.points[0]
    assert (point.threshold, point.rule, point.curve, point.counts) == (
        before.threshold,
        before.rule,
        before.curve,
        before.counts,
    )
    assert isinstance(made.find("SETS-0.9"), ConformalSets) and isinstance(made.find("answers-0.9"), Abstention)
    with pytest.raises(DecisionError, match=r"there are: malignant-sensitivity-0\.9"):
        made.find("other")


def test_old_configurations_have_none(config):
    old = {key: value for key, value in config.to_dict().items() if key != "decisions"}
    assert Decisions.from_config(MedMambaConfig.from_dict(old)) == Decisions()
    renamed = config.replace(decisions=decisions(config).to_dict()).replace(id2label={0: "a", 1: "b", 2: "c"})
    assert renamed.decisions == {}


def _point(record):
    return record["operating_points"][0]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda r: r.update(extra=1), "unknown fields"),
        (lambda r: r.pop("input"), "lacks input"),
        (lambda r: r.update(input="no"), "checksum"),
        (lambda r: r["data"].update(images=0), "at least 1"),
        (lambda r: _point(r).update(threshold=float("nan")), "finite"),
        (lambda r: _point(r).update(threshold=2), "from 0 to 1"),
        (lambda r: _point(r).update(classes=["cyst"]), "no class 'cyst'"),
        (lambda r: _point(r)["rule"].update(kind="best"), "must be one of"),
        (lambda r: _point(r)["rule"].update(value=1), "below 1"),
        (lambda r: _point(r)["validation"].update(tp=-1), "at least 0"),
        (lambda r: _point(r)["curve"]["thresholds"].reverse(), "must fall"),
        (lambda r: _point(r)["curve"]["tp"].pop(), "as many tp and fp"),
        (lambda r: _point(r)["curve"].update(positives=1), "add up"),
        (lambda r: _point(r)["curve"]["worth"].__setitem__(0, [1e9, 0]), "worth"),
        (lambda r: r["sets"][0]["thresholds"].pop(), "each of the 3 classes"),
        (lambda r: r["sets"][0].update(coverage=1.5), "coverage"),
        (lambda r: r["sets"][0].update(score="tps"), "score"),
        (lambda r: r["sets"][0].update(name="answers-0.9"), "two decisions of the name"),
        (lambda r: r["abstentions"][0].update(answered=10**6), "at most 300"),
        (lambda r: r["abstentions"][0].update(target={}), "coverage or risk"),
        (lambda r: r["patients"].update(method="median"), "must be one of"),
        (lambda r: r.update(sets={}), "must be a list"),
        (lambda r: r.update(sets=[3]), "must be an object"),
    ],
)
def test_damaged_records_are_refused_with_the_reason(config, damage, what):
    record = json.loads(json.dumps(decisions(config).to_dict()))
    damage(record)
    with pytest.raises(ValueError, match=what):
        config.replace(decisions=record)


def test_plain_data_is_strict_json(config):
    p, labels = sample(40)
    point = choose_point(p, labels, CLASSES, ["malignant"], Rule("youden"))
    assert isinstance(OperatingPoint.from_dict(point.to_dict()), OperatingPoint)
    nothing = perform(count(np.zeros(0), np.zeros(0, bool), 0.5))
    json.dumps([nothing.to_dict(), Proportion(float("nan"), 0, 0).to_dict()], allow_nan=False)
