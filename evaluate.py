"""Evaluates trained runs, thresholds to accuracy-cost curves: ``python evaluate.py --help``."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from running.command_line import Refused, quiet_libraries, refusing_bad_input, run_main
from running.interruption import Stopped, end_stopped, stop, stopping

if TYPE_CHECKING:
    from evaluation.evaluation import Evaluation

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
        end_stopped(stopped, said="Traces that were finished are kept: the same command goes on from them.")


def evaluate(cfg: DictConfig) -> Path:
    """Loads the runs, traces validation and test, chooses operating points, and writes the results.

    Returns:
        The folder of the results.

    Raises:
        Refused: for what cannot be evaluated, before any data is read; for what goes wrong with the data, when it does.
    """
    quiet_libraries()
    # imported here, so that --help and --cfg job need not wait for torch
    from rich.console import Console

    from evaluation.assembly import (
        build_adaptation,
        build_plan,
        build_settings,
        check,
        chip_of,
        co_inference_of,
        results_folder,
    )
    from evaluation.co_inference import adapt
    from evaluation.co_inference import check as check_adaptation
    from evaluation.evaluation import Evaluation
    from evaluation.hybrid import designs
    from evaluation.on_device import compare
    from evaluation.results import evaluate as evaluated
    from evaluation.runs import find_runs, load_runs
    from evaluation.tables import printed
    from evaluation.traced import traced
    from evaluation.tracing import Machine, images_of
    from running.failures import refusing_failures
    from running.hardware import keep_freed_memory

    keep_freed_memory()
    with refusing_bad_input():
        plan, settings, machine = build_plan(cfg), build_settings(cfg), Machine(cfg.accelerator, cfg.precision)
        runs = load_runs(find_runs(cfg.run, cfg.runs))
        chip, setting = chip_of(runs, cfg.energy, plan.cost), co_inference_of(runs, cfg.co_inference)
        adapting = build_adaptation(cfg)
        check(runs, plan)
        images = images_of(runs, cfg.root, cfg.batch_size)
        if adapting is not None:
            check_adaptation(runs, images, adapting, setting)
        folder = results_folder(cfg, runs, datetime.datetime.now())
        traces = traced(runs, images, chip, setting, machine, cfg.retrace)
        results = [evaluated(*one, plan) for one in traces]
        comparison = compare(results, settings, plan)
        found = designs(runs, [one.test for one in traces], chip)
        adaptation = None if adapting is None else adapt(traces, images, adapting, setting, machine)
    with refusing_failures(folder):
        evaluation = Evaluation(results, comparison, found, chip, adaptation, plan, images, machine)
        leave(evaluation, folder, cfg)
    Console().print(printed(results, plan))
    print(f"Results: {folder}")
    return folder


def leave(found: Evaluation, folder: Path, cfg: DictConfig) -> None:
    """Measures times where they are asked for, writes curve, tables, summary and figures, and sends them to W&B."""
    from evaluation import (
        adaptation_tables,
        hybrid_tables,
        on_device_tables,
        on_device_times,
        report,
        skipping_tables,
        streaming,
        tables,
    )
    from evaluation.latency import measured
    from evaluation.pictures import draw, pictures
    from evaluation.skipping import skippings
    from evaluation.upload import upload

    results, comparison, plan, machine = found.results, found.comparison, found.plan, found.machine
    times = {}
    if cfg.latency:
        for result, source in zip(results, found.images, strict=True):
            times[result.run.label] = measured(result, plan, source, machine)
        if comparison is not None:
            comparison = on_device_times.measured(comparison, results, found.images[0], machine)
    report.clear(folder)
    report.write_curve(folder, results, plan, times)
    report.write(folder, "table.md", tables.markdown(results, plan))
    summary = {**report.summary(results, plan, times), **report.environment(cfg, machine.name)}
    written = [folder / "curve.csv", folder / "table.md"]
    if comparison is not None:
        written += on_device_tables.write(comparison, folder)
        summary["on_device"] = on_device_tables.summary(comparison)
    summary["energy_pj"] = None if found.chip is None else vars(found.chip)
    if found.designs and found.chip is not None:
        written += hybrid_tables.write(found.designs, tables.tested_on(results), found.chip, folder)
        summary["hybrid"] = hybrid_tables.rows(found.designs)
    if any(result.gated for result in results):
        written += skipping_tables.write(results, tables.tested_on(results), folder)
        summary["skipping"] = skipping_tables.rows(skippings(results))
    if found.adaptation is not None:
        written += adaptation_tables.write(found.adaptation, tables.tested_on(results), folder)
        summary["adaptation"] = adaptation_tables.summary(found.adaptation)
        if found.adaptation.streams:
            written += streaming.write(found.adaptation, folder)
            summary["stream"] = streaming.rows_of(found.adaptation)
    drawn = draw(pictures(results, comparison, plan, times, found.designs, found.images, found.adaptation), folder)
    report.write_summary(folder, summary, [*written, *drawn])
    if cfg.wandb:
        upload(results, plan, [path for path in drawn if path.suffix == ".png"], folder)


if __name__ == "__main__":
    run_main(main, CONF)
