"""Bandwidths over time: recorded ones from a file, or generated ones that look recorded."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.files import written_aside

HEADER = ["seconds", "mbps"]
# of what is generated: good, middle and poor as places between the lowest (0) and the highest (1) logarithm
REGIMES, LASTING_S = (0.82, 0.58, 0.36), (15.0, 50.0)
RETURN_S, WANDER = 4.0, 0.06  # time constant of the walk's way back, and its spread in shares of the same range
FADES_EVERY_S, FADES_LAST_S, FADES_DEPTH = 40.0, (1.0, 4.0), (0.2, 0.4)


@dataclass(frozen=True)
class BandwidthTrace:
    """The bandwidth of a link over time, constant between the times.

    Attributes:
        seconds: (n,) float64, n of at least 2, rising from 0 or later.
        mbps: (n,) float64 above 0, 10⁶ bit/s: ``mbps[i]`` holds from ``seconds[i]`` to ``seconds[i + 1]``, the last one
            until ``end``.

    Raises:
        ValueError: other tensors.
    """

    seconds: Tensor
    mbps: Tensor

    def __post_init__(self) -> None:
        shape, kinds = self.seconds.shape, (self.seconds.dtype, self.mbps.dtype)
        if kinds != (torch.float64,) * 2 or shape != self.mbps.shape or self.seconds.dim() != 1 or shape[0] < 2:
            raise ValueError(
                f"Expected two or more times and as many bandwidths, both (n,) in float64, got {tuple(shape)} in "
                f"{kinds[0]} and {tuple(self.mbps.shape)} in {kinds[1]}."
            )
        if not (self.seconds.isfinite().all() and self.seconds[0] >= 0 and (self.seconds.diff() > 0).all()):
            raise ValueError("Expected times that rise from 0 s or later, got others.")
        if not (self.mbps.isfinite().all() and (self.mbps > 0).all()):
            raise ValueError(f"Expected bandwidths above 0 Mbit/s and finite, got {self.mbps.min():g} at the least.")

    @property
    def start(self) -> float:
        """Seconds."""
        return float(self.seconds[0])

    @property
    def end(self) -> float:
        """Seconds: the last step is taken to be as long as the one before."""
        return float(2 * self.seconds[-1] - self.seconds[-2])

    def at(self, seconds: Tensor) -> Tensor:
        """Mbit/s at these times, of any shape; the first bandwidth before the start, the last one from the end on."""
        return self.mbps[self._step(seconds)]

    def arrival(self, start: Tensor, bits: Tensor | float) -> Tensor:
        """Seconds when so many bits, sent from ``start`` on, have arrived, at the bandwidths they meet on their way.

        The whole link is theirs. Beyond the end the last bandwidth holds, before the start the first.

        Args:
            start: seconds, of any shape.
            bits: as many as ``start``, or one number for all.

        Raises:
            ValueError: fewer than 0 bits.
        """
        start, bits = start.double(), torch.as_tensor(bits, dtype=torch.float64)
        if not (bits >= 0).all():
            raise ValueError(f"Expected at least 0 bits to send, got {float(bits.min()):g}.")
        first = self._step(start)
        rate = 1e6 * self.mbps
        until = self._sent[first] + rate[first] * (start - self.seconds[first]) + bits
        last = (torch.searchsorted(self._sent, until, right=True) - 1).clamp(min=0)
        later = self.seconds[last] + (until - self._sent[last]) / rate[last]
        # the same within one step, where it need not go through sums over the whole trace
        return torch.where(last == first, start + bits / rate[first], later)

    def _step(self, seconds: Tensor) -> Tensor:
        return (torch.searchsorted(self.seconds, seconds.double(), right=True) - 1).clamp(min=0)

    @cached_property
    def _sent(self) -> Tensor:
        """(n,) bits that the link could carry from the start until each time."""
        steps = 1e6 * self.mbps[:-1] * self.seconds.diff()
        return torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])


def read_bandwidths(path: str | Path) -> BandwidthTrace:
    """A trace from a CSV file of the columns ``seconds,mbps``, which its first line names.

    Raises:
        ValueError: no such file, or another one; the line is named.
    """
    rows: list[tuple[float, float]] = []
    last = 1
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            lines = _numbered(file, path)
            last, header = next(lines, (1, []))
            if [cell.strip() for cell in header] != HEADER:
                raise _refused(path, last, f"the header {','.join(HEADER)}", _shown(header))
            for last, cells in lines:
                rows.append(_row(cells, rows[-1][0] if rows else None, path, last))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not text"
        raise ValueError(
            f"Expected a CSV file of bandwidths ({','.join(HEADER)}) at {path}, got: {reason}; give the path of one."
        ) from error
    if len(rows) < 2:
        raise _refused(path, last, "two or more rows by the end,", f"{len(rows)}")
    seconds, mbps = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    return BandwidthTrace(seconds, mbps)


def _numbered(file: io.TextIOBase, path: str | Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise _refused(path, reader.line_num, "comma-separated numbers", str(error)) from error


def _row(cells: list[str], before: float | None, path: str | Path, line: int) -> tuple[float, float]:
    if len(cells) != len(HEADER):
        raise _refused(path, line, "2 cells, seconds and Mbit/s,", f"{len(cells)}")
    try:
        seconds, mbps = map(float, cells)
    except ValueError as error:
        raise _refused(path, line, "numbers", _shown(cells)) from error
    if not (math.isfinite(seconds) and math.isfinite(mbps)):
        raise _refused(path, line, "finite numbers", _shown(cells))
    if not mbps > 0:
        raise _refused(path, line, "a bandwidth above 0 Mbit/s", f"{mbps:g}")
    if seconds < 0:
        raise _refused(path, line, "a time of 0 s or later", f"{seconds:g}")
    if before is not None and not seconds > before:
        raise _refused(path, line, f"a time after the {before!r} s of the row before", f"{seconds!r}")
    return seconds, mbps


def _shown(cells: list[str]) -> str:
    return repr(",".join(cells)[:60])


def _refused(path: str | Path, line: int, expected: str, got: str) -> ValueError:
    return ValueError(f"Expected {expected} in line {line} of {path}, got {got}; correct the file.")


def write_bandwidths(path: str | Path, trace: BandwidthTrace) -> None:
    """The CSV file that ``read_bandwidths`` reads the same numbers from.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([HEADER, *zip(trace.seconds.tolist(), trace.mbps.tolist(), strict=True)])
    with written_aside(path) as file:
        file.write(text.getvalue().encode())


