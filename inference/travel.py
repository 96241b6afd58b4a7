"""The one loop of all inference: takes samples along a network, or along a trace of one, until each has left."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from costs.network import NetworkCosts
from inference.policies import Decision, Policy, State
from inference.way import Way


class Prediction(NamedTuple):
    """What became of N samples.

    Attributes:
        label: (N,) int64, the class answered.
        confidence: (N,) float32, its softmax probability.
        exit: (N,) int64, where the sample left, from 1.
        macs: (N,) int64, spent on the sample.
        device_macs: (N,) int64, of these before the cut, the codec's encoder included; all without a cut.
    """

    label: Tensor
    confidence: Tensor
    exit: Tensor
    macs: Tensor
    device_macs: Tensor


class Leaving(NamedTuple):
    """Samples that left together: where in the batch (None: all of it), logits (m, C), exit, MACs (m,) as predicted."""

    rows: Tensor | None
    logits: Tensor
    exit: int
    macs: Tensor
    device_macs: Tensor


def travel(policy: Policy, way: Way, costs: NetworkCosts, count: int, device: torch.device | None = None) -> Prediction:
    """Takes ``count`` samples along a way until each has left.

    Args:
        costs: static, of the network.
        device: where the way computes.
    """
    state = State(costs, torch.zeros(count, dtype=torch.int64, device=device))
    way = _Checked(way)
    policy.begin(way, state)
    gone: list[Leaving] = []
    rows: Tensor | None = None
    for k in range(1, len(costs.heads) + 1):
        last = k == len(costs.heads)
        at_cut = state.spent + costs.to_cut if last and costs.device_ends is not None else None
        state.spent = state.spent + way.advance(k)
        left = _at_exit(policy, way, state, k, last)
        if left is None:
            continue
        leaving, logits, spent = left
        on_device = spent if at_cut is None else at_cut
        if leaving is None:
            gone.append(Leaving(rows, logits, k, spent, on_device))
            break
        gone.append(Leaving(leaving if rows is None else rows.index_select(0, leaving), logits, k, spent, on_device))
        staying = torch.ones(len(state.spent), dtype=torch.bool, device=device).index_fill_(0, leaving, False)
        index = staying.nonzero()[:, 0]
        rows = index if rows is None else rows.index_select(0, index)
        state = state.rows(index)
        way.keep(index)
    way.require_numbers()
    return _joined(gone)


class _Checked:
    """A way that notes which parts gave no numbers; asked once, at its end, since a GPU is waited for each time."""

    def __init__(self, way: Way):
        self.advance, self.keep, self.inner = way.advance, way.keep, way
        self.sums: dict[str, Tensor] = {}

    def predict(self) -> tuple[Tensor, float]:
        scores, cost = self.inner.predict()
        self.sums["the Exit Predictor"] = scores.sum()
        return scores, cost

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor | float]:
        logits, cost = self.inner.head(k, wanted)
        self.sums[f"exit {k}"] = logits.sum()
        return logits, cost

    def require_numbers(self) -> None:
        for part, total in self.sums.items():
            if not math.isfinite(total):
                raise ValueError(
                    f"Expected numbers from {part}, got NaN or infinity; were these weights trained to their end?"
                )


def _at_exit(policy: Policy, way: Way, state: State, k: int, last: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """Who leaves at exit k (None: all), with which logits, having spent what; None where nobody does."""
    some, wanted = (True, None) if last else _chosen(policy.wants(k, state))
    if not some:
        return None
    logits, cost = way.head(k, wanted)
    part = state if wanted is None else state.rows(wanted)
    part.spent = part.spent + cost
    some, leaving = (True, None) if last else _chosen(policy.leaves(k, logits, part))
    if wanted is not None:
        state.put(wanted, part)
    if not some:
        return None
    if leaving is not None:
        logits, part = logits.index_select(0, leaving), part.rows(leaving)
    if wanted is not None:
        leaving = wanted if leaving is None else wanted.index_select(0, leaving)
    return leaving, logits, part.spent


def _chosen(decision: Decision) -> tuple[bool, Tensor | None]:
    """Whether anybody is chosen, and who: an index (m,), None for all."""
    if isinstance(decision, bool):
        return decision, None
    if len(decision) == 1:
        return bool(decision), None
    index = decision.nonzero()[:, 0]
    return len(index) > 0, None if len(index) == len(decision) else index


def _joined(gone: list[Leaving]) -> Prediction:
    """Who left where, in the order of the batch."""
    if gone[0].rows is None:
        return _answers(gone[0])
    order = torch.cat([group.rows for group in gone if group.rows is not None])
    columns = [torch.cat(parts) for parts in zip(*(_answers(group) for group in gone), strict=True)]
    return Prediction(*(torch.empty_like(column).index_copy_(0, order, column) for column in columns))


def _answers(group: Leaving) -> Prediction:
    label, confidence = answers(group.logits)
    return Prediction(label, confidence, torch.full_like(label, group.exit), group.macs, group.device_macs)


def answers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Label (n,) and its softmax probability (n,) of logits (n, C)."""
    # not the softmax's argmax: in fp32 a second probability may be 1, or as large as the largest, too
    return logits.argmax(1), logits.softmax(1).amax(1)
