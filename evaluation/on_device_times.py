"""Measured time of the on-device network, guided in one way or another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.progress import track

from evaluation.latency import SIZES, batches_of, timed
from evaluation.on_device import Comparison, Contender, Lambdas
from evaluation.results import Result
from evaluation.tracing import Images, Machine
from inference.executor import Executor
from inference.predicted import Predicted
from inference.thresholds import Confidence
from networks.early_exit_network import device_part


def measured(comparison: Comparison, results: Sequence[Result], images: Images, machine: Machine) -> Comparison:
    """Adds the time of each contender but the oracle, which cannot be executed, to the cut and no further.

    At batch 1 and 128, on test images spread over the split; the early exits alone take turns with each, and the
    fastest of a few rounds counts.
    """
    alone = comparison.alone
    if alone is None:
        return comparison
    found = {}
    batches = batches_of(images, machine)
    pairs = [(c, at) for c in comparison.contenders if c.kind != "EE+oracle" for at in comparison.tabled]
    bases = {at: _executor(alone, at, results) for at in comparison.tabled}
    for contender, at in track(pairs, "Timing the device", transient=True, disable=not sys.stdout.isatty()):
        own, base = timed([_executor(contender, at, results), bases[at]], batches, machine)
        found[contender.label, at] = {size: own[size] / base[size] for size in SIZES}
    print(f"Timed the on-device network of {len(pairs)} operating points", flush=True)
    return replace(comparison, times=found)


def _executor(contender: Contender, lambdas: Lambdas, results: Sequence[Result]) -> Executor:
    place = contender.places[lambdas]
    result = next(result for result in results if result.run.label == contender.run)
    network = device_part(result.run.network)
    thresholds = list(lambdas)
    policy = Predicted(thresholds, list(place.gammas)) if contender.kind == "EE+EP" else Confidence(thresholds)
    return Executor(network, policy, list(result.temperatures))
