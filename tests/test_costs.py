"""Counts against the papers' printed tables, fvcore's own totals and closed forms."""

from __future__ import annotations

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from callbacks.cost_table import cost_table
from costs.counting import count
from costs.network import network_costs, tap_macs
from networks import heads
from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet, torchvision_resnet
from networks.backbones.vgg import vgg
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exits import StageFractions
from tests.conftest import stirred


def resnet44(classes: int):
    return cifar_resnet(44, classes, shortcut="B")


def vgg16(classes: int):
    return vgg(16, classes)


# Exit Predictor paper, tables I and V to the unit: whole backbone, then l1, e1, l2, e2
TABLE = [
    (alexnet, 10, 62_877_706, 491_520, 4_749_322, 7_114_752, 1_775_114),
    (vgg16, 10, 333_082_634, 1_966_080, 16_695_306, 56_983_552, 14_233_610),
    (resnet44, 10, 98_517_642, 5_292_032, 9_658_378, 32_530_432, 4_788_234),
    (alexnet, 100, 63_246_436, 491_520, 4_841_572, 7_114_752, 1_798_244),
    (vgg16, 100, 333_451_364, 1_966_080, 17_432_676, 56_983_552, 14_602_340),
    (resnet44, 100, 98_523_492, 5_292_032, 10_027_108, 32_530_432, 4_972_644),
]


@pytest.mark.parametrize(("make", "classes", "total", "l1", "e1", "l2", "e2"), TABLE)
def test_ptflops_are_the_exit_predictor_papers(make, classes, total, l1, e1, l2, e2) -> None:
    chain = make(classes)
    taps = StageFractions([0], [1, 2])(chain.stage_lengths, [])
    costs = network_costs(with_exits(chain, taps, heads.exit_predictor), "ptflops")
    assert costs.backbone == total
    assert costs.segments[:2] == (l1, l2)
    assert costs.heads[:2] == (e1, e2)
    assert costs.leaving[:2] == (l1 + e1, l1 + e1 + l2 + e2)
    assert costs.leaving[2] == total + e1 + e2


def test_table_vi_three_exits() -> None:
    costs = network_costs(with_exits(resnet44(100), [1, 4, 8], heads.exit_predictor), "ptflops")
    assert costs.segments[:3] == (5_292_032, 14_401_536, 18_128_896)
    assert costs.heads[:3] == (10_027_108, 5_226_596, 4_972_644)


@pytest.mark.parametrize(
    ("depth", "published", "computed"),
    [(14, 59, 52.8), (20, 84, 81.1), (26, 117, 109.4), (38, 170, 166.0), (74, None, 335.9)],
)
def test_resnet_flops_of_the_ddi_paper(depth: int, published: float | None, computed: float) -> None:
    flops = 2 * network_costs(EarlyExitNetwork(cifar_resnet(depth, 10))).backbone / 1e6
    assert round(flops, 1) == computed
    if published:
        assert flops == pytest.approx(published, rel=0.12)


@pytest.mark.parametrize(
    ("depth", "published", "computed"), [(76, 370, 374.4), (82, 420, 421.2), (88, 470, 470.3), (100, None, 575.9)]
)
def test_densenet_flops_of_the_ddi_paper(depth: int, published: float | None, computed: float) -> None:
    flops = 2 * network_costs(EarlyExitNetwork(densenet_bc(depth, 10))).backbone / 1e6
    assert round(flops, 1) == computed
    if published:
        assert flops == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: cifar_resnet(74, 10), [29.2, 85.8, 140.1, 196.7, 251.0, 307.6]),
        (lambda: densenet_bc(100, 10), [60.3, 234.9, 421.3, 481.4, 548.4, 565.5]),
    ],
)
def test_cumulative_costs_at_the_ddi_branches(make, expected: list[float]) -> None:
    chain = make()
    macs = tap_macs(chain)
    taps = StageFractions([0.25, 0.75])(chain.stage_lengths, macs)
    assert [round(2 * macs[tap - 1] / 1e6, 1) for tap in taps] == expected


@pytest.mark.parametrize("make", [lambda: resnet44(10), lambda: densenet_bc(40, 10), lambda: alexnet(10),
                                  lambda: torchvision_resnet("resnet50", 10, (3, 64, 64))])  # fmt: skip
