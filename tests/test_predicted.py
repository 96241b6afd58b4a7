"""The Exit Predictor's policy: algorithm 1, equations 3 and 4, curves, and how its thresholds are chosen."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from costs.network import NetworkCosts, network_costs
from inference.budget import Budget
from inference.choices import ConfidenceThresholds, PredictionThresholds
from inference.executor import Executor
from inference.points import FAMILIES, from_plain, to_plain
from inference.policies import Never, Policy
from inference.predicted import Predicted
from inference.replay import curve, kinds, oracle, replay
from inference.thresholds import Confidence
from inference.trace import Trace, assembled, read_trace, record, write_trace
from networks.backbones.vgg import vgg
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exit_predictor import fcs_only, separable
from networks.exits import StageFractions
from networks.heads import exit_predictor, light
from tests.conftest import stirred
from tests.test_calibration import made_trace, stops_of
from tests.test_execution import network_and_images, rows_run, same, stops

INF, LABELS = math.inf, torch.arange(17) % 5
COST = NetworkCosts("macs", 5, (10, 20, 30), (1, 2, 3), (1, 2), 7)
REFUSED = {
    "a network with an Exit Predictor for policy=predicted": [Predicted(0.5, 0.5), Budget(99, Predicted(0.5, 0.5))],
    "Expected 2 thresholds, one for each early exit of 3 exits, as policy.prediction": [Predicted(0.5, [0.5] * 3)],
    "Expected policy.prediction: one number, or 2": [Predicted(0.5, bad) for bad in (None, True, "0.5", [0.5, None])],
    "Expected policy.prediction from 0 to 1": [Predicted(0.5, bad) for bad in (-0.1, 1.1, math.nan, -INF, [0.5, 2])],
    "a budget of at least 23 MACs": [Budget(22, Predicted(0.5, [0, INF]))],
}
seeds, earlies, numbers = st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 1) | st.just(INF)


def algorithm_1(s: list[float], stops, costs: NetworkCosts, lambdas, gammas, limit: float) -> tuple:
    """One sample of scores s along its stops; with a limit on what is spent it answers at the last exit that fits."""
    spent, last, heads = costs.predictor, len(costs.heads), []
    for n, (segment, price, head) in enumerate(stops, 1):
        on_device, spent = spent, spent + segment
        ahead = [sum(costs.segments[n:m]) + costs.heads[m - 1] for m in range(n + 1, last + 1)]
        halts = n == last or spent + min(ahead) > limit
        if halts or (s[n - 1] >= gammas[n - 1] and spent + price <= limit):
            p, spent, heads = head().softmax(0).tolist(), spent + price, [*heads, n]
            if halts or spent + min(ahead) > limit or max(p) >= lambdas[n - 1]:
                break
    return p.index(max(p)), max(p), n, spent, (on_device if n == last else spent, heads)


@cache
@torch.no_grad()
def guided(seed: int, early: int) -> tuple[EarlyExitNetwork, Tensor, Trace, dict[str, int]]:
    """A network whose exits and predictor are of many minds about 17 images, its trace, the rows that ran."""
    network, images = network_and_images(seed, {1: [2], 2: [1, 3], 3: [1, 2, 3]}[early])
    network.predictor = stirred((fcs_only(early + 1, (3, 8, 8)), separable(early + 1, (3, 16, 16)))[seed % 2])
    layer, z = network.predictor.layers[-1], network.predictor(images)
    layer.weight.mul_(2 / z.std(0)[:, None])
    layer.bias.copy_((layer.bias - z.mean(0)) * 2 / z.std(0))
    return network, images, record(network, zip(images.split(5), LABELS.split(5), strict=True)), rows_run(network)


def sure(trace: Trace) -> Tensor:
    return trace.logits[:-1].softmax(-1).amax(-1)


def made(seed: int, early: int, samples: int = 20) -> Trace:
    """A made trace whose scores know something of the confidences."""
    trace = made_trace(seed, early + 1, samples)
    scores = (sure(trace) + torch.rand(early, samples)) / 2
    costs = {name: replace(cost, predictor=cost.heads[-1] // 3 + 1) for name, cost in trace.costs.items()}
    return replace(trace, costs=costs, predictions=(8 * scores).round() / 8 if seed % 2 else scores)


def apart(data: st.DataObject, scores: Tensor) -> list[float]:
    """For each row 0, infinity, or between two neighbours of it, at least 1e-5 from either."""
    rows = (pairwise([0.0, *row, 1.0]) for row in scores.sort(1).values.tolist())
    middles = ([(a + b) / 2 for a, b in row if b - a > 4e-5] for row in rows)
    return [data.draw(st.sampled_from([0.0, *row, INF])) for row in middles]


def equation_4(trace: Trace, kind: str, lambdas, gammas) -> Tensor:
    """Of each sample, before the mean is taken; what the server does besides where ``kind`` is of both."""
    name = kind.removeprefix("device_")
    segments, heads, looks = trace.segments[name], trace.heads[name], trace.predictions >= Tensor(gammas)[:, None]
    stops = looks & (sure(trace) >= Tensor(lambdas)[:, None])
    spent = trace.costs[name].predictor + segments[0] + heads[0] * looks[0]
    for n in range(1, len(looks)):
        spent = spent + (segments[n] + heads[n] * looks[n]) * ~stops[:n].any(0)
    return spent + (segments[-1] + heads[-1]) * ~stops.any(0) * (kind == name)


@settings(max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking would take minutes
@given(data=st.data(), seed=st.integers(0, 3), early=earlies, count=st.integers(1, 17))
def test_algorithm_1_executor_and_replay_agree_within_a_budget_too(data, seed: int, early: int, count: int) -> None:
    network, images, trace, ran = guided(seed, early)
    temperatures = [data.draw(st.sampled_from([0.5, 1.0, 4.0])) for _ in range(early + 1)]  # not of the predictor
    trace, costs = trace.tempered(temperatures).rows(torch.arange(count)), trace.costs["macs"]
    lambdas, gammas = apart(data, sure(trace)), apart(data, trace.predictions)
    limit = data.draw(st.sampled_from([INF] * early + [x + d for x in costs.alone + costs.leaving for d in (-1, 0, 1)]))
    limit, guide, walked = max(limit, min(costs.alone)) + costs.predictor, Predicted(lambdas, gammas), []
    policy = guide if limit == INF else Budget(limit, guide)
    executor, outcome, before = Executor(network, policy, temperatures), replay(policy, trace), ran.copy()
    with torch.inference_mode():
        for x in images[:count]:
            s = (1 / (1 + torch.exp(-network.predictor(x[None])[0]))).tolist()
            walked.append(algorithm_1(s, stops(network, costs, x, temperatures), costs, lambdas, gammas, limit))
    needed, together = ran - before, executor(images[:count])
    assert ran - before == needed + needed  # nothing after a sample's exit, no head that is not asked for
    alone = executor(images[count - 1 : count])
    for seen, expected in ((together, walked), (outcome.prediction, walked), (alone, walked[-1:])):
        same(seen, expected)
        assert seen.device_macs.tolist() == [device for *_, (device, _) in expected]
    assert [(row.nonzero()[:, 0] + 1).tolist() for row in outcome.heads.T] == [heads for *_, (_, heads) in walked]
    assert together.macs.max() <= limit
    for kind in kinds(trace.costs)[::2] if limit == INF else ():  # macs and device_macs
        assert getattr(together, kind).sum() == equation_4(trace, kind, lambdas, gammas).sum()


@settings(max_examples=150)
@given(seed=seeds, early=earlies, samples=st.integers(1, 20))
def test_a_curve_is_replays_and_these_are_equation_4_and_within_their_budget(seed, early, samples) -> None:
    trace, ends, one = made(seed, early, samples), Tensor([0, 1, INF]), Tensor([1])
    # at a score (for γ multiples of 1/8 where the seed is odd), just above it, or anywhere
    levels = [torch.cat([ends, x, x.nextafter(one), torch.rand(9)]) for x in (*sure(trace), *trace.predictions)]
    values = torch.stack([level[torch.randint(len(level), (6,))] for level in levels], 1).double()
    costs, ways = trace.costs["macs"], list(zip(trace.predictions.T.tolist(), stops_of(trace), strict=True))
    within = sorted([*costs.alone, *costs.leaving])[seed % (2 * early)] + costs.predictor
    for family, most in ((Predicted(), INF), (Budget(within, Predicted()), within)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("inference.replay.BLOCK", 4 * samples)
            seen = curve(family, values, trace)
        for i, row in enumerate(values.tolist()):
            outcome, lambdas, gammas = replay(family.at(row), trace), row[:early], row[early:]
            walked = [algorithm_1(s, stops, costs, lambdas, gammas, most) for s, stops in ways]
            same(outcome.prediction, walked)
            right, exits = outcome.prediction.label == trace.labels, [exit for _, _, exit, *_ in walked]
            assert (seen.accuracy[i], seen.lost[i]) == (right.double().mean(), (trace.correct[-1] & ~right).sum())
            assert seen.shares[i].tolist() == [exits.count(k + 1) / samples for k in range(early + 1)]
            for kind in kinds(trace.costs):
                paid = outcome.cost(trace, kind)
                assert seen.costs[kind][i] == paid.double().mean()
                assert most < INF or torch.equal(paid, equation_4(trace, kind, lambdas, gammas))
            assert outcome.prediction.macs.max() <= most


@given(data=st.data(), seed=seeds, early=earlies)
def test_a_predictor_that_asks_for_all_heads_for_none_or_for_the_right_ones(data, seed: int, early: int) -> None:
    trace = made(seed, early)
    lambdas = apart(data, sure(trace))
    right = replace(trace, predictions=(Tensor(lambdas)[:, None] <= sure(trace)).float())
    plain = replay(Confidence(lambdas), trace), replay(Never(), trace), oracle(Predicted(lambdas, 0.7), trace)
    asked = (replay(Predicted(lambdas, gamma), seen) for gamma, seen in ((0, trace), (INF, trace), (0.5, right)))
    for (one, other), (name, cost) in product(zip(asked, plain, strict=True), trace.costs.items()):
        assert all(map(torch.equal, (*one.prediction[:3], one.heads), (*other.prediction[:3], other.heads)))
        for kind in (name, f"device_{name}"):
            assert torch.equal(one.cost(trace, kind), other.cost(trace, kind) + cost.predictor)
            equation_3 = equation_4(trace, kind, lambdas, [0] * early) - cost.predictor
            assert torch.equal(plain[0].cost(trace, kind), equation_3)


@pytest.mark.parametrize("paid", [(42.44, 79.64, 34.93, 72.13), (42.434, 79.634, 34.929, 72.129)])
def test_the_worked_example_of_section_iii(paid: tuple[float, ...]) -> None:
    exits, digits = torch.tensor([1] * 6662 + [2] * 1981 + [3] * 1357), len(str(paid[0])) - 3
    cost = NetworkCosts("ptflops", 0, (1970000, 56980000, 274130000), (16700000, 14230000, 0), (1, 2), 400_000)
    if digits == 3:  # counted, not rounded to the two decimals of table V
        taps = StageFractions([0], [1, 2])((chain := vgg(16, 10)).stage_lengths, [])
        cost = network_costs(with_exits(chain, taps, exit_predictor, separable), "ptflops")
    logits = 10.0 * (exits == torch.arange(1, 4)[:, None])[:, :, None] * torch.eye(10)[0]
    trace = assembled(logits, 0 * exits, {"macs": cost, "ptflops": cost}, torch.rand(2, 10_000))
    points = replay(Confidence(0.99), trace), oracle(Predicted(0.99, 0.5), trace), replay(Predicted(0.99, 0), trace)
    spent = [p.cost(trace, kind).sum().item() / 1e10 for p in points for kind in ("device_ptflops", "ptflops")]
    assert tuple(round(x, digits) for x in spent[:4]) == paid
    assert spent[4:] == pytest.approx([x + (0.4, 0.398224)[digits - 2] for x in spent[:2]], abs=1e-9)


@pytest.mark.parametrize(("lambdas", "gammas"), [*product((None, 0.3, [0.7, INF]), (None, 0.1, [INF, 0.0]))])
@settings(max_examples=20)
@given(seed=seeds, points=st.integers(1, 60))
def test_candidates_are_points_of_the_family(lambdas, gammas, seed: int, points: int) -> None:
    trace, family = made(seed, 2), Predicted(lambdas, gammas)
    costs, rows = trace.costs["macs"], family.candidates(trace, points)
    for row in [*rows.tolist(), *family.sequence(3, costs)[::200].tolist()]:
        point = family.at(row)
        point.check(costs, 3)
        given = [*(row[:2] if lambdas is None else family.each(3)), *(row[2:] if gammas is None else family.gammas(3))]
        assert [*point.thresholds, *point.prediction] == row == given
        assert Budget(9e9, family).at(row).within == point == from_plain(point.describe())
    assert gammas is not None or [0, 0] in rows[:, 2:].tolist()
    assert lambdas is not None or [INF, INF] in rows[:, :2].tolist()


@given(seed=seeds, early=earlies, few=st.sampled_from([1, 2, 6, 20]), level=st.floats(0.4, 0.9))
def test_the_thresholds_chosen_are_those_found_by_replaying_all(seed: int, early: int, few: int, level: float) -> None:
    trace, before, family, grid = made(seed, early), Confidence(level), Predicted([level] * early), (0.4, 0.7, 0.9)

    def worth(policy: Policy, kind: str) -> tuple[Tensor, ...]:
        seen = replay(policy, trace).prediction
        return (seen.label != trace.labels).sum(), getattr(seen, kind).sum(), (seen.exit == trace.num_exits).sum()

    chosen = ConfidenceThresholds(grid=grid)(Never(), trace)
    rows = [worth(Confidence(row), "macs")[:2] for row in product(grid, repeat=early)]
    assert worth(chosen, "macs")[:2] == min(rows)
    assert ConfidenceThresholds(level)(Never(), trace) == before
    chosen = PredictionThresholds(more=few / 20, points=30)(before, trace)
    rows = [worth(family.at(row), "device_macs") for row in family.candidates(trace, 30).tolist()]
    bound, (wrong, macs, last) = worth(before, "macs")[2] + few, worth(chosen, "device_macs")
    assert last < bound
    assert (macs, wrong) == min((macs, wrong) for wrong, macs, last in rows if last < bound)
    assert chosen.thresholds == family.thresholds
    assert PredictionThresholds(0.3)(before, trace) == Predicted([level] * early, 0.3)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    Budget(23, Predicted([0.5, INF], [INF, 0])).check(COST, 3)
    for message, policies in REFUSED.items():
        for policy in policies:
            with pytest.raises(ValueError, match=message + r".*\Z"):
                policy.check(replace(COST, predictor=0) if "a network" in message else COST, 3)
    for more in (0, -0.1, 1.01, math.nan, INF, True, "2%"):
        with pytest.raises(ValueError, match=r"\AExpected choice\.more, .* above 0 and at most 1, got .*\Z"):
            PredictionThresholds(more=more)
    with pytest.raises(ValueError, match=r"\AExpected a network with an early exit for the Exit Predictor, got 1 .*\Z"):
        with_exits(vgg(11, 2), [], light, separable)


def test_a_predictor_that_gives_no_numbers_is_named() -> None:
    (network, images, trace, _), point, row = guided(0, 2), Predicted([1, 1], [0.5, 0.5]), torch.ones(1, 4)
    broken = with_exits(network.chain, [1, 3], light, fcs_only)
    broken.predictor.layers[-1].bias.data[1] = math.nan
    trace = replace(trace, predictions=trace.predictions.index_fill(1, LABELS[3], math.nan))
    for run in (Executor(broken, point), lambda _: replay(point, trace), lambda _: curve(point, row, trace)):
        with pytest.raises(ValueError, match="numbers from the Exit Predictor, got NaN"):
            run(images)


def test_a_trace_keeps_the_scores_bit_for_bit(tmp_path) -> None:
    (network, images, trace, _), turned = guided(1, 2), torch.arange(17).roll(7)
    bare = record(EarlyExitNetwork(network.chain, network.taps, network.heads), [(images, LABELS)])
    for one, scores in ((trace, torch.cat([network.predictor.scores(x) for x in images.split(5)]).T), (bare, None)):
        write_trace(tmp_path / "trace", one)
        back = read_trace(tmp_path / "trace")
        assert back.costs == one.costs
        for seen in (one, back, one.tempered([2, 3, 4]), back.rows(turned).rows(turned.argsort())):
            assert seen.predictions is scores is None or torch.equal(seen.predictions, scores)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(values=st.lists(st.none() | numbers | st.integers(0, 9) | st.lists(numbers, max_size=3), min_size=2, max_size=2))
def test_an_operating_point_comes_back_from_json(family: type[Policy], values: list) -> None:
    policy = family(*values[: len(fields(family))])
    assert from_plain(json.loads(json.dumps(to_plain(policy), allow_nan=False))) == policy
