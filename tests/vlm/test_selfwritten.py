"""Contexts that the base makes itself: what is written, that it is the model's own distribution, and what is refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, tiny_llama, tiny_llava
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaModel

import corda_vlm
from corda_core import select_linears
from corda_core.linears import quantize_linears_, weight_matrix
from corda_vlm.context import collator_for
from corda_vlm.data.samples import Collator
from corda_vlm.data.tokens import special_tokens
from corda_vlm.selfwritten import NOUNS, read_self_context, self_context
from corda_vlm.writer import PROMPTS


def sharp_llama(factor: float = 12.0) -> Any:
    """A random Llama that is sure of some words and not of others."""
    model = tiny_llama()
    model.lm_head.weight.data *= factor
    return model


def likelihood_and_entropy(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], never: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −log p of each token and the entropy (nats) of what is predicted there, but for each sample's first two tokens."""
    losses, entropies = [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].float()
        logits[..., list(never)] = -torch.inf
        logs = logits.log_softmax(-1)
        counts = batch["attention_mask"][:, 1:].cumsum(1) > 2
        losses.append(-logs.gather(2, batch["input_ids"][:, 1:, None])[..., 0][counts])
        entropies.append(-(logs.exp() * logs.clamp(min=-1e4)).sum(-1)[counts])
    return torch.cat(losses), torch.cat(entropies)


def test_a_language_model_writes_texts_and_conversations_that_its_tokenizer_reads_as_they_were_drawn(tokenizer: Any) -> None:
    model = tiny_llama()
    written = self_context(model, tokenizer, count=24, seed=3, max_tokens=20)
    assert len(written) == 24
    kinds = Counter("text" if "text" in item else "conversations" for item in written)
    assert min(kinds["text"], kinds["conversations"]) >= 6
    collate = Collator(tokenizer)
    for item in written:
        ids = collate([item])["input_ids"][0]
        assert 2 <= len(ids) <= 20 + 8  # the template's own
        if "text" in item:
            assert tokenizer.decode(ids) == item["text"]
    assert [dict(item) for item in written[:3]] == [dict(written[place]) for place in range(3)]


def test_seeds_tell_samples_and_nothing_else_is_touched(tokenizer: Any) -> None:
    model = tiny_llama()
    model.train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = self_context(model, tokenizer, count=9, seed=1, max_tokens=12)
    torch.testing.assert_close(torch.rand(3), expected)
    assert model.training
    assert self_context(model, tokenizer, count=9, seed=1, max_tokens=12) == first
    assert self_context(model, tokenizer, count=9, seed=2, max_tokens=12).rows != first.rows


def test_samples_follow_the_model_s_own_distribution_whatever_its_generation_config_says(tokenizer: Any) -> None:
    model = sharp_llama()
    plain = self_context(model, tokenizer, count=160, max_tokens=24, batch_size=32)
    odd = {"temperature": 0.1, "top_k": 1, "top_p": 0.2, "min_p": 0.5, "repetition_penalty": 3.0, "max_length": 5, "num_beams": 2}
    for name, value in (odd | {"no_repeat_ngram_size": 2, "forced_eos_token_id": 7, "min_new_tokens": 9}).items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    assert self_context(model, tokenizer, count=160, max_tokens=24, batch_size=32) == plain
    assert model.generation_config is kept
    texts = [item for item in plain if "text" in item]
    losses, entropies = likelihood_and_entropy(model, [Collator(tokenizer)([item]) for item in texts], never=(0,))
    error = float((losses - entropies).std() / len(losses) ** 0.5)
    assert float(entropies.mean()) < 2.5 < float(torch.tensor(22.0).log())  # it does know something
    assert abs(float(losses.mean() - entropies.mean())) < 3 * error


def test_without_a_chat_template_all_is_text(tokenizer: Any) -> None:
    plain = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert all("text" in item for item in self_context(tiny_llama(), plain, count=6, max_tokens=8))


def test_samples_fit_the_model_s_positions(tokenizer: Any) -> None:
    model = tiny_llama()
    model.lm_head.bias = nn.Parameter(-30 * F.one_hot(torch.tensor(3), 22).float())  # never an end
    written = self_context(model, tokenizer, count=6, max_tokens=1000)
    collate = collator_for(model, tokenizer)
    lengths = [collate([item])["input_ids"].shape[1] for item in written]
    assert 64 < max(lengths) <= model.config.max_position_embeddings


