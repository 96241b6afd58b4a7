"""Operating points under a bound on the average latency (problem 10 of the Exit Predictor paper), solved by replay.

All images that cross the cut send as many bytes, so that the average latency of an operating point is what it computes
plus the share of its images that cross, times what sending takes at the bandwidth: none needs a replay of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from costs.latency import Link
from inference.predicted import Predicted
from inference.replay import Curve
from inference.thresholds import Confidence
from inference.trace import Trace

SLACK = 1e-9  # ms, of sums in floating point
FEWEST_LEVELS, DRAWN_LEVELS = 4, 16


@dataclass(frozen=True)
class Seen:
    """P operating points on a split.

    Attributes:
        values: (P, D) float64, what tells them apart.
        accuracy: (P,) from 0 to 1.
        computing: (P,) average milliseconds on device and server, none on the link.
        crossing: (P,) share of the images that cross the cut.
    """

    values: Tensor
    accuracy: Tensor
    computing: Tensor
    crossing: Tensor

    @classmethod
    def of(cls, curve: Curve, link_ms: float) -> Seen:
        """From a curve whose ``latency_ms`` has ``link_ms`` for each image that crosses."""
        crossing = curve.shares[:, -1]
        return cls(curve.values, curve.accuracy, curve.costs["latency_ms"] - crossing * link_ms, crossing)

    def latency(self, link: Link, bandwidths: float | Sequence[float]) -> Tensor:
        """(P,) average milliseconds of an image (equation 11) at one bandwidth, or each point at its own; Mbit/s."""
        if not isinstance(bandwidths, Sequence):
            return self.computing + self.crossing * link.ms(bandwidths)
        sending = torch.tensor([link.ms(mbps) for mbps in bandwidths], dtype=torch.float64)
        return self.computing + self.crossing * sending

    def joined(self, other: Seen) -> Seen:
        """These points and others of the same family."""
        return Seen(*(torch.cat([getattr(self, part.name), getattr(other, part.name)]) for part in fields(self)))

    def rows(self, index: Tensor) -> Seen:
        """Some of the points."""
        return Seen(self.values[index], self.accuracy[index], self.computing[index], self.crossing[index])


def optima(seen: Seen, link: Link, bound_ms: float, bandwidths: Sequence[float]) -> Tensor:
    """For each bandwidth in Mbit/s, the most accurate point within the bound, of several that of the least latency.

    Returns:
        (B,) int64, rows of ``seen``.

    Raises:
        ValueError: a bandwidth at which no point is within the bound.
    """
    found = []
    for bandwidth in bandwidths:
        best = within(seen, link, bound_ms, bandwidth)
        if best is None:
            raise ValueError(
                f"Expected a bound that some thresholds keep to, got {bound_ms:g} ms: at {bandwidth:g} Mbit/s the "
                f"smallest average latency possible is {rounded_up(float(seen.latency(link, bandwidth).min()))} ms; "
                "raise co_inference.bound_ms."
            )
        found.append(best)
    return torch.tensor(found)


def within(seen: Seen, link: Link, bound_ms: float, bandwidth_mbps: float) -> int | None:
    """The point of ``optima`` at one bandwidth; None where no point is within the bound."""
    latency = seen.latency(link, bandwidth_mbps)
    index = (latency <= bound_ms + SLACK).nonzero()[:, 0]
    if not len(index):
        return None
    accuracy = seen.accuracy[index]
    best = index[accuracy == accuracy.max()]
    return int(best[latency[best].argmin()])


def rounded_up(ms: float) -> str:
    """Milliseconds in three digits or more, never less than they are: a bound that can be kept to."""
    scale = 10.0 ** max(0, 2 - math.floor(math.log10(ms))) if ms > 0 else 1.0
    return f"{math.ceil(round(ms * scale, 6)) / scale:.10g}"


def fastest(seen: Seen, link: Link, bandwidth_mbps: float) -> int:
    """The point of the least latency, of several the most accurate."""
    latency = seen.latency(link, bandwidth_mbps)
    best = (latency <= latency.min() + SLACK).nonzero()[:, 0]
    return int(best[seen.accuracy[best].argmax()])


def grid(family: Confidence, trace: Trace, points: int) -> Tensor:
    """λ, and γ for a ``Predicted``, all combinations of finite thresholds (P, D): at least ``points`` of them.

    The thresholds lie at equal shares of each exit's scores, and at 0 and 1. Where all combinations of four an exit
    would be more than so many, ``points`` are drawn with a fixed seed.

    Raises:
        ValueError: a family for Exit Predictors, of a trace without one.
    """
    scores = family.scores(trace)
    if isinstance(family, Predicted):
        if trace.predictions is None:
            raise ValueError("Expected a trace with an Exit Predictor's scores, got one without.")
        scores = [*scores, *trace.predictions]
    each = math.ceil(round(points ** (1 / len(scores)), 9))
    if each >= FEWEST_LEVELS:
        return torch.cartesian_prod(*[_levels(score, each) for score in scores]).view(-1, len(scores))
    generator = torch.Generator().manual_seed(0)
    columns = [_levels(score, DRAWN_LEVELS) for score in scores]
    return torch.stack([column[torch.randint(len(column), (points,), generator=generator)] for column in columns], 1)


def _levels(score: Tensor, count: int) -> Tensor:
    ranks = torch.linspace(0, len(score) - 1, count)[1:-1].round().long()
    return torch.cat([torch.zeros(1), score.sort().values[ranks], torch.ones(1)]).double()
