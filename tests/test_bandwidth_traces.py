"""Bandwidths over time, and images sent while they change: against loops, closed forms, equation 11 and numpy."""

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
from inference.bandwidth import BandwidthTrace, generated, read_bandwidths, write_bandwidths
from inference.latency_bound import Link, Seen
from inference.policies import FixedExit, Never, Policy
from inference.predicted import Predicted
from inference.replay import curve, replay
from inference.simulation import Stream, averaged, simulate, summarized
from inference.thresholds import Confidence
from inference.trace import Trace, assembled

TICK = 0.01  # s; times that are drawn are multiples of it
seeds, rates = st.integers(0, 10**6), st.floats(0.1, 100)


def bandwidths_of(seconds: list[float], mbps: list[float]) -> BandwidthTrace:
    return BandwidthTrace(torch.tensor(seconds, dtype=torch.float64), torch.tensor(mbps, dtype=torch.float64))


@st.composite
def traces(draw: st.DrawFn) -> BandwidthTrace:
    ticks = draw(st.lists(st.integers(0, 500), min_size=2, max_size=6, unique=True).map(sorted))
    return bandwidths_of([tick * TICK for tick in ticks], [draw(rates) for _ in ticks])


def holds(trace: BandwidthTrace, time: float) -> float:
    """The bandwidth at a time, found by looking at all."""
    rows = list(zip(trace.seconds.tolist(), trace.mbps.tolist(), strict=True))
    return [mbps for second, mbps in rows if second <= time + 1e-9][-1:][0] if time + 1e-9 > rows[0][0] else rows[0][1]


def crept(trace: BandwidthTrace, start: float, bits: float) -> float:
    """When bits have arrived, tick by tick."""
    for tick in itertools.count(math.floor(start / TICK + 1e-9)):
        begin, rate = max(start, tick * TICK), 1e6 * holds(trace, tick * TICK)
        end = (tick + 1) * TICK
        if bits <= rate * (end - begin):
            return begin + bits / rate
        bits -= rate * (end - begin)
    raise AssertionError


@settings(max_examples=200)
@given(trace=traces(), start=st.floats(0, 7), bits=st.floats(0, 3e5))
def test_bits_arrive_when_a_loop_in_small_steps_has_sent_them(trace, start: float, bits: float) -> None:
    times = torch.tensor([start, trace.start, trace.end], dtype=torch.float64)
    expected = [crept(trace, time, bits) for time in times.tolist()]
    assert trace.arrival(times, bits).tolist() == pytest.approx(expected, abs=1e-7)


@given(trace=traces(), start=st.floats(0, 7), first=st.floats(0, 1e8), second=st.floats(0, 1e8), rate=rates)
def test_what_follows_arrives_after_and_one_bandwidth_takes_its_time(trace, start, first, second, rate) -> None:
    begin, bits, more = (
        torch.tensor(value, dtype=torch.float64) for value in (start, [[0.0, first], [second, first + second]], second)
    )
    arrived = trace.arrival(begin, bits)
    assert arrived.shape == (2, 2)
    assert arrived[0, 0] == begin
    assert (arrived >= begin).all()
    assert (arrived[1, 1] >= arrived).all()
    after = trace.arrival(trace.arrival(begin, first), more)
    assert after.item() == pytest.approx(arrived[1, 1].item(), abs=1e-4)  # of up to 1000 s
    constant = replace(trace, mbps=torch.full_like(trace.mbps, rate))
    assert constant.arrival(begin, first).item() == pytest.approx(start + first / (1e6 * rate), rel=1e-9)


