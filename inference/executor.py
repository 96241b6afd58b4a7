"""Runs images through a network with early exits and stops where the policy says: each at its own exit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from costs.network import NetworkCosts, network_costs
from inference.gated import GatedFeatures
from inference.policies import Policy
from inference.travel import Prediction, answers, travel
from networks.chain import Shape
from networks.early_exit_network import EarlyExitNetwork

CACHE = 2**22  # bytes
LEAST_PIECE = 32  # images


class Executor:
    """Executes one policy on one network; what is not needed is not computed.

    At an exit the samples that leave are taken out of the batch and the rest go on as a smaller one. A block that is
    skipped is not run, in a batch for those that skip it; of a single image closed channels are not computed. A head is
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
        # of images with gates a part skips, and what a piece costs beside its blocks counts for more
        larger = 1 if network.gating is None else 2
        self.pieces = [larger * _piece(shapes[start : end + 1]) for start, end in pairwise((0, *self.ends))]
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
        way = NetworkWay(self, images)
        prediction = travel(self.policy, way, self.costs, len(images), images.device)
        self._beyond = way.beyond, prediction.macs
        return prediction

    def anytime(self, images: Tensor) -> Iterator[Prediction]:
        """Answers that get better while one pass goes on: what every exit says of all images, exit by exit.

        Whoever takes them may stop at any of them; what follows is not computed. The policy is not asked. ``macs`` are
        those of all exits so far.

        Raises:
            ValueError: an exit's logits are not numbers.
        """
        way = NetworkWay(self, images)
        spent = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        device = spent
        for k in range(1, self.network.num_exits + 1):
            with torch.inference_mode():
                spent = spent + way.advance(k)
                logits, cost = way.head(k, None)
                spent = spent + int(cost)
                crossed = k == self.network.num_exits and self.costs.device_ends is not None
                device = device + int(self.costs.to_cut) if crossed else spent
                label, confidence = answers(logits)
                if not confidence.isfinite().all():
                    raise ValueError(
                        f"Expected numbers from exit {k}, got NaN; were these weights trained to their end?"
                    )
                self._beyond = way.beyond, spent
                exit = torch.full_like(label, k)
            yield Prediction(label, confidence, exit, spent, device)

    @property
    def executed_macs(self) -> float:
        """What the last call really computed, average of an image; ``macs`` is what the decisions made necessary.

        Channels that are closed in a batch are computed all the same, and a recurrent gate is computed with its
        convolution folded in.
        """
        beyond, macs = self._beyond
        return macs.double().mean().item() + beyond / len(macs)


def _piece(shapes: Sequence[Shape]) -> int:
    """How many images at a time a processor takes through features of these shapes: as many as its cache holds."""
    largest = max(map(math.prod, shapes))
    return max(LEAST_PIECE, CACHE // (4 * largest))


class NetworkWay:
    """The samples' features on their way along a network.

    Attributes:
        beyond: MACs that were computed beyond those that were spent.
    """

    def __init__(self, executor: Executor, images: Tensor):
        self.executor, self.feature = executor, images
        self.at: int | None = None
        self.beyond = 0
        self.gated: GatedFeatures | None = None

    def predict(self) -> tuple[Tensor, float]:
        predictor = self.executor.network.predictor
        assert predictor is not None  # or the policy's check would have refused
        return predictor.scores(self.feature), self.executor.costs.predictor

    def advance(self, k: int) -> Tensor | float:
        if self.executor.network.gating is not None:
            return self._advance_gated(k)
        x, end, piece = self.feature, self.executor.ends[k - 1], self.executor.pieces[k - 1]
        run = self._across if k == self.executor.network.num_exits else self.executor.network.chain.run
        if len(x) > piece and x.device.type == "cpu":
            parts = x.tensor_split(-(-len(x) // piece))
            self.feature = torch.cat([run(part, self.at, end) for part in parts])
        else:
            self.feature = run(x, self.at, end)
        self.at = end
        return self.executor.costs.segments[k - 1]

    def _across(self, x: Tensor, start: int | None, end: int) -> Tensor:
        """The last segment, what lies at the cut included."""
        chain, codec = self.executor.network.chain, self.executor.network.codec
        if codec is None:
            return chain.run(x, start, end)
        return chain.run(codec(chain.run(x, start, codec.cut)), codec.cut, end)

    def _advance_gated(self, k: int) -> Tensor:
        network, costs = self.executor.network, self.executor.costs
        stem: float = 0
        if self.gated is None:
            feature = network.chain.run(self.feature, stop=0)
            owned = feature.clone() if feature is self.feature else feature
            self.gated, stem = GatedFeatures(network, costs, owned), costs.stem
        macs = self.gated.advance(self.executor.ends[k - 1], self.executor.pieces[k - 1])
        self.feature, self.beyond = self.gated.feature, self.gated.beyond
        return macs + stem

    def head(self, k: int, wanted: Tensor | None) -> tuple[Tensor, float]:
        feature = self.feature if wanted is None else self.feature[wanted]
        logits = self.executor.heads[k - 1](feature).float()
        if self.executor.temperatures is not None:
            logits = logits / self.executor.temperatures[k - 1]
        return logits, self.executor.costs.heads[k - 1]

    def keep(self, staying: Tensor) -> None:
        self.feature = self.feature[staying]  # index_select would not keep channels_last
        if self.gated is not None:
            self.gated.keep(staying, self.feature)
