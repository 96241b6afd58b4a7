"""Parts that tests name in a config: a network in which the gradient of a batch is the mean of its images' gradients
(no BatchNorm, no dropout), and callbacks."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from networks.backbones.vgg import ConvUnit
from networks.chain import Chain, initialize


def tiny(num_classes: int, input_shape: Sequence[int] = (3, 32, 32)) -> Chain:
    """Three convolutions."""
    blocks = [
        ConvUnit(input_shape[0], 8, norm=False, pool=True),
        ConvUnit(8, 12, norm=False),
        ConvUnit(12, 12, norm=False),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes))
    chain = Chain(nn.Identity(), blocks, head, [1, 2], input_shape, num_classes)
    initialize(chain)
    return chain


class Threads(pl.Callback):
    """Notes in the run directory how many threads the run has."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (Path(trainer.default_root_dir) / "threads.txt").write_text(str(torch.get_num_threads()))


class Death(pl.Callback):
    """Kills the process of the job whose number is in the environment."""

    def begin_run(self, config: dict[str, Any]) -> None:
        if os.environ.get("DIES") == str(config["job"]["number"]):
            os.kill(os.getpid(), signal.SIGKILL)
