"""How a method chooses its thresholds on the validation split, in phases of their own between those that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from costs.network import NetworkCosts
from inference.calibration import cheapest
from inference.policies import Policy
from inference.predicted import Predicted
from inference.replay import curve, replay
from inference.thresholds import Confidence
from inference.trace import Trace

GRID = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)
LIMIT = 100_000  # combinations


class Choice(Protocol):
    """From the policy so far and a trace of the validation split to the policy from there on."""

    def check(self, costs: NetworkCosts, num_classes: int) -> Policy:
        """A policy like the one that will be chosen.

        Raises:
            ValueError: one cannot be chosen for a network of these costs.
        """

    def __call__(self, policy: Policy, trace: Trace) -> Policy: ...


@dataclass(frozen=True)
class ConfidenceThresholds:
    """λ: given, or of the highest accuracy among all combinations of a grid (Exit Predictor paper, footnote 2).

    Of several that are as accurate, the one with the fewest MACs. (The paper searches on the test set.)

    Args:
        thresholds: one for each early exit, or one for all; None to search.
        grid: λ that are tried for every early exit; of more than 100,000 combinations so many are drawn.

    Raises:
        ValueError: a grid without numbers from 0 to 1.
    """

    thresholds: float | Sequence[float] | None = None
    grid: Sequence[float] = GRID

    def __post_init__(self) -> None:
        grid = self.grid if isinstance(self.grid, list | tuple) else ()
        if not grid or not all(type(value) in (int, float) and 0 <= value <= 1 for value in grid):
            raise ValueError(
                f"Expected choice.grid to be a list of confidence thresholds from 0 to 1, got {self.grid}."
            )

    def check(self, costs: NetworkCosts, num_classes: int) -> Confidence:
        if len(costs.heads) < 2:
            raise ValueError("Expected an early exit to choose a confidence threshold for, got none.")
        policy = Confidence(self.grid[0] if self.thresholds is None else self.thresholds)
        policy.check(costs, num_classes)
        return policy

    def __call__(self, policy: Policy, trace: Trace) -> Confidence:
        if self.thresholds is not None:
            return Confidence(self.thresholds)
        seen = curve(Confidence(), self._combinations(trace.num_exits - 1), trace)
        return Confidence().at(cheapest(seen, seen.accuracy == seen.accuracy.max()))

    def _combinations(self, early: int) -> Tensor:
        grid = torch.tensor(list(self.grid), dtype=torch.float64)
        if len(grid) ** early <= LIMIT:
            return torch.cartesian_prod(*[grid] * early).view(-1, early)
        drawn = torch.randint(len(grid), (LIMIT, early), generator=torch.Generator().manual_seed(0))
        return torch.cat([grid[:, None].expand(-1, early), grid[drawn]])


@dataclass(frozen=True)
class PredictionThresholds:
    """γ: given, or those with the fewest MACs on the device while few more samples reach the last exit.

    The rule of figure 7 of the Exit Predictor paper: less than 2 % additional samples, of all samples, beyond those
    that reach it with the same λ and every head computed.

    Args:
        prediction: one for each early exit, or one for all; None to choose.
        more: share of all samples.
        points: combinations that are tried, about.

    Raises:
        ValueError: a share that is not above 0 and at most 1, or no point; on use, a policy of another kind than λ.
    """

    prediction: float | Sequence[float] | None = None
    more: float = 0.02
    points: int = 10_000

    def __post_init__(self) -> None:
        if isinstance(self.more, bool) or not isinstance(self.more, int | float) or not 0 < self.more <= 1:
            raise ValueError(f"Expected choice.more, a share of the samples, above 0 and at most 1, got {self.more}.")
        if type(self.points) is not int or self.points < 1:
            raise ValueError(f"Expected choice.points of at least 1, got {self.points}.")

    def check(self, costs: NetworkCosts, num_classes: int) -> Predicted:
        policy = Predicted(0.5, 0.5 if self.prediction is None else self.prediction)
        policy.check(costs, num_classes)
        return policy

    def __call__(self, policy: Policy, trace: Trace) -> Predicted:
        if not isinstance(policy, Confidence):
            raise ValueError(f"Expected confidence thresholds to choose γ for, got policy {policy.name}.")
        lambdas = policy.each(trace.num_exits)
        if self.prediction is not None:
            return Predicted(lambdas, self.prediction)
        family = Predicted(lambdas)
        seen = curve(family, family.candidates(trace, self.points), trace)
        reaching = replay(Confidence(lambdas), trace).prediction.exit == trace.num_exits
        few = seen.shares[:, -1] - reaching.double().mean() < self.more - 1e-12
        return family.at(cheapest(seen, few, "device_macs"))
