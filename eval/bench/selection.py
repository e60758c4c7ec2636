"""What choosing among candidates costs, against decomposing once: CorDA++'s spectra beside the solver's iteration.

    python -m corda_eval.bench.selection

SmolLM2-135M-Instruct, all linear layers but the output layer, rank 32, KPM. Covariances of one set of 32 × 512 tokens serve as all
candidates: the work does not depend on what they hold. Forward passes and collection are not counted.
"""

import time

import typer

from corda_core import choose, collect, plan
from corda_eval.bench.cases import CASES, batched

CANDIDATES, REPEATS = 5, 3


def selection() -> None:
    """Measure in turns and print the medians and their ratio."""
    case = CASES["smollm2"]()
    covariances = collect(case.model, [{**batch, **case.options} for batch in batched(case)], case.names)
    times: dict[str, list[float]] = {"selection": [], "decomposition": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        choose(case.model, [covariances] * CANDIDATES)
        between = time.perf_counter()
        plan(case.model, covariances, mode="kpm", rank=case.rank)
        times["selection"].append(between - start)
        times["decomposition"].append(time.perf_counter() - between)
    medians = {name: sorted(values)[REPEATS // 2] for name, values in times.items()}
    ratio = medians["selection"] / medians["decomposition"]
    print(
        f"choosing among {CANDIDATES}: {medians['selection']:.1f} s, one decomposition: {medians['decomposition']:.1f} s, "
        f"{ratio:.2f} times as long"
    )


if __name__ == "__main__":
    typer.run(selection)
