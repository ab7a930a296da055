"""Prediction, and out-of-distribution detection."""

from .ood import Unusual, UnusualError, fit_signatures, fit_unusual, load_unusual
from .ood_fit import learn_unusual, pooled_features
from .predict import Failure, Prediction, Refused, iter_predict, predict
from .signature import signatures
from .suggest import Suggestion, suggest_model

__all__ = [
    "Failure",
    "Prediction",
    "Refused",
    "Suggestion",
    "Unusual",
    "UnusualError",
    "fit_signatures",
    "fit_unusual",
    "iter_predict",
    "learn_unusual",
    "load_unusual",
    "pooled_features",
    "predict",
    "signatures",
    "suggest_model",
]
