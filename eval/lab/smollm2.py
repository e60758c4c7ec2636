"""SmolLM2-135M-Instruct from the file that its package carries."""

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from corda_core import select_linears
from corda_eval.lab.base import load_lab


def smollm2_model() -> tuple[nn.Module, tuple[str, ...], PreTrainedTokenizerBase]:
    """Return SmolLM2-135M-Instruct in float32, its linear layers but the output layer, and its tokenizer."""
    lab, processor = load_lab(torch.float32)
    with torch.device("meta"):
        model = LlamaForCausalLM(lab.config.text_config).eval()
    model.model, model.lm_head = lab.model.language_model, lab.lm_head
    return model, select_linears(model), processor.tokenizer
