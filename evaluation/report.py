"""What an evaluation leaves: ``curve.csv``, ``table.md``, ``summary.json``, and what it prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from evaluation.analysis import accuracy_at, depth_correlation
from evaluation.latency import Latency, Times
from evaluation.results import Plan, Point, Result
from inference.policies import Policy
from inference.replay import Curve
from storage.files import written_aside

CHOSEN_ON = {"val": "chosen on the validation split", "test": "CHOSEN ON THE TEST SPLIT (calibration.split=test)"}


def numbers(policy: Policy | None) -> dict[str, Any]:
    """Name and thresholds of a policy in flat columns: ``policy``, ``threshold_1``, …, ``patience``, ``budget``."""
    columns: dict[str, Any] = {}
    for name, value in (policy.describe() if policy else {}).items():
        if name == "thresholds":
            each = value if isinstance(value, list) else [value]
            columns |= {f"threshold_{k}": threshold for k, threshold in enumerate(each, 1)}
        else:
            columns[name] = value
    return columns


def write_curve(folder: Path, results: Sequence[Result], plan: Plan, times: Mapping[str, Times]) -> None:
    """``curve.csv``, the rows of all runs."""
    nothing = Times({}, Latency({}, {}))
    tables = [curve_rows(result, plan, times.get(result.run.label, nothing).points) for result in results]
    write(folder, "curve.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))


def curve_rows(result: Result, plan: Plan, times: Mapping[int, Latency]) -> pd.DataFrame:
    """A row per operating point of one run: the candidates, then the chosen points.

    Columns: ``run``, ``chosen_on``, ``point``, ``front`` (Pareto-optimal on the calibration split), the policy's,
    ``val/acc`` and ``val/macs`` (where that is the calibration split), ``test/acc``, ``test/<cost>`` by convention,
    ``test/exit_k/fraction``, and for measured points ``test/ms_batch_1``, ``test/speedup_batch_1``, ….

    Args:
        times: measured, by row of the curve.
    """
    rows: list[dict[str, Any]] = []
    about = {"run": result.run.label, "chosen_on": plan.split}
    if result.curve is not None and result.seen is not None:
        front = set(result.front.tolist())
        for i, values in enumerate(result.curve.values.tolist()):
            row = {**about, "point": "candidate", "front": i in front, **numbers(plan.policy.at(values))}
            rows.append({**row, **_seen(result.seen, i, plan), **_measured(result.curve, i), **_timed(times, i)})
    for point in (*result.exits, *result.points, *result.oracles):
        rows.append({**about, "point": point.chosen.name, **_point(point, result, plan)})
    return pd.DataFrame(rows)


def _seen(seen: Curve, i: int, plan: Plan) -> dict[str, float]:
    if plan.split == "test":
        return {}
    return {"val/acc": float(seen.accuracy[i]), "val/macs": float(seen.costs["macs"][i])}


def _measured(curve: Curve, i: int) -> dict[str, float]:
    costs = {f"test/{name}": float(cost[i]) for name, cost in curve.costs.items()}
    shares = {f"test/exit_{k}/fraction": share for k, share in enumerate(curve.shares[i].tolist(), 1)}
    return {"test/acc": float(curve.accuracy[i]), **costs, **shares}


def _timed(times: Mapping[int, Latency], i: int) -> dict[str, float]:
    if i not in times:
        return {}
    milliseconds = {f"test/ms_batch_{size}": value for size, value in times[i].milliseconds.items()}
    return milliseconds | {f"test/speedup_batch_{size}": value for size, value in times[i].speedup.items()}


def _point(point: Point, result: Result, plan: Plan) -> dict[str, Any]:
    row: dict[str, Any] = {**numbers(point.chosen.policy), "note": point.chosen.note}
    if point.outcome is None:
        return row
    test = result.test
    costs = {f"test/{name}": point.outcome.cost(test, name).double().mean().item() for name in test.costs}
    shares = {f"test/exit_{k}/fraction": share for k, share in enumerate(point.shares, 1)}
    if plan.split == "val" and not math.isnan(point.seen):
        row["val/acc"] = point.seen
    gain = {"test/acc_minus_full": point.gain, "test/acc_minus_full_error": point.gain_error}
    return {**row, "test/acc": point.accuracy, "test/acc_error": point.error, **gain, **costs, **shares}


def table_rows(result: Result, plan: Plan) -> list[dict[str, str]]:
    """The points to look at, in words: fixed exits, those chosen one by one, and the oracles."""
    full = result.exits[-1].cost
    rows = []
    for point in (*result.exits, *result.named, *result.oracles):
        name = "full network alone" if point is result.exits[-1] else point.chosen.name
        row = {"run": result.run.label, "point": name, "thresholds": _thresholds(point)}
        rows.append({**row, **_cells(point, full, plan), "note": point.chosen.note})
    return rows


def _cells(point: Point, full: float, plan: Plan) -> dict[str, str]:
    if point.outcome is None:
        return dict.fromkeys(("accuracy", "minus full", "on val", plan.cost.title, "of full", "share per exit"), "-")
    return {
        "accuracy": f"{100 * point.accuracy:.2f} ± {100 * point.error:.2f} %",
        "minus full": f"{100 * point.gain:+.2f} ± {100 * point.gain_error:.2f}",
        f"on {plan.split}": "" if math.isnan(point.seen) else f"{100 * point.seen:.2f} %",
        plan.cost.title: _amount(point.cost),
        "of full": f"{100 * point.cost / full:.1f} %",
        "share per exit": " / ".join(f"{100 * share:.1f}" for share in point.shares) + " %",
    }


def _amount(number: float) -> str:
    return f"{number / 1e9:.3f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _thresholds(point: Point) -> str:
    columns = numbers(point.chosen.policy)
    columns.pop("policy", None)
    return "" if point.chosen.name.startswith("exit ") else ", ".join(map(_threshold, columns.values()))


def _threshold(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "never"
    return f"{value:.4g}" if round(value, 4) != 1 or value == 1 else f"1 - {1 - value:.1g}"


def title(results: Sequence[Result], plan: Plan) -> str:
    """Data set, samples, and what the points were chosen on."""
    first = results[0]
    counts = f"{len(first.test):,} test images"
    if plan.split == "val":
        return f"{first.run.config.dataset.name}, {counts}; {CHOSEN_ON['val']} ({len(first.calibration):,} images)"
    return f"{first.run.config.dataset.name}, {counts}; {CHOSEN_ON['test']}"


def markdown(results: Sequence[Result], plan: Plan) -> str:
    """``table.md``."""
    table = pd.DataFrame([row for result in results for row in table_rows(result, plan)]).fillna("")
    text = f"# {title(results, plan)}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n"
    series = [result for result in results if result.series]
    if series:
        text += f"\nThe {len(series[0].series)} points of the budgeted-batch protocol are in `curve.csv`.\n"
    return text


def printed(results: Sequence[Result], plan: Plan) -> Table:
    """The same for a terminal, its notes below."""
    rows = [row for result in results for row in table_rows(result, plan)]
    columns = [name for name in rows[0] if name != "note" and not (name == "run" and len(results) == 1)]
    notes = "\n".join(f"{row['point']}: {row['note']}" for row in rows if row["note"])
    table = Table(*columns, title=title(results, plan), title_justify="left", caption=notes, caption_justify="left")
    for row in rows:
        table.add_row(*(row[name] for name in columns), end_section=row["point"] == "full network alone")
    return table


def summary(results: Sequence[Result], plan: Plan, times: Mapping[str, Times]) -> dict[str, Any]:
    """``summary.json``: what was asked for, and for each run its points, calibration errors and correlations."""
    return {
        "chosen_on": plan.split,
        "cost": plan.cost.title,
        "runs": {result.run.label: _summary(result, plan, times) for result in results},
    }


def _summary(result: Result, plan: Plan, times: Mapping[str, Times]) -> dict[str, Any]:
    before, after = result.ece
    points = {
        point.chosen.name: _finite(_point(point, result, plan))
        for point in (*result.exits, *result.named, *result.oracles)
    }
    found: dict[str, Any] = {
        "folder": str(result.run.path),
        "test_images": len(result.test),
        "calibration_images": len(result.calibration),
        "points": points,
        "front": len(result.front),
        "test/acc_within_share_of_full_macs": _finite({str(x): accuracy_at(result, x) for x in (0.25, 0.5, 0.75, 1.0)}),
        "temperatures": list(result.temperatures),
        "test/ece": list(after),
        "test/ece_before_temperature": list(before),
    }
    if correlations := depth_correlation(result.shown, result.test):
        found["spearman_of_exit_and"] = _finite(correlations)
    if result.run.label in times:
        found["full_network_ms"] = times[result.run.label].full.milliseconds
    return found


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
        if value != ""
    }


def write(folder: Path, name: str, text: str) -> None:
    """A file of the evaluation, whole or not at all."""
    with written_aside(folder / name) as file:
        file.write(text.encode())


def write_summary(folder: Path, content: Mapping[str, Any], files: Sequence[Path]) -> None:
    """``summary.json``, with the names of the other files, by which the next evaluation knows them."""
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    write(folder, "summary.json", json.dumps({**content, "files": names}, indent=2, ensure_ascii=False) + "\n")


def clear(folder: Path) -> None:
    """Removes what an earlier evaluation left in the folder, and nothing else."""
    try:
        names = json.loads((folder / "summary.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return
    for name in names:
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()) and path.suffix in (".png", ".svg", ".csv", ".md"):
            path.unlink(missing_ok=True)


def environment(cfg: DictConfig, device: str) -> dict[str, Any]:
    """What to reproduce an evaluation from: its config, and where it ran."""
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
