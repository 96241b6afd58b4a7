"""Going on from what an earlier run has trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from networks.exits import EarlyExitNetwork
from networks.packing import unpacked_state
from storage.run_directory import RunDirectory
from storage.weights import NAME, read_weights, start_from

log = logging.getLogger(__name__)

SAME = ("backbone", "method.exits", "method.heads", "precision", "dataset")
# a data set may be somewhere else, and be read or augmented otherwise; with another split of it thresholds would be
# chosen on images that the network was trained on
APART = ("weights", "root", "cache_dir", "num_workers", "batch_size", "eval_batch_size", "in_memory", "memory_limit",
         "pad", "flip", "epochs")  # fmt: skip


def load_weights(cfg: DictConfig, network: EarlyExitNetwork, run_dir: RunDirectory) -> None:
    """Starts the network from earlier weights or an earlier run, unless the run has checkpoints of its own.

    Raises:
        OSError, ValueError: no such file, no weights in it, or those of another backbone; an earlier run that is not
            finished, or of other settings.
    """
    earlier = OmegaConf.select(cfg, "method.from_run")
    if earlier is not None and cfg.weights is not None:
        raise ValueError("Expected weights or method.from_run to start from, got both; leave one out.")
    source = cfg.weights if earlier is None else earlier
    if source is None or run_dir.checkpoints:
        return
    if earlier is not None:
        require_same(cfg, earlier)
    if not isinstance(source, str):
        raise ValueError(f"Expected weights to be a file or a run directory, got {source}.")
    weights = unpacked_state(network, read_weights(source))
    if earlier is not None:  # a predictor of its own is not gone on with
        weights = {name: value for name, value in weights.items() if not name.startswith("predictor.")}
    if fresh := start_from(network, weights, str(source)):
        log.info("%s has no weights for %d tensors, which start untrained: %s, ...", source, len(fresh), fresh[0])


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
