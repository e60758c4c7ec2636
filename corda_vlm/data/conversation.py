"""Turns of any form -> one text, in segments that are prompt or response."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corda_vlm.failures import one_line

PLACEHOLDER = "<image>"
"""Represents an image in the text of a sample, whatever the model's own token is."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN_KEYS = ("from", "value", "role", "content")
TURN = '{"from": speaker, "value": text} or {"role": speaker, "content": text}'

Turn = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True)
class Segment:
    """A piece of a sample's text."""

    text: str
    is_response: bool


def text_of(value: Any, what: str) -> str:
    """Return text as it is, and a number as text.

    Raises:
        ValueError: If it is something else, or no number.
    """
    value = _plain(value)
    if not isinstance(value, (str, int, float)) or _is_nan(value):
        raise ValueError(f"{what} is {_kind(value)}; expected text or a number; say in `columns` where the text is.")
    return str(value)


def answer_of(value: Any, what: str) -> str | None:
    """Return the answer that most people gave, of equals the first met; None where there is none, as for empty text and NaN.

    Args:
        value: Text, a number, ``{"answer": text}``, a list of these, or None.
        what: What an error calls it.

    Raises:
        ValueError: If it is of another form.
    """
    answers = Counter(_answers(value, what))
    return answers.most_common(1)[0][0] if answers else None


def turns_of(value: Any, what: str, *, reads_images: bool = True) -> list[Turn]:
    """Return a conversation's turns: role and text, with a placeholder where a part is an image.

    Args:
        value: A list of ``{"from", "value"}`` or of ``{"role", "content"}``, whose content is text or a list of parts
            ``{"type": "text", "text": …}`` and ``{"type": "image"}``.
        what: What an error calls it.
        reads_images: Whether parts may be images.

    Raises:
        ValueError: If a turn is of another form, or an empty answer.
    """
    value = _plain(value)
    return [_turn(turn, what, reads_images) for turn in (value if isinstance(value, (list, tuple)) else [value])]


def reads_images(processor: Any) -> bool:
    """Return whether this is a processor for images and text, not a tokenizer."""
    return hasattr(processor, "image_processor")


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the argument if it is one."""
    return getattr(processor, "tokenizer", processor)


def image_token(processor: Any) -> str:
    """Return the token that represents an image in this processor's prompts."""
    return str(getattr(processor, "image_token", PLACEHOLDER))


def puts_images_first(processor: Any) -> bool:
    """Return whether the processor puts an image's tokens before the text by itself, and the text has none (BLIP-2, InstructBLIP)."""
    return getattr(processor, "num_query_tokens", None) is not None


def image_text(processor: Any) -> str:
    """Return what a prompt has in an image's place: the token, between the two by which Qwen's models find images."""
    if puts_images_first(processor):
        return ""
    tokenizer, token = tokenizer_of(processor), image_token(processor)
    start, end = "<|vision_start|>", "<|vision_end|>"
    wrapped = tokenizer.convert_tokens_to_ids(start) not in (None, tokenizer.unk_token_id)
    return f"{start}{token}{end}" if wrapped else token


def has_template(processor: Any) -> bool:
    """Return whether the processor formats conversations by a chat template."""
    return getattr(processor, "chat_template", None) is not None


