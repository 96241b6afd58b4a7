"""The best thresholds under a bound on the latency: against a loop over points and images."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costs.network import NetworkCosts
from inference.latency_bound import Link, Seen, fastest, grid, optima
from inference.predicted import Predicted
from inference.replay import curve
from inference.thresholds import Confidence
from inference.trace import Trace, assembled

FAMILIES: dict[str, Confidence] = {"confidence": Confidence(), "predicted": Predicted()}


LINK = Link(600, 2.0)  # 4.8 ms and 2 ms at 1 Mbit/s


def made(seed: int, early: int = 2, samples: int = 14) -> Trace:
    """Random logits, scores, and milliseconds; what crosses is priced at 1 Mbit/s."""
    torch.manual_seed(seed)
    taps = tuple(range(1, early + 1))
    blocks, heads = (tuple((0.1 + 3 * torch.rand(early + 1)).tolist()) for _ in range(2))
    ms = NetworkCosts("latency_ms", 0.3, blocks, heads, taps, 0.25, (), early, 0.15, LINK.delay_ms + 4.8, 0.05)
    macs = NetworkCosts("macs", 1, (2,) * (early + 1), (3,) * (early + 1), taps, 1)
    logits = 2 * torch.randn(early + 1, samples, 4)
    logits[-1] += 4 * torch.nn.functional.one_hot(torch.arange(samples) % 4, 4)
    return assembled(logits, torch.arange(samples) % 4, {"macs": macs, "latency_ms": ms}, torch.rand(early, samples))


def walked(trace: Trace, values: list[float], predicted: bool) -> tuple[float, float, float]:
    """One point, image by image: accuracy, average milliseconds without the link, share that crosses."""
    ms, early = trace.costs["latency_ms"], trace.num_exits - 1
    lambdas, gammas = values[:early], values[early:]
    assert trace.predictions is not None
    right, spent, crossed = 0, 0.0, 0
    for i in range(len(trace)):
        spent += ms.stem + (ms.predictor if predicted else 0)
        for k in range(early + 1):
            spent += ms.blocks[k]
            if k == early:
                spent, crossed = spent + ms.encoder + ms.decoder, crossed + 1
            elif predicted and trace.predictions[k, i] < torch.tensor(gammas[k]):
                continue
            spent += ms.heads[k]
            p = trace.logits[k, i].softmax(0)
            if k == early or p.max() >= torch.tensor(lambdas[k]):
                right += int(p.argmax() == trace.labels[i])
                break
    return right / len(trace), spent / len(trace), crossed / len(trace)


def at(point: tuple[float, float, float], mbps: float) -> float:
    _, computing, crossing = point
    return computing + crossing * (2.0 + 600 * 8 / (1000 * mbps))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), early=st.integers(1, 2), more=st.floats(0.05, 12))
def test_the_optimum_is_the_one_of_a_loop_over_points_and_images(name: str, seed: int, early: int, more: float) -> None:
    trace, family = made(seed, early), FAMILIES[name]
    values = grid(family, trace, 40)
    values = values[torch.randperm(len(values))[:60]]
    seen = Seen.of(curve(family, values, trace), 6.8)
    points = [walked(trace, row, name == "predicted") for row in values.tolist()]
    for column, found in enumerate((seen.accuracy, seen.computing, seen.crossing)):
        assert found.tolist() == pytest.approx([point[column] for point in points], rel=1e-9, abs=1e-9)
    bandwidths = [0.1, 0.5, 1.0, 7.0, 100.0, math.inf]
    least = {mbps: min(at(point, mbps) for point in points) for mbps in bandwidths}
    bound = max(least.values()) + more
    chosen = optima(seen, LINK, bound, bandwidths).tolist()
    for mbps, row in zip(bandwidths, chosen, strict=True):
        within = [point for point in points if at(point, mbps) <= bound]
        best = max(accuracy for accuracy, *_ in within)
        assert points[row][0] == best
        assert at(points[row], mbps) <= bound + 1e-8
        assert at(points[row], mbps) == pytest.approx(min(at(p, mbps) for p in within if p[0] == best), rel=1e-9)
        quick = points[fastest(seen, LINK, mbps)]
        assert at(quick, mbps) == pytest.approx(least[mbps], rel=1e-9)
        assert quick[0] == max(p[0] for p in points if at(p, mbps) <= least[mbps] + 1e-10)


def points(*rows: tuple[float, float, float], values: list[float] | None = None) -> Seen:
    """Accuracy, milliseconds and share that crosses of each point."""
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    named = torch.tensor(values or list(range(len(rows))), dtype=torch.float64)[:, None]
    return Seen(named, *columns)


def test_of_points_that_are_as_accurate_the_quickest_is_taken_and_then_the_first() -> None:
    seen = points((0.8, 9, 0.1), (0.9, 6, 0.5), (0.9, 5, 0.6), (0.9, 5, 0.6), (0.9, 7, 0.5), (0.95, 4, 1.0))
    link = Link(1000)  # 8 ms at 1 Mbit/s
    # at 1 Mbit/s 9.8, 10, 9.8, 9.8, 11, 12; at 0.5 10.6, 14, 14.6, 14.6, 15, 20; at 8 9.1, 6.5, 5.6, 5.6, 7.5, 5
    assert optima(seen, link, 10, [1.0]).tolist() == [2]
    assert optima(seen, link, 9.8, [1.0]).tolist() == [2]
    assert optima(seen, link, 14, [0.5]).tolist() == [1]
    assert optima(seen, link, 11, [0.5, 8.0]).tolist() == [0, 5]
    assert optima(seen, link, 12, [1.0, 8.0]).tolist() == [5, 5]
    assert [fastest(seen, link, mbps) for mbps in (1.0, 0.5, 8.0)] == [2, 0, 5]
    assert optima(seen.rows(torch.tensor([4, 3, 1])), link, 10, [1.0]).tolist() == [1]


def test_a_bound_is_kept_to_exactly() -> None:
    seen = points((0.5, 3, 0.0), (0.9, 5, 0.25))
    link = Link(1500, 1.0)  # 0.25 · (12 + 1) at 1 Mbit/s: 8.25 ms in all
    assert optima(seen, link, 8.25, [1.0]).tolist() == [1]
    assert optima(seen, link, 8.2499, [1.0]).tolist() == [0]
    assert optima(seen, link, 5.25, [math.inf]).tolist() == [1]
    assert optima(seen, link, 5.24, [math.inf]).tolist() == [0]


@pytest.mark.parametrize(("mbps", "least"), [(1.0, "7.5"), (0.1, "12"), (math.inf, "2.5")])
def test_a_bound_that_nothing_keeps_to_names_the_smallest_latency(mbps: float, least: str) -> None:
    seen, link = points((0.9, 2.5, 0.5), (0.5, 12, 0.0), (0.6, 30, 0.0)), Link(1250)
    message = rf"\AExpected a bound .*, got 2 ms: at {mbps:g} Mbit/s the smallest .* {least} ms; raise .*bound_ms\.\Z"
    with pytest.raises(ValueError, match=message):
        optima(seen, link, 2, [mbps])
    assert len(optima(seen, link, float(least), [mbps])) == 1


@pytest.mark.parametrize("least", [30.0449, 1234.56, 0.012345])
def test_the_latency_that_is_named_is_one_that_can_be_kept_to(least: float) -> None:
    seen = points((0.9, least, 0.0), (0.5, 2 * least, 0.0))
    with pytest.raises(ValueError, match="smallest average latency possible is") as caught:
        optima(seen, LINK, 0.5 * least, [1.0])
    named = float(str(caught.value).split("possible is ")[1].split(" ms")[0])
    assert named == pytest.approx(least, rel=0.01)
    assert optima(seen, LINK, named, [1.0]).tolist() == [0]  # or raising the bound to it would be refused again


@pytest.mark.parametrize("bad", [0, -1.0, math.nan])
def test_a_link_without_bandwidth_is_refused(bad: float) -> None:
    for ask in (LINK.ms, lambda mbps: optima(points((1, 1, 0)), LINK, 99, [1.0, mbps])):
        with pytest.raises(ValueError, match=r"\AExpected a bandwidth above 0 Mbit/s, got .*\.\Z"):
            ask(bad)
    assert LINK.ms(1.0) == pytest.approx(6.8)
    assert LINK.ms(math.inf) == 2


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=st.integers(0, 10**6), early=st.integers(1, 3), least=st.integers(1, 900), samples=st.integers(1, 20))
@settings(max_examples=40)
def test_a_grid_has_as_many_points_as_asked_and_all_are_thresholds(name, seed, early, least, samples) -> None:
    trace, family = made(seed, early, samples), FAMILIES[name]
    values = grid(family, trace, least)
    assert len(values) >= least
    assert values.dtype == torch.float64
    assert values.shape[1] == early * (2 if name == "predicted" else 1)
    assert ((values >= 0) & (values <= 1)).all()
    assert trace.predictions is not None
    scores = [z.softmax(-1).amax(-1) for z in trace.logits[:-1]] + list(trace.predictions)
    for column, score in zip(values.T, scores, strict=False):
        assert set(column.tolist()) <= {0.0, 1.0, *score.double().tolist()}
    assert torch.equal(values, grid(family, trace, least))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_combinations_are_tried_from_none_to_all(name: str) -> None:
    trace = made(3, 2, 50)
    values = grid(FAMILIES[name], trace, 1300)
    levels = [sorted(set(column.tolist())) for column in values.T]
    assert all(each[0] == 0 and each[-1] == 1 for each in levels)
    assert sorted(map(tuple, values.tolist())) == sorted(product(*levels))
    each = {"confidence": 37, "predicted": 7}[name]  # the least whose power is 1300 or more
    assert [len(level) for level in levels] == [each] * len(levels)


def test_a_grid_of_predictions_needs_a_predictor() -> None:
    with pytest.raises(ValueError, match=r"\AExpected a trace with an Exit Predictor's scores, got one without\.\Z"):
        grid(Predicted(), replace(made(0), predictions=None), 100)
