"""Choosing operating points on a calibration split: by search, by a budget for a batch, or with a guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.stats import beta, binom
from torch import Tensor

from inference.budget import Budget
from inference.policies import Policy
from inference.predicted import Predicted
from inference.replay import Curve, curve
from inference.thresholds import Thresholds
from inference.trace import Trace


@dataclass(frozen=True)
class OperatingPoint:
    """A policy with its thresholds, and how it came to them.

    Attributes:
        name: of the choice, for tables.
        policy: None where there is none to choose.
        note: what is guaranteed, or why there is none.
        series: whether it is one of many from one protocol.
    """

    name: str
    policy: Policy | None
    note: str = ""
    series: bool = False


class Calibration(Protocol):
    """Chooses points of a policy's family."""

    def __call__(self, policy: Policy, trace: Trace, seen: Curve) -> list[OperatingPoint]:
        """Args:
        policy: the family.
        trace: of the calibration split.
        seen: the family's candidates on it.
        """


@dataclass(frozen=True)
class HighestAccuracy:
    """The candidate with the highest accuracy, the cheapest of several in MACs."""

    def __call__(self, policy: Policy, trace: Trace, seen: Curve) -> list[OperatingPoint]:
        best = seen.accuracy == seen.accuracy.max()
        return [OperatingPoint("highest accuracy", policy.at(cheapest(seen, best)))]


@dataclass(frozen=True)
class LeastCost:
    """The candidate with the fewest MACs among those that lose no more than ``drop`` against the last exit.

    Args:
        drop: of accuracy, from 0 to 1.

    Raises:
        ValueError: a drop outside that.
    """

    drop: float = 0.01

    def __post_init__(self) -> None:
        _require_share("calibration.least_cost.drop", self.drop, zero=True)

    def __call__(self, policy: Policy, trace: Trace, seen: Curve) -> list[OperatingPoint]:
        full = trace.correct[-1].double().mean()
        enough = seen.accuracy >= full - self.drop - 1e-12
        name = f"fewest MACs, drop ≤ {self.drop:.4g}"
        if not enough.any():
            return [OperatingPoint(name, None, "no candidate loses as little")]
        return [OperatingPoint(name, policy.at(cheapest(seen, enough)))]


def cheapest(seen: Curve, among: Tensor, kind: str = "macs") -> list[float]:
    """Values of the cheapest point among some (P,) bool, of several the most accurate."""
    rows = among.nonzero()[:, 0].tolist()
    best = min(rows, key=lambda i: (float(seen.costs[kind][i]), -float(seen.accuracy[i])))
    return seen.values[best].tolist()


@dataclass(frozen=True)
class BudgetedBatch:
    """Points between leaving as early and as late as can be (Huang et al., MSDNet, 2018, section 5.2).

    For q = 1/20, 2/20, … the share of samples that leaves at exit k is made proportional to q^k by taking quantiles of
    the scores of the samples that are still there as thresholds, exit by exit.

    Args:
        points: how many q; the protocol has 39.

    Raises:
        ValueError: no point.
    """

    points: int = 39

    def __post_init__(self) -> None:
        if type(self.points) is not int or self.points < 1:
            raise ValueError(f"Expected calibration.budgeted_batch.points of at least 1, got {self.points}.")

    def __call__(self, policy: Policy, trace: Trace, seen: Curve) -> list[OperatingPoint]:
        rule = policy.within if isinstance(policy, Budget) else policy
        if (
            not isinstance(rule, Thresholds)
            or isinstance(rule, Predicted)
            or (isinstance(policy, Budget) and policy.macs is None)
        ):
            note = f"needs a policy with thresholds (confidence, margin, entropy), not {(rule or policy).name}"
            return [OperatingPoint("budgeted batch", None, note)]
        scores = rule.scores(trace)
        qs = [i / 20 for i in range(1, self.points + 1)]
        return [
            OperatingPoint(f"budgeted batch, q = {q:.2f}", policy.at(rule.quantiles(scores, q)), series=True)
            for q in qs
        ]


@dataclass(frozen=True)
class RiskControl:
    """The least careful point with accuracy lost ≤ ``epsilon`` with probability ≥ 1 - ``delta`` over the split's draw.

    Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing, on the loss of early-exit networks of Jazbec
    et al. (Fast yet Safe, 2024): 1 where the early answer is wrong and the last exit's right. Its mean is at least
    the accuracy lost. The points, one value shared by all exits, are tested from careful to careless; the null
    hypothesis "mean loss > ε" is rejected where a binomial with ε is as low as the losses seen with probability ≤ δ;
    the last point before the first that is not rejected is taken.

    Args:
        epsilon, delta: between 0 and 1.

    Raises:
        ValueError: one outside that.
    """

    epsilon: float = 0.01
    delta: float = 0.05

    def __post_init__(self) -> None:
        for key in ("epsilon", "delta"):
            _require_share(f"calibration.risk_control.{key}", getattr(self, key))

    def __call__(self, policy: Policy, trace: Trace, seen: Curve) -> list[OperatingPoint]:
        name = f"risk control, ε {self.epsilon:.4g}, δ {self.delta:.4g}"
        samples = len(trace)
        smallest = smallest_epsilon(samples, self.delta)
        if smallest > self.epsilon:
            needed = math.ceil(math.log(self.delta) / math.log(1 - self.epsilon))
            note = (
                f"not certifiable with {samples} samples; the smallest ε is {math.ceil(smallest * 1e4) / 1e4:.4f}, "
                f"this one needs {needed}"
            )
            return [OperatingPoint(name, None, note)]
        tested = curve(policy, policy.sequence(trace.num_classes, trace.costs["macs"]), trace)
        taken = certified(tested.lost.tolist(), samples, self.epsilon, self.delta)
        if taken < 0:
            lost = int(tested.lost[0])
            note = f"not certifiable: the most careful point loses {lost} of {samples} samples"
            return [OperatingPoint(name, None, note)]
        bound = upper_bound(int(tested.lost[taken]), samples, self.delta)
        note = (
            f"accuracy lost is at most {self.epsilon:.4g} with probability {1 - self.delta:.4g} "
            f"({int(tested.lost[taken])} of {samples} samples lost, bound {bound:.4f})"
        )
        return [OperatingPoint(name, policy.at(tested.values[taken].tolist()), note)]


def certified(lost: Sequence[int], samples: int, epsilon: float, delta: float) -> int:
    """Index of the last point before the first whose null hypothesis stands; -1 where that is the first of all.

    Args:
        lost: losses of each point, of so many samples.
    """
    fail = binom.cdf(torch.tensor(lost).numpy(), samples, epsilon) > delta
    return int(fail.argmax()) - 1 if fail.any() else len(lost) - 1


def smallest_epsilon(samples: int, delta: float) -> float:
    """What so many faultless samples certify: (1 - ε)^n = δ."""
    return 1 - delta ** (1 / samples)


def upper_bound(lost: int, samples: int, delta: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share, seen ``lost`` times in ``samples``."""
    return 1.0 if lost >= samples else float(beta.ppf(1 - delta, lost + 1, samples - lost))


def _require_share(key: str, value: float, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < 1 or (zero and value == 0)):
        raise ValueError(f"Expected {key} between 0 and 1, got {value}.")
