"""Bandwidths over time: what arrives when, files, and what is generated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.bandwidth import BandwidthTrace, generated, read_bandwidths, write_bandwidths
from inference.latency_bound import Link

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
