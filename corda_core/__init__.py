"""Context-oriented decomposition adapters (CorDA) for any model of linear layers: plain values, one direction.

select_linears -> collect -> plan (decompose, factors) -> attach -> export
CorDA++ chooses between several collections and gives each layer its rank before that: choose, allocate.
"""

from corda_core.allocate import Choice, allocate, choose
from corda_core.attach import attach, attachment_of
from corda_core.collect import TokenWeights, collect
from corda_core.covariance import Covariance
from corda_core.decompose import Mode, Split, decompose, factors
from corda_core.drift import context_drift, weight_change
from corda_core.export import Exported, export, merge
from corda_core.linears import select_linears
from corda_core.lora import change_factors, lora_layers
from corda_core.plan import AdapterInit, AdapterPlan, plan
from corda_core.store import data_digest, load, load_covariances, save, save_covariances

__all__ = [
    "AdapterInit",
    "AdapterPlan",
    "Choice",
    "Covariance",
    "Exported",
    "Mode",
    "Split",
    "TokenWeights",
    "allocate",
    "attach",
    "attachment_of",
    "change_factors",
    "choose",
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
    "select_linears",
    "weight_change",
]
