"""Whether a classifier is as often right as it says."""

import torch
from torch import Tensor


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Return Σ_b n_b / N · |accuracy_b − confidence_b| over bins of equal width by the top label's confidence.

    Args:
        probabilities: (examples, classes), rows that sum to 1; for CLIP the softmax at the model's own scale or at 100: say which.
        labels: (examples,), the right classes.
        num_bins: Bins on [0, 1], each without its upper end but for the last.

    Raises:
        ValueError: If shapes do not fit or rows are no probabilities.

    Note:
        torchmetrics 1.9 puts a confidence of exactly 1 into a bin of its own.
    """
    return calibration_error(*_top(probabilities, labels), num_bins)


def calibration_error(confidences: Tensor, hits: Tensor, num_bins: int = 15) -> float:
    """Return the same from the top labels' confidences (examples,) and whether they are right (examples,).

    Raises:
        ValueError: If there is no bin.
    """
    shares, gaps = _bins(confidences, hits, num_bins)
    return float((shares * gaps).sum())


def maximum_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Return the largest |accuracy_b − confidence_b| over the bins that hold any example; arguments as above.

    Raises:
        ValueError: If shapes do not fit or rows are no probabilities.
    """
    return float(_bins(*_top(probabilities, labels), num_bins)[1].max())


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean of −log p(right class), in nats.

    Raises:
        ValueError: If shapes do not fit or rows are no probabilities.
    """
    _check(probabilities, labels)
    return float(-probabilities.double().gather(1, labels[:, None]).log().mean())


def _top(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probability of each example, and whether it is the right class's."""
    _check(probabilities, labels)
    confidences, predicted = probabilities.double().max(dim=1)
    return confidences, predicted == labels


def _bins(confidences: Tensor, hits: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return the share of examples of each bin, and its gap between accuracy and confidence, 0 where empty."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1.")
    confidences = confidences.double()
    place = (confidences * num_bins).long().clamp(max=num_bins - 1)
    counts = torch.bincount(place, minlength=num_bins)
    surplus = torch.bincount(place, weights=hits.double() - confidences, minlength=num_bins)
    return counts / len(hits), surplus.abs() / counts.clamp(min=1)


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"probabilities has shape {tuple(probabilities.shape)} and labels {tuple(labels.shape)}; expected (examples, classes) and "
            "(examples,), at least one."
        )
    # NaN is not near 1 either. Sums of half-precision rows stray by a hundredth.
    sums = probabilities.double().sum(1)
    if (probabilities < 0).any() or not ((sums - 1).abs() < 0.02).all():
        raise ValueError("probabilities has rows that are negative or do not sum to 1; expected a softmax's; give it no logits.")
    if (labels < 0).any() or (labels >= probabilities.shape[1]).any():
        raise ValueError(f"labels has classes outside 0 … {probabilities.shape[1] - 1}; expected places of columns.")
