"""Replay: any policy, or a hundred thousand of them, on a trace, without running the network again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.executor import Prediction, travel
from inference.policies import Budget, Policy
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
        self.trace, self.k = trace, 0
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
        policy.at([inner.never] * (trace.num_exits - 1)).check(trace.costs["macs"], trace.num_classes)
        exits = _threshold_sums(inner, values, trace, _halts(policy, trace))
        return _as_curve(values, exits, trace)
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


def _halts(policy: Policy, trace: Trace) -> Tensor | None:
    """(N - 1, samples) bool: where a budget ends the way of a sample that paid every head."""
    if not isinstance(policy, Budget) or policy.macs is None:
        return None
    paid, costs = trace.paid(), trace.costs["macs"]
    return torch.stack([policy.halts(k, costs, paid[k - 1]) for k in range(1, trace.num_exits)])


def _threshold_sums(rule: Thresholds, values: Tensor, trace: Trace, halts: Tensor | None) -> Tensor:
    """The sums of ``_sums`` (P, 2 + conventions + N), a block of points at a time.

    Everybody is taken to leave at the last exit, and what leaving at an earlier one changes is added.
    """
    exits, samples = trace.num_exits, len(trace)
    scores = rule.score(trace.logits[:-1])
    each = [_worth(trace, k) for k in range(1, exits + 1)]
    sums = each[-1].sum(0).repeat(len(values), 1)
    thresholds = values.to(scores.dtype)
    step = max(1, BLOCK // samples)
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        on_the_way = torch.ones(len(thresholds[rows]), samples, dtype=torch.bool)
        for k in range(1, exits):
            leaves = rule.passes(scores[k - 1], thresholds[rows, k - 1 : k])
            if halts is not None:
                leaves = leaves | halts[k - 1]
            sums[rows] += (leaves & on_the_way).double() @ (each[k - 1] - each[-1])
            on_the_way &= ~leaves
    return sums


def _worth(trace: Trace, k: int) -> Tensor:
    """What a sample that leaves at exit k, all heads on its way paid, adds to the sums: (samples, columns of sums)."""
    exit = torch.full((len(trace),), k)
    heads = (torch.arange(1, trace.num_exits + 1) <= k)[:, None].expand(-1, len(trace))
    here = torch.eye(trace.num_exits, dtype=torch.float64)[k - 1].expand(len(trace), -1)
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
    """Knows the label: leaves at the first exit that is right, at exit 1 where none is, and pays only that head.

    No policy is as accurate at a lower cost.
    """
    return _foreseen(trace, trace.correct.int().argmax(0) + 1)


def _foreseen(trace: Trace, exit: Tensor) -> Outcome:
    heads = torch.arange(1, trace.num_exits + 1)[:, None] == exit
    logits = trace.logits[exit - 1, torch.arange(len(trace))]
    confidence, label = logits.softmax(-1).max(-1)
    return Outcome(Prediction(label, confidence, exit, spent(trace, exit, heads, "macs")), heads)
