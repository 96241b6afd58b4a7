"""A hard budget, alone or around another policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from costs.network import NetworkCosts
from inference.policies import Decision, Never, Policy, State

if TYPE_CHECKING:
    from inference.trace import Trace
    from inference.way import Way


@dataclass(frozen=True)
class Budget(Policy):
    """A hard limit: halts at the last exit that fits (Dual Dynamic Inference, testing for RADI).

    A sample goes on while a later exit, its segments and head counted at their static cost, still fits, and answers
    where it is otherwise. A head that does not fit is not computed. No sample ever spends more.

    Args:
        macs: MACs an image; None for a family.
        within: policy that may let a sample leave before; None to leave by the budget alone, when the only head
            computed is the one that answers.
    """

    macs: float | None = None
    within: Policy | None = None
    name = "budget"

    @property
    def _inner(self) -> Policy:
        return self.within or Never()

    def check(self, costs: NetworkCosts, num_classes: int) -> None:
        least = min(costs.alone) + self.overhead(costs)
        if isinstance(self.macs, bool) or not isinstance(self.macs, int | float) or not self.macs >= least:
            raise ValueError(f"Expected a budget of at least {least:,} MACs, what one exit costs, got {self.macs}.")
        self._inner.check(costs, num_classes)

    def _halts(self, k: int, state: State) -> Tensor:
        """(n,) bool: no exit after k fits any more."""
        on = min(state.costs.alone[k:]) - sum(state.costs.segments[:k])
        return state.spent + on > self._whole

    @property
    def _whole(self) -> int:
        # torch would compare integers with a float in fp32
        assert self.macs is not None
        return math.floor(min(self.macs, 2**62))

    def overhead(self, costs: NetworkCosts) -> float:
        return self._inner.overhead(costs)

    @property
    def with_foresight(self) -> Policy:
        return replace(self, within=self.within and self.within.with_foresight)

    def begin(self, way: Way, state: State) -> None:
        self._inner.begin(way, state)

    def wants(self, k: int, state: State) -> Decision:
        fits = state.spent + state.costs.heads[k - 1] <= self._whole
        return self._halts(k, state) | (fits & self._inner.wants(k, state))

    def leaves(self, k: int, logits: Tensor, state: State) -> Decision:
        return self._halts(k, state) | self._inner.leaves(k, logits, state)

    def candidates(self, trace: Trace, points: int) -> Tensor:
        return super().candidates(trace, points) if self.macs is None else self._inner.candidates(trace, points)

    def sequence(self, num_classes: int, costs: NetworkCosts) -> Tensor:
        if self.macs is not None:
            return self._inner.sequence(num_classes, costs)
        paid = [cost + self.overhead(costs) for cost in (costs.leaving if self.within else costs.alone)]
        return torch.tensor(sorted(paid, reverse=True), dtype=torch.float64)[:, None]

    def at(self, values: Sequence[float]) -> Self:
        if self.macs is None:
            return replace(self, macs=values[0])
        return replace(self, within=self.within and self.within.at(values))

    def describe(self) -> dict[str, Any]:
        inner = self.within.describe() if self.within else {"policy": self.name}
        return {**inner, "budget": self.macs}
