"""Whole runs: every method, what a run directory holds, going on where a run stopped, and bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train
from callbacks.metrics_csv import KEYS
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
    cfg = composed()
    cfg = type(cfg)(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    network = build_network(cfg, 10, (3, 32, 32))
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


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    command = ["backbone=resnet8", "epochs=3", *METHODS["early_exit_separate"]]
    whole = run(tmp_path / "whole", *command)

    from lightning_modules.early_exit import OneExit

    steps = OneExit.training_step

    def stops(self, batch, batch_idx):
        if self.exit == 2:
            raise Interrupted
        return steps(self, batch, batch_idx)

    monkeypatch.setattr(OneExit, "training_step", stops)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", *command)
    assert not (tmp_path / "stopped/metrics.json").exists()
    monkeypatch.setattr(OneExit, "training_step", steps)
    resumed = run(tmp_path / "stopped", *command)
    assert resumed == whole
    assert same(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole"))
    first, second = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "stopped"))
    assert len(first) == len(second)


def test_a_directory_with_another_run_is_refused_and_untouched(tmp_path) -> None:
    run(tmp_path, "backbone=resnet8", "method=plain")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        Refused, match=r"run of another config \(optimizer.lr 0.1 -> 0.2\); choose another hydra.run.dir"
    ):
        run(tmp_path, "backbone=resnet8", "method=plain", "optimizer.lr=0.2")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", ["trainer.precision=bf16-mixed", "optimizer=adamw", "scheduler=onecycle",
                                    "scheduler=constant", "channels_last=false"])  # fmt: skip
def test_parts_are_exchangeable(option: str, tmp_path) -> None:
    run(tmp_path, "backbone=resnet8", "method=plain", option)
    assert (tmp_path / "network.safetensors").exists()


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
    names = [path.stem for path in (ROOT / "conf/experiment/exit_predictor").glob("*.yaml")]
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
    "seed=-1": r"-1",
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
    "optimizer.lr=high": r"The optimizer does not take these options",
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
