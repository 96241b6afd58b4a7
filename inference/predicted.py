"""The policy of the Exit Predictor: no head is computed that is not likely to end the sample's way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from costs.network import NetworkCosts
from inference.policies import Decision, Policy, State
from inference.thresholds import Confidence, one_each

if TYPE_CHECKING:
    from inference.trace import Trace
    from inference.way import Way


@dataclass(frozen=True)
class Predicted(Confidence):
    """Algorithm 1 of the Exit Predictor paper; what it spends on the device is equation 4.

    The predictor sees the image first. Head n is computed where its score s_n ≥ γ_n, and the sample leaves there where
    its confidence c_n ≥ λ_n, too. A row of values has all λ, then all γ.

    Args:
        thresholds: λ, one for each of the N - 1 early exits, or one for all; None for a family.
        prediction: γ, likewise; 0 computes a head for everybody, infinity for nobody.
    """

    prediction: float | Sequence[float] | None = None
    name = "predicted"

    def gammas(self, exits: int) -> list[float]:
        """γ of each early exit of a network with so many exits.

        Raises:
            ValueError: another number of them, or none.
        """
        return one_each(self.prediction, exits, "policy.prediction")

    def check(self, costs: NetworkCosts, num_classes: int) -> None:
        if not costs.predictor:
            raise ValueError(
                "Expected a network with an Exit Predictor for policy=predicted, this one has none; "
                "train it with method=exit_predictor, or choose policy=confidence."
            )
        super().check(costs, num_classes)
        for gamma in self.gammas(len(costs.heads)):
            if not (0 <= gamma <= 1 or gamma == math.inf):
                raise ValueError(
                    f"Expected policy.prediction from 0 to 1 (or inf, never to compute the head), got {gamma}."
                )

    def overhead(self, costs: NetworkCosts) -> float:
        return costs.predictor

    @property
    def with_foresight(self) -> Policy:
        """The confidence alone: the paper's oracle is misled by no prediction."""
        return Confidence(self.thresholds)

    def begin(self, way: Way, state: State) -> None:
        state.memory["prediction"], macs = way.predict()
        state.spent = state.spent + macs

    def wants(self, k: int, state: State) -> Decision:
        gamma = self.prediction if isinstance(self.prediction, int | float) else (self.prediction or ())[k - 1]
        return state.memory["prediction"][:, k - 1] >= gamma

    def candidates(self, trace: Trace, points: int) -> Tensor:
        """λ and γ together, those that are open: λ as for the confidence alone, γ at quantiles of each exit's scores.

        Where both are open they are drawn at random, with a fixed seed, after the λ with γ = 0, which computes all
        heads. Where λ is set, γ takes all combinations.
        """
        early, exits = trace.num_exits - 1, trace.num_exits
        if self.thresholds is None:
            lambdas = Confidence().candidates(trace, points if self.prediction is not None else max(1, points // 2))
            if self.prediction is not None:
                return self._joined(lambdas, _row(self.gammas(exits)))
            levels = self._levels_of_gamma(trace, max(2, round(points**0.5)))
            gammas = self._drawn(levels, len(lambdas))
            return torch.cat([self._joined(lambdas, torch.zeros(1, early)), self._joined(lambdas, gammas)])
        gammas = _row(self.gammas(exits)) if self.prediction is not None else self.grid(trace, points)
        return self._joined(_row(self.each(exits)), gammas)

    def grid(self, trace: Trace, points: int) -> Tensor:
        """γ (P, N - 1): all combinations of 0, infinity and quantiles of each exit's scores, about so many.

        Of more than so many combinations some are drawn at random, with a fixed seed, after the one that computes all.
        """
        early = trace.num_exits - 1
        count = math.floor(round(points ** (1 / early), 9))
        if count >= 2:
            return torch.cartesian_prod(*self._levels_of_gamma(trace, count)).view(-1, early)
        drawn = self._drawn(self._levels_of_gamma(trace, 5), points)
        return torch.cat([torch.zeros(1, early, dtype=torch.float64), drawn])

    @staticmethod
    def _drawn(levels: Sequence[Tensor], rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.stack([level[torch.randint(len(level), (rows,), generator=generator)] for level in levels], 1)

    @staticmethod
    def _levels_of_gamma(trace: Trace, count: int) -> list[Tensor]:
        assert trace.predictions is not None  # or the policy's check would have refused
        ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
        ranks = torch.linspace(0, len(trace) - 1, count)[1:-1].round().long()
        return [torch.cat([ends, scores.sort().values[ranks].double()]).unique() for scores in trace.predictions]

    @staticmethod
    def _joined(lambdas: Tensor, gammas: Tensor) -> Tensor:
        rows = max(len(lambdas), len(gammas))
        return torch.cat([part.double().expand(rows, -1) for part in (lambdas, gammas)], 1)

    def farthest(self, exits: int) -> Self:
        return replace(self, thresholds=[self.never] * (exits - 1), prediction=[0.0] * (exits - 1))

    def sequence(self, num_classes: int, costs: NetworkCosts) -> Tensor:
        """λ as for the confidence alone, γ as it is set, or 0."""
        exits = len(costs.heads)
        lambdas = Confidence().sequence(num_classes, costs)
        if self.thresholds is not None:
            lambdas = _row(self.each(exits))
        return self._joined(lambdas, _row([0.0] * (exits - 1) if self.prediction is None else self.gammas(exits)))

    def at(self, values: Sequence[float]) -> Self:
        lambdas, gammas = values[: len(values) // 2], values[len(values) // 2 :]
        return replace(self, thresholds=list(map(float, lambdas)), prediction=list(map(float, gammas)))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "prediction": self.prediction}


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor([list(values)], dtype=torch.float64)
