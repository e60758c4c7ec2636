"""Metrics after the benchmarks' own evaluations: pure functions, fractions from 0 to 1.

Where evaluations differ each variant has its name; where ours differs from all, its docstring says so.
"""

from corda_eval.metrics.calibration import calibration_error
from corda_eval.metrics.choice import multiple_choice_answer, pope_answer, pope_scores, scienceqa_answer
from corda_eval.metrics.retention import h_average, o_average
from corda_eval.metrics.strings import exact_match, gqa_match
from corda_eval.metrics.vqa import normalise_answer, vqa_accuracy

__all__ = [
    "calibration_error",
    "exact_match",
    "gqa_match",
    "h_average",
    "multiple_choice_answer",
    "normalise_answer",
    "o_average",
    "pope_answer",
    "pope_scores",
    "scienceqa_answer",
    "vqa_accuracy",
]
