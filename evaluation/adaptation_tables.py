"""Figure 10 as tables, and the thresholds by bandwidth as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation import report
from evaluation.along_bandwidth import EE_ADAPTIVE, EE_EP_ADAPTIVE, EXACT, Adaptation, Method
from inference.latency_bound import SLACK

SHOWN = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # Mbit/s
THRESHOLDS = "adaptive_thresholds.json"


def write(found: Adaptation, title: str, folder: Path) -> list[Path]:
    """``bandwidth.csv``, ``bandwidth.md`` and the thresholds of the regression models; gives the files."""
    report.write(folder, "bandwidth.csv", frame(found).to_csv(index=False, lineterminator="\n"))
    report.write(folder, "bandwidth.md", markdown(found, title))
    models = {method.name: method.regressed.to_plain() for method in found.methods if method.regressed is not None}
    report.write(folder, THRESHOLDS, json.dumps(models, indent=1) + "\n")
    return [folder / name for name in ("bandwidth.csv", "bandwidth.md", THRESHOLDS)]


def frame(found: Adaptation) -> pd.DataFrame:
    """A row for each method and bandwidth."""
    rows: list[dict[str, Any]] = []
    for method in found.methods:
        for i, mbps in enumerate(found.bandwidths):
            row: dict[str, Any] = {"run": found.label, "method": method.name, "mbps": mbps}
            for split, along in (("val", method.val), ("test", method.test)):
                row |= {f"{split}/acc": float(along.accuracy[i]), f"{split}/latency_ms": float(along.latency[i])}
            if method.thresholds is not None:
                row |= {f"threshold_{k}": value for k, value in enumerate(method.thresholds[i].tolist(), 1)}
            if method.channels is not None:
                row["channels"] = int(method.channels[i])
            rows.append(row)
    return pd.DataFrame(rows)


def markdown(found: Adaptation, title: str) -> str:
    """``bandwidth.md``: accuracy and latency at some bandwidths, and how the bound is kept."""
    s = found.setting
    speed = "in fp32, one image at a time" if s.measured else f"{s.device_gflops:g} · 10⁹ {s.convention} a second"
    server = "takes no time" if s.server_gflops is None else f"{s.server_gflops:g} · 10⁹ {s.convention} a second"
    parts = [
        f"# Latency and accuracy along the bandwidth: {found.label}\n",
        f"Device: {s.name}, {speed}; server: {server}; an image that crosses the cut sends {found.link.sent:,.0f} "
        f"bytes; delay of the link {s.delay_ms:g} ms; bound τ = {s.bound_ms:g} ms. {title}. Thresholds are chosen in "
        "validation.\n",
    ]
    columns = _columns(found)
    for name, cell in (("Accuracy on the test split", _accuracy), ("Average latency on the test split, ms", _latency)):
        rows = [
            {"method": m.name, **{f"{found.bandwidths[i]:.3g} Mbit/s": cell(m, i) for i in columns}}
            for m in found.methods
        ]
        parts.append(f"## {name}\n\n{_table(rows)}\n")
    parts.append(f"## The bound\n\n{_table(bounds(found))}\n")
    parts += [f"{line}\n" for line in (*_regressions(found), *found.notes)]
    return "\n".join(parts)


def bounds(found: Adaptation) -> list[dict[str, str]]:
    """How each method keeps the bound: the worst of all bandwidths beyond it, and its mean accuracy."""
    rows = []
    for method in found.methods:
        val, test = found.excess(method)
        rows.append(
            {
                "method": method.name,
                "worst beyond τ in validation, ms": f"{val:+.2f}",
                "worst beyond τ on test, ms": f"{test:+.2f}",
                "bandwidths beyond τ on test": f"{_share_beyond(found, method):.0%}",
                "mean accuracy on test": f"{100 * float(method.test.accuracy.mean()):.2f} %",
            }
        )
    return rows


def _share_beyond(found: Adaptation, method: Method) -> float:
    return float((method.test.latency > found.setting.bound_ms + SLACK).double().mean())


def _regressions(found: Adaptation) -> list[str]:
    """What the models lose against the exact optimum, and the margins they needed."""
    lines = []
    exact = found.method(EXACT)
    for method in found.methods:
        models = method.regressed
        if models is None:
            continue
        margins = ", ".join(f"{part.margin_ms:.2f}" for part in models.intervals)
        lines.append(
            f"{method.name}: margins of {margins} ms; between the training points the bound is exceeded by "
            f"{models.violation_ms:.2f} ms at most in validation."
        )
        if method is found.method(EE_EP_ADAPTIVE, EE_ADAPTIVE):
            gaps = [100 * (getattr(exact, s).accuracy - getattr(method, s).accuracy) for s in ("val", "test")]
            lines.append(
                f"{method.name} is below the exact optimum by {float(gaps[0].mean()):.2f} points of accuracy on "
                f"average and {float(gaps[0].max()):.2f} at most in validation, {float(gaps[1].mean()):.2f} and "
                f"{float(gaps[1].max()):.2f} on test."
            )
    return lines


def summary(found: Adaptation) -> dict[str, Any]:
    """For ``summary.json``."""
    return {
        "run": found.label,
        "co_inference": vars(found.setting),
        "sent_bytes": found.link.sent,
        "methods": {row.pop("method"): row for row in bounds(found)},
    }


def _columns(found: Adaptation) -> list[int]:
    low, high = found.bandwidths[0], found.bandwidths[-1]
    wanted = [mbps for mbps in SHOWN if low <= mbps <= high] or [low, high]
    nearest = {min(range(len(found.bandwidths)), key=lambda i: abs(found.bandwidths[i] / mbps - 1)) for mbps in wanted}
    return sorted(nearest)


def _accuracy(method: Method, i: int) -> str:
    return f"{100 * float(method.test.accuracy[i]):.2f} %"


def _latency(method: Method, i: int) -> str:
    return f"{float(method.test.latency[i]):.2f}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