def segments_of(turns: Sequence[Turn], num_images: int, processor: Any) -> tuple[Segment, ...]:
    """Return a conversation's text: every assistant turn is a response, and so is what ends it.

    Where the template marks no end, the tokenizer's end token follows each answer in place of the template's white space: a model that
    never saw an end does not learn to stop. White space after an end belongs to the next turn.

    Raises:
        ValueError: If images and placeholders do not match, or the template refuses the turns or rewrites earlier ones.
    """
    if reads_images(processor):
        turns = place_images(turns, num_images)
    render = _renderer(processor)
    answers = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    ends = not answers or _marks_end(render, turns[: answers[0]])
    end = "" if ends else getattr(tokenizer_of(processor), "eos_token", None) or ""
    segments: list[Segment] = []
    done = left = ""
    for index in answers:
        prompt, whole = render(turns[:index], True), render(turns[: index + 1], False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise ValueError("This chat template rewrites earlier turns as the conversation grows; give ready batches instead.")
        response = whole[len(prompt) :].rstrip()
        segments += [Segment(left + prompt[len(done) :], is_response=False), Segment(response + end, is_response=True)]
        left, done = "" if end else whole[len(prompt) + len(response) :], whole
    if turns[-1][0] == "assistant":
        return tuple(segments)
    return (*segments, Segment(left + render(turns, True)[len(done) :], is_response=False))


def place_images(turns: Sequence[Turn], num_images: int) -> list[Turn]:
    """Return the turns with as many placeholders as images: as written; if there are none, before the first user turn.

    Raises:
        ValueError: If the numbers differ.
    """
    count = sum(text.count(PLACEHOLDER) for _, text in turns)
    if not count and num_images:
        first = next((number for number, (role, _) in enumerate(turns) if role == "user"), 0)
        return [(role, f"{PLACEHOLDER}\n" * num_images * (number == first) + text) for number, (role, text) in enumerate(turns)]
    if count != num_images:
        shown = next((text for _, text in turns if PLACEHOLDER in text), turns[0][1])
        raise ValueError(
            f"A sample has {count} {PLACEHOLDER} token(s) but {num_images} image(s): give one image per token. Text: {shown[:80]!r}"
        )
    return list(turns)


def _renderer(processor: Any) -> Callable[[Sequence[Turn], bool], str]:
    """Return ``(turns, ask) -> text``: the chat template, or one line a turn for tokenizers without one."""
    multimodal = reads_images(processor)
    if not has_template(processor):
        token = image_text(processor) if multimodal else PLACEHOLDER
        return lambda turns, ask: "".join(f"{text.replace(PLACEHOLDER, token)}\n" for _, text in turns)

    def render(turns: Sequence[Turn], ask: bool) -> str:
        messages = [{"role": role, "content": _parts(text) if multimodal else text} for role, text in turns]
        try:
            return str(processor.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False))
        except Exception as error:  # templates are programs and may raise anything
            raise ValueError(
                f"The chat template refuses the conversation up to its turns {[role for role, _ in turns]} ({one_line(error)}); mend the "
                "row, or the template."
            ) from error

    return render


def _marks_end(render: Callable[[Sequence[Turn], bool], str], before: Sequence[Turn]) -> bool:
    """Return whether the template puts more than white space after an answer: what follows two different answers alike."""
    reversed_texts = [render([*before, ("assistant", answer)], False)[::-1] for answer in ("a", "b")]
    return bool(os.path.commonprefix(reversed_texts).strip())


def _parts(text: str) -> list[dict[str, str]]:
    """Split a turn's text at its placeholders, in the form that transformers' chat templates take."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if number else []
        # The template puts its own separator after an image.
        parts += [{"type": "text", "text": piece.removeprefix("\n") if number else piece}] if piece.strip() else []
    return parts


def _turn(turn: Any, what: str, reads_images: bool) -> Turn:
    keys = next((keys for keys in (TURN_KEYS[:2], TURN_KEYS[2:]) if isinstance(turn, Mapping) and set(keys) <= set(turn)), None)
    if keys is None:
        raise ValueError(f"{what} has the turn {str(turn)[:80]!r}; expected a list of {TURN}.")
    name, content = turn[keys[0]], _plain(turn[keys[1]])
    if name not in ROLES:
        raise ValueError(f"{what} has a turn from {name!r}; expected one of {sorted(ROLES)}.")
    if isinstance(content, str):
        text = content
    elif isinstance(content, (list, tuple)):
        text = "".join(_part(part, what, reads_images) for part in content)
    else:
        raise ValueError(f"{what} has a turn whose text is {content!r}; expected text, or a list of parts; mend the row.")
    if ROLES[name] == "assistant" and not text.strip():
        raise ValueError(f"{what} has an empty answer among its turns, from which nothing can be learned; fill it, or remove the turn.")
    return ROLES[name], text


def _part(part: Any, what: str, reads_images: bool) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image" and any(value is not None for key, value in part.items() if key not in ("type", "text")):
        raise ValueError(f"{what} has a picture within a turn ({str(part)[:80]!r}); put it into `image`, where pictures are read.")
    if kind != "image" or not reads_images:
        known = ["text", "image"] if reads_images else ["text"]
        raise ValueError(
            f'{what} has the part {str(part)[:80]!r} in a turn; expected text, or parts of the types {known} (text as "text").'
        )
    return PLACEHOLDER


def _answers(value: Any, what: str) -> list[str]:
    """Return all answers: those of several people, of one, or none."""
    value = _plain(value)
    if isinstance(value, (list, tuple)):
        return [answer for member in value for answer in _answers(member, what)]
    if isinstance(value, Mapping):
        if "answer" not in value:
            raise ValueError(f'{what} has the keys {list(value)}; expected text, a number, {{"answer": text}}, or a list of these.')
        return _answers(value["answer"], what)
    text = "" if value is None or _is_nan(value) else text_of(value, what)
    return [text] if text.strip() else []


def _plain(value: Any) -> Any:
    """Return numpy's arrays and numbers as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _kind(value: Any) -> str:
    return repr(value) if value is None or _is_nan(value) or value == [] else f"a {type(value).__name__}"
