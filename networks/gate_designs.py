"""The networks that gates are made of: sections III-A and IV-A of Dual Dynamic Inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 10  # units of the recurrent gate
State = tuple[Tensor, Tensor]  # of an LSTM: hidden state and cell, (n, hidden) each


class RecurrentGate(nn.Module):
    """Average pool, 1x1 convolution for each width, one LSTM shared by all blocks, FC (Fig. 2a).

    Args:
        widths: channels of the features that it looks at.
        outputs: numbers of decisions it takes, 1 for a layer gate, the channels of each block for a channel gate.
        hidden: units of the LSTM.
    """

    def __init__(self, widths: Sequence[int], outputs: Sequence[int], hidden: int = HIDDEN):
        super().__init__()
        self.hidden = hidden
        self.projections = nn.ModuleDict({str(width): nn.Conv2d(width, hidden, 1) for width in sorted(set(widths))})
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.decides = nn.ModuleDict({str(number): nn.Linear(hidden, number) for number in sorted(set(outputs))})

    def folded(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each width, input weights (4·hidden, width) and bias of the LSTM with the 1x1 convolution in them."""
        lstm, inner = self.lstm, self.lstm.weight_ih
        convs: Any = self.projections.items()
        return {
            int(width): (inner @ conv.weight.flatten(1), torch.addmv(lstm.bias_ih, inner, conv.bias))
            for width, conv in convs
        }

    def folded_macs(self, width: int, outputs: int) -> int:
        """What one step takes with the 1x1 convolution folded in; layer by layer it is fewer."""
        return 4 * self.hidden * (width + self.hidden) + self.hidden * outputs

    def start(self, count: int, like: Tensor) -> State:
        """State (count, hidden) and cell before the first block."""
        state = torch.zeros(count, self.hidden, device=like.device)
        return state, state

    def step(
        self, x: Tensor, outputs: int, state: State, folded: Mapping[int, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, State]:
        """A feature (n, c, h, w) to decisions (n, outputs) before the sigmoid, and the next state."""
        weight, bias = folded[x.shape[1]]
        pooled = x.mean((2, 3), dtype=torch.float32)
        state = torch.lstm_cell(pooled, state, weight, self.lstm.weight_hh, bias, self.lstm.bias_hh)
        return self.decides[str(outputs)](state[0]), state


def conv_gate(in_channels: int, outputs: int) -> nn.Sequential:
    """3x3 convolution with stride 2, global average pool, FC (Fig. 2b); BatchNorm and ReLU, which it does not show."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, bias=False),
        *(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, outputs)),
    )


def dense_gate(in_channels: int, outputs: int) -> nn.Sequential:
    """A dense layer of half the bottleneck with stride 2, then global average pool and FC (Fig. 4b)."""
    return nn.Sequential(
        *(nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, 2 * outputs, 1, 2, bias=False)),
        *(nn.BatchNorm2d(2 * outputs), nn.ReLU(inplace=True)),
        nn.Conv2d(2 * outputs, outputs, 3, padding=1, bias=False),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, outputs)),
    )
