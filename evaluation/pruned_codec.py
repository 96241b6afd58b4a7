"""Channels of the encoder pruned until the latency is within the bound: a baseline of figure 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from costs.latency import Link
from costs.network import NetworkCosts, network_costs
from costs.transmission import sent_bytes
from evaluation.adaptation import Contest
from evaluation.along_bandwidth import EE_PRUNED, Along, Method
from evaluation.runs import TrainedRun
from evaluation.tracing import SPLITS, Images, Machine, Split
from inference.latency_bound import SLACK
from inference.replay import replay
from inference.thresholds import Confidence
from inference.trace import Trace
from networks.early_exit_network import EarlyExitNetwork


class _Width(NamedTuple):
    """A codec that is left with some of its channels.

    Attributes:
        network: with it.
        kept: which channels of the whole code are left.
        link: what it sends.
        spared: ms of encoding and decoding that it spares an image.
    """

    network: EarlyExitNetwork
    kept: Tensor
    link: Link
    spared: float


class PrunedCodec:
    """The method "EE (adaptive, pruning)": λ are static, the code has as many channels as the bound leaves room for.

    Filters of the lowest l2 norm go, nothing is trained again. Where one channel is too many still, one is left.

    Args:
        run: with early exits and a codec.
        images: its data set.
    """

    def __init__(self, run: TrainedRun, images: Images, machine: Machine):
        self.run, self.images, self.machine = run, images, machine

    def __call__(self, these: Contest, lambdas: Sequence[float]) -> Method:
        widths = self._widths(these)
        val = [self._latency(these, these.val, lambdas, width) for width in widths.values()]
        within = torch.stack(val) <= these.setting.bound_ms + SLACK
        within[0] = True  # at least one channel is left
        names = list(widths)
        chosen = [names[int(column.nonzero().max())] for column in within.T]
        val_along, test_along = (self._along(split, these, lambdas, widths, chosen) for split in SPLITS)
        return Method(EE_PRUNED, val_along, test_along, channels=torch.tensor(chosen))

    def _widths(self, these: Contest) -> dict[int, _Width]:
        """By the number of channels, rising."""
        network, codec = self.run.network, self.run.network.codec
        assert codec is not None
        full, times = network_costs(network, these.setting.convention), these.val.costs["latency_ms"]
        found = {}
        for channels in range(1, codec.code_shape[0] + 1):
            lean, kept = codec.narrowed(channels)
            narrow = EarlyExitNetwork(network.chain, network.taps, list(network.heads), codec=lean).eval()
            spared = _spared(times, full, network_costs(narrow, these.setting.convention))
            found[channels] = _Width(narrow, kept, these.setting.link(sent_bytes(narrow).link), spared)
        return found

    @staticmethod
    def _latency(these: Contest, trace: Trace, lambdas: Sequence[float], width: _Width) -> Tensor:
        """(B,) average ms at the bandwidths, with the static λ and a code of this width."""
        seen = these.seen(Confidence(), torch.tensor([list(lambdas)], dtype=torch.float64), trace)
        return seen.latency(width.link, these.bandwidths) - seen.crossing * width.spared

    def _along(
        self, split: Split, these: Contest, lambdas: Sequence[float], widths: dict[int, _Width], chosen: list[int]
    ) -> Along:
        trace = these.val if split == "val" else these.test
        prediction = replay(Confidence(list(lambdas)), trace).prediction
        crosses = prediction.exit == trace.num_exits
        early = ((prediction.label == trace.labels) & ~crosses).sum()
        labels = self._labels(split, crosses, {n: widths[n] for n in sorted(set(chosen))})
        right = {n: float((early + (found == trace.labels[crosses]).sum()) / len(trace)) for n, found in labels.items()}
        latency = {n: self._latency(these, trace, lambdas, widths[n]) for n in labels}
        return Along(
            torch.tensor([right[n] for n in chosen], dtype=torch.float64),
            torch.stack([latency[n][i] for i, n in enumerate(chosen)]),
        )

    @torch.inference_mode()
    def _labels(self, split: Split, crosses: Tensor, widths: dict[int, _Width]) -> dict[int, Tensor]:
        """What the server answers for the images that cross, by the number of channels."""
        network: Any = self.run.network
        found: dict[int, list[Tensor]] = {n: [] for n in widths}
        start = 0
        for images, *_ in self.images.batches(split, self.machine.device, f"Pruning the codec, {split} split"):
            rows = crosses[start : start + len(images)].to(images.device)
            start += len(images)
            if not rows.any():
                continue
            with self.machine.autocast():
                codes = network.codec.encode(network.chain.run(images[rows], stop=network.cut))
                for n, width in widths.items():
                    codec: Any = width.network.codec
                    logits = width.network.on_server(codec.decode(codes[:, width.kept.to(codes.device)]))
                    found[n].append(logits.argmax(1).cpu())
        return {n: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for n, parts in found.items()}


def _spared(times: NetworkCosts, full: NetworkCosts, lean: NetworkCosts) -> float:
    """ms of the encoder and decoder, as the share of their operations that is gone."""
    return times.encoder * (1 - lean.encoder / full.encoder) + times.decoder * (1 - lean.decoder / full.decoder)
