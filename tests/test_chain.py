"""The chain's contract: it may be cut anywhere, gates multiply, and gradients reach them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import densenet_bc
from networks.backbones.resnet import cifar_resnet
from networks.backbones.vgg import vgg
from networks.chain import Chain, Gates
from tests.conftest import stirred

SMALL = {
    "resnet14A": lambda: cifar_resnet(14, 5, (3, 16, 16)),
    "resnet14B": lambda: cifar_resnet(14, 5, (3, 16, 16), shortcut="B"),
    "densenet16": lambda: densenet_bc(16, 5, (3, 16, 16)),
    "vgg11": lambda: vgg(11, 5),
    "alexnet": lambda: alexnet(5),
}


def images(chain: Chain, n: int = 3) -> torch.Tensor:
    return torch.randn(n, *chain.input_shape)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_cut_anywhere_gives_the_same_logits(make) -> None:
    chain = stirred(make())
    x = images(chain)
    logits = chain(x)
    assert logits.shape == (3, 5)
    for cut in range(len(chain.blocks) + 1):
        feature = chain.run(x, stop=cut)
        assert tuple(feature.shape[1:]) == chain.tap_shapes()[cut]
        assert torch.equal(chain.run(feature, start=cut), logits)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_info_describes_the_features(make) -> None:
    chain = make()
    shapes = chain.tap_shapes()
    for i, info in enumerate(chain.info):
        assert info.index == i
        assert info.out_channels == shapes[i + 1][0]
        assert info.in_channels == shapes[i][0]
    stages = [info.stage for info in chain.info]
    assert [stages.count(stage) for stage in range(len(chain.stage_lengths))] == list(chain.stage_lengths)


@pytest.mark.parametrize("make", [SMALL["resnet14A"], SMALL["resnet14B"], SMALL["densenet16"]])
def test_gates_of_one_change_nothing_and_gates_of_zero_leave_the_shortcut(make) -> None:
    chain = stirred(make())
    x = chain.run(images(chain), stop=0)
    for i, info in enumerate(chain.info):
        plain = chain.step(i, x)
        ones = Gates(torch.ones(3), torch.ones(3, info.gate_channels))
        zeros = Gates(torch.zeros(3), torch.ones(3, info.gate_channels))
        assert torch.equal(chain.step(i, x, ones), plain)
        skipped = chain.step(i, x, zeros)
        block = chain.blocks[i]
        if hasattr(block, "shortcut"):
            assert torch.equal(skipped, block.shortcut(x).relu())
        else:
            came = block.transition(x)
            assert torch.equal(skipped, torch.cat([came, came[:, -info.gate_channels :]], 1))
        x = plain


@given(layer=st.lists(st.booleans(), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_gates_follow_equation_3(layer: list[bool], seed: int) -> None:
    chain = stirred(cifar_resnet(8, 5, (3, 8, 8)))
    x = chain.run(images(chain), stop=1)
    generator = torch.Generator().manual_seed(seed)
    channel = (torch.rand(3, 16, generator=generator) < 0.5).float()
    gates = Gates(torch.tensor(layer).float(), channel)
    out = chain.blocks[0](x, gates)
    full = chain.blocks[0](x)
    for n in range(3):
        for c in range(16):
            expected = full[n, c] if layer[n] and channel[n, c] else x[n, c]
            torch.testing.assert_close(out[n, c], expected)


def test_gradients_reach_the_gates() -> None:
    chain = cifar_resnet(8, 5, (3, 8, 8))
    gate = torch.full((3,), 0.5, requires_grad=True)
    x = chain.run(images(chain), stop=0)
    for i in range(len(chain.blocks)):
        x = chain.step(i, x, Gates(layer=gate))
    chain.head(x).sum().backward()
    assert gate.grad is not None
    assert gate.grad.abs().min() > 0


def test_a_block_without_shortcut_takes_no_gates() -> None:
    chain = alexnet(5)
    with pytest.raises(ValueError, match="Block 1 has no shortcut"):
        chain.step(1, torch.zeros(2, 64, 8, 8), Gates(layer=torch.ones(2)))


@pytest.mark.parametrize("make", [SMALL["resnet14A"], SMALL["densenet16"]])
def test_the_gated_and_the_plain_forward_trace_as_one_graph(make) -> None:
    chain = make()

    def gated(x: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        x = chain.run(x, stop=0)
        for i in range(len(chain.blocks)):
            x = chain.step(i, x, Gates(layer=layer))
        return chain.head(x)

    x = images(chain)
    torch._dynamo.reset()
    assert torch.compile(chain, fullgraph=True, backend="eager")(x).shape == (3, 5)
    assert torch.compile(gated, fullgraph=True, backend="eager")(x, torch.ones(3)).shape == (3, 5)


def test_stage_lengths_must_add_up() -> None:
    chain = alexnet(5)
    with pytest.raises(ValueError, match="add up to 5 blocks"):
        Chain(chain.stem, list(chain.blocks), chain.head, [1, 1], (3, 32, 32), 5)
