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
# the part of method, and of the network, that a mark of a phase is about
PARTS = {
    "gives_gates": ("gates", "gating."),
    "gives_predictor": ("predictor", "predictor."),
    "gives_codec": ("codec", "codec."),
}
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
    if earlier is not None:  # what a phase trains anew is not gone on with
        parts = ["chain."] if network.gating is not None else ["chain.", "heads."]
        parts += [PARTS[mark][1] for mark in given_by_run(cfg) & PARTS.keys()]
        weights = {name: value for name, value in weights.items() if name.startswith(tuple(parts))}
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
    keys: tuple[str, ...] = SAME_BASE if gates_of(cfg) else SAME
    if OmegaConf.select(cfg, "method.exits.taps") == []:  # heads of no exit
        keys = tuple(key for key in keys if key != "method.heads")
    for key in keys:
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
    codec, own = part_of(stored, "codec"), part_of(cfg, "codec")
    if codec is not None and codec != own:
        raise ValueError(
            f"method.from_run={earlier} was trained behind {'a feature codec' if own is None else 'another codec'}; "
            "choose a run without, or go on with method=feature_codec and the same method.codec."
        )
    if own is not None and part_of(stored, "predictor") is not None and part_of(cfg, "predictor") is None:
        log.info("The Exit Predictor of %s is left out; method/predictor= goes on with it.", earlier)
    if OmegaConf.select(stored, "method.pruning") is not None:
        raise ValueError(f"method.from_run={earlier} is a pruned network; choose the run that it was pruned from.")
    if differing:
        raise ValueError(
            f"method.from_run={earlier} is a run of another network or data set; it has {', '.join(differing[:4])}: "
            "choose the same."
        )


def given_by_run(cfg: DictConfig) -> set[str]:
    """Marks of the phases whose result ``method.from_run`` has.

    ``gives_run``; and where it has the same gates, predictor or codec and a phase asks for it, ``gives_gates``,
    ``gives_predictor`` or ``gives_codec``.
    """
    earlier = OmegaConf.select(cfg, "method.from_run")
    if earlier is None:
        return set()
    asked = {mark for node in cfg.method.phases.values() if node for mark in PARTS if node.get(mark)}
    ours = {mark: part for mark in asked | {"gives_gates"} if (part := part_of(cfg, PARTS[mark][0])) is not None}
    if not ours:
        return {"gives_run"}
    folder = Path(str(earlier)).expanduser()
    if not (folder / "config.yaml").is_file():  # a run that goes on would train other phases
        raise ValueError(f"Expected method.from_run to be the directory of a finished run, got {earlier}.")
    stored = RunDirectory(folder).stored_config()
    return {"gives_run"} | {mark for mark, part in ours.items() if part == part_of(stored, PARTS[mark][0])}


def part_of(cfg: DictConfig, part: str) -> DictConfig | None:
    """The node of a method's ``gates``, ``predictor`` or ``codec``, None where it has none."""
    return gates_of(cfg) if part == "gates" else OmegaConf.select(cfg, f"method.{part}")


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
