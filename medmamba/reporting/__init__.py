"""Reports on a model, as HTML and PDF, for reviewers and ethics boards.

>>> from medmamba.reporting import write_report
>>> write_report("runs/mine", "my_folder", "runs/mine/report", by=("age", "sex"))
"""

from .checklists import CHECKLISTS
from .report import write_drift, write_report

__all__ = ["CHECKLISTS", "write_drift", "write_report"]
