"""Bad input is answered with one line before any data is read; help and config answer fast."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

import train
from running.command_line import run_main
from tests.conftest import ROOT

BAD = {
    "backbone=resnet21": r"backbone=resnet21 is not an option; backbone is one of alexnet, .*vgg16_bn\.",
    "precision=w3a3": r"precision is one of fp32, w1a1, w2a2, w4a4, w8a8\.",
    "experiment=nothing": r"experiment is one of ddi/densenet100_cifar10, ",
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
    "dataset.batch_size=2.5": r"dataset.batch_size to be a whole number of at least 1, got 2.5",
    "dataset.eval_batch_size=all": r"dataset.eval_batch_size to be a whole number of at least 1, got all",
    "dataset=synthetic dataset.difficulty=[1,0]": r"dataset.difficulty to be \[lowest, highest\] from 0 to 1, got",
    "~logger.csv": r"Expected logger.csv to be there",
    "callbacks.exit_metrics=null": r"Expected callbacks.exit_metrics to be there",
    "weights=5": r"Expected weights to be a file or a run directory, got 5",
    "logger=wandb logger.wandb.mode=on": r"logger.wandb.mode to be one of auto, online, offline, disabled, got on",
    "hydra/launcher=nope": r"hydra/launcher=nope is not an option; hydra/launcher is one of basic",
    "launcher=slurm": r"launcher is one of joblib, ray, submitit_local, submitit_slurm",
    "trainer.limit_train_batches=0": r"trainer.limit_train_batches above 0",
    "dataset.pad=-1": r"dataset.pad to be a whole number of at least 0, got -1",
    "scheduler.make.hold=1": r"hold from 0 to below 1, got 1",
    "precision.weight_bits=9": r"precision.weight_bits to be a whole number of bits from 1 to 8, or 32, got 9",
    "precision.act_bits=0.5": r"precision.act_bits to be a whole number of bits from 1 to 8, or 32, got 0.5",
    "precision=w1a1 precision.edge_convs=3": r"edge_convs=3 ends in the middle of a block; choose 2 or 4",
    "precision=w1a1 precision.edge_convs=19": r"edge_convs to be a whole number from 0 to 18, .*, got 19",
    "method=hybrid precision.edge_convs=0": r"method/exits=edge needs precision.edge_convs above 0",
    "method=hybrid method.exits.share=0": r"method.exits.share from above 0 to 1, got 0",
    "method=hybrid method.exits.exits=20": r"room for method.exits.exits=20 along 12 convolutions, got 6 blocks",
    "method=hybrid method.policy.thresholds=[1,2]": r"Expected 1 thresholds, one for each early exit",
    "method=exit_predictor optimization=joint": r"optimization=joint is for methods that .* has phases of its own",
    "optimization=separate method/phases=joint": r"optimization=separate and method/phases= name different phases",
    "energy.mac=-1": r"energy.mac to be a number of pJ of at least 0, got -1",
    "method=_base": r"method.name must be given",
    "method=plain method/exits=quarters": r"No phase of the method trains exit 1; choose method/exits=none",
    "trainer.devices=2 trainer.strategy=ddp_spawn": r"trainer.strategy to be auto, ddp or ",
    "trainer.num_nodes=2": r"trainer.num_nodes=1, got 2; torchrun or SLURM",
    "weights=/nowhere": r"Expected weights in /nowhere, there is no such file",
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