def test_a_vision_language_model_answers_general_prompts_on_the_pictures(processor: Any, samples: Any) -> None:
    model = tiny_llava()
    items = [{"text": "a red circle"}, *samples]
    written = self_context(model, processor, items, count=16, seed=5, max_tokens=10)
    pictured = [item for item in written if "image" in item]
    assert len(pictured) >= 12  # some may take the place of texts that came to nothing
    assert len({item["question"] for item in pictured} & {*PROMPTS}) > 4
    assert {place["image"] for place in written.rows if "image" in place} <= {*range(1, 13)}
    assert pictured[0]["image"].tobytes() in {sample["image"].tobytes() for sample in samples}
    assert all(item.get("text") or item.get("answer") or item.get("conversations") for item in written)
    assert len(pictured) < 16
    batch = Collator(processor, with_labels=True)([item for item in written if "text" not in item])
    assert batch["pixel_values"].shape[0] == len(pictured)
    assert not any(processor.image_token in json.dumps(row) for row in written.rows)


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")
def test_prepare_takes_it(processor: Any, samples: Any) -> None:
    model = tiny_llava()
    written = self_context(model, processor, samples, count=16, max_tokens=10)
    batch = Collator(processor)([samples[0]])
    with torch.no_grad():
        expected = model(**batch).logits
        adapted = corda_vlm.prepare(model, written, processor=processor, rank=2)
        assert torch.equal(adapted(**batch).logits, expected)


def test_two_towers_caption_the_pictures_each_in_its_own_words() -> None:
    pytest.importorskip("open_clip")
    from test_attention import clip

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.tensor(list(image.resize((16, 16)).tobytes()), dtype=torch.float32).reshape(16, 16, 3).permute(2, 0, 1) / 127.5 - 1

    def tokenize(captions: list[str]) -> torch.Tensor:
        rows = [[49406, *[ord(letter) for letter in caption[13:22]], 49407] for caption in captions]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])

    pairs = corda_vlm.OpenClipPairs(preprocess, tokenize)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (30, 16 * 16 * 3), generator=generator, dtype=torch.uint8)
    items = [(Image.frombytes("RGB", (16, 16), bytes(pixels.tolist())), "its own caption") for pixels in noise]
    model = clip()
    written = self_context(model, pairs, items, count=20, seed=1, batch_size=8)
    assert len({item["text"] for item in written}) == len({row["image"] for row in written.rows}) == 20
    assert all(item["text"].removeprefix("a photo of ").partition(" ")[2] in NOUNS for item in written)
    batch = pairs([*written])
    names = [f"a photo of {'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in NOUNS]
    with torch.no_grad():
        image, text = (F.normalize(each, dim=-1) for each in (model.encode_image(batch["image"]), model.encode_text(tokenize(names))))
    similar = image @ text.T
    best = int(similar.max(1).values.argmax())  # the surest picture has its own best; no other has a better one that is free
    assert written[best]["text"] == names[int(similar[best].argmax())]
    assert len(self_context(model, pairs, items, count=99)) == 30


def test_two_towers_of_transformers(processor: Any, tokenizer: Any, samples: Any) -> None:
    from families import build
    from transformers import CLIPProcessor

    model, _ = build("clip")
    reader = CLIPProcessor(processor.image_processor, tokenizer)
    written = self_context(model, reader, samples, count=8)
    assert len(written) == 8
    assert collator_for(model, reader)([*written])["pixel_values"].shape == (8, 3, 16, 16)


def test_a_vision_tower_keeps_its_pictures(processor: Any, samples: Any) -> None:
    model = tiny_llava().model.vision_tower
    written = self_context(model, processor.image_processor, samples, count=5)
    assert [list(item) for item in written] == [["image"]] * 5


def test_what_was_written_is_read_again_and_damage_is_told(processor: Any, samples: Any, tmp_path: Path) -> None:
    written = self_context(tiny_llava(), processor, samples, count=8, max_tokens=8)
    path = tmp_path / "context.jsonl"
    written.save(path)
    assert read_self_context(path, samples) == written
    header = json.loads(path.read_text().splitlines()[0])
    assert header["self_context"] == {"count": 8, "seed": 0, "max_tokens": 8, "batch_size": 16}
    with pytest.raises(ValueError, match=r"has samples on picture \d+, but there are 2 items"):
        read_self_context(path, samples[:2])
    content = path.read_text()
    path.write_text(content.replace('"answer": "', '"answer": "a ', 1))
    with pytest.raises(ValueError, match="context.jsonl is damaged"):
        read_self_context(path, samples)
    for broken in ("", content[:-20], "7\n", '{"text": "a"}\n'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"context.jsonl is no whole file of samples that a base wrote .*; put it back"):
            read_self_context(path, samples)


@pytest.mark.parametrize("option", ["count", "max_tokens", "batch_size"])
def test_nothing_is_not_asked_for(option: str, tokenizer: Any) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option} is 0; expected at least 1"):
        self_context(tiny_llama(), tokenizer, **options)


