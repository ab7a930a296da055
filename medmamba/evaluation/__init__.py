"""A model on a data set: predictions, metrics, files."""

from .._moved import names
from .evaluate_model import evaluate_model, match_classes

__all__ = ["evaluate_model", "match_classes"]

_METRICS = ("PAPER_COLUMNS", "TITLES", "ClassResult", "Estimate", "Evaluation", "EvaluationError", "evaluate")
__getattr__ = names(__name__, dict.fromkeys(_METRICS, "metrics"))
