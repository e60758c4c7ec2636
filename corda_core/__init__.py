"""Context-oriented decomposition adapters (CorDA) for any model of linear layers: plain values, one direction.

select_linears -> collect -> plan (decompose, factors) -> attach -> export
"""

from corda_core.adapter import attach, change_factors, export, lora_layers
from corda_core.collect import TokenWeights, attention_mask_of, collect, collect_in_passes
from corda_core.covariance import Covariance
from corda_core.decompose import Decomposition, Mode, Solver, Split, decompose, factors, spectrum
from corda_core.drift import context_drift
from corda_core.modules import base_digest, select_linears, weight_digest, weight_matrix
from corda_core.plan import AdapterInit, AdapterPlan, plan
from corda_core.store import data_digest, load_covariances, load_plan, save_covariances, save_plan

__all__ = [
    "AdapterInit",
    "AdapterPlan",
    "Covariance",
    "Decomposition",
    "Mode",
    "Solver",
    "Split",
    "TokenWeights",
    "attach",
    "attention_mask_of",
    "base_digest",
    "change_factors",
    "collect",
    "collect_in_passes",
    "context_drift",
    "data_digest",
    "decompose",
    "export",
    "factors",
    "load_covariances",
    "load_plan",
    "lora_layers",
    "plan",
    "save_covariances",
    "save_plan",
    "select_linears",
    "spectrum",
    "weight_digest",
    "weight_matrix",
]
