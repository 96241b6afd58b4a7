"""Training of gates: what stays as it is, losses by hand, a target that is met, runs that others start from."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import train
from costs.network import network_costs
from datamodules.image_data import ImageData
from inference.trace import as_decided
from lightning_modules.pressure import Pressure
from lightning_modules.skipping import IADI, RADI, WarmUp
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.gates import gating
from networks.heads import light
from running.assembly import build_network, build_phases
from running.command_line import Refused
from running.earlier_run import load_weights
from running.phases import Training
from storage.run_directory import RunDirectory
from tests.cases import SMALL
from tests.conftest import composed, stirred
from tests.test_gated_costs import LEVELS, by_hand, case
from tests.test_gates import CHAINS, CLASSES, DESIGNS, blocks_of, gated_network, images_of
from tests.test_runs import Interrupted, run, same, timeless, weights_of

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def loader(n: int = 40, batch: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(images_of(0, n), torch.arange(n) % CLASSES), batch_size=batch)


def unlogged(module: Any) -> Any:
    module.log = lambda *arguments, **options: None  # there is no trainer
    return module


@pytest.mark.parametrize(("name", "design"), [("resnet8", "mgl2s"), ("densenet16", "both_rnn")])
def test_the_warm_up_opens_all_gates_and_changes_nothing_else(name: str, design: str) -> None:
    chain = CHAINS[name]()
    network = with_exits(chain, (1,), light, gating=gating(chain, *DESIGNS[design]))
    stirred(network.chain)
    images = images_of(0, 40)
    with torch.no_grad():
        for parameter_name, parameter in network.gating.named_parameters():
            if parameter_name.endswith("bias") and "lstm" not in parameter_name:
                parameter -= 0.3  # closed to begin with
        assert network.gated(images).decisions.runs.mean() < 1
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trainer(25).fit(WarmUp(network, make_optimizer=SGD), loader(), loader(16))
    for key, value in network.state_dict().items():
        if not key.startswith("gating."):
            assert torch.equal(value, before[key]), key
    network.eval()
    with torch.no_grad():
        said = network.gated(images)
    assert (said.decisions.runs == 1).all()
    whole = torch.tensor([[block.gate_channels] for block in blocks_of(chain)])
    assert (said.decisions.channels == whole).all()
    assert min(float(score.detach().min()) for score in said.scores) > 0.3  # and not by a hair


def used(name: str, design: str, mask: str, decisions: Any, price: str) -> float:
    """What an image costs on average up to the backbone's own head, block by block."""
    costs, decisions = case(name, design, mask)[1][price], as_decided(decisions)
    total = 0.0
    for n in range(decisions.runs.shape[1]):
        total += costs.stem + costs.heads[-1]
        for i in range(len(decisions.runs)):
            runs, channels = int(decisions.runs[i, n]), int(decisions.channels[i, n])
            total += by_hand(name, design, mask, i, bool(runs), channels if runs else 0, price)
    return total / decisions.runs.shape[1]


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return -sum(math.log(z.softmax(0)[y].item()) for z, y in zip(logits, labels.tolist(), strict=True)) / len(labels)


@pytest.mark.parametrize("resource", ["macs", "energy"])
@pytest.mark.parametrize(
    ("name", "design", "mask"),
    [("resnet8", "mgl2s", "output"), ("resnet8", "mgl2s", "both"), ("densenet16", "channel_rnn", "output")],
)
@pytest.mark.parametrize("objective", [IADI, RADI])
def test_the_losses_are_equations_4_and_5(objective, name: str, design: str, mask: str, resource: str) -> None:
    network, images, labels = gated_network(name, design, mask, taps=(1, 2)), images_of(1, 8), torch.arange(8) % CLASSES
    alpha = 0.5
    module = unlogged(objective(network, alpha=alpha, resource=resource, chip=LEVELS, make_optimizer=SGD))
    module.on_train_epoch_start()
    said = module.logits(images)
    assert said.decisions.channels.std() > 0
    loss = module.loss(said, labels)
    counted = case(name, design, mask)[1]
    mflops = 2e-6 * used(name, design, mask, said.decisions, "macs")
    energy = counted["macs"].plain, used(name, design, mask, said.decisions, "levels") / counted["levels"].plain
    cost = mflops if resource == "macs" else 2e-6 * energy[0] * energy[1]
    exits = said.logits if objective is RADI else said.logits[-1:]
    assert len(exits) == (3 if objective is RADI else 1)
    expected = sum(cross_entropy(z, labels) for z in exits) + alpha * cost
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # alpha E is more than rounding, and its gradient reaches the gates alone where the rest of the loss is nothing
    assert alpha * cost > 1e-3
    spent = module.used(module.logits(images).decisions)
    for score in ("layer", "channel"):
        part = getattr(network.gating, score)
        if part is not None:
            grads = torch.autograd.grad(spent, list(part.parameters()), retain_graph=True, allow_unused=True)
            assert sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0