def test_macs_are_fvcores_convolutions_and_linear_layers(make) -> None:
    chain = make().eval()
    x = torch.zeros(1, *chain.input_shape)
    analysis = FlopCountAnalysis(chain, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    operators = analysis.by_operator()
    assert count(chain, x)[""] == operators["conv"] + operators["linear"]
    by_module = count(chain, x)
    analysed = analysis.by_module_and_operator()
    for name, operators in analysed.items():
        assert by_module[name] == operators["conv"] + operators["linear"]


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), bias=st.booleans(), groups=st.integers(1, 3),
    side=st.integers(5, 12), multiple=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=25)
def test_closed_forms(kernel: int, stride: int, bias: bool, groups: int, side: int, multiple: int) -> None:
    channels = groups * multiple
    conv = nn.Conv2d(channels, 2 * channels, kernel, stride, bias=bias, groups=groups)
    unit = nn.Sequential(conv, nn.BatchNorm2d(2 * channels), nn.ReLU(inplace=bias))
    module = nn.Sequential(unit, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 5, bias=bias))
    x = torch.zeros(1, channels, side, side)
    out = ((side - kernel) // stride + 1) ** 2
    weights = kernel**2 * channels // groups * 2 * channels
    elements = 2 * channels * out
    assert count(module, x)[""] == weights * out + 10 * channels
    biases = (elements + 5) if bias else 0
    # convolution, BatchNorm 2, ReLU 1, pool 1 an element; linear
    expected = weights * out + 4 * elements + 10 * channels + biases
    assert count(module, x, convention="ptflops")[""] == expected


@given(
    width=st.integers(1, 12),
    hidden=st.integers(1, 12),
    layers=st.integers(1, 3),
    both=st.booleans(),
    steps=st.integers(1, 4),
)
@settings(max_examples=25)
def test_lstm(width: int, hidden: int, layers: int, both: bool, steps: int) -> None:
    lstm = nn.LSTM(width, hidden, layers, bidirectional=both)
    # every weight is used once a step
    weights = sum(p.numel() for name, p in lstm.named_parameters() if name.startswith("weight"))
    biases = sum(p.numel() for name, p in lstm.named_parameters() if name.startswith("bias"))
    x = torch.zeros(steps, 1, width)
    assert count(lstm, x)[""] == steps * weights
    assert count(lstm, x, convention="ptflops")[""] == steps * (weights + biases)


def test_lstm_cell() -> None:
    assert count(nn.LSTMCell(10, 10), torch.zeros(1, 10))[""] == 4 * 10 * 20


class Relus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x)).relu_()


def test_only_relu_modules_count() -> None:
    counts = count(Relus(), torch.zeros(1, 7), convention="ptflops")
    assert (counts[""], counts["inner"], counts["inner.0"]) == (14, 14, 7)
    assert count(nn.ReLU(), torch.zeros(1, 7), convention="ptflops")[""] == 7


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(3, ceil_mode=True), nn.AdaptiveAvgPool2d(2)])
def test_pools_count_their_input(pool: nn.Module) -> None:
    assert count(pool, torch.zeros(1, 3, 8, 8), convention="ptflops")[""] == 3 * 64
    assert count(pool, torch.zeros(1, 3, 8, 8))[""] == 0


def test_counting_changes_nothing() -> None:
    network = with_exits(cifar_resnet(8, 10), [1], heads.light)
    stirred(network)
    network.train()
    network.chain.stem.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    network_costs(network)
    network_costs(network, "ptflops")
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_parts_add_up_to_the_network() -> None:
    network = with_exits(densenet_bc(22, 10), [1, 4, 7], heads.exit_predictor)
    for convention in ("macs", "ptflops"):
        costs = network_costs(network, convention)
        whole = count(network, torch.zeros(1, 3, 32, 32), convention=convention)[""]
        assert costs.leaving[-1] == sum(costs.segments) + sum(costs.heads) == whole
        assert costs.backbone == count(network.chain, torch.zeros(1, 3, 32, 32), convention=convention)[""]


def test_another_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="'macs' or 'ptflops', got 'flops'"):
        count(nn.ReLU(), torch.zeros(1), convention="flops")  # type: ignore[arg-type]


def test_the_table_names_blocks_exits_and_costs() -> None:
    network = with_exits(cifar_resnet(14, 10), [1, 3], heads.light)
    table = cost_table(network)
    assert table.row_count == 1 + 6 + 1
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    costs = network_costs(network)
    millions = [f"{n / 1e6:,.2f}" for n in (costs.blocks[2], costs.until_tap[3], costs.heads[1], costs.leaving[1])]
    assert cells[3][:8] == ("3", "2", "32x16x16", *millions[:2], "2", *millions[2:])
    assert cost_table(network, max_rows=3).row_count == 1 + 2 + 1