def generated(
    seconds: float = 300, seed: int = 0, low: float = 0.1, high: float = 100.0, step: float = 1.0
) -> BandwidthTrace:
    """Bandwidths that look recorded on the move: made up, the same for the same seed.

    The logarithm is a random walk that returns to a middle (Ornstein-Uhlenbeck, 4 s). The middle is that of a regime,
    good, middle or poor, which lasts 15 to 50 s before another takes its place. Fades of 1 to 4 s, one in 40 s on
    average, take away one to two fifths of the range from low to high. What would leave the range is held at its end.

    Args:
        seconds: length, at least two steps.
        low, high: Mbit/s.
        step: seconds that each bandwidth holds.

    Raises:
        ValueError: an argument outside its range.
    """
    if not (0 < step < math.inf and 2 * step <= seconds < math.inf):
        raise ValueError(f"Expected a step above 0 s and a length of two steps or more, got {step:g} and {seconds:g}.")
    if not 0 < low < high < math.inf:
        raise ValueError(f"Expected bandwidths above 0 Mbit/s, low below high, got {low:g} and {high:g}.")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"Expected a seed of 0 or more, got {seed}.")
    random = np.random.default_rng(seed)
    count = math.floor(seconds / step + 1e-9)  # 0.3 / 0.1 is 2.9999999999999996
    places = _walk(random, _regimes(random, count, step), step) - _fades(random, count, step)
    mbps = np.clip(low * (high / low) ** places, low, high)
    return BandwidthTrace(torch.arange(count, dtype=torch.float64) * step, torch.from_numpy(mbps))


def _regimes(random: np.random.Generator, count: int, step: float) -> np.ndarray:
    middles, regime = np.empty(0), int(random.integers(len(REGIMES)))
    while len(middles) < count:
        steps = math.ceil(random.uniform(*LASTING_S) / step)
        middles = np.concatenate([middles, np.full(min(steps, count), REGIMES[regime])])
        regime = (regime + int(random.integers(1, len(REGIMES)))) % len(REGIMES)
    return middles[:count]


def _walk(random: np.random.Generator, middles: np.ndarray, step: float) -> np.ndarray:
    kept = math.exp(-step / RETURN_S)
    noise = WANDER * math.sqrt(1 - kept**2) * random.standard_normal(len(middles))
    place, places = middles[0], np.empty(len(middles))
    for i, middle in enumerate(middles):
        place = places[i] = middle + kept * (place - middle) + noise[i]
    return places


def _fades(random: np.random.Generator, count: int, step: float) -> np.ndarray:
    depths, time = np.zeros(count), random.exponential(FADES_EVERY_S)
    while time < count * step:
        first, length = int(time / step), random.uniform(*FADES_LAST_S)
        depths[first : first + max(1, round(length / step))] = random.uniform(*FADES_DEPTH)
        time += length + random.exponential(FADES_EVERY_S)
    return depths
