"""Bytes, milliseconds and microjoules between device and server, by hand: equation 11 of the Exit Predictor paper."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from costs.energy import Chip, network_energy
from costs.latency import CoInference, measured_times, network_latency
from costs.network import NetworkCosts, network_costs
from costs.transmission import sent_bytes
from inference.budget import Budget
from inference.executor import Executor
from inference.policies import FixedExit, Never, Policy
from inference.predicted import Predicted
from inference.replay import curve, kinds, oracle, replay, with_parts
from inference.thresholds import Confidence
from inference.trace import Trace, read_trace, record, write_trace
from networks.backbones.resnet import cifar_resnet
from networks.backbones.vgg import vgg
from networks.early_exit_network import EarlyExitNetwork, device_part, with_exits
from networks.exit_predictor import separable
from networks.feature_codec import bottlenet
from networks.gates import gating
from networks.heads import exit_predictor, light
from tests.conftest import composed, stirred

# VGG16-BN, CIFAR-100, ptflops: table V; the backbone's total; the predictor, table II
L1, E1, L2, E2, TOTAL, PREDICTOR = 1_966_080, 17_432_676, 56_983_552, 14_602_340, 333_451_364, 398_224
# 2x2 convolution 128 -> 32 on 8x8, BatchNorm 2 and ReLU 1 an element; the way back with 128 channels of 16x16
CODE, FEATURE = 32 * 8 * 8, 128 * 16 * 16
CONV = 2 * 2 * 128 * 32 * 8 * 8
ENCODER, DECODER = CONV + 3 * CODE, CONV + 3 * FEATURE
REST = TOTAL - L1 - L2  # of the backbone, its last classifier included
SPEED = 3.62e6  # operations a millisecond: Raspberry Pi 3


@cache
def vgg16(codec: bool = True) -> EarlyExitNetwork:
    with torch.device("meta"):
        chain = vgg(16, 100)
        coding = bottlenet(chain, [1, 3]) if codec else None
        network = with_exits(chain, [1, 3], exit_predictor, separable, codec=coding)
    return network.to_empty(device="cpu")  # 38 million weights whose values nobody asks for


@cache
def counts(codec: bool, convention: str = "ptflops") -> NetworkCosts:
    return network_costs(vgg16(codec), convention)


def latency(codec: bool = True, **setting: Any) -> NetworkCosts:
    return CoInference(**setting).latency(counts(codec, setting.get("convention", "ptflops")), sent_bytes(vgg16(codec)))


def test_what_is_not_said_is_the_papers() -> None:
    said = composed().co_inference
    assert {key: value for key, value in said.items() if key != "_target_"} == vars(CoInference())
    setting = CoInference()
    assert (setting.device_gflops, setting.convention, setting.server_gflops) == (3.62, "ptflops", None)
    assert (setting.bound_ms, setting.delay_ms, setting.measured) == (30, 0, False)


@pytest.mark.parametrize("mbps", [0.1, 1.0, 40.0, math.inf])
def test_every_exits_latency_is_equation_11(mbps: float) -> None:
    first, second = (L1 + E1) / SPEED, (L1 + E1 + L2 + E2) / SPEED
    sending = {0.1: 163.84, 1.0: 16.384, 40.0: 0.4096, math.inf: 0.0}[mbps]  # 2,048 bytes
    ms = latency(bandwidth_mbps=mbps)
    assert ms.convention == "latency_ms"
    assert ms.leaving == pytest.approx((first, second, second + ENCODER / SPEED + sending), rel=1e-12)
    assert ms.alone == pytest.approx((first, (L1 + L2 + E2) / SPEED, (L1 + L2 + ENCODER) / SPEED + sending), rel=1e-12)
    assert ms.predictor == pytest.approx(PREDICTOR / SPEED, rel=1e-12)
    assert (ms.link, ms.decoder) == (pytest.approx(sending), 0)
    assert ms.backbone == pytest.approx((L1 + L2 + ENCODER) / SPEED + sending, rel=1e-12)
    assert ms.server == pytest.approx(sending, abs=1e-9)


def test_numbers_of_the_first_exits_in_milliseconds() -> None:
    assert latency().leaving == pytest.approx((5.35877, 25.13388, 25.42524 + 16.384), abs=1e-5)


def test_a_server_takes_its_time_and_a_link_its_delay() -> None:
    second, device = (L1 + E1 + L2 + E2) / SPEED, ENCODER / SPEED
    ms = latency(server_gflops=100, delay_ms=7.5)
    server = (DECODER + REST) / 1e8  # operations a millisecond
    assert ms.leaving[:2] == pytest.approx(latency().leaving[:2], rel=1e-12)
    assert ms.leaving[2] == pytest.approx(second + device + 16.384 + 7.5 + server, rel=1e-12)
    assert ms.decoder == pytest.approx(DECODER / 1e8, rel=1e-12)
    assert ms.server == pytest.approx(16.384 + 7.5 + server, rel=1e-12)
    faster = latency(server_gflops=100, device_gflops=7.24, bandwidth_mbps=math.inf, delay_ms=7.5)
    assert faster.leaving[0] == pytest.approx((L1 + E1) / SPEED / 2, rel=1e-12)
    assert faster.leaving[2] == pytest.approx((second + device) / 2 + 7.5 + server, rel=1e-12)
    assert CoInference(delay_ms=2).link(1000).ms(4) == pytest.approx(2 + 2)


def test_operations_may_be_macs() -> None:
    ms, macs = latency(convention="macs"), counts(True, "macs")
    # table V without BatchNorm and ReLU: 3 elements each
    l1 = L1 - 3 * 64 * 32 * 32
    assert ms.until_tap[1] == pytest.approx(l1 / SPEED, rel=1e-12)
    assert macs.encoder == macs.decoder == CONV
    assert ms.encoder == pytest.approx(CONV / SPEED, rel=1e-12)
    with pytest.raises(ValueError, match=r"\AExpected operations in ptflops, got macs\.\Z"):
        CoInference().latency(macs, sent_bytes(vgg16()))


@pytest.mark.parametrize("convention", ["macs", "ptflops"])
def test_encoder_and_decoder_are_counted_on_their_sides(convention: str) -> None:
    costs, plain = counts(True, convention), counts(False, convention)
    norms = 3 if convention == "ptflops" else 0
    assert (costs.encoder, costs.decoder) == (CONV + norms * CODE, CONV + norms * FEATURE)
    assert (plain.encoder, plain.decoder, plain.cut, costs.cut) == (0, 0, None, 3)
    assert costs.leaving[:2] == plain.leaving[:2]
    assert costs.leaving[2] == plain.leaving[2] + costs.encoder + costs.decoder
    assert costs.to_cut == costs.encoder
    assert costs.server == plain.server + costs.decoder
    assert costs.plain == plain.plain == plain.backbone
    assert costs.plain == TOTAL or convention == "macs"
    assert costs.backbone == plain.backbone + costs.encoder + costs.decoder


@pytest.mark.parametrize("taps", [[], [1], [1, 2]])
def test_between_the_last_exit_and_the_cut_the_device_goes_on(taps: list[int]) -> None:
    chain = cifar_resnet(8, 5, (3, 16, 16))  # 16x16x16, 32x8x8, 64x4x4; macs of the blocks by hand
    network = with_exits(chain, taps, light, codec=bottlenet(chain, taps, cut=3, bits=6))
    stem, blocks = 27 * 16 * 256, (2 * 144 * 16 * 256, (144 + 288) * 32 * 64, (288 + 576) * 64 * 16)
    heads = sum(5 * (16, 32)[tap - 1] for tap in taps)
    coding = 4 * 64 * 16 * 2 * 2
    costs, sent = network_costs(network), sent_bytes(network)
    on_device = stem + sum(blocks) + coding
    assert costs.leaving[-1] == on_device + heads + coding + 64 * 5
    assert costs.server == coding + 64 * 5
    assert costs.to_cut == sum(blocks[len(taps) :]) + coding + (0 if taps else stem)
    assert network_costs(device_part(network)).leaving[-1] == on_device + heads
    assert sent.leaving == (*[0] * len(taps), 16 * 2 * 2 * 6 // 8)
    ms = CoInference(convention="macs", server_gflops=0.5).latency(costs, sent)
    times = (on_device + heads) / SPEED + 48 * 8 / 1000 + (coding + 64 * 5) / 5e5
    assert ms.leaving[-1] == pytest.approx(times, rel=1e-12)
    assert ms.to_cut == pytest.approx(costs.to_cut / SPEED, rel=1e-12)


def test_without_a_cut_nothing_is_sent_and_all_is_the_devices() -> None:
    network = with_exits(cifar_resnet(8, 5, (3, 16, 16)), [], light)
    costs, sent = network_costs(network, "ptflops"), sent_bytes(network)
    assert (sent.leaving, sent.link, sent.backbone, sent.device_ends) == ((0,), 0, 0, None)
    ms = network_latency(network, CoInference(bandwidth_mbps=1e-3, delay_ms=99, server_gflops=1e-3))
    assert ms.leaving == pytest.approx((costs.backbone / SPEED,), rel=1e-12)
    assert (ms.link, ms.server) == (0, 0)


@pytest.mark.parametrize(
    ("gates", "more"),
    [
        ({}, 0),
        ({"layer": "rnn"}, 80),  # output and cell of 10 numbers, 4 bytes each
        ({"layer": "rnn", "hidden": 7}, 56),
        ({"channel": "cnn"}, 0),
        ({"channel": "rnn"}, 80),
        ({"layer": "rnn", "channel": "cnn"}, 80),
        ({"layer": "rnn", "channel": "rnn"}, 160),
    ],
)
def test_without_a_codec_the_feature_is_sent_as_it_is_and_what_gates_remember(gates: dict, more: int) -> None:
    chain = cifar_resnet(8, 5, (3, 16, 16))
    network = with_exits(chain, [1, 2], light, gating=gating(chain, **gates))
    assert sent_bytes(network).leaving == (0, 0, 4 * 32 * 8 * 8 + more)
    assert network_latency(network, CoInference(bandwidth_mbps=2)).link == pytest.approx((8192 + more) * 8 / 2000)


def test_vgg16_sends_the_feature_64_times_as_large_without_its_codec() -> None:
    assert [sent_bytes(vgg16(codec)).leaving for codec in (True, False)] == [(0, 0, 2048), (0, 0, 131_072)]
    second = (L1 + E1 + L2 + E2) / SPEED
    assert latency(codec=False).leaving[2] == pytest.approx(second + 1048.576, rel=1e-12)


CHIP = Chip("chip", 4.6, 0.9, 0.1, 0.1, 2.5)


def test_energies_of_encoder_and_decoder_by_hand() -> None:
    chain = cifar_resnet(8, 5, (3, 16, 16))
    network = with_exits(chain, [2], light, codec=bottlenet(chain, [2]))  # 32x8x8 to 8x4x4
    energy, plain = network_energy(network, CHIP), network_energy(with_exits(chain, [2], light), CHIP)
    macs, weights, code, feature = 4 * 32 * 8 * 4 * 4, 4 * 32 * 8, 8 * 4 * 4, 32 * 8 * 8
    uj = (4.6 * macs + 80 * (weights + feature + code)) / 1e6  # a transposed convolution turns the two around
    assert energy.encoder == pytest.approx(uj, rel=1e-12)
    assert energy.decoder == pytest.approx(uj, rel=1e-12)
    assert (energy.link, energy.cut) == (0, 2)
    assert energy.leaving[0] == plain.leaving[0]
    assert energy.leaving[1] == pytest.approx(plain.leaving[1] + 2 * uj, rel=1e-12)
    assert energy.server == pytest.approx(plain.server + uj, rel=1e-12)
    # a decoder whose map is cut to size: 5x7 from 3x4 codes
    chain = cifar_resnet(8, 5, (3, 9, 13))
    codec = with_exits(chain, [2], light, codec=bottlenet(chain, [2]))
    assert codec.codec is not None
    assert codec.codec.shape == (32, 5, 7)
    energy, macs = network_energy(codec, CHIP), 4 * 32 * 8 * 3 * 4
    assert network_costs(codec).encoder == network_costs(codec).decoder == macs
    uj = (4.6 * macs + 80 * (weights + 32 * 6 * 8 + 8 * 3 * 4)) / 1e6
    assert (energy.encoder, energy.decoder) == pytest.approx((uj, uj), rel=1e-12)


def guided(bits: int = 8) -> tuple[EarlyExitNetwork, Tensor]:
    """A network with predictor and codec whose exits are of many minds about 40 images."""
    torch.manual_seed(2)
    chain = cifar_resnet(8, 5, (3, 16, 16))
    network = with_exits(chain, [1, 2], light, separable, codec=bottlenet(chain, [1, 2], bits=bits))
    stirred(network)
    images = torch.randn(40, 3, 16, 16) + 3 * torch.randn(40, 3, 1, 1)
    assert network.predictor is not None
    with torch.no_grad():
        for z, head in zip(network(images), (*network.heads, chain.head), strict=True):
            head[-1].weight *= 2 / z.std()
            head[-1].bias.copy_((head[-1].bias - z.mean(0)) * 2 / z.std())
        layer, z = network.predictor.layers[-1], network.predictor(images)
        layer.weight.mul_(2 / z.std(0)[:, None])
        layer.bias.copy_((layer.bias - z.mean(0)) * 2 / z.std(0))
    return network, images


def priced(network: EarlyExitNetwork, trace: Trace, setting: CoInference) -> Trace:
    return trace.priced(sent_bytes(network), network_latency(network, setting))


@cache
def world() -> tuple[EarlyExitNetwork, Tensor, Trace]:
    network, images = guided()
    return network, images, record(network, [(images, torch.arange(40) % 5)])


def between(scores: Tensor) -> float:
    """A threshold that about a half passes, apart from all scores."""
    ordered = scores.sort().values.tolist()
    gaps = [(b - a, (a + b) / 2) for a, b in pairwise(ordered[10:30])]
    return max(gaps)[1]


@torch.no_grad()
def algorithm_1(network: EarlyExitNetwork, part: NetworkCosts, x: Tensor, lambdas, gammas) -> tuple:
    """One image in the paper's steps: label, exit, and milliseconds at 3.62 GFLOPS without the link."""
    assert network.predictor is not None
    assert network.codec is not None
    s = 1 / (1 + torch.exp(-network.predictor(x[None])[0]))
    done, f = part.predictor + part.stem, network.chain.stem(x[None])
    for i, block in enumerate(network.chain.blocks):
        f = block(f)
        done += part.blocks[i]
        if i + 1 in network.taps:
            n = network.taps.index(i + 1)
            if s[n] >= gammas[n]:
                done += part.heads[n]
                p = network.heads[n](f)[0].softmax(0)
                if p.max() >= lambdas[n]:
                    return int(p.argmax()), n + 1, done / SPEED
        if i + 1 == network.cut:
            break
    z = network.on_server(network.codec.decode(network.codec.encode(f)))
    return int(z.argmax()), 3, (done + part.encoder) / SPEED


