"""Figures of a model: scores with bootstrap intervals, per class and overall.

>>> from medmamba.metrics import evaluate
>>> print(evaluate(labels, probabilities, classes, patients=patients).to_markdown())
"""

from .evaluate import EvaluationError, evaluate
from .result import PAPER_COLUMNS, TITLES, ClassResult, Estimate, Evaluation

__all__ = ["PAPER_COLUMNS", "TITLES", "ClassResult", "Estimate", "Evaluation", "EvaluationError", "evaluate"]
