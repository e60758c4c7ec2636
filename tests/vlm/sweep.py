"""What works on a tiny model of each type that transformers knows; run as a program, as many types share one process's imports.

``python sweep.py measure FOLDER KIND:CLASS...`` writes FOLDER/KIND:CLASS.json, and with it an exported adapter and the outputs it gave;
``python sweep.py reload FOLDER`` puts these adapters on fresh models with nothing but PEFT, and adds what came of it.
"""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import Row, batch_of, rows_of, tiny_model
from torch import Tensor, nn

STEPS = ("prepare", "train", "batch", "save", "export", "merge")
"""What is measured of each type, in the order of the table."""
CLOSE = 1e-4
Result = dict[str, Any]


def results_of(output: Any) -> list[Tensor]:
    """Return what a model says, as one list of tensors."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values: Iterable[Any]
    if isinstance(output, Mapping):
        values = [output[key] for key in ("logits", "logits_per_image", "logits_per_text") if key in output] or output.values()
    else:
        values = output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in results_of(value)]


def outputs(model: nn.Module, batch: Row) -> list[Tensor]:
    """Return what a model says to a batch, without gradients."""
    with torch.no_grad():
        return results_of(model(**batch))


def close(some: list[Tensor], others: list[Tensor]) -> bool:
    """Return whether two answers are the same up to rounding."""
    return all(_is_close(one, other) for one, other in zip(some, others, strict=True))


def _is_close(one: Tensor, other: Tensor) -> bool:
    counts = other.abs() < torch.finfo(other.dtype).max / 2  # what a model forbids to say stands at the end of the scale
    return bool((one - other)[counts].abs().max() <= CLOSE * (0.01 + other[counts].abs().max()))


def loss_of(model: nn.Module, batch: Row) -> Tensor:
    """Return the model's own loss on the words of a batch, if it has one; else one that all of its results enter."""
    try:
        loss = getattr(model(**batch, labels=batch.get("decoder_input_ids", batch.get("input_ids"))), "loss", None)
    except (TypeError, ValueError):
        loss = None
    if loss is None or loss.ndim:
        return torch.stack([each.square().sum() for each in results_of(model(**batch))]).sum()
    return loss


@contextmanager
def noted(result: Result, step: str) -> Iterator[None]:
    """Write down that a step worked, or the sentence that it ended with."""
    try:
        yield
        result.setdefault(step, "yes")
    except Exception as error:
        result[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check(holds: bool, what: str) -> None:
    """Raise if something does not hold."""
    if not holds:
        raise AssertionError(what)


def measure(name: str, folder: Path) -> Result:
    """Return what works of one type, KIND:CLASS."""
    import corda_vlm
    from corda_core import lora_layers
    from corda_vlm.towers import PARTS, family_of

    kind, _, class_name = name.partition(":")
    result: Result = {}
    with noted(result, "model"):
        model = tiny_model(kind, class_name)
        rows = rows_of(kind, model)
        batch = batch_of(rows)
        family = family_of(model)
        parts = [part for part in PARTS if family.prefixes(part)]
        model.requires_grad_(False)
        expected = outputs(model, batch)
        check(all(bool(each.isfinite().all()) for each in expected), "the model's own outputs are not finite")
    if result["model"] != "yes":
        return result
    with noted(result, "batch"):
        check(_reads_rows_alike(model, rows, batch), "transformers itself answers differently to a padded row")
        _same_covariances(model, rows, batch, parts)
    if result["batch"] != "yes":  # the rest with rows of one length
        batch = batch_of(rows_of(kind, model, (12, 12)))
        expected = outputs(model, batch)
    with noted(result, "prepare"):
        adapted = corda_vlm.prepare(model, [batch], rank=2, protect="start", parts=parts)
        same = all(torch.equal(one, other) for one, other in zip(outputs(adapted, batch), expected, strict=True))
        check(same, "the outputs are not bit for bit the base's")
        layers = lora_layers(adapted)
        result["layers"] = {part: sum(family.part_of(name) == part for name in layers) for part in parts}
    if result["prepare"] != "yes":
        return result
    with noted(result, "train"):
        loss_of(adapted.train(kind == "rwkv"), batch).backward()  # which divides its weights in place in evaluation mode
        adapted.eval()
        lost = [name for name, layer in layers.items() if not _learns(layer)]
        check(not lost, f"{len(lost)} of {len(layers)} layers get no gradient, such as {(lost or [''])[0]}")
    _move(layers)
    moved = outputs(adapted, batch)
    check(not close(moved, expected), "training changed nothing")
    with noted(result, "save"):
        corda_vlm.save(adapted, folder / f"{name}.saved")
        again = corda_vlm.load(tiny_model(kind, class_name), folder / f"{name}.saved")
        check(close(outputs(again.eval(), batch), moved), "loaded, it answers differently")
    with noted(result, "export"):
        corda_vlm.export(adapted, folder / name)
        torch.save((batch, [each.clone() for each in moved]), folder / name / "expected.pt")
    with noted(result, "merge"):
        check(close(outputs(corda_vlm.merge(adapted), batch), moved), "merged, it answers differently")
    return result


def _reads_rows_alike(model: nn.Module, rows: list[Row], batch: Row) -> bool:
    """Return whether the model's own answers to rows are those to a batch of them, as far as they are one for each token."""
    together, apart = outputs(model, batch)[0], [outputs(model, row)[0] for row in rows]
    by_token = together.ndim == 3 and all(each.ndim == 3 and len(each) == 1 for each in apart)
    return not by_token or all(close([each[0]], [some[: each.shape[1]]]) for each, some in zip(apart, together, strict=True))


def _same_covariances(model: nn.Module, rows: list[Row], batch: Row, parts: list[str]) -> None:
    import corda_vlm

    config = corda_vlm.CordaConfig(rank=2, parts=parts)
    together, apart = (corda_vlm.collect_context(model, batches, config) for batches in ([batch], rows))
    for name, covariance in apart.items():
        other = together[name]
        check(covariance.num_tokens == other.num_tokens, f"{name} saw {covariance.num_tokens} tokens by rows, {other.num_tokens} at once")
        error = float((covariance.matrix - other.matrix).abs().max() / covariance.matrix.abs().max())
        check(error <= 1e-3, f"the covariance of {name} differs by {error:.0e}")


def _learns(layer: Any) -> bool:
    factors = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
    return all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in factors)


def _move(layers: dict[str, Any]) -> None:
    """Change each adapter as training would, and more."""
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        weight = layer.lora_B["default"].weight
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def reload(name: str, result: Result, folder: Path) -> None:
    """Put an exported adapter on a fresh model with PEFT alone, and note whether it answers as it did."""
    from peft import PeftModel

    if not (folder / name / "expected.pt").exists():
        return
    result.pop("export", None)
    with noted(result, "export"):
        kind, _, class_name = name.partition(":")
        model = tiny_model(kind, class_name)
        batch, expected = torch.load(folder / name / "expected.pt")
        adapted = PeftModel.from_pretrained(model, folder / name).eval()
        check(close(outputs(adapted, batch), expected), "in plain PEFT it answers differently")


def main(do: str, place: str, *names: str) -> None:
    """Measure types, or reload what was exported of them, and write the results."""
    warnings.simplefilter("ignore")
    folder = Path(place)
    for name in names or [file.stem for file in sorted(folder.glob("*.json"))]:
        file = folder / f"{name}.json"
        result: Result = {} if do == "measure" else json.loads(file.read_text())
        with noted(result, "measured"):
            if do == "measure":
                result = measure(name, folder)
            else:
                reload(name, result, folder)
        file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
