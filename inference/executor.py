"""Runs images through a network with early exits and stops where the policy says: each at its own exit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from costs.network import NetworkCosts, network_costs
from inference.policies import Decision, Policy, State
from networks.chain import Shape
from networks.exits import EarlyExitNetwork

CACHE = 2**22  # bytes
LEAST_PIECE = 32  # images


class Prediction(NamedTuple):
    """What became of N samples.

    Attributes:
        label: (N,) int64, the class answered.
        confidence: (N,) float32, its softmax probability.
        exit: (N,) int64, where the sample left, from 1.
        macs: (N,) int64, spent on the sample.
    """

    label: Tensor
    confidence: Tensor
    exit: Tensor
    macs: Tensor


class Way(Protocol):
    """What the samples go along: a network that computes, or a trace that remembers."""

    def advance(self, k: int) -> Tensor | int:
        """Brings all samples on the way to exit k, from 1; gives the MACs of that segment, (n,) or the same for all."""

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Logits (m, C) float32 of head k for the samples ``wanted`` (m,), None for all, and the MACs of it."""

    def keep(self, staying: Tensor) -> None:
        """Leaves only these samples (m,) on the way."""


class Executor:
    """Executes one policy on one network; what is not needed is not computed.

    At an exit the samples that leave are taken out of the batch and the rest go on as a smaller one. A head is
    computed for the samples that the policy wants it for. A batch of one is never indexed. A processor takes a large
    batch in pieces that fit its cache. Runs where the network is, in the precision of the surrounding
    ``torch.autocast``; scores are taken in fp32.

    Args:
        network: put into eval mode.
        policy: with its thresholds.
        temperatures: of each exit's logits, N numbers; None for 1.
        costs: of the network in MACs, where they are counted already.

    Raises:
        ValueError: a policy or temperatures that do not fit the network.
    """

    def __init__(
        self,
        network: EarlyExitNetwork,
        policy: Policy,
        temperatures: list[float] | None = None,
        costs: NetworkCosts | None = None,
    ):
        self.network = network.eval()
        self.policy, self.temperatures = policy, temperatures
        self.costs = costs or network_costs(network)
        self.heads: list[nn.Module] = [*network.heads, network.chain.head]
        self.ends = (*network.taps, len(network.chain.blocks))
        shapes = network.chain.tap_shapes()
        self.pieces = [_piece(shapes[start : end + 1]) for start, end in pairwise((0, *self.ends))]
        policy.check(self.costs, network.chain.num_classes)
        fits = temperatures is None or len(temperatures) == network.num_exits
        if not fits or not all(0 < temperature < math.inf for temperature in temperatures or ()):
            raise ValueError(f"Expected {network.num_exits} temperatures above 0, one an exit, got {temperatures}.")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Normalized images (N, C, H, W), N at least 1, to what became of them.

        Raises:
            ValueError: an exit's logits are not numbers.
        """
        return travel(self.policy, NetworkWay(self, images), self.costs, len(images), images)


def _piece(shapes: Sequence[Shape]) -> int:
    """How many images at a time a processor takes through features of these shapes: as many as its cache holds."""
    largest = max(map(math.prod, shapes))
    return max(LEAST_PIECE, CACHE // (4 * largest))


class NetworkWay:
    """The samples' features on their way along a network."""

    def __init__(self, executor: Executor, images: Tensor):
        self.executor, self.feature = executor, images
        self.at: int | None = None

    def advance(self, k: int) -> int:
        x, end, piece = self.feature, self.executor.ends[k - 1], self.executor.pieces[k - 1]
        run = self.executor.network.chain.run
        if len(x) > piece and x.device.type == "cpu":
            parts = x.tensor_split(-(-len(x) // piece))
            self.feature = torch.cat([run(part, self.at, end) for part in parts])
        else:
            self.feature = run(x, self.at, end)
        self.at = end
        return self.executor.costs.segments[k - 1]

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, int]:
        feature = self.feature if wanted is None else self.feature[wanted]
        logits = self.executor.heads[k - 1](feature).float()
        if self.executor.temperatures is not None:
            logits = logits / self.executor.temperatures[k - 1]
        return logits, self.executor.costs.heads[k - 1]

    def keep(self, staying: Tensor) -> None:
        self.feature = self.feature[staying]  # index_select would not keep channels_last


class Leaving(NamedTuple):
    """Samples that left together: where in the batch (None: all of it), logits (m, C), exit, MACs (m,)."""

    rows: Tensor | None
    logits: Tensor
    exit: int
    macs: Tensor


def travel(policy: Policy, way: Way, costs: NetworkCosts, count: int, images: Tensor | None = None) -> Prediction:
    """Takes ``count`` samples along a way until each has left.

    Args:
        costs: static, of the network.
        images: for the policy; None in replay.
    """
    device = None if images is None else images.device
    state = State(costs, torch.zeros(count, dtype=torch.int64, device=device))
    policy.begin(images, state)
    gone: list[Leaving] = []
    way = _Checked(way)
    rows: Tensor | None = None
    for k in range(1, len(costs.heads) + 1):
        state.spent = state.spent + way.advance(k)
        left = _at_exit(policy, way, state, k, last=k == len(costs.heads))
        if left is None:
            continue
        leaving, logits, spent = left
        if leaving is None:
            gone.append(Leaving(rows, logits, k, spent))
            break
        gone.append(Leaving(leaving if rows is None else rows.index_select(0, leaving), logits, k, spent))
        staying = torch.ones(len(state.spent), dtype=torch.bool, device=device).index_fill_(0, leaving, False)
        index = staying.nonzero()[:, 0]
        rows = index if rows is None else rows.index_select(0, index)
        state = state.rows(index)
        way.keep(index)
    way.require_numbers()
    return _joined(gone)


class _Checked:
    """A way that notes which heads gave no numbers; asked once, at its end, since a GPU is waited for each time."""

    def __init__(self, way: Way):
        self.advance, self.keep, self.inner = way.advance, way.keep, way
        self.sums: dict[int, Tensor] = {}

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, Tensor | int]:
        logits, cost = self.inner.head(k, wanted)
        self.sums[k] = logits.sum()
        return logits, cost

    def require_numbers(self) -> None:
        for k, total in self.sums.items():
            if not math.isfinite(total):
                raise ValueError(
                    f"Expected numbers from exit {k}, got NaN or infinity; were these weights trained to their end?"
                )


