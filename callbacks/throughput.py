"""Images per second in training."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch


class Throughput(pl.Callback):
    """Logs ``train/images_per_s`` over each epoch, reading of data included, validation not."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.images = 0
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[no-untyped-def]
        self.images += len(batch[1]) * trainer.world_size
        if trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            rate = self.images / (time.perf_counter() - self.started)
            pl_module.log("train/images_per_s", rate, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
