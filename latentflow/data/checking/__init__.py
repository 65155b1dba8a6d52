"""The check of a data set: every image opened once, duplicates found, reports, a suggested command."""

from __future__ import annotations

from .check import check_data, check_source, readable
from .page import contact_sheet, report_page
from .report import Report
from .suggest import Suggestion, suggest

__all__ = [
    "Report",
    "Suggestion",
    "check_data",
    "check_source",
    "contact_sheet",
    "readable",
    "report_page",
    "suggest",
]
