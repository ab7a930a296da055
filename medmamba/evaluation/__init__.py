"""Evaluates a model on a labelled dataset: logits, metrics with intervals, result files and figures."""

from .._moved import names
from .classes import match_classes, propose_classes, rename_classes
from .evaluate_model import evaluate_model, read_as
from .logits import decode, predict_logits
from .pair import Pair, compare_models
from .results import RESULTS_NAME, Scored, evaluations, figures, score, write_results
from .review import Review, ReviewCancelled, review

__all__ = [
    "RESULTS_NAME",
    "Pair",
    "Review",
    "ReviewCancelled",
    "Scored",
    "compare_models",
    "decode",
    "evaluate_model",
    "evaluations",
    "figures",
    "match_classes",
    "predict_logits",
    "propose_classes",
    "read_as",
    "rename_classes",
    "review",
    "score",
    "write_results",
]

_METRICS = ("PAPER_COLUMNS", "TITLES", "ClassResult", "Estimate", "Evaluation", "EvaluationError", "evaluate")
__getattr__ = names(__name__, dict.fromkeys(_METRICS, "metrics"))
