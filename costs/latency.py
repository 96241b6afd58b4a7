"""The latency of an image between device and server (equation 11 of the Exit Predictor paper)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from costs.counting import Convention
from costs.gates import BlockGates
from costs.network import NetworkCosts, network_costs
from costs.transmission import sent_bytes
from networks.early_exit_network import EarlyExitNetwork

UNMEASURED = (
    "co_inference.measured=true is for networks without gates, whose parts take the same time for every image; leave "
    "it out, so that latencies are of operations."
)
SECONDS = 0.02  # that each part is run for, at least, when it is measured


@dataclass(frozen=True)
class Link:
    """Between device and server.

    Attributes:
        sent: bytes of an image that crosses.
        delay_ms: whatever is sent.
    """

    sent: float
    delay_ms: float = 0.0

    def ms(self, bandwidth_mbps: float) -> float:
        """Milliseconds of an image that crosses; 10⁶ bit/s.

        Raises:
            ValueError: a bandwidth that is not above 0.
        """
        if not bandwidth_mbps > 0:
            raise ValueError(f"Expected a bandwidth above 0 Mbit/s, got {bandwidth_mbps:g}.")
        return self.delay_ms + 8 * self.sent / (1000 * bandwidth_mbps)


@dataclass(frozen=True)
class CoInference:
    """A device, a link and a server. What is not said is the paper's: a Raspberry Pi 3, and no time on the server.

    Attributes:
        name: of the device.
        device_gflops: 10⁹ operations a second on the device, of ``convention``.
        convention: what an operation is, ``ptflops`` (the paper's FLOPs: a multiply-accumulate is one) or ``macs``.
        measured: whether the device's times are this machine's, in milliseconds, instead.
        server_gflops: the same of the server; None where its time does not count.
        bandwidth_mbps: 10⁶ bit/s; infinity for no time on the link.
        delay_ms: of the link, whatever is sent.
        bound_ms: τ, which the average latency should stay below.

    Raises:
        ValueError: a value outside its range.
    """

    name: str = "Raspberry Pi 3"
    device_gflops: float = 3.62
    convention: Convention = "ptflops"
    measured: bool = False
    server_gflops: float | None = None
    bandwidth_mbps: float = 1.0
    delay_ms: float = 0.0
    bound_ms: float = 30.0

    def __post_init__(self) -> None:
        if self.convention not in ("macs", "ptflops"):
            raise ValueError(f"Expected co_inference.convention to be macs or ptflops, got {self.convention}.")
        if not isinstance(self.measured, bool):
            raise ValueError(f"Expected co_inference.measured to be true or false, got {self.measured}.")
        for key in ("device_gflops", "server_gflops", "bandwidth_mbps", "bound_ms"):
            value = getattr(self, key)
            free = key == "server_gflops" and value is None
            if not free and (not _is_number(value) or not value > 0):
                raise ValueError(f"Expected co_inference.{key} to be a number above 0, got {value}.")
        if not _is_number(self.delay_ms) or not 0 <= self.delay_ms < math.inf:
            raise ValueError(f"Expected co_inference.delay_ms to be a number of at least 0, got {self.delay_ms}.")

    def link(self, sent: float) -> Link:
        """What an image meets that crosses the cut with ``sent`` bytes."""
        return Link(sent, self.delay_ms)

    def latency(self, counts: NetworkCosts, sent: NetworkCosts, times: NetworkCosts | None = None) -> NetworkCosts:
        """Milliseconds of every part (``latency_ms``): the device's, the link's at ``bandwidth_mbps``, the server's.

        Args:
            counts: of the network, in ``convention``.
            sent: bytes of the same network.
            times: milliseconds on the device that were measured, where they are.

        Raises:
            ValueError: counts of another convention.
        """
        if counts.convention != self.convention:
            raise ValueError(f"Expected operations in {self.convention}, got {counts.convention}.")
        end = counts.device_ends
        server = 0.0 if self.server_gflops is None else 1 / (1e6 * self.server_gflops)
        device = _scaled(counts, 1 / (1e6 * self.device_gflops)) if times is None else times
        behind = device if end is None else _scaled(counts, server)
        on_device = len(counts.blocks) if end is None else end
        return replace(
            device,
            convention="latency_ms",
            blocks=(*device.blocks[:on_device], *behind.blocks[on_device:]),
            heads=(*device.heads[:-1], behind.heads[-1]),
            gates=(*device.gates[:on_device], *behind.gates[on_device:]),
            decoder=behind.decoder,
            link=0 if end is None else self.link(sent.link).ms(self.bandwidth_mbps),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scaled(costs: NetworkCosts, factor: float) -> NetworkCosts:
    gates = (
        BlockGates(
            factor * g.layer, factor * g.channel, factor * g.fixed, factor * g.each, factor * g.square, g.channels
        )
        for g in costs.gates
    )
    return replace(
        costs,
        stem=factor * costs.stem,
        blocks=tuple(factor * block for block in costs.blocks),
        heads=tuple(factor * head for head in costs.heads),
        predictor=factor * costs.predictor,
        gates=tuple(gates),
        encoder=factor * costs.encoder,
        decoder=factor * costs.decoder,
    )


def network_latency(
    network: EarlyExitNetwork, setting: CoInference, counts: Mapping[str, NetworkCosts] | None = None
) -> NetworkCosts:
    """Milliseconds of every part of a network under ``setting``.

    Args:
        counts: of the network, by convention, where they are known.

    Raises:
        ValueError: times are to be measured of a network with gates, which take others for each image.
    """
    known = (counts or {}).get(setting.convention) or network_costs(network, setting.convention)
    times = measured_times(network) if setting.measured else None
    return setting.latency(known, sent_bytes(network), times)


@torch.inference_mode()
def measured_times(network: EarlyExitNetwork) -> NetworkCosts:
    """Milliseconds of every part on this machine, one image at a time, in eval mode: the median of some repetitions.

    Raises:
        ValueError: a network with gates.
    """
    if network.gating is not None:
        raise ValueError(UNMEASURED)
    network = copy.deepcopy(network).eval()
    image = torch.zeros(1, *network.chain.input_shape, device=next(network.parameters()).device)
    chain, codec = network.chain, network.codec
    x = chain.run(image, stop=0)
    stem, blocks, heads = _ms(chain.stem, image), [], []
    coding = [0.0, 0.0]
    for i, block in enumerate(chain.blocks):
        blocks.append(_ms(block, x))
        x = block(x)
        if i + 1 in network.taps:
            heads.append(_ms(network.heads[network.taps.index(i + 1)], x))
        if codec is not None and codec.cut == i + 1:
            coding = [_ms(codec.encode, x), _ms(codec.decode, codec.encode(x))]
    heads.append(_ms(chain.head, x))
    predictor = 0.0 if network.predictor is None else _ms(network.predictor, image)
    cut = None if codec is None else codec.cut
    return NetworkCosts(
        "latency_ms", stem, tuple(blocks), tuple(heads), network.taps, predictor, (), cut, coding[0], 0, coding[1]
    )


def _ms(part: nn.Module | Any, x: Tensor) -> float:
    from torch.utils.benchmark import Timer  # looks for a CUDA compiler, and says so

    timer = Timer("part(x)", globals={"part": part, "x": x}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=SECONDS).median
