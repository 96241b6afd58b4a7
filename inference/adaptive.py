"""Thresholds that follow the bandwidth: one small regression model an interval (Exit Predictor paper, section IV)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from costs.latency import Link
from inference.latency_bound import Seen, optima
from inference.predicted import Predicted
from inference.regression import MARGINS, PUBLISHED, Interval, Regression, check_intervals, fit
from inference.thresholds import Confidence


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
            return cls(family, parts, float(content["bound_ms"]), checked_outside(content["outside"]))
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
    checked_outside(outside)
    tried = [margin * bound_ms for margin in MARGINS] if margin_ms is None else [margin_ms]
    parts = []
    for mbps in intervals:
        optima(seen, link, bound_ms, mbps)  # or refused
        best: Interval | None = None
        for margin in tried:
            part = fit(seen, replayed, link, bound_ms, mbps, margin)
            best = part if best is None or part.violation_ms < best.violation_ms else best
            if best.violation_ms == 0:
                break
        assert best is not None
        parts.append(best)
    return AdaptiveThresholds(family, parts, bound_ms, outside)


def checked_outside(outside: Any) -> str:
    """What a bandwidth outside the intervals gets.

    Raises:
        ValueError: neither ``refuse`` nor ``nearest``.
    """
    if outside not in ("refuse", "nearest"):
        raise ValueError(f"Expected adaptation.outside to be refuse or nearest, got {outside}.")
    return outside
