"""From a config to the objects it names."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from costs.latency import UNMEASURED
from costs.network import tap_macs
from datamodules.image_data import ImageData
from inference.budget import Budget
from inference.policies import Policy
from inference.thresholds import Confidence
from lightning_modules.classifier import Classifier
from networks.chain import Chain
from networks.early_exit_network import EarlyExitNetwork, with_exits
from networks.edge import edge_blocks, quantizable, quantized
from networks.feature_codec import checked_cut
from networks.pruning import pruned
from networks.quantization import FULL, quantized_convs
from running.earlier_run import gates_of, given_by_run
from running.hardware import pick_precision
from running.phases import Choosing, Phase, Training

log = logging.getLogger(__name__)

# these describe a node to the run, its target does not take them
DESCRIPTIVE = ("name", "epochs")


@dataclass(frozen=True)
class Run:
    """What a config names, built: the parts of one run, and how many processes carry it out."""

    data: ImageData
    network: EarlyExitNetwork
    policy: Policy
    phases: Sequence[Phase]
    callbacks: Sequence[Any]
    loggers: Sequence[Any]
    processes: int

    @property
    def followers(self) -> list[Any]:
        """Those who may be told when the run begins and ends."""
        return [*self.callbacks, *self.loggers]


def built(node: DictConfig, **given: Any) -> Any:
    """Instantiates a config node without its descriptive keys."""
    kwargs = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(kwargs, dict)
    kwargs = {key: value for key, value in kwargs.items() if key not in DESCRIPTIVE}
    return instantiate(kwargs, _convert_="all", **given)


def prepare(cfg: DictConfig) -> None:
    """Checks what no part of the run checks, and picks what ``auto`` leaves to the machine.

    Raises:
        ValueError: a key without a value, or one of the wrong kind.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} must be given: {missing[0]}=<value>.")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ValueError(f"Expected seed to be a whole number of at least 0, got {cfg.seed}.")
    for key in ("channels_last", "compile"):
        if not isinstance(cfg[key], bool):
            raise ValueError(f"Expected {key} to be true or false, got {cfg[key]}.")
    for key in ("logger.csv", "callbacks.exit_metrics"):
        if OmegaConf.select(cfg, key) is None:
            raise ValueError(f"Expected {key} to be there: what a run leaves is made of it.")
    if gates_of(cfg) is not None and OmegaConf.select(cfg, "co_inference.measured") is True:
        raise ValueError(UNMEASURED)
    _check_optimization(cfg)
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = pick_precision(cfg.trainer.accelerator)


def _check_optimization(cfg: DictConfig) -> None:
    if cfg.optimization is None:
        return
    if "from_run" in cfg.method:
        raise ValueError(
            f"optimization={cfg.optimization} is for methods that train exits and backbone alone, such as hybrid and "
            f"early_exit; method={cfg.method.name} has phases of its own."
        )
    if {"joint": "joint", "separate": "exit"}[cfg.optimization] not in cfg.method.phases:
        raise ValueError(f"optimization={cfg.optimization} and method/phases= name different phases; leave one out.")


def in_memory_format(cfg: DictConfig, network: EarlyExitNetwork) -> None:
    """Memory format and compilation, as the config has them."""
    if cfg.channels_last:
        network.to(memory_format=torch.channels_last)
    if cfg.compile:
        network.compile()
        network.chain.compile()
        if network.gating is not None:  # of which the loss takes more than the network's own call gives
            network.gated = torch.compile(network.gated)  # type: ignore[method-assign]
        if network.gating is not None or network.codec is not None:
            network.ungated = torch.compile(network.ungated)  # type: ignore[method-assign]


def build_callbacks(nodes: DictConfig | None) -> list[Any]:
    """Callbacks or loggers, each from its node; one that is null is left out."""
    return [built(node) for node in (nodes or {}).values() if node is not None]


def record(cfg: DictConfig, data: ImageData) -> None:
    """Notes in the config what the data set picked, so that the network can be built without it."""
    cfg.images = {"shape": list(data.input_shape), "classes": list(data.class_names)}
    picked = {"mean": list(data.mean), "std": list(data.std), "image_size": list(data.input_shape[1:]),
              "in_memory": getattr(data, "in_memory", None)}  # fmt: skip
    for key, value in picked.items():
        if cfg.dataset.get(key) == "auto":
            cfg.dataset[key] = value


def build_network(cfg: DictConfig, num_classes: int, input_shape: tuple[int, int, int]) -> EarlyExitNetwork:
    """The backbone with exits, predictor, gates and codec, in the numerical precision asked for; nothing is pruned yet.

    Raises:
        ValueError: a geometry, an exit place, a predictor, gates, a codec or a precision that cannot be.
    """
    chain: Chain = built(cfg.backbone, num_classes=num_classes, input_shape=input_shape)
    places, head = built(cfg.method.exits), built(cfg.method.heads)
    taps = places(chain.stage_lengths, tap_macs(chain), quantizable(chain))
    predictor = built(node) if (node := OmegaConf.select(cfg, "method.predictor")) else None
    chain = _in_few_bits(cfg, chain, taps)
    gates = built(node, chain=chain) if (node := OmegaConf.select(cfg, "method.gates")) else None
    codec = built(node)(chain, taps) if (node := OmegaConf.select(cfg, "method.codec")) else None
    if codec is not None and gates is not None:
        raise ValueError(
            "method/codec and method/gates cannot be combined: a gate's state would cross the cut beside the feature; "
            "choose method.codec=null or method/gates=none."
        )
    return with_exits(chain, taps, head, predictor, gates, codec)


