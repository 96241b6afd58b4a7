"""Policies: what decides, sample by sample, whether to leave at an exit, and whether its head is computed at all.

A policy with its thresholds is an operating point; without them it is a family, of which ``at`` makes points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from costs.network import NetworkCosts

if TYPE_CHECKING:
    from inference.trace import Trace
    from inference.way import Way

Decision = Tensor | bool  # (n,) bool, or the same for all samples


@dataclass
class State:
    """What is known of the n samples that are still on their way; it is compacted with them.

    Attributes:
        costs: static, in MACs; with gates a segment may come to less.
        spent: (n,) int64, MACs so far, the head at hand included once it is computed.
        memory: what the policy remembers of each sample, (n, …) by name.
    """

    costs: NetworkCosts
    spent: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor) -> State:
        """The state of some of the samples."""
        memory = {name: value.index_select(0, index) for name, value in self.memory.items()}
        return State(self.costs, self.spent.index_select(0, index), memory)

    def put(self, index: Tensor, part: State) -> None:
        """Takes over what changed in the state of some of the samples."""
        self.spent = self.spent.index_copy(0, index, part.spent)
        for name, value in part.memory.items():
            self.memory[name] = self.memory[name].index_copy(0, index, value)


class Policy:
    """One interface for all: the executor, replay and calibration know nothing else.

    Exits are numbered from 1; the policy is asked at the early ones, 1 to N - 1, and at N everybody leaves.
    """

    name: str

    def check(self, costs: NetworkCosts, num_classes: int) -> None:
        """Refuses what cannot be executed on a network of these costs.

        Raises:
            ValueError: thresholds of the wrong number or outside their range; thresholds that are not set.
        """

    def overhead(self, costs: NetworkCosts) -> float:
        """MACs it spends on every sample before the network begins."""
        return 0

    @property
    def with_foresight(self) -> Policy:
        """The policy whose exits an oracle foresees."""
        return self

    def begin(self, way: Way, state: State) -> None:
        """Puts into ``state.memory`` what it wants to remember of each sample, and adds what it spends on that."""

    def wants(self, k: int, state: State) -> Decision:
        """Which samples at exit k need its head."""
        return True

    def leaves(self, k: int, logits: Tensor, state: State) -> Decision:
        """Which of the samples that head k was computed for answer with it.

        Args:
            logits: (m, C) float32.
            state: of these m samples; changes to its memory are kept.
        """
        raise NotImplementedError

    def candidates(self, trace: Trace, points: int) -> Tensor:
        """Values (P, D) float64, each row an operating point for ``at``: the family's range, by default its sequence.

        Args:
            trace: gives the scores that thresholds are laid between.
            points: how many, about.
        """
        return self.sequence(trace.num_classes, trace.costs["macs"]).flip(0)

    def sequence(self, num_classes: int, costs: NetworkCosts) -> Tensor:
        """Values (P, D) from the most careful to the least, fixed without a look at any data."""
        return torch.empty(1, 0, dtype=torch.float64)

    def at(self, values: Sequence[float]) -> Self:
        """The operating point of one row of ``candidates``."""
        return self

    def describe(self) -> dict[str, Any]:
        """Name and thresholds, for tables."""
        return {"policy": self.name}


@dataclass(frozen=True)
class FixedExit(Policy):
    """Every sample leaves at one exit, and no head before it is computed.

    Args:
        exit: its number, from 1 to N; None for a family.
    """

    exit: int | None = None
    name = "fixed"

    def check(self, costs: NetworkCosts, num_classes: int) -> None:
        exits = len(costs.heads)
        if type(self.exit) is not int or not 1 <= self.exit <= exits:
            raise ValueError(f"Expected policy.exit to be an exit from 1 to {exits}, got {self.exit}.")

    def wants(self, k: int, state: State) -> Decision:
        return k == self.exit

    def leaves(self, k: int, logits: Tensor, state: State) -> Decision:
        return True

    def sequence(self, num_classes: int, costs: NetworkCosts) -> Tensor:
        return torch.arange(len(costs.heads), 0, -1, dtype=torch.float64)[:, None]

    def at(self, values: Sequence[float]) -> Self:
        return replace(self, exit=int(values[0]))

    def describe(self) -> dict[str, Any]:
        return {"policy": self.name, "exit": self.exit}


@dataclass(frozen=True)
class Never(Policy):
    """Every sample runs the whole backbone; no early head is computed."""

    name = "never"

    def wants(self, k: int, state: State) -> Decision:
        return False

    def leaves(self, k: int, logits: Tensor, state: State) -> Decision:
        return False


@dataclass(frozen=True)
class Patience(Policy):
    """Leaves once so many exits in a row agreed with the one before (Zhou et al., BERT Loses Patience, 2020).

    Args:
        patience: agreements needed, from 1 to N - 1, the latter never leaving early; None for a family.
    """

    patience: int | None = None
    name = "patience"

    def check(self, costs: NetworkCosts, num_classes: int) -> None:
        most = max(1, len(costs.heads) - 1)
        if type(self.patience) is not int or not 1 <= self.patience <= most:
            raise ValueError(f"Expected policy.patience from 1 to {most}, got {self.patience}.")

    def begin(self, way: Way, state: State) -> None:
        state.memory["label"] = torch.full_like(state.spent, -1)
        state.memory["agreed"] = torch.zeros_like(state.spent)

    def leaves(self, k: int, logits: Tensor, state: State) -> Decision:
        label = logits.argmax(1)
        agreed = torch.where(label == state.memory["label"], state.memory["agreed"] + 1, 0)
        state.memory.update(label=label, agreed=agreed)
        assert self.patience is not None
        return agreed >= self.patience

    def sequence(self, num_classes: int, costs: NetworkCosts) -> Tensor:
        return torch.arange(max(1, len(costs.heads) - 1), 0, -1, dtype=torch.float64)[:, None]

    def at(self, values: Sequence[float]) -> Self:
        return replace(self, patience=int(values[0]))

    def describe(self) -> dict[str, Any]:
        return {"policy": self.name, "patience": self.patience}
