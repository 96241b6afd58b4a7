"""Policies with a threshold for each early exit, on a score of its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from costs.network import NetworkCosts
from inference.policies import Decision, Policy, State

if TYPE_CHECKING:
    from inference.trace import Trace

STEPS = 2000  # of a sequence


@dataclass(frozen=True)
class Thresholds(Policy):
    """Leaves at the first exit whose score passes its threshold.

    Args:
        thresholds: one for each of the N - 1 early exits, or one for all; None for a family.
    """

    thresholds: float | Sequence[float] | None = None
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)  # of a threshold, besides never
    never: ClassVar[float] = math.inf  # a threshold that no score passes
    lower_is_better: ClassVar[bool] = False

    def score(self, logits: Tensor) -> Tensor:
        """(…, C) to (…)."""
        raise NotImplementedError

    def passes(self, score: Tensor, threshold: Tensor | float) -> Tensor:
        """Whether a score is enough to leave, element by element."""
        return score >= threshold

    def each(self, exits: int) -> list[float]:
        """The threshold of each early exit of a network with so many exits.

        Raises:
            ValueError: another number of them, or none.
        """
        return one_each(self.thresholds, exits, "policy.thresholds")

    def check(self, costs: NetworkCosts, num_classes: int) -> None:
        low, high = self.span
        for threshold in self.each(len(costs.heads)):
            if not (low <= threshold <= high or threshold == self.never):
                also = "" if low <= self.never <= high else f" (or {self.never}, never to leave there)"
                raise ValueError(
                    f"Expected thresholds of {self.name} from {low:g} to {high:.4g}{also}, got {threshold}."
                )

    def leaves(self, k: int, logits: Tensor, state: State) -> Decision:
        thresholds = self.thresholds
        threshold = thresholds if isinstance(thresholds, int | float) else (thresholds or ())[k - 1]
        return self.passes(self.score(logits), threshold)

    def candidates(self, trace: Trace, points: int) -> Tensor:
        """Thresholds laid between the scores of each exit.

        Never to leave; one threshold for all exits; the shares of the budgeted-batch protocol; and all combinations of
        quantiles where there are enough points for four an exit, otherwise as many drawn at random, with a fixed seed.
        """
        early = trace.num_exits - 1
        if early == 0:
            return torch.empty(1, 0, dtype=torch.float64)
        shared = self.sequence(trace.num_classes, trace.costs["macs"])
        shared = shared[:: max(1, 8 * len(shared) // points)]  # row 0 is never to leave
        scores = self.scores(trace)
        budgeted = [self.quantiles(scores, 10**x) for x in torch.linspace(-1.3, 1.3, min(53, points)).tolist()]
        levels = math.floor(round(points ** (1 / early), 9))
        columns = [self._levels(score, max(levels, 4)) for score in scores]
        if levels >= 4:
            grid = torch.cartesian_prod(*columns).view(-1, early)
        else:
            generator = torch.Generator().manual_seed(0)
            drawn = [column[torch.randint(len(column), (points,), generator=generator)] for column in columns]
            grid = torch.stack(drawn, 1)
        return torch.cat([shared, torch.tensor(budgeted, dtype=torch.float64), grid])

    def scores(self, trace: Trace) -> list[Tensor]:
        """Of each early exit, (samples,); exit by exit, since the logits of all may fill the memory."""
        return [self.score(logits) for logits in trace.logits[:-1]]

    def quantiles(self, scores: Sequence[Tensor], q: float) -> list[float]:
        """Thresholds with which shares of the samples proportional to q^k leave at exit k, by their rank.

        Args:
            scores: of each early exit, (samples,).
        """
        samples = len(scores[0]) if scores else 0
        shares = torch.tensor([q**k for k in range(1, len(scores) + 2)], dtype=torch.float64)
        # a little more, since 3 may come out as 2.9999999999999996
        counts = (shares / shares.sum() * samples + 1e-9).floor().long().tolist()
        there = torch.ones(samples, dtype=torch.bool)
        thresholds = []
        for score, count in zip(scores, counts, strict=False):
            thresholds.append(self.passed_by(score[there], count))
            there &= ~self.passes(score, thresholds[-1])
        return thresholds

    def _levels(self, score: Tensor, count: int) -> Tensor:
        """Up to ``count`` thresholds: just low enough for equal shares of the samples to pass, and ``never``."""
        ordered = score.sort().values
        ranks = torch.linspace(0, len(ordered) - 1, count - 1).round().long()
        return torch.cat([self._just_passed(ordered[ranks]), torch.tensor([self.never])]).unique().double()

    def passed_by(self, score: Tensor, count: int) -> float:
        """The threshold that the ``count`` best of some scores pass, and those equal to the last of them."""
        if count < 1 or not len(score):
            return self.never
        best = score.sort(descending=not self.lower_is_better).values
        return float(self._just_passed(best[min(count, len(score)) - 1]))

    def _just_passed(self, score: Tensor) -> Tensor:
        """The thresholds that these scores (float32) only just pass."""
        return score

    def farthest(self, exits: int) -> Self:
        """The point of the family at which nobody leaves early and every head is computed."""
        return replace(self, thresholds=[self.never] * (exits - 1))

    def sequence(self, num_classes: int, costs: NetworkCosts) -> Tensor:
        """One threshold for all exits, from ``never`` on; the steps are finer where it is careful."""
        away = 10 ** -torch.linspace(7, 0, STEPS, dtype=torch.float64)
        values = torch.cat([torch.tensor([self.never], dtype=torch.float64), self._away(away, num_classes)])
        return values[:, None].expand(-1, len(costs.heads) - 1)

    def _away(self, steps: Tensor, num_classes: int) -> Tensor:
        """Thresholds at these distances, from 0 to 1, from one that is met by certainty alone."""
        return 1 - steps

    def at(self, values: Sequence[float]) -> Self:
        return replace(self, thresholds=[float(value) for value in values])

    def describe(self) -> dict[str, Any]:
        return {"policy": self.name, "thresholds": self.thresholds}


def one_each(given: float | Sequence[float] | None, exits: int, key: str) -> list[float]:
    """A number for each early exit of a network with so many exits, from one number for all or from one each.

    Args:
        key: what to call it.

    Raises:
        ValueError: another number of them, or none.
    """
    if _is_number(given):
        return [float(given)] * (exits - 1)  # type: ignore[arg-type]
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(map(_is_number, given)):
        raise ValueError(f"Expected {key}: one number, or {exits - 1}, one an early exit; got {given}.")
    if len(given) != exits - 1:
        raise ValueError(
            f"Expected {exits - 1} thresholds, one for each early exit of {exits} exits, as {key}, got {list(given)}."
        )
    return [float(number) for number in given]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Confidence(Thresholds):
    """Leaves when the largest softmax probability is at least λ (equation 2 of the Exit Predictor paper)."""

    name = "confidence"

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1).amax(-1)


@dataclass(frozen=True)
class Margin(Thresholds):
    """Leaves when the two largest softmax probabilities are at least the threshold apart."""

    name = "margin"

    def score(self, logits: Tensor) -> Tensor:
        first, second = logits.softmax(-1).topk(2, -1).values.unbind(-1)
        return first - second


@dataclass(frozen=True)
class Entropy(Thresholds):
    """Leaves when the entropy of the softmax, in nats, is below the threshold (hybrid-network paper, algorithm 1)."""

    name = "entropy"
    span: ClassVar[tuple[float, float]] = (0.0, math.inf)  # above ln C everybody leaves
    never: ClassVar[float] = 0.0
    lower_is_better: ClassVar[bool] = True

    def score(self, logits: Tensor) -> Tensor:
        return torch.special.entr(logits.softmax(-1)).sum(-1)

    def passes(self, score: Tensor, threshold: Tensor | float) -> Tensor:
        return score < threshold

    def _just_passed(self, score: Tensor) -> Tensor:
        return score.nextafter(torch.tensor(math.inf))

    def _away(self, steps: Tensor, num_classes: int) -> Tensor:
        return 1.001 * math.log(num_classes) * steps


def published_entropy(num_classes: int, thresholds: float | Sequence[float] | None = None) -> Entropy:
    """The hybrid-network paper's policy: entropy thresholds of 0.5 for 10 classes and 1.0 for 100 (section III-B).

    Both are the same share of the largest entropy, ln C, and so is the threshold for any other number of classes.

    Args:
        thresholds: others, one for all early exits or one each.
    """
    return Entropy(0.5 * math.log10(num_classes) if thresholds is None else thresholds)
