"""The dashboard plots what runs log, and says in one line why it cannot be saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import dashboard
import train
from tests.cases import METHODS, SMALL
from tests.conftest import composed
from tests.offline_runs import without_account


@pytest.fixture
def logged(tmp_path) -> set[str]:
    """The columns of a real run's metrics, and what W&B is given at its end."""
    train.train(composed(*SMALL, "backbone=resnet8", *METHODS["early_exit"]), tmp_path)
    columns = set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    pictures = {f"figures/{path.stem}" for path in (tmp_path / "figures").glob("*.png")}
    return columns | set(json.loads((tmp_path / "metrics.json").read_text())) | pictures | {"phase_index"}


def plotted(node: Any) -> Iterator[str]:
    """Every metric that a panel of the spec names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("metrics", "mediaKeys"):
                yield from value
            elif key in ("xAxis", "yAxis") and value != "_step":
                yield value.removeprefix("summary:")
            else:
                yield from plotted(value)
    elif isinstance(node, list):
        for value in node:
            yield from plotted(value)


def test_it_plots_what_a_run_logs(logged) -> None:
    section = dashboard.workspace("me", "offramp", exits=3)._spec["spec"]["section"]
    names = set(plotted(section["panelBankConfig"]))
    assert names <= logged
    assert {"step", "val/acc", "val/macs", "test/acc", "test/macs", "train/loss", "figures/exits"} <= names
    assert {f"val/exit_{k}/{name}" for k in (1, 2, 3) for name in ("acc", "fraction")} <= names
    shown = [column for column in section["runSets"][0]["runFeed"]["columnVisible"] if column.startswith("summary:")]
    assert {column.removeprefix("summary:") for column in shown} <= logged
    assert "summary:test/exit_3/acc" in shown
    assert dashboard.columns(3)[3:5] == ["run:jobType", "run:tags"]


@pytest.mark.parametrize("group", ["lr", "multirun/2026-11-22/10-15-00", "it's", "a\\b"])
def test_it_shows_one_sweep(group: str) -> None:
    [runs] = dashboard.workspace("me", "offramp", group)._spec["spec"]["section"]["runSets"]
    [condition] = runs["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"]) == ("=", group)


def stopped(capsys, *arguments: str) -> str:
    """The one line that it ends with, and that alone."""
    assert dashboard.main(["--entity", "me", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_without_a_key_or_the_package_it_says_so(tmp_path, capsys, monkeypatch) -> None:
    with without_account(tmp_path):
        assert stopped(capsys) == "error: No W&B API key; `wandb login` sets one.\n"
        monkeypatch.setenv("WANDB_API_KEY", "tooshort")
        assert "API key must have 40+ characters" in stopped(capsys)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert stopped(capsys).startswith("error: dashboard.py needs wandb-workspaces: pip install '.[dashboard]' (")
    with pytest.raises(SystemExit):
        dashboard.main(["--entity", "me", "--exits", "0"])
    assert "expected --exits of at least 1, got 0" in capsys.readouterr().err
