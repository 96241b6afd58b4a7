"""Hybrid networks side by side: what each design of the edge comes to, in the hybrid-network paper's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from costs.energy import Chip, network_energy
from costs.storage import device_bytes
from evaluation.results import Result
from inference.policies import FixedExit
from inference.replay import Outcome, replay
from networks.chain import Chain
from networks.edge import quantizable
from networks.exits import EarlyExitNetwork
from networks.quantization import FULL, quantized_convs
from running.assembly import built


@dataclass(frozen=True)
class Design:
    """One way to share a network between edge and cloud, measured on the test split; averages over seeds.

    Attributes:
        bits: of weights and activations at the edge; 32 for full precision.
        edge, convs: convolutions at the edge, and in all blocks.
        exits: early exits.
        separate: whether they were trained after the backbone.
        epochs: of the run.
        runs: how many seeds.
        accuracy: under the run's own policy, from 0 to 1.
        last_accuracy: of the last exit on all images.
        shares: of the images, leaving at each early exit.
        edge_uj, cloud_uj: energy of an image, µJ.
        full_uj: that of the backbone in full precision without early exits.
        device_bytes: what the edge holds, 0 where all is in the cloud.
    """

    bits: tuple[int, int]
    edge: int
    convs: int
    exits: int
    separate: bool
    epochs: int
    runs: int
    accuracy: float
    last_accuracy: float
    shares: tuple[float, ...]
    edge_uj: float
    cloud_uj: float
    full_uj: float
    device_bytes: int

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


def designs(results: Sequence[Result], chip: Chip | None) -> list[Design]:
    """The designs of runs of ``method=hybrid`` and ``plain``, by bits and edge; none where no run is hybrid.

    Points are those of the runs' own policies; of runs without early exits, the whole network.
    """
    methods = [result.run.config.method.name for result in results]
    if chip is None or "hybrid" not in methods:
        return []
    found = [
        _design(result, chip) for result, method in zip(results, methods, strict=True) if method in ("hybrid", "plain")
    ]
    alike: dict[tuple[object, ...], list[Design]] = {}
    for design in found:
        alike.setdefault((design.bits, design.edge, design.exits, design.separate, design.epochs), []).append(design)
    return [_averaged(group) for _, group in sorted(alike.items())]


def _averaged(group: Sequence[Design]) -> Design:
    first = group[0]
    shares = tuple(fmean(column) for column in zip(*(design.shares for design in group), strict=True))
    mean = {
        name: fmean(getattr(design, name) for design in group)
        for name in ("accuracy", "last_accuracy", "edge_uj", "cloud_uj")
    }
    return Design(**{**vars(first), **mean, "shares": shares, "runs": len(group)})


def _design(result: Result, chip: Chip) -> Design:
    run, network, test = result.run, result.run.network, result.test
    outcome = replay(run.fixed or FixedExit(test.num_exits), test)
    right = outcome.prediction.label == test.labels
    left = [(outcome.prediction.exit == k).double().mean().item() for k in range(1, test.num_exits)]
    edge, convs, blocks = _edge(network)
    edge_uj, cloud_uj = _energies(result, outcome, blocks)
    config = run.config
    return Design(
        bits=(config.precision.weight_bits, config.precision.act_bits) if quantized_convs(network) else (FULL, FULL),
        edge=edge,
        convs=convs,
        exits=len(left),
        separate="exit" in config.method.phases,
        epochs=config.epochs,
        runs=1,
        accuracy=right.double().mean().item(),
        last_accuracy=test.correct[-1].double().mean().item(),
        shares=tuple(left),
        edge_uj=edge_uj,
        cloud_uj=cloud_uj,
        full_uj=_in_full_precision(result, chip),
        device_bytes=device_bytes(network, blocks) if blocks else 0,
    )


def _edge(network: EarlyExitNetwork) -> tuple[int, int, int]:
    """Convolutions at the edge, in all blocks, and blocks at the edge: without an exit, up to the last quantized."""
    few, rest = len(quantized_convs(network)), quantizable(network.chain)
    last = max((i for i, block in enumerate(network.chain.blocks, 1) if quantized_convs(block)), default=0)
    blocks = network.taps[-1] if network.taps else last
    return few or sum(rest[:blocks]), few + sum(rest), blocks


def _energies(result: Result, outcome: Outcome, blocks: int) -> tuple[float, float]:
    """µJ of an image at the edge and in the cloud."""
    test = result.test
    total = outcome.cost(test, "energy_uj").mean().item()
    edge = outcome.cost(test, "device_energy_uj").mean().item()
    if test.num_exits == 1:
        edge = test.costs["energy_uj"].until_tap[blocks] if blocks else 0.0
    return edge, total - edge


def _in_full_precision(result: Result, chip: Chip) -> float:
    config, chain = result.run.config, result.run.network.chain
    plain: Chain = built(config.backbone, num_classes=chain.num_classes, input_shape=chain.input_shape)
    return network_energy(EarlyExitNetwork(plain), chip).backbone


def against_exit(design: Design, others: Sequence[Design]) -> float:
    """How many times less energy than the network in full precision with an exit at the same place; NaN for none."""
    same = [o for o in others if o.precision == "fp32" and (o.edge, o.exits) == (design.edge, design.exits) and o.exits]
    return same[0].energy_uj / design.energy_uj if same and same[0] is not design else math.nan
