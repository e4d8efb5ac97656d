"""Seeing the experts: how many tokens each one gets, of which kind, and by which pathways they travel."""

from .callback import ExpertLoadCallback
from .expert_load import ExpertLoad, record_expert_load
from .modality import ModalityShares, modality_shares
from .pathways import ExpertPathways, Pathway, record_pathways
from .plots import plot_expert_load, plot_modality, plot_pathways
from .report import expert_load_report, modality_report, pathways_report
from .summary import LoadSummary, summarize_load


__all__ = [
    "ExpertLoad",
    "ExpertLoadCallback",
    "ExpertPathways",
    "LoadSummary",
    "ModalityShares",
    "Pathway",
    "expert_load_report",
    "modality_report",
    "modality_shares",
    "pathways_report",
    "plot_expert_load",
    "plot_modality",
    "plot_pathways",
    "record_expert_load",
    "record_pathways",
    "summarize_load",
]
