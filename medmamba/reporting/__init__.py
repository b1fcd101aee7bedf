"""Pages for people: what a folder of predictions holds, rebuilt from its records at any time."""

from medmamba.reporting.page import REPORT_FILE, ReportOutcome, write_page, write_report

__all__ = ["REPORT_FILE", "ReportOutcome", "write_page", "write_report"]
