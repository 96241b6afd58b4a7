"""What gates come to on the test split: what each run saves, single images and features, and answers at any time."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.results import Result
from inference.budget import Budget
from inference.replay import Curve, curve, replay
from inference.skips import closed_ratios, gated_channels, savings, skip_ratios, way_costs
from inference.trace import Trace
from networks.early_exit_network import EarlyExitNetwork
from networks.gates import Decisions, Multiplied
from storage.run_directory import RunDirectory

# names of conf/method/gates in the paper's words
STRATEGIES = {
    "layer_rnn": "layers",
    "mgl2s": "layers and channels (MGL2S)",
    "channel_cnn": "channels (CNN gates)",
    "channel_rnn": "channels (RNN gate)",
}
FEATURE_BLOCK = 6  # of Fig. 14, from 1


@dataclass(frozen=True)
class Skipping:
    """One run on the test split: all images at the last exit, no early head computed.

    Attributes:
        label: of the run.
        backbone, method: their names.
        gates: name of its gates, empty without.
        resource: what it was trained to save, ``macs`` or ``energy``; empty without gates.
        target: share of the backbone's cost that its training aimed to save, None for a fixed ``alpha``.
        alpha: weight of that cost, None where it followed a target.
        epochs: of each of its phases, after those of the run that it started from.
        accuracy: from 0 to 1.
        macs: average of an image.
        saving, energy_saving: share of the plain backbone's MACs and energy, NaN where that is not known.
        skipped: share of the blocks that images skip, 0 without gates.
        closed: share of the channels that are closed in blocks that run.
    """

    label: str
    backbone: str
    method: str
    gates: str
    resource: str
    target: float | None
    alpha: float | None
    epochs: Sequence[int]
    accuracy: float
    macs: float
    saving: float
    energy_saving: float
    skipped: float
    closed: float

    @property
    def strategy(self) -> str:
        """Backbone and way to skip."""
        way = "SkipNet" if self.method == "skipnet" else STRATEGIES.get(self.gates, self.gates)
        way += ", with exits" if self.method == "ddi" else ""  # trained longer, with another loss
        return f"{self.backbone}, {way}" if self.gates else self.backbone


def is_plain(result: Result) -> bool:
    """Whether all images take the same way through a network: neither gates nor early exits."""
    return not result.gated and not result.adaptive


def skippings(results: Sequence[Result]) -> list[Skipping]:
    """Runs with gates and plain ones beside them, by backbone and what they save; none where no run has gates."""
    if not any(result.gated for result in results):
        return []
    found = [_skipping(result) for result in results if result.gated or is_plain(result)]
    return sorted(found, key=lambda run: (run.backbone, run.gates, run.resource, run.saving))


def _skipping(result: Result) -> Skipping:
    config, test = result.run.config, result.test
    method = config.method
    target = method.get("target_saving") if result.gated else None
    skipped, closed = averages(test)
    return Skipping(
        label=result.run.label,
        backbone=config.backbone.name,
        method=method.name,
        gates=str(method.gates.get("name", "gates")) if result.gated else "",
        resource=str(method.get("resource", "macs")) if result.gated else "",
        target=target,
        alpha=method.get("alpha") if result.gated and target is None else None,
        epochs=trained_epochs(result.run.path),
        accuracy=test.correct[-1].double().mean().item(),
        macs=way_costs(test).double().mean().item(),
        saving=savings(test).mean().item(),
        energy_saving=savings(test, "energy_uj").mean().item() if "energy_uj" in test.costs else math.nan,
        skipped=skipped,
        closed=closed,
    )


def trained_epochs(folder: Path) -> list[int]:
    """Epochs of each phase of a run, after those of the run that it started from where that is still there."""
    earlier = OmegaConf.select(RunDirectory(folder).stored_config(), "method.from_run")
    before = Path(str(earlier)).expanduser() if earlier is not None else None
    there = before is not None and (before / "config.yaml").is_file() and (before / "metrics.csv").is_file()
    with (folder / "metrics.csv").open(newline="") as file:
        phases = Counter(row["phase"] for row in csv.DictReader(file) if row.get("train/loss"))
    return [*(trained_epochs(before) if there and before is not None else []), *phases.values()]


def averages(test: Trace) -> tuple[float, float]:
    """Share of the blocks that are skipped, and of the channels that are closed in those that run."""
    if test.decisions is None:
        return 0.0, 0.0
    runs, channels = (part.double() for part in test.decisions)
    whole = torch.tensor(gated_channels(test.costs["macs"]), dtype=torch.float64)[:, None]
    return (1 - runs.mean()).item(), (1 - (channels * runs).sum() / (whole * runs).sum()).item()


def block_ratios(test: Trace) -> tuple[list[float], list[float]]:
    """Of each block, the share of the images that skip it, and of its channels closed in the others."""
    assert test.decisions is not None
    closed = closed_ratios(test.decisions, gated_channels(test.costs["macs"]))
    return skip_ratios(test.decisions).tolist(), closed.tolist()


def easy_and_hard(test: Trace, count: int) -> tuple[list[int], list[int]]:
    """The images with the most and with the least saved, at most so many each, no image in both; ties by index."""
    saved = savings(test)
    count = min(count, len(test) // 2)
    most = saved.argsort(descending=True, stable=True)[:count].tolist()
    taken = set(most)
    least = [row for row in saved.argsort(stable=True).tolist() if row not in taken][:count]
    return most, least


class Anytime(NamedTuple):
    """All images at exit ``exit``, its head alone computed.

    Attributes:
        exit: its number.
        accuracy: from 0 to 1.
        macs: average of an image.
        static: of an image when no gate is asked and nothing skipped.
        guaranteed: the budget within which every image gets there, or farther.
    """

    exit: int
    accuracy: float
    macs: float
    static: float
    guaranteed: float


def anytime(test: Trace) -> list[Anytime]:
    """What can be answered at each exit."""
    costs = test.costs["macs"]
    paid = test.segments["macs"].cumsum(0) + test.heads["macs"]
    return [
        Anytime(k + 1, right, macs, costs.ungated.alone[k], min(costs.alone[k:]))
        for k, (right, macs) in enumerate(
            zip(test.correct.double().mean(1).tolist(), paid.double().mean(1).tolist(), strict=True)
        )
    ]


def hard_budget(test: Trace, macs: float) -> float | None:
    """Accuracy when every image halts at the last exit that fits; None for a budget below the cheapest exit."""
    if macs < min(test.costs["macs"].alone):
        return None
    prediction = replay(Budget(macs), test).prediction
    return (prediction.label == test.labels).double().mean().item()


def budgets(test: Trace, points: int = 60) -> Curve:
    """Hard budgets from the cheapest exit's cost to that of the whole network."""
    alone = test.costs["macs"].alone
    between = torch.linspace(min(alone), max(alone), points, dtype=torch.float64)
    values = torch.cat([between, torch.tensor(alone, dtype=torch.float64)]).unique()
    return curve(Budget(), values[:, None], test)


def skipping_block(decisions: Decisions, channels: Sequence[int]) -> tuple[int, Tensor] | None:
    """The block (from 1) nearest to that of Fig. 14 of which images skip something, and these images' rows.

    Args:
        channels: how many each block gates.
    """
    whole = torch.tensor(list(channels))[:, None]
    partly = (decisions.runs == 0) | (decisions.channels < whole)
    near = sorted(range(1, len(partly) + 1), key=lambda block: (abs(block - FEATURE_BLOCK), block))
    return next(((block, partly[block - 1].nonzero()[:, 0]) for block in near if partly[block - 1].any()), None)


@torch.inference_mode()
def features(network: EarlyExitNetwork, images: Tensor, block: int) -> tuple[Tensor, Tensor, Decisions]:
    """Features (n, c, h, w) after a block, every block run whole and with the gates, and what these decided.

    Args:
        images: (n, C, H, W), normalized, where the network is.
        block: its number, from 1.
    """
    chain = network.chain
    off = chain.run(images, stop=block)
    assert network.gating is not None
    on = chain.run(images, stop=0)
    way, blocks = Multiplied(network.gating, on), list[Any](chain.blocks)
    for i in range(block):
        on = way.step(i, blocks[i], on)
    return off, on, way.decisions
