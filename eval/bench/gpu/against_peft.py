"""Preparing two of the 32 blocks of LLaVA-1.5-7B's shape: ours against PEFT's ``preprocess_corda``, the same samples, in turns.

PEFT's decomposition is timed on one layer of each shape and multiplied by how many there are: a singular value decomposition of
4,096 × 4,096 takes it tens of seconds. It gets its samples one by one, as it must.
"""

from collections import Counter
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution, collect_eigens_for_layer, target_modules

from corda_core import attach, collect, plan
from corda_eval.bench.gpu.measure import Peak, Record, seconds_once
from corda_eval.bench.gpu.shapes import RANK, language_linears, llava_7b, llava_batches

BLOCKS, SAMPLES, BATCH = 2, 256, 8


def run(record: Record) -> None:
    """Measure."""
    device, small = record.device, record.small
    model = llava_7b(device, small, BLOCKS)
    names, rank, samples = language_linears(model), 8 if small else RANK, 8 if small else SAMPLES
    batches = llava_batches(model, samples, BATCH)
    with torch.no_grad():
        model(**batches[0])
    ours = [_prepare_ours(record, model, batches, names, rank, "first round")]
    theirs_collected, config, memory = _collect_theirs(record, model, llava_batches(model, samples, 1), names, rank)
    ours.append(_prepare_ours(record, model, batches, names, rank, "second round"))
    theirs_decomposed = _decompose_theirs(record, model, config, memory)
    whole, collected, extra = min(ours)
    record.measured("PEFT / ours, whole", (theirs_collected + theirs_decomposed) / whole, "ratio", aim=">= 20")
    record.measured("PEFT / ours, collection", theirs_collected / collected, "ratio")
    record.measured("ours / PEFT, extra memory", extra / memory[0], "ratio", aim="<= 0.25")


def _prepare_ours(
    record: Record, model: Any, batches: list[dict[str, Any]], names: Any, rank: int, turn: str
) -> tuple[float, float, float]:
    """Return seconds of all and of the collection, and GB beyond the base; the model is left as it was."""
    peak = Peak(record.device)
    collected, covariances = seconds_once(lambda: collect(model, batches, names), record.device)
    rest, adapted = seconds_once(lambda: attach(model, plan(model, covariances, mode="kpm", rank=rank)), record.device)
    figures = collected + rest, collected, peak.extra
    record.measured(f"ours, whole, {turn}", figures[0], "s")
    record.measured(f"ours, collection, {turn}", collected, "s")
    record.measured(f"ours, extra memory, {turn}", figures[2], "GB")
    adapted.unload()
    return figures


def _collect_theirs(
    record: Record, model: Any, samples: list[dict[str, Any]], names: Any, rank: int
) -> tuple[float, LoraConfig, list[float]]:
    """Return the seconds of PEFT's collection, its options, and a list with the GB beyond the base."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(names),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )
    for _, module in target_modules(model, config):
        module.corda_method, module.rank = "kpm", rank  # as preprocess_corda does first

    def run_model() -> None:
        for sample in samples:
            model(**sample)

    peak = Peak(record.device)
    seconds, _ = seconds_once(lambda: calib_cov_distribution(model, config, run_model, None, None), record.device)
    record.measured("PEFT, collection", seconds, "s")
    record.measured("PEFT, extra memory of the collection", peak.extra, "GB")
    return seconds, config, [peak.extra]


def _decompose_theirs(record: Record, model: Any, config: LoraConfig, memory: list[float]) -> float:
    """Return the seconds of PEFT's decomposition of all layers; the memory is raised to its peak. The covariances are taken off."""
    layers = [module for _, module in target_modules(model, config)]
    counts = Counter(tuple(module.weight.shape) for module in layers)
    held = sum(4 * module.weight.shape[1] ** 2 for module in layers) / 1e9
    seconds = 0.0
    for shape in sorted(counts):
        layer = next(module for module in layers if tuple(module.weight.shape) == shape)
        peak = Peak(record.device)
        spent, _ = seconds_once(partial(collect_eigens_for_layer, layer, config), record.device)
        seconds += spent * counts[shape]
        memory[0] = max(memory[0], held + peak.extra)
        record.measured(f"PEFT, decomposition of one {shape[0]} × {shape[1]}, of {counts[shape]}", spent, "s")
    for module in layers:
        del module.covariance_matrix, module.sample_count, module.corda_method, module.rank
    record.measured("PEFT, decomposition of all", seconds, "s")
    record.measured("PEFT, extra memory", memory[0], "GB")
    return seconds
