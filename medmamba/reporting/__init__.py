"""Pages for people: what a folder of predictions holds, rebuilt from its records at any time."""

from medmamba.reporting.page import ReportOutcome, write_report

__all__ = ["ReportOutcome", "write_report"]