def test_a_target_weighs_what_is_used_by_the_pressure() -> None:
    network, images, labels = gated_network("resnet8", "mgl2s"), images_of(2, 8), torch.arange(8) % CLASSES
    module = unlogged(IADI(network, target_saving=0.9, make_optimizer=SGD))
    pressure = copy.deepcopy(module.pressure)
    said = module.logits(images)
    share = used("resnet8", "mgl2s", "output", said.decisions, "macs") / module.costs.plain
    weight = pressure(torch.tensor(1 - share), 1.0)  # without a trainer the phase is at its end
    assert weight > 0
    expected = cross_entropy(said.logits[-1], labels) + weight.item() * share
    assert module.loss(said, labels).item() == pytest.approx(expected, rel=1e-4)


def test_only_what_a_phase_trains_moves() -> None:
    for objective, moved in ((IADI, {"chain", "gating"}), (RADI, {"chain", "gating", "heads"})):
        network = gated_network("resnet8", "mgl2s", taps=(1,))
        before = {name: value.clone() for name, value in network.state_dict().items()}
        trainer(2).fit(objective(network, target_saving=0.5, make_optimizer=SGD), loader(), loader(16))
        changed = {
            name.partition(".")[0] for name, v in network.state_dict().items() if not torch.equal(v, before[name])
        }
        assert changed == moved


class Plant:
    """Saves the more the more it is pressed, with a lag, noise from batch to batch, and gates' cost when not at all."""

    def __init__(self, half: float, lag: float, noise: float, seed: int, overhead: float = 0.13, offset: float = 0.0):
        self.half, self.lag, self.noise, self.overhead, self.offset = half, lag, noise, overhead, offset
        self.state = -overhead
        self.generator = torch.Generator().manual_seed(seed)

    def pressed(self, weight: float) -> None:
        share = max(weight, 0.0) / (max(weight, 0.0) + self.half)
        self.state += self.lag * ((1 + self.overhead) * share - self.overhead - self.state)

    @property
    def saving(self) -> Tensor:
        return torch.tensor(self.state) + self.noise * torch.randn((), generator=self.generator)


def settled(plant: Plant, target: float, steps: int, evaluations: int = 0) -> float:
    """The plant's saving, as evaluation sees it, over the last tenth of the steps."""
    pressure, kept = Pressure(target), []
    for step in range(steps):
        plant.pressed(float(pressure(plant.saving, step / steps)))
        if evaluations and (step + 1) % (steps // evaluations) == 0:
            pressure.correct(torch.tensor(plant.state - plant.offset))
        if step >= 0.9 * steps:
            kept.append(plant.state - plant.offset)
    return sum(kept) / len(kept)


@settings(max_examples=12)
@given(
    target=st.floats(0.1, 0.75),
    half=st.floats(0.03, 0.25),  # of the weight of a whole network, next to a cross-entropy below 1
    lag=st.floats(0.03, 0.2),
    noise=st.floats(0, 0.03),
    steps=st.sampled_from([400, 1000]),
    seed=st.integers(0, 99),
)
def test_the_pressure_meets_its_target(target, half, lag, noise, steps, seed) -> None:
    assert settled(Plant(half, lag, noise, seed), target, steps) == pytest.approx(target, abs=0.03)


@settings(max_examples=6)
@given(offset=st.floats(-0.1, 0.1), target=st.floats(0.2, 0.7), seed=st.integers(0, 99))
def test_the_target_is_that_of_evaluation(offset: float, target: float, seed: int) -> None:
    plant = Plant(0.15, 0.1, 0.02, seed, offset=offset)
    assert settled(plant, target, 1000, evaluations=20) == pytest.approx(target, abs=0.03)
    uncorrected = settled(Plant(0.15, 0.1, 0.02, seed, offset=offset), target, 1000)
    assert uncorrected == pytest.approx(target - offset, abs=0.03)


@pytest.mark.parametrize("target", [1, -0.1, math.nan, True, "half"])
def test_a_target_that_cannot_be_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=r"method.target_saving from 0 to below 1, or null"):
        Pressure(target)


