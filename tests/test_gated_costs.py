"""What gates cost and save: the paper's numbers, layers really cut smaller and counted, sums by hand, derivatives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from costs.counting import CONVENTIONS, count
from costs.energy import Chip, layer_sizes, network_energy
from costs.gates import Unfolded
from costs.hierarchy import Hierarchy
from costs.network import NetworkCosts, network_costs
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exits import StageFractions
from networks.gate_designs import RecurrentGate
from networks.gates import Decisions, gating
from networks.heads import light
from networks.quantization import QuanConv
from tests.conftest import composed
from tests.test_gates import CHAINS, DESIGNS, SIDE, blocks_of

CHIP = Chip("chip", 4.6, 0.9, 0.1, 0.1, 2.5)
LEVELS = Hierarchy("levels", 4.6, 4.6, 27.6, 920.0, 4, 8, 8)
# one network is counted in all of these
PRICES = (*CONVENTIONS, "chip", "levels")


def counted(network: EarlyExitNetwork, price: str) -> NetworkCosts:
    if price in ("macs", "ptflops"):
        return network_costs(network, price)
    return network_energy(network, CHIP if price == "chip" else LEVELS)


def priced(module: nn.Module, x: Tensor, price: str) -> float:
    """The same of a module, layer by layer."""
    if price in ("macs", "ptflops"):
        return count(module, x, convention=price)[""]
    chip = CHIP if price == "chip" else LEVELS
    return sum(chip.layer(*size) for size in layer_sizes(module, x).values()) / 1e6


def gated(depth: int, layer: str | None = "rnn", channel: str | None = "cnn") -> EarlyExitNetwork:
    chain = cifar_resnet(depth, 10)
    return with_exits(chain, (), light, gating=gating(chain, layer, channel))


def test_a_layer_gate_is_970_1130_or_1450_macs() -> None:
    costs = network_costs(gated(14))
    assert [gate.layer for gate in costs.gates] == [970, 970, 970, 1130, 1130, 1450]  # 16, 16; 16, 32; 32, 64 come in
    assert [10 * c + 4 * 10 * (10 + 10) + 10 for c in (16, 32, 64)] == [970, 1130, 1450]
    assert [gate.channel for gate in network_costs(gated(14, "rnn", None)).gates] == [0] * 6
    assert [gate.layer for gate in network_costs(gated(14, None, "cnn")).gates] == [0] * 6
    of_channels = [gate.channel for gate in network_costs(gated(14, None, "rnn")).gates]
    assert of_channels == [10 * (c + 80 + k) for c, k in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]


def test_a_convolutional_gate_is_an_eighth_of_its_block() -> None:
    costs = network_costs(gated(14))
    for i, width, side in ((0, 16, 32), (1, 16, 32), (3, 32, 16), (5, 64, 8)):
        gate, block = costs.gates[i], costs.blocks[i]
        assert block == gate.layers == 2 * 9 * width**2 * side**2
        assert gate.channel == block / 8 + width**2
        assert gate.channel == pytest.approx(0.125 * block, rel=0.01)


@pytest.mark.parametrize(("depth", "mflops"), [(14, 52.8), (20, 81.1), (26, 109.4), (38, 166.0), (74, 335.9)])
def test_resnets_without_gates(depth: int, mflops: float) -> None:
    chain = cifar_resnet(depth, 10)
    taps = StageFractions([0.25, 0.75])(chain.stage_lengths, [])
    network = with_exits(chain, taps, light, gating=gating(chain, "rnn"))
    costs = network_costs(network)
    assert 2e-6 * costs.plain == pytest.approx(mflops, abs=0.05)
    assert costs.plain == costs.ungated.backbone < costs.backbone
    if depth == 74:  # and up to its branches
        until = [2e-6 * costs.ungated.until_tap[tap] for tap in taps]
        assert until == pytest.approx([29.2, 85.8, 140.1, 196.7, 251.0, 307.6], abs=0.05)


def test_the_gates_of_densenet_100_are_an_eighth_of_its_layers() -> None:
    chain = densenet_bc(100, 10)
    assert sum(parameter.numel() for parameter in chain.parameters()) == 769_162
    costs = network_costs(with_exits(chain, (), light, gating=gating(chain, None, "cnn")))
    assert 2e-6 * costs.plain == pytest.approx(575.9, abs=0.05)
    gates = sum(gate.channel for gate in costs.gates)
    assert gates / sum(gate.layers for gate in costs.gates) == pytest.approx(0.125, rel=0.01)
    assert gates / costs.plain == pytest.approx(0.109, abs=0.0006)
    by_hand, side, channels = 0, 32, 24
    for stage in range(3):
        for _ in range(16):
            by_hand += (side // 2) ** 2 * (24 * channels + 9 * 24 * 12) + 12 * 12
            channels += 12
        side, channels = side // 2, channels // 2 if stage < 2 else channels
    assert gates == by_hand


class Case(NamedTuple):
    network: EarlyExitNetwork
    costs: dict[str, NetworkCosts]
    entered: list[Tensor]  # what each block's layers and gates take in, of one image


@cache
def case(name: str, design: str, mask: str) -> Case:
    torch.manual_seed(0)
    chain = CHAINS[name]()
    network = with_exits(chain, (1, 2), light, gating=gating(chain, *DESIGNS[design], mask)).eval()
    x, entered = chain.stem(torch.zeros(1, 3, SIDE, SIDE)), []
    for block in blocks_of(chain):
        entered.append(block.enter(x).detach())
        x = block(x)
    return Case(network, {price: counted(network, price) for price in PRICES}, entered)


def cut(layers: nn.Sequential, channels: int, inner: bool) -> nn.Sequential:
    """The layers with so many output channels, and inside as well, made anew."""
    layers, last = copy.deepcopy(layers), max(i for i, x in enumerate(layers) if isinstance(x, nn.Conv2d | QuanConv))
    into: int | None = None
    for i, layer in enumerate(layers):
        out = channels if inner or i >= last else None
        conv = layer.conv if isinstance(layer, QuanConv) else layer
        if isinstance(conv, nn.Conv2d):
            sizes = (into or conv.in_channels, out or conv.out_channels)
            fewer = nn.Conv2d(*sizes, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None)
            bits = (layer.weight_bits, layer.act_bits) if isinstance(layer, QuanConv) else ()
            layers[i] = QuanConv(fewer, *bits) if bits else fewer
            into = out
        elif isinstance(layer, nn.BatchNorm2d) and into is not None:
            layers[i] = nn.BatchNorm2d(into)
    return layers


@cache
def by_hand(name: str, design: str, mask: str, i: int, runs: bool, channels: int, price: str) -> float:
    """What block i costs: its shortcut or transition, the gates that are asked, and layers as small as they become."""
    network, costs, entered = case(name, design, mask)
    block, x, gates = blocks_of(network.chain)[i], entered[i], network.gating
    total = costs[price].blocks[i] - priced(block.layers, x, price)
    if gates.layer is not None:
        total += priced(Unfolded(gates.layer, x.shape[1], 1), x, price)
    if runs and isinstance(gates.channel, RecurrentGate):
        total += priced(Unfolded(gates.channel, x.shape[1], block.gate_channels), x, price)
    elif runs and gates.channel is not None:
        total += priced(gates.channel[i], x, price)
    return total + (priced(cut(block.layers, channels, mask == "both"), x, price) if runs and channels else 0)


CASES = [(name, "mgl2s", "output") for name in ("resnet8", "densenet16", "resnet14 w4a4", "densenet16 w4a4")]
CASES += [("resnet8", "mgl2s", "both"), ("resnet8", "both_rnn", "both"), ("densenet16", "channel_rnn", "output")]


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize(("name", "design", "mask"), CASES)
@settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_decisions_cost_what_layers_cut_smaller_cost(
    name: str, design: str, mask: str, price: str, data: st.DataObject
) -> None:
    network, costs, _ = case(name, design, mask)
    if price == "ptflops" and "w4a4" in name:
        return  # see the next test
    whole = [block.gate_channels for block in blocks_of(network.chain)]
    runs = [data.draw(st.integers(0, 1)) if DESIGNS[design][0] else 1 for _ in whole]
    channels = [data.draw(st.integers(0, k)) for k in whole]
    decisions = Decisions(torch.tensor(runs)[:, None], torch.tensor(channels)[:, None])
    ours = costs[price].of_blocks(decisions)[:, 0]
    expected = [
        by_hand(name, design, mask, i, bool(r), m, price) for i, (r, m) in enumerate(zip(runs, channels, strict=True))
    ]
    if price in ("macs", "ptflops"):
        assert ours.dtype == torch.int64
        assert ours.tolist() == expected
    else:
        assert ours.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["resnet14 w4a4", "densenet16 w4a4"])
def test_the_batchnorm_of_a_few_bit_layer_does_not_shrink(name: str) -> None:
    network, costs, _ = case(name, "mgl2s", "output")
    k = blocks_of(network.chain)[0].gate_channels
    ours = costs["ptflops"].of_blocks(Decisions(torch.ones(1, 1).long(), torch.full((1, 1), k // 2)))
    assert ours.item() == by_hand(name, "mgl2s", "output", 0, True, k // 2, "ptflops")


@pytest.mark.parametrize("price", PRICES)
@given(data=st.data(), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_segments_are_sums_of_blocks(price: str, data: st.DataObject, seed: int) -> None:
    costs = case(*data.draw(st.sampled_from(CASES)))[1][price]
    taps = sorted(data.draw(st.sets(st.integers(1, len(costs.blocks) - 1))))
    costs = NetworkCosts(price, costs.stem, costs.blocks, (1,) * (len(taps) + 1), tuple(taps), 0, costs.gates)
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(0, 2, (len(costs.blocks), 4), generator=generator)
    channels = torch.stack([torch.randint(0, gate.channels + 1, (4,), generator=generator) for gate in costs.gates])
    decisions = Decisions(runs, channels)
    blocks, segments = costs.of_blocks(decisions), costs.of_segments(decisions)
    assert segments.shape == (len(taps) + 1, 4)
    for n in range(4):
        ends = [0, *taps, len(costs.blocks)]
        for k, (start, end) in enumerate(pairwise(ends)):
            expected = sum(blocks[start:end, n].tolist()) + (costs.stem if k == 0 else 0)
            assert segments[k, n].item() == pytest.approx(expected, rel=1e-12)
    for start in range(len(costs.blocks)):
        part = Decisions(runs[start:], channels[start:])
        assert torch.equal(costs.of_blocks(part, start), blocks[start:])


@pytest.mark.parametrize(("name", "design", "mask"), CASES)
def test_nothing_skipped_costs_the_plain_network_and_all_gates(name: str, design: str, mask: str) -> None:
    network, known, entered = case(name, design, mask)
    for price, costs in known.items():
        gates = [gate.layer + gate.channel for gate in costs.gates]
        whole = torch.tensor([[gate.channels] for gate in costs.gates])
        nothing = Decisions(torch.ones_like(whole), whole)
        expected = [block + gate for block, gate in zip(costs.blocks, gates, strict=True)]
        assert costs.of_blocks(nothing)[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
        assert costs.of_segments(nothing)[:, 0].tolist() == pytest.approx(list(costs.segments), rel=1e-9)
        assert costs.backbone == pytest.approx(costs.plain + sum(gates), rel=1e-12)
        without = counted(network.without_gates(), price)
        assert (without.blocks, without.gates) == (costs.blocks, ())
        assert without.backbone == pytest.approx(costs.plain, rel=1e-12)
        assert costs.ungated.segments == pytest.approx(without.segments)
        pairs = zip(blocks_of(network.chain), entered, strict=True)
        layers = [priced(block.layers, x, price) for block, x in pairs]
        assert [gate.layers for gate in costs.gates] == pytest.approx(layers)


@pytest.mark.parametrize("price", PRICES)
@given(seed=st.integers(0, 999), pick=st.sampled_from(CASES))
@settings(max_examples=10)
def test_costs_are_differentiable_in_decisions(price: str, seed: int, pick: tuple[str, str, str]) -> None:
    costs = case(*pick)[1][price]
    generator = torch.Generator().manual_seed(seed)
    runs = torch.rand(len(costs.blocks), 2, generator=generator, dtype=torch.float64)
    limits = torch.tensor([[gate.channels - 1.0] for gate in costs.gates], dtype=torch.float64)
    channels = 0.5 + limits * torch.rand(len(costs.blocks), 2, generator=generator, dtype=torch.float64)
    scale = costs.plain

    def share(runs: Tensor, channels: Tensor) -> Tensor:
        return costs.of_segments(Decisions(runs, channels)) / scale

    inputs = (runs.requires_grad_(), channels.requires_grad_())
    assert torch.autograd.gradcheck(share, inputs, eps=1e-5, atol=1e-8, rtol=1e-4)


def test_a_closed_channel_saves_its_share_exactly() -> None:
    """In the paper's words: with mask=output the last convolution shrinks, with both the inner one and its square."""
    for mask, saved in (("output", [0, 1, 0]), ("both", [1, 1, 1])):
        chain = cifar_resnet(8, 10)
        costs = network_costs(with_exits(chain, (), light, gating=gating(chain, "rnn", "cnn", mask)))
        for i, (cin, k, side) in enumerate(((16, 16, 32), (16, 32, 16), (32, 64, 8))):
            for m in (0, 1, k // 2, k):
                first, last = 9 * cin * side**2, 9 * side**2
                inner = m if saved[0] else k
                expected = costs.gates[i].layer + costs.gates[i].channel + (first * inner + last * inner * m) * (m > 0)
                runs, channels = torch.ones(3, 1, dtype=torch.int64), torch.full((3, 1), m)
                assert costs.of_blocks(Decisions(runs, channels))[i].item() == expected, (mask, i, m)


def levels_by_hand(
    levels: Hierarchy, macs: float, weights: float, inputs: float, outputs: float, w: int, a: int
) -> float:
    """Equation 6: accesses of each level by what they cost, and MACs; in picojoules."""
    share_w, share_a = w / 32, a / 32
    once = share_w * weights + share_a * inputs + share_a * outputs
    accesses = {
        "memory": once,
        "cache": once + share_w * macs / levels.rows + share_a * macs / levels.columns,
        "register": levels.register_accesses * macs * max(share_w, share_a),
    }
    return sum(n * getattr(levels, level) for level, n in accesses.items()) + macs * levels.mac * max(share_w, share_a)


NUMBER = st.floats(0, 1e4)
SIZE = st.integers(0, 10**7)
BITS = st.sampled_from([1, 2, 4, 8, 32])


@given(
    st.builds(Hierarchy, st.just("x"), NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, st.floats(1, 64), st.floats(1, 64)),
    *[SIZE] * 4, BITS, BITS,
)  # fmt: skip
def test_three_levels_are_equation_6(levels: Hierarchy, macs: int, w: int, i: int, o: int, wb: int, ab: int) -> None:
    expected = levels_by_hand(levels, macs, w, i, o, wb, ab)
    assert levels.layer(macs, w, i, o, wb, ab) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("chip", [CHIP, LEVELS], ids=["chip", "levels"])
@given(st.tuples(*[SIZE] * 4), st.tuples(*[SIZE] * 4), BITS, BITS, st.integers(0, 9))
def test_energy_is_linear_in_a_layers_sizes(chip: Any, a: tuple, b: tuple, wb: int, ab: int, times: int) -> None:
    both = chip.layer(*map(sum, zip(a, b, strict=True)), wb, ab)
    assert both == pytest.approx(chip.layer(*a, wb, ab) + chip.layer(*b, wb, ab), rel=1e-9)
    assert chip.layer(*(times * x for x in a), wb, ab) == pytest.approx(times * chip.layer(*a, wb, ab), rel=1e-9)


def test_the_energy_of_a_resnet_is_a_loop_over_its_layers() -> None:
    levels = instantiate(composed("energy=three_levels").energy)
    assert isinstance(levels, Hierarchy)
    energy = network_energy(gated(8), levels)

    def conv(cin: int, cout: int, side: int, stride: int = 1) -> float:
        out = (side // stride) ** 2 * cout
        sizes = (9 * cin * out, 9 * cin * cout, side * side * cin, out)
        return levels_by_hand(levels, *sizes, 32, 32)

    def fc(cin: int, cout: int) -> float:
        return levels_by_hand(levels, cin * cout, cin * cout, cin, cout, 32, 32)

    lstm = levels_by_hand(levels, 800, 800, 10, 10, 32, 32)
    assert 1e6 * energy.stem == pytest.approx(conv(3, 16, 32))
    assert 1e6 * energy.heads[-1] == pytest.approx(fc(64, 10))
    for i, (cin, k, side) in enumerate(((16, 16, 32), (16, 32, 32), (32, 64, 16))):
        stride = 1 if cin == k else 2
        assert 1e6 * energy.blocks[i] == pytest.approx(conv(cin, k, side, stride) + conv(k, k, side // stride))
        assert 1e6 * energy.gates[i].layer == pytest.approx(fc(cin, 10) + lstm + fc(10, 1))
        assert 1e6 * energy.gates[i].channel == pytest.approx(conv(cin, cin, side, 2) + fc(cin, k))
    assert energy.plain == pytest.approx(energy.stem + sum(energy.blocks) + energy.heads[-1])


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Hierarchy("x", 1, 1, 1, -1, 1, 8, 8), r"energy.memory to be a number of at least 0, got -1"),
    (lambda: Hierarchy("x", 1, 1, 1, 1, 1, 0, 8), r"energy.rows to be a number of at least 1, got 0"),
    (lambda: Hierarchy("x", 1, 1, 1, 1, 1, 8, math.inf), r"energy.columns to be a number of at least 1, got inf"),
    (lambda: Hierarchy("x", True, 1, 1, 1, 1, 8, 8), r"energy.mac to be a number of at least 0, got True"),
    (lambda: Hierarchy("x", 1, 1, "many", 1, 1, 8, 8), r"energy.cache to be a number of at least 0, got many"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_energies_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
