"""Replay: any policy, or a hundred thousand of them, on a trace, without running the network again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.budget import Budget
from inference.executor import Prediction, answers, travel
from inference.policies import Policy
from inference.thresholds import Thresholds
from inference.trace import Trace

BLOCK = 2**21  # elements of a block of points x samples


class Outcome(NamedTuple):
    """One operating point on a trace of N exits.

    Attributes:
        prediction: what became of each sample.
        heads: (N, samples) bool, whether each head was computed for it.
    """

    prediction: Prediction
    heads: Tensor

    def cost(self, trace: Trace, convention: str = "macs") -> Tensor:
        """(samples,) int64, spent on each sample."""
        return spent(trace, self.prediction.exit, self.heads, convention)


def spent(trace: Trace, exit: Tensor, heads: Tensor, convention: str) -> Tensor:
    """Cost (samples,) of leaving at ``exit`` (samples,), from 1, with the ``heads`` (N, samples) that were computed."""
    way = trace.segments[convention].cumsum(0).gather(0, exit[None] - 1)[0]
    return way + (trace.heads[convention] * heads).sum(0)


class TraceWay:
    """What a trace remembers of the samples' way."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.rows = torch.arange(len(trace))
        self.computed = torch.zeros(trace.num_exits, len(trace), dtype=torch.bool)

    def advance(self, k: int) -> Tensor:
        return self.trace.segments["macs"][k - 1, self.rows]

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = self.rows if wanted is None else self.rows[wanted]
        self.computed[k - 1, rows] = True
        return self.trace.logits[k - 1, rows], self.trace.heads["macs"][k - 1, rows]

    def keep(self, staying: Tensor) -> None:
        self.rows = self.rows[staying]


def replay(policy: Policy, trace: Trace) -> Outcome:
    """One operating point.

    Raises:
        ValueError: a policy that does not fit the trace's network.
    """
    policy.check(trace.costs["macs"], trace.num_classes)
    way = TraceWay(trace)
    prediction = travel(policy, way, trace.costs["macs"], len(trace))
    return Outcome(prediction, way.computed)


@dataclass(frozen=True)
class Curve:
    """P operating points of one family on a trace of N exits.

    Attributes:
        values: (P, D) float64, what tells them apart.
        accuracy: (P,) float64, from 0 to 1.
        costs: by convention, (P,) float64, average of an image.
        shares: (P, N) float64, of the samples leaving at each exit.
        lost: (P,) int64, samples answered wrong where the last exit is right.
    """

    values: Tensor
    accuracy: Tensor
    costs: dict[str, Tensor]
    shares: Tensor
    lost: Tensor


def curve(policy: Policy, values: Tensor, trace: Trace) -> Curve:
    """Replays the points ``policy.at(row)`` for the rows of ``values`` (P, D); thresholds as tensor operations."""
    inner = policy.within if isinstance(policy, Budget) and policy.macs is not None else policy
    if isinstance(inner, Thresholds):
        longest = replay(policy.at([inner.never] * (trace.num_exits - 1)), trace)
        return _as_curve(values, _threshold_sums(inner, values, trace, longest), trace)
    sums = [_sums(replay(policy.at(row), trace), trace) for row in values.tolist()]
    return _as_curve(values, torch.stack(sums), trace)


def _columns(trace: Trace, exit: Tensor, heads: Tensor) -> Tensor:
    """(samples, 2 + conventions) float64 of leaving at ``exit`` (samples,): right, lost, and each cost."""
    right = trace.correct.gather(0, exit[None] - 1)[0]
    lost = trace.correct[-1] & ~right
    return torch.stack([right, lost, *(spent(trace, exit, heads, name) for name in trace.costs)], 1).double()


def _sums(outcome: Outcome, trace: Trace) -> Tensor:
    """Of one point: the sums of ``_columns``, then how many leave at each exit."""
    exit = outcome.prediction.exit
    counts = torch.bincount(exit - 1, minlength=trace.num_exits).double()
    return torch.cat([_columns(trace, exit, outcome.heads).sum(0), counts])


def _threshold_sums(rule: Thresholds, values: Tensor, trace: Trace, longest: Outcome) -> Tensor:
    """The sums of ``_sums`` (P, 2 + conventions + N), a block of points at a time.

    Everybody is taken to go as far as can be, and what leaving at an earlier exit changes is added.

    Args:
        longest: with thresholds that nobody passes: a budget may end a sample's way, or leave heads out, even then.
    """
    samples, end = len(trace), longest.prediction.exit
    worth = _worth(trace, end, longest.heads)
    sums = worth.sum(0).repeat(len(values), 1)
    early = []
    for k, score in enumerate(rule.scores(trace), start=1):
        may = longest.heads[k - 1] & (end > k)
        heads = longest.heads & (torch.arange(trace.num_exits) < k)[:, None]
        gain = _worth(trace, torch.full((samples,), k), heads) - worth
        early.append((may, score, gain))
    thresholds = values.float()
    step = max(1, BLOCK // samples)
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        on_the_way = torch.ones(len(thresholds[rows]), samples, dtype=torch.bool)
        for k, (may, score, gain) in enumerate(early):
            leaves = rule.passes(score, thresholds[rows, k : k + 1]) & may
            sums[rows] += (leaves & on_the_way).double() @ gain
            on_the_way &= ~leaves
    return sums


def _worth(trace: Trace, exit: Tensor, heads: Tensor) -> Tensor:
    """What a sample that leaves at ``exit`` adds to the sums: (samples, columns of sums)."""
    here = torch.nn.functional.one_hot(exit - 1, trace.num_exits).double()
    return torch.cat([_columns(trace, exit, heads), here], 1)


def _as_curve(values: Tensor, sums: Tensor, trace: Trace) -> Curve:
    names, samples = list(trace.costs), len(trace)
    costs = {name: sums[:, 2 + i] / samples for i, name in enumerate(names)}
    return Curve(values, sums[:, 0] / samples, costs, sums[:, 2 + len(names) :] / samples, sums[:, 1].round().long())


def pareto(accuracy: Tensor, cost: Tensor) -> Tensor:
    """Indices of the points that no other beats in one of accuracy and cost without losing in the other, by cost."""
    order = sorted(range(len(cost)), key=lambda i: (float(cost[i]), -float(accuracy[i])))
    front: list[int] = []
    for i in order:
        if not front or accuracy[i] > accuracy[front[-1]]:
            front.append(i)
    return torch.tensor(front)


def oracle(policy: Policy, trace: Trace) -> Outcome:
    """The policy with foresight: each sample leaves where the policy would let it, and pays no earlier head.

    The worked example of section III of the Exit Predictor paper.
    """
    return _foreseen(trace, replay(policy, trace).prediction.exit)


def label_oracle(trace: Trace) -> Outcome:
    """Knows the label: leaves at the cheapest exit that is right, at the cheapest of all where none is.

    It pays that head only. No policy is as accurate at a lower cost.
    """
    alone = trace.segments["macs"].cumsum(0) + trace.heads["macs"]
    hopeless = ~trace.correct.any(0)
    wrong = ~(trace.correct | hopeless)
    return _foreseen(trace, alone.masked_fill(wrong, torch.iinfo(alone.dtype).max).argmin(0) + 1)


def _foreseen(trace: Trace, exit: Tensor) -> Outcome:
    heads = torch.arange(1, trace.num_exits + 1)[:, None] == exit
    label, confidence = answers(trace.logits[exit - 1, torch.arange(len(trace))])
    return Outcome(Prediction(label, confidence, exit, spent(trace, exit, heads, "macs")), heads)
