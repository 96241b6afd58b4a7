"""Points on made traces: curves, oracles, temperatures, and what each way of choosing promises."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassCalibrationError

from costs.network import NetworkCosts
from inference import thresholds
from inference.budget import Budget
from inference.calibration import BudgetedBatch, HighestAccuracy, LeastCost, RiskControl, certified, upper_bound
from inference.policies import FixedExit, Never, Patience, Policy, State
from inference.replay import curve, label_oracle, oracle, pareto, replay
from inference.temperature import calibration_errors, reliability, temperatures
from inference.thresholds import Confidence, Entropy, Margin
from inference.trace import Trace
from tests.test_execution import KINDS, SCORES, Rule, drawn_rule, same, same_on_trace, walk

seeds, shares, kinds = st.integers(0, 10**6), st.floats(0.01, 0.3), st.sampled_from(sorted(SCORES))


def trace_of(logits: Tensor, labels: Tensor, segments: tuple = (9, 9), heads: tuple = (1, 1)) -> Trace:
    costs = NetworkCosts("macs", 0, segments, heads, tuple(range(1, len(segments))))
    parts = (*(torch.tensor(part)[:, None].repeat(1, len(labels)) for part in (segments, heads)), costs)
    return Trace(logits, labels, *(dict.fromkeys(("macs", "ptflops"), part) for part in parts))


def made_trace(seed: int, exits: int, samples: int, spread: float = 2.0, dearest: int = 4 * 10**8) -> Trace:
    """Random logits and costs; the segments of a sample come to at most the static cost, as with gates."""
    torch.manual_seed(seed)
    parts: list[dict] = [{}, {}, {}]
    for name in ("macs", "ptflops"):
        blocks, heads = torch.randint(1, dearest, (2, exits))
        segments = (blocks[:, None] * (2 * torch.rand(exits, samples)).clamp(max=1).double()).long()
        costs = NetworkCosts(name, 0, tuple(blocks.tolist()), tuple(heads.tolist()), tuple(range(1, exits)))
        for part, value in zip(parts, (segments, heads[:, None].repeat(1, samples), costs), strict=True):
            part[name] = value
    return Trace(torch.randn(exits, samples, 2 + seed % 3) * spread, torch.randint(2 + seed % 3, (samples,)), *parts)


def stops_of(trace: Trace) -> list[list[tuple]]:
    heads = [[z.clone for z in sample] for sample in trace.logits.transpose(0, 1)]
    prices = (part["macs"].T.tolist() for part in (trace.segments, trace.heads))
    return [list(zip(*sample, strict=True)) for sample in zip(*prices, heads, strict=True)]


@settings(max_examples=400)
@given(data=st.data(), seed=seeds, exits=st.integers(2, 6), samples=st.integers(1, 17), ties=st.booleans())
def test_no_sample_spends_more_than_its_budget_whatever_its_segments_came_to(data, seed, exits, samples, ties) -> None:
    trace = made_trace(seed, exits, samples)
    rule = drawn_rule(data, trace, ties)
    walked = [walk(rule, trace.costs["macs"], stops) for stops in stops_of(trace)]
    same_on_trace(rule, trace, walked)
    same_on_trace(rule, trace.rows(order := torch.randperm(samples)), [walked[i] for i in order])


class Turns(Patience):
    def begin(self, images: None, state: State) -> None:
        super().begin(images, state)
        state.memory["turn"] = torch.arange(len(state.spent))

    def wants(self, k: int, state: State) -> Tensor:
        return (state.memory["turn"] + k) % 2 == 0


def test_a_policy_may_ask_every_other_sample_for_its_head() -> None:
    trace, rule, walked = made_trace(0, 12, 40), Rule("patience", 2, math.inf), []
    for turn, stops in enumerate(stops_of(trace)):
        taking_turns = type("", (Rule,), {"wants": lambda rule, k, turn=turn: (turn + k) % 2 == 0})(*rule)
        walked.append(walk(taking_turns, trace.costs["macs"], stops))
    same(replay(Turns(2), trace).prediction, walked)


FAMILIES = [*(kind() for kind in (Confidence, Margin, Entropy, Patience, FixedExit, Never, Budget)),
            Budget(within=Confidence(0.5)), Budget(3 * 10**9, Entropy())]  # fmt: skip
EDGES = trace_of(torch.tensor([[[200.0, 0, 0], [5, 0, 0]], [[0, 0, 0], [0.1, 0, 0]]]), torch.tensor([1, 0]))


@given(seed=seeds, policy=st.sampled_from(FAMILIES), exits=st.integers(1, 5), drop=st.sampled_from([0.0, 0.1, 0.3]))
def test_the_points_chosen_are_those_found_by_replaying_every_candidate(seed, policy, exits, drop) -> None:
    trace = made_trace(seed, exits, 20, dearest=2 if seed % 2 else 10**9)
    seen = curve(policy, policy.candidates(trace, 30), trace)

    def replayed(policy: Policy) -> tuple[float, float]:
        prediction = replay(policy, trace).prediction
        return prediction.macs.double().mean().item(), -(prediction.label == trace.labels).double().mean().item()

    points = [replayed(policy.at(row)) for row in seen.values.tolist()]
    assert points == list(zip(seen.costs["macs"].tolist(), (-seen.accuracy).tolist(), strict=True))
    best = min(accuracy for _, accuracy in points)
    assert replayed(HighestAccuracy()(policy, trace, seen)[0].policy) == min(p for p in points if p[1] == best)
    enough = [p for p in points if -p[1] * 20 >= trace.correct[-1].sum().item() - drop * 20 - 1e-9]
    [point] = LeastCost(drop)(policy, trace, seen)
    assert (point.policy and replayed(point.policy)) == min(enough, default=None)
    as_dear = replace(seen, costs={"macs": torch.ones(len(points))})
    [point] = LeastCost(drop)(policy, trace, as_dear)
    assert (point.policy and replayed(point.policy)[1]) == (best if enough else None)


@pytest.mark.parametrize("policy", FAMILIES[:6], ids=lambda policy: policy.name)
@pytest.mark.parametrize(("exits", "points"), [(1, 1), (2, 5), (3, 16), (6, 100)])
def test_never_leaving_is_a_candidate_so_that_no_drop_is_impossible(policy: Policy, exits: int, points: int) -> None:
    trace = made_trace(0, exits, 50)
    seen = curve(policy, policy.candidates(trace, points), trace)
    assert seen.shares[:, -1].max() == 1
    assert LeastCost(0)(policy, trace, seen)[0].policy


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    front = [points[i] for i in pareto(*torch.tensor(points).T.double())]
    beaten = {(a, c) for a, c in points for b, d in points if b >= a and d <= c and (b, d) != (a, c)}
    assert front == sorted(set(points) - beaten, key=lambda point: point[1])


def test_the_worked_example_of_the_exit_predictor_paper() -> None:
    exits = torch.tensor([1] * 6662 + [2] * 1981 + [3] * 1357)
    logits = 10.0 * (exits == torch.arange(1, 4)[:, None])[:, :, None] * torch.eye(10)[0]
    segments, heads = (1_966_080, 56_983_552, 333_082_634 - 1_966_080 - 56_983_552), (16_695_306, 14_233_610, 0)
    trace = trace_of(logits, torch.zeros(10_000, dtype=torch.int64), segments, heads)
    cases = (replay(Confidence(0.99), trace), 42.434, 79.634), (oracle(Confidence(0.99), trace), 34.929, 72.129)
    for outcome, device, whole in cases:
        spent = outcome.cost(trace, "ptflops")
        assert outcome.prediction.exit.tolist() == exits.tolist()
        assert spent.double().mean().item() / 1e6 == pytest.approx(whole, abs=5e-4)
        assert (spent - segments[2] * (exits == 3)).double().mean().item() / 1e6 == pytest.approx(device, abs=5e-4)


@settings(max_examples=400)
@given(data=st.data(), seed=seeds, exits=st.integers(2, 4), samples=st.integers(1, 4))
def test_no_policy_is_as_accurate_as_the_label_oracle_and_cheaper(data, seed, exits, samples) -> None:
    trace = made_trace(seed, exits, samples, dearest=data.draw(st.sampled_from([3, 10, 100])))
    best, rule = label_oracle(trace), drawn_rule(data, trace, False)
    outcome = replay(rule.policy(), trace)
    right, most = ((o.prediction.label == trace.labels).sum() for o in (outcome, best))
    assert most == trace.correct.any(0).sum()
    assert right < most or outcome.prediction.macs.sum() >= best.prediction.macs.sum()


@settings(max_examples=20)
@given(seed=seeds, hot=st.floats(0.2, 5), factor=st.floats(0.5, 2))
def test_temperatures_are_the_best_of_a_dense_grid_and_follow_the_logits_scale(seed, hot, factor) -> None:
    made = made_trace(seed, 2, 200)
    labels = torch.distributions.Categorical(logits=made.logits[0] / hot).sample()
    trace = trace_of(made.logits, labels)
    grid = torch.logspace(math.log10(0.05), math.log10(20), 1001, dtype=torch.float64)
    found = temperatures(trace)
    for logits, temperature in zip(trace.logits.double(), found, strict=True):
        losses = torch.stack([cross_entropy(logits / t, labels) for t in grid])
        assert abs(math.log(temperature / grid[losses.argmin()])) < 0.0061  # one step of the grid
        assert cross_entropy(logits / temperature, labels) <= min(losses.min(), cross_entropy(logits, labels)) + 1e-6
    if 0.12 < found[0] < 9:  # far from the ends of the search
        assert temperatures(trace.tempered([1 / factor] * 2))[0] == pytest.approx(found[0] * factor, rel=1e-3)


def test_the_answer_is_the_largest_logit_where_softmax_cannot_tell_it_from_another() -> None:
    close = torch.tensor([0.1, np.nextafter(np.float32(0.1), np.float32(1))])
    trace = trace_of(close.expand(2, 1, 2), torch.tensor([1]))
    assert replay(Never(), trace).prediction.label == trace.correct.all() == 1


@pytest.mark.parametrize("trace", [made_trace(0, 3, 500, 1), made_trace(1, 2, 500, 3), EDGES], ids=len)
def test_the_calibration_error_is_torchmetrics_and_that_of_the_reliability_bins(trace: Trace) -> None:
    for logits, error in zip(trace.logits, calibration_errors(trace), strict=True):
        bins, p = reliability(logits, trace.labels), logits.softmax(1)
        by_hand = np.nansum(bins.counts * abs(bins.accuracy - bins.confidence)) / len(trace)
        assert error == pytest.approx(by_hand, abs=1e-6)
        if p.max() < 1:  # torchmetrics has a bin of its own, the 16th, for exactly 1
            published = MulticlassCalibrationError(trace.num_classes, 15)(p, trace.labels).item()
            assert error == pytest.approx(published, abs=1e-6)


@given(seed=seeds, i=st.integers(1, 39), exits=st.integers(2, 4), n=st.integers(1, 40), kind=kinds)
@example(seed=0, i=4, exits=2, n=18, kind="confidence")
def test_a_budgeted_batch_leaves_in_shares_proportional_to_powers_of_q(seed, i, exits, n, kind) -> None:
    trace, q = made_trace(seed, exits, n, 1.0), Fraction(i, 20)
    scores = [[SCORES[kind](z.softmax(0).tolist()) for z in logits] for logits in trace.logits]
    assume(all(min(np.diff(sorted(row)), default=1) > 1e-6 for row in scores))
    expected, rest = [exits] * n, list(range(n))
    for k in range(1, exits):
        rest.sort(key=lambda sample: scores[k - 1][sample], reverse=kind != "entropy")
        leaving = math.floor(n * q**k / sum(q**j for j in range(1, exits + 1)))
        for sample in rest[:leaving]:
            expected[sample] = k
        rest = rest[leaving:]
    point = BudgetedBatch()(KINDS[kind](), trace, None)[i - 1]
    assert replay(point.policy, trace).prediction.exit.tolist() == expected
    [nothing] = BudgetedBatch()(Patience(), trace, None)
    assert (nothing.policy, nothing.note[:30]) == (None, "needs a policy with thresholds")


@pytest.mark.parametrize(("samples", "exit"), [(298, 2), (299, 1)])
def test_one_percent_with_95_percent_certainty_needs_299_faultless_samples(samples: int, exit: int) -> None:
    trace = trace_of(torch.eye(4)[0].expand(2, samples, 4), torch.zeros(samples, dtype=torch.int64))
    [point] = RiskControl(0.01, 0.05)(Confidence(), trace, None)
    assert (replay(point.policy or Never(), trace).prediction.exit == exit).all()
    assert ("298 samples; the smallest ε is 0.0101, this one needs 299" in point.note) == (samples == 298)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(60, 2000), shares, shares)
def test_points_are_certified_by_binomial_tests_in_a_row(lost, samples, epsilon, delta) -> None:
    taken = -1
    for i, count in enumerate(lost):
        test = binomtest(count, samples, epsilon, alternative="less")
        bound = test.proportion_ci(1 - delta, method="exact").high
        assert upper_bound(count, samples, delta) == pytest.approx(bound)
        assume(abs(bound - epsilon) > 1e-9)
        assert (test.pvalue <= delta) == (bound <= epsilon)
        if bound > epsilon:
            break
        taken = i
    assert certified(lost, samples, epsilon, delta) == taken


def test_the_true_risk_exceeds_epsilon_no_more_often_than_promised(monkeypatch) -> None:
    monkeypatch.setattr(thresholds, "STEPS", 300)
    epsilon, delta, draws = 0.05, 0.1, 500
    ahead = torch.randn(3, 20_000) * 2 + torch.tensor([[1.5], [2.5], [4.0]])  # of class 0, the right one
    logits = torch.stack([ahead, torch.zeros_like(ahead)], 2)
    population = trace_of(logits, torch.zeros(20_000, dtype=torch.int64), (9, 9, 9), (1, 1, 1))
    all_points = curve(Confidence(), Confidence().sequence(2, population.costs["macs"]), population)
    risk = dict(zip(all_points.values[:, 0].tolist(), (all_points.lost / 20_000).tolist(), strict=True))
    assert risk[math.inf] == 0 < 2 * epsilon < risk[0.0]
    calibrations = (population.rows(torch.randint(20_000, (500,))) for _ in range(draws))
    points = [RiskControl(epsilon, delta)(Confidence(), calibration, None)[0] for calibration in calibrations]
    risks = [risk[point.policy.thresholds[0]] for point in points]
    exceeded = sum(value > epsilon for value in risks) / draws
    assert 0.2 * delta < exceeded <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert sum(value > epsilon / 3 for value in risks) > 0.9 * draws  # it does dare something


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [(LeastCost, "drop", 1.5), (LeastCost, "drop", -0.1), (RiskControl, "epsilon", 0), (RiskControl, "delta", 1),
     (BudgetedBatch, "points", 0)],
)  # fmt: skip
def test_parameters_that_cannot_be_are_refused(make: type, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected calibration\.\w+\.{key} .*, got {value}"):
        make(**{key: value})
