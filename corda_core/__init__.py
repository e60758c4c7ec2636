"""Context-oriented decomposition adapters (CorDA) for any model of linear layers: plain values, one direction.

select_linears -> collect -> plan (decompose, factors) -> attach -> export
CorDA++ chooses between several collections and gives each layer its rank: select_covariances, allocate_ranks.
"""

from corda_core.allocate import Selection, allocate_ranks, select_covariances
from corda_core.attach import attach, attachment_of
from corda_core.collect import TokenWeights, collect
from corda_core.covariance import Covariance
from corda_core.decompose import Mode, Split, decompose, factors
from corda_core.export import Exported, export, merge
from corda_core.linears import select_linears
from corda_core.lora import change_factors, context_drift, lora_layers, weight_change
from corda_core.plan import AdapterInit, AdapterPlan, plan
from corda_core.store import data_digest, load, load_covariances, save, save_covariances

__all__ = [
    "AdapterInit",
    "AdapterPlan",
    "Covariance",
    "Exported",
    "Mode",
    "Selection",
    "Split",
    "TokenWeights",
    "allocate_ranks",
    "attach",
    "attachment_of",
    "change_factors",
    "collect",
    "context_drift",
    "data_digest",
    "decompose",
    "export",
    "factors",
    "load",
    "load_covariances",
    "lora_layers",
    "merge",
    "plan",
    "save",
    "save_covariances",
    "select_covariances",
    "select_linears",
    "weight_change",
]
