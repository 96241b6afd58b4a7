"""Images that arrive while the bandwidth changes: what each is answered, and how long it takes, by replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.bandwidth import BandwidthTrace
from inference.latency_bound import Link
from inference.policies import Policy
from inference.predicted import Predicted
from inference.replay import replay
from inference.thresholds import Thresholds
from inference.trace import Trace

SLACK = 1e-6  # ms, of times in floating point that are summed over a whole trace of bandwidths
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Stream:
    """M images in the order they arrive.

    Attributes:
        arrival_s: (M,) float64, seconds, of the trace of bandwidths.
        bandwidth: (M,) float64, Mbit/s when it arrives, whether that is known by then or not.
        exit: (M,) int64, where it leaves, from 1.
        right: (M,) bool, whether the answer is.
        latency_ms: (M,) float64, from its arrival to its answer.
        thresholds: (M, D) float64, those of the policy it met: λ of each early exit, then γ for a ``Predicted``; D is 0
            for a policy without thresholds.
    """

    arrival_s: Tensor
    bandwidth: Tensor
    exit: Tensor
    right: Tensor
    latency_ms: Tensor
    thresholds: Tensor


def simulate(
    policy_of: Callable[[float], Policy],
    trace: Trace,
    bandwidths: BandwidthTrace,
    images_per_s: float,
    link: Link,
    link_ms: float,
    lag_s: float = 0.0,
    seed: int = 0,
) -> Stream:
    """Sends samples of a split through device, link and server from the start of the bandwidths to their end.

    They arrive evenly, drawn without replacement, and anew when all have been. Those that cross the cut begin to send
    when the device is done with them, and meet the bandwidths as they change. Images do not wait for each other: each
    has the device, the link and the server to itself.

    Args:
        policy_of: from the bandwidth known, in Mbit/s, to the operating point; asked once for each bandwidth.
        trace: priced in ``latency_ms`` at any bandwidth.
        link: what an image that crosses sends, and the delay.
        link_ms: what ``trace`` has for the link in ``latency_ms``, of an image that crosses.
        lag_s: how old the bandwidth is that is known, the first one at the beginning.
        seed: of the order of the samples.

    Raises:
        ValueError: arguments outside their range; a trace without ``latency_ms``, or with another ``link_ms``; what
            ``policy_of`` raises, or a policy that does not fit the trace's network.
    """
    _check(trace, images_per_s, link_ms, lag_s)
    arrival = _arrivals(bandwidths, images_per_s)
    drawn = _drawn(len(trace), len(arrival), seed)
    known, which, counts = bandwidths.at(arrival - lag_s).unique(return_inverse=True, return_counts=True)
    order = which.argsort(stable=True)
    groups = zip(known.tolist(), order.split(counts.tolist()), strict=True)
    parts = [_told(policy_of(mbps), trace.rows(drawn[rows])) for mbps, rows in groups]
    if len({part.shape[1] for part in parts}) > 1:
        raise ValueError("Expected as many thresholds at every bandwidth, got policies with other numbers of them.")
    told = torch.cat(parts)[order.argsort()]
    exit, right, latency, device = told[:, 0].long(), told[:, 1].bool(), told[:, 2], told[:, 3]
    if trace.costs["latency_ms"].device_ends is not None:
        done = arrival + device / 1000
        sending = link.delay_ms + 1000 * (bandwidths.arrival(done, 8 * link.sent) - done)
        latency = torch.where(exit == trace.num_exits, latency - link_ms + sending, latency)
    return Stream(arrival, bandwidths.at(arrival), exit, right, latency, told[:, 4:])


def _check(trace: Trace, images_per_s: float, link_ms: float, lag_s: float) -> None:
    if not 0 < images_per_s < math.inf:
        raise ValueError(f"Expected images a second above 0 and finite, got {images_per_s:g}.")
    if not 0 <= lag_s < math.inf:
        raise ValueError(f"Expected a lag of the known bandwidth of at least 0 s, got {lag_s:g}.")
    if not len(trace):
        raise ValueError("Expected at least one sample to draw images from, the trace has none.")
    if "latency_ms" not in trace.costs:
        raise ValueError(
            f"Expected a trace that is priced in latency_ms, this one has {', '.join(trace.costs)}; add it with "
            "trace.priced(network_latency(...))."
        )
    costs = trace.costs["latency_ms"]
    if costs.device_ends is not None and not math.isclose(costs.link, link_ms, rel_tol=1e-9, abs_tol=1e-9):
        raise ValueError(f"Expected link_ms to be the {costs.link:g} ms that the trace has, got {link_ms:g}.")


def _arrivals(bandwidths: BandwidthTrace, images_per_s: float) -> Tensor:
    """(M,) seconds, the first at the start, none at the end or after."""
    count = math.ceil((bandwidths.end - bandwidths.start) * images_per_s - 1e-9)
    return bandwidths.start + torch.arange(max(1, count), dtype=torch.float64) / images_per_s


def _drawn(samples: int, images: int, seed: int) -> Tensor:
    """(images,) int64, rows of a trace."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(samples, generator=generator) for _ in range(-(-images // samples))]
    return torch.cat(rounds)[:images]


