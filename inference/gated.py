"""A batch on its way along gated blocks: what its gates skip is not run."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from costs.network import NetworkCosts
from networks.chain import Gates
from networks.early_exit_network import EarlyExitNetwork
from networks.gate_designs import RecurrentGate
from networks.gates import RUNS, Decisions, GatePass
from networks.quantization import QuanConv
from networks.skipping import Skippable, chosen


class GatedFeatures:
    """The features of n images, their gates, and what they cost.

    Of a single image closed channels are sliced out of the weights. In a batch the images that skip a block are left
    out of it, and channels are multiplied.

    Attributes:
        feature: (n, c, h, w) at tap ``at``.
        beyond: MACs that were computed beyond those that the decisions made necessary, of all images so far.

    Args:
        network: with gates, in eval mode.
        costs: of it in MACs.
        feature: at tap 0; may be overwritten.
    """

    def __init__(self, network: EarlyExitNetwork, costs: NetworkCosts, feature: Tensor):
        assert network.gating is not None
        self.blocks: Any = network.chain.blocks
        self.gating, self.costs, self.feature = network.gating, costs, feature
        self.gates = network.gating.begin(len(feature), feature)
        self.at = 0
        self.beyond = 0

    def keep(self, staying: Tensor, feature: Tensor) -> None:
        """Goes on with these images (m,) alone, of which this is the feature."""
        self.feature = feature
        self.gates.keep(staying)

    def advance(self, end: int, piece: int) -> Tensor:
        """Brings all images to tap ``end``; gives the MACs of each (n,).

        Args:
            piece: how many images at a time a processor takes.
        """
        start, self.at = self.at, end
        x = self.feature
        if len(x) == 1:
            self.feature, spent = self._alone(start, end, x)
            return torch.full((1,), spent, dtype=torch.int64, device=x.device)
        if len(x) <= piece or x.device.type != "cpu":
            self.feature, macs = self._together(start, end, x, self.gates)
            return macs
        pieces = x.tensor_split(-(-len(x) // piece))
        ends = list(accumulate(map(len, pieces), initial=0))
        gates = [self.gates.part(slice(*span)) for span in pairwise(ends)]
        found = [self._together(start, end, part, own) for part, own in zip(pieces, gates, strict=True)]
        self.gates.rejoin(gates)
        self.feature, macs = map(torch.cat, zip(*found, strict=True))
        return macs

    def _alone(self, start: int, end: int, x: Tensor) -> tuple[Tensor, int]:
        macs: Any = 0
        for i in range(start, end):
            block, gate = self.blocks[i], self.costs.gates[i]
            entered = block.enter(x)
            macs += self.costs.blocks[i] - gate.layers + gate.layer
            layer = self.gates.layer(entered)
            self.beyond += _folded(self.gating.layer, entered, 1, gate.layer)
            if layer is not None and not layer.item() >= RUNS:
                x = block.skipped(entered)
                continue
            scores = self.gates.channels(i, entered, block.gate_channels)
            macs += gate.channel
            if isinstance(self.gating.channel, RecurrentGate):
                self.beyond += _folded(self.gating.channel, entered, block.gate_channels, gate.channel)
            x, spent, computed = self._channels(block, i, entered, scores)
            macs += spent
            self.beyond += computed - spent
        return x, macs

    def _channels(self, block: Skippable, i: int, entered: Tensor, scores: Tensor | None) -> tuple[Tensor, int, int]:
        """The block for one image; what its layers made necessary, and what was computed."""
        gate: Any = self.costs.gates[i]
        if scores is None:
            return block.gated(entered), gate.layers, gate.layers
        kept = (scores[0] >= RUNS).nonzero()[:, 0]
        open = len(kept)
        if open == 0:
            return block.skipped(entered), 0, 0
        if open == gate.channels:
            return block.gated(entered), gate.layers, gate.layers
        spent = gate.layers_with(open)
        whole = any(isinstance(layer, QuanConv) for layer in block.layers)
        return block.with_channels(entered, kept, self.gating.inner), spent, gate.layers if whole else spent

    def _together(self, start: int, end: int, x: Tensor, gates: GatePass) -> tuple[Tensor, Tensor]:
        runs, channels = [], []
        for i in range(start, end):
            block = self.blocks[i]
            x, ran, open = self._block(block, i, x, gates)
            runs.append(ran)
            channels.append(open)
        decided = Decisions(torch.stack(runs), torch.stack(channels))
        spent = self.costs.of_blocks(decided, start)
        if self.gating.channel is not None:  # closed channels are computed all the same
            full = torch.tensor([[gate.channels] for gate in self.costs.gates[start:end]], device=x.device)
            computed = self.costs.of_blocks(Decisions(decided.runs, full.expand_as(decided.runs)), start)
            self.beyond += int((computed - spent).sum())
        return x, spent.sum(0)

    def _block(self, block: Skippable, i: int, x: Tensor, gates: GatePass) -> tuple[Tensor, Tensor, Tensor]:
        """One block for a batch, and what was decided: runs and open channels, (n,) int64."""
        entered = block.enter(x)
        layer = gates.layer(entered)
        self.beyond += len(x) * _folded(self.gating.layer, entered, 1, self.costs.gates[i].layer)
        all_channels = torch.full((len(x),), block.gate_channels, device=x.device)
        if layer is None:
            runs, rows, some = torch.ones_like(all_channels), None, entered
        else:
            running = layer >= RUNS
            runs, index = running.long(), running.nonzero()[:, 0]
            if len(index) == 0:
                return block.skipped(entered), runs, all_channels
            rows = None if len(index) == len(x) else index
            some = entered if rows is None else chosen(entered, rows)
        scores = gates.channels(i, some, block.gate_channels, rows)
        if isinstance(self.gating.channel, RecurrentGate):
            self.beyond += len(some) * _folded(
                self.gating.channel, entered, block.gate_channels, self.costs.gates[i].channel
            )
        mask = None if scores is None else (scores >= RUNS).to(entered.dtype)
        decided = Gates(None, mask, self.gating.inner)
        out = block.gated(entered, decided) if rows is None else block.for_some(entered, some, rows, decided)
        if mask is None:
            return out, runs, all_channels
        open = mask.sum(1).long()
        return out, runs, open if rows is None else all_channels.index_copy(0, rows, open)


def _folded(gate: RecurrentGate | None, entered: Tensor, outputs: int, macs: float) -> int:
    """MACs that a recurrent gate with its convolution folded in takes beyond those that are counted."""
    return 0 if gate is None else gate.folded_macs(entered.shape[1], outputs) - int(macs)
