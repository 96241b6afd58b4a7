"""Trains what a config names and leaves a run directory: ``python train.py --help``."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from running.command_line import Refused, end_job, refusing_bad_input, run_main


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def main(cfg: DictConfig) -> float:
    """One run; gives its test accuracy, for Hydra's sweepers."""
    try:
        metrics = train(cfg, Path(HydraConfig.get().runtime.output_dir))
    except Refused as error:
        end_job(error)
    return metrics["test/acc"]


def train(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Builds data, network and phases, trains, tests, and writes the run directory ``folder``.

    Returns:
        The test metrics.

    Raises:
        Refused: for what cannot be run, before any data is read; for an unreadable image, when it is met.
    """
    # imported here, so that --help and --cfg job need not wait for torch
    import pytorch_lightning as pl
    import torch
    from rich.console import Console

    from datamodules.decoding import UnreadableImage
    from running.assembly import build_data, build_network, build_phases, built, prepare, record
    from running.phases import check, quiet_lightning, run_phases
    from running.report import result_table
    from running.run_directory import RunDirectory

    quiet_lightning()
    run_dir = RunDirectory(folder)
    with refusing_bad_input():
        run_dir.take_up(cfg)
        prepare(cfg, folder)
        pl.seed_everything(cfg.seed, verbose=False)
        data = build_data(cfg)
        network = build_network(cfg, data.num_classes, data.input_shape)
        phases = build_phases(cfg, network)
        callbacks = [built(node) for node in cfg.callbacks.values()]
        loggers = [built(node) for node in (cfg.get("logger") or {}).values()]
        check(phases, network, cfg.trainer)
        data.setup()
    if cfg.channels_last:
        network.to(memory_format=torch.channels_last)
    if cfg.compile:
        network.compile()
        network.chain.compile()
    record(cfg, data)
    run_dir.write_config(cfg)
    try:
        metrics = run_phases(phases, network, data, folder, cfg.seed, cfg.trainer, callbacks, loggers)
    except UnreadableImage as error:
        raise Refused(error.reason()) from error
    run_dir.write_network(network.state_dict())
    run_dir.write_metrics(metrics)
    Console().print(result_table(metrics, f"Test split of {cfg.dataset.name}"))
    return metrics


if __name__ == "__main__":
    run_main(main)
