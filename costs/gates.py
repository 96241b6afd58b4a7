"""What the gates of each block cost, and what the block costs under their decisions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from networks.chain import Chain, Shape
from networks.gate_designs import RecurrentGate
from networks.gates import Gating
from networks.quantization import QuanConv
from networks.skipping import Skippable, last_conv


@dataclass(frozen=True)
class BlockGates:
    """Of one block: it costs ``block - layers + layer`` when it is skipped, and otherwise with m channels open
    ``channel + [m > 0] · fixed + each · m + square · m²`` more.

    Attributes:
        layer, channel: of asking its layer and its channel gate; the latter is asked where the block runs.
        fixed, each, square: of its layers.
        channels: how many there are.
    """

    layer: float
    channel: float
    fixed: float
    each: float
    square: float
    channels: int

    @property
    def layers(self) -> float:
        """Of its layers with all channels."""
        return self.layers_with(self.channels)

    def layers_with(self, channels: int) -> float:
        """Of its layers with so many channels, at least one."""
        return self.fixed + self.each * channels + self.square * channels**2


class Shrinks(NamedTuple):
    """Whether the inputs and the outputs of a layer become fewer with the channels that are open: 0 or 1 each."""

    inputs: int
    outputs: int


class Shares(NamedTuple):
    """Of a layer's cost, what does not shrink, and what shrinks with the channels and with their square."""

    fixed: float
    linear: float
    square: float


Priced = Callable[[nn.Module, Tensor], float]
Shared = Callable[[str, Shrinks], Shares]


def block_gates(chain: Chain, gating: Gating, priced: Priced, shares: Shared) -> tuple[BlockGates, ...]:
    """The gates of every block in one convention.

    Args:
        priced: cost of a module on a feature (1, c, h, w).
        shares: of a layer of the chain, by its name in the network.
    """
    found = []
    known: dict[Any, float] = {}
    blocks: Any = chain.blocks
    for i, (block, shape) in enumerate(zip(blocks, entered_shapes(chain), strict=True)):
        prefix = f"chain.blocks.{i}.{block.layers_name}"
        parts = [shares(f"{prefix}.{j}", _shrinks(block, j, gating.inner)) for j in range(len(block.layers))]
        fixed, linear, square = (sum(column) for column in zip(*parts, strict=True))
        k = block.gate_channels
        layer, channel = _gate_costs(gating, i, block, shape, priced, known)
        found.append(BlockGates(layer, channel, fixed, _share(linear, k), _share(square, k * k), k))
    return tuple(found)


def _share(cost: float, parts: int) -> float:
    whole, rest = divmod(cost, parts)
    return int(whole) if not rest and isinstance(cost, int) else cost / parts


def _shrinks(block: Skippable, j: int, inner: bool) -> Shrinks:
    """Of layer ``j`` of a block; BatchNorm and ReLU, which work channel by channel, count as outputs alone."""
    last, layer = last_conv(block.layers), block.layers[j]
    outputs = int(inner or j >= last)
    convolves = isinstance(layer, nn.Conv2d | QuanConv)
    return Shrinks(int(inner and convolves and j == last), outputs)


def entered_shapes(chain: Chain) -> list[Shape]:
    """(channels, height, width) of what each block of a gated chain takes in."""
    chain = copy.deepcopy(chain).to("meta").eval()
    x = chain.stem(torch.empty(1, *chain.input_shape, device="meta"))
    shapes = []
    blocks: Any = chain.blocks
    for block in blocks:
        shapes.append(tuple(block.enter(x).shape[1:]))
        x = block(x)
    return shapes


def _gate_costs(
    gating: Gating, i: int, block: Skippable, shape: Shape, priced: Priced, known: dict[Any, float]
) -> tuple[float, float]:
    feature = torch.zeros(1, *shape, device=next(gating.parameters()).device)

    def cost(kind: str, outputs: int, make: Callable[[], nn.Module]) -> float:
        if (kind, outputs, shape) not in known:
            known[kind, outputs, shape] = priced(make().to(feature.device), feature)
        return known[kind, outputs, shape]

    layer: float = 0
    channel: float = 0
    rnn, cnn = gating.layer, gating.channel
    if rnn is not None:
        layer = cost("layer", 1, lambda: Unfolded(rnn, shape[0], 1))
    k = block.gate_channels
    if isinstance(cnn, RecurrentGate):
        channel = cost("rnn", k, lambda: Unfolded(cnn, shape[0], k))
    elif cnn is not None:
        channel = cost("cnn", k, lambda: cnn[i])
    return layer, channel


class Unfolded(nn.Module):
    """A recurrent gate at its first block as the paper draws it, layer by layer."""

    def __init__(self, gate: RecurrentGate, width: int, outputs: int):
        super().__init__()
        self.projection = gate.projections[str(width)]
        self.lstm = nn.LSTM(gate.hidden, gate.hidden)  # counts are known of it, not of a cell
        self.lstm.load_state_dict({f"{name}_l0": value for name, value in gate.lstm.state_dict().items()})
        self.decides = gate.decides[str(outputs)]
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """A feature (n, c, h, w) to decisions (n, outputs) before the sigmoid."""
        out, _ = self.lstm(self.projection(self.pool(x)).flatten(1)[None])
        return self.decides(out[0])
