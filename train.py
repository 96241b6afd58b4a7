"""Trains what a config names and leaves a run directory: ``python train.py --help``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from running.command_line import quiet_libraries, refusing_bad_input, run_main
from running.interruption import is_first
from running.jobs import run_job

if TYPE_CHECKING:
    from running.assembly import Run
    from storage.run_directory import RunDirectory


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def main(cfg: DictConfig) -> float:
    """One run; gives its test accuracy, for Hydra's sweepers."""
    return run_job(train, cfg)


def train(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Builds data, network and phases, trains, tests, and writes the run directory ``folder``.

    A run that is finished there is not run again.

    Returns:
        The test metrics.

    Raises:
        Refused: for what cannot be run, before any data is read; for what goes wrong with the data, the disk or the
            loss, when it does.
    """
    quiet_libraries()
    # imported here, so that --help and --cfg job need not wait for torch
    from rich.console import Console

    from running.course import quiet_lightning
    from running.hardware import keep_freed_memory
    from running.report import result_table
    from storage.run_directory import RunDirectory

    quiet_lightning()
    keep_freed_memory()
    run_dir = RunDirectory(folder)
    with ExitStack() as held:
        with refusing_bad_input():
            if is_first():
                held.enter_context(run_dir.held())
            metrics = run_dir.take_up(cfg)
            run = build(cfg, run_dir) if metrics is None else None
        if run is not None:
            metrics = carry_out(run, cfg, run_dir)
    assert metrics is not None
    if is_first():
        Console().print(result_table(metrics, f"Test split of {cfg.dataset.name}"))
    return metrics


def build(cfg: DictConfig, run_dir: RunDirectory) -> Run:
    """Everything that the config names; the data is read last, when all the rest is known to work."""
    import pytorch_lightning as pl

    from running.assembly import (
        Run,
        build_callbacks,
        build_data,
        build_network,
        build_phases,
        build_policy,
        prepare,
        shaped,
    )
    from running.course import require_choices
    from running.earlier_run import given_by_run, load_weights
    from running.phases import check

    prepare(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg)
    network = build_network(cfg, data.num_classes, data.input_shape)
    load_weights(cfg, network, run_dir)
    network = shaped(cfg, network)
    callbacks, loggers = build_callbacks(cfg.callbacks), build_callbacks(cfg.logger)
    policy, phases = build_policy(cfg, data.num_classes), build_phases(cfg, network)
    require_choices(phases, run_dir)
    processes = check(phases, network, policy, cfg.trainer, given_by_run(cfg))
    data.setup()
    return Run(data, network, policy, phases, callbacks, loggers, processes)


def carry_out(run: Run, cfg: DictConfig, run_dir: RunDirectory) -> dict[str, float]:
    """Trains and tests; the first of several processes writes the files."""
    from networks.packing import packed_state
    from running.assembly import in_memory_format, record
    from running.course import Course
    from running.failures import refusing_failures
    from running.following import following
    from running.processes import processes
    from running.report import write_figures

    in_memory_format(cfg, run.network)
    record(cfg, run.data)
    folder = run_dir.path
    with refusing_failures(folder):
        if is_first():
            run_dir.write_config(cfg)
        with processes(run.processes, folder), following(run.followers, cfg, run.network, folder) as outcome:
            course = Course(
                run.network, run.data, run_dir, cfg.seed, run.policy, cfg.trainer, run.callbacks, run.loggers
            )
            metrics = course.run(run.phases)
            if is_first():
                run_dir.write_network(packed_state(run.network))
                write_figures(metrics, folder, cfg, run.network.chain.stage_lengths)
            outcome.metrics = metrics
        if is_first():
            run_dir.write_metrics(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main)
