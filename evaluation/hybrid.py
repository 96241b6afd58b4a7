"""Hybrid networks side by side: what each design of the edge comes to, in the hybrid-network paper's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from costs.energy import EnergyModel, network_energy
from costs.footprint import device_bytes
from evaluation.runs import TrainedRun
from inference.policies import FixedExit
from inference.replay import Outcome, replay
from inference.trace import Trace
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork
from networks.edge import quantizable
from networks.quantization import FULL, quantized_convs
from running.assembly import built

# of a config: what may differ between runs of one design
APART = ("seed", "run_dir", "job", "logger", "images", "trainer", "callbacks")


@dataclass(frozen=True)
class Design:
    """One way to share a network between edge and cloud, measured on the test split; averages over seeds.

    Attributes:
        backbone, dataset: their names.
        bits: of weights and activations at the edge; 32 for full precision.
        edge, convs: convolutions at the edge, and in all blocks.
        exits: early exits.
        separate: whether they were trained after the backbone.
        epochs: of the run.
        label: of the run, or the first of several seeds.
        seeds: how many.
        accuracy: under the run's own policy, from 0 to 1.
        last_accuracy: of the last exit on all images.
        shares: of the images, leaving at each early exit.
        edge_uj, cloud_uj: energy of an image, µJ.
        full_uj: that of the backbone in full precision without early exits.
        edge_bytes: what the edge holds, 0 where all is in the cloud.
    """

    backbone: str
    dataset: str
    bits: tuple[int, int]
    edge: int
    convs: int
    exits: int
    separate: bool
    epochs: int
    label: str
    seeds: int
    accuracy: float
    last_accuracy: float
    shares: tuple[float, ...]
    edge_uj: float
    cloud_uj: float
    full_uj: float
    edge_bytes: int

    @property
    def name(self) -> str:
        """As the paper has it, such as 16E + 14C."""
        return f"{self.edge}E + {self.convs - self.edge}C"

    @property
    def precision(self) -> str:
        """Bits in words."""
        if self.bits == (FULL, FULL):
            return "fp32"
        weight, act = self.bits
        return f"{weight} bit" if weight == act else f"w{weight}a{act}"

    @property
    def energy_uj(self) -> float:
        """Of an image in all, µJ."""
        return self.edge_uj + self.cloud_uj

    @property
    def reduction(self) -> float:
        """How many times less energy than the backbone in full precision, all of it run."""
        return self.full_uj / self.energy_uj


def designs(runs: Sequence[TrainedRun], tests: Sequence[Trace], chip: EnergyModel | None) -> list[Design]:
    """The designs of runs of ``method=hybrid`` and ``plain``, by backbone, bits and edge; none where no run is hybrid.

    Points are those of the runs' own policies; of runs without early exits, the whole network. A run whose few bits do
    not end with its last early exit is left out, which is said.

    Args:
        tests: the runs' traces of the test split, with energies.
    """
    methods = [run.config.method.name for run in runs]
    if chip is None or "hybrid" not in methods:
        return []
    alike: dict[str, dict[int, Design]] = {}
    for run, test, method in zip(runs, tests, methods, strict=True):
        if method in ("hybrid", "plain"):
            few, edge, *_ = _edge(run.network)
            if few not in (0, edge):
                print(f"{run.label} is no hybrid design: its few bits do not end with its last early exit.")
                continue
            alike.setdefault(_settings(run), {}).setdefault(run.config.seed, _design(run, test, chip))
    found = [_averaged(list(seeds.values())) for seeds in alike.values()]
    return sorted(found, key=lambda d: (d.backbone, d.bits, d.edge, d.exits, d.separate, d.epochs, d.label))


def _settings(run: TrainedRun) -> str:
    """All that makes a design, as text: the config without what tells only seeds and places apart."""
    keys = [str(key) for key in run.config if key not in APART]
    node = OmegaConf.masked_copy(run.config, keys)
    if not run.network.taps and not quantized_convs(run.network):
        node.precision = {}  # an edge where nothing ends is none
    return OmegaConf.to_yaml(node)


def _averaged(group: Sequence[Design]) -> Design:
    first = group[0]
    shares = tuple(fmean(column) for column in zip(*(design.shares for design in group), strict=True))
    mean: dict[str, Any] = {
        name: fmean(getattr(design, name) for design in group)
        for name in ("accuracy", "last_accuracy", "edge_uj", "cloud_uj")
    }
    return replace(first, **mean, shares=shares, seeds=len(group))


def _design(run: TrainedRun, test: Trace, chip: EnergyModel) -> Design:
    config, network = run.config, run.network
    outcome = replay(run.point or run.fixed or FixedExit(test.num_exits), test)
    left = [(outcome.prediction.exit == k).double().mean().item() for k in range(1, test.num_exits)]
    few, edge, convs, blocks = _edge(network)
    edge_uj, cloud_uj = _energies(test, outcome, blocks)
    return Design(
        backbone=config.backbone.name,
        dataset=config.dataset.name,
        bits=(config.precision.weight_bits, config.precision.act_bits) if few else (FULL, FULL),
        edge=edge,
        convs=convs,
        exits=len(left),
        separate=bool(left) and "exit" in config.method.phases,
        epochs=config.epochs,
        label=run.label,
        seeds=1,
        accuracy=(outcome.prediction.label == test.labels).double().mean().item(),
        last_accuracy=test.correct[-1].double().mean().item(),
        shares=tuple(left),
        edge_uj=edge_uj,
        cloud_uj=cloud_uj,
        full_uj=_in_full_precision(run, chip),
        edge_bytes=device_bytes(network, blocks) if blocks else 0,
    )


def _edge(network: EarlyExitNetwork) -> tuple[int, int, int, int]:
    """Quantized convolutions, those at the edge and in all blocks, and blocks at the edge.

    The edge ends with the last early exit, without one with the last quantized block.
    """
    blocks = list(network.chain.blocks)
    convs = [len(quantized_convs(block)) or own for block, own in zip(blocks, quantizable(network.chain), strict=True)]
    few = len(quantized_convs(network))
    last = max((i for i, block in enumerate(blocks, 1) if quantized_convs(block)), default=0)
    end = network.taps[-1] if network.taps else last
    return few, sum(convs[:end]), sum(convs), end


def _energies(test: Trace, outcome: Outcome, blocks: int) -> tuple[float, float]:
    """µJ of an image at the edge and in the cloud."""
    total = outcome.cost(test, "energy_uj").mean().item()
    edge = outcome.cost(test, "device_energy_uj").mean().item()
    if test.num_exits == 1:
        edge = test.costs["energy_uj"].until_tap[blocks] if blocks else 0.0
    return edge, total - edge


def _in_full_precision(run: TrainedRun, chip: EnergyModel) -> float:
    chain = run.network.chain
    plain: Chain = built(run.config.backbone, num_classes=chain.num_classes, input_shape=chain.input_shape)
    return network_energy(EarlyExitNetwork(plain), chip).backbone


def against_exit(design: Design, others: Sequence[Design]) -> float:
    """How many times less energy than the network in full precision with an exit at the same place; NaN for none."""

    def place(d: Design) -> tuple[object, ...]:
        return d.backbone, d.edge, d.exits, d.separate, d.epochs

    same = [other for other in others if other.exits and other.precision == "fp32" and place(other) == place(design)]
    return same[0].energy_uj / design.energy_uj if same and design.precision != "fp32" else math.nan
