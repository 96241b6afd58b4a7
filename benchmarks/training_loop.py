"""Images per second of Offramp's training loop against a bare PyTorch loop with the same step, in one process.

The two take turns, epoch by epoch, so that a machine whose speed drifts slows both; the ratio is of their medians.
Input preparation is timed by itself: its share is of the bare loop's step.

    python -m benchmarks.training_loop backbone=resnet20 method=early_exit
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

from callbacks.metrics_csv import MetricsCSV
from datamodules.image_data import ImageData, Splits, in_channels_last
from networks.quantization import clip_latent_weights
from running.assembly import build_network, build_phases, build_policy, built
from running.course import phase_trainer, quiet_lightning
from running.hardware import pick_precision

ROOT = Path(__file__).parents[1]
IMAGES, BATCH, ROUNDS = 40 * 128, 128, 5


class Noise(ImageData):
    """As many random 32x32 images as make 40 steps; their content does not change the speed."""

    input_shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__(batch_size=BATCH)
        self.class_names = [str(label) for label in range(10)]

    def load(self) -> Splits:
        images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
        data = TensorDataset(in_channels_last(images), torch.randint(10, (IMAGES,)))
        return Splits(data, data, data)


def precision_of(module: pl.LightningModule, precision: str) -> torch.autocast:
    return torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


class Clock(pl.Callback):
    """Seconds from the first batch being asked for to the epoch's checkpoint being written."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.started = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self.started


def offramp_epochs(cfg: DictConfig, data: ImageData, rounds: int, folder: Path) -> Iterator[float]:
    """Seconds of one epoch after another, each its own fit with the seeds, metrics, log and checkpoint of a run."""
    network = build_network(cfg, data.num_classes, data.input_shape).to(memory_format=torch.channels_last)
    phase = replace(build_phases(cfg, network)[0], epochs=1)
    module = phase.make_module(network, build_policy(cfg, data.num_classes))
    options = {**cfg.trainer, "limit_val_batches": 0, "enable_progress_bar": False}
    for i in range(rounds):
        clock = Clock()
        callbacks = [built(cfg.callbacks[name]) for name in ("exit_metrics", "throughput")]
        log = MetricsCSV(folder)
        phase_trainer(phase, i, folder, 0, options, [*callbacks, clock], [log]).fit(module, data)
        yield clock.seconds


def bare_epochs(cfg: DictConfig, data: ImageData, rounds: int) -> Iterator[float]:
    """Seconds of the same epochs in a loop of nothing but the step."""
    network = build_network(cfg, data.num_classes, data.input_shape).to(memory_format=torch.channels_last)
    module = build_phases(cfg, network)[0].make_module(network, build_policy(cfg, data.num_classes))
    module.to("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    optimizer = module.fresh_optimizer()
    images, labels = (tensor.to(module.device) for tensor in data.train_dataloader().dataset.tensors)
    for _ in range(rounds):
        order = torch.randperm(len(labels), device=module.device)
        synchronize()
        start = time.perf_counter()
        for rows in order.split(BATCH):
            x, y = data.on_after_batch_transfer((images[rows], labels[rows]), 0)
            with precision_of(module, cfg.trainer.precision):
                loss = module.loss(module.network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clip_latent_weights(module.network)
        synchronize()
        yield time.perf_counter() - start


def preparation(data: ImageData, rounds: int) -> float:
    """Median seconds in which an epoch's batches are drawn, augmented and normalized, and nothing else."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for batch in data.train_dataloader():
            data.on_after_batch_transfer(batch, 0)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Training:
    """Stands in for the trainer that a datamodule asks whether it is training."""

    training, global_rank, world_size = True, 0, 1


def main() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=sys.argv[1:])
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = pick_precision(cfg.trainer.accelerator)
    quiet_lightning()
    pl.seed_everything(0, verbose=False)
    ours_data, bare_data = Noise(), Noise()
    for data in (ours_data, bare_data):
        data.setup()
    bare_data.trainer = Training()
    with tempfile.TemporaryDirectory() as folder:
        ours = offramp_epochs(cfg, ours_data, ROUNDS + 1, Path(folder))
        pairs = list(zip(ours, bare_epochs(cfg, bare_data, ROUNDS + 1), strict=True))[1:]  # the first warms up
    offramp, loop = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    prepared = preparation(bare_data, ROUNDS)
    table = Table(title=f"{cfg.backbone.name}, {cfg.method.name}, {cfg.trainer.precision}, batch {BATCH}")
    for column in ("", "bare loop", "offramp", "ratio"):
        table.add_column(column, justify="right")
    table.add_row("images/s", f"{IMAGES / loop:.0f}", f"{IMAGES / offramp:.0f}", f"{loop / offramp:.3f}")
    table.add_row("input preparation, share of a step", f"{prepared / loop:.1%}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
