"""What is in a data set: every image opened once, duplicates found, reports, a suggested command."""

from __future__ import annotations

from .check import check_source, look_through, readable
from .page import contact_sheet, report_page
from .report import Report
from .suggest import Suggestion, suggest

__all__ = [
    "Report",
    "Suggestion",
    "check_source",
    "contact_sheet",
    "look_through",
    "readable",
    "report_page",
    "suggest",
]
