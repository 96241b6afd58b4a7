"""Of several runs, what is compared along the bandwidth, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from costs.latency import CoInference, network_latency
from evaluation.adaptation import adapted, static_thresholds
from evaluation.adaptation_settings import Settings
from evaluation.along_bandwidth import Adaptation
from evaluation.pruned_codec import PrunedCodec
from evaluation.runs import TrainedRun
from evaluation.streaming import streamed
from evaluation.traced import Traced
from evaluation.tracing import Images, Machine
from inference.latency_bound import rounded_up


def adapt(
    traced: Sequence[Traced], images: Sequence[Images], settings: Settings, setting: CoInference, machine: Machine
) -> Adaptation:
    """Figure 10 of the first run with early exits, and images that arrive while the bandwidth changes.

    Other runs with early exits are named and left out.

    Args:
        images: of each run.

    Raises:
        ValueError: a bound that no thresholds keep to.
    """
    runs = [one.run for one in traced]
    main, other = main_run(runs), backbone_run(runs)
    for i, run in enumerate(runs):
        if run.network.num_exits > 1 and i != main:
            print(
                f"{run.label} has early exits, too, and is left out of the comparison along the bandwidth.", flush=True
            )
    pruning = None
    if settings.pruned and runs[main].network.codec is not None:
        pruning = PrunedCodec(runs[main], images[main], machine)
    found = adapted(traced[main], None if other is None else traced[other], settings, setting, pruning)
    if settings.stream is None:
        return found
    return replace(found, stream=settings.stream, streams=streamed(found, traced[main].test, settings.stream))


def main_run(runs: Sequence[TrainedRun]) -> int:
    """Which of the runs thresholds follow the bandwidth of: the first with early exits and without gates.

    Raises:
        ValueError: there is none.
    """
    for i, run in enumerate(runs):
        if run.network.num_exits > 1 and run.network.gating is None:
            return i
    raise ValueError(
        "adaptation needs a run with early exits and without gates, such as one of method=feature_codec; "
        f"{runs[0].path} is of method={runs[0].config.method.name}."
    )


def backbone_run(runs: Sequence[TrainedRun]) -> int | None:
    """Which of them is the backbone between device and server: the first without early exits that has a cut."""
    found = (i for i, run in enumerate(runs) if run.network.num_exits == 1 and run.network.cut is not None)
    return next(found, None)


def check(runs: Sequence[TrainedRun], images: Sequence[Images], settings: Settings, setting: CoInference) -> None:
    """Refuses what is known to be impossible before any data is read.

    Args:
        images: of each run.

    Raises:
        ValueError: no run with early exits, λ of another number of them, or a bound below what the first exit takes.
    """
    main = main_run(runs)
    run = runs[main]
    static_thresholds(run, settings)
    if settings.pruned and run.network.codec is not None and images[main].missing:
        raise ValueError(
            f"{images[main].missing} A pruned encoder needs the images again; without it: adaptation.pruned=false."
        )
    if settings.stream is not None:
        settings.stream.check(settings.compared[0], settings.compared[-1], settings.outside)
    if setting.measured:  # where the network is not yet
        return
    fastest = replace(setting, bandwidth_mbps=settings.compared[-1])
    least = min(network_latency(run.network, fastest).alone)
    if setting.bound_ms < least:
        raise ValueError(
            f"Expected a bound that some thresholds keep to, got {setting.bound_ms:g} ms: the smallest latency "
            f"possible at any bandwidth is {rounded_up(least)} ms; raise co_inference.bound_ms."
        )
