"""Images that arrive while the bandwidth changes: against a loop over them, in numbers and as a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from costs.network import NetworkCosts
from figures.bandwidth_trace import simulation_figure
from figures.look import save
from inference.bandwidth import BandwidthTrace
from inference.latency_bound import Seen
from inference.policies import FixedExit, Never, Policy
from inference.predicted import Predicted
from inference.replay import curve, replay
from inference.simulation import Stream, averaged, simulate, summarized
from inference.thresholds import Confidence
from inference.trace import Trace, assembled
from tests.test_bandwidth_traces import LINK, LINK_MS, bandwidths_of, crept, holds, seeds, traces


def made(seed: int, early: int, codec: bool = False, samples: int = 7) -> Trace:
    """Random logits, scores and milliseconds, those of the device other for each sample."""
    torch.manual_seed(seed)
    n, cut = early + 1, (early or None) if codec else None
    link = LINK_MS if early else 0
    macs = NetworkCosts("macs", 0, (9,) * n, (3,) * n, tuple(range(1, n)), 2 if early else 0, (), cut)
    blocks, heads = torch.rand(2, n).tolist()
    ms = replace(macs, convention="latency_ms", blocks=tuple(blocks), heads=tuple(heads), link=link, encoder=0.5)
    scores = torch.rand(early, samples) if early else None
    trace = assembled(2 * torch.randn(n, samples, 3), torch.randint(3, (samples,)), {"macs": macs}, scores).priced(ms)
    segments = trace.segments["latency_ms"].clone()
    segments[0] += 10 * torch.rand(samples)
    return replace(trace, segments={**trace.segments, "latency_ms": segments})


def walked(policy_of: Callable, trace: Trace, over: BandwidthTrace, per_s: float, lag: float, order: list[int]) -> list:
    """Image by image, each replayed alone, its bits sent tick by tick."""
    found, costs = [], trace.costs["latency_ms"]
    for i, sample in enumerate(order):
        time, one = over.start + i / per_s, trace.rows(torch.tensor([sample]))
        outcome = replay(policy := policy_of(holds(over, time - lag)), one)
        latency, device = (outcome.cost(one, kind).item() for kind in ("latency_ms", "device_latency_ms"))
        exit, label = outcome.prediction.exit.item(), outcome.prediction.label.item()
        if exit == trace.num_exits and costs.device_ends is not None:
            done = time + device / 1000
            latency += 1000 * (crept(over, done, 8 * LINK.sent) - done) + LINK.delay_ms - LINK_MS
        values = [*getattr(policy, "thresholds", []), *getattr(policy, "prediction", [])]
        found.append([time, holds(over, time), exit, label == trace.labels[sample].item(), latency, *values])
    return found


def order_of(trace: Trace, over: BandwidthTrace, per_s: float, seed: int) -> list[int]:
    """The samples drawn, known by the time that each takes to the first exit."""
    mine = replay(FixedExit(1), trace).cost(trace, "latency_ms")
    seen = simulate(lambda _: FixedExit(1), trace, over, per_s, LINK, LINK_MS, seed=seed)
    return (seen.latency_ms[:, None] - mine).abs().argmin(1).tolist()


def rising(early: int, guided: bool) -> Callable[[float], Policy]:
    """Thresholds that are each another function of the bandwidth."""

    def policy_of(mbps: float) -> Policy:
        lambdas = [min(1.0, (k + math.log10(mbps) + 1) / 5) for k in range(1, early + 1)]
        return Predicted(lambdas, [0.8 - x / 2 for x in lambdas]) if guided else Confidence(lambdas)

    return policy_of


@settings(max_examples=100)
@given(
    seed=seeds, early=st.integers(1, 3), codec=st.booleans(), guided=st.booleans(), over=traces(),
    images=st.integers(1, 25), lag=st.sampled_from([0.0, 0.013, 0.5, 9.0]),
)  # fmt: skip
def test_a_stream_is_what_a_loop_over_its_images_finds(seed, early, codec, guided, over, images, lag) -> None:
    trace, policy_of, per_s = made(seed, early, codec), rising(early, guided), images / (over.end - over.start)
    times = over.start + torch.arange(images).double() / per_s
    steps = (torch.cat([times, times - lag])[:, None] - over.seconds).abs()
    assume(((steps == 0) | (steps > 1e-6)).all())  # or the loop may take another side of a step
    order = order_of(trace, over, per_s, seed)
    assert len(order) == images
    for start in range(0, images, len(trace)):  # nobody twice before everybody once
        drawn = order[start : start + len(trace)]
        assert len(set(drawn)) == len(drawn)
    asked: list[float] = []
    seen = simulate(lambda x: asked.append(x) or policy_of(x), trace, over, per_s, LINK, LINK_MS, lag, seed)
    assert len(asked) == len(set(asked))
    columns = (seen.arrival_s, seen.bandwidth, seen.exit, seen.right, seen.latency_ms, *seen.thresholds.T)
    expected = torch.tensor(walked(policy_of, trace, over, per_s, lag, order), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([c.double() for c in columns], 1), expected, rtol=0, atol=2e-5)


def test_the_order_is_the_seeds_and_one_machine_sends_nothing() -> None:
    over, trace = bandwidths_of([2, 4], [0.001, 0.001]), made(0, 2)
    orders = [order_of(trace, over, 5, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    alone = made(0, 0)
    seen = simulate(lambda _: Never(), alone, over, 5, LINK, 123.0)
    whole = replay(Never(), alone).cost(alone, "latency_ms")
    assert seen.latency_ms.tolist() == whole[order_of(alone, over, 5, 0)].tolist()
    assert seen.thresholds.shape == (20, 0)


def settled() -> Trace:
    """Ten samples, six leaving at exit 1, three at exit 2, one at exit 3, on the server."""
    exits = torch.tensor([1] * 6 + [2] * 3 + [3])
    logits = 10.0 * (exits == torch.arange(1, 4)[:, None])[:, :, None] * torch.eye(4)[0]
    macs = NetworkCosts("macs", 0, (1, 1, 1), (1, 1, 1), (1, 2), cut=2)
    ms = NetworkCosts(
        "latency_ms", 1.0, (2.0, 3.0, 4.0), (0.5, 0.25, 0.125), (1, 2), 0, (), 2, 0.75, LINK_MS, 0.0625
    )  # fmt: skip
    return assembled(logits, torch.tensor([0] * 9 + [1]), {"macs": macs}).priced(ms)


@pytest.mark.parametrize("mbps", [0.1, 1.0, 20.0, 100.0])
def test_at_a_constant_bandwidth_the_mean_latency_is_equation_11(mbps: float) -> None:
    over, trace = bandwidths_of([3, 4, 8], [mbps] * 3), settled()
    seen = simulate(lambda _: Confidence([0.9, 0.9]), trace, over, 10, LINK, LINK_MS)
    assert len(seen.exit) == 90
    device = 1 + 2 + 0.5, 1 + 2 + 0.5 + 3 + 0.25
    crossed = device[1] + 0.75 + 8 * 2500 / (1000 * mbps) + 0.75 + 0.0625 + 4 + 0.125
    numbers = summarized(seen, 30, 3)
    assert numbers["latency_ms"] == pytest.approx(0.6 * device[0] + 0.3 * device[1] + 0.1 * crossed, abs=1e-7)
    assert [numbers[f"exit_{k}/fraction"] for k in (1, 2, 3)] == pytest.approx([0.6, 0.3, 0.1])
    assert numbers["acc"] == pytest.approx(0.9)
    assert numbers["over_bound"] == pytest.approx(0.1 if crossed > 30 else 0)
    line = curve(Confidence(), torch.tensor([[0.9, 0.9]]).double(), trace)
    assert numbers["latency_ms"] == pytest.approx(Seen.of(line, LINK_MS).latency(LINK, mbps).item(), abs=1e-7)
    assert crossed == pytest.approx(seen.latency_ms[seen.exit == 3].mean().item(), abs=1e-7)
    assert LINK.ms(mbps) == pytest.approx(LINK.delay_ms + 8 * LINK.sent / (1000 * mbps))


def test_an_image_that_begins_to_send_before_a_change_arrives_after_it() -> None:
    over = bandwidths_of([0, 1], [1, 4])
    seen = simulate(lambda _: FixedExit(3), settled(), over, 1 / 0.98075, LINK, LINK_MS)
    begun, rest = 1 + 2 + 3 + 0.75, 0.75 + 0.0625 + 4 + 0.125  # the second begins to send at 0.9875 s
    assert seen.latency_ms[:2].tolist() == pytest.approx([begun + 20 + rest, begun + 12.5 + 7.5 / 4 + rest])


def test_what_cannot_be_simulated_is_refused_in_one_line() -> None:
    over, trace = bandwidths_of([0, 1], [1, 2]), settled()
    fixed: Callable[[float], Policy] = lambda _: FixedExit(1)  # noqa: E731
    bare = replace(trace, costs={"macs": trace.costs["macs"]})
    cases: list[tuple[str, tuple, dict]] = [
        (r"images a second above 0 and finite, got 0\.", (fixed, trace, over, 0, LINK, LINK_MS), {}),
        (r"a lag of the known bandwidth of at least 0 s, got -1\.", (fixed, trace, over, 1, LINK, LINK_MS, -1.0), {}),
        (r"link_ms to be the 12 ms that the trace has, got 11\.", (fixed, trace, over, 1, LINK, 11.0), {}),
        (r"a trace that is priced in latency_ms, this one has macs;", (fixed, bare, over, 1, LINK, LINK_MS), {}),
        (r"at least one sample", (fixed, trace.rows(torch.arange(0)), over, 1, LINK, LINK_MS), {}),
        (r"policy\.exit to be an exit from 1 to 3", (lambda _: FixedExit(4), trace, over, 1, LINK, LINK_MS), {}),
    ]
    for message, arguments, named in cases:
        with pytest.raises(ValueError, match=rf"\AExpected {message}.*\Z"):
            simulate(*arguments, **named)

    def outside(mbps: float) -> Policy:
        if mbps == 2:
            raise ValueError("no thresholds for 2")
        return Confidence(0.5)

    with pytest.raises(ValueError, match=r"\Ano thresholds for 2\Z"):
        simulate(outside, trace, over, 1, LINK, LINK_MS)
    with pytest.raises(ValueError, match=r"\AExpected as many thresholds at every bandwidth, got .*\Z"):
        simulate(lambda x: Never() if x == 2 else Confidence(0.5), trace, over, 1, LINK, LINK_MS)
    with pytest.raises(ValueError, match=r"\AExpected a window above 0 s and finite, got 0\.\Z"):
        averaged(torch.ones(2), torch.arange(2), 0)


def stream_of(seed: int, images: int, start: float, per_s: float, exits: int = 3) -> Stream:
    random = np.random.default_rng(seed)
    latency, right = torch.tensor(random.exponential(20, images)), torch.tensor(random.random(images) < 0.7)
    arrival, exit = start + torch.arange(images).double() / per_s, torch.tensor(random.integers(1, exits + 1, images))
    bandwidth, thresholds = torch.tensor(random.random(images)) + 0.5, torch.tensor(random.random((images, exits - 1)))
    return Stream(arrival, bandwidth, exit, right, latency, thresholds)


@given(
    seed=seeds, images=st.integers(1, 60), start=st.floats(0, 1e4), per_s=st.sampled_from([0.3, 3, 10, 30]),
    window=st.sampled_from([0.5, 1.0, 2.0]), bound=st.floats(1, 60),
)  # fmt: skip
@example(seed=0, images=60, start=1.1, per_s=10, window=1.0, bound=20)  # (1.1 + 3) - 1.1 is a little less than 3
def test_a_summary_is_numpys(seed, images: int, start: float, per_s: float, window: float, bound: float) -> None:
    stream = stream_of(seed, images, start, per_s)
    latency, numbers = stream.latency_ms.numpy(), summarized(stream, bound, 4, window)
    for rank in (50, 95, 99):
        assert numbers[f"latency_ms/p{rank}"] == pytest.approx(np.percentile(latency, rank))
    assert numbers["latency_ms"] == pytest.approx(latency.mean())
    assert numbers["acc"] == pytest.approx(stream.right.numpy().mean())
    shares = [(stream.exit.numpy() == k).mean() for k in range(1, 5)]
    assert [numbers[f"exit_{k}/fraction"] for k in range(1, 5)] == pytest.approx(shares)
    assert numbers["over_bound"] == pytest.approx((latency > bound).mean())
    grouped: dict[int, list[float]] = {}
    for i, value in enumerate(latency):
        grouped.setdefault(math.floor(round(i / per_s / window, 6)), []).append(value)
    means = {number: np.mean(values) for number, values in grouped.items()}
    assert numbers["windows_over_bound"] == pytest.approx(np.mean([mean > bound for mean in means.values()]))
    begin, values = averaged(stream.latency_ms, stream.arrival_s, window)
    assert begin.tolist() == pytest.approx([start + number * window for number in means])
    assert values.tolist() == pytest.approx(list(means.values()))


def legible(figure) -> None:
    """No text of the figure covers another."""
    figure.draw_without_rendering()
    texts = [axes.yaxis.label for axes in figure.axes] + [axes.xaxis.label for axes in figure.axes]
    texts += [text for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def drawn(line) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(line.get_xdata()), torch.as_tensor(line.get_ydata())


def test_the_picture_shows_the_streams(tmp_path) -> None:
    first, second = stream_of(0, 1500, 4.0, 30), stream_of(1, 1500, 4.0, 30)
    first.thresholds[700:, 1] = math.inf
    figure = simulation_figure({"follows": first, "fixed": second}, 30, ["λ1", "λ2"], 3, "a simulation")
    bandwidth, thresholds, latency, shares = figure.axes
    assert all(map(torch.equal, drawn(bandwidth.lines[0]), (first.arrival_s, first.bandwidth)))
    assert all(map(torch.equal, drawn(thresholds.lines[1]), (first.arrival_s, first.thresholds[:, 1].clamp(max=1))))
    for line, stream in zip(latency.lines, (first, second), strict=False):
        assert torch.equal(drawn(line)[1], averaged(stream.latency_ms, stream.arrival_s, 1.0)[1])
    assert [text.get_text() for text in latency.get_legend().get_texts()] == ["follows", "fixed", "bound, 30 ms"]
    assert [text.get_text() for text in shares.get_legend().get_texts()] == ["exit 3", "exit 2", "exit 1"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in shares.collections]
    assert tops[-1] == pytest.approx(100)
    assert shares.get_xlim() == pytest.approx((4, 54))
    legible(figure)
    save(figure, tmp_path / "simulation.png")
    assert matplotlib.image.imread(tmp_path / "simulation.png").shape == (1440, 1440, 4)


def test_a_picture_of_one_image_and_no_thresholds_and_none_of_no_stream() -> None:
    one = replace(stream_of(0, 1, 0.0, 1.0), thresholds=torch.empty(1, 0).double())
    legible(simulation_figure({"alone": one}, 30, [], 3, "one image"))
    with pytest.raises(ValueError, match=r"\AExpected at least one stream to draw, got none\.\Z"):
        simulation_figure({}, 30, [], 3, "none")
    with pytest.raises(ValueError, match=r"\AExpected 0 names of thresholds, as alone has, got 1\.\Z"):
        simulation_figure({"alone": one}, 30, ["λ1"], 3, "one image")
