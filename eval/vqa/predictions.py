"""The file that a run's answers go to, line by line, and that a later run resumes from.

Its first line says what was asked of whom and with what: versions, digests of questions and model, options. Answers of another run are
refused; those of other versions too, which may tokenize, resize and round otherwise.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda_eval.records import library_versions
from corda_eval.vqa.example import VqaExample

logger = logging.getLogger(__name__)

CHECKSUM = "crc32"
"""Where a line has a checksum of what else it holds."""
SAMPLED = 256
"""Values of each weight that enter the digest of a model; training moves all of them."""


@dataclass(frozen=True)
class Prediction:
    """What a model said to one question."""

    question_id: str
    answer: str
    seconds: float
    """The time of its batch, divided by the number of questions in it."""


def run_header(task: str, examples: Sequence[VqaExample], model: Any, processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one run from another; each value is compared."""
    return {
        "file": "corda_eval predictions 1",
        # First, as other versions are often why a digest differs.
        **library_versions(),
        "task": task,
        "questions": _digest(part for example in examples for part in (example.question_id, example.question, _image_name(example))),
        "model": model_digest(model),
        "processor": _digest(_describe_processor(processor)),
        **options,
    }


def model_digest(model: torch.nn.Module) -> str:
    """Return a digest of the model as it answers now: a sample of each weight, its adapters' state, its generation options.

    A sample, because reading all of 7 billion weights takes as long as many answers. An adapter that is switched off or scaled gives
    another digest, a move to another device does not.
    """
    return _digest(_describe_model(model))


def read_predictions(path: Path, header: Mapping[str, Any], ids: Iterable[str]) -> dict[str, Prediction]:
    """Return the answers that a run has already written, by question id; none if there is no file.

    A last line that is not whole, as a killed run leaves it, is cut off and its question asked again.

    Raises:
        ValueError: If the file is of another run, or has a broken line, an unknown question or one twice.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    first, *lines = content.split(b"\n")
    if not lines and _header_line(header).encode().startswith(content):
        return {}
    _check_header(_parsed(first, path, 1), header, path)
    rest = lines.pop() if lines else b""
    if rest:
        logger.warning("%s ends in a line that is not whole, as a killed run leaves it; its question is asked again.", path)
        with path.open("rb+") as file:
            file.truncate(len(content) - len(rest))
    known, answered = set(ids), dict[str, Prediction]()
    for number, line in enumerate(lines, 2):
        row = _parsed(line, path, number)
        try:
            checksum = row.pop(CHECKSUM, None)
            if checksum not in (None, _checksum(row)):  # None: of corda-vlm 0.1.0
                raise ValueError("its checksum differs")
            prediction = Prediction(str(row["question_id"]), str(row["answer"]), float(row["seconds"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number} is no prediction ({line[:80]!r}); remove the line: its question is asked again."
            ) from error
        name = prediction.question_id
        if name not in known or name in answered:
            what = "a second time" if name in answered else "that is not in the task"
            raise ValueError(f"{path}, line {number} answers question {name!r} {what}; remove the line, or give another file.")
        answered[name] = prediction
    return answered


def write_header(path: Path, header: Mapping[str, Any]) -> None:
    """Write the first line of a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_header_line(header), encoding="utf-8")


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write one line for each."""
    with path.open("a", encoding="utf-8") as file:
        for row in map(vars, predictions):
            file.write(json.dumps({**row, CHECKSUM: _checksum(row)}, ensure_ascii=False) + "\n")


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _header_line(header: Mapping[str, Any]) -> str:
    return json.dumps(header) + "\n"


def _check_header(stored: Any, header: Mapping[str, Any], path: Path) -> None:
    if not isinstance(stored, dict) or stored.get("file") != header["file"]:
        raise ValueError(f"{path} does not start as a file of predictions; give another file, or remove it.")
    other = [name for name in {**header, **stored} if stored.get(name) != header.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} holds predictions of another run: {name} is {_short(stored.get(name))} there and {_short(header.get(name))} here"
            f"{f' (and {len(other) - 1} more differ)' if len(other) > 1 else ''}; give another file, or remove it."
        )


def _parsed(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        cure = "give another file, or remove it" if number == 1 else "remove the line: its question is asked again"
        raise ValueError(f"{path}, line {number} is not whole JSON ({error}); {cure}.") from error


def _short(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def _describe_model(model: torch.nn.Module) -> Iterable[str | bytes]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield _sample(tensor)
    for name, module in model.named_modules():
        state = {key: getattr(module, key, None) for key in ("disable_adapters", "active_adapters", "merged_adapters", "scaling")}
        if state["active_adapters"] is not None and not callable(state["active_adapters"]):
            yield f"{name} {state}"
    options = getattr(model, "generation_config", None)
    yield json.dumps(options.to_diff_dict() if options is not None else None, sort_keys=True, default=str)


def _describe_processor(processor: Any) -> Iterable[str]:
    tokenizer, images = getattr(processor, "tokenizer", processor), getattr(processor, "image_processor", None)
    yield str(getattr(processor, "chat_template", None))
    yield f"{type(tokenizer).__name__} {len(tokenizer)}"
    yield json.dumps(images.to_dict() if images is not None else None, sort_keys=True, default=str)


def _sample(tensor: Tensor) -> bytes:
    """Return the bytes of values at even distances; none where the weights are not there (on "meta")."""
    local = getattr(tensor, "_local_tensor", tensor).detach()
    if local.is_meta or not local.numel():
        return b""
    flat = local.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _image_name(example: VqaExample) -> str | bytes:
    """Return what tells an image from others: its file's name, or its content."""
    image = example.image() if callable(example.image) else example.image
    if isinstance(image, Path):
        return image.name
    if image is None:
        return b""
    return hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).digest()


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
