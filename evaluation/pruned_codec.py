"""Channels of the encoder pruned until the latency is within the bound: a baseline of figure 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from costs.counting import count
from costs.latency import Link
from evaluation.adaptation import Contest
from evaluation.along_bandwidth import EE_PRUNED, Along, Method
from evaluation.runs import TrainedRun
from evaluation.tracing import Images, Machine, Split
from inference.latency_bound import SLACK, Seen
from inference.replay import replay
from inference.thresholds import Confidence
from inference.trace import Trace
from networks.feature_codec import FeatureCodec


class _Width(NamedTuple):
    """A codec that is left with some of its channels.

    Attributes:
        codec: what is left.
        kept: which channels of the whole code these are.
        link: what it sends.
        spared: ms of encoding and decoding that it spares an image.
    """

    codec: FeatureCodec
    kept: Tensor
    link: Link
    spared: float

    def latency(self, seen: Seen, bandwidths: Sequence[float]) -> Tensor:
        """(B,) average ms of an image at the bandwidths, where the whole code has ``seen``, one point."""
        return seen.latency(self.link, bandwidths) - seen.crossing * self.spared


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
        row = torch.tensor([list(lambdas)], dtype=torch.float64)
        traces: dict[Split, Trace] = {"val": these.val, "test": these.test}
        seen = {split: these.seen(Confidence(), row, trace) for split, trace in traces.items()}
        val = [width.latency(seen["val"], these.bandwidths) for width in widths.values()]
        within = torch.stack(val) <= these.setting.bound_ms + SLACK
        within[0] = True  # at least one channel is left
        names = list(widths)
        chosen = [names[int(column.nonzero().max())] for column in within.T]
        taken = {n: widths[n] for n in sorted(set(chosen))}
        along = {}
        for split, trace in traces.items():
            right = self._accuracy(split, trace, lambdas, taken)
            latency = {n: width.latency(seen[split], these.bandwidths) for n, width in taken.items()}
            along[split] = Along(
                torch.tensor([right[n] for n in chosen], dtype=torch.float64),
                torch.stack([latency[n][i] for i, n in enumerate(chosen)]),
            )
        return Method(EE_PRUNED, along["val"], along["test"], channels=torch.tensor(chosen))

    def _widths(self, these: Contest) -> dict[int, _Width]:
        """By the number of channels, rising."""
        codec, convention = self.run.network.codec, these.setting.convention
        assert codec is not None
        times = these.val.costs["latency_ms"]
        feature = torch.zeros(1, *codec.shape, device=codec.limit.device)
        full = count(codec, feature, convention=convention)
        found = {}
        for channels in range(1, codec.code_shape[0] + 1):
            lean, kept = codec.narrowed(channels)
            left = count(lean, feature, convention=convention)
            spared = sum(
                time * (1 - left[part] / full[part])
                for part, time in (("encoder", times.encoder), ("decoder", times.decoder))
            )
            found[channels] = _Width(lean, kept, these.setting.link(lean.payload_bytes), spared)
        return found

    def _accuracy(
        self, split: Split, trace: Trace, lambdas: Sequence[float], widths: dict[int, _Width]
    ) -> dict[int, float]:
        """From 0 to 1, by the number of channels."""
        prediction = replay(Confidence(list(lambdas)), trace).prediction
        crosses = prediction.exit == trace.num_exits
        early = ((prediction.label == trace.labels) & ~crosses).sum()
        labels, truth = self._labels(split, crosses, widths), trace.labels[crosses]
        return {n: float((early + (found == truth).sum()) / len(trace)) for n, found in labels.items()}

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
                    logits = network.on_server(width.codec.decode(codes[:, width.kept.to(codes.device)]))
                    found[n].append(logits.argmax(1).cpu())
        return {n: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for n, parts in found.items()}
