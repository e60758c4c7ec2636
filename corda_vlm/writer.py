"""A model writes: texts, conversations, and answers about pictures.

All is drawn at temperature 1 from all tokens, so that it follows the model's own distribution: the mean KL to the base on such samples is
that of whole texts, ``E_base Σ_t KL(base ‖ adapted)``. Greedy answers are few and alike, and show nothing else that the base might say.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from corda_core.layers import gathered, num_processes, process_rank
from corda_vlm.context import collator_for, progress_bar
from corda_vlm.data.conversation import PLACEHOLDER, Segment, has_template, image_token, reads_images, segments_of, tokenizer_of
from corda_vlm.data.limits import TextLimits, limits_of
from corda_vlm.data.media import image_field
from corda_vlm.data.rows import Item, fields_of
from corda_vlm.data.samples import read_images
from corda_vlm.data.tokens import MARK, PER_TOKEN, Sample, encode, special_tokens

PROMPTS = (
    "Describe this image in detail.",
    "What is in this picture?",
    "Write a short caption for this image.",
    "What is happening here?",
    "Which objects can you see, and where are they?",
    "What colors and shapes stand out?",
    "Where might this picture have been taken?",
    "Is there any text in the image? If so, what does it say?",
    "What is unusual about this image?",
    "How many things or people can you count?",
    "What kind of image is this: a photo, a drawing, a chart or something else?",
    "Tell a short story about this picture.",
)
"""What a vision-language model is asked about the pictures that it will be tuned on: nothing of the task."""

MOST_ROUNDS = 4
"""How many times as many samples are written as are asked for, where some come to nothing, before it is given up."""
MOST_BATCHES = 1_000_000
"""By how much the batches' seeds are apart for one seed and the next."""
ROOM = 16
"""Positions that are left for what a chat template puts behind an answer."""

T = TypeVar("T")
Written = dict[str, Any]
"""A sample as plain values: fields of an item, with the place of its picture among the items as ``image``, and the seed of its draw."""


