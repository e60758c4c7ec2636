"""Metrics after the benchmarks' own evaluations: pure functions, fractions from 0 to 1.

Where evaluations differ each variant has its name; where ours differs from all, its docstring says so.
"""

from corda_eval.metrics.calibration import calibration_error, expected_calibration_error, maximum_calibration_error, negative_log_likelihood
from corda_eval.metrics.choice import multiple_choice_answer, pope_answer, pope_scores, scienceqa_accuracy, scienceqa_answer
from corda_eval.metrics.recall import recall_at_k
from corda_eval.metrics.retention import (
    backward_transfer,
    drops,
    forgetting,
    forward_transfer,
    h_average,
    o_average,
    retained,
    retention_summary,
)
from corda_eval.metrics.strings import anls, exact_match, gqa_match, relaxed_accuracy
from corda_eval.metrics.vqa import VARIANTS, normalise_answer, vqa_accuracy

__all__ = [
    "VARIANTS",
    "anls",
    "backward_transfer",
    "calibration_error",
    "drops",
    "exact_match",
    "expected_calibration_error",
    "forgetting",
    "forward_transfer",
    "gqa_match",
    "h_average",
    "maximum_calibration_error",
    "multiple_choice_answer",
    "negative_log_likelihood",
    "normalise_answer",
    "o_average",
    "pope_answer",
    "pope_scores",
    "recall_at_k",
    "relaxed_accuracy",
    "retained",
    "retention_summary",
    "scienceqa_accuracy",
    "scienceqa_answer",
    "vqa_accuracy",
]
