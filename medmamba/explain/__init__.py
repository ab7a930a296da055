"""Pixel attributions for a class, and checks of whether a map can be trusted.

>>> from medmamba.explain import assess, compare, explain, scan_field
>>> explanation = explain(model, "cell.png", "integrated_gradients", target="neutrophil")
>>> explanation.save("cell.png")
>>> print(assess(model, explanation).table())

Built on captum: `pip install "medmamba[explain]"`.
"""

from .comparison import MAPS_SHARE, Comparison, compare, iter_compare
from .cost import Speed, estimate_seconds, measure_speed
from .explanation import Explanation, explain
from .faithfulness import METRICS, Assessor, Trust, assess
from .feature_maps import layers
from .methods import Method, methods
from .randomisation import Randomisation
from .reach import MaskReach, mask_reach
from .regions import BASELINES
from .reliability import Reliability, recommended, reliabilities
from .removal import Curves
from .scan_field import ScanField, scan_field
from .scores import BoxScore, MaskScore, box_score, mask_score
from .subject import ExplainCancelled

__all__ = [
    "BASELINES",
    "MAPS_SHARE",
    "METRICS",
    "Assessor",
    "BoxScore",
    "Comparison",
    "Curves",
    "ExplainCancelled",
    "Explanation",
    "MaskReach",
    "MaskScore",
    "Method",
    "Randomisation",
    "Reliability",
    "ScanField",
    "Speed",
    "Trust",
    "assess",
    "box_score",
    "compare",
    "estimate_seconds",
    "explain",
    "iter_compare",
    "layers",
    "mask_reach",
    "mask_score",
    "measure_speed",
    "methods",
    "recommended",
    "reliabilities",
    "scan_field",
]
