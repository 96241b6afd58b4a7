"""The tables of a sweep, from what its jobs noted and the metrics they left."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from figures.look import save
from figures.sweep import sweep_figure
from storage.files import written_aside

STATE = ["job", "status", "reason"]
UNITS = {"test/energy_uj": 1, "test/latency_ms": 2, "test/sent_bytes": 0}  # decimals
SHOWN = ("test/acc", "test/macs", "test/device_macs", "test/server_macs")


def read_jobs(folder: Path) -> pd.DataFrame:
    """The jobs of a sweep that has ended.

    Returns:
        One row a job: ``job``, ``status``, ``reason``, a column for each override, one for each test metric.
    """
    rows = []
    for path in (folder / ".jobs").glob("*.json"):
        job = json.loads(path.read_text())
        overrides = dict(override.lstrip("+~").split("=", 1) for override in job["overrides"])
        row = {"job": job["number"], "status": job["status"], "reason": job["reason"], **overrides}
        metrics = Path(job["folder"]) / "metrics.json"
        if job["status"] == "finished" and metrics.exists():
            row |= json.loads(metrics.read_text())
        rows.append(row)
    jobs = pd.DataFrame(rows)
    if not jobs.empty:
        silent = jobs.status.isin(["running", "waiting"])
        jobs.loc[silent, "reason"] = "ended without a word, as when it is killed"
        jobs.loc[silent, "status"] = "killed"
    return jobs if jobs.empty else jobs.sort_values("job", ignore_index=True)


def swept(jobs: pd.DataFrame) -> list[str]:
    """The overrides in which the jobs differ, or all of them where there is one job."""
    keys = [name for name in jobs.columns if name not in STATE and not name.startswith("test/")]
    return [key for key in keys if jobs[key].nunique(dropna=False) > 1] or keys


def shown_metrics(jobs: pd.DataFrame, exits: bool = True) -> list[str]:
    """The metrics to look at first: accuracy and MACs as run, then other costs and the accuracy of each exit."""
    first = [name for name in SHOWN if name in jobs]
    if not exits:
        return first
    others = [name for name in UNITS if name in jobs]
    return [*first, *others, *sorted(n for n in jobs if n.startswith("test/exit_") and n.endswith("/acc"))]


def over_seeds(jobs: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and standard deviation (n - 1) of each metric over the finished jobs that differ in their seed alone.

    Returns:
        A row a group: the overrides, ``seeds`` (how many), ``<metric>/mean`` and ``<metric>/std``. None where the seed
        was not swept, or nothing is finished.
    """
    keys = swept(jobs)
    metrics = [name for name in jobs if name.startswith("test/")]
    if "seed" not in keys or jobs.seed.nunique() < 2 or not metrics:
        return None
    groups = [key for key in keys if key != "seed"]
    finished = jobs[jobs.status == "finished"].assign(all="")
    grouped = finished.groupby(groups or ["all"], dropna=False, sort=False)
    table = grouped[metrics].agg(["mean", "std"])
    table.columns = pd.Index([f"{metric}/{statistic}" for metric, statistic in table.columns])
    table.insert(0, "seeds", grouped.size())
    return table.reset_index().drop(columns="all", errors="ignore")


def write_tables(jobs: pd.DataFrame, folder: Path) -> None:
    """Writes the files of a sweep.

    ``sweep.csv`` (all columns), ``sweep.md`` (those to look at), ``sweep_over_seeds.csv`` where seeds were swept, and
    ``sweep.png`` (accuracy against MACs) where a job is finished.
    """
    text = f"# Sweep {folder.name}\n\n{_markdown(_shown(jobs))}\n"
    _write(folder / "sweep.csv", jobs.to_csv(index=False, lineterminator="\n"))
    if (means := over_seeds(jobs)) is not None:
        _write(folder / "sweep_over_seeds.csv", means.to_csv(index=False, lineterminator="\n"))
        text += f"\nMean ± standard deviation over seeds\n\n{_markdown(_plus_minus(means))}\n"
    else:
        (folder / "sweep_over_seeds.csv").unlink(missing_ok=True)
    _write(folder / "sweep.md", text)
    if {"test/acc", "test/macs"} <= set(jobs):
        save(sweep_figure(jobs, swept(jobs), f"Sweep {folder.name}"), folder / "sweep.png")


def print_tables(jobs: pd.DataFrame, folder: Path) -> None:
    """On the terminal, what ``sweep.md`` says without the single exits, and the reasons line by line."""
    console = Console()
    console.print(_rich(_shown(jobs, exits=False).drop(columns="reason", errors="ignore"), f"Sweep {folder}"))
    if (means := over_seeds(jobs)) is not None:
        console.print(_rich(_plus_minus(means, exits=False), "Mean ± standard deviation over seeds"))
    for job in jobs[jobs.reason != ""].itertuples():
        print(f"job {job.job} {job.status}: {job.reason}")


def _shown(jobs: pd.DataFrame, exits: bool = True) -> pd.DataFrame:
    table = jobs[["job", *swept(jobs), "status"]].fillna("")
    for name in shown_metrics(jobs, exits):
        table[_title(name)] = [_number(name, value) for value in jobs[name]]
    return table.assign(reason=jobs.reason) if (jobs.reason != "").any() else table


def _plus_minus(means: pd.DataFrame, exits: bool = True) -> pd.DataFrame:
    keys = [name for name in means if not name.startswith("test/")]
    table = means[keys].copy()
    metrics = [name.removesuffix("/mean") for name in means if name.endswith("/mean")]
    for name in shown_metrics(pd.DataFrame(columns=metrics), exits):
        pairs = zip(means[f"{name}/mean"], means[f"{name}/std"], strict=True)
        table[_title(name)] = [
            "-" if pd.isna(mean) else f"{_number(name, mean)} ± {_number(name, std)}" for mean, std in pairs
        ]
    return table


def _markdown(table: pd.DataFrame) -> str:
    return table.map(lambda cell: str(cell).replace("|", "\\|")).to_markdown(index=False, disable_numparse=True)


def _title(metric: str) -> str:
    return metric.removeprefix("test/")


def _number(metric: str, value: float) -> str:
    if pd.isna(value):
        return "-"
    if metric in UNITS:
        return f"{value:.{UNITS[metric]}f}"
    return f"{value / 1e6:.2f} M" if metric.endswith("macs") else f"{value:.4f}"


def _rich(data: pd.DataFrame, title: str) -> Table:
    table = Table(*map(str, data.columns), title=title, title_justify="left")
    for row in data.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


def _write(path: Path, text: str) -> None:
    with written_aside(path) as file:
        file.write(text.encode())
