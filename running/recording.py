"""The trace of the validation split in the middle of a run, on the devices and in the precision that it trains with."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from costs.network import network_counts
from datamodules.image_data import ImageData
from inference.trace import Trace, as_decided, assembled, joined
from lightning_modules.classifier import Frozen
from networks.early_exit_network import EarlyExitNetwork

Batches = list[dict[str, Any]]


class Outputs(pl.Callback):
    """Keeps what the network says of each batch."""

    def __init__(self) -> None:
        self.batches: Batches = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:  # type: ignore[no-untyped-def]
        logits = torch.stack([z.float() for z in outputs["logits"]])
        known = {"logits": logits, "labels": outputs["labels"], "scores": outputs.get("scores")}
        kept: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in known.items()}
        self.batches.append(kept | {"decisions": [as_decided(d) for d in [outputs.get("decisions")] if d is not None]})


def record_validation(network: EarlyExitNetwork, data: ImageData, trainer: pl.Trainer, seen: Outputs) -> Trace:
    """One pass over the validation split.

    Args:
        trainer: with ``seen`` among its callbacks.
    """
    trainer.validate(Frozen(network), datamodule=data, verbose=False)
    batches = _of_all_processes(seen.batches)
    scores = None
    if network.predictor is not None:
        scores = torch.cat([batch["scores"] for batch in batches]).T.contiguous()
    costs = network_counts(network)
    logits: Tensor = torch.cat([batch["logits"] for batch in batches], 1)
    decisions = joined([decided for batch in batches for decided in batch["decisions"]])
    return assembled(logits, torch.cat([batch["labels"] for batch in batches]), costs, scores, decisions=decisions)


def _of_all_processes(batches: Batches) -> Batches:
    if not torch.distributed.is_initialized():
        return batches
    gathered: list[Batches] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, batches)
    return [batch for part in gathered for batch in part]
