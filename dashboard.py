"""Saves Offramp's dashboard in a W&B project: ``python dashboard.py --entity me --project offramp [--group SWEEP]``.

A saved view of the project's runs, or of one sweep's: the accuracy of every exit and the share of images that leaves
there over the steps, what an image costs, accuracy against MACs with a point a run, the pictures and tables of the
finished runs, and the columns of the runs table. It needs a W&B account and the extra ``pip install '.[dashboard]'``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def workspace(entity: str, project: str, group: str | None = None, exits: int = 3) -> Any:
    """The dashboard as a ``wandb_workspaces.workspaces.Workspace``, not saved yet.

    Args:
        entity: the user or team that the project belongs to.
        group: a sweep, to show its runs alone.
        exits: how many exits the networks have, the last one included.
    """
    import wandb_workspaces.workspaces as ws

    # the library writes the filter as a string in single quotes and parses it again
    quoted = None if group is None else group.replace("\\", "\\\\").replace("'", "\\'")
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Offramp {group}" if group else "Offramp",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in _sections(exits).items()],
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == quoted) if quoted else "",
            order=[ws.Ordering(ws.Summary("test/acc"), ascending=False)],
            pinned_columns=columns(exits),
        ),
    )


def _sections(exits: int) -> dict[str, list[Any]]:
    accuracies, shares = (_over_exits(name, exits) for name in ("acc", "fraction"))
    return {
        "Accuracy of the exits": [
            _lines("accuracy, adaptive", ["val/acc"]),
            _lines("accuracy of every exit", accuracies),
            *(_lines(f"accuracy of exit {k}", [key]) for k, key in enumerate(accuracies, 1)),
        ],
        "Where images leave": [
            _lines("share leaving at every exit", shares, plot_type="stacked-area"),
            *(_lines(f"share leaving at exit {k}", [key]) for k, key in enumerate(shares, 1)),
        ],
        "Cost": [
            *_scatters(exits),
            _lines("MACs per image, adaptive", ["val/macs"]),
            _lines("energy per image in µJ, adaptive", ["val/energy_uj", "val/device_energy_uj"]),
        ],
        "Training": [_lines(key, [key]) for key in ("train/loss", "train/lr", "train/images_per_s", "phase_index")],
        "Results": _results(),
    }


def columns(exits: int) -> list[str]:
    """Of the runs table: the job type is the method, the tags are backbone, data set and precision."""
    results = ["test/acc", "test/macs", "test/energy_uj", "test/latency_ms", "test/sent_bytes", "test/device_bytes"]
    for k in range(1, exits + 1):
        results += [f"test/exit_{k}/acc", f"test/exit_{k}/fraction"]
    run = ["run:displayName", "run:state", "run:group", "run:jobType", "run:tags"]
    return run + [f"summary:{key}" for key in (*results, "train/images_per_s")]


def _over_exits(name: str, exits: int) -> list[str]:
    return [f"val/exit_{k}/{name}" for k in range(1, exits + 1)]


def _lines(title: str, keys: Sequence[str], **look: Any) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x="step", y=list(keys), **look)


def _scatters(exits: int) -> list[Any]:
    """Accuracy against MACs, a point a run: of the adaptive operating point, then of each exit."""
    import wandb_workspaces.reports.v2 as wr

    pairs = [("adaptive", "test")] + [(f"exit {k}", f"test/exit_{k}") for k in range(1, exits + 1)]
    return [
        wr.ScatterPlot(
            title=f"accuracy against MACs, {label}",
            x=wr.SummaryMetric(f"{prefix}/macs"),
            y=wr.SummaryMetric(f"{prefix}/acc"),
        )
        for label, prefix in pairs
    ]


def _results() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    pictures = wr.MediaBrowser(title="figures", media_keys=["figures/exits", "figures/curves"], num_columns=2)
    return [pictures, wr.WeavePanelSummaryTable(table_name="exits")]


def save(dashboard: Any) -> str:
    """Saves it; gives its address.

    Raises:
        ConnectionError: no API key, or no answer from W&B.
    """
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False):
            raise ConnectionError("No W&B API key; `wandb login` sets one.")
        dashboard.save()
        return dashboard.url
    except ConnectionError:
        raise
    except Exception as error:  # whatever its clients of the network raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConnectionError(f"W&B did not take the dashboard: {reason}.") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Saves the dashboard and prints its address; 1 with one line on standard error where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="W&B user or team of the project")
    parser.add_argument("--project", default="offramp", help="W&B project (default: offramp)")
    parser.add_argument("--group", help="only the runs of this sweep, as it is named in W&B")
    parser.add_argument("--exits", type=int, default=3, help="exits of the networks, the last included (default: 3)")
    options = parser.parse_args(arguments)
    if options.exits < 1:
        parser.error(f"expected --exits of at least 1, got {options.exits}")
    try:
        print(save(workspace(**vars(options))))
    except ImportError as error:
        print(f"error: dashboard.py needs wandb-workspaces: pip install '.[dashboard]' ({error}).", file=sys.stderr)
        return 1
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
