"""Gates and the blocks they skip in: equations 1 to 3 and Fig. 3 written out, torch's own LSTM, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from costs.gates import Unfolded
from networks.backbones.alexnet import alexnet
from networks.backbones.densenet import DenseLayer, bottleneck_layer, densenet_bc, transition_layer
from networks.backbones.resnet import basic_block, chain_of_resnet, cifar_resnet
from networks.backbones.vgg import vgg
from networks.chain import Chain, Gates
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.edge import quantizable, quantized
from networks.gate_designs import RecurrentGate
from networks.gates import GatePass, Gating, Multiplied, gating, straight_through
from networks.heads import light
from networks.skipping import Skippable
from tests.conftest import stirred

SIDE = 8
CLASSES = 5
# layer and channel gate
DESIGNS: dict[str, tuple[str | None, str | None]] = {
    "layer_rnn": ("rnn", None),
    "channel_cnn": (None, "cnn"),
    "channel_rnn": (None, "rnn"),
    "mgl2s": ("rnn", "cnn"),
    "both_rnn": ("rnn", "rnn"),
}


def in_bits(chain: Chain, bits: int, blocks: int) -> Chain:
    return quantized(chain, bits, bits, sum(quantizable(chain)[:blocks]))


CHAINS: dict[str, Callable[[], Chain]] = {
    "resnet8": lambda: cifar_resnet(8, CLASSES, (3, SIDE, SIDE), widths=(4, 8, 12)),
    "resnet14": lambda: cifar_resnet(14, CLASSES, (3, SIDE, SIDE), "B", (4, 6, 8)),
    "densenet16": lambda: densenet_bc(16, CLASSES, (3, SIDE, SIDE), growth=4),
    "densenet22": lambda: densenet_bc(22, CLASSES, (3, SIDE, SIDE), growth=6),
    "resnet14 w4a4": lambda: in_bits(cifar_resnet(14, CLASSES, (3, SIDE, SIDE), widths=(4, 6, 8)), 4, 4),
    "densenet16 w4a4": lambda: in_bits(densenet_bc(16, CLASSES, (3, SIDE, SIDE), growth=4), 4, 3),
}
FULL_PRECISION = [name for name in CHAINS if "w4a4" not in name]


def blocks_of(chain: Chain) -> list[Any]:
    return list(chain.blocks)


def images_of(seed: int, count: int) -> Tensor:
    """Images unlike each other, or all would skip the same."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return noise * torch.linspace(0.2, 2, count)[:, None, None, None] + 2 * torch.randn(
        count, 3, 1, 1, generator=generator
    )


@torch.no_grad()
def lively(network: EarlyExitNetwork, seed: int = 0) -> EarlyExitNetwork:
    """BatchNorm statistics of random images, and gates that decide about half of what they are asked both ways."""
    torch.manual_seed(seed)
    images = images_of(seed, 32)
    stirred(network)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    gates: Any = network.gating
    for part in gates.modules():
        if isinstance(part, nn.LSTMCell):
            for name, weight in part.named_parameters():
                weight.normal_(0, 1.5 if name.startswith("weight") else 0.5)
        if isinstance(part, nn.Linear):
            part.weight.normal_(0, 2)
    network.train()
    network.gated(images)
    network.eval()
    for norm in norms:
        norm.momentum = 0.1
    entered = features(network, images)
    if isinstance(gates.layer, RecurrentGate):  # its outputs are the same unit for all blocks
        scores = sequence(gates.layer, entered, [1] * len(entered))
        gates.layer.decides["1"].bias -= torch.cat(scores).median()
    if isinstance(gates.channel, nn.ModuleList):
        for gate, x in zip(gates.channel, entered, strict=True):
            scores = gate(x)
            gate[-1].weight /= scores.std()
            gate[-1].bias.copy_((gate[-1].bias - scores.median(0).values) / scores.std())
    return network


