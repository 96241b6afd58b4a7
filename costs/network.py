"""What each block and each exit of a network with early exits costs, per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from costs.counting import CONVENTIONS, count
from costs.counting import Convention as Counted
from costs.gates import BlockGates, Shares, Shrinks, block_gates
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork
from networks.gates import Decisions

Convention = Literal[Counted, "energy_uj", "sent_bytes", "latency_ms"]


@dataclass(frozen=True)
class NetworkCosts:
    """Static costs per image in one convention.

    Attributes:
        convention: ``macs`` or ``ptflops``, in whole numbers, ``energy_uj`` (``costs.energy``), ``sent_bytes``
            (``costs.transmission``) or ``latency_ms`` (``costs.latency``).
        stem: up to tap 0.
        blocks: of each block.
        heads: of each exit's own classifier, the backbone's last.
        taps: block numbers the early exits follow.
        predictor: of the Exit Predictor, O_EP of equation 4; 0 where there is none.
        gates: of each block, what its gates cost and decide on; empty without gates. ``blocks`` are without them.
        cut: the tap that the codec is at; None without one, when the device ends after the last early exit.
        encoder, decoder: of the codec, on the device and on the server.
        link: of sending what crosses the cut.
    """

    convention: Convention
    stem: float
    blocks: tuple[float, ...]
    heads: tuple[float, ...]
    taps: tuple[int, ...]
    predictor: float = 0
    gates: tuple[BlockGates, ...] = ()
    cut: int | None = None
    encoder: float = 0
    link: float = 0
    decoder: float = 0

    @property
    def device_ends(self) -> int | None:
        """The tap after which the device ends; None where there is but one machine."""
        if self.cut is not None:
            return self.cut
        return self.taps[-1] if self.taps else None

    @cached_property
    def until_tap(self) -> tuple[float, ...]:
        """From the image to each tap along the backbone, tap 0 first; all gates asked, nothing skipped."""
        gates = [gate.layer + gate.channel for gate in self.gates] or [0] * len(self.blocks)
        return tuple(accumulate(map(sum, zip(self.blocks, gates, strict=True)), initial=self.stem))

    @cached_property
    def segments(self) -> tuple[float, ...]:
        """Backbone between consecutive exits: O_l of equation 3 of the Exit Predictor paper, the stem in the first.

        The last has what lies at the cut, too: encoding, sending and decoding.
        """
        ends = [self.until_tap[tap] for tap in (*self.taps, len(self.blocks))]
        *early, last = (end - start for start, end in zip([0, *ends], ends, strict=False))
        return (*early, last + self.crossing)

    @property
    def crossing(self) -> float:
        """Of encoding, sending and decoding a feature."""
        return self.encoder + self.link + self.decoder

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
        """Of what follows the device for an image that gets there, the link included; 0 on one machine."""
        return 0 if self.device_ends is None else self.segments[-1] + self.heads[-1] - self.to_cut

    @cached_property
    def to_cut(self) -> float:
        """Of what the device has of the last segment: the backbone from the last early exit to the cut, the encoder."""
        if self.device_ends is None:
            return 0
        start = self.until_tap[self.taps[-1]] if self.taps else 0
        return self.until_tap[self.device_ends] - start + self.encoder

    @cached_property
    def backbone(self) -> float:
        """Of the backbone with its own head alone, through the codec; all gates asked, nothing skipped."""
        return self.until_tap[-1] + self.crossing + self.heads[-1]

    @cached_property
    def plain(self) -> float:
        """Of the backbone with its own head, no gates and no codec: what savings are measured against."""
        return self.stem + sum(self.blocks) + self.heads[-1]

    @property
    def ungated(self) -> NetworkCosts:
        """Of the same network when no gate is asked."""
        return replace(self, gates=())

    @cached_property
    def _rates(self) -> Tensor:
        """Of each block: when it is skipped, its channel gate, and the three of its layers; (5, B, 1)."""
        rows = [
            (block - gate.layers + gate.layer, gate.channel, gate.fixed, gate.each, gate.square)
            for block, gate in zip(self.blocks, self.gates, strict=True)
        ]
        whole = all(isinstance(number, int) for row in rows for number in row)
        return torch.tensor(rows, dtype=torch.int64 if whole else torch.float64).T[:, :, None]

    def of_blocks(self, decisions: Decisions, start: int = 0) -> Tensor:
        """What each block costs n images under decisions (B, n), its gates included: (B, n).

        Whole numbers for whole decisions and costs; differentiable in decisions that are.

        Args:
            decisions: of the blocks from ``start`` on.
        """
        runs, channels = decisions
        rates = self._rates[:, start : start + len(runs)]
        # converted first: Apple's GPU has no fp64
        rates = rates.to(runs.dtype if runs.is_floating_point() else rates.dtype).to(runs.device)
        base, gate, fixed, each, square = rates
        return base + runs * (gate + fixed * (channels > 0) + each * channels + square * channels * channels)

    def of_segments(self, decisions: Decisions) -> Tensor:
        """The backbone between consecutive exits, for each of n images: (N, n), the stem in the first."""
        until = self.of_blocks(decisions).cumsum(0) + self.stem
        ends = until[[tap - 1 for tap in (*self.taps, len(self.blocks))]]
        segments = torch.cat([ends[:1], ends.diff(dim=0)])
        segments[-1] += self.crossing
        return segments


def network_costs(network: EarlyExitNetwork, convention: Counted = "macs") -> NetworkCosts:
    """Counts a network with early exits on one image of its input shape."""
    device = next(network.parameters()).device
    image = torch.zeros(1, *network.chain.input_shape, device=device)
    counts = count(network.without_gates(), image, convention=convention)
    predictor = 0 if network.predictor is None else count(network.predictor, image, convention=convention)[""]
    blocks = tuple(counts[f"chain.blocks.{i}"] for i in range(len(network.chain.blocks)))
    heads = tuple(counts[f"heads.{k}"] for k in range(len(network.heads)))
    heads = (*heads, counts["chain.head"])
    gates = gates_counts(network, counts, convention)
    cut = None if network.codec is None else network.codec.cut
    coding = (counts["codec.encoder"], 0, counts["codec.decoder"])  # nothing without a codec
    return NetworkCosts(convention, counts["chain.stem"], blocks, heads, network.taps, predictor, gates, cut, *coding)


def gates_counts(network: EarlyExitNetwork, counts: Mapping[str, int], convention: Counted) -> tuple[BlockGates, ...]:
    """What the gates of each block cost and decide on; empty without gates.

    Args:
        counts: of the modules of the network.
    """
    if network.gating is None:
        return ()

    def priced(module: nn.Module, feature: Tensor) -> int:
        return count(module, feature, convention=convention)[""]

    def shares(name: str, shrinks: Shrinks) -> Shares:
        norm = counts.get(f"{name}.norm", 0)  # of a layer in few bits, in front of its convolution
        powers = [0, 0, 0]
        powers[shrinks.inputs + shrinks.outputs] += counts.get(name, 0) - norm
        powers[shrinks.inputs] += norm
        return Shares(*powers)

    return block_gates(network.chain, network.gating, priced, shares)


def network_counts(network: EarlyExitNetwork) -> dict[str, NetworkCosts]:
    """The same in every convention that counts operations."""
    return {convention: network_costs(network, convention) for convention in CONVENTIONS}


def tap_macs(chain: Chain) -> tuple[float, ...]:
    """MACs from the image to each tap of a bare chain, from tap 1 on; rules that place exits ask for them."""
    return network_costs(EarlyExitNetwork(chain)).until_tap[1:]
