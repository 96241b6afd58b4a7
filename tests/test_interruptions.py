"""Runs that are stopped, killed, entered twice, or find the disk full: said in one line, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import train
from lightning_modules import early_exit
from running.command_line import Refused
from storage.files import written_aside
from tests.cases import SMALL
from tests.conftest import ROOT, composed
from tests.test_runs import Interrupted, run

TINY = ["backbone=resnet8", "method=early_exit", "method/heads=light"]


def started(folder: Path, *overrides: str, **options) -> subprocess.Popen:
    command = [sys.executable, "train.py", *SMALL, *TINY, *overrides, f"hydra.run.dir={folder}"]
    options = {"preexec_fn": _heed_ctrl_c, **options}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": plain_environment()}
    return subprocess.Popen(command, cwd=ROOT, **options)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts in the background ignore it


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


def test_a_moved_run_directory_goes_on_where_it_is_now(tmp_path, monkeypatch) -> None:
    command = [*TINY, "epochs=3"]
    losses, original = iter(range(100)), early_exit.Joint.loss

    def stops(self, logits, labels):
        if next(losses) == 4:
            raise Interrupted
        return original(self, logits, labels)

    with monkeypatch.context() as patch:
        patch.setattr(early_exit.Joint, "loss", stops)
        with pytest.raises(Interrupted):
            run(tmp_path / "old", *command)
    (tmp_path / "old").rename(tmp_path / "new")
    run(tmp_path / "new", *command)
    assert not (tmp_path / "old").exists()
    assert len((tmp_path / "new/metrics.csv").read_text().splitlines()) == 1 + 3 + 1
    (tmp_path / "new/config.yaml").write_text("seed: [")
    with pytest.raises(
        Refused, match=r"Expected .*new/config.yaml to say what run .*new holds, but it is missing or dam"
    ):
        run(tmp_path / "new", *command)


@pytest.mark.parametrize("content", ["", "[1]", '{"test/a'])
def test_damaged_metrics_are_named(content: str, tmp_path) -> None:
    run(tmp_path, *TINY)
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(Refused, match=rf"{tmp_path}/metrics.json is damaged; delete it, and the same command tests"):
        run(tmp_path, *TINY)


def test_a_signal_to_all_processes_of_a_run_is_said_once(make_folder, tmp_path) -> None:
    data = ["dataset=image_folder", f"dataset.root={make_folder(side=32)}", "dataset.in_memory=false"]
    process = started(tmp_path / "run", *data, "dataset.num_workers=2", "epochs=2000", start_new_session=True)
    wait_for(tmp_path / "run/checkpoints/joint.ckpt", process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"Stopped by SIGINT. To go on: python train.py .*\n", errors), errors
