"""Two processes that train one network: the gradients of one with the doubled batch, every test image counted once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.test_interruptions import plain_environment, started, wait_for
from tests.test_runs import weights_of

RATE = 0.05
RUN = [
    *("backbone=alexnet", "~backbone.dropout", "backbone._target_=tests.tiny.tiny", "dataset=image_folder"),
    *("method=early_exit", "method/heads=light"),
    *("dataset.pad=0", "dataset.flip=false", "dataset.eval_batch_size=7", "optimizer.momentum=0"),
    *("optimizer.nesterov=false", f"optimizer.lr={RATE}", "scheduler=constant", "epochs=1"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.limit_train_batches=1"),
]


def trained(folder: Path, root: Path, *overrides: str) -> dict[str, float]:
    command = [sys.executable, "train.py", *RUN, *overrides, f"dataset.root={root}", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=plain_environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads((folder / "metrics.json").read_text())


def test_two_processes_compute_what_one_does_with_the_doubled_batch(make_folder, tmp_path) -> None:
    root = make_folder(side=32)
    # 61 test images: with two processes one of them has an image less
    Image.new("RGB", (32, 32), (200, 10, 10)).save(root / "test/c/more.png")
    cache = f"dataset.cache_dir={tmp_path}/cache"
    one = trained(tmp_path / "one", root, cache, "dataset.batch_size=16")
    two = trained(tmp_path / "two", root, cache, "dataset.batch_size=8", "trainer.devices=2")
    trained(tmp_path / "start", root, cache, "optimizer.lr=0")
    weights = {name: weights_of(tmp_path / name) for name in ("one", "two", "start")}
    for name, value in weights["start"].items():
        gradients = [(value - weights[run][name]) / RATE for run in ("one", "two")]
        torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-4)
        assert gradients[0].abs().max() > 1e-4
    assert two == pytest.approx(one, abs=1e-6)
    for name, value in two.items():
        if name.endswith(("/acc", "/fraction")):  # so many of 61 images, and none of them twice
            assert value * 61 == pytest.approx(round(value * 61), abs=1e-4)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_sweep_of_runs_in_two_processes_each(tmp_path) -> None:
    options = ["debug=fast", "dataset.batch_size=16", "trainer.accelerator=cpu", "trainer.devices=2", "seed=0,1"]
    command = [sys.executable, "train.py", "-m", "backbone=resnet8", *options, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=plain_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2


@pytest.mark.slow
def test_a_run_ends_when_one_of_its_processes_is_killed(tmp_path) -> None:
    options = ["trainer.devices=2", "epochs=2000"]
    process = started(tmp_path / "run", *options)
    wait_for(tmp_path / "run/checkpoints/joint.ckpt", process)
    (other,) = psutil.Process(process.pid).children()
    other.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Process 1 of the run ended with status -9" in errors
    process = started(tmp_path / "run", *options)
    time.sleep(15)
    (other,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    other.wait(timeout=20)
