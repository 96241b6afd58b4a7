"""What gates skip: shares per block and per image, and what is saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from costs.network import NetworkCosts
from inference.trace import Trace
from networks.gates import Decisions


def skip_ratios(decisions: Decisions) -> Tensor:
    """Share of the images that skip each block: (B,) float64."""
    return 1 - decisions.runs.double().mean(1)


def closed_ratios(decisions: Decisions, channels: Sequence[int]) -> Tensor:
    """Share of each block's channels that are closed in images that run it: (B,) float64, NaN where none does.

    Args:
        channels: how many each block gates.
    """
    whole = torch.tensor(list(channels), dtype=torch.float64)
    ran = decisions.runs.double()
    return 1 - (decisions.channels * ran).sum(1) / (whole * ran.sum(1))


def way_costs(trace: Trace, convention: str = "macs") -> Tensor:
    """What the backbone with its own head and its gates cost each image, no other head computed: (samples,)."""
    return trace.segments[convention].sum(0) + trace.heads[convention][-1]


def savings(trace: Trace, convention: str = "macs") -> Tensor:
    """Share of the plain backbone's cost that each image was spared, gates included: (samples,) float64."""
    return 1 - way_costs(trace, convention).double() / trace.costs[convention].plain


def gated_channels(costs: NetworkCosts) -> list[int]:
    """How many channels each block gates."""
    return [gate.channels for gate in costs.gates]
