"""Trains what a config names and leaves a run directory: ``python train.py --help``."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

import hydra
from omegaconf import DictConfig

from running.command_line import refusing_bad_input, run_main
from running.interruption import is_first
from running.jobs import run_job


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
    # torchvision and fvcore still script functions when they are imported
    warnings.filterwarnings("ignore", r"`torch\.jit\..*` is deprecated", FutureWarning)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its fonts when it is imported first
    # imported here, so that --help and --cfg job need not wait for torch
    import pytorch_lightning as pl
    from rich.console import Console

    from running.assembly import (
        build_callbacks,
        build_data,
        build_network,
        build_phases,
        in_memory_format,
        load_weights,
        prepare,
        record,
    )
    from running.failures import refusing_failures
    from running.following import following
    from running.phases import check, quiet_lightning, run_phases
    from running.processes import processes
    from running.report import result_table, write_figures
    from storage.run_directory import RunDirectory

    quiet_lightning()
    run_dir = RunDirectory(folder)
    with ExitStack() as stack:
        with refusing_bad_input():
            if is_first():
                stack.enter_context(run_dir.held())
            metrics = run_dir.take_up(cfg)
            if metrics is None:
                prepare(cfg, folder)
                pl.seed_everything(cfg.seed, verbose=False)
                data = build_data(cfg)
                network = build_network(cfg, data.num_classes, data.input_shape)
                load_weights(cfg.weights, network, run_dir)
                phases = build_phases(cfg, network)
                callbacks, loggers = build_callbacks(cfg.callbacks), build_callbacks(cfg.logger)
                count = check(phases, network, cfg.trainer)
                data.setup()
        if metrics is None:
            in_memory_format(cfg, network)
            record(cfg, data)
            with refusing_failures(folder):
                if is_first():
                    run_dir.write_config(cfg)
                stack.enter_context(processes(count, folder))
                with following([*callbacks, *loggers], cfg, network, folder) as outcome:
                    metrics = run_phases(phases, network, data, folder, cfg.seed, cfg.trainer, callbacks, loggers)
                    if is_first():
                        run_dir.write_network(network.state_dict())
                        write_figures(metrics, folder, cfg)
                    outcome.metrics = metrics
                if is_first():
                    run_dir.write_metrics(metrics)
        if is_first():
            Console().print(result_table(metrics, f"Test split of {cfg.dataset.name}"))
    return metrics


if __name__ == "__main__":
    run_main(main)
