"""HOW experts are computed: the dispatch plan, the op on it, and one file per backend."""

from .api import lora_experts
from .backend import Backend
from .case import Case
from .ffn_experts import explain_ffn_experts
from .plan import DispatchPlan
from .registry import BACKENDS, backend_report
from .selection import ENVIRONMENT_VARIABLE, explain, validate_name


__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "Case",
    "DispatchPlan",
    "backend_report",
    "explain",
    "explain_ffn_experts",
    "lora_experts",
    "validate_name",
]
