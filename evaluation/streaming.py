"""Images that arrive while the bandwidth changes: what thresholds that follow it make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from evaluation import report
from inference.bandwidth import BandwidthTrace, generated, read_bandwidths
from inference.latency_bound import Link
from inference.simulation import Stream, simulate, summarized
from inference.trace import Trace

if TYPE_CHECKING:
    from evaluation.adaptation import Adaptation


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
        mbps = self.bandwidths(low, high).mbps
        if outside == "refuse" and (mbps.min() < low or mbps.max() > high):
            raise ValueError(
                f"Expected bandwidths from {low:g} to {high:g} Mbit/s, for which there are thresholds, {self.trace} "
                f"has {mbps.min():g} to {mbps.max():g}; give other adaptation.intervals, or adaptation.outside=nearest."
            )


def streamed(found: Adaptation, test: Trace, settings: Streaming) -> dict[str, Stream]:
    """What becomes of the images with thresholds that follow the bandwidth, and with those that do not, by method.

    Args:
        test: trace of the run, priced.
    """
    from evaluation.adaptation import EE, EE_ADAPTIVE, EE_EP, EE_EP_ADAPTIVE

    bandwidths = settings.bandwidths(found.bandwidths[0], found.bandwidths[-1])
    link = Link(found.link.sent, found.link.delay_ms)
    streams = {}
    for method in (found.method(EE_EP_ADAPTIVE, EE_ADAPTIVE), found.method(EE_EP, EE)):
        policy_of = method.policy_of
        assert policy_of is not None
        priced = test.costs["latency_ms"].link
        streams[method.name] = simulate(
            policy_of, test, bandwidths, settings.images_per_s, link, priced, settings.lag_s, settings.seed
        )
    return streams


def write(found: Adaptation, folder: Path) -> list[Path]:
    """``stream.csv``, a row for each image, and ``stream.md``; gives the files."""
    assert found.stream is not None
    tables = [_frame(name, stream) for name, stream in found.streams.items()]
    report.write(folder, "stream.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))
    rows = rows_of(found)
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    text = (
        f"# {found.label}, {found.stream.images_per_s:g} images a second\n\nBandwidth: {found.stream.trace}; τ = "
        f"{found.setting.bound_ms:g} ms. Images do not wait for each other.\n\n{table}\n"
    )
    report.write(folder, "stream.md", text)
    return [folder / "stream.csv", folder / "stream.md"]


def rows_of(found: Adaptation) -> list[dict[str, str]]:
    """Latency, accuracy, exits and what is above the bound, a row for each method."""
    rows = []
    exits = found.exits
    for name, stream in found.streams.items():
        told = summarized(stream, found.setting.bound_ms, exits)
        shares = [f"{100 * told[f'exit_{k}/fraction']:.0f}" for k in range(1, exits + 1)]
        milliseconds = {"mean ms": "latency_ms", **{f"p{p} ms": f"latency_ms/p{p}" for p in (50, 95, 99)}}
        rows.append(
            {
                "method": name,
                "accuracy": f"{100 * told['acc']:.2f} %",
                **{column: f"{told[key]:.2f}" for column, key in milliseconds.items()},
                "share per exit": " / ".join(shares) + " %",
                "images above τ": f"{told['over_bound']:.1%}",
                "seconds above τ on average": f"{told['windows_over_bound']:.1%}",
            }
        )
    return rows


def _frame(name: str, stream: Stream) -> pd.DataFrame:
    columns = {
        "method": name,
        "seconds": stream.arrival_s.tolist(),
        "mbps": stream.bandwidth.tolist(),
        "exit": stream.exit.tolist(),
        "right": stream.right.tolist(),
        "latency_ms": stream.latency_ms.tolist(),
    }
    thresholds = {f"threshold_{k}": column.tolist() for k, column in enumerate(stream.thresholds.T, 1)}
    return pd.DataFrame({**columns, **thresholds})
