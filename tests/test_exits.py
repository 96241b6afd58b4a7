"""Where exits are placed, and that every head fits every tap of every backbone."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from networks import heads
from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet, torchvision_resnet
from networks.backbones.vgg import vgg
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exits import Blocks, MacFractions, StageFractions

BACKBONES = {
    "alexnet": lambda: alexnet(4),
    "vgg16_bn": lambda: vgg(16, 4),
    "resnet14": lambda: cifar_resnet(14, 4),
    "resnet14 of odd maps": lambda: cifar_resnet(14, 4, (1, 19, 23)),
    "densenet16": lambda: densenet_bc(16, 4),
    "resnet18": lambda: torchvision_resnet("resnet18", 4, (3, 64, 64)),
    "resnet50": lambda: torchvision_resnet("resnet50", 4, (3, 33, 33)),
}
HEADS = (heads.exit_predictor, heads.light, heads.hybrid, heads.ddi)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_any_head_at_any_tap_of_any_backbone(make, head) -> None:
    chain = make()
    network = with_exits(chain, range(1, len(chain.blocks) + 1), head).eval()
    x = torch.randn(2, *chain.input_shape)
    logits = network(x)
    assert [tuple(z.shape) for z in logits] == [(2, 4)] * (len(chain.blocks) + 1)
    torch.testing.assert_close(logits[-1], chain(x))
    for tap, module, z in zip(network.taps, network.heads, logits, strict=False):
        torch.testing.assert_close(z, module(chain.run(x, stop=tap)))


def convolutions(head: torch.nn.Module) -> list[tuple[int, int, int]]:
    return [(m.in_channels, m.out_channels, m.stride[0]) for m in head.modules() if isinstance(m, torch.nn.Conv2d)]


def test_the_exit_predictor_papers_heads_are_those_of_tables_iii_and_iv() -> None:
    def of(chain: Chain, taps: list[int]) -> list[list[tuple[int, int, int]]]:
        return [convolutions(head) for head in with_exits(chain, taps, heads.exit_predictor).heads]

    assert of(alexnet(10), [1, 2]) == [[(64, 64, 1), (64, 64, 1)], [(192, 64, 1)]]
    assert of(vgg(16, 10), [1, 3]) == [[(64, 64, 2), (64, 32, 1), (32, 32, 1)], [(128, 128, 2), (128, 64, 1)]]
    assert of(cifar_resnet(44, 10), [1, 4, 8]) == [[(16, 16, 1)] * 4, [(16, 16, 1)] * 2, [(32, 32, 1)] * 2]


@pytest.mark.parametrize(("width", "side", "features"), [(16, 32, 1600), (32, 16, 800), (64, 8, 256)])
def test_the_hybrid_papers_head_has_its_features(width: int, side: int, features: int) -> None:
    head = heads.hybrid(heads.Tap(None, (width, side, side), 1, 10))
    assert head[-1].in_features == features


@pytest.mark.parametrize(("side", "pools"), [(32, 2), (16, 1), (8, 0), (4, 0)])
def test_ddi_heads_pool_down_to_8x8(side: int, pools: int) -> None:
    head = heads.ddi(heads.Tap(None, (16, side, side), 1, 10))
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in head.modules()) == pools
    assert convolutions(head) == [(16, 16, 1)] * (pools + 1)


def test_published_places() -> None:
    first = StageFractions([0], [1, 2])
    assert first(cifar_resnet(44, 10).stage_lengths, []) == (1, 8)
    assert first(vgg(16, 10).stage_lengths, []) == (1, 3)
    assert first(alexnet(10).stage_lengths, []) == (1, 2)
    quarters = StageFractions([0.25, 0.75])
    assert quarters((12, 12, 12), []) == (3, 9, 15, 21, 27, 33)
    assert quarters((16, 16, 16), []) == (4, 12, 20, 28, 36, 44)


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    fractions=st.lists(st.fractions(0, 1, max_denominator=100), min_size=1, max_size=4),
)
def test_stage_fractions_are_exact(lengths: list[int], fractions: list[Fraction]) -> None:
    expected = set()
    for stage, n in enumerate(lengths):
        expected |= {sum(lengths[:stage]) + max(1, math.ceil(f * n)) for f in fractions}
    taps = StageFractions([float(f) for f in fractions])(lengths, [])
    assert taps == tuple(sorted(expected - {sum(lengths)}))


@given(
    steps=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_mac_fractions_are_the_nearest_inner_taps(steps: list[int], fractions: list[float]) -> None:
    macs = [sum(steps[: i + 1]) for i in range(len(steps))]
    taps = MacFractions(fractions)([len(steps)], macs)
    assert all(1 <= tap < len(steps) for tap in taps)
    for fraction in fractions if len(steps) > 1 else []:
        nearest = min(abs(m - fraction * macs[-1]) for m in macs[:-1])
        assert min(abs(macs[tap - 1] - fraction * macs[-1]) for tap in taps) == nearest


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Blocks([1, 10]), "taps from 1 to 9, the number of blocks of the backbone, got 10"),
        (Blocks([0]), "got 0"),
        (Blocks([2, 2]), "every tap once"),
        (StageFractions([1.5]), "fractions from 0 to 1, got 1.5"),
        (StageFractions([0.5], [4]), "stages from 1 to 3, got 4"),
        (MacFractions([-0.1]), "fractions from 0 to 1"),
    ],
)
def test_places_that_cannot_be_are_refused(rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule((3, 3, 3), range(1, 10))


def test_a_head_for_each_tap() -> None:
    with pytest.raises(ValueError, match="a head for each of 1 taps, got 0"):
        EarlyExitNetwork(alexnet(10), [1])
    assert EarlyExitNetwork(alexnet(10)).num_exits == 1
