"""Context-oriented decomposition adapters (CorDA) for any model of linear layers: plain values, one direction.

select_linears -> collect -> plan (decompose, factors) -> attach -> export
CorDA++ chooses between several collections and gives each layer its rank: select_covariances, allocate_ranks.
"""

from corda_core.adapter import Attachment, attach, attachment_of
from corda_core.allocate import Candidate, allocate_ranks, assess, compactness
from corda_core.candidates import Selection, resolved, select_covariances
from corda_core.checkpoint import load, save
from corda_core.collect import TokenWeights, attention_mask_of, collect, collect_in_passes
from corda_core.covariance import Covariance
from corda_core.decompose import Decomposition, Mode, Solver, Split, decompose, factors, spectrum
from corda_core.drift import context_drift, output_energies, weight_change
from corda_core.export import Exported, export, merge
from corda_core.lora import change_factors, lora_layers
from corda_core.modules import base_digest, select_linears, weight_digest, weight_matrix
from corda_core.plan import AdapterInit, AdapterPlan, plan
from corda_core.probe import Reach, probe
from corda_core.quantize import QuantizationError, quantization_errors, quantize_linears_
from corda_core.store import data_digest, load_covariances, load_plan, save_covariances, save_plan
from corda_core.whiten import Whitening, whitening

__all__ = [
    "AdapterInit",
    "AdapterPlan",
    "Attachment",
    "Candidate",
    "Covariance",
    "Decomposition",
    "Exported",
    "Mode",
    "QuantizationError",
    "Reach",
    "Selection",
    "Solver",
    "Split",
    "TokenWeights",
    "Whitening",
    "allocate_ranks",
    "assess",
    "attach",
    "attachment_of",
    "attention_mask_of",
    "base_digest",
    "change_factors",
    "collect",
    "collect_in_passes",
    "compactness",
    "context_drift",
    "data_digest",
    "decompose",
    "export",
    "factors",
    "load",
    "load_covariances",
    "load_plan",
    "lora_layers",
    "merge",
    "output_energies",
    "plan",
    "probe",
    "quantization_errors",
    "quantize_linears_",
    "resolved",
    "save",
    "save_covariances",
    "save_plan",
    "select_covariances",
    "select_linears",
    "spectrum",
    "weight_change",
    "weight_digest",
    "weight_matrix",
    "whitening",
]