def test_algorithm_1_is_the_same_at_every_bandwidth_and_pays_equation_11() -> None:
    network, images, trace = world()
    lambdas = [between(z.softmax(-1).amax(-1)) for z in trace.logits[:-1]]
    assert trace.predictions is not None
    gammas = [between(scores) for scores in trace.predictions]
    part = network_costs(network, "ptflops")
    walked = [algorithm_1(network, part, x, lambdas, gammas) for x in images]
    labels, exits, device = map(list, zip(*walked, strict=True))
    assert {1, 2, 3} == set(exits)
    policy = Predicted(lambdas, gammas)
    seen = Executor(network, policy)(images)
    assert (seen.label.tolist(), seen.exit.tolist()) == (labels, exits)
    assert network.codec is not None
    payload = 8 * 4 * 4
    for mbps, delay in ((0.1, 0.0), (1.0, 3.0), (math.inf, 0.0)):
        at = priced(network, trace, CoInference(bandwidth_mbps=mbps, delay_ms=delay))
        outcome = replay(policy, at)
        assert all(map(torch.equal, outcome.prediction[:1], seen[:1]))
        assert all(map(torch.equal, outcome.prediction[2:], seen[2:]))
        link = delay + 8 * payload / (1000 * mbps)
        expected = [ms + link * (exit == 3) for ms, exit in zip(device, exits, strict=True)]
        assert outcome.cost(at, "latency_ms").tolist() == pytest.approx(expected, rel=1e-9)
        assert outcome.cost(at, "device_latency_ms").tolist() == pytest.approx(device, rel=1e-9)
        if mbps == math.inf:
            torch.testing.assert_close(outcome.cost(at, "latency_ms"), outcome.cost(at, "device_latency_ms"))
        assert outcome.cost(at, "sent_bytes").tolist() == [payload * (exit == 3) for exit in exits]
        assert outcome.cost(at, "device_sent_bytes").tolist() == [0] * 40
        point = curve(Predicted(), torch.tensor([[*lambdas, *gammas]], dtype=torch.float64), at)
        assert point.costs["latency_ms"].item() == pytest.approx(sum(expected) / 40, rel=1e-6)
        assert point.costs["device_latency_ms"].item() == pytest.approx(sum(device) / 40, rel=1e-6)
        assert point.costs["sent_bytes"].item() == payload * exits.count(3) / 40


