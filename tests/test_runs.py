"""Whole runs: every method, what a run directory holds, going on where a run stopped, and bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

import train
from callbacks.metrics_csv import KEYS
from lightning_modules.early_exit import loss_weights
from networks.early_exit_network import EarlyExitNetwork
from networks.packing import unpacked_state
from running.assembly import build_network, build_phases
from running.command_line import Refused
from running.hardware import pick_precision
from running.phases import Training
from tests.cases import BACKBONES, GATED, METHODS, SMALL, WITHOUT_SHORTCUTS
from tests.conftest import ROOT, composed


def run(folder: Path, *overrides: str) -> dict[str, float]:
    return train.train(composed(*SMALL, *overrides), folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_a_whole_run_directory(method: str, tmp_path, capsys) -> None:
    metrics = run(tmp_path, "backbone=resnet8", *METHODS[method])
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    cfg = OmegaConf.load(tmp_path / "config.yaml")
    network = build_network(cfg, len(cfg.images.classes), tuple(cfg.images.shape))
    network.load_state_dict(unpacked_state(network, load_file(tmp_path / "network.safetensors")))
    exits = range(1, network.num_exits + 1)
    conventions = ("macs", "ptflops", "energy_uj")
    costs = [f"{part}{convention}" for part in ("", "device_", "server_") for convention in conventions]
    names = {f"test/exit_{k}/{name}" for k in exits for name in ("acc", "fraction", *costs)}
    score = "entropy" if method == "hybrid" else "confidence"
    early = {f"test/exit_{k}/{score}_threshold" for k in exits[:-1]} | {"test/device_bytes"}
    ways = {"test/sent_bytes", "test/latency_ms", "test/device_latency_ms"}
    assert names | early | ways | {"test/acc", *(f"test/{name}" for name in costs)} <= set(metrics)
    assert sum(metrics[f"test/exit_{k}/fraction"] for k in exits) == pytest.approx(1)
    phases = {"early_exit_separate": 3, "exit_predictor": 2, "feature_codec": 4, "ddi": 4, "iadi": 3, "skipnet": 2}
    assert len(list((tmp_path / "checkpoints").iterdir())) == phases.get(method, 1)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert tuple(header[:3]) == KEYS
    assert {"train/loss", "train/images_per_s", "val/acc", "val/exit_1/acc", "val/exit_1/fraction"} <= set(header)
    printed = capsys.readouterr().out
    assert "Cost per image" in printed
    assert "adaptive" in printed


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_methods_run_on_every_backbone(backbone: str, tmp_path) -> None:
    assert 0 <= run(tmp_path, f"backbone={backbone}", "method=early_exit")["test/acc"] <= 1


@pytest.mark.slow
def test_a_sweep_runs_every_combination(tmp_path) -> None:
    groups = ["backbone=resnet8,vgg16_bn,alexnet,densenet76", "method=plain,early_exit", "debug=fast"]
    command = [sys.executable, "train.py", "-m", *groups, f"hydra.sweep.dir={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("*/config.yaml")]
    ran = {(config["backbone"]["name"], config["method"]["name"]) for config in configs}
    assert ran == {(b, m) for b in BACKBONES for m in ("plain", "early_exit")}
    assert len(list(tmp_path.glob("*/metrics.json"))) == 8


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_backbone(backbone: str, method: str, tmp_path) -> None:
    if method in GATED and backbone in WITHOUT_SHORTCUTS:
        with pytest.raises(Refused, match="have none: choose a resnet or densenet, or another method"):
            run(tmp_path, f"backbone={backbone}", *METHODS[method])
    else:
        assert 0 <= run(tmp_path, f"backbone={backbone}", *METHODS[method])["test/acc"] <= 1


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "network.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path) -> None:
    results = [run(tmp_path / str(i), "backbone=resnet8", f"seed={seed}") for i, seed in enumerate((1, 1, 2))]
    assert results[0] == results[1]
    weights = [weights_of(tmp_path / str(i)) for i in range(3)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


class Interrupted(Exception):
    pass


def timeless(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "train/images_per_s"} for row in rows]


@pytest.mark.parametrize(
    ("objective", "call", "method"),
    [
        ("early_exit.Joint", 3, METHODS["early_exit"]),  # in the middle of the second epoch
        (
            "early_exit.Joint",
            4,
            ["method=early_exit", "optimizer=adamw", "scheduler.interval=epoch"],
        ),
        ("early_exit.Joint", 3, METHODS["hybrid"]),  # whose latent weights are in the checkpoint alone
        ("early_exit.OneExit", 2, METHODS["early_exit_separate"]),  # at the start of the last phase
        # in a second epoch, with a pressure that remembers the first
        ("skipping.IADI", 3, [*METHODS["ddi"], "method.phases.iadi.epochs=2"]),
        ("exit_predictor.Distillation", 1, METHODS["exit_predictor"]),  # after a phase that chooses
        # in a second epoch, with a limit that follows the batches
        pytest.param(
            "feature_codec.Server",
            3,
            [*METHODS["feature_codec"], "method.phases.codec.epochs=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_where_it_stopped_as_if_it_had_not(objective, call, method, tmp_path, monkeypatch) -> None:
    command = ["backbone=resnet8", "epochs=3", *method]
    whole = run(tmp_path / "whole", *command)
    calls = iter(range(100))
    target = f"lightning_modules.{objective}.loss"
    original = get_object(target)

    def stops(self, logits, targets):
        if next(calls) == call:
            raise Interrupted
        return original(self, logits, targets)

    with monkeypatch.context() as patch:
        patch.setattr(target, stops)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", *command)
    assert not (tmp_path / "stopped/metrics.json").exists()
    assert run(tmp_path / "stopped", *command) == whole
    assert same(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole"))
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")


def test_a_directory_with_another_run_is_refused_and_untouched(tmp_path) -> None:
    run(tmp_path, "backbone=resnet8", "method=plain")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        Refused, match=r"run of another config \(optimizer.lr 0.1 -> 0.2\); choose another hydra.run.dir"
    ):
        run(tmp_path, "backbone=resnet8", "method=plain", "optimizer.lr=0.2")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def rates(folder: Path) -> list[float]:
    return [float(row["train/lr"]) for row in timeless(folder) if row["train/lr"]]


def test_optimizers_and_schedulers_are_exchangeable(tmp_path) -> None:
    command = ["backbone=resnet8", "method=plain", "epochs=4", "optimizer.lr=0.2"]
    run(tmp_path / "cosine", *command)
    assert rates(tmp_path / "cosine")[-1] == pytest.approx(1e-4)
    run(tmp_path / "constant", *command, "scheduler=constant")
    assert rates(tmp_path / "constant") == pytest.approx([0.2] * 4)
    run(tmp_path / "epochs", *command, "scheduler.interval=epoch", "scheduler.make.warmup=0")
    assert rates(tmp_path / "epochs")[-1] == pytest.approx(1e-4)
    run(tmp_path / "cycle", *command, "scheduler=onecycle", "method.phases.plain.optimizer.lr=0.3")
    assert max(rates(tmp_path / "cycle")) == pytest.approx(0.3, rel=0.2)
    run(tmp_path / "adamw", *command, "optimizer=adamw", "optimizer.lr=0.01")
    state = torch.load(tmp_path / "adamw/checkpoints/plain.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert "exp_avg" in state[0]
    assert not same(weights_of(tmp_path / "adamw"), weights_of(tmp_path / "constant"))


def test_counts_are_exact_beyond_24_bits(tmp_path) -> None:
    metrics = run(tmp_path, "backbone=resnet44", "backbone.shortcut=B", "method=plain")
    assert metrics["test/ptflops"] == metrics["test/exit_1/ptflops"] == 98_517_642


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(tmp_path) -> None:
    # a small rate, and heads without the large FCs, which would multiply the rounding errors of the two
    command = ["backbone=resnet8", "method/heads=light", "optimizer.lr=0.01"]
    eager = run(tmp_path / "eager", *command)
    compiled = run(tmp_path / "compiled", *command, "compile=true")
    assert compiled == pytest.approx(eager, abs=0.02)
    a, b = weights_of(tmp_path / "eager"), weights_of(tmp_path / "compiled")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)


def test_bf16_is_picked_only_where_it_is_fast(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pick_precision("cpu") == "bf16-mixed"


def test_experiments_are_the_papers_and_the_command_line_beats_them() -> None:
    names = [path.stem for path in (ROOT / "conf/experiment/exit_predictor").glob("[!_]*.yaml")]
    names = [name for name in names if "jpeg" not in name]
    assert len(names) == 7
    for name in names:
        cfg = composed(f"experiment=exit_predictor/{name}")
        backbone, _, dataset = name.removesuffix("_three_exits").rpartition("_")
        assert (cfg.backbone.name, cfg.dataset.name) == (backbone, dataset)
        assert lengths(cfg) == {"early_exit": 220, "predictor": 220}
        optimizer = {key: cfg.optimizer[key] for key in ("lr", "weight_decay")}
        assert optimizer == {"lr": 0.1, "weight_decay": 5e-4}
        assert cfg.method.phases.predictor.optimizer.weight_decay == 2e-4
        assert cfg.dataset.batch_size == 128
        exits = 4 if "three" in name else 3
        assert cfg.method.phases.early_exit.objective.weights == "auto"
        assert loss_weights("auto", exits) == loss_weights("exit_predictor", exits)
        assert cfg.scheduler.make.final_lr == 1e-4
        assert cfg.scheduler.make.hold * 220 == pytest.approx(20, abs=1e-4)
        assert cfg.scheduler.make.warmup * 220 == pytest.approx(1, abs=1e-3)
    changed = composed("experiment=exit_predictor/resnet44_cifar10", "backbone=resnet20", "epochs=4", "dataset=digits")
    assert (changed.backbone.depth, changed.dataset.name) == (20, "digits")
    assert lengths(changed) == {"early_exit": 2, "predictor": 2}
    for method, phase in (("early_exit", "joint"), ("plain", "plain")):
        alone = composed("experiment=exit_predictor/vgg16_bn_cifar10", f"method={method}", "epochs=220")
        assert lengths(alone) == {phase: 220}
    for depth in (20, 44):
        cfg = composed(f"experiment=exit_predictor/resnet{depth}_cifar10_jpeg", "dataset.root=x")
        assert (cfg.backbone.depth, cfg.dataset.name) == (depth, "cifar10-jpeg")
        assert lengths(cfg) == {"early_exit": 12, "predictor": 6}
    three = built_network(composed("experiment=exit_predictor/resnet44_cifar100_three_exits"))
    assert (three.taps, three.predictor.layers[-1].out_features) == ((1, 4, 8), 3)


def test_experiments_of_latency_have_the_papers_lengths_and_bound() -> None:
    cfg = composed("experiment=latency/vgg16_bn_cifar100")
    assert lengths(cfg) == {"early_exit": 220, "codec": 60, "fine_tune": 20, "predictor": 220}
    assert (cfg.backbone.name, cfg.dataset.name, cfg.dataset.batch_size) == ("vgg16_bn", "cifar100", 128)
    assert (cfg.co_inference.bound_ms, cfg.co_inference.device_gflops) == (30, 3.62)
    network = built_network(cfg)
    assert (network.taps, network.cut, network.codec.payload_bytes) == ((1, 3), 3, 128 * 16 * 16 * 4 // 64)
    for name, bound in (("resnet44", 15), ("vgg16_bn", 30)):
        cfg = composed(f"experiment=latency/{name}_cifar10_jpeg", "dataset.root=x")
        assert lengths(cfg) == {"early_exit": 12, "codec": 8, "fine_tune": 4, "predictor": 6}
        assert (cfg.backbone.name, cfg.dataset.name, cfg.co_inference.bound_ms) == (name, "cifar10-jpeg", bound)


def built_network(cfg: DictConfig) -> EarlyExitNetwork:
    return build_network(cfg, 100, (3, 32, 32))


def lengths(cfg: DictConfig) -> dict[str, int]:
    network = build_network(cfg, 10, (3, 32, 32))
    return {phase.name: phase.epochs for phase in build_phases(cfg, network) if isinstance(phase, Training)}
