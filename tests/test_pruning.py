"""Filter pruning: which filters go, what goes with them, and what stays."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from costs.network import network_costs
from inference.executor import Executor
from inference.thresholds import Confidence
from networks import heads
from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import ResidualBlock, cifar_resnet, torchvision_resnet
from networks.backbones.vgg import vgg
from networks.chain import Block, Chain, Gates
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.exit_predictor import separable
from networks.exits import Blocks, Places, StageFractions
from networks.pruning import pruned
from tests.conftest import stirred

FIRST, QUARTERS = StageFractions([0], [1, 2]), StageFractions([0.25, 0.75])
CHAINS = {
    "alexnet": lambda: alexnet(4),
    "vgg16_bn": lambda: vgg(16, 4),
    "resnet8 A": lambda: cifar_resnet(8, 4),
    "resnet8 B": lambda: cifar_resnet(8, 4, shortcut="B"),
    "resnet20 A": lambda: cifar_resnet(20, 4),
    "resnet20 B of odd maps": lambda: cifar_resnet(20, 4, (1, 11, 13), shortcut="B"),
    "densenet22": lambda: densenet_bc(22, 4),
    "resnet50": lambda: torchvision_resnet("resnet50", 4, (3, 33, 33)),
}
FEATURES = {"alexnet": 1024, "vgg16_bn": 512}


def network_of(name: str, places: Places = FIRST, head=heads.exit_predictor) -> EarlyExitNetwork:
    chain = CHAINS[name]()
    if name in FEATURES:  # one FC layer in place of three large ones
        chain.head = nn.Sequential(nn.Flatten(), nn.Linear(FEATURES[name], 4))
    return stirred(with_exits(chain, places(chain.stage_lengths, []), head))


def convolutions(*parts: nn.Module) -> list[nn.Conv2d]:
    return [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Conv2d)]


def on_device(network: EarlyExitNetwork) -> list[nn.Conv2d]:
    return convolutions(network.chain.stem, *network.chain.blocks[: network.taps[-1]], network.heads)


def of_resnet8(network: EarlyExitNetwork) -> list[ResidualBlock]:
    return [*network.chain.blocks[:2], *network.heads[0][:2], network.heads[1][0]]


def left_alone(network: EarlyExitNetwork) -> list[int]:
    """Outputs of the FC layers of either side and of the server's convolutions."""
    fully_connected = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    return [len(layer.weight) for layer in fully_connected + convolutions(*network.chain.blocks[network.taps[-1] :])]


