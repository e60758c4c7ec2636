"""Whether a classifier is as often right as it says."""

import torch
from torch import Tensor


def calibration_error(confidences: Tensor, hits: Tensor, num_bins: int = 15) -> float:
    """Return Σ_b n_b / N · |accuracy_b − confidence_b| over bins of equal width by the top label's confidence.

    Args:
        confidences: (examples,), the top labels' probabilities; for CLIP of the softmax at the model's own scale or at 100: say which.
        hits: (examples,), whether the top labels are right.
        num_bins: Bins on [0, 1], each without its upper end except the last.

    Raises:
        ValueError: If there is no bin.

    Note:
        torchmetrics 1.9 puts a confidence of exactly 1 into a bin of its own.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1.")
    confidences = confidences.double()
    place = (confidences * num_bins).long().clamp(max=num_bins - 1)
    surplus = torch.bincount(place, weights=hits.double() - confidences, minlength=num_bins)
    return float(surplus.abs().sum() / len(hits))
