"""Going on from what an earlier run has trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from networks.early_exit_network import EarlyExitNetwork
from networks.packing import unpacked_state
from storage.run_directory import RunDirectory
from storage.weights import NAME, read_weights, start_from

log = logging.getLogger(__name__)

SAME = ("backbone", "method.exits", "method.heads", "precision", "dataset")
SAME_BASE = ("backbone", "precision", "dataset")  # of a method with gates, whose exits come last
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
        parts: tuple[str, ...] = ("chain.", "heads.")
        if network.gating is not None:
            parts = ("chain.", "gating.") if "gives_gates" in given_by_run(cfg) else ("chain.",)
        weights = {name: value for name, value in weights.items() if name.startswith(parts)}
    fresh = start_from(network, weights, str(source))
    if fresh and (earlier is None or network.gating is None):
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
    for key in SAME_BASE if gates_of(cfg) else SAME:
        theirs, ours = (_flat(OmegaConf.select(config, key), key) for config in (stored, cfg))
        differing += [
            f"{name}={theirs.get(name)}"
            for name in sorted(theirs | ours)
            if ours.get(name) != "auto" and theirs.get(name) != ours.get(name)
        ]
    if gates_of(stored) and not gates_of(cfg):
        raise ValueError(
            f"method.from_run={earlier} was trained with gates, without which it is another network; choose a run "
            "without, or go on with method=ddi or iadi and the same method/gates."
        )
    if OmegaConf.select(stored, "method.pruning") is not None:
        raise ValueError(f"method.from_run={earlier} is a pruned network; choose the run that it was pruned from.")
    if differing:
        raise ValueError(
            f"method.from_run={earlier} is a run of another network or data set; it has {', '.join(differing[:4])}: "
            "choose the same."
        )


def given_by_run(cfg: DictConfig) -> set[str]:
    """Marks of the phases whose result ``method.from_run`` has: ``gives_run``, and with such gates ``gives_gates``."""
    earlier, gates = OmegaConf.select(cfg, "method.from_run"), gates_of(cfg)
    if earlier is None:
        return set()
    folder = Path(str(earlier)).expanduser()
    if gates and not (folder / "config.yaml").is_file():  # a run that goes on would train other phases
        raise ValueError(f"Expected method.from_run to be the directory of a finished run, got {earlier}.")
    theirs = gates_of(RunDirectory(folder).stored_config()) if gates else None
    return {"gives_run", "gives_gates"} if theirs and theirs == gates else {"gives_run"}


def gates_of(cfg: DictConfig) -> DictConfig | None:
    """The node of the gates, None where the method has none."""
    node = OmegaConf.select(cfg, "method.gates")
    return node if node is not None and (node.get("layer") or node.get("channel")) else None


def _flat(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, DictConfig):
        return {key: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if name not in APART:
            flat |= _flat(value, f"{key}.{name!s}")
    return flat
