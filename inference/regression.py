"""Small regression models from a bandwidth to the best thresholds, and how well they keep to the bound between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from costs.latency import Link
from inference.latency_bound import SLACK, Seen, fastest, within

# section V-C; the third interval is 1 to 100 in the paper's text and 10 to 100 in its points
PUBLISHED = ((0.1, 0.3, 0.5, 0.7, 1.0), (1.0, 3.0, 5.0, 7.0, 10.0), (10.0, 30.0, 50.0, 70.0, 100.0))
HIDDEN, STEPS = 16, 200
BETWEEN = 101  # bandwidths of an interval that are checked
MARGINS = (*(0.005 * step for step in range(21)), 0.15, 0.2, 0.3, 0.4, 0.5)  # of the bound, tried in turn


class Regression(nn.Module):
    """From a bandwidth in an interval to thresholds: two FC layers on its logarithm, with a ReLU between them.

    Args:
        low, high: Mbit/s, ends of the interval.
        outputs: D, how many thresholds.
    """

    def __init__(self, low: float, high: float, outputs: int, hidden: int = HIDDEN):
        super().__init__()
        self.low, self.high = low, high
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).double()

    def bend_at(self, bandwidths: Sequence[float]) -> None:
        """Lets the hidden units set in at these bandwidths: drawn at random, all may miss what lies between them."""
        first: Any = self.layers[0]
        with torch.no_grad():
            places = self._places(torch.tensor(list(bandwidths), dtype=torch.float64))
            first.weight.fill_(1)
            first.bias.copy_(-places.repeat(-(-len(first.bias) // len(places)))[: len(first.bias)])

    def forward(self, bandwidths: Tensor) -> Tensor:
        """Mbit/s (B,) to thresholds (B, D), not yet held within 0 to 1."""
        return self.layers(self._places(bandwidths.double())[:, None])

    def _places(self, bandwidths: Tensor) -> Tensor:
        """-1 at the interval's low end, 1 at its high one."""
        low, high = math.log(self.low), math.log(self.high)
        return (bandwidths.log() - low) / (high - low) * 2 - 1


@dataclass(frozen=True)
class Interval:
    """One regression model, and how far it may be trusted.

    Attributes:
        regression: the model.
        margin_ms: that its training points kept below the bound.
        violation_ms: by how much it exceeds the bound at worst, between its training points too; 0 where it never does.
    """

    regression: Regression
    margin_ms: float
    violation_ms: float


def check_intervals(intervals: Sequence[Sequence[float]]) -> None:
    """Whether regression models can be trained on these bandwidths.

    Raises:
        ValueError: an interval of fewer than two bandwidths, not rising, not above 0, or not next to the one before.
    """
    for i, mbps in enumerate(intervals):
        numbers = isinstance(mbps, Sequence) and all(type(value) in (int, float) for value in mbps)
        if not numbers or len(mbps) < 2 or sorted(set(mbps)) != list(mbps) or not 0 < mbps[0] <= mbps[-1] < math.inf:
            raise ValueError(
                f"Expected each of adaptation.intervals to be two or more rising bandwidths above 0 Mbit/s, got {mbps}."
            )
        if i and intervals[i - 1][-1] != mbps[0]:
            raise ValueError(
                f"Expected each of adaptation.intervals to begin where the one before ends, at {intervals[i - 1][-1]} "
                f"Mbit/s, got {mbps[0]}."
            )
    if not intervals:
        raise ValueError("Expected at least one of adaptation.intervals, got none.")


def fit(
    seen: Seen, replayed: Callable[[Tensor], Seen], link: Link, bound_ms: float, mbps: Sequence[float], margin: float
) -> Interval:
    """Trains a model on the optimal thresholds at some bandwidths, and looks at what it does between them.

    Args:
        seen: the candidates.
        replayed: other thresholds (P, D) on the same split.
        mbps: Mbit/s, rising.
        margin: ms that the optimal thresholds keep below the bound; where none can, the fastest are taken.
    """
    found = {bandwidth: within(seen, link, bound_ms - margin, bandwidth) for bandwidth in mbps}
    best = [fastest(seen, link, bandwidth) if point is None else point for bandwidth, point in found.items()]
    given, wanted = torch.tensor(list(mbps), dtype=torch.float64), seen.values[best]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        regression = Regression(mbps[0], mbps[-1], wanted.shape[1])
        regression.bend_at(mbps[:-1])
    optimizer = torch.optim.LBFGS(regression.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (regression(given) - wanted).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    between = torch.logspace(math.log10(mbps[0]), math.log10(mbps[-1]), BETWEEN, dtype=torch.float64)
    with torch.no_grad():
        points = replayed(regression(between).clamp(0, 1))
    worst = float(points.latency(link, between.tolist()).max()) - bound_ms
    return Interval(regression, margin, worst if worst > SLACK else 0.0)
