"""The phases of a method: those that train, and those that choose thresholds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from costs.network import network_costs
from inference.choices import Choice
from inference.policies import Policy
from lightning_modules.classifier import Classifier
from networks.early_exit_network import EarlyExitNetwork
from running.processes import to_start


@dataclass(frozen=True)
class Training:
    """A phase that trains.

    Attributes:
        name: unique in the run; names its checkpoint.
        epochs: its length.
        make_module: wraps the shared network in this phase's objective; takes the run's policy, too.
    """

    name: str
    epochs: int
    make_module: Callable[[EarlyExitNetwork, Policy], Classifier]


@dataclass(frozen=True)
class Choosing:
    """A phase that trains nothing: it chooses the run's policy on the validation split.

    Attributes:
        name: unique in the run.
        choice: makes the policy from a trace of that split.
    """

    name: str
    choice: Choice


Phase = Training | Choosing


def check(
    phases: Sequence[Phase],
    network: EarlyExitNetwork,
    policy: Policy,
    options: Mapping[str, Any],
    given: Collection[str] = (),
) -> int:
    """Builds once what the phases will build, so that a wrong option is found before any data is read.

    Args:
        policy: what the run begins with.
        options: of the Trainer.
        given: what an earlier run has trained (``running.earlier_run.given_by_run``).

    Returns:
        How many processes this one has to make of itself.

    Raises:
        ValueError: an option that an objective, an optimizer, a scheduler or the Trainer does not take, a policy that
            does not fit the network, or an exit or predictor that no phase trains.
    """
    trained: set[int] = set()
    costs = network_costs(network)
    policy.check(costs, network.chain.num_classes)
    for phase in phases:
        if isinstance(phase, Choosing):
            policy = phase.choice.check(costs, network.chain.num_classes)
            continue
        _check_training(phase, network, policy)
        trained |= {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    ready = "gives_run" in given and network.gating is None
    for k, head in enumerate(network.heads, start=1):
        if not ready and not all(id(parameter) in trained for parameter in head.parameters()):
            raise ValueError(f"No phase of the method trains exit {k}; choose method/exits=none or method=early_exit.")
    unknown = {
        name: part is not None and f"gives_{name}" not in given and not all(id(p) in trained for p in part.parameters())
        for name, part in (("predictor", network.predictor), ("codec", network.codec))
    }
    if unknown["predictor"]:
        raise ValueError(
            "No phase of the method trains the Exit Predictor; choose method=exit_predictor or method/predictor=null."
        )
    if unknown["codec"]:
        raise ValueError(
            "No phase of the method trains the feature codec; choose method=feature_codec or method.codec=null."
        )
    if network.gating is not None and not all(id(p) in trained for p in network.gating.parameters()):
        raise ValueError(
            "No phase of the method trains the gates; choose method=ddi, iadi or skipnet, or method/gates=none."
        )
    return _check_trainer(options)


def _check_training(phase: Training, network: EarlyExitNetwork, policy: Policy) -> None:
    try:
        module = phase.make_module(network, policy)
    except TypeError as error:
        raise ValueError(f"The objective of phase {phase.name} does not take these options: {error}.") from error
    try:
        module.fresh_scheduler(module.fresh_optimizer(), total_steps=100)
    except TypeError as error:
        raise ValueError(f"The optimizer or scheduler does not take these options: {error}.") from error


def _check_trainer(options: Mapping[str, Any]) -> int:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = pl.Trainer(**options, max_epochs=1, **silent)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"The trainer does not take these options: {error}") from error
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            f"Expected trainer.precision to be auto, 32-true, bf16-mixed or 16-mixed, got {trainer.precision}."
        )
    for key in ("limit_train_batches", "limit_test_batches"):
        if getattr(trainer, key) == 0:
            raise ValueError(f"Expected trainer.{key} above 0: a run trains, and ends with its test.")
    return to_start(trainer)
