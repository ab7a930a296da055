"""Agreement with kept libraries on the same predictions."""

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state

from medmamba.decision import conformal, fit_sets

pytestmark = pytest.mark.slow


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose features are its probabilities."""

    def __init__(self) -> None:
        self.classes_ = np.arange(4)
        self.n_features_in_ = 4

    def fit(self, X, y):
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, X):
        return np.asarray(X)

    def predict(self, X):
        return np.asarray(X).argmax(axis=1)


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(900, 4)) * 1.5
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return p, (p.cumsum(axis=1) > rng.random((900, 1))).argmax(axis=1)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_by_the_probability_are_those_of_mapie(answers, coverage):
    mapie = pytest.importorskip("mapie.classification")
    p, labels = answers
    model = mapie.SplitConformalClassifier(Given(), confidence_level=coverage, conformity_score="lac", prefit=True)
    model.conformalize(p[:500], labels[:500])
    wanted = model.predict_set(p[500:])[1][:, :, 0].copy()
    wanted[np.arange(400), p[500:].argmax(axis=1)] = True  # ours are never empty
    ours = fit_sets(p[:500], labels[:500], list("abcd"), coverage=coverage, by_class=False)
    assert (ours.members(p[500:]) == wanted).all()


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_scores_and_threshold_of_adaptive_sets_are_those_of_mapie(answers, coverage, monkeypatch):
    mapie = pytest.importorskip("mapie.classification")
    p, labels = answers[0][:500], answers[1][:500]
    model = mapie.SplitConformalClassifier(
        Given(), confidence_level=coverage, conformity_score="aps", prefit=True, random_state=0
    )
    model.conformalize(p, labels)
    model.predict_set(p[:5])
    u = check_random_state(0).uniform(size=500)  # theirs, of which ours is the complement
    monkeypatch.setattr(conformal, "draws", lambda probabilities, seed: 1 - u)
    scores = conformal.nonconformity(p, "aps")[np.arange(500), labels]
    inner = model._mapie_classifier
    assert scores == pytest.approx(np.asarray(inner.conformity_scores_).ravel(), abs=1e-9)
    ours = fit_sets(p, labels, list("abcd"), coverage=coverage, score="aps", by_class=False)
    assert ours.thresholds[0] == pytest.approx(float(np.ravel(inner.quantiles_)[0]), abs=1e-9)