@pytest.mark.parametrize("server", [None, 2.0])
def test_an_average_latency_is_the_shares_of_each_exit_times_its_own(server: float | None) -> None:
    network, _, trace = world()
    at = priced(network, trace, CoInference(bandwidth_mbps=0.4, delay_ms=1.5, server_gflops=server))
    part = network_costs(network, "ptflops")
    l1, l2 = part.stem + part.blocks[0], part.blocks[1]
    ends = [l1 + part.heads[0], l1 + part.heads[0] + l2 + part.heads[1]]
    behind = 0 if server is None else (part.decoder + part.blocks[2] + part.heads[2]) / 2e6
    device = [*(end / SPEED for end in ends), (ends[1] + part.encoder) / SPEED]
    ms = [*device[:2], device[2] + 1.5 + 8 * 128 / 400 + behind]
    confidences = [z.softmax(-1).amax(-1) for z in trace.logits[:-1]]
    rows = [[between(c) for c in confidences], [math.inf, math.inf], [0.0, 0.0], [math.inf, between(confidences[1])]]
    points = curve(Confidence(), torch.tensor(rows, dtype=torch.float64), at)
    for i, row in enumerate(rows):
        first = confidences[0] >= row[0]
        second = ~first & (confidences[1] >= row[1])
        shares = [part.sum().item() / 40 for part in (first, second, ~first & ~second)]
        for costs, kind in ((ms, "latency_ms"), (device, "device_latency_ms")):
            expected = sum(share * cost for share, cost in zip(shares, costs, strict=True))
            assert points.costs[kind][i].item() == pytest.approx(expected, rel=1e-9)
            assert replay(Confidence(row), at).cost(at, kind).mean().item() == pytest.approx(expected, rel=1e-9)
    alone: list[tuple[Policy, float]] = [(Never(), ms[2] - (part.heads[0] + part.heads[1]) / SPEED)]
    alone += [(FixedExit(1), ms[0]), (FixedExit(2), ms[1] - part.heads[0] / SPEED), (FixedExit(3), alone[0][1])]
    for policy, expected in alone:
        assert replay(policy, at).cost(at, "latency_ms").tolist() == pytest.approx([expected] * 40, rel=1e-9)
    foreseen = oracle(Confidence(rows[0]), at)
    each = [dict(enumerate((expected for _, expected in alone[1:]), start=1))[int(k)] for k in foreseen.prediction.exit]
    assert foreseen.cost(at, "latency_ms").tolist() == pytest.approx(each, rel=1e-9)


