"""Going on from what an earlier run has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from storage.run_directory import RunDirectory
from storage.weights import NAME

SAME = ("backbone", "method.exits", "method.heads", "precision", "dataset")
# a data set may be somewhere else, and be read or augmented otherwise; with another split of it thresholds would be
# chosen on images that the network was trained on
APART = ("weights", "root", "cache_dir", "num_workers", "batch_size", "eval_batch_size", "in_memory", "memory_limit",
         "pad", "flip", "epochs")  # fmt: skip


def require_same(cfg: DictConfig, earlier: Any) -> None:
    """Whether ``method.from_run`` is a finished run of the network and data that the config names.

    Raises:
        ValueError: it is not finished, or differs; the keys are named, with what to say for them.
    """
    folder = Path(str(earlier)).expanduser()
    if not (folder / NAME).is_file() or not (folder / "metrics.json").is_file():
        raise ValueError(f"Expected method.from_run to be the directory of a finished run, got {earlier}.")
    stored = RunDirectory(folder).stored_config()
    differing = []
    for key in SAME:
        theirs, ours = (_flat(OmegaConf.select(config, key), key) for config in (stored, cfg))
        differing += [
            f"{name}={theirs.get(name)}"
            for name in sorted(theirs | ours)
            if ours.get(name) != "auto" and theirs.get(name) != ours.get(name)
        ]
    if OmegaConf.select(stored, "method.pruning") is not None:
        raise ValueError(f"method.from_run={earlier} is a pruned network; choose the run that it was pruned from.")
    if differing:
        raise ValueError(
            f"method.from_run={earlier} is a run of another network or data set; it has {', '.join(differing[:4])}: "
            "choose the same."
        )


def _flat(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, DictConfig):
        return {key: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if name not in APART:
            flat |= _flat(value, f"{key}.{name!s}")
    return flat
