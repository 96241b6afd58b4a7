"""Whole runs: every method, what a run directory holds, going on where a run stopped, and bad input."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file

import train
from callbacks.metrics_csv import KEYS
from lightning_modules import early_exit
from running.assembly import build_network
from running.command_line import Refused, run_main
from running.hardware import pick_precision
from tests.cases import BACKBONES, METHODS, SMALL
from tests.conftest import ROOT, composed


def run(folder: Path, *overrides: str) -> dict[str, float]:
    return train.train(composed(*SMALL, *overrides), folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_a_whole_run_directory(method: str, tmp_path, capsys) -> None:
    metrics = run(tmp_path, "backbone=resnet8", *METHODS[method])
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    cfg = OmegaConf.load(tmp_path / "config.yaml")
    network = build_network(cfg, len(cfg.images.classes), tuple(cfg.images.shape))
    network.load_state_dict(load_file(tmp_path / "network.safetensors"))
    exits = range(1, network.num_exits + 1)
    names = {f"test/exit_{k}/{name}" for k in exits for name in ("acc", "fraction", "macs", "ptflops")}
    assert set(metrics) == names | {"test/acc", "test/macs", "test/ptflops"}
    assert sum(metrics[f"test/exit_{k}/fraction"] for k in exits) == pytest.approx(1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == (1 if "separate" not in method else 3)
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
        ("early_exit.OneExit", 2, METHODS["early_exit_separate"]),  # at the start of the last phase
    ],
)
def test_a_run_goes_on_where_it_stopped_as_if_it_had_not(objective, call, method, tmp_path, monkeypatch) -> None:
    command = ["backbone=resnet8", "epochs=3", *method]
    whole = run(tmp_path / "whole", *command)
    calls = iter(range(100))
    target = f"lightning_modules.{objective}.loss"
    original = getattr(getattr(early_exit, objective.split(".")[1]), "loss")  # noqa: B009

    def stops(self, logits, labels):
        if next(calls) == call:
            raise Interrupted
        return original(self, logits, labels)

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
    eager = run(tmp_path / "eager", "backbone=resnet8")
    compiled = run(tmp_path / "compiled", "backbone=resnet8", "compile=true")
    assert compiled == pytest.approx(eager, abs=0.02)
    a, b = weights_of(tmp_path / "eager"), weights_of(tmp_path / "compiled")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3)


def test_bf16_is_picked_only_where_it_is_fast(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pick_precision("cpu") == "bf16-mixed"


def test_experiments_are_the_papers_and_the_command_line_beats_them() -> None:
    names = [path.stem for path in (ROOT / "conf/experiment/exit_predictor").glob("[!_]*.yaml")]
    assert len(names) == 6
    for name in names:
        cfg = composed(f"experiment=exit_predictor/{name}")
        backbone, _, dataset = name.rpartition("_")
        assert (cfg.backbone.name, cfg.dataset.name, cfg.epochs) == (backbone, dataset, 220)
        optimizer = {key: cfg.optimizer[key] for key in ("lr", "weight_decay")}
        assert optimizer == {"lr": 0.1, "weight_decay": 5e-4}
        assert cfg.dataset.batch_size == 128
        assert cfg.method.phases.joint.objective.weights == "exit_predictor"
        assert cfg.scheduler.make.final_lr == 1e-4
        assert cfg.scheduler.make.hold * 220 == pytest.approx(20, abs=1e-4)
        assert cfg.scheduler.make.warmup * 220 == pytest.approx(1, abs=1e-3)
    changed = composed("experiment=exit_predictor/resnet44_cifar10", "backbone=resnet20", "epochs=3", "dataset=digits")
    assert (changed.backbone.depth, changed.epochs, changed.dataset.name) == (20, 3, "digits")


BAD = {
    "backbone=resnet21": r"backbone=resnet21 is not an option; backbone is one of alexnet, .*vgg16_bn\.",
    "precision=w4a4": r"precision is one of fp32\.",
    "experiment=nothing": r"experiment is one of exit_predictor/alexnet_cifar10, ",
    "backbon=resnet20": r"no key 'backbon'; the nearest is 'backbone'\.",
    "method/exit=none": r"no key 'method/exit'; the nearest is 'method/exits'\.",
    "optimizer.momentun=1": r"no key 'optimizer.momentun'; the nearest is 'optimizer.momentum'\.",
    "epoch=2": r"no key 'epoch'; the nearest is 'epochs'\.",
    "trainer.max_epochs=2": r"no key 'trainer.max_epochs'; the nearest is 'epochs'\.",
    "logger=null": r"Config group override must be a string or a list",
    "seed=a=": r"Error parsing override 'seed=a='",
    "seed=-1": r"seed to be a whole number of at least 0, got -1",
    "seed=1.5": r"seed to be a whole number",
    "seed=null": r"seed to be a whole number",
    "channels_last=maybe": r"channels_last to be true or false, got maybe",
    "dataset.pad=-1": r"dataset.pad to be a whole number of at least 0, got -1",
    "scheduler.make.hold=1": r"hold from 0 to below 1, got 1",
    "precision.weight_bits=4": r"weight_bits=32 and act_bits=32",
    "method=_base": r"method.name must be given",
    "method=plain method/exits=quarters": r"No phase of the method trains exit 1; choose method/exits=none",
    "trainer.devices=2": r"trainer.devices=1, the only number so far; got 2",
    "trainer.precision=bf16-true": r"auto, 32-true, bf16-mixed or 16-mixed, got bf16-true",
    "trainer.limit_test_batches=0": r"limit_test_batches above 0",
    "+trainer.max_epochs=2": r"multiple values for keyword argument 'max_epochs'",
    "+method.phases.joint.objective.foo=1": r"objective of phase joint does not take these options",
    "epochs=0": r"epochs to be a whole number of at least 1, got 0",
    "epochs=1.5": r"epochs to be a whole number of at least 1, got 1.5",
    "backbone.depth=21": r"depth 6n\+2, such as 20 or 26; got depth 21",
    "backbone.shortcut=C": r"option A or B, got 'C'",
    "method/exits=blocks": r"method.exits.taps must be given",
    "method/exits=blocks method.exits.taps=[12]": r"taps from 1 to 9, .* got 12",
    "dataset.scale=2 backbone=vgg16_bn": r"at least 32x32 pixels, got 16x16",
    "dataset=image_folder": r"dataset.root must be given",
    "dataset=image_folder dataset.root=/nowhere": r"there is no such folder",
    "dataset.val_fraction=2": r"val_fraction between 0 and 1, got 2",
    "method.phases.joint.objective.weights=[1,2]": r"Expected 3 loss weights",
    "optimizer.lr=high": r"The optimizer or scheduler does not take these options",
    "trainer.devices=two": r"The trainer does not take these options",
    "callbacks.exit_metrics.confidence_threshold=2": r"from 0 to 1, got 2",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_answered_with_one_line(command: str, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}/run", *command.split()])
    monkeypatch.setattr("datamodules.digits.Digits.load", lambda self: pytest.fail("data was read"))
    with pytest.raises(SystemExit) as end:
        run_main(train.main)
    assert end.value.code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert re.search(BAD[command], err), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "expected"), [("--help", "backbone: alexnet, "), ("--cfg=job", "confidence_threshold")]
)
def test_help_and_config_answer_fast(option: str, expected: str, tmp_path) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "train.py", *option.split("=")], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - start)
        assert expected in done.stdout
        if min(times) < 2:
            break
    assert min(times) < 2
