"""HOW experts are computed: the dispatch plan, the op on it, and one file per backend."""

from .backends import BACKENDS, ENVIRONMENT_VARIABLE, Backend, Case, backend_report, explain, validate_name
from .ffn import explain_ffn_experts
from .op import lora_experts
from .plan import DispatchPlan


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