def test_a_budget_pays_latency_too() -> None:
    network, _, trace = world()
    at = priced(network, trace, CoInference())
    macs, ms = trace.costs["macs"], at.costs["latency_ms"]
    nobody_crosses = replay(Budget(macs.leaving[1], Confidence(math.inf)), at)
    assert nobody_crosses.cost(at, "sent_bytes").max() == 0
    assert nobody_crosses.cost(at, "latency_ms").tolist() == pytest.approx([ms.leaving[1]] * 40, rel=1e-9)


def test_a_trace_keeps_the_prices_of_codec_and_link(tmp_path) -> None:
    network, _, trace = world()
    at = priced(network, trace, CoInference(server_gflops=2.0, delay_ms=1.0))
    write_trace(tmp_path / "trace", at)
    back = read_trace(tmp_path / "trace")
    assert back.costs == at.costs
    assert (back.costs["latency_ms"].cut, back.costs["sent_bytes"].link) == (2, 128)
    policy = Confidence(0.5)
    for kind in kinds(at.costs):
        assert torch.equal(replay(policy, back).cost(back, kind), replay(policy, at).cost(at, kind))


def test_of_bytes_and_milliseconds_no_part_is_called_the_servers() -> None:
    names = ("macs", "energy_uj", "sent_bytes", "latency_ms")
    values = {kind: float(i) for i, kind in enumerate(kinds(names), start=1)}
    parts = with_parts(values)
    assert list(parts) == ["macs", "device_macs", "server_macs", "energy_uj", "device_energy_uj", "server_energy_uj",
                           "sent_bytes", "latency_ms", "device_latency_ms"]  # fmt: skip
    assert parts["server_macs"] == 1 - 5
    assert parts["device_latency_ms"] == 8


