"""Blocks and whole networks in few bits: what is quantized, shared and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import Bottleneck

from costs.network import network_costs
from inference.thresholds import Entropy, published_entropy
from lightning_modules.early_exit import loss_weights
from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import DenseLayer, bottleneck_layer, densenet_bc, transition_layer
from networks.backbones.resnet import ResidualBlock, _residual_block, basic_block, cifar_resnet
from networks.backbones.vgg import ConvUnit, vgg
from networks.chain import Block, Gates
from networks.early_exit_network import EarlyExitNetwork
from networks.edge import AlongEdge, edge_blocks, quantizable, quantized
from networks.quantization import quantized_convs
from running.assembly import build_network
from tests.conftest import composed, stirred


def bottleneck() -> Block:
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return _residual_block(Bottleneck(8, 4, stride=2, downsample=down))


BLOCKS: dict[str, tuple[Callable[[], Block], int]] = {
    "basic": (lambda: basic_block(8, 8), 2),
    "basic, A": (lambda: basic_block(8, 16, 2), 2),
    "basic, B": (lambda: basic_block(8, 16, 2, "B"), 2),
    "bottleneck": (bottleneck, 3),
    "conv": (lambda: ConvUnit(8, 12), 1),
    "conv with pool": (lambda: ConvUnit(8, 12, pool=True), 1),
    "conv with bias": (lambda: ConvUnit(8, 12, norm=False), 1),
    "conv with bias, stride, pool": (lambda: ConvUnit(8, 12, stride=2, norm=False, pool=True), 1),
    "dense": (lambda: DenseLayer(bottleneck_layer(8, 4), 8, 8, 4, None), 2),
    "dense, transition": (lambda: DenseLayer(bottleneck_layer(5, 4), 8, 5, 4, transition_layer(8, 5)), 2),
}


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize(("make", "count"), BLOCKS.values(), ids=BLOCKS)
def test_a_quantized_block_has_the_same_convolutions_and_shapes(
    make: Callable[[], Block], count: int, closes: bool
) -> None:
    block, x = stirred(make()), torch.randn(2, 8, 9, 9)
    before, out = copy.deepcopy(block.state_dict()), block(x)
    few = block.quantized(2, 4, closes)
    found = list(quantized_convs(few).values())
    assert [conv.conv for conv in found] == block.convs
    assert [(conv.weight_bits, conv.act_bits) for conv in found] == [(2, 4)] * count
    assert not quantized_convs(block)
    for name in ("in_channels", "out_channels", "gate_channels", "skippable"):
        assert getattr(few, name) == getattr(block, name)
    few(x).sum().backward()
    assert few(x).shape == out.shape
    assert all(conv.weight.grad is not None for conv in block.convs)
    assert all(map(torch.equal, block.state_dict().values(), before.values()))
    assert torch.equal(block(x), out)
    dense = isinstance(block, DenseLayer)  # whoever reads it has a BatchNorm: it is neither raw nor closed
    assert few.raw == (not closes and not dense)
    assert (few(x).min() >= 0) == (closes and not dense)


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("make", [m for m, _ in BLOCKS.values() if m().skippable])
def test_gates_of_quantized_blocks(make: Callable[[], Block], closes: bool) -> None:
    few, x = stirred(make().quantized(1, 1, closes)), torch.randn(2, 8, 8, 8)
    ones = torch.ones(2, few.gate_channels)
    assert torch.equal(few(x, Gates(torch.ones(2), ones)), few(x))
    skipped = few(x, Gates(torch.zeros(2)))
    if isinstance(few, DenseLayer):
        came = few.transition(x)
        expected = torch.cat([came, came[:, -4:]], 1)
    else:
        assert isinstance(few, ResidualBlock)
        expected = few.closing(few.shortcut(x))
    torch.testing.assert_close(skipped, expected)
    torch.testing.assert_close(few(x, Gates(torch.tensor([1.0, 0.0])))[1], expected[1])


def test_a_residual_block_is_the_shortcut_and_its_quanconvs() -> None:
    few, x = stirred(basic_block(8, 16, 2).quantized(2, 2)), torch.randn(2, 8, 8, 8)
    one, two = quantized_convs(few).values()
    assert torch.equal(few(x), two(one(x)) + few.shortcut(x))


BACKBONES = {
    "resnet32": (lambda: cifar_resnet(32, 4), (2,) * 15),
    "vgg16_bn": (lambda: vgg(16, 4), (0, *(1,) * 12)),
    "alexnet": (lambda: alexnet(4), (0, 1, 1, 1, 1)),
    "densenet76": (lambda: densenet_bc(76, 4), (2,) * 36),
}


@pytest.mark.parametrize(("make", "convs"), BACKBONES.values(), ids=BACKBONES)
def test_all_but_the_first_layer_can_be_quantized(make: Callable, convs: tuple[int, ...]) -> None:
    with torch.device("meta"):
        chain = make()
        few = quantized(chain, 1, 1, sum(convs))
    assert quantizable(chain) == convs
    assert len(quantized_convs(few)) == sum(convs)
    inside = {id(conv.conv) for conv in quantized_convs(few).values()}
    first = next(part for part in few.modules() if isinstance(part, nn.Conv2d))
    assert first.in_channels == 3
    assert id(first) not in inside
    assert few.stem is chain.stem
    assert few.head is chain.head
    assert (few.info, few.tap_shapes()) == (chain.info, chain.tap_shapes())
    assert not few.blocks[-1].raw
    assert not quantized_convs(quantized(chain, 1, 1, 0))


def test_the_edge_is_quantized_and_its_last_block_closes_it() -> None:
    chain = cifar_resnet(20, 4)
    few = quantized(chain, 1, 2, 6)
    assert [len(quantized_convs(block)) for block in few.blocks] == [2, 2, 2, 0, 0, 0, 0, 0, 0]
    assert [block.raw for block in few.blocks] == [True, True, *[False] * 7]
    assert all(ours is theirs for ours, theirs in zip(few.blocks[3:], chain.blocks[3:], strict=True))


RESNET32 = (2,) * 15


@pytest.mark.parametrize(
    ("convs", "count", "blocks"),
    [(RESNET32, 20, 10), (RESNET32, 0, 0), (RESNET32, 30, 15), ((0, 1, 1), 1, 2), ((0, 1, 1), 0, 0), ((0, 0), 0, 0)],
)
def test_blocks_of_the_edge(convs: tuple[int, ...], count: int, blocks: int) -> None:
    assert edge_blocks(convs, count) == blocks


REFUSED: list[tuple[AlongEdge, str]] = [
    (AlongEdge(edge_convs=3), "edge_convs=3 ends in the middle of a block; choose 2 or 4"),
    *((AlongEdge(edge_convs=n), "whole number from 0 to 30") for n in (31, -1, 2.0, True)),  # type: ignore[arg-type]
    (AlongEdge(edge_convs=0), "precision.edge_convs above 0"),
    *((AlongEdge(exits=n), "method.exits.exits") for n in (0, -1, 1.5, True)),  # type: ignore[arg-type]
    *((AlongEdge(share=share), "share from above 0 to 1") for share in (0, -0.1, 1.01)),
    (AlongEdge(exits=3, edge_convs=4), "room for method.exits.exits=3"),
]


@pytest.mark.parametrize(("rule", "message"), REFUSED)
def test_edges_that_cannot_be_are_refused(rule: AlongEdge, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule((5, 5, 5), range(15), RESNET32)


def test_published_edges() -> None:
    for convs, exits, taps in ((20, 1, (10,)), (16, 1, (8,)), (20, 2, (5, 10)), (30, 3, (5, 10, 15)), (None, 1, (10,))):
        assert AlongEdge(exits, convs)((5, 5, 5), range(15), RESNET32) == taps


@given(first=st.integers(0, 3), rest=st.lists(st.integers(1, 3), min_size=1), exits=st.integers(1, 4), data=st.data())
def test_exits_lie_evenly_along_the_edge(first: int, rest: list[int], exits: int, data: st.DataObject) -> None:
    convs = [first, *rest]
    ends = list(accumulate(convs))
    count = data.draw(st.sampled_from([end for end in ends if end]))
    try:
        taps = AlongEdge(exits, count)((len(convs),), range(len(convs)), convs)
    except ValueError:
        assert exits > 1
        return
    assert len(taps) == exits
    assert taps[-1] == edge_blocks(convs, count)
    for i, tap in enumerate(taps, start=1):
        place = count * i / exits
        assert abs(ends[tap - 1] - place) == min(abs(end - place) for end in ends)


SMALL = {
    "resnet8 A": lambda: cifar_resnet(8, 4, (3, 16, 16)),
    "resnet8 B": lambda: cifar_resnet(8, 4, (3, 16, 16), "B"),
    "densenet10": lambda: densenet_bc(10, 4, (3, 16, 16)),
    "alexnet": lambda: alexnet(4, (3, 16, 16)),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_few_bits_change_no_macs(make: Callable) -> None:
    chain = make()
    few = quantized(chain, 1, 1, sum(quantizable(chain)))
    assert network_costs(EarlyExitNetwork(few)) == network_costs(EarlyExitNetwork(chain))


RESNET20 = ["backbone=resnet20", "dataset=cifar10"]


@pytest.mark.parametrize(
    ("command", "taps", "bits", "count"),
    [
        (["method=hybrid"], (6,), (1, 1), 12),
        (["method=hybrid", "precision.edge_convs=8", "precision=w2a2"], (4,), (2, 2), 8),
        (["method=hybrid", "precision.edge_convs=8", "method.exits.exits=2"], (2, 4), (1, 1), 8),
        (["method=hybrid", "precision=fp32", "precision.edge_convs=4"], (2,), (32, 32), 0),
        (["method=plain", "precision=w4a4", "precision.act_bits=32"], (), (4, 32), 18),
        (["method=early_exit", "method/exits=blocks", "method.exits.taps=[2,5]", "precision=w8a8"], (2, 5), (8, 8), 10),
        (["method=early_exit", "method/exits=blocks", "method.exits.taps=[5]", "precision=w1a1",
          "precision.edge_convs=4"], (5,), (1, 1), 4),
    ],
)  # fmt: skip
def test_commands_name_what_is_quantized(command: list[str], taps: Sequence[int], bits: tuple, count: int) -> None:
    network = build_network(composed(*RESNET20, *command), 10, (3, 32, 32))
    found = quantized_convs(network)
    assert network.taps == taps
    assert {(conv.weight_bits, conv.act_bits) for conv in found.values()} == ({bits} if count else set())
    assert [name.split(".")[2] for name in found] == [str(i // 2) for i in range(count)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision.edge_convs=7", "precision.edge_convs=7 ends in the middle of a block; choose 6 or 8"),
        ("precision.edge_convs=20", "precision.edge_convs to be a whole number from 0 to 18"),
        ("precision.weight_bits=9", "precision.weight_bits to be a whole number of bits"),
        ("precision.act_bits=0", "precision.act_bits to be a whole number of bits"),
    ],
)
@pytest.mark.parametrize("method", ["hybrid", "plain", "early_exit"])
def test_precisions_that_cannot_be_are_refused(method: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(composed(*RESNET20, f"method={method}", "precision=w1a1", override), 10, (3, 32, 32))


def test_nothing_quantized_is_said(caplog: pytest.LogCaptureFixture) -> None:
    command = ["method=early_exit", "precision=w1a1", "precision.edge_convs=0"]
    assert not quantized_convs(build_network(composed(*RESNET20, *command), 10, (3, 32, 32)))
    assert "although weights have 1 and activations 1 bit: precision.edge_convs=0" in caplog.text


@pytest.mark.parametrize(("exits", "weights"), [(1, (1,)), (2, (0.6, 0.4)), (3, (0.3, 0.3, 0.4))])
def test_the_papers_loss_weights(exits: int, weights: Sequence[float]) -> None:
    assert loss_weights("hybrid", exits) == pytest.approx(weights)


@pytest.mark.parametrize(("classes", "threshold"), [(10, 0.5), (100, 1.0), (1000, 1.5)])
def test_the_papers_entropy_thresholds(classes: int, threshold: float) -> None:
    assert published_entropy(classes) == Entropy(pytest.approx(threshold))
    assert published_entropy(classes, [0.1, 0.2]) == Entropy([0.1, 0.2])