def _at_exit(policy: Policy, way: Way, state: State, k: int, last: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """Who leaves at exit k (None: all), with which logits, having spent what; None where nobody does."""
    some, wanted = (True, None) if last else _chosen(policy.wants(k, state))
    if not some:
        return None
    logits, cost = way.head(k, wanted)
    part = state if wanted is None else state.rows(wanted)
    part.spent = part.spent + cost
    some, leaving = (True, None) if last else _chosen(policy.leaves(k, logits, part))
    if wanted is not None:
        state.put(wanted, part)
    if not some:
        return None
    if leaving is not None:
        logits, part = logits.index_select(0, leaving), part.rows(leaving)
    if wanted is not None:
        leaving = wanted if leaving is None else wanted.index_select(0, leaving)
    return leaving, logits, part.spent


def _chosen(decision: Decision) -> tuple[bool, Tensor | None]:
    """Whether anybody is chosen, and who: an index (m,), None for all."""
    if isinstance(decision, bool):
        return decision, None
    if len(decision) == 1:
        return bool(decision), None
    index = decision.nonzero()[:, 0]
    return len(index) > 0, None if len(index) == len(decision) else index


def _joined(gone: list[Leaving]) -> Prediction:
    """Who left where, in the order of the batch."""
    if gone[0].rows is None:
        return _answers(gone[0])
    order = torch.cat([group.rows for group in gone if group.rows is not None])
    columns = [torch.cat(parts) for parts in zip(*(_answers(group) for group in gone), strict=True)]
    return Prediction(*(torch.empty_like(column).index_copy_(0, order, column) for column in columns))


def _answers(group: Leaving) -> Prediction:
    label, confidence = answers(group.logits)
    return Prediction(label, confidence, torch.full_like(label, group.exit), group.macs)


def answers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Label (n,) and its softmax probability (n,) of logits (n, C)."""
    # not the softmax's argmax: in fp32 a second probability may be 1, or as large as the largest, too
    return logits.argmax(1), logits.softmax(1).amax(1)
