"""Skipping for real: executor, replay and a plain loop over images agree, within budgets, and nothing more is run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from costs.network import network_costs
from inference import executor as execution
from inference.budget import Budget
from inference.executor import Executor
from inference.policies import FixedExit, Never, Policy
from inference.replay import replay
from inference.skips import closed_ratios, savings, skip_ratios
from inference.thresholds import Confidence
from inference.trace import Trace, read_trace, record, write_trace
from inference.travel import Prediction
from networks.backbones.resnet import basic_block
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.gate_designs import RecurrentGate
from networks.gates import Decisions, gating
from networks.heads import light
from networks.quantization import QuanConv
from tests.test_gates import CHAINS, DESIGNS, FULL_PRECISION, blocks_of, gated_network, images_of, lively, reference

POOL = 24  # images of a network
NEAR = 1e-5  # to a threshold, which rounding may cross
HIDDEN = 10


class Price(NamedTuple):
    """MACs of a block: what always runs, asking its gates, its convolutions in order."""

    rest: int
    layer: int
    channel: int
    convs: tuple[int, ...]
    channels: int
    inner: bool
    folded: tuple[int, int]  # what the gates take beyond that with their 1x1 convolution folded in
    few_bit: bool

    def layers(self, m: int) -> int:
        """With m channels open."""
        last, total = len(self.convs) - 1, 0
        for j, macs in enumerate(self.convs):
            fewer_outputs, fewer_inputs = j == last or self.inner, j == last and self.inner
            total += macs * m ** (fewer_outputs + fewer_inputs) // self.channels ** (fewer_outputs + fewer_inputs)
        return total if m else 0

    @property
    def whole(self) -> int:
        return self.rest + self.layer + self.channel + sum(self.convs)


class Seen(NamedTuple):
    """One image that goes the whole way: logits of every exit, its decisions, and how sure these are."""

    logits: list[Tensor]
    runs: list[bool]
    channels: list[int]
    margin: float


class Case(NamedTuple):
    network: EarlyExitNetwork
    images: Tensor
    seen: list[Seen]
    prices: list[Price]
    stem: int
    heads: list[int]
    trace: Trace

    @property
    def ends(self) -> list[int]:
        return [*self.network.taps, len(self.prices)]

    def block(self, n: int, i: int) -> int:
        price, seen = self.prices[i], self.seen[n]
        spent = price.rest + price.layer
        return spent + price.channel + price.layers(seen.channels[i]) if seen.runs[i] else spent

    def segments(self, n: int) -> list[int]:
        """What image n spends between exits."""
        return self._between([self.block(n, i) for i in range(len(self.prices))])

    @property
    def static(self) -> list[int]:
        return self._between([price.whole for price in self.prices])

    def _between(self, blocks: Sequence[int]) -> list[int]:
        sums = [sum(blocks[start:end]) for start, end in pairwise([0, *self.ends])]
        return [sums[0] + self.stem, *sums[1:]]

    def computed(self, n: int, k: int, alone: bool) -> int:
        """What is really computed of segment k, from 0, for image n: in a batch all channels of a block that runs."""
        total = self.stem if k == 0 else 0
        for i in range(*list(pairwise([0, *self.ends]))[k]):
            price, m = self.prices[i], self.seen[n].channels[i]
            total += price.rest + price.layer + price.folded[0]
            if self.seen[n].runs[i]:
                all_channels = not alone or (price.few_bit and m > 0)
                total += price.channel + price.folded[1] + price.layers(price.channels if all_channels else m)
        return total


def macs_of(module: nn.Module, x: Tensor) -> list[int]:
    """Of each convolution and FC layer in the order they run, one image: outputs times weights of each."""
    found: list[int] = []

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.conv.weight if isinstance(layer, QuanConv) else layer.weight
        found.append(output[0].numel() * weight[0].numel())

    hooks = [
        part.register_forward_hook(note)
        for part in module.modules()
        if isinstance(part, QuanConv | nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        module(x[:1])
    for hook in hooks:
        hook.remove()
    return found


def price_of(block: Any, gates: Any, i: int, x: Tensor) -> Price:
    entered = block.enter(x)
    c, k = entered.shape[1], block.gate_channels
    beside = block.transition if hasattr(block, "transition") else block.shortcut
    recurrent, folded = HIDDEN * c + 4 * HIDDEN * 2 * HIDDEN, 4 * HIDDEN * (c + HIDDEN) - HIDDEN * (c + 8 * HIDDEN)
    layer = recurrent + HIDDEN if gates.layer is not None else 0
    by_lstm = isinstance(gates.channel, RecurrentGate)
    channel = recurrent + HIDDEN * k if by_lstm else 0
    if gates.channel is not None and not by_lstm:
        channel = sum(macs_of(gates.channel[i], entered))
    convs = tuple(macs_of(block.layers, entered))
    few_bit = any(isinstance(part, QuanConv) for part in block.layers)
    beyond = (folded if gates.layer is not None else 0, folded if by_lstm else 0)
    return Price(sum(macs_of(beside, x)), layer, channel, convs, k, gates.inner, beyond, few_bit)


def asked(gate: RecurrentGate, entered: Tensor, outputs: int, state: Any) -> tuple[Tensor, Any]:
    projections: Any = gate.projections
    pooled = projections[str(entered.shape[1])](entered.mean((2, 3), keepdim=True)).flatten(1)
    state = gate.lstm(pooled, state)
    return gate.decides[str(outputs)](state[0])[0], state


@torch.no_grad()
def walk(network: EarlyExitNetwork, image: Tensor) -> Seen:
    """One image, everything computed and multiplied, as the paper's equations have it."""
    gates: Any = network.gating
    margins = [math.inf]
    hooks = [part.norm.register_forward_hook(near_a_level(part.act_bits, margins)) for part in few_bit(network)]
    x, heads = network.chain.stem(image[None]), dict(zip(network.taps, network.heads, strict=True))
    layer_state = channel_state = None
    seen = Seen([], [], [], 0)
    for i, block in enumerate(blocks_of(network.chain)):
        entered, k, runs, kept = block.enter(x), block.gate_channels, torch.ones(1), torch.ones(1, block.gate_channels)
        if gates.layer is not None:
            score, layer_state = asked(gates.layer, entered, 1, layer_state)
            margins.append(float(score.abs().min()))
            runs = (score >= 0).float()
        if runs.item() and gates.channel is not None:
            if isinstance(gates.channel, RecurrentGate):
                score, channel_state = asked(gates.channel, entered, k, channel_state)
            else:
                score = gates.channel[i](entered)[0]
            margins.append(float(score.abs().min()))
            kept = (score >= 0).float()[None]
        x = reference(block, x, runs, kept, gates.inner)
        seen.runs.append(bool(runs.item()))
        seen.channels.append(int(kept.sum()))
        if i + 1 in heads:
            seen.logits.append(heads[i + 1](x)[0])
    seen.logits.append(network.chain.head(x)[0])
    margins += [float((top := z.sort().values)[-1] - top[-2]) for z in seen.logits]  # the label, too
    for hook in hooks:
        hook.remove()
    return seen._replace(margin=min(margins))


