"""From probabilities to decisions: operating points, sets with a guarantee, abstaining, patients. Needs no model.

All functions take arrays. `medmamba.evaluation.decide.decide_model` fits decisions of a model on validation images, and
`predict(..., decide="NAME")` applies them.
"""

from .benefit import DecisionCurve, decision_curve
from .conformal import ConformalSets, Coverage, coverage_of, fit_sets
from .intervals import Proportion, effective_size, predictive_values, proportion
from .operating import (
    Counts,
    Curve,
    OperatingPoint,
    Performance,
    choose_point,
    count,
    indices,
    perform,
    performance,
    positives,
    score,
    trace,
)
from .patients import METHODS, Grouped, choose_method, combine, group
from .record import Decisions, input_checksum
from .selective import (
    Abstention,
    RiskCoverage,
    Selected,
    choose_abstention,
    confidence_of,
    errors_of,
    risk_coverage,
    selected,
)
from .thresholds import DecisionError, Rule, choose_threshold

__all__ = [
    "METHODS",
    "Abstention",
    "ConformalSets",
    "Counts",
    "Coverage",
    "Curve",
    "DecisionCurve",
    "DecisionError",
    "Decisions",
    "Grouped",
    "OperatingPoint",
    "Performance",
    "Proportion",
    "RiskCoverage",
    "Rule",
    "Selected",
    "choose_abstention",
    "choose_method",
    "choose_point",
    "choose_threshold",
    "combine",
    "confidence_of",
    "count",
    "coverage_of",
    "decision_curve",
    "effective_size",
    "errors_of",
    "fit_sets",
    "group",
    "indices",
    "input_checksum",
    "perform",
    "performance",
    "positives",
    "predictive_values",
    "proportion",
    "risk_coverage",
    "score",
    "selected",
    "trace",
]
