"""What a classifier said of each image -> accuracy, recall by class, calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corda_eval.metrics import calibration_error
from corda_eval.records import TaskResult


@dataclass(frozen=True)
class Tally:
    """Collects batches of logits; of equal logits the class of the lowest index comes first."""

    ids: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    """How many classes come before the right one."""
    confidences: dict[str, list[float]] = field(default_factory=dict)
    """Probability of the prediction, by the name of the calibration error that it is for."""

    def add(self, ids: Sequence[str], labels: Tensor, logits: Tensor, scales: Mapping[str, float]) -> None:
        """Take a batch: logits (batch, classes), and for each calibration error what they are multiplied by before the softmax.

        Raises:
            ValueError: If a label is of no class, or a logit is no number.
        """
        _check(ids, labels, logits)
        right = logits.gather(1, labels[:, None])
        before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        ranks = ((logits > right) | ((logits == right) & before)).sum(1)
        predictions = logits.argmax(1)
        self.ids.extend(ids)
        self.labels.extend(labels.tolist())
        self.predictions.extend(predictions.tolist())
        self.ranks.extend(ranks.tolist())
        for name, scale in scales.items():
            # The probability of the largest: 1 / Σ exp(logit − largest).
            above = scale * (logits - logits.max(1, keepdim=True).values)
            self.confidences.setdefault(name, []).extend((1 / above.exp().sum(1)).tolist())

    def result(self, task: str, num_classes: int, seconds: float, more: Mapping[str, float] | None = None) -> TaskResult:
        """Return ``acc1``, ``acc5`` (with at least five classes), ``mean_per_class_recall`` over the classes that occur, and calibration.

        Raises:
            ValueError: If no image was taken.
        """
        if not self.ids:
            raise ValueError(f"{task} has no images; expected at least one; name the folder or file that holds them.")
        ranks, labels = torch.tensor(self.ranks), torch.tensor(self.labels)
        hits = (ranks == 0).double()
        counts = torch.bincount(labels, minlength=num_classes)
        recall = torch.zeros(num_classes, dtype=torch.double).index_add(0, labels, hits)[counts > 0] / counts[counts > 0]
        metrics = {"acc1": hits.mean().item()}
        if num_classes >= 5:
            metrics["acc5"] = (ranks < 5).double().mean().item()
        metrics["mean_per_class_recall"] = recall.mean().item()
        metrics |= {name: calibration_error(torch.tensor(values), hits) for name, values in self.confidences.items()}
        return TaskResult(
            task=task,
            metrics=metrics | dict(more or {}),
            headline="acc1",
            scores=hits.tolist(),
            records=self._records(),
            examples_per_second=len(self.ids) / seconds,
        )

    def _records(self) -> list[dict[str, Any]]:
        confidences = next(iter(self.confidences.values()), [0.0] * len(self.ids))
        rows = zip(self.ids, self.predictions, self.labels, self.ranks, confidences, strict=True)
        return [
            {"id": name, "prediction": prediction, "answer": label, "rank": rank, "confidence": confidence}
            for name, prediction, label, rank, confidence in rows
        ]


def _check(ids: Sequence[str], labels: Tensor, logits: Tensor) -> None:
    bad = (~logits.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"The model's logits of image {ids[bad[0]]} are not all finite; expected numbers; try a higher precision.")
    outside = ((labels < 0) | (labels >= logits.shape[1])).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"Image {ids[outside[0]]} has the label {labels[outside[0]]}; expected 0 to {logits.shape[1] - 1}, as there are "
            f"{logits.shape[1]} classes; give the names of all classes, or correct the label."
        )