def few_bit(network: EarlyExitNetwork) -> list[QuanConv]:
    return [part for part in network.modules() if isinstance(part, QuanConv)]


def near_a_level(bits: int, margins: list[float]) -> Callable[..., None]:
    def note(norm: nn.Module, inputs: Any, output: Tensor) -> None:
        steps = output[output.abs() < 1] * (2**bits - 1) / 2
        margins.append(float((steps - steps.round()).abs().min()))

    return note


@cache
def case(name: str, design: str, mask: str) -> Case:
    blocks = {"8": 3, "14": 6, "16": 6, "22": 9}[name.split()[0].removeprefix("resnet").removeprefix("densenet")]
    network = gated_network(name, design, mask, taps=(1, blocks // 2, blocks - 1) if blocks > 3 else (1, 2), seed=1)
    for head in (*network.heads, network.chain.head):
        [fc] = [part for part in head.modules() if isinstance(part, nn.Linear)]
        fc.weight.data *= 3  # exits of many minds
    images = images_of(11, 3 * POOL)
    seen = [walk(network, image) for image in images]
    sure = [n for n, one in enumerate(seen) if one.margin > NEAR][:POOL]
    assert len(sure) > POOL / 2
    images, seen = images[sure], [seen[n] for n in sure]
    prices, tap, shapes = [], network.chain.stem(images[:1]), []
    for i, block in enumerate(blocks_of(network.chain)):
        shapes.append(tap)
        prices.append(price_of(block, network.gating, i, tap))
        tap = block(tap).detach()
    feature = dict(enumerate([*shapes[1:], tap], start=1))
    heads = [sum(macs_of(h, feature[k])) for h, k in zip(network.heads, network.taps, strict=True)]
    heads.append(sum(macs_of(network.chain.head, tap)))
    labels = torch.arange(len(images)) % 5
    trace = record(network, zip(images.split(7), labels.split(7), strict=True))
    return Case(network, images, seen, prices, sum(macs_of(network.chain.stem, images)), heads, trace)


class Rule(NamedTuple):
    """What is compared with what, in the papers' words."""

    thresholds: list[float] | None = None
    budget: float = math.inf
    exit: int | None = None

    def policy(self) -> Policy:
        inner = None if self.thresholds is None else Confidence(self.thresholds)
        if self.exit is not None:
            return FixedExit(self.exit)
        return (inner or Never()) if self.budget == math.inf else Budget(self.budget, inner)


def expected(case: Case, rule: Rule, n: int) -> tuple[int, float, int, int, int, list[int]]:
    """Label, confidence, exit, MACs, MACs on the device and heads computed of image n."""
    spent, computed, last, device = 0, [], len(case.heads), 0
    static = case.static
    for k, (segment, head) in enumerate(zip(case.segments(n), case.heads, strict=True), start=1):
        device = spent if k == last else 0
        spent += segment
        further = [sum(static[k:j]) + case.heads[j - 1] for j in range(k + 1, last + 1)]

        def halts() -> bool:
            return k == last or spent + min(further) > rule.budget  # noqa: B023

        inner = rule.exit == k or (rule.thresholds is not None and spent + head <= rule.budget)
        if halts() or inner:
            spent += head
            computed.append(k)
            confidence = case.seen[n].logits[k - 1].softmax(0).max()
            sure = rule.thresholds is not None and k < last and confidence >= rule.thresholds[k - 1]
            if halts() or rule.exit == k or sure:
                break
    z = case.seen[n].logits[k - 1]
    return int(z.argmax()), float(z.softmax(0).max()), k, spent, device if k == last else spent, computed


def drawn_rule(data: st.DataObject, case: Case) -> Rule:
    kind = data.draw(st.sampled_from(["never", "fixed", "confidence", "budget", "both"]))
    exits = len(case.heads)
    if kind == "fixed":
        return Rule(exit=data.draw(st.integers(1, exits)))
    thresholds, budget = None, math.inf
    if kind in ("confidence", "both"):
        thresholds = []
        for k in range(exits - 1):
            scores = sorted(float(seen.logits[k].softmax(0).max()) for seen in case.seen)
            gaps = [(a + b) / 2 for a, b in pairwise([0.0, *scores, 1.0]) if b - a > 2 * NEAR]
            thresholds.append(data.draw(st.sampled_from([*gaps, math.inf])))
    if kind in ("budget", "both"):
        static, n = case.static, data.draw(st.integers(0, len(case.seen) - 1))
        alone = [sum(static[: k + 1]) + case.heads[k] for k in range(exits)]
        skipping = [sum(case.segments(n)[: k + 1]) + case.heads[k] for k in range(exits)]
        everything = [sum(static) + sum(case.heads)]
        budget = data.draw(st.sampled_from([*alone, *skipping, *everything])) + data.draw(st.sampled_from([-1, 0, 1]))
        budget = max(budget, min(alone))
    return Rule(thresholds, budget)


def same(seen: Prediction, walked: Sequence[tuple]) -> None:
    labels, confidences, exits, macs, device, _ = map(list, zip(*walked, strict=True))
    assert seen.exit.tolist() == exits
    assert seen.label.tolist() == labels
    assert seen.macs.tolist() == macs
    assert seen.device_macs.tolist() == device
    assert seen.confidence.tolist() == pytest.approx(confidences, abs=1e-4)


def really(case: Case, walked: Sequence[tuple], index: Sequence[int]) -> int:
    """MACs that are computed for these images together."""
    total = 0
    for k in range(len(case.heads)):
        there = [n for n, (_, _, exit, *_) in zip(index, walked, strict=True) if exit > k]
        total += sum(case.computed(n, k, alone=len(there) == 1) for n in there)
    return total + sum(case.heads[k - 1] for *_, heads in walked for k in heads)


FAST = [
    ("resnet8", "mgl2s", "both"), ("resnet8", "layer_rnn", "output"), ("resnet14", "mgl2s", "output"),
    ("resnet14", "both_rnn", "both"), ("densenet16", "mgl2s", "output"),
    ("densenet22", "both_rnn", "output"), ("resnet14 w4a4", "mgl2s", "output"),
    ("densenet16 w4a4", "both_rnn", "output"),
]  # fmt: skip
ALL = [(name, design, "output") for name in CHAINS for design in DESIGNS]
ALL += [(name, d, "both") for name in FULL_PRECISION if "resnet" in name for d in DESIGNS if d != "layer_rnn"]
SLOW = [pytest.param(*known, marks=pytest.mark.slow) for known in ALL if known not in FAST]


@pytest.mark.parametrize(("name", "design", "mask"), [*FAST, *SLOW])
@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_executor_replay_and_a_plain_loop_agree(name: str, design: str, mask: str, data: st.DataObject) -> None:
    known = case(name, design, mask)
    rule = drawn_rule(data, known)
    index = data.draw(st.lists(st.integers(0, len(known.seen) - 1), min_size=1, max_size=9))
    walked = [expected(known, rule, n) for n in index]
    images = known.images[index]
    before = images.clone()
    executor = Executor(known.network, rule.policy(), costs=known.trace.costs["macs"])
    executor.pieces = [data.draw(st.integers(1, 9)) for _ in executor.pieces]
    same(executor(images), walked)
    assert executor.executed_macs * len(index) == pytest.approx(really(known, walked, index), rel=1e-12)
    for n, one in zip(index, walked, strict=True):
        same(executor(known.images[n : n + 1]), [one])
        assert executor.executed_macs == pytest.approx(really(known, [one], [n]), rel=1e-12)
    outcome = replay(rule.policy(), known.trace.rows(torch.tensor(index)))
    same(outcome.prediction, walked)
    assert outcome.heads.T.nonzero().tolist() == [[i, k - 1] for i, (*_, heads) in enumerate(walked) for k in heads]
    assert outcome.prediction.macs.max() <= rule.budget
    assert torch.equal(images, before)


@pytest.mark.parametrize(("name", "design", "mask"), [*FAST, *SLOW])
def test_a_trace_holds_what_the_plain_loop_sees(name: str, design: str, mask: str) -> None:
    known = case(name, design, mask)
    trace = known.trace
    logits = torch.stack([torch.stack(seen.logits) for seen in known.seen], 1)
    torch.testing.assert_close(trace.logits, logits, atol=1e-4, rtol=1e-4)
    runs = torch.tensor([seen.runs for seen in known.seen]).T
    channels = torch.tensor([seen.channels for seen in known.seen]).T
    assert torch.equal(trace.decisions.runs, runs.long())
    assert torch.equal(trace.decisions.channels[runs], channels[runs])
    segments = torch.tensor([known.segments(n) for n in range(len(known.seen))]).T
    assert torch.equal(trace.segments["macs"], segments)
    # the shares that tables show
    whole = torch.tensor([price.channels for price in known.prices])
    assert skip_ratios(trace.decisions).tolist() == pytest.approx((~runs).double().mean(1).tolist())
    ratios = closed_ratios(trace.decisions, whole.tolist()).tolist()
    for i, ratio in enumerate(ratios):
        if runs[i].any():
            assert ratio == pytest.approx(1 - (channels[i][runs[i]] / whole[i]).double().mean().item())
        else:
            assert math.isnan(ratio)
    plain = known.stem + known.heads[-1] + sum(price.rest + sum(price.convs) for price in known.prices)
    spared = [1 - (sum(known.segments(n)) + known.heads[-1]) / plain for n in range(len(known.seen))]
    assert savings(trace).tolist() == pytest.approx(spared)


def test_a_trace_of_a_gated_network_comes_back_from_its_file(tmp_path) -> None:
    for path, trace in (
        (tmp_path / "gated", case("resnet14", "mgl2s", "output").trace),
        (tmp_path / "few bits", case("densenet16 w4a4", "both_rnn", "output").trace),
    ):
        write_trace(path, trace)
        back = read_trace(path)
        assert back.costs == trace.costs
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(back.decisions, trace.decisions, strict=True))
        assert torch.equal(back.segments["macs"], trace.segments["macs"])
        assert torch.equal(replay(Never(), back).prediction.macs, replay(Never(), trace).prediction.macs)
        index = torch.tensor([3, 1])
        assert torch.equal(back.rows(index).decisions.channels, trace.decisions.channels[:, index])


@pytest.mark.parametrize(("name", "design", "mask"), FAST)
def test_executed_macs_are_what_torch_counts(name: str, design: str, mask: str) -> None:
    """Multiplications that reach torch's kernels, less those of folding the weights once a call."""
    known = case(name, design, mask)
    gates: Any = known.network.gating
    recurrent = [gate for gate in (gates.layer, gates.channel) if isinstance(gate, RecurrentGate)]
    folding = sum(4 * HIDDEN * HIDDEN * int(width) for gate in recurrent for width in gate.projections)
    thresholds = [float(z.softmax(-1).amax(-1).median()) + NEAR for z in known.trace.logits[:-1]]
    for policy in (Never(), Confidence(thresholds)):
        executor = Executor(known.network, policy, costs=known.trace.costs["macs"])
        for images in (known.images[:7], *known.images[:4].split(1)):
            with FlopCounterMode(display=False) as counter:
                executor(images)
            flops = counter.get_total_flops() - 2 * folding
            assert 2 * executor.executed_macs * len(images) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize(("name", "design", "mask"), FAST)
def test_a_block_is_run_for_the_images_that_do_not_skip_it(name: str, design: str, mask: str) -> None:
    known = case(name, design, mask)
    ran: Counter[int] = Counter()
    blocks = blocks_of(known.network.chain)
    executor = Executor(known.network, Never(), costs=known.trace.costs["macs"])
    hooks = [
        block.layers[0].register_forward_pre_hook(lambda layer, x, i=i: ran.update({i: len(x[0])}))
        for i, block in enumerate(blocks)
    ]
    try:
        executor(known.images)
    finally:
        for hook in hooks:
            hook.remove()
    assert [ran[i] for i in range(len(blocks))] == known.trace.decisions.runs.sum(1).tolist()


@pytest.mark.parametrize(("name", "design", "mask"), FAST)
def test_pieces_that_fit_the_cache_change_nothing(name: str, design: str, mask: str, monkeypatch) -> None:
    known = case(name, design, mask)
    costs = known.trace.costs["macs"]
    rule = Rule([float(z.softmax(-1).amax(-1).median()) + NEAR for z in known.trace.logits[:-1]])
    whole = Executor(known.network, rule.policy(), costs=costs)
    assert min(whole.pieces) >= len(known.images)
    together, computed = whole(known.images), whole.executed_macs
    monkeypatch.setattr(execution, "CACHE", 1)
    for least in (1, 2, 5):
        monkeypatch.setattr(execution, "LEAST_PIECE", least)
        executor = Executor(known.network, rule.policy(), costs=costs)
        assert set(executor.pieces) == {2 * least}
        apart = executor(known.images)
        assert torch.equal(apart.exit, together.exit)
        assert torch.equal(apart.label, together.label)
        assert torch.equal(apart.macs, together.macs)
        assert apart.confidence.tolist() == pytest.approx(together.confidence.tolist(), abs=1e-4)
        assert executor.executed_macs == pytest.approx(computed, rel=1e-12)


@pytest.mark.parametrize(("design", "bits"), [("layer_rnn", 4), ("channel_cnn", 4), ("both_rnn", 4), ("mgl2s", 32)])
def test_images_are_never_overwritten(design: str, bits: int) -> None:
    """Even where the stem is nothing, and blocks of few bits write into what they take in."""
    torch.manual_seed(0)
    blocks: list[Any] = [basic_block(3, 3) for _ in range(3)]
    if bits < 32:
        blocks = [block.quantized(bits, bits, closes=i == 2) for i, block in enumerate(blocks)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    for stem in (nn.Identity(), nn.ReLU()):
        chain = Chain(stem, blocks, head, [3], (3, 8, 8), 5)
        network = lively(with_exits(chain, (1,), light, gating=gating(chain, *DESIGNS[design])))
        images = images_of(12, 9).abs()
        before = images.clone()
        seen = [walk(network, image) for image in images]
        for policy in (Never(), Confidence(0.5)):
            executor = Executor(network, policy)
            for pieces in (9, 2):
                executor.pieces = [pieces] * 2
                together = executor(images)
                assert torch.equal(images, before)
                if isinstance(policy, Never):
                    sure = [n for n, one in enumerate(seen) if one.margin > NEAR]
                    assert sure
                    expected = [float(seen[n].logits[-1].softmax(0).max()) for n in sure]
                    assert together.confidence[sure].tolist() == pytest.approx(expected, abs=1e-4)
            for n in range(len(images)):
                executor(images[n : n + 1])
            assert torch.equal(images, before)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("name", "design", "mask"), [("resnet14", "mgl2s", "output"), ("densenet22", "both_rnn", "output")]
)
@settings(max_examples=12)
@given(share=st.floats(0, 1))
def test_no_image_ever_spends_more_than_a_budget(name, design, mask, within: bool, share: float) -> None:
    known = case(name, design, mask)
    alone = [sum(known.static[: k + 1]) + head for k, head in enumerate(known.heads)]
    budget = alone[0] + share * (sum(known.static) + sum(known.heads) - alone[0])
    policy = Budget(budget, Confidence(0.7) if within else None)
    outcome = replay(policy, known.trace).prediction
    assert outcome.macs.max() <= budget
    executor = Executor(known.network, policy, costs=known.trace.costs["macs"])
    assert executor(known.images[:5]).macs.max() <= budget
    # what was skipped goes on: with gates nobody halts before the exit of the static costs
    fits = max(k for k, cost in enumerate(alone, start=1) if cost <= budget)
    if not within:
        assert outcome.exit.min() >= fits


@pytest.mark.parametrize(
    ("name", "design"),
    [
        ("resnet14", "mgl2s"),
        ("densenet16", "both_rnn"),
        ("resnet14 w4a4", "mgl2s"),
        ("densenet16 w4a4", "both_rnn"),
    ],
)
def test_gates_skip_in_bf16_too(name: str, design: str) -> None:
    network = case(name, design, "output").network
    images = images_of(13, 8)
    executor = Executor(network, Never(), costs=network_costs(network))
    with torch.autocast("cpu", torch.bfloat16):
        together = executor(images)
        alone = [executor(image[None]) for image in images]
    # decisions and scores may differ by rounding; that they are answers at all does not
    assert together.macs.shape == (8,)
    assert all(0 < float(one.confidence) <= 1 for one in alone)


def test_decisions_of_a_pass_under_dropped_images_go_on_with_their_own_state() -> None:
    """Images that leave take their gates' state with them; the others' decisions are those of a batch of their own."""
    known = case("resnet14", "both_rnn", "both")
    executor = Executor(known.network, Confidence([0.0, 1.0, 1.0]), costs=known.trace.costs["macs"])
    assert (executor(known.images).exit == 1).all()
    scores = [float(seen.logits[0].softmax(0).max()) for seen in known.seen]
    middle = sorted(scores)[len(scores) // 2] - NEAR
    rule = Rule([middle, math.inf, math.inf])
    index = list(range(len(known.seen)))
    executor = Executor(known.network, rule.policy(), costs=known.trace.costs["macs"])
    walked = [expected(known, rule, n) for n in index]
    assert {exit for _, _, exit, *_ in walked} == {1, 4}
    same(executor(known.images), walked)


def test_decisions_are_those_of_the_network() -> None:
    known = case("densenet16", "mgl2s", "output")
    with torch.no_grad():
        decided: Decisions = known.network.gated(known.images).decisions
    assert torch.equal(decided.runs.long(), known.trace.decisions.runs)