def spread(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """In float64, each parameter with values that are all different, so that every one of them can be found again."""
    for p in network.double().parameters():
        values = torch.randperm(p.numel(), dtype=torch.float64).view_as(p) / p.numel() - 0.4
        p.data = values * math.sqrt(12 / p[0].numel()) if p.dim() > 1 else values
    return network


def where(part: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
    """The places of ``part`` in ``whole``, of which it is a rectangle with rows and columns left out."""
    ordered, order = whole.flatten().sort()
    found = order[torch.searchsorted(ordered, part.flatten()).clamp(max=len(order) - 1)]
    return torch.meshgrid(*(index.unique() for index in torch.unravel_index(found, whole.shape)), indexing="ij")


@pytest.mark.parametrize(
    ("name", "places", "head", "ratio"),
    [
        *((name, FIRST, heads.exit_predictor, 0.1) for name in CHAINS if name != "resnet50"),
        *((name, FIRST, heads.light, 0.5) for name in CHAINS),
        *((name, QUARTERS, heads.hybrid, 0.3) for name in ("resnet20 A", "resnet20 B of odd maps", "densenet22")),
        *((name, Blocks([1, 3]), heads.ddi, 0.3) for name in ("resnet8 A", "resnet8 B")),
    ],
)
def test_a_pruned_network_is_the_whole_one_with_filters_silenced(name: str, places, head, ratio: float) -> None:
    whole = spread(network_of(name, places, head))
    lean, silenced = pruned(whole, ratio), copy.deepcopy(whole)
    for p, part in zip(silenced.parameters(), lean.parameters(), strict=True):
        if p.shape != part.shape:
            kept = where(part.data, p.data)
            assert torch.equal(p.data[kept], part.data)
            p.data = torch.zeros_like(p.data).index_put_(kept, part.data)
    assert left_alone(lean) == left_alone(whole)
    images = torch.randn(3, *whole.chain.input_shape, dtype=torch.float64)
    with torch.no_grad():
        for z, expected, before in zip(lean(images), silenced(images), whole(images), strict=True):
            torch.testing.assert_close(z, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
            assert (z - before).abs().max() > 1e-3 * before.abs().max()
            assert z.std(0).max() > 1e-6 * z.abs().max()


def of_highest_norm(convs: list[nn.Conv2d], kept: int) -> list[int]:
    filters = torch.cat([conv.weight.flatten(1) for conv in convs], 1).tolist()
    weakest_first = sorted(range(len(filters)), key=lambda k: sum(x * x for x in filters[k]))
    return sorted(weakest_first[len(filters) - kept :])


def test_the_filters_of_the_lowest_norm_go() -> None:
    whole = network_of("resnet8 A")
    lean = pruned(whole, 0.1)
    for before, after in zip(of_resnet8(whole), of_resnet8(lean), strict=True):
        (conv, norm, _, last, _), (lean_conv, lean_norm, _, lean_last, _) = before.branch, after.branch
        kept = of_highest_norm([conv], {16: 14, 32: 28}[conv.out_channels])
        assert torch.equal(lean_conv.weight, conv.weight[kept])
        assert torch.equal(lean_norm.running_var, norm.running_var[kept])
        assert torch.equal(lean_last.weight, last.weight[:, kept])


def test_filters_that_additions_tie_go_together_by_their_joint_norm() -> None:
    whole = network_of("resnet8 B")
    lean = pruned(whole, 0.25)
    tied = [whole.chain.stem[0], *(block.branch[3] for block in of_resnet8(whole) if block.out_channels == 16)]
    kept = of_highest_norm(tied, 12)
    assert kept != of_highest_norm(tied[:1], 12)
    assert torch.equal(lean.chain.stem[0].weight, whole.chain.stem[0].weight[kept])


@pytest.mark.parametrize(
    ("name", "places", "expected"),
    [
        ("resnet8 A", FIRST, [16, 16, 32, 64]),
        ("resnet8 B", FIRST, [8, 8, 16, 64]),
        ("resnet8 B", Blocks([3]), [8, 8, 16, 32]),
        # the residual stream of the stage that the cut lies in belongs to both sides
        ("resnet20 B of odd maps", FIRST, [8] * 4 + [32] * 3 + [64] * 3),
        ("resnet20 B of odd maps", QUARTERS, [8] * 4 + [16] * 3 + [64] * 3),
        ("densenet22", FIRST, [12, 18, 24, 30, 21, 33, 45, 45, 57, 69]),
    ],
)
def test_the_channels_that_are_left(name: str, places: Places, expected: list[int]) -> None:
    lean = pruned(network_of(name, places, heads.light), 0.5)
    assert [channels for channels, _, _ in lean.chain.tap_shapes()] == expected


@pytest.mark.parametrize("ratio", [0.1, 0.9])
@pytest.mark.parametrize("name", ["alexnet", "resnet8 B", "densenet22"])
def test_blocks_say_what_they_are(name: str, ratio: float) -> None:
    lean = pruned(network_of(name), ratio)
    chain = lean.chain
    assert chain.info == Chain(chain.stem, list(chain.blocks), chain.head, chain.stage_lengths, (3, 32, 32), 4).info
    with torch.no_grad():
        x = chain.run(torch.randn(2, *chain.input_shape), stop=0)
        for i, info in enumerate(chain.info):
            y = chain.step(i, x)
            assert (info.in_channels, info.out_channels) == (x.shape[1], y.shape[1])
            if info.skippable:
                torch.testing.assert_close(chain.step(i, x, Gates(channel=torch.ones(2, info.gate_channels))), y)
                assert chain.step(i, x, Gates(layer=torch.zeros(2))).shape == y.shape
            x = y
    for block in (part for part in lean.heads.modules() if isinstance(part, Block)):
        convs = convolutions(block)
        assert (block.in_channels, block.out_channels) == (convs[0].in_channels, convs[-1].out_channels)


def test_macs_by_hand() -> None:
    costs = network_costs(pruned(network_of("alexnet", head=heads.light), 0.5))
    first, second, third = 9 * 3 * 32 * 16**2, 9 * 32 * 96 * 8**2, 9 * 96 * 384 * 4**2
    assert (*costs.blocks[:3], *costs.heads[:2]) == (first, second, third, 32 * 4, 96 * 4)


SMALL = stirred(with_exits(cifar_resnet(8, 3, (1, 8, 8), "B", (4, 10, 7)), [1, 2], heads.exit_predictor))


@settings(max_examples=8)
@example(shares=(Fraction(4, 5), Fraction(9, 10)))  # 10 * (1 - 0.8) is a little less than 2
@given(shares=st.tuples(*2 * [st.fractions(0, Fraction(99, 100), max_denominator=100)]))
def test_a_higher_ratio_leaves_no_more_filters_and_macs(shares: tuple[Fraction, Fraction]) -> None:
    some, fewer = (pruned(SMALL, float(share)) for share in sorted(shares))
    for network, share in zip((some, fewer), sorted(shares), strict=True):
        left = [max(1, math.floor(conv.out_channels * (1 - share))) for conv in on_device(SMALL)]
        assert [conv.out_channels for conv in on_device(network)] == left
    macs = [network_costs(network).leaving for network in (fewer, some, SMALL)]
    assert all(a <= b <= c for a, b, c in zip(*macs, strict=True))


@pytest.mark.parametrize(("ratio", "without_grad"), [(0.0, torch.no_grad), (0.5, torch.inference_mode)])
def test_the_given_network_the_predictor_and_the_random_numbers_stay(ratio: float, without_grad) -> None:
    whole = stirred(with_exits(CHAINS["resnet8 B"](), [1, 2], heads.exit_predictor, separable)).train()
    whole.chain.stem.requires_grad_(False)
    before, state = copy.deepcopy(whole), torch.get_rng_state()
    with without_grad(), torch.autocast("cpu", torch.bfloat16):
        lean = pruned(whole, ratio)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in whole.modules())
    assert not any(part.training for part in lean.modules())
    assert same(whole, before)
    assert whole.chain.info == before.chain.info
    assert same(lean.predictor, before.predictor)
    assert same(lean, before) == (ratio == 0)
    for (name, p), (left, q) in zip(whole.named_parameters(), lean.named_parameters(), strict=True):
        assert (name, p.requires_grad, p.dtype) == (left, q.requires_grad, q.dtype)
        assert p.data_ptr() != q.data_ptr()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(x[name].shape == y[name].shape and torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("name", ["alexnet", "resnet8 A", "resnet8 B", "densenet22"])
def test_channels_last_stays(name: str) -> None:
    whole = network_of(name)
    plain = pruned(whole, 0.3)
    last = pruned(whole.to(memory_format=torch.channels_last), 0.3)
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions(last))
    assert same(last, plain)


def test_the_executor_runs_it() -> None:
    lean = pruned(network_of("resnet8 B"), 0.3)
    images = torch.randn(12, 3, 32, 32)
    logits = torch.stack(lean(images)).detach()
    went = Executor(lean, Confidence(logits[:2].softmax(-1).amax(-1).median(-1).values.tolist()))(images)
    assert went.exit.unique().tolist() == [1, 2, 3]
    assert torch.equal(went.label, logits.argmax(-1)[went.exit - 1, torch.arange(12)])
    assert torch.equal(went.macs, torch.tensor(network_costs(lean).leaving)[went.exit - 1])


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan])
def test_what_cannot_be_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"Expected a pruning ratio of at least 0 and below 1, got {ratio}"):
        pruned(SMALL, ratio)
    with pytest.raises(ValueError, match="an early exit, got none: there is no on-device network"):
        pruned(EarlyExitNetwork(SMALL.chain), 0.1)


def test_what_it_does_not_know_it_leaves_and_names(caplog) -> None:
    whole = network_of("resnet8 A", head=heads.light)
    pruned(whole, 0.5)
    assert caplog.text == ""
    whole.chain.blocks[0].branch[2] = nn.Hardswish()
    assert [conv.out_channels for conv in on_device(pruned(whole, 0.5))] == [16, 16, 16, 16, 32]
    assert "Filters that feed ConstantPadNd, Hardswish are not pruned" in caplog.text
