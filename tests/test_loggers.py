"""What W&B, TensorBoard and the dashboard are given of a run, read back from its files; without account or network."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from callbacks.tensorboard_logger import TensorBoardLogger
from callbacks.wandb_logger import WandbLogger
from figures.run import exit_rows
from tests.cases import METHODS, SMALL
from tests.conftest import composed
from tests.offline_runs import OfflineRun, forget, offline_runs, without_account

SEPARATE = ["backbone=resnet8", *METHODS["early_exit_separate"]]
METRICS = {"test/acc": 0.5, "test/macs": 3e6} | {
    f"test/exit_{k}/{name}": value for k in (1, 2) for name, value in (("acc", 0.5), ("macs", 3e6), ("fraction", 0.5))
}


@pytest.fixture(scope="module", autouse=True)
def _no_account(tmp_path_factory) -> Iterator[None]:
    with without_account(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    yield
    forget()


@pytest.fixture(scope="module")
def run_dir(_no_account: None, tmp_path_factory) -> Path:
    """Of a run of three phases, as the fourth job of a sweep."""
    folder = tmp_path_factory.mktemp("run")
    job = ["job.sweep=lr", "job.number=3"]
    train.train(
        composed(*SMALL, *SEPARATE, *job, "logger=[wandb,tensorboard]", "logger.wandb.log_network=true"), folder
    )
    return folder


@pytest.fixture(scope="module")
def kept(run_dir: Path) -> OfflineRun:
    [run] = offline_runs(run_dir)
    return run


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_wandb_knows_what_the_run_is(kept: OfflineRun) -> None:
    assert kept.run.display_name == "resnet8 early_exit digits #3"
    assert (kept.run.project, kept.run.run_group, kept.run.job_type) == ("offramp", "lr", "early_exit")
    assert list(kept.run.tags) == ["resnet8", "digits", "fp32"]
    assert kept.run.resume
    assert kept.config["backbone"]["depth"] == 8
    assert kept.config["method"]["phases"]["exit"]["objective"]["_target_"].endswith("OneExit")
    assert kept.config["dataset"]["mean"] != "auto"
    assert kept.exit_code == 0


def test_wandb_has_every_value_of_the_csv_at_its_step_and_phase(kept: OfflineRun, run_dir: Path) -> None:
    rows = rows_of(run_dir)
    assert [row["phase"] for row in rows] == ["backbone", "exit_1", "exit_2", "exit_2"]
    for row in rows:
        place = {"phase": row.pop("phase"), "epoch": int(row.pop("epoch")), "step": int(row.pop("step"))}
        found: dict[str, float] = {}
        for logged in kept.history:
            if place.items() <= logged.items():
                found |= logged
        assert {key: found[key] for key in row} == pytest.approx({key: float(value) for key, value in row.items()})
    assert kept.axes == {"*": "step"}


def test_wandb_has_one_axis_over_the_phases(kept: OfflineRun) -> None:
    assert all(later["step"] >= row["step"] for row, later in pairwise(kept.history))
    starts = {row["phase"]: row["step"] for row in reversed(kept.history)}
    assert starts["backbone"] < starts["exit_1"] < starts["exit_2"]
    indices = {row["phase"]: row["phase_index"] for row in kept.history}
    assert indices == {"backbone": 1, "exit_1": 2, "exit_2": 3}


def test_wandb_has_the_results(kept: OfflineRun, run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {key: kept.summary[key] for key in metrics} == pytest.approx(metrics)
    assert kept.summary["train/images_per_s"] > 0
    assert kept.summary["status"] == "finished"
    table = json.loads(kept.files("media/table/exits_*.json")[0].read_text())
    assert table["columns"] == ["exit", "accuracy", "MACs", "device", "server", "share", "energy_uj"]
    assert table["data"] == [list(row) for row in exit_rows(metrics)]
    pictures = {path.read_bytes() for path in kept.files("media/images/figures/*.png")}
    assert pictures == {path.read_bytes() for path in (run_dir / "figures").glob("*.png")}
    assert len(pictures) == 2
    [network] = [artifact for artifact in kept.artifacts if artifact.type == "model"]
    [content] = network.manifest.contents
    assert Path(content.local_path) == run_dir / "network.safetensors"
    assert not list((run_dir / "wandb").rglob("*.ckpt"))


def test_tensorboard_has_the_same_on_the_same_axis(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "tensors": 0, "images": 0}).Reload()
    for key in ("train/loss", "val/exit_1/acc", "test/macs"):
        logged = {event.step: event.value for event in events.Scalars(key)}
        assert logged == pytest.approx({int(row["step"]): float(row[key]) for row in rows_of(run_dir) if key in row})
    phases = events.Tensors("phase/text_summary")
    assert [event.tensor_proto.string_val[0] for event in phases] == [b"backbone", b"exit_1", b"exit_2"]
    assert [event.value for event in events.Scalars("phase_index")] == [1, 1, 2, 2, 3, 3, 3]
    assert events.Images("figures/exits")[0].width == events.Images("figures/curves")[0].width == 1440
    assert b"| adaptive | " in events.Tensors("exits/text_summary")[0].tensor_proto.string_val[0]
    assert b"depth: 8" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def driven(folder: Path, status: str = "finished", **options) -> None:
    """A run of one phase of one step, told to the logger as a run tells it."""
    logger = WandbLogger(folder, **options)
    logger.begin_run({"seed": 0})
    logger.begin_phase("joint")
    logger.log_metrics({"val/acc": 0.25, "epoch": 0}, 1)
    logger.end_run(METRICS if status == "finished" else None, torch.nn.Identity(), folder, status)


def test_a_run_that_is_started_again_continues_its_wandb_run(tmp_path, capsys, monkeypatch) -> None:
    command = composed(*SMALL, "backbone=resnet8", *METHODS["early_exit_separate"], "logger=wandb")
    with monkeypatch.context() as patch:
        patch.setattr("lightning_modules.early_exit.OneExit.loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(command, tmp_path)
    train.train(command, tmp_path)
    before, after = offline_runs(tmp_path)
    assert before.run.run_id == after.run.run_id
    assert (before.exit_code, after.exit_code) == (1, 0)
    assert (before.summary["status"], after.summary["status"]) == ("failed", "finished")
    assert {row["phase"] for row in before.history} == {"backbone"}
    assert {row["phase"]: row["phase_index"] for row in after.history} == {"backbone": 1, "exit_1": 2, "exit_2": 3}
    [repeated] = [row for row in after.history if row["step"] <= before.history[-1]["step"]]
    assert repeated == pytest.approx(before.history[0] | before.history[1])
    printed = capsys.readouterr().out
    assert printed.count("W&B: no API key, so this run is offline; `wandb login` sets a key.\n") == 2
    assert printed.count(f"W&B: to upload this run: wandb sync {tmp_path}/wandb\n") == 2


def test_runs_of_one_process_are_apart_and_leave_nothing_open(tmp_path, capfd) -> None:
    driven(tmp_path / "first")
    process = psutil.Process()
    open_before = process.num_fds()
    for status in ("finished", "failed", "interrupted"):
        driven(tmp_path / status, status)
    assert process.num_fds() == open_before
    assert not [child for child in process.children(recursive=True) if "wandb" in child.name()]
    runs = {status: offline_runs(tmp_path / status)[0] for status in ("finished", "failed", "interrupted")}
    assert [run.exit_code for run in runs.values()] == [0, 1, 255]
    assert len({run.run.run_id for run in runs.values()}) == 3
    assert all(run.history[0] == {"val/acc": 0.25, "epoch": 0, "phase": "joint", "phase_index": 1, "step": 1}
               for run in runs.values())  # fmt: skip
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 8
    assert all(line.startswith("W&B: ") for line in out.splitlines())
    assert err == ""


def test_a_run_killed_before_its_first_record_does_not_hinder_the_upload(tmp_path) -> None:
    driven(tmp_path)
    [cut] = offline_runs(tmp_path)
    os.truncate(cut.path, 7)
    driven(tmp_path)
    [whole] = offline_runs(tmp_path)
    assert whole.run.run_id == cut.run.run_id
    assert whole.history[0] == cut.history[0]
    assert whole.exit_code == 0


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    driven(tmp_path, connect_timeout=0.5)
    [run] = offline_runs(tmp_path)
    assert run.summary["test/acc"] == 0.5
    out, err = capfd.readouterr()
    first, last = out.splitlines()
    assert err == ""
    assert first.startswith("W&B: no connection, so this run is offline: ")
    assert last.endswith(f"wandb sync {tmp_path}/wandb")


@pytest.mark.parametrize(
    ("options", "variable", "kept"),
    [({}, "offline", 1), ({}, "disabled", 0), ({"mode": "disabled"}, "offline", 0), ({"mode": "offline"}, "online", 1)],
)
def test_the_mode_is_the_config_s_or_the_environment_s(options, variable, kept, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    driven(tmp_path, **options)
    assert len(offline_runs(tmp_path)) == kept
    assert (tmp_path / "wandb").exists() == bool(kept)
    assert "no API key" not in capsys.readouterr().out


def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"mode to be one of auto, online, offline, disabled, got on\.$"):
        WandbLogger(tmp_path, mode="on")
    with pytest.raises(ValueError, match="Invalid project name 'a/b'"):
        WandbLogger(tmp_path, project="a/b")
    with pytest.raises(ValueError, match=r"Tag .* is 65 characters"):
        WandbLogger(tmp_path, tags=["x" * 65])
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "shared")
        with pytest.raises(ValueError, match="Expected WANDB_MODE to be one of online, offline, disabled, got shared"):
            WandbLogger(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="logger=wandb needs the package wandb: pip install wandb"):
        WandbLogger(tmp_path)
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(ValueError, match="logger=tensorboard needs the package tensorboard: pip install tensorboard"):
        TensorBoardLogger(tmp_path)
