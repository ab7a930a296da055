"""Reports on a model, as HTML and PDF, for reviewers and ethics boards.

>>> from medmamba.reporting import write_report
>>> write_report("runs/mine", "my_folder", "runs/mine/report", by=("age", "sex"))
"""

from .checklists import CHECKLISTS
from .record import Entry, RecordedModel, record_facts, record_page, write_record
from .report import report_html, write_drift, write_report
from .study import study_of

__all__ = [
    "CHECKLISTS",
    "Entry",
    "RecordedModel",
    "record_facts",
    "record_page",
    "report_html",
    "study_of",
    "write_drift",
    "write_record",
    "write_report",
]
