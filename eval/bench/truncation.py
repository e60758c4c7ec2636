"""What a layer's smallest components are worth: perplexity after dropping r of them everywhere (after CorDA, figure 2).

    python -m corda_eval.bench.truncation --output eval/results/truncation.png

SmolLM2-135M-Instruct, all linear layers but the output layer. In each, ``W`` becomes ``W − U_S U_Sᵀ W``, U_S the last r left singular
vectors of ``W M``, with
    plain SVD    M = I
    ASVD         M = diag(√E[x²])^½, activation-aware scaling (arXiv 2312.05821, α = 0.5)
    CorDA        M = C, over one set of 24 × 512 tokens of context
    CorDA++      M = C, in each layer the most suitable of five such sets
Context: Python's reference manual. Perplexity: topics of it that the context does not hold; and the source code of Python's own
library, another domain.

Note: ASVD scales by the mean of |x|; here it is the root of the mean square, which the covariance already holds.
"""

import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from corda_core import Covariance, choose, collect, decompose
from corda_core.layers import over_layers
from corda_core.linears import weight_matrix
from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.records import table, write_json
from corda_eval.text.perplexity import held_out_text, perplexity, text_windows
from corda_vlm.context import progress_bar

DROPPED = (0, 8, 16, 32, 64, 128)
LENGTH, WINDOWS, SETS = 512, 24, 5
TITLES = {"manual": "other topics of the same manual", "code": "source code"}
CODE = ["argparse", "ast", "dataclasses", "inspect", "logging/__init__", "pathlib", "typing", "zipfile", "tarfile"]


def truncation(
    output: Annotated[Path, typer.Option(help="The plot; the figures go beside it as JSON.")] = Path("truncation.png"),
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens that each perplexity is taken over.")] = 8,
) -> None:
    """Measure, write the figures, draw them and print the table."""
    figures = measure(windows)
    write_json(output.with_suffix(".json"), figures)
    draw(figures, output)
    print(by_method(figures))


def measure(windows: int) -> dict[str, Any]:
    """Return the perplexities by domain, method and number of dropped components."""
    model, names, tokenizer = smollm2_model()
    context, held_out = held_out_text()
    texts = {
        "manual": text_windows(held_out, tokenizer, LENGTH, windows),
        "code": text_windows(library_code(), tokenizer, LENGTH, windows),
    }
    drawn = text_windows(context, tokenizer, LENGTH, WINDOWS * SETS)
    sets = [[{"input_ids": window[None]} for window in drawn[number::SETS]] for number in range(SETS)]
    first = collect(model, progress_bar(sets[0], "context"), names)
    others = (collect(model, progress_bar(batches, "candidate"), names) for batches in sets[1:])
    best, choices = choose(model, chain([first], others))
    methods: dict[str, tuple[dict[str, Covariance], float]] = {
        "plain SVD": ({name: Covariance.of(torch.eye(C.packed.n), C.num_tokens) for name, C in first.items()}, 0.0),
        "ASVD": ({name: Covariance.of(C.packed.diagonal().pow(0.25).diag(), C.num_tokens) for name, C in first.items()}, 0.0),
        "CorDA": (first, 0.01),
        "CorDA++": (best, 0.01),
    }
    perplexities: dict[str, dict[str, list[float]]] = {domain: {} for domain in texts}
    with torch.no_grad():
        base = {domain: perplexity(model, text) for domain, text in texts.items()}
        for method, (covariances, damping) in methods.items():
            bases = over_layers(model, names, _smallest(covariances, damping), progress_bar, method)
            for domain in texts:
                perplexities[domain][method] = [base[domain]]
            for count in progress_bar(DROPPED[1:], f"{method}, perplexity"):
                with _without(model, bases, count):
                    for domain, text in texts.items():
                        perplexities[domain][method].append(perplexity(model, text))
    chosen = [choice.index for choice in choices.values()]
    return {"dropped": DROPPED, "perplexity": perplexities, "windows": windows, "chosen": [chosen.count(number) for number in range(SETS)]}


def by_method(figures: dict[str, Any]) -> str:
    """Return the perplexities as Markdown tables."""
    lines = []
    for domain, methods in figures["perplexity"].items():
        rows = [[method, *(f"{value:,.1f}" for value in values)] for method, values in methods.items()]
        lines += table([domain, *map(str, figures["dropped"])], rows)
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw one plot a domain."""
    # Imported here: it belongs to the extra `demo`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(figures["perplexity"]), sharey=True)
    for axes, (domain, methods) in zip(panels, figures["perplexity"].items(), strict=True):
        for (method, values), style in zip(methods.items(), ("o-", "o-", "o-", "s--"), strict=True):  # the last two nearly coincide
            axes.plot(range(len(values)), values, style, label=method, fillstyle="none" if style[0] == "s" else "full", markersize=7)
        axes.set_xticks(range(len(figures["dropped"])), [str(count) for count in figures["dropped"]])
        axes.set(yscale="log", xlabel="components dropped in every layer", title=f"Perplexity on {TITLES[domain]}")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def library_code() -> str:
    """Return the source of some modules that come with every Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{name}.py" for name in CODE]
    return "\n\n".join(file.read_text() for file in files if file.exists())


def _smallest(covariances: dict[str, Covariance], damping: float, most: int = max(DROPPED)) -> Callable[[str, Tensor], Tensor]:
    """Return what gives a layer's last left singular vectors (m, most), in descending order, in float32."""

    def smallest(name: str, weight: Tensor) -> Tensor:
        return decompose(weight, covariances[name], most, "kpm", damping=damping, solver="exact").basis.float()

    return smallest


@contextmanager
def _without(model: nn.Module, bases: dict[str, Tensor], count: int) -> Iterator[None]:
    """Drop the last ``count`` components of every layer; afterwards the weights are what they were, bit for bit."""
    weights = {name: weight_matrix(model, name) for name in bases}  # they share memory with the layers
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, basis in bases.items():
            last = basis[:, -count:]
            weights[name] -= last @ (last.T @ weights[name])
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])


if __name__ == "__main__":
    typer.run(truncation)
