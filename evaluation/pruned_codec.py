"""Channels of the encoder pruned until the latency is within the bound: a baseline of figure 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from costs.latency import network_latency
from costs.transmission import sent_bytes
from evaluation.adaptation import EE_PRUNED, Along, Comparison, Method
from evaluation.runs import TrainedRun
from evaluation.tracing import Images, Machine, Split
from inference.latency_bound import SLACK, Link
from inference.replay import replay
from inference.thresholds import Confidence
from networks.early_exit_network import EarlyExitNetwork

LEVELS = 12  # numbers of channels that are tried, at most


class _Width(NamedTuple):
    """A codec that is left with some of its channels.

    Attributes:
        network: with it.
        kept: which channels of the whole code are left.
        link: what it sends.
        spared: ms that it spares an image that crosses the cut.
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

    def __call__(self, these: Comparison, lambdas: Sequence[float]) -> Method:
        widths = self._widths(these)
        row = torch.tensor([list(lambdas)], dtype=torch.float64)
        seen = {"val": these.seen(Confidence(), row, these.val), "test": these.seen(Confidence(), row, these.test)}
        chosen = []
        for mbps in these.bandwidths:
            computing, crossing = seen["val"].computing, seen["val"].crossing
            latency = {n: float(computing + crossing * (w.link.ms(mbps) - w.spared)) for n, w in widths.items()}
            fitting = [n for n in widths if latency[n] <= these.setting.bound_ms + SLACK]
            chosen.append(max(fitting, default=min(widths)))
        along = {split: self._along(split, these, lambdas, widths, chosen) for split in ("val", "test")}
        return Method(EE_PRUNED, along["val"], along["test"], channels=torch.tensor(chosen))

    def _widths(self, these: Comparison) -> dict[int, _Width]:
        network, codec = self.run.network, self.run.network.codec
        assert codec is not None
        whole = codec.code_shape[0]
        full = network_latency(network, these.setting)
        found = {}
        for channels in sorted({round(n) for n in torch.linspace(1, whole, min(whole, LEVELS)).tolist()}):
            lean, kept = codec.narrowed(channels)
            narrow = EarlyExitNetwork(network.chain, network.taps, list(network.heads), codec=lean).eval()
            costs = network_latency(narrow, these.setting)
            spared = full.encoder + full.decoder - costs.encoder - costs.decoder
            link = Link(sent_bytes(narrow).link, these.setting.delay_ms)
            found[channels] = _Width(narrow, kept, link, spared)
        return found

    def _along(
        self,
        split: Split,
        these: Comparison,
        lambdas: Sequence[float],
        widths: dict[int, _Width],
        chosen: Sequence[int],
    ) -> Along:
        trace = these.val if split == "val" else these.test
        prediction = replay(Confidence(list(lambdas)), trace).prediction
        crosses = prediction.exit == trace.num_exits
        right = (prediction.label == trace.labels) & ~crosses
        labels = self._labels(split, crosses, {n: widths[n] for n in sorted(set(chosen))})
        accuracy = {
            n: float((right.sum() + (label == trace.labels[crosses]).sum()) / len(trace)) for n, label in labels.items()
        }
        seen = these.seen(Confidence(), torch.tensor([list(lambdas)], dtype=torch.float64), trace)
        latency = [
            float(seen.computing + seen.crossing * (widths[n].link.ms(mbps) - widths[n].spared))
            for n, mbps in zip(chosen, these.bandwidths, strict=True)
        ]
        return Along(
            torch.tensor([accuracy[n] for n in chosen], dtype=torch.float64), torch.tensor(latency, dtype=torch.float64)
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
