"""Temperature scaling and out-of-distribution scores."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from medmamba.metrics import evaluate
from medmamba.metrics.calibration import (
    Calibration,
    CalibrationError,
    fit_calibration,
    fit_temperature,
    ood_auroc,
    ood_score,
    to_probabilities,
)

TASKS = ("multiclass", "multilabel")


def sample(task: str, temperature: float, n: int = 20000, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels, and logits `temperature` times too large for them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k)) * 2
    p = to_probabilities(z, task)
    if task == "multilabel":
        return z * temperature, (rng.random((n, k)) < p).astype(int)
    return z * temperature, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


def loss(z: np.ndarray, labels: np.ndarray, task: str) -> float:
    names = [str(i) for i in range(z.shape[1])]
    return evaluate(labels, to_probabilities(z, task), names, task=task, resamples=0)["nll"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_true_temperature_is_found(task: str, temperature: float) -> None:
    z, labels = sample(task, temperature)
    calibration = fit_calibration(z, labels, task)
    assert calibration.method == "temperature" and calibration.n == 20000
    assert calibration.temperature == pytest.approx(temperature, rel=0.05)
    assert calibration.ece_after < 0.01
    if temperature != 1:
        assert calibration.ece_before > 0.05 > calibration.ece_after


@pytest.mark.parametrize("task", TASKS)
def test_the_temperature_is_the_minimum_of_the_log_loss(task: str) -> None:
    z, labels = sample(task, 2.0, n=300)
    found = fit_temperature(z, labels, task)
    best = minimize_scalar(
        lambda t: loss(z / t, labels, task), bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8}
    )
    assert found == pytest.approx(best.x, rel=1e-4)


def test_binary_by_two_logits() -> None:
    z, labels = sample("multiclass", 2.5, k=2)
    calibration = fit_calibration(z, labels)
    assert calibration.temperature == pytest.approx(2.5, rel=0.05)
    # Only the difference of the logits matters.
    assert fit_temperature(z + 100, labels) == pytest.approx(calibration.temperature, rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_ece_is_the_one_that_is_reported(task: str) -> None:
    z, labels = sample(task, 3.0, n=500)
    calibration = fit_calibration(z, labels, task)
    names = list("abcd")
    before = evaluate(labels, to_probabilities(z, task), names, task=task, resamples=0)
    after = evaluate(labels, calibration.probabilities(z), names, task=task, resamples=0)
    assert (calibration.ece_before, calibration.ece_after) == pytest.approx((before["ece"], after["ece"]))
    assert after["auroc"] == pytest.approx(before["auroc"], abs=0.02) and after["nll"] < before["nll"]
    if task == "multiclass":
        assert after["accuracy"] == before["accuracy"]


def test_validation_that_determines_no_temperature_leaves_one() -> None:
    perfect = np.eye(3)[[0, 1, 2]] * 5
    calibration = fit_calibration(perfect, [0, 1, 2])
    assert (calibration.method, calibration.temperature) == ("none", 1.0)
    assert calibration.ece_before == calibration.ece_after
    assert fit_temperature(np.zeros((5, 3)), [0, 1, 2, 0, 1]) is None  # a constant model
    assert fit_temperature(perfect, [1, 2, 0]) is None  # always wrong: no temperature is hot enough


def test_large_logits_do_not_overflow() -> None:
    z = np.array([[1e4, 0.0], [-1e4, 0.0]])
    for task in TASKS:
        p = to_probabilities(z, task)
        assert np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1
        assert np.isfinite(ood_score(z, "energy", task)).all()
    assert to_probabilities(z)[0, 0] == 1


def test_config_round_trip() -> None:
    z, labels = sample("multiclass", 2.0, n=200)
    calibration = fit_calibration(z, labels)
    data = json.loads(json.dumps(calibration.to_dict()))
    assert set(data) == {"method", "temperature", "n", "ece_before", "ece_after", "ood"}
    assert set(data["ood"]) == {"score", "threshold", "coverage"} and data["ood"]["coverage"] == 0.95
    assert Calibration.from_dict(data) == calibration
    without = fit_calibration(z, labels, ood=None)
    assert "ood" not in without.to_dict() and Calibration.from_dict(without.to_dict()) == without


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "platt"}, "unknown calibration method 'platt'"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"ood": {"score": "magic", "threshold": 0, "coverage": 0.95}}, "unknown out-of-distribution score 'magic'"),
        ({"ood": {"score": "energy"}}, "incomplete"),
    ],
)
def test_a_stored_calibration_that_makes_no_sense(change: dict, message: str) -> None:
    data = {"method": "temperature", "temperature": 1.5, "n": 10, "ece_before": 0.1, "ece_after": 0.05}
    assert Calibration.from_dict(data).temperature == 1.5
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_dict(data | change)
    del data["temperature"]
    with pytest.raises(CalibrationError, match="incomplete"):
        Calibration.from_dict(data)


@pytest.mark.parametrize(
    ("z", "labels", "message"),
    [
        (np.zeros((2, 3)), [0], "do not match"),
        (np.zeros((0, 3)), [], "do not match"),
        (np.full((1, 3), np.nan), [0], "not finite"),
        (np.zeros((1, 3)), [3], "labels must be 0 to 2"),
    ],
)
def test_input_that_does_not_fit(z: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit_calibration(z, labels)
    with pytest.raises(CalibrationError, match="task must be"):
        fit_calibration([[0.0]], [0], "regression")


# ---- unusual images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("score", ["energy", "max_prob"])
def test_unusual_images_are_flagged(task: str, score: str) -> None:
    z, labels = sample(task, 3.0, n=1000)
    strange = z[:300] * 0.05 - (3 if score == "energy" else 0)
    calibration = fit_calibration(z, labels, task, ood=score)
    assert calibration.ood is not None
    flagged = calibration.ood.is_unusual(z, task)
    assert 0.04 < flagged.mean() <= 0.05  # 95 % of validation passes
    area = ood_auroc(z, strange, score, task)
    assert area > 0.85 and calibration.ood.is_unusual(strange, task).mean() > 0.3
    assert ood_auroc(strange, z, score, task) == pytest.approx(1 - area)
    assert ood_auroc(z, z, score, task) == pytest.approx(0.5)


def test_scores_by_hand() -> None:
    z = np.array([[np.log(3.0), 0.0]])
    assert ood_score(z)[0] == pytest.approx(-np.log(4))
    assert ood_score(z, "max_prob")[0] == pytest.approx(0.25)
    assert ood_score(z, "energy", "multilabel")[0] == pytest.approx(-np.log(4) - np.log(2))
    assert ood_score(z, "max_prob", "multilabel")[0] == pytest.approx((0.25 + 0.5) / 2)
    with pytest.raises(CalibrationError, match="known: energy, max_prob"):
        ood_score(z, "entropy")


def test_few_validation_images_still_pass() -> None:
    z, labels = sample("multiclass", 1.0, n=7)
    calibration = fit_calibration(z, labels)
    assert calibration.ood is not None and not calibration.ood.is_unusual(z).any()
    with pytest.raises(CalibrationError, match="coverage"):
        fit_calibration(z, labels, coverage=1.5)