ALPHA = r"method.alpha to be a number of at least 0, got"
TARGET = r"method.target_saving from 0 to below 1, or null, got"
RESOURCE = r"method.resource to be macs, or energy with an energy model, got"
REFUSED = {
    "method=iadi method.alpha=-1": rf"{ALPHA} -1",
    "method=ddi method.alpha=high": rf"{ALPHA} high",
    "method=skipnet method.alpha=true": rf"{ALPHA} True",
    "method=iadi method.target_saving=1": rf"{TARGET} 1",
    "method=skipnet method.target_saving=-0.5": rf"{TARGET} -0.5",
    "method=ddi method.target_saving=half": rf"{TARGET} half",
    "method=iadi method.resource=flops": rf"{RESOURCE} flops",
    "method=iadi method.resource=energy ~energy": rf"{RESOURCE} energy",
    "method=iadi method.phases.warmup.objective.margin=0": r"warm-up's margin above 0, got 0",
    "method=iadi method.phases.warmup.objective.margin=wide": r"the warm-up's margin above 0, got wide",
    "method=iadi method/gates=none": r"Expected gates to train, there are none; choose method/gates=mgl2s",
    "method=iadi method.gates.layer=gru": r"method.gates.layer to be rnn, or null, got gru",
    "method=iadi method.gates.channel=mlp": r"method.gates.channel to be cnn or rnn, or null, got mlp",
    "method=iadi method.gates.mask=input": r"method.gates.mask to be output or both, got input",
    "method=iadi method.gates.hidden=0": r"method.gates.hidden to be a whole number of at least 1, got 0",
    "method=ddi backbone=vgg16_bn": r"choose a resnet or densenet, or another method",
    "method=iadi backbone=alexnet": r"choose a resnet or densenet, or another method",
    "method=iadi backbone=densenet76 method.gates.mask=both": r"method.gates.mask=both needs blocks in full precision",
    "method=iadi precision=w4a4 method.gates.mask=both": r"method.gates.mask=both needs blocks in full precision",
    "method=plain method/gates=mgl2s": r"No phase of the method trains the gates; choose method=ddi, iadi or skipnet",
    "method=ddi method.phases.radi=null": r"No phase of the method trains exit 1",
    "method=ddi method.budget=1000": r"Expected a budget of at least [0-9,]+ MACs, what one exit costs, got 1000",
    "method=ddi method.from_run=/nowhere": r"method.from_run to be the directory of a finished run, got /nowhere",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_is_refused_before_data_is_read(command: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ImageData, "setup", lambda self, stage=None: pytest.fail("data was read"))
    overrides = command.split()
    if not any(part.startswith("backbone=") for part in overrides):
        overrides = ["backbone=resnet8", *overrides]
    with pytest.raises(Refused, match=REFUSED[command]) as refused:
        train.train(composed(*SMALL, *overrides), tmp_path / "run")
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run, and one of iadi."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("plain", "iadi"):
        train.train(composed(*SMALL, "backbone=resnet8", f"method={method}"), folder / method)
    return folder


def started(*overrides: str) -> tuple[EarlyExitNetwork, list[str]]:
    """The network that a run starts with, and its phases that train."""
    cfg = composed(*SMALL, "backbone=resnet8", *overrides)
    network = build_network(cfg, 10, (3, 32, 32))
    load_weights(cfg, network, RunDirectory("/nowhere"))
    return network, [phase.name for phase in build_phases(cfg, network) if isinstance(phase, Training)]


def held(network: EarlyExitNetwork, weights: dict[str, Tensor]) -> set[str]:
    """The parts whose tensors are all those of some weights."""
    own = network.state_dict()
    parts = {name.partition(".")[0] for name in own}
    return {
        part
        for part in parts
        if all(name in weights and torch.equal(own[name], weights[name]) for name in own if name.startswith(f"{part}."))
    }


@pytest.mark.parametrize(
    ("source", "overrides", "phases", "parts"),
    [
        ("plain", ["method=ddi"], ["warmup", "iadi", "radi"], {"chain"}),
        ("plain", ["method=iadi"], ["warmup", "iadi"], {"chain"}),
        ("plain", ["method=skipnet"], ["skipnet"], {"chain"}),
        ("plain", ["method=ddi", "method.gates.mask=both"], ["warmup", "iadi", "radi"], {"chain"}),
        ("iadi", ["method=ddi"], ["radi"], {"chain", "gating"}),
        ("iadi", ["method=ddi", "method/gates=layer_rnn"], ["warmup", "iadi", "radi"], {"chain"}),
        ("iadi", ["method=ddi", "method.gates.hidden=6"], ["warmup", "iadi", "radi"], {"chain"}),
    ],
)  # fmt: skip
def test_a_run_starts_from_another_and_leaves_out_what_that_has_done(source, overrides, phases, parts, runs) -> None:
    network, found = started(*overrides, f"method.from_run={runs / source}")
    assert found == phases
    weights = weights_of(runs / source)
    assert held(network, weights) == parts
    alone, everything = started(*overrides)
    assert len(everything) > len(phases)
    assert not held(alone, weights)


def test_iadi_goes_on_from_a_run_with_the_same_gates(runs: Path, tmp_path) -> None:
    run(tmp_path, "backbone=resnet8", "method=iadi", f"method.from_run={runs / 'iadi'}")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iadi.ckpt"]


def test_a_run_is_not_gone_on_with_when_what_it_started_from_is_gone(runs: Path, tmp_path) -> None:
    command = composed(*SMALL, "backbone=resnet8", "method=ddi", f"method.from_run={tmp_path / 'gone'}")
    with pytest.raises(Refused, match=r"method\.from_run to be the directory of a finished run"):
        train.train(command, tmp_path / "run")


def test_from_iadi_only_the_branches_are_left_to_train(runs: Path, tmp_path) -> None:
    metrics = run(tmp_path, "backbone=resnet8", "method=ddi", f"method.from_run={runs / 'iadi'}")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["radi.ckpt"]
    assert 0 <= metrics["test/exit_3/acc"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone=resnet14"], r"it has backbone.depth=8, backbone.name=resnet8: choose the same"),
        (["precision=w4a4"], r"it has precision.act_bits=32, precision.name=fp32"),
        (["dataset.val_fraction=0.2"], r"it has dataset.val_fraction=0.1"),
        (["weights=x"], r"weights or method.from_run to start from, got both"),
    ],
)
@pytest.mark.parametrize("source", ["plain", "iadi"])
def test_a_run_of_something_else_is_refused(source, overrides, message, runs: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ImageData, "setup", lambda self, stage=None: pytest.fail("data was read"))
    command = [*SMALL, "backbone=resnet8", "method=ddi", f"method.from_run={runs / source}", *overrides]
    with pytest.raises(Refused, match=message):
        train.train(composed(*command), tmp_path / "run")


