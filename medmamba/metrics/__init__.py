"""Metrics of a classifier with bootstrap intervals, per class and overall; calibration and plots. Needs no model.

>>> from medmamba.metrics import evaluate
>>> print(evaluate(labels, probabilities, classes, patients=patients).to_markdown())
"""

from .calibration import Calibration, CalibrationError, OutOfDistribution, fit_calibration, ood_score, to_probabilities
from .evaluate import EvaluationError, evaluate
from .result import PAPER_COLUMNS, TITLES, ClassResult, Estimate, Evaluation

__all__ = [
    "PAPER_COLUMNS",
    "TITLES",
    "Calibration",
    "CalibrationError",
    "ClassResult",
    "Estimate",
    "Evaluation",
    "EvaluationError",
    "OutOfDistribution",
    "evaluate",
    "fit_calibration",
    "ood_score",
    "to_probabilities",
]
