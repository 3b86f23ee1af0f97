"""Tables and figures of results, beside the published numbers."""

from .make import make_figures, make_report, overlap_table, summarize


__all__ = ["make_figures", "make_report", "overlap_table", "summarize"]