@dataclass(frozen=True)
class Writer:
    """A model that writes: texts, conversations, and answers about pictures."""

    model: Any
    processor: Any
    items: Sequence[Item]
    places: Sequence[int]
    """Where the items with pictures are; none for a language model."""
    max_tokens: int
    limits: TextLimits
    turn: tuple[str, str] | None
    """What the chat template puts before a user's turn and between that and the answer; None without a template."""
    never: Sequence[int]
    """Tokens that are not written: padding, what has no text, and where there are images, whatever may belong to one."""
    ends: Sequence[int]
    """Tokens that end a text or a turn."""

    @classmethod
    def of(cls, model: Any, processor: Any, items: Sequence[Item], places: Sequence[int], max_tokens: int) -> "Writer":
        """Return what writes with this model.

        Raises:
            ValueError: If the model does not continue texts.
        """
        if not getattr(model, "can_generate", lambda: False)() or model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} does not continue texts, so it cannot write a context itself; load it with its output layer "
                "(AutoModelForCausalLM), or give samples of what it is to keep."
            )
        tokenizer, limits = tokenizer_of(processor), limits_of(model)
        listed = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
        images = {*limits.image_tokens, *tokenizer.all_special_ids} if reads_images(processor) else set()
        textless = range(len(tokenizer), model.config.get_text_config().vocab_size)
        never = sorted(({tokenizer.pad_token_id, *images, *textless} - {None}) - ends)
        return cls(model, processor, items, places, max_tokens, limits, _turn_of(processor), never, sorted(ends))

    def rows(self, count: int, seed: int, batch_size: int) -> list[Written]:
        """Return this many samples.

        Raises:
            ValueError: If most of what the model writes comes to nothing.
        """
        kinds = [self.texts] if self.turn is None else [self.texts, self.chats]
        if self.places:
            kinds = [self.answers, self.answers, kinds[-1], self.answers, self.answers, self.answers, kinds[0], self.answers]
        size = min(batch_size, -(-count // len(kinds)))

        def write(number: int) -> list[Written]:
            own = seed * MOST_BATCHES + number
            with _drawing(self.model, own):
                return [row | {"seed": own} for row in kinds[number % len(kinds)](size, number)]

        rows: list[Written] = []
        done = 0
        while len(rows) < count:
            if done * size > MOST_ROUNDS * (count + len(kinds) * size):
                raise ValueError(
                    f"{type(self.model).__name__} ends at once, or writes what is no text: of {done * size} samples {len(rows)} are "
                    f"of use, for {count}; give samples of what it is to keep."
                )
            numbers = range(done, done + -(-(count - len(rows)) // size))
            rows += [row for some in shared_out(write, numbers) for row in some]
            done = numbers.stop
        return rows[:count]

    def texts(self, size: int, number: int) -> list[Written]:
        """Return texts from their beginning, as the model's own tokenizer reads them again."""
        tokenizer = tokenizer_of(self.processor)
        start, shown = _beginning(tokenizer)
        rows = []
        for ids in self.continued({"input_ids": torch.tensor([start] * size)}, self.max_tokens):
            text = self.decoded([*shown, *ids])
            again = self.decoded(tokenizer(text, add_special_tokens=False)["input_ids"])
            if again == text and self.spoken(ids) and self.is_readable(text):
                rows.append({"text": text})
        return rows

    def chats(self, size: int, number: int) -> list[Written]:
        """Return conversations of a user's turn and an answer."""
        before, between = self.turn or ("", "")
        prompt = encode(Sample((), (Segment(before, is_response=False),), is_chat=True, asks=True), self.processor)
        batch = {key: value.expand(size, -1) for key, value in prompt.items() if key in ("input_ids", *PER_TOKEN)}
        stop = between.strip().partition("\n")[0] or None
        turns = [self.spoken(ids) for ids in self.continued(batch, max(1, self.max_tokens // 2))]
        asked = [turn.partition(stop)[0].strip() if stop else turn for turn in turns]
        asked = [turn for turn in asked if turn and self.is_readable(turn)]
        answers = self.answered([{"question": turn} for turn in asked], max(1, self.max_tokens // 2))
        return [
            {"conversations": [{"from": "human", "value": turn}, {"from": "gpt", "value": answer}]}
            for turn, answer in zip(asked, answers, strict=True)
            if answer
        ]

    def answers(self, size: int, number: int) -> list[Written]:
        """Return answers to general prompts about pictures, the next ones at each call."""
        numbers = range(number * size, (number + 1) * size)
        places = [self.places[each % len(self.places)] for each in numbers]
        asked = [PROMPTS[(each + each // len(self.places)) % len(PROMPTS)] for each in numbers]
        items = [{"image": picture_of(self.items[place]), "question": prompt} for place, prompt in zip(places, asked, strict=True)]
        answers = self.answered(items, self.max_tokens)
        return [
            {"image": place, "question": prompt, "answer": answer}
            for place, prompt, answer in zip(places, asked, answers, strict=True)
            if answer
        ]

    def answered(self, items: Sequence[Item], max_tokens: int) -> list[str]:
        """Return an answer to each item, empty where there is none that can be read."""
        collate = collator_for(self.model, self.processor)
        groups = [[item] for item in items] if self.limits.padding_shifts else [items] if items else []
        answers = [self.spoken(ids) for group in groups for ids in self.continued(collate(group), max_tokens)]
        return [answer if self.is_readable(answer) else "" for answer in answers]

    def continued(self, batch: Mapping[str, Any], max_tokens: int) -> list[list[int]]:
        """Return the tokens with which the model continues each sample, drawn at temperature 1 from all, with the end if there is one."""
        inputs = {key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
        length = inputs["input_ids"].shape[1]
        room = max_tokens if self.limits.max_tokens is None else min(max_tokens, self.limits.max_tokens - length - ROOM)
        if room < 1:
            return [[] for _ in inputs["input_ids"]]
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=room,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.ends[0] if self.ends else 0,
            suppress_tokens=list(self.never) or None,
        )
        drawn = self.model.generate(**inputs, generation_config=config)[:, length:].tolist()
        return [ids[: next((place + 1 for place, token in enumerate(ids) if token in self.ends), None)] for ids in drawn]

    def decoded(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, up to bytes that are no text."""
        text: str = tokenizer_of(self.processor).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.partition("\ufffd")[0]

    def spoken(self, ids: Sequence[int]) -> str:
        """Return the text of a turn: what stands before its first special token."""
        special = {*tokenizer_of(self.processor).all_special_ids, *self.ends}
        return self.decoded(list(takewhile(lambda token: token not in special, ids))).strip()

    def is_readable(self, text: str) -> bool:
        """Return whether a text spells no token that represents an image, which would be taken for one."""
        return not reads_images(self.processor) or not any(token in text for token in (PLACEHOLDER, image_token(self.processor)))


@contextmanager
def _drawing(model: Any, seed: int) -> Iterator[None]:
    """Draw from a seed, and by no option of the model's own that is not asked for; afterwards all is as it was."""
    own = model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = own


def _turn_of(processor: Any) -> tuple[str, str] | None:
    """Return what a chat template puts before a user's turn, and between that and its answer; None if there is no such template."""
    if not has_template(processor):
        return None
    try:
        asked, *_ = segments_of([("user", MARK), ("assistant", "a")], 0, processor)
    except ValueError:  # it rewrites earlier turns: nothing can be learned from its conversations
        return None
    before, mark, between = asked.text.partition(MARK)
    return (before, between) if mark else None


def _beginning(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens at a text's beginning, and those of them that the text must show, as the tokenizer does not put them there.

    Raises:
        ValueError: If there are none.
    """
    added, _ = special_tokens(tokenizer)
    if added:
        return added, []
    token = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    if token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no token for a text's beginning (bos_token, eos_token), from which the base could write; set "
            "one, or give samples of what it is to keep."
        )
    return [token], [token]


def picture_of(item: Item) -> Image.Image:
    """Return an item's first picture."""
    return read_images(item if isinstance(item, Image.Image) else image_field(fields_of(item)))[0]


def shared_out(function: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """Return the function of all numbers, each process having done its share."""
    own = {number: function(number) for number in progress_bar(numbers[process_rank() :: num_processes()], "self-written context")}
    results = {number: result for part in gathered(own) for number, result in part.items()}
    return [results[number] for number in numbers]