def test_models_that_cannot_write_are_refused(tokenizer: Any, processor: Any, samples: Any) -> None:
    with pytest.raises(ValueError, match=r"LlamaModel does not continue texts.*AutoModelForCausalLM"):
        self_context(LlamaModel(tiny_llama().config), tokenizer, count=2)
    with pytest.raises(ValueError, match="none of the 0 items has one"):
        self_context(tiny_llava(), processor, count=2)
    with pytest.raises(ValueError, match="none of the 1 items has one"):
        self_context(tiny_llava(), processor, [{"text": "a red circle"}], count=2)
    silent = tiny_llama()
    silent.lm_head.weight.data.zero_()
    silent.lm_head.weight.data[3] = 1e4 * torch.randn(32)
    silent.generation_config.eos_token_id = [*range(22)]
    with pytest.raises(ValueError, match="LlamaForCausalLM ends at once"):
        self_context(silent, tokenizer, count=4)
    homeless = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    assert special_tokens(homeless) == ([], [])
    with pytest.raises(ValueError, match="no token for a text's beginning"):
        self_context(tiny_llama(), homeless, count=4)


def test_a_quantised_base_writes_and_can_be_prepared_then(tokenizer: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = llama_config()
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    model = LlamaForCausalLM(config).eval()
    names = select_linears(model)
    quantize_linears_(model, names)
    assert len(self_context(model, tokenizer, count=4, max_tokens=6)) == 4
    assert all(weight_matrix(model, name).isfinite().all() for name in names)  # not packed anew for inference


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from pathlib import Path
from conftest import tiny_llama
from transformers import AutoTokenizer
from corda_vlm.selfwritten import self_context
dist.init_process_group("gloo")
written = self_context(tiny_llama(), AutoTokenizer.from_pretrained({folder!r}), count=21, seed=4, max_tokens=12, batch_size=4)
written.save(Path({folder!r}) / f"rank{{dist.get_rank()}}.jsonl")
dist.destroy_process_group()
"""


def test_two_processes_write_what_one_does(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    alone = self_context(tiny_llama(), tokenizer, count=21, seed=4, max_tokens=12, batch_size=4)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        assert read_self_context(tmp_path / f"rank{rank}.jsonl") == read_self_context(tmp_path / "rank0.jsonl")
        assert read_self_context(tmp_path / f"rank{rank}.jsonl").rows == alone.rows


@pytest.mark.slow
def test_smollm2_writes_text_as_likely_as_it_expects() -> None:
    from corda_eval.lab.smollm2 import smollm2_model

    model, _, tokenizer = smollm2_model()
    written = self_context(model, tokenizer, count=16, max_tokens=48, batch_size=8)
    assert written == self_context(model, tokenizer, count=16, max_tokens=48, batch_size=8)
    texts = [item for item in written if "text" in item]
    assert len(texts) == 8
    assert sum(len(item["text"].split()) for item in texts) > 100
    losses, entropies = likelihood_and_entropy(model, [Collator(tokenizer)([item]) for item in texts])
    error = float((losses - entropies).std() / len(losses) ** 0.5)
    assert 2 < float(entropies.mean()) < 6
    assert abs(float(losses.mean() - entropies.mean())) < 3 * error + 0.1  # some texts have more likely tokens than those drawn
