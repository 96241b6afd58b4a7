"""Replay: any policy, or a hundred thousand of them, on a trace, without running the network again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from inference.budget import Budget
from inference.policies import Policy
from inference.predicted import Predicted
from inference.thresholds import Thresholds
from inference.trace import Trace
from inference.travel import Prediction, answers, travel

Value = TypeVar("Value", float, Tensor)

BLOCK = 2**21  # elements of a block of points x samples


class Outcome(NamedTuple):
    """One operating point on a trace of N exits.

    Attributes:
        prediction: what became of each sample.
        heads: (N, samples) bool, whether each head was computed for it.
        predicted: whether the Exit Predictor was asked.
    """

    prediction: Prediction
    heads: Tensor
    predicted: bool = False

    def cost(self, trace: Trace, kind: str = "macs") -> Tensor:
        """(samples,) int64, energy float64: spent on each sample; of a kind of ``kinds``."""
        return spent(trace, self.prediction.exit, self.heads, kind, self.predicted)


def kinds(conventions: Iterable[str]) -> list[str]:
    """Costs that are known: in each convention all (``macs``) and what is spent on the device (``device_macs``)."""
    names = list(conventions)
    return [*names, *(f"device_{name}" for name in names)]


def with_parts(costs: Mapping[str, Value]) -> dict[str, Value]:
    """Costs by kind with what is spent on the server (``server_macs``), where two machines share a cost.

    What is sent is neither's; of the latency that is not the device's a part is the link's.
    """
    found = {}
    for name in (name for name in costs if not name.startswith("device_")):
        found[name] = costs[name]
        if name != "sent_bytes":
            found[f"device_{name}"] = costs[f"device_{name}"]
        if name not in ("sent_bytes", "latency_ms"):
            found[f"server_{name}"] = costs[name] - costs[f"device_{name}"]
    return found


def spent(trace: Trace, exit: Tensor, heads: Tensor, kind: str, predicted: bool = False) -> Tensor:
    """Cost (samples,) of leaving at ``exit`` (samples,), from 1, with the ``heads`` (N, samples) that were computed.

    Args:
        kind: one of ``kinds``.
        predicted: whether the Exit Predictor was asked.
    """
    convention = kind.removeprefix("device_")
    costs, segments, own = trace.costs[convention], trace.segments[convention], trace.heads[convention] * heads
    if kind != convention and costs.device_ends is not None:  # of those that cross the cut, up to it
        segments = torch.cat([segments[:-1], torch.full_like(segments[-1:], costs.to_cut)])
        own = own[:-1]
    return segments.cumsum(0).gather(0, exit[None] - 1)[0] + own.sum(0) + predicted * costs.predictor


class TraceWay:
    """What a trace remembers of the samples' way."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.rows = torch.arange(len(trace))
        self.computed = torch.zeros(trace.num_exits, len(trace), dtype=torch.bool)
        self.predicted = False

    def predict(self) -> tuple[Tensor, float]:
        assert self.trace.predictions is not None  # or the policy's check would have refused
        self.predicted = True
        return self.trace.predictions[:, self.rows].T, self.trace.costs["macs"].predictor

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
    return Outcome(prediction, way.computed, way.predicted)


