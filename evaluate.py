"""Evaluates trained runs, thresholds to accuracy-cost curves: ``python evaluate.py --help``."""

from __future__ import annotations

import datetime
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from running.command_line import Refused, refusing_bad_input, run_main
from running.interruption import Stopped, end_stopped, stop, stopping

if TYPE_CHECKING:
    from evaluation.results import Plan, Result
    from evaluation.tracing import Images, Machine

CONF = Path(__file__).parent / "evaluation" / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """One evaluation."""
    try:
        with stopping():
            evaluate(cfg)
    except Refused as error:
        stop(str(error))
    except Stopped as stopped:
        end_stopped(stopped)


def evaluate(cfg: DictConfig) -> Path:
    """Loads the runs, traces validation and test, chooses operating points, and writes the results.

    Returns:
        The folder of the results.

    Raises:
        Refused: for what cannot be evaluated, before any data is read; for what goes wrong with the data, when it does.
    """
    # torchvision and fvcore still script functions when they are imported; matplotlib tells of its fonts
    warnings.filterwarnings("ignore", r"`torch\.jit\..*` is deprecated", FutureWarning)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # imported here, so that --help and --cfg job need not wait for torch
    from rich.console import Console

    from evaluation.assembly import build_plan, check, results_folder
    from evaluation.report import printed
    from evaluation.results import evaluate as evaluated
    from evaluation.runs import find_runs, load_runs
    from evaluation.tracing import SPLITS, Machine, images_of, trace

    with refusing_bad_input():
        plan, machine = build_plan(cfg), Machine(cfg.accelerator, cfg.precision)
        runs = load_runs(find_runs(cfg.run, cfg.runs))
        check(runs, plan)
        folder = results_folder(cfg, runs, datetime.datetime.now())
        images = images_of(runs, cfg.root, cfg.batch_size)
        results = []
        for run, source in zip(runs, images, strict=True):
            val, test = (trace(run, split, source, machine, cfg.retrace) for split in SPLITS)
            results.append(evaluated(run, val, test, plan))
        leave(results, plan, images if cfg.latency else None, machine, folder)
    Console().print(printed(results, plan))
    print(f"Results: {folder}")
    return folder


def leave(results: list[Result], plan: Plan, images: list[Images] | None, machine: Machine, folder: Path) -> None:
    """Writes curve, table, summary and figures, and sends them to W&B for the runs that are there.

    Args:
        images: to measure times on; None not to.
    """
    import pandas as pd

    from evaluation import report
    from evaluation.latency import measure, spaced
    from evaluation.pictures import draw, latency_picture, pictures
    from evaluation.upload import upload

    folder.mkdir(parents=True, exist_ok=True)
    figures = list(pictures(results, plan))
    tables, full = [], {}
    for i, result in enumerate(results):
        times = None
        if images is not None and result.curve is not None:
            rows = spaced(result.front.tolist(), result.curve.costs["macs"], result.test.costs["macs"].backbone)
            policies = [plan.policy.at(result.curve.values[row].tolist()) for row in rows]
            measured, full[result.run.label] = measure(
                result.run, policies, list(result.temperatures), images[i], machine
            )
            times = dict(zip(rows, measured, strict=True))
            figures.append((f"latency_{i}", latency_picture(result, times, full[result.run.label])))
        tables.append(report.curve_rows(result, plan, times))
    report.write(folder, "curve.csv", pd.concat(tables).to_csv(index=False, lineterminator="\n"))
    report.write(folder, "table.md", report.markdown(results, plan))
    report.write_summary(folder, report.summary(results, plan, full))
    drawn = draw(iter(figures), folder)
    upload(results, plan, drawn, folder)


if __name__ == "__main__":
    run_main(main, CONF)
