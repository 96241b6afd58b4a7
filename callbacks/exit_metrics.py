"""Accuracy of every exit, and what the run's operating point gives: accuracy, cost, and where images leave."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Accuracy, Metric

from callbacks.finite_loss import NonFiniteLoss
from costs.energy import EnergyModel, network_energy
from costs.footprint import device_bytes
from costs.latency import CoInference, network_latency
from costs.network import NetworkCosts, network_counts
from costs.transmission import sent_bytes
from inference.policies import Policy
from inference.predicted import Predicted
from inference.replay import kinds, replay, with_parts
from inference.skips import gated_channels, savings
from inference.thresholds import Confidence, Thresholds
from inference.trace import Trace, as_decided, assembled
from networks.early_exit_network import EarlyExitNetwork


class ExitMetrics(pl.Callback):
    """Logs, in validation and test (``val/…``, ``test/…``):

    - ``exit_k/acc``: accuracy of exit k on all samples;
    - ``exit_k/fraction``: share of the samples that leave at exit k;
    - ``acc``, ``macs``, ``device_macs``, ``server_macs`` (per image, before and behind the cut) under the run's policy;
      at first that is to leave at the first exit whose largest softmax probability is at least the threshold (equation
      2 of the Exit Predictor paper), until a phase of the method chooses another;
    - ``energy_uj`` and its parts, likewise: see ``costs.energy``; ``sent_bytes``, ``latency_ms`` and
      ``device_latency_ms``: see ``costs.transmission`` and ``costs.latency``;
    - in the test, ``exit_k/macs`` and its parts: of leaving at exit k with every head on the way computed; the
      policy's ``exit_k/confidence_threshold`` (or ``entropy_threshold``) and ``exit_k/prediction_threshold``; and
      ``device_bytes``, what a device holds;
    - where gates are asked: ``saving``, the share of the plain backbone's MACs that the way to the last exit is
      spared, gates included and no early head computed, ``energy_saving``, the same of energy, ``skip_ratio``, the
      share of the blocks that are skipped, ``closed_ratio``, the share of the channels that are closed in those that
      run; in the test ``block_i/skip_ratio`` and ``block_i/closed_ratio`` too, i from 1. ``exit_k/macs`` is then an
      average.

    Args:
        confidence_threshold: λ, from 0 to 1, the same for every early exit.
        chip: of device and server; None for no energy.
        co_inference: device, link and server; None for no latency.

    Raises:
        ValueError: a threshold outside 0 to 1.
    """

    def __init__(
        self,
        confidence_threshold: float = 0.95,
        chip: EnergyModel | None = None,
        co_inference: CoInference | None = None,
    ):
        if not 0 <= confidence_threshold <= 1:
            raise ValueError(f"Expected confidence_threshold from 0 to 1, got {confidence_threshold}.")
        self.policy: Policy = Confidence(confidence_threshold)
        self.chip, self.co_inference = chip, co_inference
        self.device_bytes = 0
        self.costs: dict[str, NetworkCosts] = {}
        self.metrics: dict[str, Metric] = {}
        self.of_gates: dict[str, Metric] = {}

    def use(self, policy: Policy) -> None:
        """The run's policy from here on."""
        self.policy = policy

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        network = pl_module.network
        assert isinstance(network, EarlyExitNetwork)
        if not self.costs:
            self.costs = self._costs(network)
            self.device_bytes = device_bytes(network)
            exits = range(1, network.num_exits + 1)
            names = [f"exit_{k}/acc" for k in exits]
            self.metrics.update({n: Accuracy("multiclass", num_classes=network.chain.num_classes) for n in names})
            means = ["acc", *(f"exit_{k}/fraction" for k in exits), *kinds(self.costs)]
            self.metrics.update({name: _Mean(pl_module.device) for name in means})
            if network.gating is not None:
                names = self._names_of_gates()
                self.of_gates.update({name: _Mean(pl_module.device) for name in names})
        for metric in (*self.metrics.values(), *self.of_gates.values()):
            metric.to(pl_module.device)

    def _costs(self, network: EarlyExitNetwork) -> dict[str, NetworkCosts]:
        costs = network_counts(network)
        costs |= {} if self.chip is None else {"energy_uj": network_energy(network, self.chip)}
        costs["sent_bytes"] = sent_bytes(network)
        if self.co_inference is not None:
            costs["latency_ms"] = network_latency(network, self.co_inference, costs)
        return costs

    def _update(self, outputs: dict[str, Any]) -> None:
        labels = outputs["labels"].cpu()
        logits = torch.stack([z.float().cpu() for z in outputs["logits"]])
        predictions = outputs["scores"].T.float().cpu() if "scores" in outputs else None
        decisions = as_decided(outputs["decisions"]) if "decisions" in outputs else None
        trace = assembled(logits, labels, self.costs, predictions, decisions=decisions)
        try:
            outcome = replay(self.policy, trace)
        except ValueError as error:
            raise NonFiniteLoss(f"{error} Lower optimizer.lr, in a new run directory.") from error
        values = {kind: outcome.cost(trace, kind) for kind in kinds(self.costs)}
        values |= {f"exit_{k}/fraction": outcome.prediction.exit == k for k in range(1, len(logits) + 1)}
        values["acc"] = outcome.prediction.label == labels
        for name, value in values.items():
            self.metrics[name].update(value)
        for name, value in self._of_gates(trace).items() if decisions is not None else ():
            self.of_gates[name].update(value)
        for k, z in enumerate(outputs["logits"], start=1):
            self.metrics[f"exit_{k}/acc"].update(z.float(), outputs["labels"])

    def _names_of_gates(self) -> list[str]:
        blocks = range(1, len(self.costs["macs"].blocks) + 1)
        exits = range(1, len(self.costs["macs"].heads) + 1)
        return [
            *(["saving", "energy_saving"] if "energy_uj" in self.costs else ["saving"]),
            *("skip_ratio", "closed", "ran"),
            *(f"block_{i}/{name}" for i in blocks for name in ("skip_ratio", "closed", "ran")),
            *(f"exit_{k}/{convention}" for k in exits for convention in self.costs),
        ]

    def _of_gates(self, trace: Trace) -> dict[str, Tensor]:
        """What is averaged of images under gates."""
        assert trace.decisions is not None
        runs, channels = trace.decisions
        whole = torch.tensor(gated_channels(trace.costs["macs"]))[:, None]
        names = {"saving": "macs", "energy_saving": "energy_uj"}
        values = {name: savings(trace, kind) for name, kind in names.items() if kind in trace.costs}
        values["skip_ratio"] = 1 - runs.double().mean(0)
        # of images, blocks and channels alike: what is closed, and what ran
        values["closed"] = ((whole - channels) * runs).sum(0)
        values["ran"] = (whole * runs).sum(0)
        for i, (ran, open, all_open) in enumerate(zip(runs, channels, whole.flatten().tolist(), strict=True), start=1):
            values[f"block_{i}/skip_ratio"] = 1 - ran
            values |= {f"block_{i}/closed": (all_open - open) * ran, f"block_{i}/ran": all_open * ran}
        for convention in trace.costs:
            for k, paid in enumerate(trace.paid(convention), start=1):
                values[f"exit_{k}/{convention}"] = paid
        return values

    def _log(self, pl_module: pl.LightningModule, split: str) -> None:
        metrics = self.metrics | (self.of_gates if getattr(pl_module, "asks_gates", False) else {})
        values = _with_closed_ratios({name: metric.compute() for name, metric in metrics.items()}, split)
        kinds_of_costs = {name: values.pop(name) for name in kinds(self.costs)}
        values |= with_parts(kinds_of_costs)
        for convention, costs in self.costs.items() if split == "test" else ():
            values |= self._of_exits(convention, costs, values)
        if split == "test":
            values |= {**self._thresholds(), "device_bytes": self._number(self.device_bytes)}
        shown = ("acc", f"exit_{len(self.costs['macs'].heads)}/acc")
        for name, value in values.items():
            pl_module.log(f"{split}/{name}", value, prog_bar=name in shown)
        for metric in metrics.values():
            metric.reset()

    def _of_exits(self, convention: str, costs: NetworkCosts, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        exits = len(costs.heads)
        leaving = [float(values.get(f"exit_{k}/{convention}", cost)) for k, cost in enumerate(costs.leaving, start=1)]
        found: dict[str, Tensor] = {}
        for k, cost in enumerate(leaving, start=1):
            on_device = cost
            if k == exits and costs.device_ends is not None:
                on_device = (leaving[-2] if exits > 1 else 0) + costs.to_cut
            parts = with_parts({convention: cost, f"device_{convention}": on_device})
            found |= {f"exit_{k}/{name}": self._number(part) for name, part in parts.items()}
        return found

    def _thresholds(self) -> dict[str, Tensor]:
        exits = len(self.costs["macs"].heads)
        named: dict[str, list[float]] = {}
        if isinstance(self.policy, Thresholds):
            score = "confidence" if isinstance(self.policy, Predicted) else self.policy.name
            named[f"{score}_threshold"] = self.policy.each(exits)
        if isinstance(self.policy, Predicted):
            named["prediction_threshold"] = self.policy.gammas(exits)
        return {
            f"exit_{k}/{name}": self._number(value)
            for name, values in named.items()
            for k, value in enumerate(values, start=1)
        }

    def _number(self, number: float) -> Tensor:
        device = self.metrics["acc"].device
        return torch.tensor(number, device=device, dtype=_exact(device))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:  # type: ignore[no-untyped-def]
        self._update(outputs)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:  # type: ignore[no-untyped-def]
        self._update(outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(pl_module, "test")


def _with_closed_ratios(values: Mapping[str, Tensor], split: str) -> dict[str, Tensor]:
    """Shares of closed channels from their counts; in validation nothing of single blocks and exits' costs."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.endswith("ran"):
            room = name.removesuffix("ran")
            if value > 0:
                found[f"{room}closed_ratio"] = values[f"{room}closed"] / value
        elif not name.endswith("closed"):
            found[name] = value
    if split == "test":
        return found
    kept = re.compile(r"exit_\d+/(acc|fraction)|[^/]+")
    return {name: value for name, value in found.items() if kept.fullmatch(name)}


def _exact(device: torch.device) -> torch.dtype:
    # counts of a large network are beyond the 24 bits of fp32; Apple's GPU has no fp64
    return torch.float32 if device.type == "mps" else torch.float64


class _Mean(Metric):
    """A mean that keeps every digit; torchmetrics' own goes through fp32."""

    total: Tensor
    count: Tensor

    def __init__(self, device: torch.device):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=_exact(device)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds values (n,)."""
        self.total += values.to(self.total.dtype).sum().to(self.total.device)
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count
