"""What else a result says: accuracy within a budget, where exits disagree, and whether hard images leave late."""

from __future__ import annotations

import math

import torch
from scipy.stats import spearmanr
from torch import Tensor

from evaluation.results import Point, Result
from inference.trace import Trace


def accuracy_at(result: Result, share: float) -> float:
    """Test accuracy of the front's dearest point, as seen on the calibration split, within a share of the full MACs.

    NaN where no point is as cheap.
    """
    if result.curve is None or result.seen is None:
        return math.nan
    costs = result.seen.costs["macs"][result.front]
    within = result.front[costs <= share * result.test.costs["macs"].plain]
    return float(result.curve.accuracy[within[-1]]) if len(within) else math.nan


def disagreements(test: Trace) -> tuple[Tensor, Tensor]:
    """Per early exit and class, the share of the class's samples on which exit and last exit disagree in being right.

    Returns:
        Overthought (N - 1, C): the exit is right and the last wrong; needed (N - 1, C): the reverse. NaN for a class
        without samples.
    """
    right = test.correct
    members = torch.nn.functional.one_hot(test.labels, test.num_classes).double()
    count = members.sum(0)
    overthought = (right[:-1] & ~right[-1]).double() @ members / count
    return overthought, (~right[:-1] & right[-1]).double() @ members / count


def depth_correlation(point: Point, test: Trace) -> dict[str, float]:
    """Spearman's ρ between the exit a sample leaves at and each number the data set knows of it.

    NaN where all leave at one exit.
    """
    if point.outcome is None:
        return {}
    exits = point.outcome.prediction.exit
    if len(exits.unique()) < 2:
        return dict.fromkeys(test.extras, float("nan"))
    return {name: float(spearmanr(exits, value).statistic) for name, value in test.extras.items()}
