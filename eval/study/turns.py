"""Tasks learned one after another: what each arm knows of them in the end, at its tuned rate."""

from collections.abc import Mapping, Sequence

from corda_eval.study.frontier import Run, by_arm, spread
from corda_eval.study.headline import spread_text
from corda_eval.study.sequence import average, backward_transfer

TURNS_TITLE = "one task after another: the mean over the tasks in the end, and what the earlier ones lost since each was learned"
HEAD = ("arm", "rate", "seeds", "right", "change of right since", "loss, nats", "rise of the loss since")


def turn_table(runs: Sequence[Run], rates: Mapping[str, float]) -> tuple[Sequence[str], list[list[str]]]:
    """Return head and rows of the arms at their rates; no rows where tasks are not learned in turn."""
    rows = []
    for arm, of_arm in by_arm(runs).items():
        matrices = [run.result["matrix"] for run in of_arm if run.rate == rates.get(arm) and "matrix" in run.result]
        if matrices:
            answers = all(right is not None for matrix in matrices for row in matrix for _, right in row)
            cells = [_both(matrices, 1, 1) if answers else ["", ""], _both(matrices, 0, 3)]
            rows.append([arm, f"{rates[arm]:g}", str(len(matrices)), *cells[0], *cells[1]])
    return HEAD, rows


def _both(matrices: Sequence[Sequence[Sequence[Sequence[float]]]], place: int, digits: int) -> list[str]:
    """Return average and backward transfer of losses (``place`` 0) or of percentages (1) over the seeds."""
    measures = (average, backward_transfer)
    return [spread_text(spread([measure(matrix, place) for matrix in matrices]), digits) for measure in measures]