def small(codec: bool = True) -> EarlyExitNetwork:
    chain = cifar_resnet(8, 5, (3, 16, 16))
    return with_exits(chain, [1], light, separable, codec=bottlenet(chain, [1], cut=2) if codec else None)


@pytest.mark.parametrize("server", [None, 3.0])
def test_measured_times_are_this_machines_part_by_part(server: float | None, monkeypatch) -> None:
    monkeypatch.setattr("costs.latency.SECONDS", 1e-3)
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ms = network_latency(network, CoInference(measured=True, bandwidth_mbps=2.0, delay_ms=1.0, server_gflops=server))
    part = network_costs(network, "ptflops")
    assert (len(ms.blocks), len(ms.heads), ms.convention, ms.cut) == (3, 2, "latency_ms", 2)
    for measured in (ms.stem, *ms.blocks[:2], ms.heads[0], ms.predictor, ms.encoder):
        assert 1e-4 < measured < 1e3
    assert ms.link == pytest.approx(1.0 + 8 * 128 / 2000)
    rate = 0 if server is None else 1 / 3e6  # the server's are counted all the same
    behind = (ms.blocks[2], ms.heads[1], ms.decoder)
    assert behind == pytest.approx((rate * part.blocks[2], rate * part.heads[1], rate * part.decoder))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert torch.isfinite(torch.tensor(ms.leaving)).all()
    assert list(ms.leaving) == sorted(ms.leaving)


