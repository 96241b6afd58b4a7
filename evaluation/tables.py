"""The points of an evaluation as tables, for a file and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from costs.footprint import device_bytes
from evaluation.cost_axes import COSTS
from evaluation.results import Plan, Point, Result
from inference.policies import Policy

CHOSEN_ON = {"val": "chosen on the validation split", "test": "CHOSEN ON THE TEST SPLIT (calibration.split=test)"}


DEVICE, SERVER = "on the device", "on the server"


def numbers(policy: Policy | None) -> dict[str, Any]:
    """Name and thresholds of a policy in flat columns.

    ``policy``, ``threshold_1``, …, ``prediction_1``, …, ``patience``, ``budget``.
    """
    columns: dict[str, Any] = {}
    for name, value in (policy.describe() if policy else {}).items():
        if name in ("thresholds", "prediction"):
            each = value if isinstance(value, list) else [value]
            columns |= {f"{name.removesuffix('s')}_{k}": threshold for k, threshold in enumerate(each, 1)}
        else:
            columns[name] = value
    return columns


def shown_points(result: Result) -> list[Point]:
    """Of a run, what a table has: fixed exits, points chosen one by one, oracles."""
    return [*result.exits, *result.named, *result.oracles]


def table_rows(result: Result, plan: Plan) -> list[dict[str, str]]:
    """The points to look at, in words: fixed exits, those chosen one by one, and the oracles."""
    full = plan.cost.plain(result.test)
    last = "last exit, gated" if result.gated else "full network alone"
    rows = []
    for point in shown_points(result):
        name = last if point is result.exits[-1] else point.chosen.name
        row = {"run": result.run.label, "point": name, "thresholds": _thresholds(point)}
        rows.append({**row, **_cells(point, full, plan), "note": point.chosen.note})
    return rows


def _cells(point: Point, full: float, plan: Plan) -> dict[str, str]:
    if point.outcome is None:
        columns = (
            "accuracy",
            "minus full",
            f"on {plan.split}",
            plan.cost.title,
            "of full",
            *_parts(plan),
            "share per exit",
        )
        return dict.fromkeys(columns, "-")
    return {
        "accuracy": f"{100 * point.accuracy:.2f} ± {100 * point.error:.2f} %",
        "minus full": f"{100 * point.gain:+.2f} ± {100 * point.gain_error:.2f}",
        f"on {plan.split}": "" if math.isnan(point.seen) else f"{100 * point.seen:.2f} %",
        plan.cost.title: plan.cost.amount(point.cost),
        "of full": f"{100 * point.cost / full:.1f} %" if full else "-",
        **dict(zip(_parts(plan), map(plan.cost.amount, (point.device, point.server)), strict=False)),
        "share per exit": " / ".join(f"{100 * share:.1f}" for share in point.shares) + " %",
    }


def _thresholds(point: Point) -> str:
    columns = numbers(point.chosen.policy)
    columns.pop("policy", None)
    budget = columns.pop("budget", None)
    limit = [] if budget is None else [f"≤ {COSTS['macs'].amount(budget)}"]
    texts = [*map(_threshold, columns.values()), *limit]
    return "" if point.chosen.name.startswith("exit ") else ", ".join(texts)


def _threshold(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "never"
    return f"{value:.3g}" if round(value, 3) != 1 or value == 1 else f"1-{1 - value:.1g}"


def tested_on(results: Sequence[Result]) -> str:
    """Data set and samples."""
    return f"{results[0].run.config.dataset.name}, {len(results[0].test):,} test images"


def title(results: Sequence[Result], plan: Plan) -> str:
    """Data set, samples, and what the points were chosen on."""
    counts = f" ({len(results[0].calibration):,} images)" if plan.split == "val" else ""
    return f"{tested_on(results)}; {CHOSEN_ON[plan.split]}{counts}"


def markdown(results: Sequence[Result], plan: Plan) -> str:
    """``table.md``."""
    table = pd.DataFrame([row for result in results for row in table_rows(result, plan)]).fillna("")
    text = f"# {title(results, plan)}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n"
    series = [result for result in results if result.series]
    if series:
        text += f"\nThe {len(series[0].series)} points of the budgeted-batch protocol are in `curve.csv`.\n"
    held = ", ".join(f"{result.run.label} {device_bytes(result.run.network) / 1e3:,.1f} kB" for result in results)
    return text + f"\nThe device holds: {held}.\n"


def printed(results: Sequence[Result], plan: Plan) -> Table:
    """What fits a terminal of it, its notes below."""
    notes = dict.fromkeys(f"{p.chosen.name}: {p.chosen.note}" for r in results for p in r.named if p.chosen.note)
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "title_justify": "left"}
    table = Table(title=title(results, plan), caption="\n".join(notes), caption_justify="left", **look)
    table.add_column("point", max_width=28)
    axis = plan.cost.title.replace(" on the device", ", dev.")
    for name in ("thresholds", "acc., %", axis, "of full", *_beside(plan), "% leaving"):
        table.add_column(name, no_wrap=name != "thresholds", justify="right")
    for result in results:
        if len(results) > 1:
            table.add_row(f"[b]{result.run.label}")
        points = shown_points(result)
        for row, point in zip(table_rows(result, plan), points, strict=True):
            shares = " ".join(f"{100 * share:.0f}" for share in point.shares)
            ends = point is result.exits[-1] or point is points[-1]
            table.add_row(row["point"], *_cut(row, plan), shares, end_section=ends)
    return table


def _cut(row: Mapping[str, str], plan: Plan) -> list[str]:
    accuracy, share = row["accuracy"].partition(" ±")[0], row["of full"].removesuffix(" %")
    parts = [row[DEVICE] for _ in _beside(plan)]
    return [row["thresholds"].replace(", ", " "), accuracy, row[plan.cost.title], share, *parts]


def _beside(plan: Plan) -> list[str]:
    """What stands beside the axis on a terminal, where that is not of the device alone."""
    return [] if plan.cost == plan.cost.on_device or not _parts(plan) else ["device"]


def _parts(plan: Plan) -> list[str]:
    """The machines that share the cost; what is sent is neither's, and the link takes a part of the latency."""
    kind = plan.cost.whole.kind
    return {"sent_bytes": [], "latency_ms": [DEVICE, "on link and server"]}.get(kind, [DEVICE, SERVER])