@dataclass(frozen=True)
class Curve:
    """P operating points of one family on a trace of N exits.

    Attributes:
        values: (P, D) float64, what tells them apart.
        accuracy: (P,) float64, from 0 to 1.
        costs: by kind, (P,) float64, average of an image.
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
    if isinstance(inner, Thresholds) and not (inner is not policy and isinstance(inner, Predicted)):
        farthest = inner.farthest(trace.num_exits)
        longest = replay(replace(policy, within=farthest) if isinstance(policy, Budget) else farthest, trace)
        return _as_curve(values, _threshold_sums(inner, values, trace, longest), trace)
    sums = [_sums(replay(policy.at(row), trace), trace) for row in values.tolist()]
    return _as_curve(values, torch.stack(sums), trace)


def _columns(trace: Trace, exit: Tensor, heads: Tensor, predicted: bool) -> Tensor:
    """(samples, 2 + kinds) float64 of leaving at ``exit`` (samples,): right, lost, and each cost."""
    right = trace.correct.gather(0, exit[None] - 1)[0]
    lost = trace.correct[-1] & ~right
    costs = [spent(trace, exit, heads, kind, predicted) for kind in kinds(trace.costs)]
    return torch.stack([right, lost, *costs], 1).double()


def _sums(outcome: Outcome, trace: Trace) -> Tensor:
    """Of one point: the sums of ``_columns``, then how many leave at each exit."""
    exit = outcome.prediction.exit
    counts = torch.bincount(exit - 1, minlength=trace.num_exits).double()
    return torch.cat([_columns(trace, exit, outcome.heads, outcome.predicted).sum(0), counts])


def _threshold_sums(rule: Thresholds, values: Tensor, trace: Trace, longest: Outcome) -> Tensor:
    """The sums of ``_sums`` (P, 2 + kinds + N), a block of points at a time.

    Everybody is taken to go as far as can be with all heads computed, and what leaving at an earlier exit or passing a
    head by changes is added.

    Args:
        longest: with thresholds that nobody passes: a budget may end a sample's way, or leave heads out, even then.
    """
    samples, early = len(trace), trace.num_exits - 1
    whole = _worth(trace, longest.prediction.exit, longest.heads, longest.predicted)
    exits = [_AtExit(k, score, trace, longest, whole) for k, score in enumerate(rule.scores(trace), start=1)]
    sums = whole.sum(0).repeat(len(values), 1)
    thresholds = values.float()
    step = max(1, BLOCK // samples)
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        on_the_way = torch.ones(len(thresholds[rows]), samples, dtype=torch.bool)
        for k, exit in enumerate(exits):
            leaves = rule.passes(exit.score, thresholds[rows, k : k + 1]) & exit.may
            if isinstance(rule, Predicted):
                assert trace.predictions is not None
                wanted = trace.predictions[k] >= thresholds[rows, early + k : early + k + 1]
                sums[rows] -= (on_the_way & ~wanted).double() @ exit.head
                leaves &= wanted
            sums[rows] += (leaves & on_the_way).double() @ exit.gain
            on_the_way &= ~leaves
    return sums


class _AtExit:
    """What an early exit k changes for each sample.

    Attributes:
        score: (samples,), what thresholds are compared with.
        may: (samples,) bool, whether it can leave here at all.
        gain: (samples, columns of sums) of leaving here rather than going on.
        head: (samples, columns of sums) of computing the head.

    Args:
        whole: (samples, columns of sums) of going as far as ``longest``.
    """

    def __init__(self, k: int, score: Tensor, trace: Trace, longest: Outcome, whole: Tensor):
        end, heads, predicted = longest.prediction.exit, longest.heads, longest.predicted
        self.score, self.may = score, heads[k - 1] & (end > k)
        computed, others = torch.arange(trace.num_exits) < k, torch.arange(trace.num_exits) != k - 1
        here = torch.full_like(end, k)
        self.gain = _worth(trace, here, heads & computed[:, None], predicted) - whole
        self.head = whole - _worth(trace, end, heads & others[:, None], predicted)


def _worth(trace: Trace, exit: Tensor, heads: Tensor, predicted: bool) -> Tensor:
    """What a sample that leaves at ``exit`` adds to the sums: (samples, columns of sums)."""
    here = torch.nn.functional.one_hot(exit - 1, trace.num_exits).double()
    return torch.cat([_columns(trace, exit, heads, predicted), here], 1)


def _as_curve(values: Tensor, sums: Tensor, trace: Trace) -> Curve:
    names, samples = kinds(trace.costs), len(trace)
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
    return _foreseen(trace, replay(policy.with_foresight, trace).prediction.exit)


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
    costs = (spent(trace, exit, heads, kind) for kind in ("macs", "device_macs"))
    return Outcome(Prediction(label, confidence, exit, *costs), heads)
