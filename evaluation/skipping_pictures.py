"""Draws what gates come to: of all runs together, and of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure

from evaluation.results import Plan, Result
from evaluation.skipping import (
    Skipping,
    averages,
    block_ratios,
    budgets,
    easy_and_hard,
    features,
    is_plain,
    skipping_block,
    skippings,
)
from evaluation.tracing import Images
from figures.look import Point
from figures.skipped_images import Feature, Sample, easy_hard_figure, features_figure
from figures.skipping import Ratios, anytime_figure, resource_figure, skips_figure, strategies_figure
from inference.skips import gated_channels, savings
from inference.trace import Trace

EXAMPLES, FEATURES = 10, 5  # images of Fig. 13 a group, and of Fig. 14


def of_all(results: Sequence[Result], plan: Plan, text: str) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what runs with gates share.

    Args:
        text: data set and samples.
    """
    if len(results) > 1 and any(result.gated for result in results):
        places = {result.run.label: (result.exits[-1].cost, result.exits[-1].accuracy) for result in results}
        runs = skippings(results)
        strategies: dict[str, list[Point]] = {}
        for run in (run for run in runs if run.gates):
            strategies.setdefault(run.strategy, []).append(places[run.label])
        yield "gates", strategies_figure(strategies, _plain(results), plan.cost.title, f"{text}; all at the last exit")
    lines = _by_resource(skippings(results))
    if len(lines) > 1:
        yield "resource", resource_figure(lines, f"{text}; all at the last exit")


def _plain(results: Sequence[Result]) -> dict[str, Point]:
    """Networks without gates and exits, by the name of their backbone, or their label where that is not enough."""
    plain = [result for result in results if is_plain(result)]
    names = [result.run.config.backbone.name for result in plain]
    return {
        name if names.count(name) == 1 else result.run.label: (result.exits[-1].cost, result.exits[-1].accuracy)
        for name, result in zip(names, plain, strict=True)
    }


def _by_resource(runs: Sequence[Skipping]) -> dict[str, list[Point]]:
    """Lines of Fig. 12; none where all runs were trained to save the same, or energies are not known."""
    known = [run for run in runs if run.gates and not math.isnan(run.energy_saving)]
    if len({run.resource for run in known}) < 2:
        return {}
    lines: dict[str, list[Point]] = {}
    for run in known:
        resource = "MACs" if run.resource == "macs" else run.resource
        lines.setdefault(f"{run.strategy},\ntrained to save {resource}", []).append((run.energy_saving, run.accuracy))
    return lines


def of_run(
    result: Result, plan: Plan, images: Images | None, results: Sequence[Result]
) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what is shown of one run with gates.

    Args:
        images: its data set, None to leave out what shows images.
        results: of all runs, the plain ones among them to compare it with.
    """
    yield "skips", _skips(result)
    if result.adaptive:
        yield "anytime", _anytime(result, plan, results)
    if images is not None and _are_there(images, result):
        if savings(result.test).unique().numel() > 1:
            yield "easy_hard", _easy_hard(result, images)
        if (figure := _features(result, images)) is not None:
            yield "features", figure


def _skips(result: Result) -> Figure:
    gates = result.run.config.method.gates
    (skipped, closed), (all_skipped, all_closed) = block_ratios(result.test), averages(result.test)
    return skips_figure(
        Ratios(skipped, all_skipped) if gates.layer else None,
        Ratios(closed, all_closed) if gates.channel else None,
        result.run.network.chain.stage_lengths,
        f"{result.run.label}: {_saved(savings(result.test).mean().item())}",
    )


def _saved(share: float) -> str:
    return f"{100 * share:.1f} % of the MACs saved"


def _anytime(result: Result, plan: Plan, results: Sequence[Result]) -> Figure:
    kind, factor = plan.cost.kind, plan.cost.factor
    swept = budgets(result.test)
    accuracy = swept.accuracy.tolist()
    spent = list(zip((factor * swept.costs[kind]).tolist(), accuracy, strict=True))
    limits = list(zip((factor * swept.values[:, 0]).tolist(), accuracy, strict=True)) if kind == "macs" else []
    exits = [(point.cost, point.accuracy) for point in result.exits]
    return anytime_figure(exits, spent, limits, _plain(results), plan.cost.title, f"{result.run.label}: at any time")


def _are_there(images: Images, result: Result) -> bool:
    """Whether the images of the trace are there, and known by their row."""
    try:
        tests = images.tests
    except (OSError, ValueError) as error:
        print(f"No images of {result.run.label} are drawn: {error}", flush=True)
        return False
    if tests != len(result.test):
        print(f"No images of {result.run.label} are drawn: some could not be read, so that rows differ.", flush=True)
    return tests == len(result.test)


def _samples(rows: Sequence[int], notes: Sequence[str], test: Trace, images: Images) -> list[Sample]:
    pixels = images.pixels(rows).permute(0, 2, 3, 1).numpy()
    said, labels = test.logits[-1, rows].argmax(-1).tolist(), test.labels[rows].tolist()
    names = images.classes
    return [
        Sample(picture, names[label], None if taken == label else names[taken], note)
        for picture, label, taken, note in zip(pixels, labels, said, notes, strict=True)
    ]


def _easy_hard(result: Result, images: Images) -> Figure:
    test = result.test
    assert test.decisions is not None
    saved, skipped = savings(test), 1 - test.decisions.runs.double().mean(0)
    by_layer = bool(result.run.config.method.gates.layer)
    groups = {}
    tenths = easy_and_hard(test, max(1, len(test) // 10))
    for name, rows, tenth in zip(("most", "least"), easy_and_hard(test, EXAMPLES), tenths, strict=True):
        notes = [f"{100 * saved[row]:.1f} % saved" + f"\n{100 * skipped[row]:.0f} % skipped" * by_layer for row in rows]
        right = test.correct[-1, tenth].double().mean().item()
        title = f"{name} saved; of the tenth of the images with the {name}, {100 * right:.1f} % are answered right"
        groups[title] = _samples(rows, notes, test, images)
    text = "MACs saved" + " and blocks skipped" * by_layer + "; wrong answers are framed"
    return easy_hard_figure(groups, f"{result.run.label}: {text}")


def _features(result: Result, images: Images) -> Figure | None:
    """None where nothing is skipped."""
    test, network = result.test, result.run.network
    assert test.decisions is not None
    channels = gated_channels(test.costs["macs"])
    found = skipping_block(test.decisions, channels)
    if found is None:
        return None
    block, candidates = found
    spread = torch.linspace(0, len(candidates) - 1, min(FEATURES, len(candidates))).round().long()
    rows = candidates[spread].tolist()
    device = next(network.parameters()).device
    off, on, decisions = features(network, images.normalized(images.pixels(rows), device), block)
    shown = []
    for i, sample in enumerate(_samples(rows, [""] * len(rows), test, images)):
        moved = ((on[i] - off[i]).norm() / off[i].norm()).item()
        closed = channels[block - 1] - round(decisions.channels[-1, i].item())
        did = f"{closed} of {channels[block - 1]} channels closed" if decisions.runs[-1, i] else "block skipped"
        means = [feature[i].float().mean(0).cpu().numpy() for feature in (off, on)]
        shown.append(Feature(sample, means[0], means[1], f"{did}\nchanged by {100 * moved:.0f} %"))
    text = f"{result.run.label}: mean over channels after block {block}"
    return features_figure(shown, text)