def _told(policy: Policy, rows: Trace) -> Tensor:
    """(samples, 4 + D) float64: the exit, whether it is right, milliseconds in all and on the device, thresholds."""
    outcome = replay(policy, rows)
    right = outcome.prediction.label == rows.labels
    costs = (outcome.cost(rows, kind) for kind in ("latency_ms", "device_latency_ms"))
    columns = torch.stack([column.double() for column in (outcome.prediction.exit, right, *costs)], 1)
    values = torch.tensor(_thresholds(policy, rows.num_exits), dtype=torch.float64)
    return torch.cat([columns, values.expand(len(rows), -1)], 1)


def _thresholds(policy: Policy, exits: int) -> list[float]:
    if not isinstance(policy, Thresholds):
        return []
    return [*policy.each(exits), *(policy.gammas(exits) if isinstance(policy, Predicted) else [])]


def summarized(stream: Stream, bound_ms: float, num_exits: int, window_s: float = 1.0) -> dict[str, float]:
    """A stream in numbers.

    Args:
        bound_ms: τ.
        window_s: seconds that the latency is averaged over, for ``windows_over_bound``.

    Returns:
        ``latency_ms`` (the mean), ``latency_ms/p50``, ``/p95`` and ``/p99``, ``acc``, ``exit_k/fraction`` of each exit
        k, ``over_bound``: share of the images whose latency is above the bound, and ``windows_over_bound``: share of
        the windows whose average latency is. Shares are from 0 to 1.
    """
    latency, images = stream.latency_ms, len(stream.arrival_s)
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    percentiles = zip(PERCENTILES, latency.quantile(ranks).tolist(), strict=True)
    shares = (torch.bincount(stream.exit - 1, minlength=num_exits).double() / images).tolist()
    windows = averaged(latency, stream.arrival_s, window_s)[1]
    return {
        "latency_ms": float(latency.mean()),
        **{f"latency_ms/p{rank}": value for rank, value in percentiles},
        "acc": float(stream.right.double().mean()),
        **{f"exit_{k}/fraction": share for k, share in enumerate(shares, start=1)},
        "over_bound": float((latency > bound_ms + SLACK).double().mean()),
        "windows_over_bound": float((windows > bound_ms + SLACK).double().mean()),
    }


def averaged(values: Tensor, arrival_s: Tensor, window_s: float) -> tuple[Tensor, Tensor]:
    """Averages over windows of time, from the first image on; those in which none arrives are left out.

    Args:
        values: (M,), of the images.
        arrival_s: (M,) seconds, rising.

    Returns:
        (W,) seconds when each window begins, and (W,) float64 averages.

    Raises:
        ValueError: a window that is not above 0 s.
    """
    if not 0 < window_s < math.inf:
        raise ValueError(f"Expected a window above 0 s and finite, got {window_s:g}.")
    # a little more, since an image at the edge of a window may seem to arrive just before it
    number = ((arrival_s - arrival_s[0]) / window_s + 1e-6).floor()
    windows, which, counts = number.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(windows), dtype=torch.float64).index_add(0, which, values.double())
    return arrival_s[0] + windows * window_s, sums / counts