def test_bits_that_meet_a_change_and_bandwidths_at_and_beyond_the_ends() -> None:
    trace = bandwidths_of([1, 2, 4], [1, 4, 0.5])
    times = torch.tensor([1.5, 1.5, 1.5, 1.5, 2, 3, 9, 0.5]).double()
    bits = torch.tensor([0.5e6, 2.5e6, 8.5e6, 10e6, 4e6, 4.5e6, 1e6, 0.25e6])
    assert trace.arrival(times, bits).tolist() == [2, 2.5, 4, 7, 3, 5, 11, 0.75]
    assert (trace.start, trace.end) == (1, 6)
    assert trace.at(torch.tensor([[0.0, 1, 1.999], [2, 4, 99]])).tolist() == [[1, 1, 1], [4, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("seconds", "mbps", "message"),
    [
        ([1.0], [1.0], "two or more times"),
        ([1.0, 2.0], [1.0], "two or more times"),
        ([[0.0], [1.0]], [[1.0], [1.0]], "two or more times"),
        ([0.0, 0.0], [1.0, 1.0], "times that rise from 0 s"),
        ([-1.0, 0.0], [1.0, 1.0], "times that rise from 0 s"),
        ([0.0, math.inf], [1.0, 1.0], "times that rise from 0 s"),
        ([0.0, 1.0], [1.0, 0.0], "bandwidths above 0 Mbit/s and finite, got 0 "),
        ([0.0, 1.0], [1.0, math.nan], "bandwidths above 0 Mbit/s and finite"),
    ],
)
def test_tensors_that_are_no_bandwidths_over_time_are_refused(seconds, mbps, message: str) -> None:
    with pytest.raises(ValueError, match=rf"\AExpected {message}.*\Z"):
        bandwidths_of(seconds, mbps)


def test_other_numbers_and_fewer_bits_than_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\AExpected two or more times .*float32.*\Z"):
        BandwidthTrace(torch.arange(2.0), torch.ones(2))
    with pytest.raises(ValueError, match=r"\AExpected at least 0 bits to send, got -1\.\Z"):
        bandwidths_of([0, 1], [1, 1]).arrival(torch.zeros(2), torch.tensor([1.0, -1]))


@settings(max_examples=15)
@given(trace=traces(), mark=st.booleans())
def test_a_file_gives_the_same_numbers_back(trace, mark: bool, tmp_path) -> None:
    write_bandwidths(path := tmp_path / "new" / "bandwidths.csv", trace)
    if mark:  # as spreadsheets write it
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    back = read_bandwidths(path)
    assert torch.equal(back.seconds, trace.seconds)
    assert torch.equal(back.mbps, trace.mbps)
    assert path.read_text(encoding="utf-8-sig").startswith("seconds,mbps\n")


HEAD = "seconds,mbps\n0,1\n"
MALFORMED = {
    "": (1, "the header seconds,mbps", "''"),
    "0,1\n1,1\n": (1, "the header seconds,mbps", "'0,1'"),
    "time,mbps\n0,1\n1,1\n": (1, "the header seconds,mbps", "'time,mbps'"),
    '"a\nb",mbps\n0,1\n1,1\n': (2, "the header seconds,mbps", r"'a\nb,mbps'"),
    HEAD + "1\n": (3, "2 cells, seconds and Mbit/s,", "1"),
    HEAD + "1,2,3\n": (3, "2 cells, seconds and Mbit/s,", "3"),
    HEAD + "1,2\n\n2,3\n": (4, "2 cells, seconds and Mbit/s,", "0"),
    HEAD + "1,fast\n": (3, "numbers", "'1,fast'"),
    HEAD + "1,\n": (3, "numbers", "'1,'"),
    HEAD + "1,nan\n": (3, "finite numbers", "'1,nan'"),
    HEAD + "1,2\ninf,2\n": (4, "finite numbers", "'inf,2'"),
    HEAD + "1,0\n": (3, "a bandwidth above 0 Mbit/s", "0"),
    HEAD + "1,-2\n": (3, "a bandwidth above 0 Mbit/s", "-2"),
    "seconds,mbps\n-1,2\n": (2, "a time of 0 s or later", "-1"),
    HEAD + "0,2\n": (3, "a time after the 0.0 s of the row before", "0.0"),
    HEAD + "2,2\n1,2\n": (4, "a time after the 2.0 s of the row before", "1.0"),
    HEAD + '1,"2\n': (3, "comma-separated numbers", "unexpected end of data"),
    HEAD: (2, "two or more rows by the end,", "1"),
    "seconds,mbps\n": (1, "two or more rows by the end,", "0"),
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line_that_names_the_line(text: str, tmp_path) -> None:
    (path := tmp_path / "bandwidths.csv").write_text(text)
    line, expected, got = MALFORMED[text]
    with pytest.raises(ValueError) as caught:
        read_bandwidths(path)
    assert str(caught.value) == f"Expected {expected} in line {line} of {path}, got {got}; correct the file."


def test_what_is_no_file_or_no_text_is_refused(tmp_path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    for name, reason in (("absent.csv", "No such file"), ("", "Is a directory"), ("picture.png", "bytes that are not")):
        with pytest.raises(ValueError, match=rf"\AExpected a CSV file of bandwidths .*{name}, got: {reason}.*path.*\Z"):
            read_bandwidths(tmp_path / name)


@settings(max_examples=30)
@given(seed=seeds, low=st.floats(0.01, 1), times=st.floats(1.01, 1000), step=st.sampled_from([0.1, 0.5, 1.0, 7.0]))
def test_generated_bandwidths_are_the_seeds_within_their_range(seed: int, low: float, times: float, step) -> None:
    trace = generated(60, seed, low, low * times, step)
    again, other = generated(60, seed, low, low * times, step), generated(60, seed + 1, low, low * times, step)
    assert torch.equal(trace.mbps, again.mbps)
    assert not torch.equal(trace.mbps, other.mbps)
    assert low <= trace.mbps.min() <= trace.mbps.max() <= low * times
    assert torch.equal(trace.seconds, torch.arange(int(60 / step + 1e-9)).double() * step)
    assert trace.end == pytest.approx(len(trace.mbps) * step)
    assert len(generated(0.3, step=0.1).mbps) == 3  # though 0.3 / 0.1 is a little less


def test_generated_bandwidths_wander_through_good_and_poor_times_and_fade() -> None:
    logs = [generated(seed=seed).mbps.log10().numpy() for seed in range(40)]
    steps = np.abs(np.concatenate([np.diff(log) for log in logs]))
    assert np.median(steps) < 0.15  # mostly it moves little
    assert 0.01 < (steps > 0.5).mean() < 0.1  # and sometimes falls or comes back at once
    every = np.concatenate(logs)
    assert min((every < 0).mean(), ((every > 0) & (every < 1)).mean(), (every > 1).mean()) > 0.1
    assert np.mean([np.corrcoef(log[:-10], log[10:])[0, 1] for log in logs]) > 0.2  # regimes outlast 10 s


@pytest.mark.parametrize(
    "given", [{"seconds": 1.5}, {"seconds": math.inf}, {"step": 0}, {"low": 0}, {"low": 5, "high": 5}, {"seed": -1},
              {"seconds": math.nan}, {"high": math.inf}, {"seed": 0.5}, {"low": -1}],
)  # fmt: skip
def test_generated_bandwidths_of_bad_arguments_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match=r"\AExpected a? ?(step|bandwidths|seed) .*, got .*\.\Z"):
        generated(**given)


LINK, LINK_MS = Link(2500.0, 0.75), 12.0


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
