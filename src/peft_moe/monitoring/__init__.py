"""Seeing the experts: how many tokens each one gets, per adapter, router, domain and kind of token."""

from .callback import ExpertLoadCallback
from .expert_load import ExpertLoad, record_expert_load
from .plots import plot_expert_load
from .report import expert_load_report
from .summary import LoadSummary, summarize_load


__all__ = [
    "ExpertLoad",
    "ExpertLoadCallback",
    "LoadSummary",
    "expert_load_report",
    "plot_expert_load",
    "record_expert_load",
    "summarize_load",
]
