"""Draws the figures of an evaluation, each as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from evaluation import skipping_pictures
from evaluation.along_bandwidth import EXACT, Adaptation
from evaluation.analysis import depth_correlation, disagreements
from evaluation.hybrid import Design
from evaluation.hybrid_tables import PER_10K
from evaluation.latency import Times
from evaluation.on_device import Comparison, Place
from evaluation.results import Plan, Point, Result
from evaluation.tables import tested_on, title
from evaluation.tracing import Images
from figures.bandwidth import Series, bandwidth_figure
from figures.bandwidth_trace import simulation_figure
from figures.confidence import ExitConfidence, confidence_figure, difficulty_figure, disagreement_figure
from figures.hybrid import Along, Spot, edge_figure, energy_figure
from figures.look import save
from figures.on_device import Line, ratios_figure, sweep_figure
from figures.tradeoff import RunCurve, latency_figure, shares_figure, tradeoff_figure
from inference.replay import Curve
from inference.temperature import reliability


def pictures(
    results: Sequence[Result],
    comparison: Comparison | None,
    plan: Plan,
    times: Mapping[str, Times],
    designs: Sequence[Design] = (),
    images: Sequence[Images] = (),
    adaptation: Adaptation | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what all runs share, then of each run with early exits or gates.

    The latter are in a folder of its own if there are several runs.

    Args:
        images: of each run; without, none are shown.
    """
    yield "tradeoff", tradeoff_figure([_run_curve(r, plan) for r in results], plan.cost.title, title(results, plan))
    if comparison is not None:
        yield from _on_device(comparison, title(results, plan))
    if designs:
        yield from _of_designs(designs, f"{tested_on(results)}; E: convolutions at the edge")
    if adaptation is not None:
        yield from _along_bandwidth(adaptation, tested_on(results))
    yield from skipping_pictures.of_all(results, plan, tested_on(results))
    for result, source in zip_longest(results, images):
        room = "" if len(results) == 1 else f"{room_of(result)}/"
        if result.adaptive:
            for name, figure in _of_run(result, plan):
                yield room + name, figure
            if result.run.label in times and times[result.run.label].points:
                yield room + "latency", _latency(result, times[result.run.label])
        if result.gated:
            for name, figure in skipping_pictures.of_run(result, plan, source, results):
                yield room + name, figure


def room_of(result: Result) -> str:
    """Name of the folder of a run's own figures, where there are several runs."""
    return re.sub(r"[^\w.=-]+", "_", result.run.label)


def _of_run(result: Result, plan: Plan) -> Iterator[tuple[str, Figure]]:
    test, label = result.test, result.run.label
    label += ", thresholds chosen on the test split" if plan.split == "test" else ""
    if result.curve is not None and len(result.front) > 1:
        costs, rows = _front(result.curve, result, plan)
        shares = result.curve.shares[rows].tolist()
        yield "shares", shares_figure(costs, shares, plan.cost.title, f"{label}: where images leave")
    yield "confidence", confidence_figure(_confidences(result), f"{label}: how sure and how right each exit is")
    overthought, needed = (table.numpy() for table in disagreements(test))
    classes = list(result.run.config.images.classes)
    yield (
        "overthinking",
        disagreement_figure(overthought, needed, classes, f"{label}: an early exit or the last, not both"),
    )
    yield from _difficulties(result)


def _on_device(comparison: Comparison, text: str) -> Iterator[tuple[str, Figure]]:
    def point(place: Place) -> tuple[float, float]:
        return place.device, place.accuracy

    lines = [
        Line(contender.kind, contender.label, [point(contender.places[lambdas]) for lambdas in comparison.swept])
        for contender in comparison.contenders
    ]
    axis = comparison.cost.title
    yield "on_device", sweep_figure(lines, comparison.plain, axis, text)
    at = comparison.at
    pruned: dict[bool, dict[float, tuple[float, float]]] = {False: {}, True: {}}
    for contender in comparison.contenders:
        if contender.kind == "pruned":
            pruned[contender.tuned][contender.ratio] = point(contender.places[at])
    if any(pruned.values()):
        others = {c.label: point(c.places[at]) for c in comparison.contenders if c.kind != "pruned"}
        series = {"pruned, not trained again": pruned[False], "pruned and fine-tuned": pruned[True]}
        yield "pruning", ratios_figure(others, series, axis, f"{text}; all λ = {at[0]:.3g}")


