"""Thresholds that follow the bandwidth: one small regression model an interval (Exit Predictor paper, section IV)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inference.latency_bound import SLACK, Link, Seen, fastest, optima
from inference.predicted import Predicted
from inference.thresholds import Confidence

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


@dataclass(frozen=True)
class AdaptiveThresholds:
    """Operating points of a family, by bandwidth.

    Attributes:
        family: λ alone, or λ and γ.
        intervals: rising, each beginning where the one before ends.
        bound_ms: τ.
        outside: what a bandwidth outside the intervals gets: ``refuse``, or ``nearest``.
    """

    family: Confidence
    intervals: Sequence[Interval]
    bound_ms: float
    outside: str = "refuse"

    def at(self, bandwidth_mbps: float) -> Confidence:
        """The policy for a bandwidth.

        Raises:
            ValueError: one that is not above 0, or outside the intervals.
        """
        return self.family.at(self.values([bandwidth_mbps])[0].tolist())

    @torch.no_grad()
    def values(self, bandwidths: Sequence[float]) -> Tensor:
        """Thresholds (B, D) for bandwidths in Mbit/s; see ``at``."""
        low, high = self.intervals[0].regression.low, self.intervals[-1].regression.high
        for bandwidth in bandwidths:
            if not 0 < bandwidth < math.inf:
                raise ValueError(f"Expected a bandwidth above 0 Mbit/s and finite, got {bandwidth:g}.")
            if self.outside != "nearest" and not low <= bandwidth <= high:
                raise ValueError(
                    f"Expected a bandwidth from {low:g} to {high:g} Mbit/s, for which there are thresholds, got "
                    f"{bandwidth:g}; train an interval for it, or take the nearest with adaptation.outside=nearest."
                )
        given = torch.tensor(list(bandwidths), dtype=torch.float64).clamp(low, high)
        ends = torch.tensor([part.regression.high for part in self.intervals[:-1]], dtype=torch.float64)
        which = torch.searchsorted(ends, given)
        found = torch.empty(len(given), self.width, dtype=torch.float64)
        for i, part in enumerate(self.intervals):
            found[which == i] = part.regression(given[which == i]).clamp(0, 1)
        return found

    @property
    def width(self) -> int:
        """D, how many thresholds."""
        last = self.intervals[0].regression.layers[-1]
        assert isinstance(last, nn.Linear)
        return last.out_features

    @property
    def violation_ms(self) -> float:
        """By how much the bound is exceeded at worst on the split the thresholds were made on."""
        return max(part.violation_ms for part in self.intervals)

    def to_plain(self) -> dict[str, Any]:
        """In plain numbers and words, for JSON."""
        return {
            "policy": self.family.name,
            "bound_ms": self.bound_ms,
            "outside": self.outside,
            "intervals": [
                {
                    "mbps": [part.regression.low, part.regression.high],
                    "margin_ms": part.margin_ms,
                    "violation_ms": part.violation_ms,
                    "layers": [
                        {"weight": layer.weight.tolist(), "bias": layer.bias.tolist()}
                        for layer in part.regression.layers
                        if isinstance(layer, nn.Linear)
                    ],
                }
                for part in self.intervals
            ],
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> AdaptiveThresholds:
        """The thresholds again.

        Raises:
            ValueError: something else.
        """
        try:
            family = {family.name: family for family in (Confidence, Predicted)}[content["policy"]]()
            check_intervals([part["mbps"] for part in content["intervals"]])
            parts = [_interval(part) for part in content["intervals"]]
            return cls(family, parts, float(content["bound_ms"]), _checked_outside(content["outside"]))
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise ValueError(f"Expected thresholds by bandwidth, got something else: {error}.") from error


def _interval(content: Mapping[str, Any]) -> Interval:
    first, last = (
        {name: torch.tensor(value, dtype=torch.float64) for name, value in layer.items()} for layer in content["layers"]
    )
    low, high = content["mbps"]
    regression = Regression(float(low), float(high), len(last["bias"]), len(first["bias"]))
    layers: Any = regression.layers
    layers[0].load_state_dict(first)
    layers[2].load_state_dict(last)
    if not all(parameter.isfinite().all() for parameter in regression.parameters()):
        raise ValueError("weights that are not numbers")
    return Interval(regression, float(content["margin_ms"]), float(content["violation_ms"]))


def fitted(
    family: Confidence,
    seen: Seen,
    replayed: Callable[[Tensor], Seen],
    link: Link,
    bound_ms: float,
    intervals: Sequence[Sequence[float]] = PUBLISHED,
    margin_ms: float | None = None,
    outside: str = "refuse",
) -> AdaptiveThresholds:
    """Trains a regression model for each interval on the optimal thresholds at its bandwidths.

    Between them, too, the models are replayed and held to the bound.

    Args:
        seen: the candidates on the split that thresholds are chosen on.
        replayed: other thresholds (P, D) on that split.
        intervals: Mbit/s that each model is trained at, rising.
        margin_ms: what the optimal thresholds keep below the bound; None for the smallest of a few with which the model
            exceeds the bound nowhere in its interval.

    Raises:
        ValueError: intervals that are not rising, or do not follow each other; a bound that cannot be kept to.
    """
    check_intervals(intervals)
    _checked_outside(outside)
    tried = [margin * bound_ms for margin in MARGINS] if margin_ms is None else [margin_ms]
    parts = []
    for mbps in intervals:
        optima(seen, link, bound_ms, mbps)  # or refused
        best: Interval | None = None
        for margin in tried:
            part = _fit(seen, replayed, link, bound_ms, mbps, margin)
            best = part if best is None or part.violation_ms < best.violation_ms else best
            if best.violation_ms == 0:
                break
        assert best is not None
        parts.append(best)
    return AdaptiveThresholds(family, parts, bound_ms, outside)


def _checked_outside(outside: Any) -> str:
    if outside not in ("refuse", "nearest"):
        raise ValueError(f"Expected adaptation.outside to be refuse or nearest, got {outside}.")
    return outside


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


def _fit(
    seen: Seen, replayed: Callable[[Tensor], Seen], link: Link, bound_ms: float, mbps: Sequence[float], margin: float
) -> Interval:
    best = [_within(seen, link, bound_ms - margin, bandwidth) for bandwidth in mbps]
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
    sending = torch.tensor([link.ms(bandwidth) for bandwidth in between.tolist()], dtype=torch.float64)
    worst = float((points.computing + points.crossing * sending).max()) - bound_ms
    return Interval(regression, margin, worst if worst > SLACK else 0.0)


def _within(seen: Seen, link: Link, bound_ms: float, bandwidth: float) -> int:
    """The best point within a bound, or where none is, the fastest."""
    try:
        return int(optima(seen, link, bound_ms, [bandwidth])[0])
    except ValueError:
        return fastest(seen, link, bandwidth)


def family_of(trace_has_predictor: bool) -> Confidence:
    """λ and γ where there is an Exit Predictor, λ alone otherwise."""
    return Predicted() if trace_has_predictor else Confidence()