def gated_network(
    name: str, design: str, mask: str = "output", taps: Sequence[int] = (), seed: int = 0
) -> EarlyExitNetwork:
    torch.manual_seed(seed)
    chain = CHAINS[name]()
    return lively(with_exits(chain, taps, light, gating=gating(chain, *DESIGNS[design], mask)), seed)


@torch.no_grad()
def features(network: EarlyExitNetwork, images: Tensor) -> list[Tensor]:
    """What each block takes in when all of them run whole."""
    x, entered = network.chain.stem(images), []
    for block in blocks_of(network.chain):
        entered.append(block.enter(x))
        x = block(x)
    return entered


def sequence(gate: RecurrentGate, entered: Sequence[Tensor], outputs: Sequence[int]) -> list[Tensor]:
    """Fig. 2a: average pool, 1x1 convolution, LSTM, FC, layer by layer."""
    projections: Any = gate.projections
    pooled = [projections[str(x.shape[1])](F.adaptive_avg_pool2d(x, 1)).flatten(1) for x in entered]
    hidden, state = [], None
    for x in pooled:
        state = gate.lstm(x, state)
        hidden.append(state[0])
    return [gate.decides[str(k)](h) for h, k in zip(hidden, outputs, strict=True)]


@torch.no_grad()
def opened(network: EarlyExitNetwork, bias: float = 1e4) -> EarlyExitNetwork:
    """Every gate open, whatever it sees."""
    gates: Any = network.gating
    for gate in (gates.layer, gates.channel):
        last: list[Any] = []
        if isinstance(gate, RecurrentGate):
            last = list(gate.decides.values())
        elif gate is not None:
            last = [part[-1] for part in gate]
        for fc in last:
            fc.bias.fill_(bias)
    return network


def drawn_mask(data: st.DataObject, *shape: int) -> Tensor:
    count = int(torch.Size(shape).numel())
    return torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))).float().view(shape)


BLOCKS: dict[str, Callable[[], Skippable]] = {
    "identity": lambda: basic_block(4, 4),
    "option A": lambda: basic_block(4, 6, 2),
    "option B": lambda: basic_block(4, 6, 2, "B"),
    "w4a4": lambda: basic_block(4, 4).quantized(4, 4),
    "w4a4 closing": lambda: basic_block(4, 6, 2).quantized(4, 4, closes=True),
    "dense": lambda: DenseLayer(bottleneck_layer(8, 3), 8, 8, 3, None),
    "dense after a transition": lambda: DenseLayer(bottleneck_layer(4, 3), 8, 4, 3, transition_layer(8, 4)),
    "dense w4a4": lambda: DenseLayer(bottleneck_layer(8, 3), 8, 8, 3, None).quantized(4, 4),
}


