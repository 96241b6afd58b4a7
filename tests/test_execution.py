"""Leaving early for real: executor, replay and a plain loop over samples agree, ties included; traces on disk."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from costs.network import NetworkCosts
from inference.budget import Budget
from inference.executor import Executor
from inference.policies import FixedExit, Never, Patience, Policy
from inference.replay import curve, replay
from inference.thresholds import Confidence, Entropy, Margin
from inference.trace import Trace, read_trace, record, write_trace
from inference.travel import Prediction
from networks.backbones.resnet import cifar_resnet
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.heads import light
from tests.conftest import stirred
from tests.tiny import tiny

SCORES: dict[str, Callable[[list[float]], float]] = {
    "confidence": max,
    "margin": lambda p: float(np.float32(sorted(p)[-1] - sorted(p)[-2])),
    "entropy": lambda p: -sum(x * math.log(x) for x in p if x > 0),
}
KINDS: dict[str, Any] = {"confidence": Confidence, "margin": Margin, "entropy": Entropy}
KINDS |= {"patience": Patience, "fixed": FixedExit, "never": lambda value: Never()}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Rule(NamedTuple):
    """A policy in the papers' words: what it compares, with what, and how many MACs a sample may cost."""

    kind: str
    value: Any
    budget: float

    def policy(self) -> Policy:
        inner = KINDS[self.kind](self.value)
        return inner if self.budget == math.inf else Budget(self.budget, None if self.kind == "never" else inner)

    def wants(self, k: int) -> bool:
        return k == self.value if self.kind == "fixed" else self.kind != "never"

    def leaves(self, k: int, seen: dict[int, Tensor]) -> bool:
        if self.kind == "patience":
            labels = [int(z.argmax()) for z in seen.values()]
            return len(labels) > self.value and len(set(labels[-self.value - 1 :])) == 1
        if self.kind not in SCORES:
            return self.wants(k)
        score = SCORES[self.kind](seen[k].softmax(0).tolist())
        return score < self.value[k - 1] if self.kind == "entropy" else score >= self.value[k - 1]


def walk(rule: Rule, costs: NetworkCosts, stops: Iterable[tuple[int, int, Callable[[], Tensor]]]) -> tuple:
    """One sample: label, confidence, exit, MACs, heads computed. A stop is MACs to it, MACs of its head, the head."""
    seen, last, spent = {}, len(costs.heads), 0
    for k, (segment, price, head) in enumerate(stops, 1):
        spent += segment
        further = [sum(costs.segments[k:j]) + costs.heads[j - 1] for j in range(k + 1, last + 1)]
        if k == last or spent + min(further) > rule.budget or (rule.wants(k) and spent + price <= rule.budget):
            seen[k], spent = head(), spent + price
            if k == last or spent + min(further) > rule.budget or rule.leaves(k, seen):
                break
    p = seen[k].softmax(0).tolist()
    return p.index(max(p)), max(p), k, spent, list(seen)


def stops(network: EarlyExitNetwork, costs: NetworkCosts, x: Tensor, temperatures: list[float]) -> Iterator[tuple]:
    x, segment, start = network.chain.stem(x[None]), costs.stem, 0
    ends, heads = (*network.taps, len(network.chain.blocks)), (*network.heads, network.chain.head)
    for end, price, head, temperature in zip(ends, costs.heads, heads, temperatures, strict=True):
        for block in network.chain.blocks[start:end]:
            x = block(x)
        yield segment + sum(costs.blocks[start:end]), price, lambda: head(x)[0].float() / temperature  # noqa: B023
        start, segment = end, 0


def same(seen: Prediction, walked: list[tuple]) -> None:
    labels, confidences, exits, macs, _ = map(list, zip(*walked, strict=True))
    assert [seen.label.tolist(), seen.exit.tolist(), seen.macs.tolist()] == [labels, exits, macs]
    assert seen.confidence.tolist() == pytest.approx(confidences, abs=1e-5)


def same_on_trace(rule: Rule, trace: Trace, walked: list[tuple]) -> None:
    outcome = replay(rule.policy(), trace)
    same(outcome.prediction, walked)
    assert outcome.heads.T.nonzero().tolist() == [[i, k - 1] for i, (*_, heads) in enumerate(walked) for k in heads]
    value = rule.value if isinstance(rule.value, list) else [rule.value] * (rule.kind != "never")
    point = curve(rule.policy(), torch.tensor([value], dtype=torch.float64), trace)
    right, exits = torch.tensor([label for label, *_ in walked]) == trace.labels, [exit for _, _, exit, *_ in walked]
    assert (point.accuracy, point.lost) == (right.double().mean(), (trace.correct[-1] & ~right).sum())
    macs, ptflops = outcome.prediction.macs, outcome.cost(trace, "ptflops")
    assert (point.costs["macs"], point.costs["ptflops"]) == (macs.double().mean(), ptflops.double().mean())
    assert macs.max() <= rule.budget
    assert point.shares[0].tolist() == [exits.count(k + 1) / len(exits) for k in range(trace.num_exits)]


