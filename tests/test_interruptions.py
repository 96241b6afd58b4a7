"""Runs that are stopped, killed, entered twice, damaged, or find the disk full: said in one line, and nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import train
from lightning_modules import early_exit
from running.command_line import Refused
from storage.checkpoints import DamagedCheckpoint, previous, unsealed
from storage.files import written_aside
from storage.weights import read_weights
from tests.cases import SMALL
from tests.conftest import ROOT, composed
from tests.test_runs import Interrupted, run, same, weights_of

TINY = ["backbone=resnet8", "method=early_exit", "method/heads=light"]


def started(folder: Path, *overrides: str, **options) -> subprocess.Popen:
    command = [sys.executable, "train.py", *SMALL, *TINY, *overrides, f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain_environment(), **options
    )


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("HYDRA_FULL_ERROR", "OFFRAMP_ONE_LINE")}


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail(f"{path} never came")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_in_good_order_and_says_how_to_go_on(number, status, tmp_path) -> None:
    process = started(tmp_path / "run", "epochs=2000")
    wait_for(tmp_path / "run/checkpoints/joint.ckpt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(errors.splitlines()) == 1, errors
    said = re.fullmatch(rf"Stopped by {number.name}. To go on: (python train.py .* hydra.run.dir=.*/run)\n", errors)
    assert said, errors
    assert not list((tmp_path / "run").rglob("*.tmp"))
    done = len((tmp_path / "run/metrics.csv").read_text().splitlines())
    # the command it gave, shortened to end soon: what differs is refused, so it did find the run
    again = [sys.executable, *shlex.split(said[1])[1:], "epochs=1"]
    refused = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, env=plain_environment())
    assert refused.stderr.startswith(f"error: {tmp_path}/run holds a run of another config (epochs 2000 -> 1)")
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == done


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch) -> None:
    first = run(tmp_path, *TINY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr("datamodules.digits.Digits.load", lambda self: pytest.fail("data was read"))
    assert run(tmp_path, *TINY) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(Refused, match="another config"):
        run(tmp_path, *TINY, "seed=1")


def test_phases_done_are_not_repeated(tmp_path, monkeypatch) -> None:
    command = [*TINY, "method/phases=separate"]
    run(tmp_path, *command)
    (tmp_path / "metrics.json").unlink()
    for objective in ("lightning_modules.plain.Plain", "lightning_modules.early_exit.OneExit"):
        monkeypatch.setattr(f"{objective}.loss", lambda *_: pytest.fail("trained again"))
    run(tmp_path, *command)


def test_a_second_process_in_a_run_directory_is_refused(tmp_path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(Refused, match=rf"Another process is at work in {tmp_path}; wait"):
        run(tmp_path, *TINY)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """A run of two epochs, as if it had been stopped before its end."""
    folder = tmp_path_factory.mktemp("two")
    run(folder, *TINY, "epochs=2")
    for name in ("metrics.json", "network.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def stopped(two_epochs, tmp_path) -> Path:
    subprocess.run(["cp", "-a", f"{two_epochs}/.", tmp_path], check=True)
    return tmp_path


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped"])
def test_a_damaged_checkpoint_is_detected_wherever_the_damage_is(stopped, damage) -> None:
    target = stopped / "checkpoints/joint.ckpt"
    whole = target.read_bytes()
    random = np.random.default_rng(0)
    detected = 0
    for place in random.integers(0, len(whole), 100):
        changed = bytearray(whole[:place] if damage == "truncated" else whole)
        if damage != "truncated":
            changed[place] ^= 1 << random.integers(8)
        target.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=str(target)):
            unsealed(target)
        detected += 1
    assert detected == 100
    target.write_bytes(whole)
    assert torch.load(target, weights_only=True)["state_dict"].keys()  # others read it too


def test_a_damaged_checkpoint_is_refused_before_data_is_read_and_the_one_before_goes_on(stopped, monkeypatch) -> None:
    target = stopped / "checkpoints/joint.ckpt"
    whole = weights_of_checkpoint(stopped)
    target.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.digits.Digits.load", lambda self: pytest.fail("data was read"))
        with pytest.raises(Refused) as error:
            run(stopped, *TINY, "epochs=2")
    offered = re.fullmatch(rf"{target} is damaged, or no checkpoint of Offramp; .* with: (mv .*)", str(error.value))
    assert offered, error.value
    subprocess.run(shlex.split(offered[1]), check=True)
    run(stopped, *TINY, "epochs=2")
    assert same(weights_of(stopped), whole)


def weights_of_checkpoint(stopped: Path) -> dict[str, torch.Tensor]:
    state = torch.load(stopped / "checkpoints/joint.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def test_without_a_whole_checkpoint_the_way_out_is_to_begin_again(stopped) -> None:
    target = stopped / "checkpoints/joint.ckpt"
    target.write_bytes(b"half")
    previous(target).write_bytes(b"half")
    with pytest.raises(Refused, match=r"so is joint.previous.ckpt. Delete both to begin that phase again"):
        run(stopped, *TINY, "epochs=2")
    previous(target).unlink()
    with pytest.raises(Refused, match="; delete it to begin that phase again"):
        run(stopped, *TINY, "epochs=2")


class Evil:
    """What a pickle from a stranger may do."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_pickle_in_place_of_a_checkpoint_or_of_weights_is_refused_and_never_executed(stopped, tmp_path) -> None:
    victim, poison = tmp_path / "executed", tmp_path / "weights.pt"
    target = stopped / "checkpoints/joint.ckpt"
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Evil(victim))),
        lambda path: torch.save(Evil(victim), path),
    ):
        target.unlink()
        write(target)
        write(poison)
        with pytest.raises(Refused, match=f"{target} is damaged, or no checkpoint of Offramp"):
            run(stopped, *TINY, "epochs=2")
        with pytest.raises(Refused, match=r"in the safetensors format in .*weights.pt, got another kind of file"):
            run(tmp_path / "other", *TINY, f"weights={poison}")
    assert not victim.exists()
    pickle.loads(pickle.dumps(Evil(victim)))
    assert victim.exists()  # it would have been


