"""Images that arrive while the bandwidth changes: what thresholds that follow it make of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from evaluation import report
from evaluation.adaptation_settings import Streaming
from evaluation.along_bandwidth import EE, EE_ADAPTIVE, EE_EP, EE_EP_ADAPTIVE, Adaptation
from inference.bandwidth import write_bandwidths
from inference.simulation import Stream, simulate, summarized
from inference.trace import Trace


def streamed(found: Adaptation, test: Trace, settings: Streaming) -> dict[str, Stream]:
    """What becomes of the images with thresholds that follow the bandwidth, and with those that do not, by method.

    Args:
        test: trace of the run, priced.
    """
    bandwidths = settings.bandwidths(found.bandwidths[0], found.bandwidths[-1])
    streams = {}
    for method in (found.method(EE_EP_ADAPTIVE, EE_ADAPTIVE), found.method(EE_EP, EE)):
        policy_of = method.policy_of
        assert policy_of is not None
        priced = test.costs["latency_ms"].link
        streams[method.name] = simulate(
            policy_of, test, bandwidths, settings.images_per_s, found.link, priced, settings.lag_s, settings.seed
        )
    return streams


def write(found: Adaptation, folder: Path) -> list[Path]:
    """``stream.csv``, a row for each image, ``stream.md``, and the bandwidths; gives the files."""
    assert found.stream is not None
    bandwidths = found.stream.bandwidths(found.bandwidths[0], found.bandwidths[-1])
    write_bandwidths(folder / "stream_bandwidths.csv", bandwidths)
    tables = [_frame(name, stream) for name, stream in found.streams.items()]
    report.write(folder, "stream.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))
    rows = rows_of(found)
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    text = (
        f"# {found.label}, {found.stream.images_per_s:g} images a second\n\nBandwidth: {found.stream.trace}; τ = "
        f"{found.setting.bound_ms:g} ms. Images do not wait for each other.\n\n{table}\n"
    )
    report.write(folder, "stream.md", text)
    return [folder / name for name in ("stream.csv", "stream.md", "stream_bandwidths.csv")]


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
