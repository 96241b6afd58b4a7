"""Sweeps: their tables, what a failed job leaves of the others, starting again, and the launchers."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from matplotlib.collections import PathCollection

from figures.sweep import sweep_figure
from running.jobs import Job
from running.sweep_tables import over_seeds, read_jobs, swept, write_tables
from tests.cases import SMALL
from tests.conftest import ROOT, composed
from tests.test_interruptions import plain_environment


def sweep(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", "-m", *SMALL, "backbone=resnet8", *overrides, f"hydra.sweep.dir={folder}"]
    env = plain_environment() | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=500)


def noted(folder: Path) -> pd.DataFrame:
    """Jobs of two methods and three seeds, of which one failed."""
    for number, (method, seed) in enumerate(itertools.product(("plain", "early_exit"), (0, 1, 2))):
        run = folder / str(number)
        run.mkdir(parents=True)
        job = Job(number, str(run), [f"method={method}", "backbone=resnet8", f"seed={seed}"], "finished")
        if number == 4:
            job.status, job.reason = "failed", "no, | not this"
        else:
            (run / "metrics.json").write_text(json.dumps({"test/acc": 0.9 + number**2 / 100, "test/macs": 5e6}))
        job.write(folder)
    return read_jobs(folder)


def test_seeds_are_summed_up_by_mean_and_standard_deviation(tmp_path) -> None:
    jobs = noted(tmp_path)
    assert swept(jobs) == ["method", "seed"]
    means = over_seeds(jobs).set_index("method")
    plain = [0.90, 0.91, 0.94]
    assert means.loc["plain", "test/acc/mean"] == pytest.approx(statistics.mean(plain))
    assert means.loc["plain", "test/acc/std"] == pytest.approx(statistics.stdev(plain))
    assert means.loc["early_exit", "test/acc/std"] == pytest.approx(statistics.stdev([0.99, 1.15]))
    assert means["seeds"].to_dict() == {"plain": 3, "early_exit": 2}
    assert over_seeds(jobs[jobs.seed == "0"]) is None
    assert over_seeds(jobs[jobs.status == "failed"][["job", "status", "reason", "seed"]]) is None


def test_the_tables_of_a_sweep(tmp_path) -> None:
    jobs = noted(tmp_path)
    write_tables(jobs, tmp_path)
    again = pd.read_csv(tmp_path / "sweep.csv")
    assert list(again.status) == ["finished"] * 4 + ["failed", "finished"]
    assert again.loc[4, "reason"] == "no, | not this"
    assert again["test/acc"].tolist()[:3] == pytest.approx([0.9, 0.91, 0.94])
    text = (tmp_path / "sweep.md").read_text()
    assert "0.9167 ± 0.0208" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows[:8]}) == 1


def test_the_picture_of_a_sweep_has_a_point_a_job_and_one_a_group(tmp_path) -> None:
    jobs = noted(tmp_path)
    axes = sweep_figure(jobs, swept(jobs), "a sweep").axes[0]
    points = np.concatenate([part.get_offsets() for part in axes.collections if isinstance(part, PathCollection)])
    done = jobs[jobs.status == "finished"]
    np.testing.assert_allclose(
        sorted(map(tuple, points)), sorted(zip(done["test/macs"] / 1e6, 100 * done["test/acc"], strict=True))
    )
    means = [line.get_xydata()[0] for line in axes.lines if line.get_marker() in "os"]
    expected = done.groupby("method", sort=False)["test/acc"].mean() * 100
    np.testing.assert_allclose([y for _, y in means], expected)
    write_tables(jobs, tmp_path)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_sweep_in_a_folder_is_refused(tmp_path) -> None:
    with FileLock(tmp_path / ".lock"):
        done = sweep(tmp_path, "seed=0,1")
    assert done.returncode == 1
    assert done.stderr == f"error: Another sweep is at work in {tmp_path}; wait for its end, or choose another " + (
        "hydra.sweep.dir.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_sweep_whose_tables_cannot_be_written_does_not_end_well(tmp_path) -> None:
    (tmp_path / "sweep.csv").mkdir()
    done = sweep(tmp_path, "optimizer.lr=-1,-2")
    assert done.returncode == 1
    assert "error: The tables of the sweep could not be written: " in done.stderr


def hydra_config(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True).hydra


@pytest.mark.parametrize("preset", ["seeds", "backbones_methods", "exit_places", "heads"])
def test_a_preset_sweeps_configs_that_compose(preset: str) -> None:
    config = hydra_config(f"sweep={preset}")
    assert config.mode.name == "MULTIRUN"
    values = [[f"{key}={value}" for value in str(values).split(",")] for key, values in config.sweeper.params.items()]
    jobs = list(itertools.product(*values))
    assert len(jobs) > 1
    for job in jobs:
        assert composed(f"sweep={preset}", *job).method.name


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_a_launcher_is_chosen_by_one_word(launcher: str) -> None:
    if launcher != "joblib":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher" if launcher == "ray" else "submitit")
    kind = launcher.split("_")[0]
    assert f"hydra_{kind}_launcher" in hydra_config(f"launcher={launcher}").launcher._target_
    assert f"hydra_{kind}_launcher" in hydra_config(f"hydra/launcher={launcher}").launcher._target_


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoints/*.ckpt")}


@pytest.mark.slow
def test_two_failed_jobs_of_twelve_stop_no_other_and_alone_are_run_again(make_folder, tmp_path) -> None:
    root = make_folder(side=32)
    roots = [tmp_path / f"images{i}" for i in range(6)]
    for copy in roots:
        shutil.copytree(root, copy)
    shutil.move(roots[3] / "test", tmp_path / "aside")
    options = ["dataset=image_folder", f"dataset.root={','.join(map(str, roots))}", "method=plain,early_exit"]
    options += [f"dataset.cache_dir={tmp_path}/cache", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    options += ["+callbacks.threads._target_=tests.tiny.Threads"]
    first = sweep(tmp_path / "sweep", *options)
    assert first.returncode == 1
    jobs = pd.read_csv(tmp_path / "sweep/sweep.csv")
    assert jobs.status.value_counts().to_dict() == {"finished": 10, "failed": 2}
    failed = jobs[jobs.status == "failed"]
    assert failed.reason.str.match(r"Expected dataset.root=.*images3 to hold train/ and test/ or val/; it holds ").all()
    assert jobs[jobs.status == "finished"]["test/acc"].notna().all()
    assert "2 of 12 jobs are not finished. To run those alone: python train.py -m " in first.stderr
    threads = {int(path.read_text()) for path in (tmp_path / "sweep").glob("*/threads.txt")}
    assert threads == {max(1, len(os.sched_getaffinity(0)) // 2)}
    before = times(tmp_path / "sweep")
    assert len(before) == 10

    shutil.move(tmp_path / "aside", roots[3] / "test")
    second = sweep(tmp_path / "sweep", *options)
    assert second.returncode == 0, second.stderr
    after = times(tmp_path / "sweep")
    assert {path: after[path] for path in before} == before
    assert {int(path.parts[-3]) for path in after.keys() - before.keys()} == set(failed.job)
    assert (pd.read_csv(tmp_path / "sweep/sweep.csv").status == "finished").all()


@pytest.mark.slow
def test_a_job_that_is_killed_leaves_a_table_and_the_others(tmp_path) -> None:
    options = ["seed=0,1,2,3", "launcher=joblib", "+callbacks.death._target_=tests.tiny.Death"]
    done = sweep(tmp_path / "sweep", *options, "hydra.launcher.n_jobs=2", DIES="1")
    assert done.returncode == 1
    jobs = pd.read_csv(tmp_path / "sweep/sweep.csv").set_index("job")
    assert jobs.status.to_dict() == {0: "finished", 1: "failed", 2: "finished", 3: "finished"}
    assert jobs.loc[1, "reason"] == "its process was killed, and killed again when it ran alone"
    assert sweep(tmp_path / "sweep", *options).returncode == 0
    assert (pd.read_csv(tmp_path / "sweep/sweep.csv").status == "finished").all()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_other_launchers_run_a_sweep(launcher: str, tmp_path) -> None:
    done = sweep(tmp_path / "sweep", f"launcher={launcher}", "seed=0,1", "optimizer.lr=0.1,-1")
    assert done.returncode == 1, done.stderr
    jobs = pd.read_csv(tmp_path / "sweep/sweep.csv")
    assert jobs.status.tolist() == ["finished", "failed"] * 2
    assert jobs.reason[1] == "Invalid learning rate: -1"


@pytest.mark.slow
def test_slurm_is_given_an_array_of_jobs(tmp_path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/{name}.txt\nexit 1\n')
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    options = [
        "launcher=submitit_slurm",
        "seed=0,1,2",
        "hydra.launcher.partition=fast",
        "hydra.launcher.timeout_min=90",
    ]
    done = sweep(tmp_path / "sweep", *options, PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 1  # there is no cluster
    text = (tmp_path / "sbatch.txt").read_text()
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(.*)", text))
    assert asked["array"] == "0-2%3"
    expected = {"partition": "fast", "time": "90", "cpus-per-task": "8", "gpus-per-node": "1", "mem": "32GB"}
    assert {key: asked[key] for key in expected} == expected
    assert asked["signal"].endswith("@120")  # so that a job is queued again before its time is up
    assert "submitit.core._submit" in text
