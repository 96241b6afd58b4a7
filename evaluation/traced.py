"""Runs with their traces, priced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from costs.energy import EnergyModel, network_energy
from costs.latency import CoInference, network_latency
from costs.transmission import sent_bytes
from evaluation import tracing
from evaluation.runs import TrainedRun
from evaluation.tracing import SPLITS, Images, Machine
from inference.trace import Trace


class Traced(NamedTuple):
    """A run with its validation and test traces, priced with ``latency_ms`` and ``sent_bytes``, and energy if known."""

    run: TrainedRun
    val: Trace
    test: Trace


def traced(
    runs: Sequence[TrainedRun],
    images: Sequence[Images],
    chip: EnergyModel | None,
    setting: CoInference,
    machine: Machine,
    retrace: bool,
) -> list[Traced]:
    """Each run with its traces, recorded where they are not kept.

    Args:
        images: of each run.
        chip: None where no energy is known.
        retrace: whether they are recorded anew.
    """
    found = []
    for run, source in zip(runs, images, strict=True):
        run.network.to(machine.device)
        val, test = (tracing.trace(run, split, source, machine, retrace) for split in SPLITS)
        costs = [] if chip is None else [network_energy(run.network, chip)]
        costs += [sent_bytes(run.network), network_latency(run.network, setting, val.costs)]
        found.append(Traced(run, val.priced(*costs), test.priced(*costs)))
    return found
