"""Measured time of operating points, executed for real."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from evaluation.results import Plan, Result
from evaluation.tracing import Images, Machine
from inference.executor import Executor
from inference.policies import Never

SIZES = (1, 128)
SINGLES, BATCHES, ROUNDS = 64, 1, 5
APART = 0.02  # of the full network's cost


class Latency(NamedTuple):
    """Milliseconds per image by batch size, and how many times as fast as the full network in the same rounds."""

    milliseconds: dict[int, float]
    speedup: dict[int, float]


class Times(NamedTuple):
    """Of one run: of points of its curve, by row, and of the full network."""

    points: dict[int, Latency]
    full: Latency


def measured(result: Result, plan: Plan, images: Images, machine: Machine) -> Times:
    """Times the points of the front on test images spread over the split, at batch 1 and 128, executed for real.

    Of points less than 2 % of the full network's MACs apart one is timed. The full network (every sample to the end, no
    early head) takes turns with each, so that a machine whose speed drifts slows both; the fastest of a few rounds
    counts.
    """
    run, curve, costs = result.run, result.curve, result.test.costs["macs"]
    rows = []
    if curve is not None:
        rows = _spaced(result.front.tolist(), curve.costs["macs"], APART * costs.backbone)
    batches = batches_of(images, machine)
    full = Executor(run.network, Never(), costs=costs)
    points, fulls = {}, timed([full], batches, machine)
    for row in track(rows, f"Timing {run.label}", transient=True, disable=not sys.stdout.isatty()):
        assert curve is not None
        policy = plan.policy.at(curve.values[row].tolist())
        executor = Executor(run.network, policy, list(result.temperatures), costs)
        point, other = timed([executor, full], batches, machine)
        points[row] = Latency(point, {size: other[size] / point[size] for size in SIZES})
        fulls.append(other)
    print(f"Timed {len(rows)} operating points of {run.label}", flush=True)
    middle = {size: statistics.median(other[size] for other in fulls) for size in SIZES}
    return Times(points, Latency(middle, dict.fromkeys(SIZES, 1.0)))


def batches_of(images: Images, machine: Machine) -> dict[int, Sequence[Tensor]]:
    """Test images spread over the split, one by one and in batches of 128."""
    return {
        1: images.spread(SINGLES, machine.device).split(1),
        128: images.spread(BATCHES * 128, machine.device).split(128),
    }


def _spaced(rows: Sequence[int], costs: Tensor, apart: float) -> list[int]:
    """Those of the rows whose costs are so far apart, by cost, the dearest among them."""
    taken: list[int] = []
    for row in sorted(rows, key=lambda row: -float(costs[row])):
        if not taken or costs[taken[-1]] - costs[row] >= apart:
            taken.append(row)
    return taken[::-1]


@torch.inference_mode()
def timed(
    executors: Sequence[Executor], batches: Mapping[int, Sequence[Tensor]], machine: Machine
) -> list[dict[int, float]]:
    """Milliseconds per image of each executor by batch size."""
    seconds: dict[tuple[int, int], list[float]] = {}
    with machine.autocast():
        for executor, size in itertools.product(executors, SIZES):  # warms up
            for batch in batches[size][:2]:
                executor(batch)
        for _, size, (number, executor) in itertools.product(range(ROUNDS), SIZES, enumerate(executors)):
            _synchronize(machine)
            started = time.perf_counter()
            for batch in batches[size]:
                executor(batch)
            _synchronize(machine)
            seconds.setdefault((number, size), []).append(time.perf_counter() - started)
    images = {size: sum(map(len, part)) for size, part in batches.items()}
    return [
        {size: 1000 * min(seconds[number, size]) / images[size] for size in SIZES} for number in range(len(executors))
    ]


def _synchronize(machine: Machine) -> None:
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    elif machine.device.type == "mps":
        torch.mps.synchronize()