def _in_few_bits(cfg: DictConfig, chain: Chain, taps: Sequence[int]) -> Chain:
    """The chain as ``precision`` has it: its first convolutions quantized, by default those up to the cut."""
    bits, asked = (cfg.precision.weight_bits, cfg.precision.act_bits), cfg.precision.get("edge_convs")
    convs = quantizable(chain)
    if asked is not None:
        edge_blocks(convs, asked)
    if bits == (FULL, FULL):
        return chain
    cut = max(taps, default=None)
    if (codec := OmegaConf.select(cfg, "method.codec")) is not None:
        cut = checked_cut(chain, taps, codec.cut)
    count = sum(convs[:cut]) if asked is None else asked
    few = quantized(chain, *bits, count)
    if count == 0:
        where = "in the blocks" if cut is None else f"before the cut, which follows block {cut},"
        reason = f"no convolution {where} can be" if asked is None else "precision.edge_convs=0"
        log.warning("Nothing is quantized, although weights have %d and activations %d bit: %s.", *bits, reason)
    return few


def shaped(cfg: DictConfig, network: EarlyExitNetwork) -> EarlyExitNetwork:
    """The network as the method has it: pruned, where it prunes.

    Raises:
        ValueError: a ratio that cannot be, or nothing to prune.
    """
    if OmegaConf.select(cfg, "method.pruning") is None:
        return network
    if quantized_convs(network):
        raise ValueError(
            f"method=pruning removes filters of a network in full precision, got precision={cfg.precision.name}; "
            "choose precision=fp32, or method=early_exit with this precision."
        )
    return pruned(network, cfg.method.pruning.ratio)


def build_policy(cfg: DictConfig, num_classes: int) -> Policy:
    """What a run begins with: the method's own policy, or one confidence threshold, within a budget if it has one.

    Raises:
        ValueError: thresholds that cannot be.
    """
    if (node := OmegaConf.select(cfg, "method.policy")) is not None:
        return built(node)(num_classes)
    policy = Confidence(cfg.callbacks.exit_metrics.confidence_threshold)
    budget = OmegaConf.select(cfg, "method.budget")
    return policy if budget is None else Budget(budget, policy)


def build_data(cfg: DictConfig) -> ImageData:
    """The data set, not read yet."""
    return built(cfg.dataset)


def build_phases(cfg: DictConfig, network: EarlyExitNetwork) -> list[Phase]:
    """The method's phases in order; one marked ``each_exit`` becomes one phase an early exit.

    One marked ``gives_run`` is left out where ``method.from_run`` has its result, and one marked ``gives_gates``,
    ``gives_predictor`` or ``gives_codec`` where that run has the same ones too; so is one marked ``for_predictor``
    without one, one of no epoch, if it is marked ``optional``, and what an experiment says of another method's phases.

    Raises:
        ValueError: a length of no epoch, or no phase at all.
    """
    phases: list[Phase] = []
    given = given_by_run(cfg)
    nodes = {str(n): node for n, node in cfg.method.phases.items() if node and {"objective", "choice"} & node.keys()}
    absent = {"each_exit": network.num_exits == 1, "for_predictor": network.predictor is None}
    idle = [name for name, node in nodes.items() if any(node.get(mark) and absent[mark] for mark in absent)]
    # phases of parts that are not there leave their share to the others
    left = 1 - sum(nodes.pop(name).get("share", 0) for name in idle)
    for name, node in nodes.items():
        if "choice" in node:
            phases.append(Choosing(name, built(node.choice)))
        elif not any(node.get(mark) for mark in given) and not (node.get("optional") and node.epochs == 0):
            phases += _trainings(cfg, name, node, network, left)
    if not nodes:
        raise ValueError("Expected at least one phase in method.phases, got none.")
    if (target := OmegaConf.select(cfg, "method.target_saving")) is not None:
        log.info("alpha follows method.target_saving=%s; method.alpha is not used.", target)
    elif "target_saving" in cfg.method:
        log.info("alpha is fixed at method.alpha=%s.", cfg.method.alpha)
    return phases


def _trainings(
    cfg: DictConfig, name: str, node: DictConfig, network: EarlyExitNetwork, left: float
) -> Iterator[Training]:
    exits = range(1, network.num_exits) if node.get("each_exit") else [None]
    epochs = _epochs(name, node, cfg.epochs, left * len(exits))
    for exit in exits:
        given = {} if exit is None else {"exit": exit}
        label = name if exit is None else f"{name}_{exit}"
        yield Training(label, epochs, _module_factory(cfg, node, given))


def _epochs(phase: str, node: DictConfig, total: int, parts: float) -> int:
    for key, epochs in (("epochs", total), (f"method.phases.{phase}.epochs", node.epochs)):
        if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
            raise ValueError(f"Expected {key} to be a whole number of at least 1, got {epochs}.")
    return node.epochs or max(1, round(node.share * total / parts))


def _module_factory(cfg: DictConfig, node: DictConfig, given: dict[str, Any]) -> Callable[..., Classifier]:
    changes = {key: value for key, value in node.optimizer.items() if value is not None}
    optimizer = built(cfg.optimizer, **changes)
    scheduler = None if cfg.scheduler.make is None else built(cfg.scheduler.make)
    objective = built(node.objective)
    takes_policy = "policy" in inspect.signature(objective).parameters

    def module(network: EarlyExitNetwork, policy: Policy) -> Classifier:
        return objective(
            network=network,
            **({"policy": policy} if takes_policy else {}),
            make_optimizer=optimizer,
            make_scheduler=scheduler,
            interval=cfg.scheduler.interval,
            **given,
        )

    return module
