"""Tokenizers as Llama's and GPT-2's, whose tokens depend on what stands before them; nothing is downloaded."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

WORDS = ("red", "blue", "cat", "what", "USER", "ASSISTANT")
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's own, as its Hugging Face port has it: no end behind an answer but a space."""


def _vocabulary(start: dict[str, int], letters: str, words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary and the merges that make each word one token."""
    names, merges = dict(start), {}
    for letter in letters:
        names.setdefault(letter, len(names))
    for word in words:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            names.setdefault(word[: end + 1], len(names))
    return names, list(merges)


def llama(prepends: bool = True, ends: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of Llama's kind: by the ``Prepend`` normaliser of its older files, or by ``Metaspace``.

    Args:
        prepends: Which of the two.
        ends: ``add_eos_token=True``.
        template: Of conversations.
    """
    start = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    letters = "▁abcdefghijklmnopqrstuvwxyzUSERAITN:.?"
    names, merges = _vocabulary(start, letters, [*(f"▁{word}" for word in WORDS), *WORDS])
    backend = Tokenizer(models.BPE(vocab=names, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = TemplateProcessing(single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    extra = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, chat_template=template, **tokens)


def gpt2(template: str | None = None) -> Any:
    """Return a tokenizer of GPT-2's kind: bytes, and white space that joins what follows."""
    letters = "".join(sorted(pre_tokenizers.ByteLevel.alphabet()))
    names, merges = _vocabulary({"<|endoftext|>": 0}, letters, [*(f"Ġ{word}" for word in WORDS), *WORDS, "ĊĊ", "ĠĠ"])
    tokenizer = GPT2Tokenizer(vocab=names, merges=merges)
    tokenizer.chat_template = template
    return tokenizer
