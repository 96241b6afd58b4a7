"""Measured time of operating points, executed for real."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from evaluation.runs import TrainedRun
from evaluation.tracing import Images, Machine
from inference.executor import Executor
from inference.policies import Never, Policy

SIZES = (1, 128)
SINGLES, BATCHES, ROUNDS = 64, 2, 3
APART = 0.02  # of the full network's cost


def spaced(rows: Sequence[int], costs: Tensor, full: float) -> list[int]:
    """Those of the rows, by their cost, that are at least 2 % of the full network's apart: the last and on from it."""
    taken: list[int] = []
    for row in sorted(rows, key=lambda row: -float(costs[row])):
        if not taken or costs[taken[-1]] - costs[row] >= APART * full:
            taken.append(row)
    return taken[::-1]


class Latency(NamedTuple):
    """Milliseconds per image by batch size, and how many times as fast as the full network in the same rounds."""

    milliseconds: dict[int, float]
    speedup: dict[int, float]


def measure(
    run: TrainedRun, policies: Sequence[Policy], temperatures: list[float], images: Images, machine: Machine
) -> tuple[list[Latency], Latency]:
    """Times each policy on the first test images, at batch 1 and 128.

    The full network (every sample to the end, no early head) is timed in turn with each policy, so that a machine whose
    speed drifts slows both; of a few rounds the fastest counts.

    Returns:
        Of each policy, and of the full network.
    """
    batches = {size: _batches(images, machine, size) for size in SIZES}
    full = Executor(run.network, Never())
    pairs = []
    for policy in track(policies, f"Timing {run.label}", transient=True, disable=not sys.stdout.isatty()):
        pairs.append(_timed([Executor(run.network, policy, temperatures), full], batches, machine))
    print(f"Timed {len(policies)} operating points of {run.label}", flush=True)
    points, fulls = zip(*pairs, strict=True)
    middle = {size: statistics.median(other[size] for other in fulls) for size in SIZES}
    latencies = [
        Latency(point, {size: other[size] / point[size] for size in SIZES})
        for point, other in zip(points, fulls, strict=True)
    ]
    return latencies, Latency(middle, dict.fromkeys(SIZES, 1.0))


def _batches(images: Images, machine: Machine, size: int) -> list[Tensor]:
    count = SINGLES if size == 1 else BATCHES * size
    taken: list[Tensor] = []
    for batch, *_ in images.batches("test", machine.device):
        taken.append(batch)
        if sum(map(len, taken)) >= count:
            break
    return list(torch.cat(taken)[:count].split(size))


@torch.inference_mode()
def _timed(executors: Sequence[Executor], batches: dict[int, list[Tensor]], machine: Machine) -> list[dict[int, float]]:
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
