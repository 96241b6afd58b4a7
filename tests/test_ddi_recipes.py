"""The recipes of Dual Dynamic Inference: the paper's numbers, networks for large images, answers at any time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import train
from costs.network import network_costs
from inference.executor import Executor
from inference.policies import FixedExit, Never
from inference.thresholds import Confidence
from networks.early_exit_network import EarlyExitNetwork
from running.assembly import build_network, build_phases
from tests.cases import SMALL
from tests.conftest import composed
from tests.test_gates import gated_network, images_of


def network_of(*overrides: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> EarlyExitNetwork:
    return build_network(composed(*overrides), classes, shape)


@pytest.mark.parametrize(
    ("name", "mflops", "branches"),
    [
        ("resnet38", 166.0, None),
        ("resnet74", 335.9, (29.2, 85.8, 140.1, 196.7, 251.0, 307.6)),
        ("densenet100", 575.9, (60.3, 234.9, 421.3, 481.4, 548.4, 565.5)),
    ],
)
def test_the_cifar_recipes_are_the_papers(name: str, mflops: float, branches: tuple[float, ...] | None) -> None:
    cfg = composed(f"experiment=ddi/{name}_cifar10")
    network = build_network(cfg, 10, (3, 32, 32))
    costs = network_costs(network)
    assert 2e-6 * costs.plain == pytest.approx(mflops, abs=0.05)
    if branches is not None:
        plain = network_costs(network.without_gates())
        ends = [2e-6 * plain.until_tap[tap] for tap in network.taps]
        assert ends == pytest.approx(branches, abs=0.05)
    assert network.num_exits == 7
    assert (cfg.method.alpha, cfg.method.target_saving, cfg.dataset.batch_size) == (2e-4, None, 128)
    lengths = {phase.name: phase.epochs for phase in build_phases(cfg, network)}
    steps = math.ceil(45_000 / 128)
    assert lengths["iadi"] == lengths["radi"]
    assert lengths["iadi"] * steps == pytest.approx(50_000, rel=0.005)
    for phase in ("iadi", "radi"):
        assert cfg.method.phases[phase].optimizer.lr == 0.05
    assert (cfg.optimizer.momentum, cfg.optimizer.weight_decay, cfg.optimizer.nesterov) == (0.9, 1e-4, False)


def test_the_imagenet_recipe_is_the_papers() -> None:
    cfg = composed("experiment=ddi/densenet201_imagenet", "dataset.root=x")
    assert (cfg.method.alpha, cfg.method.target_saving, cfg.dataset.batch_size) == (4e-6, None, 512)
    assert cfg.backbone.weights == "DEFAULT"
    cfg.backbone.weights = None
    network = build_network(cfg, 1000, (3, 224, 224))
    assert [network.chain.info[tap - 1].stage for tap in network.taps] == [0, 2, 3]
    assert {phase.name: phase.epochs for phase in build_phases(cfg, network)} == {"warmup": 1, "iadi": 90, "radi": 90}
    other = composed("experiment=ddi/resnet101_imagenet", "dataset.root=x", "backbone.weights=null")
    skipnet = build_network(other, 1000, (3, 224, 224))
    assert {phase.name: phase.epochs for phase in build_phases(other, skipnet)} == {"skipnet": 90}
    assert skipnet.num_exits == 1
    assert skipnet.gating is not None
    assert skipnet.gating.channel is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phases"), [("densenet201", ("warmup", "iadi", "radi")), ("resnet101", ("skipnet",))])
def test_networks_for_large_images_skip(name: str, phases: tuple[str, ...], make_folder, tmp_path) -> None:
    command = composed(
        *SMALL, f"experiment=ddi/{name}_imagenet", f"dataset.root={make_folder(side=64)}", "backbone.weights=null",
        "dataset.batch_size=4", "dataset.eval_batch_size=4", "dataset.num_workers=0", "dataset.val_fraction=0.25",
        *(f"method.phases.{phase}.epochs=1" for phase in phases),
    )  # fmt: skip
    metrics = train.train(command, tmp_path / "run")
    assert 0 <= metrics["test/acc"] <= 1
    assert -0.2 < metrics["test/saving"] < 1


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("name", "design"), [("resnet14", "mgl2s"), ("densenet16", "layer_rnn")])
def test_one_pass_answers_at_every_exit(name: str, design: str, count: int) -> None:
    network, images = gated_network(name, design, taps=(1, 3)), images_of(4, 6)[-count:]
    answers = list(Executor(network, Never()).anytime(images))
    assert len(answers) == 3
    costs = network_costs(network)
    for k, answer in enumerate(answers, start=1):
        alone = Executor(network, FixedExit(k))(images)
        assert torch.equal(answer.label, alone.label)
        torch.testing.assert_close(answer.confidence, alone.confidence)
        assert torch.equal(answer.macs, alone.macs + int(sum(costs.heads[: k - 1])))  # every head on the way
        assert answer.exit.eq(k).all()


def test_what_follows_an_answer_is_not_computed() -> None:
    network = gated_network("resnet14", "layer_rnn", taps=(1, 3))
    ran: list[int] = []
    for i, block in enumerate(network.chain.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        original = block.enter
        block.enter = lambda x, i=i, original=original: (ran.append(i), original(x))[1]
    executor = Executor(network, Never())  # counts a copy
    ran.clear()
    next(executor.anytime(images_of(3, 2)))
    assert set(ran) == {0}


def test_exits_without_gates_answer_at_any_time_too() -> None:
    network = network_of("backbone=resnet8", "method=early_exit")
    images: Tensor = torch.randn(3, 3, 32, 32)
    executor = Executor(network, Confidence(0.5))
    with torch.inference_mode():
        logits = network(images)
    for answer, z in zip(executor.anytime(images), logits, strict=True):
        assert torch.equal(answer.label, z.argmax(1))
    assert executor.executed_macs == network_costs(network).leaving[-1]


@pytest.mark.parametrize("name", ["gates", "resource"])
def test_sweeps_start_from_one_base(name: str) -> None:
    cfg = composed(f"sweep={name}", "method.from_run=x")
    assert (cfg.method.name, cfg.method.from_run) == ("iadi", "x")