def test_a_slower_part_is_measured_slower(monkeypatch) -> None:
    monkeypatch.setattr("costs.latency.SECONDS", 1e-3)

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(300):
                x = x + 0
            return x

    network = small(codec=False)
    network.heads[0] = nn.Sequential(Slow(), network.heads[0])
    times = measured_times(network)
    assert times.heads[0] > 3 * times.heads[1] > 0  # as it is, both are one pool and one FC layer
    assert (times.encoder, times.decoder, times.link, times.cut) == (0, 0, 0, None)
    assert min(times.blocks) > 0


def test_without_a_cut_all_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("costs.latency.SECONDS", 1e-4)
    network = with_exits(cifar_resnet(8, 5, (3, 8, 8)), [], light)
    ms = network_latency(network, CoInference(measured=True))
    assert min(ms.stem, *ms.blocks, ms.heads[0]) > 0
    assert ms.predictor == ms.link == 0


def test_gates_are_not_measured() -> None:
    chain = cifar_resnet(8, 5, (3, 16, 16))
    network = with_exits(chain, [1], light, gating=gating(chain, "rnn"))
    with pytest.raises(ValueError, match=r"\Aco_inference\.measured=true is for networks without gates, .*\Z"):
        network_latency(network, CoInference(measured=True))


def test_under_gates_latency_and_bytes_follow_what_ran() -> None:
    torch.manual_seed(0)
    chain = cifar_resnet(14, 5, (3, 16, 16))
    network = with_exits(chain, [3], light, gating=gating(chain, "rnn"))
    stirred(network)
    images = torch.randn(12, 3, 16, 16) + 3 * torch.randn(12, 3, 1, 1)
    assert network.gating is not None
    with torch.no_grad():  # gates of many minds
        scores = torch.cat([score.flatten() for score in network.gate_scores(images)])
        network.gating.layer.decides["1"].bias -= scores.median()
    trace = record(network, [(images, torch.arange(12) % 5)])
    sent = sent_bytes(network)
    trace = trace.priced(sent, network_latency(network, CoInference(bandwidth_mbps=0.5)))
    outcome = replay(Never(), trace)
    on_device = outcome.cost(trace, "device_ptflops").double()
    assert len(on_device.unique()) > 2  # or the gates are of one mind
    link = 8 * (4 * 32 * 8 * 8 + 80) / 500
    assert outcome.cost(trace, "sent_bytes").tolist() == [8272] * 12
    torch.testing.assert_close(outcome.cost(trace, "latency_ms"), on_device / SPEED + link)
    torch.testing.assert_close(outcome.cost(trace, "device_latency_ms"), on_device / SPEED)


BAD: dict[str, list[Any]] = {
    "device_gflops": [0, -3.62, math.nan, "3.62", True, None, [3.62]],
    "server_gflops": [0, -1.0, math.nan, "10", False],
    "bandwidth_mbps": [0, -1, math.nan, "1", True, None, 0.0],
    "bound_ms": [0, -30, math.nan, "30", True, None],
    "delay_ms": [-1, math.nan, math.inf, "0", True, None],
    "convention": ["flops", "energy_uj", None, 1],
    "measured": ["yes", 1, 0, None],
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_is_refused_in_one_line_that_names_it(key: str) -> None:
    for value in BAD[key]:
        with pytest.raises(ValueError, match=rf"\AExpected co_inference\.{key} to be [^\n]*, got [^\n]*\.\Z") as caught:
            CoInference(**{key: value})
        assert str(value) in str(caught.value)
        with pytest.raises(ValueError, match=key):
            replace(CoInference(), **{key: value})


def test_a_server_without_time_and_a_link_without_limit_are_no_bad_values() -> None:
    assert (
        CoInference(server_gflops=None, bandwidth_mbps=math.inf, bound_ms=math.inf, delay_ms=0).link(99).ms(math.inf)
        == 0
    )
