"""The comparisons on the device as tables, in the layout of the Exit Predictor paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation import report
from evaluation.latency import SIZES
from evaluation.on_device import Comparison, Contender, Lambdas, Place
from evaluation.tables import CHOSEN_ON


def frame(comparison: Comparison) -> pd.DataFrame:
    """A row for each contender and λ, in numbers: ``on_device.csv``."""
    return pd.DataFrame(
        [
            {
                "run": contender.run,
                "network": contender.label,
                "chosen_on": comparison.chosen_on,
                **{f"threshold_{k}": value for k, value in enumerate(lambdas, 1)},
                **{f"prediction_{k}": value for k, value in enumerate(place.gammas, 1)},
                "test/acc": place.accuracy,
                f"test/{comparison.cost.kind}": place.device / comparison.cost.factor,
                f"test/{comparison.cost.whole.kind}": place.total / comparison.cost.factor,
                "test/reaching_last_exit": place.last,
                **{f"test/exit_{k}/computed": share for k, share in enumerate(place.computed, 1)},
            }
            for contender in comparison.contenders
            for lambdas, place in contender.places.items()
        ]
    )


def markdown(comparison: Comparison) -> str:
    """``on_device.md``: all contenders at each λ that matters, and the predictors side by side (table II)."""
    parts = [f"# {comparison.cost.title}\n"]
    for lambdas in comparison.tabled:
        table = pd.DataFrame(rows(comparison, lambdas)).to_markdown(index=False, disable_numparse=True)
        chosen = " (chosen by a run in validation)" if lambdas in comparison.own else ""
        parts.append(f"## λ = {_listed(lambdas)}{chosen}\n\n{table}\n")
    parts.append(
        f"γ: fewest on the device with less than {100 * comparison.more:.3g} % of the samples more at the last exit, "
        f"{CHOSEN_ON[comparison.chosen_on]}. Saved: against the early exits alone, with the standard error of the "
        "difference in accuracy on the same images.\n"
    )
    return "\n".join(parts)


def rows(comparison: Comparison, lambdas: Lambdas) -> list[dict[str, str]]:
    """Every contender at one λ, against the early exits alone."""
    title = comparison.cost.title
    found = []
    alone = comparison.alone
    for contender in comparison.contenders:
        place = contender.places[lambdas]
        base = None if alone is None or contender is alone else alone.places[lambdas]
        found.append(
            {
                "network": contender.label,
                "accuracy": f"{100 * place.accuracy:.2f} %",
                title: comparison.cost.amount(place.device),
                "of it the predictor": comparison.cost.amount(contender.predictor) if contender.predictor else "",
                "saved": "" if base is None else f"{100 * (1 - place.device / base.device):.1f} %",
                **_times(comparison, contender, lambdas),
                "accuracy minus EE": "" if base is None else _difference(place, base),
                "with the server": comparison.cost.amount(place.total),
                "reaching the last exit": f"{100 * place.last:.1f} %",
                "heads computed for": " / ".join(f"{100 * share:.0f}" for share in place.computed) + " %",
                "γ": _listed(place.gammas),
            }
        )
    return found


def _times(comparison: Comparison, contender: Contender, lambdas: Lambdas) -> dict[str, str]:
    if not comparison.times:
        return {}
    times = comparison.times.get((contender.label, lambdas), {})
    text = " / ".join(f"{times[size]:.2f}" for size in sorted(times))
    return {f"its time at batch {' / '.join(map(str, SIZES))}": text}


def _difference(place: Place, base: Place) -> str:
    gain = place.right.double() - base.right.double()
    return f"{100 * gain.mean().item():+.2f} ± {100 * gain.std(correction=0).item() / math.sqrt(len(gain)):.2f}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join("never" if math.isinf(value) else f"{value:.3g}" for value in values)


def summary(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of the table, for ``summary.json``."""
    return [{"thresholds": list(lambdas), **row} for lambdas in comparison.tabled for row in rows(comparison, lambdas)]


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """``on_device.csv`` and ``on_device.md``; gives the files."""
    report.write(folder, "on_device.csv", frame(comparison).to_csv(index=False, lineterminator="\n"))
    report.write(folder, "on_device.md", markdown(comparison))
    return [folder / "on_device.csv", folder / "on_device.md"]
