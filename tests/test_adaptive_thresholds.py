"""Thresholds that follow the bandwidth: regression models, their margins, and their file."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.adaptive import AdaptiveThresholds, fitted
from inference.latency_bound import Link, Seen, grid
from inference.predicted import Predicted
from inference.regression import PUBLISHED, check_intervals
from inference.replay import curve
from inference.thresholds import Confidence
from tests.test_latency_bound import FAMILIES, LINK, at, made, walked


class World:
    """Thresholds v, 0 to 1: a share ``crosses(v)`` of the images crosses, and the more the more accurate.

    Computing takes 4 ms and 6 ms more for those that cross.
    """

    def __init__(self, crosses: Callable[[Tensor], Tensor], width: int = 1):
        self.crosses = crosses
        levels = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None].expand(-1, width)
        self.seen = self.replayed(levels)
        self.link = Link(2000)  # 16 ms at 1 Mbit/s

    def replayed(self, values: Tensor) -> Seen:
        share = self.crosses(values.mean(1))
        return Seen(values, 0.5 + share / 2, 4 + 6 * share, share)

    def fitted(self, bound_ms: float = 15.0, **options: Any) -> AdaptiveThresholds:
        return fitted(Confidence(), self.seen, self.replayed, self.link, bound_ms, **options)

    def optimal(self, mbps: float, bound_ms: float = 15.0) -> float:
        """Of the share that crosses, in closed form."""
        return min(1.0, (bound_ms - 4) / (6 + 16 / mbps))

    def latency(self, models: AdaptiveThresholds, bandwidths: list[float]) -> list[float]:
        shares = [float(self.crosses(torch.tensor([v]))) for v in models.values(bandwidths).mean(1).tolist()]
        return [4 + share * (6 + 16 / mbps) for share, mbps in zip(shares, bandwidths, strict=True)]


def spread(low: float, high: float, count: int) -> list[float]:
    ratio = (high / low) ** (1 / (count - 1))
    return [min(high, max(low, low * ratio**i)) for i in range(count)]


LINEAR = World(lambda v: v)


@pytest.fixture(scope="module")
def careless() -> AdaptiveThresholds:
    return LINEAR.fitted(margin_ms=0.0)


@pytest.fixture(scope="module")
def careful() -> AdaptiveThresholds:
    return LINEAR.fitted()


def test_a_model_hits_the_optima_that_it_was_trained_on(careless: AdaptiveThresholds) -> None:
    assert careless.bound_ms == 15
    assert [(part.regression.low, part.regression.high) for part in careless.intervals] == [
        (0.1, 1),
        (1, 10),
        (10, 100),
    ]
    for mbps in sorted({mbps for interval in PUBLISHED for mbps in interval}):
        [[value]] = careless.values([mbps]).tolist()
        assert value == pytest.approx(LINEAR.optimal(mbps), abs=2e-3)
        assert careless.at(mbps) == Confidence([value])
    # two layers with a ReLU between: no more than 17 straight pieces over the logarithm of the bandwidth
    numbers = [sum(p.numel() for p in part.regression.parameters()) for part in careless.intervals]
    assert numbers == [16 + 16 + 16 + 1] * 3


def test_without_a_margin_the_bound_is_exceeded_between_the_points_that_were_trained(
    careless: AdaptiveThresholds, careful: AdaptiveThresholds
) -> None:
    worst = [max(LINEAR.latency(careless, spread(low, high, 101))) - 15 for low, high in ((0.1, 1), (1, 10), (10, 100))]
    assert worst[0] > 0.02  # a share that falls ever faster lies above its chords
    for part, excess in zip(careless.intervals, worst, strict=True):
        assert part.margin_ms == 0
        assert part.violation_ms == pytest.approx(max(0, excess), abs=1e-3)
    assert careless.violation_ms == pytest.approx(max(0, *worst), abs=1e-3)
    assert careful.violation_ms == 0
    assert max(LINEAR.latency(careful, spread(0.1, 100, 400))) <= 15 + 0.01
    for part in careful.intervals:
        assert max(LINEAR.latency(careful, spread(part.regression.low, part.regression.high, 101))) <= 15 + 1e-6
    assert careful.intervals[0].margin_ms > 0
    # no more is given away than is needed
    means = [sum(models.values(spread(0.1, 1, 101))[:, 0].tolist()) / 101 for models in (careless, careful)]
    assert means[0] - 0.05 < means[1] < means[0]


def test_a_margin_that_is_given_is_kept() -> None:
    models = LINEAR.fitted(margin_ms=2.0, intervals=[[0.2, 0.5, 1.0]])
    [part] = models.intervals
    assert (part.margin_ms, part.violation_ms) == (2.0, 0.0)
    for mbps in (0.2, 0.5, 1.0):
        assert models.values([mbps]).item() == pytest.approx(LINEAR.optimal(mbps, bound_ms=13.0), abs=2e-3)


def test_where_no_margin_helps_the_least_violation_is_kept_and_said() -> None:
    kinked = World(lambda v: torch.where((v > 0.02) & (v < 0.4), torch.ones_like(v), 0.5 * v))

    def of(margin_ms: float) -> float:
        return kinked.fitted(9.0, margin_ms=margin_ms, intervals=[[0.5, 50.0]]).violation_ms

    models = kinked.fitted(9.0, intervals=[[0.5, 50.0]])
    assert models.violation_ms <= min(of(margin) for margin in (0.0, 0.09, 0.9, 4.5)) + 1e-9
    assert models.violation_ms == max(part.violation_ms for part in models.intervals)


def test_several_thresholds_are_fitted_at_once() -> None:
    world = World(lambda v: v, width=4)
    models = fitted(Predicted(), world.seen, world.replayed, world.link, 15.0, [[0.1, 0.3, 1.0]], margin_ms=0.0)
    assert models.width == 4
    values = models.values([0.1, 0.3, 1.0])
    wanted = torch.tensor([[LINEAR.optimal(mbps)] * 4 for mbps in (0.1, 0.3, 1.0)], dtype=torch.float64)
    torch.testing.assert_close(values, wanted, atol=2e-3, rtol=0)
    point = models.at(0.3)
    assert isinstance(point, Predicted)
    assert [*point.each(3), *point.gammas(3)] == pytest.approx(values[1].tolist(), rel=1e-12)


def test_at_a_shared_end_both_models_mean_the_same_and_one_answers(careful: AdaptiveThresholds) -> None:

    def said(part: Any, mbps: float) -> float:
        return part.regression(torch.tensor([mbps], dtype=torch.float64)).clamp(0, 1).item()

    for k, end in enumerate((1.0, 10.0)):
        assert careful.values([end]).item() in [said(part, end) for part in careful.intervals[k : k + 2]]
    for low, value, high in ((0.1, 0.7, 1.0), (1.0, 5.0, 10.0), (10.0, 99.0, 100.0)):
        part = next(p for p in careful.intervals if (p.regression.low, p.regression.high) == (low, high))
        assert careful.values([value]).item() == said(part, value)
    together = careful.values([50.0, 0.2, 1.0, 3.0])[:, 0].tolist()
    assert together == pytest.approx([careful.values([mbps]).item() for mbps in (50.0, 0.2, 1.0, 3.0)], rel=1e-12)


def shifted(models: AdaptiveThresholds, to: float) -> AdaptiveThresholds:
    """The same whose last layers give one number."""
    models = copy.deepcopy(models)
    for part in models.intervals:
        last: Any = part.regression.layers[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, to)
    return models


def test_thresholds_stay_within_0_and_1(careful: AdaptiveThresholds) -> None:
    for level, kept in ((-3.0, 0.0), (1.5, 1.0), (0.25, 0.25)):
        assert shifted(careful, level).values([0.1, 4.0, 100.0]).tolist() == [[kept]] * 3


@pytest.mark.parametrize("outside", ["refuse", "nearest"])
def test_a_bandwidth_outside_is_refused_or_gets_the_nearest(careful: AdaptiveThresholds, outside: str) -> None:
    models = replace(careful, outside=outside)
    for mbps, nearest in ((0.0999, 0.1), (1e-9, 0.1), (100.1, 100.0), (1e9, 100.0)):
        if outside == "nearest":
            assert torch.equal(models.values([mbps]), careful.values([nearest]))
            assert models.at(mbps) == careful.at(nearest)
            continue
        with pytest.raises(ValueError, match=r"\AExpected a bandwidth from 0\.1 to 100 Mbit/s, .*outside=nearest\.\Z"):
            models.at(mbps)
        with pytest.raises(ValueError, match=re.escape(f"got {mbps:g}; ")):
            models.values([1.0, mbps])
    for mbps in (0, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"\AExpected a bandwidth above 0 Mbit/s and finite, got .*\.\Z"):
            models.at(mbps)


def test_two_fits_are_the_same_to_the_bit_and_leave_the_seed_alone(careful: AdaptiveThresholds) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = LINEAR.fitted()
    assert torch.equal(torch.get_rng_state(), state)
    assert again.to_plain() == careful.to_plain()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_thresholds_come_back_from_json(name: str, careful: AdaptiveThresholds) -> None:
    models = replace(careful, outside="nearest")
    if name == "predicted":
        world = World(lambda v: v, width=2)
        models = fitted(Predicted(), world.seen, world.replayed, world.link, 15.0, [[0.1, 1.0], [1.0, 7.0]], 0.0)
    text = json.dumps(models.to_plain(), allow_nan=False)
    back = AdaptiveThresholds.from_plain(json.loads(text))
    bandwidths = spread(0.1, 7.0, 50)
    assert torch.equal(back.values(bandwidths), models.values(bandwidths))
    assert back.at(0.5) == models.at(0.5)
    assert type(back.family) is type(models.family)
    assert (back.bound_ms, back.outside, back.violation_ms) == (15, models.outside, models.violation_ms)
    assert [part.margin_ms for part in back.intervals] == [part.margin_ms for part in models.intervals]
    assert json.dumps(back.to_plain()) == text


def changed(content: dict[str, Any], path: str, value: Any) -> Any:
    """The content with one part other, or gone."""
    content = copy.deepcopy(content)
    *rooms, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    node: Any = content
    for room in rooms:
        node = node[room]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return content


DAMAGE: list[tuple[str, Any]] = [
    *((name, None) for name in ("policy", "bound_ms", "outside", "intervals", "intervals/1/mbps")),
    *((f"intervals/0/{name}", None) for name in ("margin_ms", "violation_ms", "layers", "layers/0", "layers/0/bias")),
    ("policy", "somebody's"),
    ("policy", "patience"),  # no thresholds between 0 and 1
    ("policy", ["confidence"]),
    ("bound_ms", "thirty"),
    ("bound_ms", [30]),
    ("outside", "anywhere"),
    ("intervals", []),
    ("intervals", "many"),
    ("intervals/0", 5),
    ("intervals/0/mbps", [0.1]),
    ("intervals/0/mbps", [1.0, 0.1]),
    ("intervals/0/mbps", [0.0, 1.0]),
    ("intervals/0/mbps", [0.1, 0.9]),  # the next begins at 1
    ("intervals/2/layers/0", [1.0]),
    ("intervals/2/layers/0/weight", [[1.0, 2.0]]),
    ("intervals/2/layers/1/bias", [0.5, 0.5]),
    ("intervals/2/layers/1/bias", ["a"]),
    ("intervals/2/layers/1/bias", [math.nan]),
]


@pytest.mark.parametrize(("path", "value"), DAMAGE, ids=[f"{path} {value}" for path, value in DAMAGE])
def test_what_is_damaged_is_refused(path: str, value: Any, careful: AdaptiveThresholds) -> None:
    with pytest.raises(ValueError, match="Expected thresholds by bandwidth, got something else"):
        AdaptiveThresholds.from_plain(changed(careful.to_plain(), path, value))


def test_what_is_something_else_is_refused() -> None:
    for content in ({}, [], None, 5, "thresholds", {"policy": "confidence", "thresholds": [0.5]}):
        with pytest.raises(ValueError, match=r"\AExpected thresholds by bandwidth, got something else: .*\Z"):
            AdaptiveThresholds.from_plain(content)  # type: ignore[arg-type]


BAD_INTERVALS: dict[str, list[Any]] = {
    "two or more rising bandwidths above 0 Mbit/s": [
        [[1.0]], [[]], [[2.0, 1.0]], [[1.0, 1.0, 2.0]], [[0.0, 1.0]], [[-1.0, 1.0]], [[1.0, math.inf]],
        [[1.0, math.nan]], [["0.1", "1"]], ["12"], [0.1, 1.0], [[True, 2.0]], [[0.1, 1.0], [1.0]], [[0.1, None]],
        [None],
    ],
    "to begin where the one before ends": [
        [[0.1, 1.0], [2.0, 3.0]], [[0.1, 1.0], [0.5, 3.0]], [[1.0, 10.0], [0.1, 1.0]],
    ],
    "at least one of adaptation.intervals": [[]],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_INTERVALS)
def test_intervals_that_cannot_be_are_refused_in_one_line(message: str) -> None:
    for bad in BAD_INTERVALS[message]:
        for ask in (check_intervals, lambda intervals: LINEAR.fitted(intervals=intervals)):
            with pytest.raises(ValueError, match=rf"\AExpected [^\n]*{message}[^\n]*\.\Z"):
                ask(bad)
    check_intervals(PUBLISHED)
    check_intervals([[1, 2], (2, 3.5)])


def test_what_cannot_be_fitted_is_refused_in_one_line() -> None:
    least = r"got 3 ms: at 0\.1 Mbit/s the smallest average latency possible is 4 ms; .*\.\Z"
    with pytest.raises(ValueError, match=r"\AExpected a bound that some thresholds keep to, " + least):
        LINEAR.fitted(3.0)
    with pytest.raises(ValueError, match=r"\AExpected adaptation\.outside to be refuse or nearest, got maybe\.\Z"):
        LINEAR.fitted(outside="maybe")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exceeded_is_what_a_loop_over_images_and_bandwidths_finds(name: str) -> None:
    trace, family, bound = made(5, 2, 25), FAMILIES[name], 14.0
    seen = Seen.of(curve(family, grid(family, trace, 700), trace), 6.8)

    def replayed(values: Tensor) -> Seen:
        return Seen.of(curve(family, values, trace), 6.8)

    excesses = []
    for margin in (0.0, 3.0):
        models = fitted(family, seen, replayed, LINK, bound, [[0.4, 1.0, 2.0, 6.0]], margin_ms=margin)
        bandwidths = spread(0.4, 6.0, 101)
        rows = zip(models.values(bandwidths).tolist(), bandwidths, strict=True)
        worst = max(at(walked(trace, row, name == "predicted"), mbps) for row, mbps in rows)
        assert models.violation_ms == pytest.approx(max(0.0, worst - bound), abs=1e-6)
        excesses.append(models.violation_ms)
    assert excesses[0] > excesses[1]