def test_a_run_starts_from_another_runs_weights(two_epochs, tmp_path) -> None:
    plain, exits = tmp_path / "plain", tmp_path / "exits"
    run(plain, "backbone=resnet8", "method=plain")
    run(exits, *TINY, f"weights={plain}", "optimizer.lr=0", "scheduler=constant")
    old, new = weights_of(plain), weights_of(exits)
    trained = [name for name in old if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(old[name], new[name]) for name in trained)
    assert any(name.startswith("heads.") for name in new)
    with pytest.raises(
        Refused, match=r"to hold the weights of this backbone; \d+ tensors are missing, left over or of"
    ):
        run(tmp_path / "deeper", "backbone=resnet14", "method=plain", f"weights={plain}/network.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_weights(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="another kind of file or a damaged one"):
        read_weights(tmp_path / "torn.safetensors")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    losses, original = iter(range(100)), early_exit.Joint.loss

    def becomes_nan(self, logits, labels):
        return original(self, logits, labels) * (float("nan") if next(losses) == 3 else 1)

    monkeypatch.setattr(early_exit.Joint, "loss", becomes_nan)
    with pytest.raises(
        Refused, match=r"The loss is nan in phase joint, epoch 2, step 3 of the phase; the checkpoint of "
    ):
        run(tmp_path, *TINY, "epochs=3")
    state = torch.load(tmp_path / "checkpoints/joint.ckpt", weights_only=True)
    assert state["epoch"] == 0
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_weights_that_are_no_numbers_never_enter_a_checkpoint(tmp_path) -> None:
    huge = "method.phases.joint.objective.weights=[1e30,1e30,1e30]"
    overflow = [huge, "optimizer.lr=1e20", "scheduler=constant", "trainer.limit_train_batches=1"]
    with pytest.raises(
        Refused, match=r"A weight is not finite in phase joint, epoch 1, step 0 .* has no checkpoint yet"
    ):
        run(tmp_path, *TINY, *overflow, "epochs=2")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_full_disk_is_said_and_what_was_written_is_kept(tmp_path) -> None:
    # files may grow to 150 kB, a checkpoint has more: the system answers a write with an error, as a full disk does
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))}
    process = started(tmp_path / "run", **limit)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert re.fullmatch(
        r"error: Cannot write .*: File too large. Nothing before it is lost: mend that, .*\n", errors
    ), errors
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    process = started(tmp_path / "run")
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")

    def fails() -> None:
        with written_aside(target) as file:
            file.write(b"half of what")
            raise Interrupted

    with pytest.raises(Interrupted):
        fails()
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_read_only_folder_is_refused_in_one_line(tmp_path) -> None:
    run(tmp_path / "first", *TINY)  # whatever is imported late is imported
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    before = os.geteuid()
    if before == 0:  # root may write anywhere
        for folder in (tmp_path, *tmp_path.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
        os.seteuid(65534)
    try:
        with pytest.raises(
            Refused, match=rf"Cannot write to {locked}: Permission denied; choose another hydra.run.dir"
        ):
            train.train(composed(*SMALL, *TINY), locked)
    finally:
        os.seteuid(before)


def test_the_weights_a_run_leaves_are_its_last_checkpoints(stopped) -> None:
    run(stopped, *TINY, "epochs=2")
    assert same(load_file(stopped / "network.safetensors"), weights_of_checkpoint(stopped))