LENGTHS = [f"method.phases.{phase}.epochs=1" for phase in ("pretrain", "warmup")]


@pytest.mark.parametrize(
    ("method", "options", "objective", "call"),
    [
        ("skipnet", ["epochs=6", "method.resource=energy"], "IADI", 3),  # in the middle of the second epoch
        pytest.param("iadi", [*LENGTHS, "method.phases.iadi.epochs=3"], "IADI", 3, marks=pytest.mark.slow),
        pytest.param("iadi", [*LENGTHS, "method.phases.iadi.epochs=3"], "IADI", 4, marks=pytest.mark.slow),
        pytest.param("ddi", ["epochs=8"], "RADI", 1, marks=pytest.mark.slow),
        pytest.param("iadi", [*LENGTHS, "method.phases.iadi.epochs=2"], "WarmUp", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_where_it_stopped(method, options, objective, call, tmp_path, monkeypatch) -> None:
    command = ["backbone=resnet8", f"method={method}", *options]
    whole = run(tmp_path / "whole", *command)
    stopping = {"IADI": IADI, "RADI": RADI, "WarmUp": WarmUp}[objective]
    original, calls = stopping.loss, iter(range(100))

    def stops(self, logits, targets):
        if type(self) is stopping and next(calls) == call:
            raise Interrupted
        return original(self, logits, targets)

    with monkeypatch.context() as patch:
        patch.setattr(stopping, "loss", stops)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", *command)
    assert run(tmp_path / "stopped", *command) == whole
    assert same(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole"))
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")


def test_a_run_reports_what_its_gates_skip(runs: Path) -> None:
    metrics = json.loads((runs / "iadi/metrics.json").read_text())
    assert {"test/saving", "test/energy_saving", "test/closed_ratio"} <= metrics.keys()
    ratios = [metrics[f"test/block_{i}/skip_ratio"] for i in (1, 2, 3)]
    assert metrics["test/skip_ratio"] == pytest.approx(sum(ratios) / 3)
    network, _ = started("method=iadi", f"method.from_run={runs / 'iadi'}")
    costs = network_costs(network)
    assert metrics["test/saving"] == pytest.approx(1 - metrics["test/macs"] / costs.plain)
    assert "test/saving" not in json.loads((runs / "plain/metrics.json").read_text())
