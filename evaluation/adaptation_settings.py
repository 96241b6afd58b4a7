"""What is asked for of thresholds that follow the bandwidth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference.adaptive import checked_outside
from inference.bandwidth import BandwidthTrace, generated, read_bandwidths
from inference.regression import check_intervals


@dataclass(frozen=True)
class Streaming:
    """How images arrive.

    Args:
        trace: of the bandwidth: a CSV file, ``generated``, or None for no images.
        seconds: of a generated trace.
        seed: of a generated trace, and of the order of the images.
        images_per_s: that arrive, evenly.
        lag_s: how old what the device knows of the bandwidth is.

    Raises:
        ValueError: a value outside its range.
    """

    trace: str | None = None
    seconds: float = 300
    seed: int = 0
    images_per_s: float = 10
    lag_s: float = 0

    def __post_init__(self) -> None:
        for key, least, strict in (("seconds", 0, True), ("images_per_s", 0, True), ("lag_s", 0, False)):
            value: Any = getattr(self, key)
            number = type(value) in (int, float) and math.isfinite(value)
            if not number or not (value > least if strict else value >= least):
                above = "above" if strict else "of at least"
                raise ValueError(f"Expected adaptation.stream.{key} to be a number {above} {least}, got {value}.")
        if self.trace == "generated" and self.seconds < 2:
            raise ValueError(f"Expected adaptation.stream.seconds of at least 2, got {self.seconds}.")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"Expected adaptation.stream.seed to be a whole number of at least 0, got {self.seed}.")
        if self.trace is not None and not isinstance(self.trace, str):
            raise ValueError(f"Expected adaptation.stream.trace to be generated or a CSV file, got {self.trace}.")

    def bandwidths(self, low: float, high: float) -> BandwidthTrace:
        """The trace: read, or generated between two bandwidths in Mbit/s.

        Raises:
            ValueError: no such file, or another kind of one.
        """
        if self.trace == "generated":
            return generated(self.seconds, self.seed, low, high)
        return read_bandwidths(Path(str(self.trace)).expanduser())

    def check(self, low: float, high: float, outside: str) -> None:
        """Refuses bandwidths that there are no thresholds for.

        Args:
            low, high: Mbit/s that there are.
            outside: ``refuse``, or ``nearest``.

        Raises:
            ValueError: no such trace, or bandwidths outside.
        """
        trace = self.bandwidths(low, high)
        beyond = ((trace.mbps < low) | (trace.mbps > high)).nonzero()[:, 0].tolist()
        if outside == "refuse" and beyond:
            raise ValueError(
                f"Expected bandwidths from {low:g} to {high:g} Mbit/s, for which there are thresholds, {self.trace} "
                f"has {trace.mbps[beyond[0]]:g} at second {trace.seconds[beyond[0]]:g}, and {len(beyond)} such in all; "
                "give other adaptation.intervals, or adaptation.outside=nearest."
            )


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Args:
        static: λ of the static methods, one for all early exits or one each; None for those of the run.
        intervals: Mbit/s that each regression model is trained at.
        margin_ms: see ``inference.adaptive.fitted``.
        outside: likewise.
        points: thresholds that are tried, at least.
        bandwidths: how many are compared, evenly in logarithm over all intervals.
        more: share of the samples that the static γ may send to the last exit beyond those that get there anyway.
        pruned: whether channels of the encoder are pruned in one of the methods.
        stream: of images that arrive while the bandwidth changes.

    Raises:
        ValueError: a value outside its range.
    """

    static: float | Sequence[float] | None
    intervals: Sequence[Sequence[float]]
    margin_ms: float | None = None
    outside: str = "refuse"
    points: int = 100_000
    bandwidths: int = 61
    more: float = 0.02
    pruned: bool = True
    stream: Streaming | None = None

    def __post_init__(self) -> None:
        check_intervals(self.intervals)
        checked_outside(self.outside)
        if type(self.more) not in (int, float) or not 0 < self.more <= 1:
            raise ValueError(f"Expected adaptation.more, a share above 0 and at most 1, got {self.more}.")
        for key, least, most in (("points", 1, 2_000_000), ("bandwidths", 2, 10_000)):
            value = getattr(self, key)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"Expected adaptation.{key} from {least} to {most}, got {value}.")
        margin: Any = self.margin_ms
        if margin is not None and not (type(margin) in (int, float) and 0 <= margin < math.inf):
            raise ValueError(f"Expected adaptation.margin_ms to be at least 0, or null, got {margin}.")
        if not isinstance(self.pruned, bool):
            raise ValueError(f"Expected adaptation.pruned to be true or false, got {self.pruned}.")

    @property
    def compared(self) -> list[float]:
        """Mbit/s, rising."""
        low, high = math.log10(self.intervals[0][0]), math.log10(self.intervals[-1][-1])
        spread = torch.logspace(low, high, self.bandwidths, dtype=torch.float64).tolist()
        return [self.intervals[0][0], *spread[1:-1], self.intervals[-1][-1]]