def drawn_threshold(data: st.DataObject, kind: str, logits: Tensor, ties: bool) -> float:
    """Between two neighbouring scores, at least 1e-5 from either, or exactly at one."""
    scores = sorted(SCORES[kind](z.softmax(0).tolist()) for z in logits)
    if ties and kind != "entropy":
        return data.draw(st.sampled_from(scores))
    edges = [0.0, *scores, math.log(logits.shape[1]) + 1 if kind == "entropy" else 1.0]
    low, high = data.draw(st.sampled_from(list(pairwise(edges))))
    return (low + high) / 2 if high - low > 2e-5 else KINDS[kind].never


def drawn_rule(data: st.DataObject, trace: Trace, ties: bool) -> Rule:
    kind, value, costs, exits = data.draw(st.sampled_from(sorted(KINDS))), None, trace.costs["macs"], trace.num_exits
    if kind in SCORES:
        value = [drawn_threshold(data, kind, z, ties) for z in trace.logits[:-1]]
    elif kind != "never":
        value = data.draw(st.integers(1, exits if kind == "fixed" else max(1, exits - 1)))
    budgets = [*[math.inf] * exits, *costs.alone, *costs.leaving]
    budget = data.draw(st.sampled_from(budgets)) + data.draw(st.sampled_from([0, -1.0, 1.0]))
    return Rule(kind, value, max(min(costs.alone), budget))


def network_and_images(seed: int, taps: Sequence[int] = (1, 2), whole: bool = False) -> tuple[EarlyExitNetwork, Tensor]:
    """Exits of many minds about 17 images; exact in fp32 and bf16 with ``whole`` numbers."""
    torch.manual_seed(seed)
    chain = cifar_resnet(8, 5, (3, 8, 8)) if seed % 2 and not whole else tiny(5, (3, 8, 8))
    network = stirred(with_exits(chain, taps, light))
    images = (torch.randn(17, 3, 8, 8) + 3 * torch.randn(17, 3, 1, 1)).round()
    for parameter in network.parameters() if whole else ():
        parameter.data.sign_()
    with torch.no_grad():
        for z, head in zip(network(images), (*network.heads, chain.head), strict=True):
            scale = 2.0 ** round(math.log2(2 / max((z - z.mean(0)).std().item(), 0.01)))
            head[-1].weight *= scale
            head[-1].bias.copy_(scale * (head[-1].bias - z.mean(0).round()))
    return network, images


def rows_run(network: EarlyExitNetwork) -> Counter[str]:
    """Counts from now on how many samples go through each block and head."""
    ran: Counter[str] = Counter()
    for name, part in network.named_modules():
        if re.fullmatch(r".*(blocks|heads)\.\d|.*head", name):
            part.register_forward_pre_hook(lambda part, x, name=name: ran.update({name: len(x[0])}))
    return ran


@pytest.mark.parametrize("case", ["fp32", "fp32 ties", "bf16 ties", pytest.param("bf16 cuda", marks=NO_GPU)])
@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking would take minutes
@given(data=st.data(), seed=st.integers(0, 99), count=st.integers(1, 17))
def test_executor_replay_and_a_plain_loop_agree(case: str, data, seed: int, count: int) -> None:
    device, taps = "cuda" if "cuda" in case else "cpu", sorted(data.draw(st.sets(st.integers(1, 3))))
    network, images = network_and_images(seed, taps, whole=case != "fp32")
    network, images, labels = network.to(device), images[:count].to(device), torch.randint(0, 5, (count,))
    temperatures = [data.draw(st.sampled_from([0.5, 1.0, 4.0])) for _ in range(len(taps) + 1)]
    with torch.autocast(device, torch.bfloat16, "bf16" in case), torch.inference_mode():
        trace = record(network, zip(images.split(5), labels.split(5), strict=True)).tempered(temperatures)
        rule = drawn_rule(data, trace, "ties" in case)
        executor, costs = Executor(network, rule.policy(), temperatures), trace.costs["macs"]
        ran, executor.pieces = rows_run(network), [data.draw(st.integers(1, 18))] * len(executor.pieces)
        walked = [walk(rule, costs, stops(network, costs, image, temperatures)) for image in images]
        needed = Counter(ran)
        together = executor(images)
        assert ran == needed + needed  # nothing after a sample's exit, no head that its policy does not ask for
        alone = Prediction(*map(torch.cat, zip(*(executor(image[None]) for image in images), strict=True)))
        assert ran == needed + needed + needed
    same(together, walked)
    same(alone, walked)
    same_on_trace(rule, trace, walked)


