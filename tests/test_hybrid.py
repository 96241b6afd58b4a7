"""Methods in few bits: hybrid networks as the paper has them, packed files, and evaluations of designs."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from costs.footprint import device_bytes
from evaluation.runs import load_runs
from evaluation.tracing import Images
from inference.executor import Executor
from inference.thresholds import Entropy
from lightning_modules.early_exit import Joint, OneExit
from lightning_modules.plain import Plain
from networks.early_exit_network import EarlyExitNetwork
from networks.quantization import quantized_convs
from running.assembly import build_network, build_phases, build_policy
from running.command_line import Refused
from running.phases import Training
from tests.cases import GATED, METHODS, PRECISIONS, SMALL, WITHOUT_SHORTCUTS
from tests.conftest import composed


def run(folder: Path, *overrides: str) -> dict[str, float]:
    return train.train(composed(*SMALL, "backbone=resnet8", *overrides), folder)


def network_of(*overrides: str, classes: int = 10) -> EarlyExitNetwork:
    return build_network(composed(*overrides), classes, (3, 32, 32))


def test_the_papers_network_by_default() -> None:
    network = network_of("method=hybrid", "backbone=resnet32")
    assert network.taps == (10,)  # 20E + 10C
    few = quantized_convs(network)
    assert len(few) == 20
    assert all(name.startswith("chain.blocks.") and int(name.split(".")[2]) < 10 for name in few)
    assert {(conv.weight_bits, conv.act_bits) for conv in few.values()} == {(1, 1)}
    assert [type(layer).__name__ for layer in network.heads[0]] == ["AvgPool2d", "Flatten", "Linear"]
    assert network.heads[0][-1].in_features == 800
    for classes, threshold in ((10, 0.5), (100, 1.0)):
        policy = build_policy(composed("method=hybrid"), classes)
        assert isinstance(policy, Entropy)
        assert policy.thresholds == pytest.approx(threshold)


def test_edges_exits_and_bits_can_be_chosen() -> None:
    network = network_of("method=hybrid", "backbone=resnet32", "precision=w2a2", "precision.edge_convs=24",
                         "precision.act_bits=4", "method.exits.exits=3")  # fmt: skip
    assert network.taps == (4, 8, 12)
    assert {(conv.weight_bits, conv.act_bits) for conv in quantized_convs(network).values()} == {(2, 4)}
    full = network_of("method=hybrid", "backbone=resnet32", "precision=fp32", "precision.edge_convs=16")
    assert full.taps == (8,)
    assert not quantized_convs(full)


def test_by_default_all_up_to_the_cut_is_quantized() -> None:
    early = network_of("method=early_exit", "backbone=resnet20", "precision=w4a4")
    assert len(quantized_convs(early)) == 2 * early.taps[-1]
    assert len(quantized_convs(network_of("method=plain", "backbone=resnet20", "precision=w4a4"))) == 18
    assert not quantized_convs(network_of("method=plain", "precision=w4a4", "precision.edge_convs=0"))


@pytest.mark.parametrize(
    "options", [("method=early_exit", "backbone=alexnet", "method/exits=blocks", "method.exits.taps=[1]"),
                ("method=plain", "precision.edge_convs=0")],
)  # fmt: skip
def test_a_warning_when_nothing_is_quantized(options: tuple[str, ...], caplog) -> None:
    with caplog.at_level(logging.WARNING):
        network_of("precision=w1a1", *options)
    assert "Nothing is quantized, although weights have 1 and activations 1 bit: " in caplog.text


@pytest.mark.parametrize("method", ["hybrid", "early_exit"])
def test_optimization_chooses_the_phases(method: str) -> None:
    def objectives(way: str) -> list[object]:
        cfg = composed(f"method={method}", f"optimization={way}", "method/exits=quarters")
        network = build_network(cfg, 10, (3, 32, 32))
        phases = [phase for phase in build_phases(cfg, network) if isinstance(phase, Training)]
        return [phase.make_module(network, build_policy(cfg, 10)) for phase in phases]

    (joint,) = objectives("joint")
    assert isinstance(joint, Joint)
    assert joint.weights == pytest.approx([0.12] * 5 + [0.4] if method == "hybrid" else [1 / 6] * 6)
    backbone, *exits = objectives("separate")
    assert isinstance(backbone, Plain)
    assert [type(exit) for exit in exits] == [OneExit] * 5


def test_without_an_early_exit_the_backbone_has_all_epochs() -> None:
    cfg = composed("method=hybrid", "method/exits=none", "optimization=separate", "epochs=10")
    [phase] = build_phases(cfg, build_network(cfg, 10, (3, 32, 32)))
    assert isinstance(phase, Training)
    assert (phase.name, phase.epochs) == ("backbone", 10)


def test_latent_weights_stay_within_their_range(tmp_path) -> None:
    run(tmp_path, "method=plain", "precision=w2a2", "optimizer.lr=30", "scheduler=constant")
    state = torch.load(tmp_path / "checkpoints/plain.ckpt", weights_only=True)["state_dict"]
    latent = torch.cat([value.flatten() for name, value in state.items() if name.endswith("conv.weight")])
    assert latent.abs().max() == 1
    # more than levels times scale: what is trained further is not what is stored
    assert len(latent.unique()) > 1000


COMBINATIONS = [
    ("method=early_exit", "precision=w4a4"),
    ("method=exit_predictor", "precision=w2a2", "method.phases.choose.choice.points=100"),
    ("method=plain", "precision=w1a1"),
    ("method=hybrid", "precision.weight_bits=3"),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: " ".join(options[:2]))
def test_packed_files_reload_to_the_same_bits(options: tuple[str, ...], tmp_path, monkeypatch) -> None:
    seen: dict[str, EarlyExitNetwork] = {}
    carried_out = train.carry_out

    def kept(run, *rest):
        seen["network"] = run.network
        return carried_out(run, *rest)

    monkeypatch.setattr(train, "carry_out", kept)
    metrics = run(tmp_path, *options)
    [loaded] = load_runs([tmp_path])
    trained = seen["network"].eval()
    images = torch.randn(20, 3, 32, 32)
    with torch.inference_mode():
        for ours, theirs in zip(trained(images), loaded.network(images), strict=True):
            assert torch.equal(ours, theirs)
        if trained.predictor is not None:
            assert torch.equal(trained.predictor.scores(images), loaded.network.predictor.scores(images))
    names = load_file(tmp_path / "network.safetensors").keys()
    assert sum(name.endswith(".packed") for name in names) == len(quantized_convs(trained)) > 0
    assert not any(name.endswith("conv.weight") and ".branch." in name and "head" not in name for name in names)
    assert metrics["test/device_bytes"] == device_bytes(loaded.network)


def test_an_executed_point_is_what_the_run_reports(tmp_path) -> None:
    metrics = run(tmp_path, "method=hybrid", "trainer.limit_test_batches=1.0")
    [trained] = load_runs([tmp_path])
    assert isinstance(trained.fixed, Entropy)
    parts = [
        (Executor(trained.network, trained.fixed)(images), labels)
        for images, labels, *_ in Images(trained.config).batches("test", torch.device("cpu"))
    ]
    right = torch.cat([prediction.label == labels for prediction, labels in parts]).double().mean()
    assert metrics["test/acc"] == pytest.approx(right.item())
    left = torch.cat([prediction.exit == 1 for prediction, _ in parts]).double().mean().item()
    assert metrics["test/exit_1/fraction"] == pytest.approx(left)
    server = metrics["test/exit_2/server_energy_uj"]
    assert metrics["test/server_energy_uj"] == pytest.approx((1 - left) * server)
    assert metrics["test/energy_uj"] == pytest.approx(metrics["test/exit_1/energy_uj"] + (1 - left) * server)
    assert metrics["test/exit_1/entropy_threshold"] == pytest.approx(0.5)


def test_a_quantized_run_is_gone_on_with(tmp_path) -> None:
    run(tmp_path / "first", "method=early_exit", "precision=w2a2")
    options = ("method=exit_predictor", "precision=w2a2", "method.phases.choose.choice.points=100")
    run(tmp_path / "second", *options, f"method.from_run={tmp_path}/first")
    first, second = (load_file(tmp_path / name / "network.safetensors") for name in ("first", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(Refused, match=r"precision.*choose the same"):
        run(tmp_path / "third", *options, f"method.from_run={tmp_path}/first", "precision=w4a4")
    with pytest.raises(
        Refused, match="method=pruning removes filters of a network in full precision, got precision=w2a2"
    ):
        run(tmp_path / "fourth", "method=pruning", "precision=w2a2", f"method.from_run={tmp_path}/first")


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backbone", ["resnet8", "vgg16_bn", "alexnet", "densenet76"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_precision(method: str, backbone: str, precision: str, tmp_path) -> None:
    if method in GATED and backbone in WITHOUT_SHORTCUTS:
        pytest.skip("refused, which the matrix of methods and backbones tests")
    metrics = run(tmp_path, *METHODS[method], f"backbone={backbone}", f"precision={precision}")
    assert 0 <= metrics["test/acc"] <= 1
    assert math.isfinite(metrics["test/energy_uj"])
    [trained] = load_runs([tmp_path])
    assert bool(quantized_convs(trained.network)) == (precision != "fp32")
    shutil.rmtree(tmp_path)  # hundreds of megabytes of some backbones, a hundred times
