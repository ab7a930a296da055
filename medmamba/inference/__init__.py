"""Prediction, and out-of-distribution detection."""

from .ood import Unusual, UnusualError, fit_unusual, load_unusual
from .ood_fit import learn_unusual, pooled_features
from .predict import Failure, Prediction, iter_predict, predict

__all__ = [
    "Failure",
    "Prediction",
    "Unusual",
    "UnusualError",
    "fit_unusual",
    "iter_predict",
    "learn_unusual",
    "load_unusual",
    "pooled_features",
    "predict",
]