LN2, MORE = float(np.float32(math.log(2))), 1 + 2.0**-23
TIES: dict[tuple, list[tuple]] = {
    (0.0, 0.0): [(Confidence(0.5), 1), (Confidence(0.5 * MORE), 2), (Margin(0.0), 1), (Margin(1e-9), 2),
                 (Entropy(LN2), 2), (Entropy(LN2 * MORE), 1)],
    (200.0, 0.0): [(Confidence(1.0), 1), (Confidence(math.inf), 2), (Margin(1.0), 1), (Margin(math.inf), 2),
                   (Entropy(0.0), 2), (Entropy(1e-30), 1)],
}  # fmt: skip


@pytest.mark.parametrize("logits", TIES)
def test_a_confidence_at_the_threshold_leaves_and_an_entropy_goes_on(logits) -> None:
    network = with_exits(tiny(2, (3, 8, 8)), [1], light)
    network.heads[0].register_forward_hook(lambda head, x, z: torch.tensor([logits]).expand_as(z))
    for (policy, exit), count in product(TIES[logits], (1, 5)):
        assert (Executor(network, policy)(torch.randn(count, 3, 8, 8)).exit == exit).all(), policy


def test_a_single_image_is_never_indexed(monkeypatch) -> None:
    network, images = network_and_images(0)
    executor = Executor(network, Confidence(0.9))
    for operation in ("index_select", "nonzero"):
        monkeypatch.setattr(Tensor, operation, lambda *arguments: pytest.fail("indexed"))
    assert len({executor(image[None]).exit.item() for image in images}) == 3
    with pytest.raises(pytest.fail.Exception, match="indexed"):
        executor(images)


@pytest.mark.parametrize("policy", [FixedExit, lambda k: Confidence(math.inf), lambda k: Patience(2)])
@pytest.mark.parametrize(("k", "bad"), [*product((1, 2, 3), (math.nan, math.inf))])
def test_an_exit_that_gives_no_numbers_is_named(policy: Callable[[int], Policy], k: int, bad: float) -> None:
    network, images = network_and_images(0)
    [*network.heads, network.chain.head][k - 1][-1].bias.data[0] = bad
    for run in (lambda: record(network, [(images, torch.arange(17))]), lambda: Executor(network, policy(k))(images)):
        with pytest.raises(ValueError, match=f"numbers from exit {k}, got NaN"):
            run()


REFUSED = {
    "Expected 2 thresholds, one for each early exit of 3 exits": [Margin([0.5]), Confidence([0.5] * 3)],
    "Expected policy.thresholds: one number, or 2": [Margin()],
    "confidence from 0 to 1 (or inf, never to leave there)": [Confidence([0.5, 1.1]), Confidence(math.nan)],
    "entropy from 0 to inf, got -0.1": [Entropy(-0.1)],
    "policy.patience from 1 to 2": [Patience(0), Patience(3), Budget(100, Patience())],
    "policy.exit to be an exit from 1 to 3": [FixedExit(0), FixedExit(4), FixedExit()],
    "a budget of at least 16 MACs": [Budget(15), Budget()],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_policy_that_does_not_fit_the_network_is_refused(message: str) -> None:
    for policy in REFUSED[message]:
        with pytest.raises(ValueError, match=re.escape(message)):
            policy.check(NetworkCosts("macs", 5, (10, 20, 30), (1, 2, 3), (1, 2)), 4)


def test_a_trace_comes_back_from_its_file_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    (network, images), labels, path = network_and_images(0), torch.arange(17) % 5, tmp_path / "trace"
    for empty in ([], [(images[:0], labels[:0])]):
        with pytest.raises(ValueError, match="the split is empty"):
            record(network, empty)
    write_trace(path, trace := record(network, [(images, labels, labels / 5)], ["difficulty"], {"seed": 3}))
    back, whole = read_trace(path), path.read_bytes()
    for part in ("logits", "labels", "segments", "heads", "extras"):
        torch.testing.assert_close(getattr(back, part), getattr(trace, part), rtol=0, atol=0)
    assert (back.costs, back.about, list(back.extras)) == (trace.costs, {"seed": 3}, ["difficulty"])
    assert [back.paid(name)[:, 4].tolist() for name in back.costs] == [list(c.leaving) for c in trace.costs.values()]
    for damaged in (*(whole[:n] for n in range(0, len(whole), 41)), b"\x80\x04}\x94."):  # a pickle
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Expected a trace .* got another file or a damaged one"):
            read_trace(path)