def _of_designs(designs: Sequence[Design], text: str) -> Iterator[tuple[str, Figure]]:
    joint = [design for design in designs if not design.separate and design.exits <= 1]
    few = [design for design in joint if design.precision != "fp32" or design.exits]
    series: dict[bool, dict[str, list[Design]]] = {True: {}, False: {}}
    several = len({(design.backbone, design.epochs) for design in few}) > 1
    for design in few:
        name = design.precision + f", {design.backbone}, {design.epochs} epochs" * several
        series[design.exits > 0].setdefault(name, []).append(design)
    spots = {exits: {name: list(map(_spot, group)) for name, group in of.items()} for exits, of in series.items()}
    others = [_spot(design) for design in designs if design not in few]
    axis = "energy of 10,000 images, mJ"
    yield "hybrid_energy", energy_figure(spots[True], spots[False], others, axis, text)
    if len({design.edge for design in few if design.exits}) > 1:
        places = {n: [Along(d.edge, d.accuracy, sum(d.shares)) for d in g] for n, g in series[True].items()}
        yield "hybrid_edge", edge_figure(places, text)


def _along_bandwidth(found: Adaptation, text: str) -> Iterator[tuple[str, Figure]]:
    series = [
        Series(m.name, m.test.accuracy.tolist(), m.test.latency.tolist(), m.static, m.name == EXACT)
        for m in found.methods
    ]
    bound = found.setting.bound_ms
    yield "bandwidth", bandwidth_figure(found.bandwidths, series, bound, f"{found.label}, {text}")
    if found.streams:
        exits, width = found.exits, next(iter(found.streams.values())).thresholds.shape[1]
        names = [f"{'λγ'[i // (exits - 1)]}{i % (exits - 1) + 1}" for i in range(width)]
        yield "stream", simulation_figure(found.streams, bound, names, exits, f"{found.label}, {text}")


def _spot(design: Design) -> Spot:
    name = f"{design.edge}E" if design.edge else "fp32"
    name += f", {design.exits} exits" if design.exits > 1 else ""
    return Spot(name + ", separate" * design.separate, PER_10K * design.energy_uj, design.accuracy)


def _front(curve: Curve, result: Result, plan: Plan) -> tuple[list[float], Tensor]:
    """Costs on the plan's axis, rising, and rows of the curve."""
    costs = plan.cost.factor * curve.costs[plan.cost.kind][result.front]
    order = costs.argsort()
    return costs[order].tolist(), result.front[order]


def _run_curve(result: Result, plan: Plan) -> RunCurve:
    front = []
    if result.curve is not None:
        costs, rows = _front(result.curve, result, plan)
        front = list(zip(costs, result.curve.accuracy[rows].tolist(), strict=True))
    chosen = {point.chosen.name: _place(point) for point in result.named if point.outcome is not None}
    oracles = {point.chosen.name: _place(point) for point in result.oracles}
    series = [_place(point) for point in result.series]
    return RunCurve(result.run.label, front, series, chosen, _place(result.exits[-1]), oracles, result.gated)


def _place(point: Point) -> tuple[float, float]:
    return point.cost, point.accuracy


def _confidences(result: Result) -> list[ExitConfidence]:
    test, (before, after) = result.test, result.ece
    scaled = any(temperature != 1 for temperature in result.temperatures)
    found = []
    for k, logits in enumerate(test.logits):
        table = reliability(logits, test.labels)
        confidence = logits.softmax(-1).amax(-1).numpy()
        errors = [after[k], before[k]] if scaled else [after[k]]
        found.append(ExitConfidence(confidence, test.correct[k].numpy(), table.edges, table.accuracy, errors))
    return found


def _difficulties(result: Result) -> Iterator[tuple[str, Figure]]:
    outcome, test = result.shown.outcome, result.test
    assert outcome is not None
    right = (outcome.prediction.label == test.labels).numpy()
    for name, rho in depth_correlation(result.shown, test).items():
        values: np.ndarray = test.extras[name].double().numpy()
        text = f"{result.run.label}, {result.shown.chosen.name}: Spearman's ρ of exit and {name} = {rho:.2f}"
        exit = outcome.prediction.exit.numpy()
        yield name, difficulty_figure(values, exit, right, test.correct[-1].numpy(), name, text)


def _latency(result: Result, times: Times) -> Figure:
    assert result.curve is not None
    accuracy = result.curve.accuracy
    points = {
        size: [(1 / time.speedup[size], float(accuracy[row])) for row, time in times.points.items()]
        for size in times.full.milliseconds
    }
    alone = {size: (ms, result.exits[-1].accuracy) for size, ms in times.full.milliseconds.items()}
    return latency_figure(points, alone, f"{result.run.label}: accuracy against measured time")


def draw(figures: Iterator[tuple[str, Figure]], folder: Path) -> list[Path]:
    """Writes each figure; gives the files."""
    written = []
    for name, figure in figures:
        for suffix in (".svg", ".png"):
            written.append(folder / f"{name}{suffix}")
            save(figure, written[-1])
    return written
