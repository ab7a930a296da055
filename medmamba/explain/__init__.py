"""Pixel attributions for a class, and checks of whether a map can be trusted.

>>> from medmamba.explain import assess, compare, explain, scan_field
>>> explanation = explain(model, "cell.png", "integrated_gradients", target="neutrophil")
>>> explanation.save("cell.png")
>>> print(assess(model, explanation).table())

Built on captum: `pip install "medmamba[explain]"`.
"""

from .comparison import Comparison, compare
from .explanation import Explanation, explain
from .faithfulness import METRICS, Assessor, Trust, assess
from .feature_maps import layers
from .methods import Method, methods
from .randomisation import Randomisation
from .regions import BASELINES
from .removal import Curves
from .scan_field import ScanField, scan_field
from .subject import ExplainCancelled

__all__ = [
    "BASELINES",
    "METRICS",
    "Assessor",
    "Comparison",
    "Curves",
    "ExplainCancelled",
    "Explanation",
    "Method",
    "Randomisation",
    "ScanField",
    "Trust",
    "assess",
    "compare",
    "explain",
    "layers",
    "methods",
    "scan_field",
]
