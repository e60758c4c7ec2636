"""How preparation scales: seconds against hidden size and against tokens, beside the least work there is.

    python -m corda_eval.bench.scaling --output eval/results/scaling.png

One square layer n × n with heavy-tailed random weights and inputs, rank 32. The dashed lines are lower bounds: the operations that
each method cannot do without, at the speed of this machine's own matrix product in the same precision, measured in the same run.
    collection of t tokens   t n²          half of XᵀX, float32
    KPM, iteration           5/3 n³        half of WᵀW and two Cholesky factors, float64
    IPM, iteration           8 n² r        one application of W C C Wᵀ to r vectors, float32
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from corda_core import Covariance, collect, decompose
from corda_eval.bench.cases import heavy_tailed
from corda_eval.records import write_json
from corda_vlm.context import progress_bar

RANK, TOKENS = 32, 8192
SIZES = (512, 1024, 2048, 4096)
TOKEN_COUNTS = (1024, 4096, 16384, 65536)
WIDTH = 1024


def scaling(output: Annotated[Path, typer.Option(help="The plot; the figures go beside it as JSON.")] = Path("scaling.png")) -> None:
    """Measure, write the figures and draw them."""
    figures = measure()
    write_json(output.with_suffix(".json"), figures)
    draw(figures, output)


def measure() -> dict[str, Any]:
    """Return seconds by method and size, with the lower bounds."""
    rates = {dtype: _gemm_rate(dtype) for dtype in (torch.float32, torch.float64)}
    methods: dict[str, tuple[Callable[[Tensor, Covariance], Any], Callable[[int], float]]] = {
        "KPM, iteration": (lambda W, C: decompose(W, C, RANK, "kpm", solver="partial"), lambda n: 5 / 3 * n**3 / rates[torch.float64]),
        "IPM, iteration": (lambda W, C: decompose(W, C, RANK, "ipm", solver="partial"), lambda n: 8 * n**2 * RANK / rates[torch.float32]),
        "exact": (lambda W, C: decompose(W, C, RANK, "kpm", solver="exact"), lambda n: 3 * n**3 / rates[torch.float64]),
    }
    by_size: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "bound": []} for name in methods}
    for n in progress_bar(SIZES, "hidden size"):
        weight, inputs = _heavy(n, n) / n**0.5, _heavy(2 * n, n)
        covariance = Covariance.of(inputs.T @ inputs / len(inputs), len(inputs))
        for name, (run, bound) in methods.items():
            by_size[name]["seconds"].append(_seconds(run, weight, covariance))
            by_size[name]["bound"].append(bound(n))
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    by_tokens: dict[str, list[float]] = {"seconds": [], "bound": []}
    for tokens in progress_bar(TOKEN_COUNTS, "tokens"):
        batches = [{"input": part} for part in _heavy(tokens, WIDTH).split(2048)]
        by_tokens["seconds"].append(_seconds(lambda batches=batches: collect(layer, batches, ["0"])))
        by_tokens["bound"].append(tokens * WIDTH**2 / rates[torch.float32])
    return {
        "rank": RANK,
        "sizes": SIZES,
        "decomposition": by_size,
        "token_counts": TOKEN_COUNTS,
        "collection": by_tokens,
        "gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()},
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw both plots."""
    # Imported here: it belongs to the extra `demo`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, values) in enumerate(figures["decomposition"].items()):
        left.loglog(figures["sizes"], values["seconds"], "o-", color=f"C{number}", label=name)
        left.loglog(figures["sizes"], values["bound"], "--", color=f"C{number}", linewidth=1)
    left.set(xlabel="hidden size n", ylabel="seconds", title=f"Decomposition of one layer n × n, rank {figures['rank']}")
    left.set_xticks(figures["sizes"], [str(n) for n in figures["sizes"]], minor=False)
    left.minorticks_off()
    left.legend(frameon=False)
    right.loglog(figures["token_counts"], figures["collection"]["seconds"], "o-", label=f"collection, n = {WIDTH}")
    right.loglog(figures["token_counts"], figures["collection"]["bound"], "--", color="C0", linewidth=1, label="lower bound")
    right.set(xlabel="tokens", ylabel="seconds", title="Collection of one covariance")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _gemm_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """Return this machine's operations a second in a square matrix product."""
    left, right = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / _seconds(lambda: left @ right)


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Return the best of three runs: what the machine can do when others leave it alone."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def _heavy(rows: int, columns: int) -> Tensor:
    """Return random rows whose columns have scales over three orders of magnitude."""
    return heavy_tailed((rows, columns), torch.Generator().manual_seed(rows + columns))


if __name__ == "__main__":
    typer.run(scaling)
