"""What is in a data set: every picture opened once, duplicates found, reports, a suggested command."""

from __future__ import annotations

from .report import Report
from .source import check_source, look_through, readable

__all__ = ["Report", "check_source", "look_through", "readable"]
