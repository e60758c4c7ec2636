"""Context-oriented decomposition adapters (CorDA) for any model of linear layers: plain values, one direction.

select_linears -> collect -> plan (decompose, factors) -> attach -> export
"""

from corda_core.adapter import attach, change_factors, export, lora_layers
from corda_core.collect import attention_mask_of, collect
from corda_core.covariance import Covariance
from corda_core.decompose import Decomposition, Mode, Split, decompose, factors
from corda_core.drift import context_drift
from corda_core.modules import base_digest, select_linears, weight_digest, weight_matrix
from corda_core.plan import AdapterInit, AdapterPlan, plan

__all__ = [
    "AdapterInit",
    "AdapterPlan",
    "Covariance",
    "Decomposition",
    "Mode",
    "Split",
    "attach",
    "attention_mask_of",
    "base_digest",
    "change_factors",
    "collect",
    "context_drift",
    "decompose",
    "export",
    "factors",
    "lora_layers",
    "plan",
    "select_linears",
    "weight_digest",
    "weight_matrix",
]
