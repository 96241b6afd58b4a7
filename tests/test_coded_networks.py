"""Networks with a feature codec: what it leaves as it is, and what crosses the cut."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference.executor import Executor
from inference.policies import FixedExit, Never, Policy
from inference.replay import curve, replay
from inference.thresholds import Confidence
from inference.trace import Trace, record
from inference.travel import Prediction
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork, device_part, with_exits
from networks.feature_codec import bottlenet
from networks.heads import light
from tests.conftest import stirred
from tests.tiny import tiny

PLACES = [([1], 1), ([1, 2], 2), ([1], 3), ([1, 2], 3), ([], 1), ([], 2), ([], 3)]


def coded(taps: list[int], cut: int, bits: int = 4, seed: int = 0, chain: Chain | None = None) -> EarlyExitNetwork:
    """Exits of many minds, also behind the codec."""
    torch.manual_seed(seed)
    chain = tiny(5, (3, 8, 8)) if chain is None else chain
    network = with_exits(chain, taps, light, codec=bottlenet(chain, taps, cut=cut, bits=bits))
    stirred(network)
    images = torch.randn(64, *chain.input_shape) + 3 * torch.randn(64, 3, 1, 1)
    with torch.no_grad():
        feature = network.on_device(images)[1]
        network.codec.limit.copy_(network.codec.encoder(feature).max() / 2)
        for z, head in zip(network(images), (*network.heads, chain.head), strict=True):
            head[-1].weight *= 2 / z.std()
            head[-1].bias.copy_((head[-1].bias - z.mean(0)) * 2 / z.std())
    return network


@pytest.mark.parametrize(("taps", "cut"), PLACES)
@torch.no_grad()
def test_the_device_and_its_exits_are_as_they_were(taps: list[int], cut: int) -> None:
    network = coded(taps, cut, bits=1)
    plain = EarlyExitNetwork(network.chain, taps, list(network.heads))
    x = torch.randn(6, 3, 8, 8)
    assert (network.cut, plain.cut) == (cut, taps[-1] if taps else None)
    with_codec, without = network(x), plain(x)
    assert all(map(torch.equal, with_codec[:-1], without[:-1]))
    assert not torch.allclose(with_codec[-1], without[-1], atol=0.1)
    assert all(map(torch.equal, network.ungated(x, coded=False), without))
    early, feature = network.on_device(x)
    assert all(map(torch.equal, early, without[:-1]))
    assert torch.equal(feature, plain.chain.run(x, stop=cut))
    device = device_part(network)
    assert all(map(torch.equal, device(x)[:-1], without[:-1]))
    assert not device(x)[-1].any()


@pytest.mark.parametrize(("taps", "cut"), PLACES)
@torch.no_grad()
def test_through_the_payload_is_through_the_network(taps: list[int], cut: int) -> None:
    network = coded(taps, cut)
    images = torch.randn(40, 3, 8, 8) + 3 * torch.randn(40, 3, 1, 1)
    logits = network(images)
    early, feature = network.on_device(images)
    sent = network.codec.pack(network.codec.encode(feature))
    assert sent.shape == (40, network.codec.payload_bytes)
    answered = network.on_server(network.codec.decode(network.codec.unpack(sent)))
    assert torch.equal(answered, logits[-1])
    policy: Policy = Confidence(0.6) if taps else Never()
    seen, on_device = (Executor(part, policy)(images) for part in (network, device_part(network)))
    assert torch.equal(seen.exit, on_device.exit)
    assert torch.equal(seen.device_macs, on_device.macs)
    gone = torch.stack([z.softmax(1).amax(1) >= 0.6 for z in early] + [torch.ones(40, dtype=torch.bool)])
    exit = gone.int().argmax(0)
    assert exit.bincount(minlength=len(logits)).min() > 0  # some at each
    expected = torch.stack([z.argmax(1) for z in (*early, answered)])[exit, torch.arange(40)]
    assert torch.equal(seen.exit, exit + 1)
    assert torch.equal(seen.label, expected)
    assert torch.equal(on_device.label[exit < len(taps)], expected[exit < len(taps)])


class Prices(NamedTuple):
    """MACs of ``tiny(5, (3, 8, 8))`` by hand: convolutions in · out · 9 · pixels, heads in · 5, codec 4 · in · out."""

    blocks = (27 * 8 * 64, 72 * 12 * 16, 108 * 12 * 16)
    heads = {1: 8 * 5, 2: 12 * 5, 3: 12 * 5}
    coding = {1: 4 * 8 * 2 * 4, 2: 4 * 12 * 3 * 4, 3: 4 * 12 * 3 * 4}  # on each side


def walked(network: EarlyExitNetwork, policy: Policy, x: Tensor) -> tuple[int, int, int, int]:
    """One image: label, exit, MACs, MACs on the device; what crosses the cut does so in bytes."""
    codec, macs, device = network.codec, 0, 0
    x = x[None]
    for i, block in enumerate(network.chain.blocks, start=1):
        x, macs = block(x), macs + Prices.blocks[i - 1]
        if i in network.taps:
            k = network.taps.index(i) + 1
            if isinstance(policy, Confidence) or policy == FixedExit(k):
                z, macs = network.heads[k - 1](x)[0], macs + Prices.heads[i]
                if policy == FixedExit(k) or z.softmax(0).max() >= policy.thresholds[k - 1]:
                    return int(z.argmax()), k, macs, macs
        if i == codec.cut:
            device = macs + Prices.coding[i]
            x, macs = codec.decode(codec.unpack(codec.pack(codec.encode(x)))), macs + 2 * Prices.coding[i]
    z = network.chain.head(x)[0]
    return int(z.argmax()), len(network.taps) + 1, macs + Prices.heads[3], device


@cache
def seen_by(place: int, seed: int) -> tuple[EarlyExitNetwork, Tensor, Trace]:
    """A network, 17 images and their trace."""
    taps, cut = PLACES[place]
    network = coded(taps, cut, bits=1 + 2 * seed, seed=seed)
    images = torch.randn(17, 3, 8, 8) + 3 * torch.randn(17, 3, 1, 1)
    return network, images, record(network, zip(images.split(5), torch.arange(17).remainder(5).split(5), strict=True))


@settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(place=st.integers(0, 6), seed=st.integers(0, 1), count=st.integers(1, 17), data=st.data())
def test_executor_replay_and_a_plain_loop_agree(place: int, seed: int, count: int, data: st.DataObject) -> None:
    (taps, _), (network, images, trace) = PLACES[place], seen_by(place, seed)
    images, trace = images[:count], trace.rows(torch.arange(count))
    policy: Policy = Never()
    if taps:
        near = trace.logits[:-1].softmax(-1).amax(-1).sort(1).values.tolist()
        middles = [[(a + b) / 2 for a, b in pairwise(row) if b - a > 2e-5] for row in near]
        thresholds = [data.draw(st.sampled_from([0.0, *row, math.inf])) for row in middles]
        others = [Never(), *map(FixedExit, range(1, len(taps) + 2))]
        policy = data.draw(st.sampled_from([*[Confidence(thresholds)] * 4, *others]))
    with torch.inference_mode():
        expected = [walked(network, policy, x) for x in images]
    executor, outcome = Executor(network, policy, costs=trace.costs["macs"]), replay(policy, trace)
    alone = Prediction(*map(torch.cat, zip(*(executor(x[None]) for x in images), strict=True)))
    for seen in (executor(images), outcome.prediction, alone):
        columns = (seen.label, seen.exit, seen.macs, seen.device_macs)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    for kind, column in (("macs", 2), ("device_macs", 3)):
        assert outcome.cost(trace, kind).tolist() == [row[column] for row in expected]
        if isinstance(policy, Confidence):
            point = curve(Confidence(), torch.tensor([thresholds], dtype=torch.float64), trace)
            assert point.costs[kind] == sum(row[column] for row in expected) / count


@pytest.mark.parametrize(("taps", "cut"), PLACES)
def test_answers_that_get_better_pay_the_encoder_on_the_device(taps: list[int], cut: int) -> None:
    network, images = coded(taps, cut), torch.randn(3, 3, 8, 8)
    *earlier, last = Executor(network, Never()).anytime(images)
    heads = sum(Prices.heads[tap] for tap in taps)
    assert last.device_macs.tolist() == [sum(Prices.blocks[:cut]) + heads + Prices.coding[cut]] * 3
    assert last.macs.tolist() == [sum(Prices.blocks) + heads + 2 * Prices.coding[cut] + Prices.heads[3]] * 3
    assert torch.equal(last.label, network(images)[-1].argmax(1))
    for k, seen in enumerate(earlier, start=1):
        spent = sum(Prices.blocks[: taps[k - 1]]) + sum(Prices.heads[tap] for tap in taps[:k])
        assert seen.device_macs.tolist() == seen.macs.tolist() == [spent] * 3
