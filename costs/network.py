"""What each block and each exit of a network with early exits costs, per image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from costs.counting import CONVENTIONS, count
from costs.counting import Convention as Counted
from networks.chain import Chain
from networks.exits import EarlyExitNetwork

Convention = Literal[Counted, "energy_uj"]


@dataclass(frozen=True)
class NetworkCosts:
    """Static costs per image in one convention.

    Attributes:
        convention: ``macs`` or ``ptflops``, in whole numbers, or ``energy_uj`` (``costs.energy``).
        stem: up to tap 0.
        blocks: of each block.
        heads: of each exit's own classifier, the backbone's last.
        taps: block numbers the early exits follow; the device ends after the last of them.
        predictor: of the Exit Predictor, O_EP of equation 4; 0 where there is none.
    """

    convention: Convention
    stem: float
    blocks: tuple[float, ...]
    heads: tuple[float, ...]
    taps: tuple[int, ...]
    predictor: float = 0

    @cached_property
    def until_tap(self) -> tuple[float, ...]:
        """From the image to each tap along the backbone, tap 0 first."""
        return tuple(accumulate(self.blocks, initial=self.stem))

    @cached_property
    def segments(self) -> tuple[float, ...]:
        """Backbone between consecutive exits: O_l of equation 3 of the Exit Predictor paper, the stem in the first."""
        ends = [self.until_tap[tap] for tap in (*self.taps, len(self.blocks))]
        return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))

    @cached_property
    def leaving(self) -> tuple[float, ...]:
        """Of an image that leaves at each exit, all heads on its way computed (equation 3), no predictor."""
        return tuple(accumulate(map(sum, zip(self.segments, self.heads, strict=True))))

    @cached_property
    def alone(self) -> tuple[float, ...]:
        """Of an image that leaves at each exit, no other head computed."""
        return tuple(map(sum, zip(accumulate(self.segments), self.heads, strict=True)))

    @cached_property
    def server(self) -> float:
        """Of what runs behind the cut for an image that gets there; 0 without an early exit: no cut, one machine."""
        return self.segments[-1] + self.heads[-1] if self.taps else 0

    @cached_property
    def backbone(self) -> float:
        """Of the backbone with its own head alone."""
        return self.until_tap[-1] + self.heads[-1]


def network_costs(network: EarlyExitNetwork, convention: Counted = "macs") -> NetworkCosts:
    """Counts a network with early exits on one image of its input shape."""
    device = next(network.parameters()).device
    image = torch.zeros(1, *network.chain.input_shape, device=device)
    counts = count(network, image, convention=convention)
    predictor = 0 if network.predictor is None else count(network.predictor, image, convention=convention)[""]
    blocks = tuple(counts[f"chain.blocks.{i}"] for i in range(len(network.chain.blocks)))
    heads = tuple(counts[f"heads.{k}"] for k in range(len(network.heads)))
    heads = (*heads, counts["chain.head"])
    return NetworkCosts(convention, counts["chain.stem"], blocks, heads, network.taps, predictor)


def network_counts(network: EarlyExitNetwork) -> dict[str, NetworkCosts]:
    """The same in every convention that counts operations."""
    return {convention: network_costs(network, convention) for convention in CONVENTIONS}


def tap_macs(chain: Chain) -> tuple[float, ...]:
    """MACs from the image to each tap of a bare chain, from tap 1 on; rules that place exits ask for them."""
    return network_costs(EarlyExitNetwork(chain)).until_tap[1:]