def reference(block: Any, x: Tensor, layer: Tensor, channel: Tensor, inner: bool) -> Tensor:
    """Equation 3 with F_{i-1} in the form that the block gives when it is skipped, or Fig. 3."""
    g = (layer[:, None] * channel)[:, :, None, None]
    if isinstance(block, DenseLayer):
        x = block.transition(x)
        return torch.cat([x, g * block.layer(x) + (1 - g) * x[:, -block.gate_channels :]], 1)
    close = F.relu if block.closing is None else block.closing
    branch = block.branch(x)
    if inner:
        conv1, norm1, relu, conv2, norm2 = block.branch
        branch = norm2(conv2(relu(norm1(conv1(x))) * g))
    return g * close(branch + block.shortcut(x)) + (1 - g) * close(block.shortcut(x))


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_gated_block_is_equation_3(name: str, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    block: Any = stirred(BLOCKS[name]())
    x = torch.rand(3, block.in_channels, 6, 6)
    layer, channel = drawn_mask(data, 3), drawn_mask(data, 3, block.gate_channels)
    inner = name in ("identity", "option A", "option B") and data.draw(st.booleans())
    with torch.no_grad():
        entered = block.enter(x)
        whole, ones = block(x), torch.ones_like(channel)
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(whole, reference(block, x, torch.ones(3), ones, False), **close)
        for gates, expected in (
            (Gates(layer), reference(block, x, layer, ones, False)),  # equation 1
            (Gates(None, channel, inner), reference(block, x, torch.ones(3), channel, inner)),  # equation 2
            (Gates(layer, channel, inner), reference(block, x, layer, channel, inner)),  # equation 3
        ):
            torch.testing.assert_close(block(x, gates), expected, **close)
        # and as it is executed
        skipped = reference(block, x, torch.zeros(3), ones, False)
        torch.testing.assert_close(block.skipped(block.enter(x)), skipped, **close)
        rows = layer.nonzero()[:, 0]
        if len(rows):
            some = entered[rows]
            got = block.for_some(entered.clone(), some, rows, Gates(None, channel[rows], inner))
            torch.testing.assert_close(got, reference(block, x, layer, channel, inner), **close)
        for i in range(3):
            if channel[i].any():
                got = block.with_channels(entered[i : i + 1], channel[i].nonzero()[:, 0], inner)
                expected = reference(block, x, torch.ones(3), channel, inner)[i : i + 1]
                torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("bits", [4, 32])
def test_blocks_are_executed_in_bf16_too(bits: int) -> None:
    """A block in few bits adds fp32 to a shortcut in bf16."""
    for make in (lambda: basic_block(4, 4), lambda: DenseLayer(bottleneck_layer(8, 3), 8, 8, 3, None)):
        block: Any = make()
        block = stirred(block if bits == 32 else block.quantized(bits, bits))
        entered = torch.rand(3, block.in_channels, 6, 6).bfloat16()
        rows, mask = torch.tensor([0, 2]), (torch.arange(block.gate_channels) % 2).float()
        layer = torch.tensor([1.0, 0.0, 1.0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = block.gated(entered, Gates(layer, mask.expand(3, -1)))
            some = entered[rows]
            got = block.for_some(entered.clone(), some, rows, Gates(None, mask.expand(2, -1)))
            torch.testing.assert_close(got.float(), expected.float(), atol=0.05, rtol=0.05)
            alone = block.with_channels(entered[:1].clone(), mask.nonzero()[:, 0])
            torch.testing.assert_close(alone.float(), expected[:1].float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("design", DESIGNS)
def test_open_gates_change_nothing(name: str, design: str) -> None:
    network = opened(gated_network(name, design, taps=(1, 3)))
    x = images_of(1, 6)
    with torch.no_grad():
        said = network.gated(x)
        for ours, whole in zip(said.logits, network.without_gates()(x), strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
        for ours, whole in zip(network(x), network.ungated(x), strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    assert (said.decisions.runs == 1).all()
    channels = torch.tensor([block.gate_channels for block in blocks_of(network.chain)])
    assert (said.decisions.channels == channels[:, None]).all()


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("design", DESIGNS)
def test_the_networks_of_these_tests_skip_and_run(name: str, design: str) -> None:
    network = gated_network(name, design)
    decided = network.gated(images_of(2, 16)).decisions
    layer, channel = DESIGNS[design]
    whole = torch.tensor([block.gate_channels for block in blocks_of(network.chain)])[:, None]
    if layer:
        assert 0.2 < decided.runs.mean() < 0.8
        assert (decided.runs.mean(1) % 1 > 0).any()  # image by image
    if channel:
        assert 0.2 < (decided.channels / whole).mean() < 0.8
        assert (decided.channels.std(1) > 0).any()


@given(
    seed=st.integers(0, 99),
    widths=st.lists(st.sampled_from([3, 5, 8]), min_size=1, max_size=6),
    hidden=st.integers(1, 12),
    data=st.data(),
)
@settings(max_examples=30)
def test_a_recurrent_gate_is_torchs_lstm_over_the_sequence_of_blocks(
    seed: int, widths: list[int], hidden: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    outputs = [data.draw(st.sampled_from([1, 4])) for _ in widths]
    gate = RecurrentGate(widths, outputs, hidden)
    features = [torch.randn(3, width, 4, 2) for width in widths]
    state, folded = gate.start(3, features[0]), gate.folded()
    stepped = []
    for x, k in zip(features, outputs, strict=True):
        scores, state = gate.step(x, k, state, folded)
        stepped.append(scores)
    expected = sequence(gate, features, outputs)
    for ours, theirs in zip(stepped, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    # gradients are folded, too
    weights = list(gate.parameters())
    ours = torch.autograd.grad(torch.cat([s.flatten() for s in stepped]).square().sum(), weights)
    theirs = torch.autograd.grad(torch.cat([s.flatten() for s in expected]).square().sum(), weights)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    # what is counted is what is computed
    first = Unfolded(gate, widths[0], outputs[0])(features[0])
    torch.testing.assert_close(first, expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_the_layer_gate_sees_the_features_of_what_ran(name: str) -> None:
    network, x = gated_network(name, "mgl2s"), images_of(3, 5)
    blocks, entered = blocks_of(network.chain), []
    for block in blocks:
        block.gated = lambda e, gates, gated=block.gated: (entered.append(e), gated(e, gates))[1]
    with torch.no_grad():
        said = network.gated(x)
        scores = sequence(network.gating.layer, entered, [1] * len(blocks))
    for i, (layer, expected, runs) in enumerate(zip(said.scores[::2], scores, said.decisions.runs, strict=True)):
        torch.testing.assert_close(layer, expected[:, 0], atol=1e-4, rtol=1e-4)
        assert ((layer >= 0) == (runs == 1)).all()
        channel = network.gating.channel[i](entered[i])
        torch.testing.assert_close(said.scores[2 * i + 1], channel, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet14", "densenet22"])
def test_a_channel_lstm_goes_on_only_where_its_block_runs(name: str) -> None:
    network, x = gated_network(name, "both_rnn"), images_of(4, 6)
    blocks, entered = blocks_of(network.chain), []
    for block in blocks:
        block.gated = lambda e, gates, gated=block.gated: (entered.append(e), gated(e, gates))[1]
    with torch.no_grad():
        said = network.gated(x)
        runs = said.decisions.runs.bool()
        assert not runs.all()
        for n in range(len(x)):  # image by image, its own sequence of blocks
            ran = runs[:, n].nonzero()[:, 0].tolist()
            expected = sequence(
                network.gating.channel, [entered[i][n : n + 1] for i in ran], [blocks[i].gate_channels for i in ran]
            )
            for i, scores in zip(ran, expected, strict=True):
                torch.testing.assert_close(said.scores[2 * i + 1][n : n + 1], scores, atol=1e-4, rtol=1e-4)


def test_a_pass_goes_on_with_some_rows_and_comes_together_again() -> None:
    network, x = gated_network("resnet14", "both_rnn"), images_of(5, 7)
    entered = features(network, x)
    outputs = [block.gate_channels for block in blocks_of(network.chain)]

    def steps(gates: GatePass, entered: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        return [score for i in range(start, stop) for score in gates.scores(i, entered[i], outputs[i])]

    whole = GatePass(network.gating, 7, x)
    before = steps(whole, entered, 0, 3)
    spans = (slice(0, 2), slice(2, 7))
    parts = [whole.part(span) for span in spans]
    apart = [steps(part, [e[span] for e in entered], 3, 5) for part, span in zip(parts, spans, strict=True)]
    together = GatePass(network.gating, 7, x)
    steps(together, entered, 0, 3)
    expected = steps(together, entered, 3, 5)
    for ours, theirs in zip(map(torch.cat, zip(*apart, strict=True)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(before) == 6
    whole.rejoin(parts)
    kept = torch.tensor([5, 1])
    whole.keep(kept)
    ours, theirs = steps(whole, [e[kept] for e in entered], 5, 6), steps(together, entered, 5, 6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b[kept])
    # rows that do not run the block keep their state
    state = tuple(part.clone() for part in together.channel_state)
    rows = torch.tensor([0, 3])
    scores = together.channels(5, entered[5][rows], outputs[5], rows)
    expected_scores, (hidden, cell) = network.gating.channel.step(
        entered[5][rows], outputs[5], (state[0][rows], state[1][rows]), network.gating.channel.folded()
    )
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(together.channel_state[0][rows], hidden)
    torch.testing.assert_close(together.channel_state[1][rows], cell)
    others = torch.tensor([1, 2, 4, 5, 6])
    assert torch.equal(together.channel_state[0][others], state[0][others])


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_a_gate_is_0_or_1_and_passes_the_gradient_of_its_sigmoid(values: list[float]) -> None:
    scores = torch.tensor(values, requires_grad=True)
    gates = straight_through(scores)
    assert gates.tolist() == [float(value >= 0) for value in values]  # 0 and 1, with no rounding error left
    weights = torch.linspace(-2, 3, len(values))
    (ours,) = torch.autograd.grad((gates * weights).sum(), scores)
    (theirs,) = torch.autograd.grad((scores.sigmoid() * weights).sum(), scores)
    assert torch.equal(ours, theirs)


def test_gradients_reach_every_gate_and_the_backbone() -> None:
    for name, design in (("resnet8", "mgl2s"), ("densenet16", "both_rnn")):
        network = gated_network(name, design).train()
        said = network.gated(images_of(6, 8))
        (F.cross_entropy(said.logits[-1], torch.arange(8) % CLASSES) + said.decisions.channels.mean()).backward()
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None, parameter_name
            if "gating" in parameter_name and "norm" not in parameter_name:
                assert parameter.grad.isfinite().all(), parameter_name
        assert network.gating.layer.lstm.weight_hh.grad.abs().sum() > 0
        assert next(network.chain.parameters()).grad.abs().sum() > 0


def test_the_scores_of_the_warm_up_are_those_at_whole_blocks_and_pass_no_gradient_to_the_backbone() -> None:
    network, x = gated_network("resnet14", "mgl2s"), images_of(7, 4)
    entered, outputs = features(network, x), [1] * 6
    scores = network.gate_scores(x)
    layer = sequence(network.gating.layer, entered, outputs)
    for i in range(6):
        torch.testing.assert_close(scores[2 * i], layer[i][:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores[2 * i + 1], network.gating.channel[i](entered[i]), atol=1e-4, rtol=1e-4)
    torch.cat([score.flatten() for score in scores]).sum().backward()
    assert all(parameter.grad is None for parameter in network.chain.parameters())
    assert all(parameter.grad is not None for parameter in network.gating.parameters())


@pytest.mark.parametrize("design", [design for design in DESIGNS if DESIGNS[design][1] != "cnn"])
def test_decisions_of_recurrent_gates_do_not_hang_on_autocast(design: str) -> None:
    network = gated_network("resnet14", design)
    entered = [x.bfloat16() for x in features(network, images_of(8, 6))]
    outputs = [block.gate_channels for block in blocks_of(network.chain)]

    def scores(widened: bool) -> list[Tensor]:
        gates = GatePass(network.gating, 6, entered[0])
        return [s for i, x in enumerate(entered) for s in gates.scores(i, x.float() if widened else x, outputs[i])]

    with torch.no_grad():
        expected = scores(True)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = scores(False)
    for ours, theirs in zip(mixed, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def bottlenecks() -> Chain:
    return chain_of_resnet(ResNet(Bottleneck, [1, 1, 1, 1], CLASSES), (3, 64, 64))


NO_SHORTCUT = r"resnet or densenet, or another method"
REFUSED: dict[str, tuple[Callable[[], Chain], dict[str, Any], str]] = {
    "vgg": (lambda: vgg(16, 5, (3, 32, 32)), {}, NO_SHORTCUT),
    "alexnet": (lambda: alexnet(5, (3, 32, 32)), {}, NO_SHORTCUT),
    "layer": (CHAINS["resnet8"], {"layer": "cnn"}, r"method.gates.layer to be rnn, or null, got cnn"),
    "channel": (CHAINS["resnet8"], {"channel": "gru"}, r"method.gates.channel to be cnn or rnn, or null, got gru"),
    "mask": (CHAINS["resnet8"], {"mask": "input"}, r"method.gates.mask to be output or both, got input"),
    "hidden": (CHAINS["resnet8"], {"hidden": 0}, r"method.gates.hidden .* at least 1, got 0"),
    "half": (CHAINS["resnet8"], {"hidden": 2.5}, r"method.gates.hidden to be a whole number"),
    "dense": (CHAINS["densenet16"], {"mask": "both"}, r"method.gates.mask=both .* choose mask=output"),
    "few bits": (CHAINS["resnet14 w4a4"], {"mask": "both"}, r"method.gates.mask=both needs blocks in full precision"),
    "bottleneck": (
        bottlenecks,
        {"mask": "both"},
        r"method.gates.mask=both needs .* as wide as their output",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_gates_that_cannot_be_are_refused(case: str) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        gating(make(), **{"layer": "rnn", "channel": "cnn", **options})


def test_no_gates_are_none_and_a_network_without_has_nothing_to_say() -> None:
    chain = CHAINS["resnet8"]()
    assert gating(chain) is None
    assert gating(CHAINS["resnet8"](), mask="both", layer="rnn") is not None
    assert with_exits(chain, (), light, gating=gating(chain, "rnn")).without_gates().gating is None
    with pytest.raises(ValueError, match="Expected a network with gates, got one without"):
        with_exits(chain, (), light).gated(images_of(0, 2))


def test_a_bottleneck_is_gated_at_its_output() -> None:
    torch.manual_seed(0)
    chain = bottlenecks()
    gates = Gating(chain, "rnn", "cnn")
    block: Any = stirred(chain.blocks[0])
    x, mask = torch.rand(2, 64, 8, 8), (torch.rand(2, 256) > 0.5).float()
    with torch.no_grad():
        expected = reference(block, x, torch.ones(2), mask, False)
        torch.testing.assert_close(block(x, Gates(None, mask)), expected, atol=1e-5, rtol=1e-5)
        alone = block.with_channels(x[:1], mask[0].nonzero()[:, 0])
        torch.testing.assert_close(alone, expected[:1], atol=1e-5, rtol=1e-5)
    assert gates.channel[0](x).shape == (2, 256)


def test_multiplied_gives_its_decisions_block_by_block() -> None:
    network, x = gated_network("resnet8", "mgl2s"), images_of(9, 4)
    with torch.no_grad():
        said, feature = network.gated(x), network.chain.run(x, stop=0)
        way = Multiplied(network.gating, feature)
        for i, block in enumerate(blocks_of(network.chain)):
            feature = way.step(i, block, feature)
            assert torch.equal(way.decisions.runs, said.decisions.runs[: i + 1])
            assert torch.equal(way.decisions.channels, said.decisions.channels[: i + 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "design"),
    [("resnet8", "channel_cnn"), ("resnet8", "mgl2s"), ("densenet16", "both_rnn")],
)
def test_the_gated_training_forward_compiles_as_one_graph(name: str, design: str) -> None:
    network, x = gated_network(name, design, taps=(1,)).train(), images_of(10, 6)
    compiled = torch.compile(network.gated, fullgraph=True, backend="aot_eager")
    weights = list(network.parameters())
    results = []
    for forward in (network.gated, compiled):
        torch.manual_seed(0)
        said = forward(x)
        loss = said.logits[-1].square().sum() + said.logits[0].sum() + said.decisions.channels.sum()
        results.append((said.logits, said.decisions, torch.autograd.grad(loss, weights)))
    (logits, decided, grads), (logits_c, decided_c, grads_c) = results
    torch.testing.assert_close(logits_c, logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(decided_c, decided, strict=True))
    torch.testing.assert_close(grads_c, grads, atol=1e-3, rtol=1e-2)
