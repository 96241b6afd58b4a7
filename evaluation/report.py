"""What an evaluation leaves: ``curve.csv``, ``summary.json``, and what the next one needs to know of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from costs.footprint import device_bytes
from evaluation.analysis import accuracy_at, depth_correlation
from evaluation.latency import Latency, Times
from evaluation.results import Plan, Point, Result
from evaluation.tables import numbers, shown_points
from inference.replay import Curve, kinds, with_parts
from storage.files import written_aside


def write_curve(folder: Path, results: Sequence[Result], plan: Plan, times: Mapping[str, Times]) -> None:
    """``curve.csv``, the rows of all runs."""
    nothing = Times({}, Latency({}, {}))
    tables = [curve_rows(result, plan, times.get(result.run.label, nothing).points) for result in results]
    write(folder, "curve.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))


def curve_rows(result: Result, plan: Plan, times: Mapping[int, Latency]) -> pd.DataFrame:
    """A row per operating point of one run: the candidates, then the chosen points.

    Columns: ``run``, ``chosen_on``, ``point``, ``front`` (Pareto-optimal on the calibration split), the policy's,
    ``val/acc`` and ``val/<cost>`` (where that is the calibration split), ``test/acc``, ``test/<cost>`` (``macs``,
    ``device_macs``, ``server_macs``, the same of ``ptflops`` and ``energy_uj``, ``latency_ms``, ``device_latency_ms``,
    ``sent_bytes``), ``test/exit_k/fraction``, and for measured points ``test/ms_batch_1``, ``test/speedup_batch_1``, ….

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
    costs = {
        f"val/{name}": float(cost[i])
        for name, cost in seen.costs.items()
        if name.endswith(("macs", "energy_uj", "latency_ms"))
    }
    return {"val/acc": float(seen.accuracy[i]), **costs}


def _measured(curve: Curve, i: int) -> dict[str, float]:
    costs = _with_server({name: float(cost[i]) for name, cost in curve.costs.items()})
    shares = {f"test/exit_{k}/fraction": share for k, share in enumerate(curve.shares[i].tolist(), 1)}
    return {"test/acc": float(curve.accuracy[i]), **costs, **shares}


def _with_server(costs: Mapping[str, float]) -> dict[str, float]:
    return {f"test/{name}": value for name, value in with_parts(costs).items()}


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
    costs = _with_server({kind: point.outcome.cost(test, kind).double().mean().item() for kind in kinds(test.costs)})
    shares = {f"test/exit_{k}/fraction": share for k, share in enumerate(point.shares, 1)}
    if plan.split == "val" and not math.isnan(point.seen):
        row["val/acc"] = point.seen
    gain = {"test/acc_minus_full": point.gain, "test/acc_minus_full_error": point.gain_error}
    return {**row, "test/acc": point.accuracy, "test/acc_error": point.error, **gain, **costs, **shares}


def summary(results: Sequence[Result], plan: Plan, times: Mapping[str, Times]) -> dict[str, Any]:
    """``summary.json``: what was asked for, and for each run its points, calibration errors and correlations."""
    return {
        "chosen_on": plan.split,
        "cost": plan.cost.title,
        "runs": {result.run.label: _summary(result, plan, times) for result in results},
    }


def _summary(result: Result, plan: Plan, times: Mapping[str, Times]) -> dict[str, Any]:
    before, after = result.ece
    points = {point.chosen.name: _finite(_point(point, result, plan)) for point in shown_points(result)}
    found: dict[str, Any] = {
        "folder": str(result.run.path),
        "device_bytes": device_bytes(result.run.network),
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
        if path.resolve().is_relative_to(folder.resolve()) and path.suffix in (".png", ".svg", ".csv", ".md", ".json"):
            path.unlink(missing_ok=True)


def environment(cfg: DictConfig, device: str) -> dict[str, Any]:
    """What to reproduce an evaluation from: its config, and where it ran."""
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
